"""How the adapters of a set were trained: apart, together through a rule, or distilled from the product of others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.sets.entries import Adapter

TOGETHER = {
    "jointly": "The adapters were trained together in one run, on mixtures of their rewards, through the rule "
    "`{rule}`: the fused policy at any weights is what was trained.",
    "distilled": "The adapters were distilled together: merged by weight, they are fitted to the product of the "
    "adapters that they started from. With several variance schedules that is the rule `product` with `gate` infinite.",
}
STRENGTHS = (
    " Loaded together with LoRA strengths w_i that sum to 1, these adapters are the network that was trained at these "
    "weights."
)


@dataclass(frozen=True, kw_only=True)
class SetTraining:
    """How the adapters of a set were trained.

    Attributes:
        how: `apart`, each by itself; `jointly`, all in one run on mixtures of their rewards; or `distilled`.
        rule: the rule that they were trained for, which is the default of their set. Distilled adapters are fitted as
            one network that gives the product's Gaussian: `soup`, or with several variance schedules `product` with an
            infinite gate.
    """

    how: Literal["apart", "jointly", "distilled"]
    rule: str

    def __str__(self) -> str:
        texts = {
            "apart": "each adapter by itself",
            "jointly": f"jointly, by the rule {self.rule}",
            "distilled": f"distilled, for the rule {self.rule}" + ("" if self.rule == "soup" else " with gate inf"),
        }
        return texts[self.how]

    def sentences(self) -> list[str]:
        """What a card says of adapters that were trained together."""
        return [TOGETHER[self.how].format(rule=self.rule)] if self.how in TOGETHER else []

    def to_json(self) -> dict[str, str]:
        return {"how": self.how, "rule": self.rule}


APART = SetTraining(how="apart", rule="product")


def training_of(adapters: Sequence[Adapter]) -> SetTraining:
    """How these adapters were trained, by their records: together where all are of one run with several objectives."""
    records = [adapter.record for adapter in adapters]
    runs = {str(record.get("config_sha256", "")) for record in records}
    if len(records) < 2 or len(runs) > 1:
        return APART
    if together := _common(records, "joint"):
        rule = str(together.get("rule"))
        return SetTraining(how="jointly", rule=rule if rule in ("soup", "product") else "soup")
    if _common(records, "distilled"):
        schedules = [schedule_to_dict(adapter.objective.variance) for adapter in adapters]
        return SetTraining(
            how="distilled", rule="soup" if schedules.count(schedules[0]) == len(schedules) else "product"
        )
    return APART


def _common(records: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    """What the first record has under a key that all have; empty if one has none."""
    known = [record.get(key) for record in records]
    first = known[0]
    return first if isinstance(first, Mapping) and all(isinstance(values, Mapping) for values in known) else {}

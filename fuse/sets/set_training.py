"""How the adapters of a set were trained: apart, together through a rule, or distilled from the product of others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepfuse.fuse.sets.entries import Adapter


@dataclass(frozen=True, kw_only=True)
class SetTraining:
    """How the adapters of a set were trained.

    Attributes:
        how: `apart`, each by itself; `jointly`, all in one run on mixtures of their rewards; or `distilled`.
        rule: the rule that they were trained for, which is the default of their set.
    """

    how: Literal["apart", "jointly", "distilled"]
    rule: str

    def __str__(self) -> str:
        texts = {
            "apart": "each adapter by itself",
            "jointly": f"jointly, by the rule {self.rule}",
            "distilled": f"distilled, for the rule {self.rule}",
        }
        return texts[self.how]

    def to_json(self) -> dict[str, str]:
        return {"how": self.how, "rule": self.rule}


APART = SetTraining(how="apart", rule="product")


def training_of(adapters: Sequence[Adapter]) -> SetTraining:
    """How these adapters were trained, by their records: together where all are of one run with several objectives."""
    records = [adapter.record for adapter in adapters]
    runs = {str(record.get("config_sha256", "")) for record in records}
    if len(records) < 2 or len(runs) > 1:
        return APART
    for key, how in (("joint", "jointly"), ("distilled", "distilled")):
        known = [record.get(key) for record in records]
        if all(isinstance(values, Mapping) for values in known):
            return _training(known[0], how)
    return APART


def _training(values: Any, how: Any) -> SetTraining:
    """Students are fitted as a soup, whatever rule they were distilled from."""
    rule = "soup" if how == "distilled" else str(values.get("rule", "soup"))
    return SetTraining(how=how, rule=rule if rule in ("soup", "product") else "soup")

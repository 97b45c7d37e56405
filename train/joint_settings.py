"""Settings of a run that trains the LoRAs of several objectives together. Importing this does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from stepfuse.data.names import nearest
from stepfuse.data.settings_fields import setting
from stepfuse.data.settings_file import require
from stepfuse.train.policy_settings import LoRASettings, VarianceSettings
from stepfuse.train.run_settings import RewardSettings

if TYPE_CHECKING:
    from stepfuse.fuse.rules.objective import Objective

CENTRE = "centre"  # names the validation images at equal weights, beside those of each objective
# What an objective may have for itself.
OF_RUN = ("fit_reward", "async_scoring")
OF_OBJECTIVE = [
    "beta",
    *(
        field.name
        for kind in (RewardSettings, LoRASettings, VarianceSettings)
        for field in fields(kind)
        if field.name not in OF_RUN
    ),
    "vertex_turns",
]


@dataclass(frozen=True, kw_only=True)
class JointSettings:
    """Several objectives in one run.

    Attributes:
        objectives: Train a LoRA for each of several objectives, on mixtures of their rewards. A mapping for each with
            its settings, such as `reward`, `objective_name`, `rank`, `beta` and `variance`; what one leaves out is as
            in the run. Images are sampled by the fusion of the LoRAs, with other weights for every prompt, and the loss
            of the fused transition trains all of them. Unset, one LoRA for `reward`.
        train_rule: Fusion rule of the images and of the loss: `soup`, one network with the LoRAs added by weight, or
            `product`, the product of the Gaussians (MSDDA).
        vertex_share: Fraction of the prompts of a step whose weight is all on one objective, each in turn.
        vertex_turns: Of the prompts whose weight is all on one objective, how many are this objective's for each one of
            an objective with 1. A setting of an entry of `objectives`: more for a reward that is slower to learn.
        weight_concentration: Concentration of the Dirichlet distribution that the weights of the other prompts are
            sampled from: 1 is uniform over all mixtures, more is closer to equal weights.
        init_set: Adapter set, a folder, a hub id, `emoji-flow` or `emoji`, whose LoRAs and variance schedules the run
            starts from in place of new ones, by the names of the objectives. Without `objectives` and `objective_name`,
            all objectives of the set are trained.
    """

    objectives: list = setting([])
    train_rule: Literal["soup", "product"] = "soup"
    vertex_share: float = setting(0.5, least=0, most=1)
    vertex_turns: int = setting(1, least=1, most=1000)
    weight_concentration: float = setting(1.0, least=0.01)
    init_set: str = ""

    def check_together(self) -> None:
        several = "two mappings or more, all after one --objectives; settings of one objective go into the run itself"
        require(len(self.objectives) != 1, "objectives", self.objectives, several)
        for entry in self.objectives:
            require(isinstance(entry, Mapping), "objectives", entry, "a mapping for each, such as {reward: clip_score}")
            for name in entry:
                joined, colon, value = str(name).partition(":")
                if colon and joined in OF_OBJECTIVE:
                    raise ValueError(f"objectives has {name!r}; write a space after the colon, {{{joined}: {value}}}")
                known = f"any of {', '.join(OF_OBJECTIVE)}{nearest(str(name), OF_OBJECTIVE)}"
                require(name in OF_OBJECTIVE, "a setting of objectives", repr(name), known)


def separate_objectives(settings: Any) -> tuple[Any, ...]:
    """The settings of each objective: those of the run, with its own; a ValueError names the objective."""
    if not settings.objectives:
        return (settings,)
    name = settings.objective_name
    require(name == "", "objective_name", name, "none beside objectives, each of which has its own")
    each: list[Any] = []
    for number, entry in enumerate(settings.objectives, start=1):
        named = entry.get("objective_name") or entry.get("reward") or f"number {number}"
        values = {field.name: getattr(settings, field.name) for field in fields(settings)} | {"objective_name": ""}
        try:
            each.append(type(settings)(**values | dict(entry) | {"objectives": []}))
        except ValueError as error:
            raise ValueError(f"objective {named}: {error}") from error
        name = each[-1].name
        taken = name.lower() in [other.name.lower() for other in each[:-1]]  # some filesystems take them for one
        require(not taken, "objective_name", name, "another name for each objective")
        require(name != CENTRE, "objective_name", name, "another name: that of the validation images at equal weights")
        used = name in ("samples", *PurePath(settings.logging_dir).parts[:1]) or name.startswith("checkpoint-")
        require(not used, "objective_name", name, "another name: a folder of the run is called so")
    return tuple(each)


def objective_settings(objective: "Objective") -> dict[str, Any]:
    """The entry in `objectives` of an adapter that was trained on an objective."""
    shaping = objective.shaping
    return {
        "objective_name": objective.name,
        "reward": objective.reward,
        "reward_shift": shaping.shift,
        "reward_scale": shaping.scale,
        "reward_clip": list(shaping.clip),
        "beta": objective.beta,
    }

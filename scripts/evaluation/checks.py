"""What the configuration of an evaluation may not ask of a set."""

from collections.abc import Sequence

from stepfuse.data.names import nearest
from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.rewards.registry import summands
from stepfuse.scripts.evaluation.config import EvaluationConfig, PlannedCell


def check_judges(config: EvaluationConfig, adapter_set: AdapterSet) -> None:
    """Check that no judge is the reward of an objective, or a term of it."""
    for objective in adapter_set.objectives:
        for part in summands(objective.reward):
            if part.text in config.judges:
                raise ValueError(
                    f"the judge {part.text!r} is what the objective {objective.name!r} is trained on; expected a "
                    "reward that nothing is trained on (those of the objectives are always measured)"
                )


def check_scales(config: EvaluationConfig, adapter_set: AdapterSet, cells: Sequence[PlannedCell]) -> None:
    """Check that scales are of objectives, those left out can be measured, and oracles were trained in these units."""
    names, scales = adapter_set.names, config.scales
    for name in scales:
        if name not in names:
            raise ValueError(f"scales name {name!r}; the set has {', '.join(names)}{nearest(name, names)}")
    unscaled = [name for name in names if name not in scales]
    if unscaled and config.seeds_per_prompt < 2:
        raise ValueError(
            f"the scale of {unscaled[0]!r} is measured among the images of one prompt, and seeds_per_prompt is "
            f"{config.seeds_per_prompt}; expected 2 or more, or a scale for each objective in the config"
        )
    if unscaled or all(cell.rule.accepts != "trained" for cell in cells):
        return
    for oracle in adapter_set.oracles:
        ratios = [scales[name] / scale for name, scale in oracle.scales.items()]
        if max(ratios) > 1.001 * min(ratios):
            trained = ", ".join(f"{name}: {scale:g}" for name, scale in oracle.scales.items())
            given = ", ".join(f"{name}: {scales[name]:g}" for name in oracle.scales)
            raise ValueError(
                f"oracle {oracle.adapter.name!r} was trained in the units {trained}, and the scales here are {given}, "
                "so its regret would be that of another reward. Give its units as scales, or leave scales out to have "
                "them measured"
            )

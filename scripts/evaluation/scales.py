"""The units σ that rewards are weighed in: given by the configuration, or measured on the base's images."""

from collections.abc import Sequence

import pandas as pd

from stepfuse.data.names import nearest
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.rewards.statistics import deviation_within
from stepfuse.scripts.evaluation.config import EvaluationConfig, PlannedCell


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


def measured_scale(base: pd.DataFrame, objective: Objective) -> float:
    """The standard deviation of an objective's reward among the base's images of one prompt; a ValueError for 0."""
    values = base[f"reward_{objective.reward}"].to_numpy()
    scale = deviation_within(values, base["prompt"].to_list())
    if not scale > 1e-9 * abs(values).max():
        raise ValueError(
            f"the scale of {objective.name!r} cannot be measured: {objective.reward!r} does not differ among the "
            "base's images of one prompt; add it to scales in the config"
        )
    return scale

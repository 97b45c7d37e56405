"""What an evaluation measured, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.registry import RULES

Rules = Mapping[str, FusionRule | type[FusionRule]]  # by the label that tables have for them


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What was measured, and how.

    Attributes:
        objectives: (name, reward) of each.
        rewards: those of the objectives and held-out ones.
        scales: by reward of an objective, the unit it is scalarised in.
        held_out: those of `rewards` that nothing was trained on.
        oracles: weights and scales of each, by objective.
    """

    objectives: tuple[tuple[str, str], ...]
    rewards: tuple[str, ...]
    scales: Mapping[str, float]
    held_out: tuple[str, ...] = ()
    rules: Rules = field(default_factory=lambda: RULES)
    title: str = "Evaluation"
    base: str = ""
    steps: int
    guidance: float
    machine: str = ""
    command: str = ""
    oracles: tuple[tuple[Mapping[str, float], Mapping[str, float]], ...] = ()

    def trained_weights(self, shares: np.ndarray) -> np.ndarray:
        """The weights, in units of `scales`, of the reward that the oracle of these weights was trained on.

        Σ w_i r_i / s_i with the scales s of its training is Σ (w_i σ_i / s_i) r_i / σ_i; the sum of weights is kept.
        Where no oracle was trained, or with the same scales, these are the weights themselves.
        """
        for weights, scales in self.oracles:
            given = np.array([weights.get(name, 0.0) for name, _ in self.objectives])
            if abs(given - shares).max() <= 1e-3:  # as the rule finds it
                ratios = [self.scales[reward] / scales.get(name, np.inf) for name, reward in self.objectives]
                trained = shares * np.array(ratios)
                return trained * shares.sum() / trained.sum()
        return shares

"""What an evaluation measures: its configuration, the cells that it lists, and what else its figures depend on."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stepfuse.data.seeds import LIMIT
from stepfuse.data.settings_fields import Bounds, check_settings, setting
from stepfuse.data.settings_file import require
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.registry import RULES, get_rule
from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.rules.weights import Weights, WeightSchedule, label_weights, parse_weights
from stepfuse.train.run_settings import PromptSettings

SCALE = Bounds(above=0)
Rules = Mapping[str, FusionRule | type[FusionRule]]  # by the label that tables have for them


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(PromptSettings):
    """The settings of `stepfuse evaluate`, as YAML gives them; `PromptSettings` has those of the prompts.

    Attributes:
        seeds_per_prompt: Number of images of each prompt in each cell.
        seed: Number that the seed of every image is derived from.
        grid: The weights are all multiples of 1/grid that sum to 1, a line for two objectives, a simplex for more.
        weights: Further weights of sum 1, as `a=0.5,b=0.5` in quotes or as mappings, for rules that list none.
        rules: Fusion rules: names, classes in files, `path/to/file.py:Class`, or mappings with `rule` and any of
            `label`, `weights`, `strength` or `strengths`, `set`, and options of the rule. `set` is a folder or hub id
            of another set of the same base and objectives, whose adapters are fused in place of those of the set that
            is evaluated.
        rewards: Further rewards to measure, besides those of the objectives.
        judges: Held-out rewards by which all rules are judged; no adapter may have been trained on them.
        scales: By objective, the unit σ in which its reward is weighted. Unset, the evaluation measures the standard
            deviation of the reward among the base's images of one prompt.
        steps: Number of denoising steps. Unset, that of the set.
        guidance: Source of the unconditional prediction, `shared`, `full`, `off` or `embedded`. Unset, that of the set.
        guidance_scale: Scale of classifier-free guidance. Unset, that of the set.
        resolution: Height and width of the images in pixels. Unset, those that the adapters were trained at.
        batch_size: Number of images that are denoised together.
        kl_seeds: Number of the seeds for which the KL divergence from the base is measured; each of their images is
            sampled twice.
        embedding: CLIP model for the diversity within a prompt. Unset, the bundled CLIP for the bundled bases, and no
            diversity for others.
        strip_prompts: Number of prompts whose images are kept for the report.
    """

    prompts: str = "emoji-heldout:64"
    seeds_per_prompt: int = setting(4, least=1)
    seed: int = setting(0, least=0, below=LIMIT, expected="an integer from 0 to 2^64 - 1")
    grid: int = setting(2, least=1)
    weights: list = setting([])
    rules: list = setting(["base", "product"])
    rewards: list[str] = setting([])
    judges: list[str] = setting([])
    scales: dict = setting({})
    steps: int | None = setting(None, least=1)
    guidance: str | None = None
    guidance_scale: float | None = None
    resolution: int | None = setting(None, least=1)
    batch_size: int = setting(32, least=1)
    kl_seeds: int = setting(1, least=0)
    embedding: str = ""
    strip_prompts: int = setting(4, least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        require(bool(self.rules), "rules", self.rules, "at least one rule")
        for name, scale in self.scales.items():
            valid = isinstance(scale, int | float) and SCALE.allow(scale)
            require(valid, f"the scale of {name}", scale, str(SCALE))

    def identity(self) -> dict[str, Any]:
        """The settings, without those that are unset and that earlier evaluations did not have."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value or name not in ("judges", "resolution")}


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """One rule, which tables name by its label, at one mixture and strength λ: a row of the tables."""

    label: str
    rule: FusionRule
    weights: Weights | None  # None for the base
    strength: float = 1.0
    set: str = ""  # whose adapters are fused, if not those of the set that is evaluated

    @property
    def key(self) -> tuple:
        return self.label, self.weights_label, self.strength

    @property
    def images(self) -> tuple:
        """A key that is equal for cells whose images are the same, so that these are sampled once."""
        single = self.weights is not None and len(self.weights) == 1 and self.strength == 1
        return ("one adapter", self.set, *self.key[1:]) if single and self.rule.is_one_adapter else self.key

    @property
    def weights_label(self) -> str:
        return "" if self.weights is None else label_weights(self.weights)

    def shares(self, names: Sequence[str]) -> list[float]:
        """w_i, NaN for the base and where they change over the steps."""
        if self.weights is None or _is_scheduled(self.weights):
            return [float("nan")] * len(names)
        return _shares(self.weights, names)

    def __str__(self) -> str:
        strength = "" if self.strength == 1 else f" strength {self.strength:g}"
        return f"{self.label} {self.weights_label}{strength}".strip()


def simplex(names: Sequence[str], grid: int) -> list[dict[str, float]]:
    """All weights that are multiples of 1/grid and sum to 1, without those of 0: one adapter alone first."""
    rows = [row for row in itertools.product(range(grid, -1, -1), repeat=len(names)) if sum(row) == grid]
    rows.sort(key=lambda row: sum(k > 0 for k in row))
    return [{name: k / grid for name, k in zip(names, row, strict=True) if k} for row in rows]


def cells_of(config: EvaluationConfig, names: Sequence[str]) -> list[PlannedCell]:
    """Every cell of an evaluation, the base first; a ValueError names a rule, options or weights that are wrong."""
    standard = [*simplex(names, config.grid), *(_read_weights(w, names) for w in config.weights)]
    standard = list({label_weights(w): w for w in standard}.values())
    cells = [PlannedCell(label="base", rule=get_rule("base"), weights=None)]
    for entry in config.rules:
        values = {"rule": entry} if isinstance(entry, str) else entry
        if not isinstance(values, dict) or not isinstance(values.get("rule"), str):
            raise ValueError(f"rules has the entry {entry!r}; expected a name, or a mapping with `rule`")
        cells += _cells_of_rule(dict(values), names, standard)
    keys, sets = [cell.key for cell in cells], {cell.label: cell.set for cell in cells}
    for cell in cells:
        if sets[cell.label] != cell.set:
            raise ValueError(f"rules of two sets have the label {cell.label!r}; give one of them another")
        if keys.count(cell.key) > 1:
            raise ValueError(f"two cells are {cell}; give one rule another `label`")
    return cells


def _cells_of_rule(values: dict[str, Any], names: Sequence[str], standard: Sequence[Weights]) -> list[PlannedCell]:
    name, other = values.pop("rule"), values.pop("set", "")
    label = str(values.pop("label", name))
    if not isinstance(other, str):
        raise ValueError(f"rule {label} has set {other!r}; expected a folder or a hub id")
    if other and label in RULES:
        raise ValueError(
            f"rule {name} of the set {other!r} has the label {label!r}; give it one that is no rule's name"
        )
    if label != name and label in RULES:
        raise ValueError(f"rule {name} has the label {label!r}, which is another rule's name; choose another")
    strengths = values.pop("strengths", [values.pop("strength", 1.0)])
    if not isinstance(strengths, list) or not strengths or not all(isinstance(s, int | float) for s in strengths):
        raise ValueError(f"rule {label} has strengths {strengths!r}; expected a list of numbers")
    texts = values.pop("weights", None)
    try:
        rule = get_rule(name, **{str(option): value for option, value in values.items()})
    except ValueError as error:
        raise ValueError(f"rules: {error}") from error
    if rule.accepts == "none":
        return [] if label == "base" else [PlannedCell(label=label, rule=rule, weights=None, set=other)]
    mixtures = [w for w in standard if rule.accepts != "single" or len(w) == 1]
    if texts is not None:
        if not isinstance(texts, list) or not texts:
            raise ValueError(f"rule {label} has weights {texts!r}; expected a list, such as [a=0.5,b=0.5]")
        mixtures = [_read_weights(text, names) for text in texts]
    return [
        PlannedCell(label=label, rule=rule, weights=w, strength=float(s), set=other)
        for w in mixtures
        for s in strengths
    ]


def _read_weights(given: Any, names: Sequence[str]) -> Weights:
    """Weights of a config, those of 0 left out, so that one mixture has one name.

    Constant weights must sum to 1: those of an unquoted `a=0.5,b=0.5` in a YAML list, which is two texts, do not.
    """
    if not isinstance(given, str | dict):
        raise ValueError(f'weights {given!r}; expected text such as "a=0.5,b=0.5", or a mapping')
    weights = parse_weights(given) if isinstance(given, str) else given
    if not all(isinstance(w, int | float | WeightSchedule) for w in weights.values()):
        raise ValueError(f"weights {given!r}; expected a number for each objective")
    shares = _shares(weights, names)
    if _is_scheduled(weights):
        return weights
    if abs((total := sum(weights.values())) - 1) > 0.01:
        raise ValueError(f"weights {given!r} sum to {total:g}; expected 1 (in a list, a=0.5,b=0.5 needs quotes)")
    return {name: round(share, 6) for name, share in zip(names, shares, strict=True) if share}


def _is_scheduled(weights: Weights) -> bool:
    return any(isinstance(weight, WeightSchedule) for weight in weights.values())


def _shares(weights: Weights, names: Sequence[str]) -> list[float]:
    """Shares of the first step, which sum to 1."""
    return weight_table([weights], names)[0, :, 0].tolist()


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What was measured, and how."""

    objectives: tuple[tuple[str, str], ...]  # (name, reward)
    rewards: tuple[str, ...]  # all of them, those of the objectives and held-out ones
    scales: Mapping[str, float]  # of each objective's reward, the unit it is scalarised in
    held_out: tuple[str, ...] = ()  # those of `rewards` that nothing was trained on, judges included
    judges: tuple[str, ...] = ()
    rules: Rules = field(default_factory=lambda: RULES)
    title: str = "Evaluation"
    base: str = ""
    steps: int
    guidance: float
    machine: str = ""
    command: str = ""
    oracles: tuple[tuple[Mapping[str, float], Mapping[str, float]], ...] = ()  # weights and scales, by objective
    sets: Mapping[str, str] = field(default_factory=dict)  # by the label of each rule of another set
    training_images: Mapping[str, int | None] = field(default_factory=dict)  # by the label of a rule, see that module

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

"""The adaptive gate: one soup where it is as good as the product, a branch an adapter where it is not.

To first order in the LoRAs a network merged with weights b predicts Σ b_i e_i, so that the soup equals the product up
to curvature. How far it falls short is measured once, step by step, and kept with the set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GapProfile:
    """How far the soup is from the product at each step of a set, KL( product ‖ soup ) in nats, by mixture.

    Measured along the product's runs, so that by the chain rule the gaps of some steps add up to the KL from its run to
    one that takes the soup at these. Their variances are equal, so a step's gap is the same either way round. With
    guidance; without, where an interval leaves it out, both are nearer by g².

    Attributes:
        images: how many a mixture.
        mixtures: weights by objective.
        gaps: one number a mixture and step; None where steps have no noise, and so no KL.
    """

    num_inference_steps: int
    guidance: str
    guidance_scale: float
    images: int
    mixtures: tuple[Mapping[str, float], ...]
    gaps: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        if not self.mixtures or len(self.gaps) != len(self.mixtures):
            raise ValueError(
                f"a gap profile with {len(self.mixtures)} mixtures and gaps of {len(self.gaps)}; expected one or more, "
                "and the gaps of each"
            )
        for row in self.gaps:
            if len(row) != self.num_inference_steps:
                raise ValueError(
                    f"a gap profile of {self.num_inference_steps} steps with gaps of {len(row)}; expected one each"
                )
            if any(gap is not None and not 0 <= gap < float("inf") for gap in row):
                raise ValueError(f"gaps {list(row)}; expected numbers of 0 or more, in nats")

    def at(
        self, weights: Float[Tensor, "steps objectives batch"], names: Sequence[str]
    ) -> Float[Tensor, "steps batch"]:
        """The gap of each step and image: the largest measured of a mixture of objectives that are in use there.

        Infinite where no such mixture was measured, its steps have no noise, or a weight is negative, which goes beyond
        what was measured; 0 where one objective has it all.
        """
        used = weights != 0
        gaps = torch.where(used.sum(1) > 1, torch.nan, torch.zeros((), dtype=torch.float64))
        for mixture, row in zip(self.mixtures, self.gaps, strict=True):
            held = torch.tensor([mixture.get(name, 0) != 0 for name in names])
            covered = (used | ~held[:, None]).all(1) & (used.sum(1) > 1)
            measured = torch.tensor([float("inf") if gap is None else gap for gap in row], dtype=torch.float64)
            gaps = torch.where(covered, torch.fmax(gaps, measured[:, None]), gaps)  # fmax: NaN is nothing yet
        gaps = gaps.nan_to_num(nan=float("inf"), posinf=float("inf"))
        return torch.where((weights < 0).any(1), float("inf"), gaps)


def profile_to_dict(profile: GapProfile) -> dict[str, Any]:
    """The fields as JSON values."""
    return asdict(profile) | {"mixtures": list(map(dict, profile.mixtures)), "gaps": list(map(list, profile.gaps))}


def profile_from_dict(values: Mapping[str, Any]) -> GapProfile:
    """The inverse of `profile_to_dict`; KeyError, TypeError or ValueError for what is no profile."""
    return GapProfile(
        num_inference_steps=int(values["num_inference_steps"]),
        guidance=str(values["guidance"]),
        guidance_scale=float(values["guidance_scale"]),
        images=int(values["images"]),
        mixtures=tuple({str(k): float(w) for k, w in dict(mixture).items()} for mixture in values["mixtures"]),
        gaps=tuple(tuple(None if gap is None else float(gap) for gap in row) for row in values["gaps"]),
    )


def find_profile(profiles: Sequence[GapProfile], steps: int, guidance: str, guidance_scale: float) -> GapProfile:
    """The profile of these steps and this guidance; a ValueError where the set has none, with how to measure it."""
    wanted, measured = (steps, guidance, guidance_scale), []
    for profile in profiles:
        measured.append((profile.num_inference_steps, profile.guidance, profile.guidance_scale))
        if measured[-1] == wanted:
            return profile
    described = ["{} steps with guidance {} of scale {}".format(*settings) for settings in (wanted, *measured)]
    raise ValueError(
        f"a gate needs a gap profile of {described[0]}, and the set has {' and '.join(described[1:]) or 'none'}; "
        "sample without a gate, or measure it, in the folder of the set: "
        f"stepfuse set profile SET --steps {steps} --guidance {guidance} --guidance_scale {guidance_scale}"
    )

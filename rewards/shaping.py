"""Shaped rewards: shifted, scaled and clipped."""

from collections.abc import Sequence
from dataclasses import dataclass

from stepfuse.rewards.protocol import Pixels, Reward, Scores, close, score


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """r → clip((r - shift) / scale, low, high).

    Attributes:
        shift: in the unit of the reward; for example its mean over images of the base.
        scale: in the unit of the reward; for example its standard deviation over these images.
        clip: low and high, or empty.

    Raises:
        ValueError: for a shift that is not finite, a scale that is not positive, or bounds that are not two in order.
    """

    shift: float = 0.0
    scale: float = 1.0
    clip: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", tuple(self.clip))
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"reward scale {self.scale}; expected a positive number")
        if not abs(self.shift) < float("inf"):
            raise ValueError(f"reward shift {self.shift}; expected a finite number")
        numbers = all(isinstance(bound, int | float) for bound in self.clip)
        if self.clip and not (len(self.clip) == 2 and numbers and self.clip[0] < self.clip[1]):
            raise ValueError(f"reward clip {list(self.clip)}; expected two numbers, the lower first")

    def __call__(self, scores: Scores) -> Scores:
        shaped = (scores - self.shift) / self.scale
        return shaped.clamp(*self.clip) if self.clip else shaped

    def __str__(self) -> str:
        shift = f"{'+' if self.shift < 0 else '-'} {abs(self.shift):g}"
        return f"(reward {shift}) / {self.scale:g}" + (f", clipped to {list(self.clip)}" if self.clip else "")


def fit_shaping(scores: Scores, clip: Sequence[float] = ()) -> Shaping:
    """The shaping to mean 0 and standard deviation 1 over these scores, or ValueError if all are equal."""
    scale = scores.double().std(correction=0).item()
    if not scale > 0:
        raise ValueError(f"the reward is {scores[0].item():g} for all {len(scores)} images it is fitted on")
    return Shaping(shift=scores.double().mean().item(), scale=scale, clip=clip)


class Shaped:
    """A reward with its shaping; differentiable if the reward is, and its score is within the bounds."""

    def __init__(self, reward: Reward, shaping: Shaping, name: str) -> None:
        self.reward, self.shaping, self.name = reward, shaping, name

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        return self.shaping(score(self.reward, images, prompts, name=self.name))

    def close(self) -> None:
        close(self.reward)

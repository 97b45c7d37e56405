"""A weighted sum of rewards: what an oracle adapter is trained on."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.rewards.protocol import Pixels, Reward, Scores, close, score

TERM = re.compile(
    r"\s*(?P<weight>[0-9.eE+-]+)\s*\*\s*(?P<name>\S.*?)(?:\s*/\s*(?P<scale>[0-9.]+(?:[eE][+-]?[0-9]+)?))?\s*"
)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One reward of the sum: w_i r_i / σ_i.

    Attributes:
        name: as `load_reward` knows it.
        weight: w_i, 0 or more.
        scale: σ_i, the unit its reward is measured in: the spread it has over images of the base, say.
    """

    name: str
    weight: float
    scale: float = 1.0


def parse_terms(text: str) -> tuple[Term, ...]:
    """`0.5*compressibility/0.2 + 0.5*clip_score/6` → its terms, weights normalised to sum 1.

    Raises:
        ValueError: for anything else, a negative weight, weights that sum to 0, a scale that is not positive, or a
            reward named twice.
    """
    expected = "expected WEIGHT*REWARD/SCALE + WEIGHT*REWARD/SCALE, such as 0.5*compressibility/0.2 + 0.5*clip_score/6"
    terms = []
    for part in re.split(r"\s\+\s", text):
        match = TERM.fullmatch(part)
        try:
            if match is None:
                raise ValueError("no WEIGHT*REWARD")
            term = Term(name=match["name"], weight=float(match["weight"]), scale=float(match["scale"] or 1))
        except ValueError as error:
            raise ValueError(f"weighted reward {text!r} has the term {part!r}; {expected}") from error
        if not 0 <= term.weight < float("inf") or not 0 < term.scale < float("inf"):
            raise ValueError(f"weighted reward {text!r}: {part!r} needs a weight of 0 or more and a positive scale")
        terms.append(term)
    names = [term.name for term in terms]
    total = sum(term.weight for term in terms)
    if len(set(names)) < len(names):
        raise ValueError(f"weighted reward {text!r} names a reward twice")
    if total <= 0:
        raise ValueError(f"weighted reward {text!r} has weights that sum to 0")
    return tuple(replace(term, weight=term.weight / total) for term in terms)


class Weighted:
    """r = Σ w_i r_i / σ_i, with Σ w_i = 1.

    Differentiable where its rewards are. Each is scaled before it is weighted, so that a weight means the same for a
    reward in kilobytes and one in points (as GDPO, arXiv:2601.05242, normalises each reward by itself).

    Args:
        terms: the sum.
        load: from a reward's name to the reward; those of weight 0 are not loaded.
    """

    def __init__(self, terms: Sequence[Term], load: Callable[[str], Reward]) -> None:
        self.terms = tuple(term for term in terms if term.weight > 0)
        self.rewards = {term.name: load(term.name) for term in self.terms}

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        return self.terms_of(images, prompts).sum(1)

    def close(self) -> None:
        for reward in self.rewards.values():
            close(reward)

    def terms_of(self, images: Pixels, prompts: Sequence[str], *, finite: bool = True) -> Float[Tensor, "batch terms"]:
        """w_i r_i / σ_i of each term; `finite` as for `score`."""
        columns = [
            term.weight / term.scale * score(self.rewards[term.name], images, prompts, name=term.name, finite=finite)
            for term in self.terms
        ]
        return torch.stack(columns, dim=1)


def label_terms(terms: Sequence[Term]) -> str:
    """The inverse of `parse_terms`, with `weighted:` before it."""
    return "weighted:" + " + ".join(f"{t.weight!r}*{t.name}/{t.scale!r}" for t in terms)


def check_unscaled(terms: Sequence[Term]) -> None:
    """See that terms whose scales are to be fitted have none.

    Raises:
        ValueError: naming one that has.
    """
    given = [term.name for term in terms if term.scale != 1]
    if given:
        raise ValueError(f"the term {given[0]!r} of the weighted reward has a scale, and is to be fitted; leave it out")


def fit_scales(terms: Sequence[Term], columns: Float[Tensor, "images terms"]) -> tuple[Term, ...]:
    """The same terms with σ_i the standard deviation of w_i r_i / w_i over some images.

    Args:
        columns: of `Weighted.terms_of`, with the terms as they are.

    Raises:
        ValueError: for a term that has a scale already, or is the same for all images.
    """
    check_unscaled(terms)
    fitted = []
    for term, column in zip(terms, columns.double().unbind(1), strict=True):
        scale = (column / term.weight).std(correction=0).item()
        if not scale > 0:
            raise ValueError(f"the reward {term.name!r} is the same for all {len(column)} images it is fitted on")
        fitted.append(replace(term, scale=scale))
    return tuple(fitted)

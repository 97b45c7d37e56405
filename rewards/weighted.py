"""Weighted sums of rewards, on which oracle adapters are trained; any other reward is a sum of one term."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.rewards.protocol import Pixels, Reward, Scores, close, score
from stepfuse.rewards.reward_name import Term, label_terms
from stepfuse.rewards.shaping import Shaping, fit_shaping


class Weighted:
    """r = Σ w_i r_i / σ_i, with Σ w_i = 1.

    Differentiable if its rewards are. Each is scaled before it is weighted, so that a weight has the same meaning for a
    reward in kilobytes and one in points (as GDPO, arXiv:2601.05242, normalises each reward by itself). `load` maps the
    name of a term to its reward; those of weight 0 are not loaded.
    """

    def __init__(self, terms: Sequence[Term], load: Callable[[str], Reward]) -> None:
        self.terms = tuple(term for term in terms if term.weight > 0)
        self.rewards: Mapping[str, Reward] = {term.name: load(term.name) for term in self.terms}

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        return self.terms_of(images, prompts).sum(1)

    def close(self) -> None:
        for reward in self.rewards.values():
            close(reward)

    @property
    def weights(self) -> Float[Tensor, " terms"]:
        """w_i."""
        return torch.tensor([term.weight for term in self.terms])

    def terms_of(self, images: Pixels, prompts: Sequence[str], *, finite: bool = True) -> Float[Tensor, "batch terms"]:
        """w_i r_i / σ_i of each term; `finite` as for `score`."""
        columns = [
            term.weight / term.scale * score(self.rewards[term.name], images, prompts, name=term.name, finite=finite)
            for term in self.terms
        ]
        return torch.stack(columns, dim=1)

    def check_fit(self) -> None:
        """Raise ValueError that names a term which has a scale already, since scales are to be fitted."""
        for term in self.terms:
            if term.scale != 1:
                raise ValueError(
                    f"the term {term.name!r} of the weighted reward has a scale, and is to be fitted; leave it out"
                )

    def fit(self, columns: Float[Tensor, "images terms"], shaping: Shaping) -> tuple[str, Shaping]:
        """The sum with σ_i the standard deviation of r_i over images, given `terms_of` them, and the shaping as it is.

        A term that has a scale already, or the same reward for all images, raises ValueError.
        """
        self.check_fit()
        fitted = []
        for term, column in zip(self.terms, columns.double().unbind(1), strict=True):
            scale = (column / term.weight).std(correction=0).item()
            if not scale > 0:
                raise ValueError(f"the reward {term.name!r} is the same for all {len(column)} images it is fitted on")
            fitted.append(replace(term, scale=scale))
        return label_terms(tuple(fitted)), shaping

    def with_terms(self, terms: Sequence[Term]) -> "Weighted":
        """The sum of the same rewards with other weights or scales."""
        return type(self)(terms, self.rewards.__getitem__)


class SingleTerm(Weighted):
    """A reward that is no weighted sum, as a sum of one term. It is fitted by its shaping."""

    def fit(self, columns: Float[Tensor, "images terms"], shaping: Shaping) -> tuple[str, Shaping]:
        return self.terms[0].name, fit_shaping(columns[:, 0], shaping.clip)


def as_sum(reward: Reward, name: str) -> Weighted:
    """A reward as a sum of terms: a weighted one as it is, any other as one term of this name."""
    return reward if isinstance(reward, Weighted) else SingleTerm([Term(name=name, weight=1.0)], lambda _: reward)

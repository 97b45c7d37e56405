"""Classifier-free guidance: which raw predictions a guided one is made of, and how they are combined."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.data.names import nearest
from stepfuse.fuse.lora.mixture import BASE, Network, Rows

GUIDANCE = ("shared", "full", "off", "embedded")
Latents = Float[Tensor, "_ channels height width"]
SomeRows = Sequence[Rows | None] | None  # of a batch, for each network; by default all
Combine = Callable[[Latents, Latents, float], Latents]  # e_u, e_c and g


@dataclass(frozen=True)
class Branch:
    """One raw prediction: of a network, under the positive (`+`) or the negative (`-`) prompt."""

    network: Network
    kind: str
    rows: Rows | None = None  # those of the batch that it is predicted for; by default all, in order


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """e = e_u + g (e_c - e_u) (classifier-free guidance, arXiv:2207.12598).

    With g = 1 the prediction is e_c, and e_u is not computed.

    Attributes:
        source: where e_u comes from. `shared`: the base; `full`: the network itself; `off`: the prediction is e_c;
            `embedded`: it is e_c of a network that takes g as an input (guidance distillation, arXiv:2210.03142).
        scale: g.

    Raises:
        ValueError: for another source, or a scale that is not finite.
    """

    source: str = "shared"
    scale: float = 5.0

    def __post_init__(self) -> None:
        check_source(self.source)
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale {self.scale}; expected a finite number")

    def __str__(self) -> str:
        return self.source if self.source == "off" else f"{self.source} {self.scale:g}"

    @property
    def effective_scale(self) -> float:
        """g, and 1 without guidance."""
        return 1.0 if self.source == "off" else self.scale

    @property
    def subtracts(self) -> bool:
        """Whether e differs from e_c, so that e_u is needed."""
        return self.source in ("shared", "full") and self.scale != 1

    @property
    def embedded_scale(self) -> float:
        """g as an input of the network: 1 where guidance is not left to it."""
        return self.scale if self.source == "embedded" else 1.0

    @property
    def shares(self) -> bool:
        """Whether all guided predictions have e_u of the base in common, which is then the first of the branches."""
        return self.source == "shared" and self.scale != 1

    def branches(self, networks: Sequence[Network], rows: SomeRows = None) -> list[Branch]:
        """The raw predictions that the guided ones of networks, on these rows, are made of.

        With `shared`, N networks need N + 1; e_u is predicted for all rows.
        """
        wanted = [None] * len(networks) if rows is None else rows
        positive = [Branch(network, "+", some) for network, some in zip(networks, wanted, strict=True)]
        if not self.subtracts:
            return positive
        if self.shares:
            return [Branch(BASE, "-"), *positive]
        return [*(replace(branch, kind="-") for branch in positive), *positive]

    def combine(self, branches: Sequence[Branch], outputs: Sequence[Latents], guide: Combine) -> list[Latents]:
        """The guided predictions, one a network, from the raw ones of `branches`.

        Args:
            guide: e_u + g (e_c - e_u), or what a model family has in its place (`Backbone.guide`).
        """
        known = list(zip(branches, outputs, strict=True))
        positive = [(branch, e_c) for branch, e_c in known if branch.kind == "+"]
        negative = [e_u for branch, e_u in known if branch.kind == "-"]
        if not negative:
            return [e_c for _, e_c in positive]
        if self.shares:
            (e_u,) = negative
            negative = [e_u if b.rows is None else e_u[to_device(b.rows, e_u.device)] for b, _ in positive]
        return [guide(e_u, e_c, self.scale) for e_u, (_, e_c) in zip(negative, positive, strict=True)]


def check_source(source: object) -> str:
    """Check the name of a source of e_u; a ValueError lists those there are."""
    if source not in GUIDANCE:
        raise ValueError(f"guidance {source!r}; expected one of {', '.join(GUIDANCE)}{nearest(source, GUIDANCE)}")
    return str(source)

"""A network: the base, one adapter, or several adapters merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int
from torch import Tensor

Rows = Int[Tensor, " _"]  # indices of rows of a batch; several of them in one call are of different lengths


@dataclass(frozen=True)
class Network:
    """The base model with the LoRA of some adapters; without any it is the base.

    Attributes:
        weights: (name, w_i) of each adapter.
        merge: `""` for the base and for one adapter, as it is; `"weights"` for the LoRA Σ w_i B_i A_i; `"factors"` for
            λ (Σ w_i B_i / λ) (Σ w_i A_i / λ) with λ = Σ w_i.
        cacheable: the network will be run again, so that keeping its merged weights saves time.
    """

    weights: tuple[tuple[str, float], ...] = ()
    merge: Literal["", "weights", "factors"] = ""
    cacheable: bool = False

    @classmethod
    def of(cls, adapter: str | None) -> "Network":
        """The network of one adapter, or of the base for None."""
        return BASE if adapter is None else cls(((adapter, 1.0),))

    @classmethod
    def merged(
        cls, weights: Mapping[str, float], merge: Literal["weights", "factors"] = "weights", *, cacheable: bool = False
    ) -> "Network":
        """The network of several adapters, by name."""
        return cls(tuple(weights.items()), merge, cacheable)

    @property
    def adapter(self) -> str | None:
        """The name of the one adapter; None for the base and for several that are merged."""
        return self.weights[0][0] if self.weights and not self.merge else None


BASE = Network()

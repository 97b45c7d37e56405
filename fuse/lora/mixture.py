"""Several LoRAs merged into one network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Merge:
    """One network whose LoRAs are merged by weight, Σ w_i B_i A_i, or by factors, λ (Σ w_i B_i / λ) (Σ w_i A_i / λ).

    Attributes:
        weights: (name, w_i) of each adapter.
        factors: average A and B separately; λ is the sum of the weights.
        lasting: it will be asked for again, so that keeping merged weights is worth its while.
    """

    weights: tuple[tuple[str, float], ...]
    factors: bool = False
    lasting: bool = False

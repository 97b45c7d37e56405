"""Blockwise best of N."""

from dataclasses import dataclass
from typing import ClassVar

from stepfuse.fuse.rules.checks import (
    check_no_strength,
    check_random,
)
from stepfuse.fuse.rules.plan import Plan
from stepfuse.fuse.rules.product import Base


@dataclass(frozen=True)
class CoDe(Base):
    """Blockwise best of N (CoDe, arXiv:2502.00968): the base unrolled N times through a block of B steps, the
    candidate kept whose predicted x_0 has the largest Σ w_i r_i / σ_i.

    Cost: N forwards a step, one in the first; a reward of N candidates a block. Needs rewards.

    Attributes:
        candidates: N; 1 is the base.
        block_size: B, the steps between choices; the last block may be shorter.
    """

    candidates: int = 20
    block_size: int = 5
    needs: ClassVar[str] = "rewards"

    def __post_init__(self) -> None:
        for name in ("candidates", "block_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r}; expected a whole number, 1 or more")

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength, for the choice has none, and for a base without noise."""
        check_no_strength(plan, "code")
        if self.candidates > 1:
            check_random(plan, "code", "its candidates would be alike")
        return super().prepare(plan)

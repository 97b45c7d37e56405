"""What share of the oracle's gain over the base a cell has, as it is, and at the KL of the oracle."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from stepfuse.data.intervals import ROUNDING
from stepfuse.rewards.statistics import percentile_interval
from stepfuse.scripts.evaluation.cells import Cells
from stepfuse.scripts.evaluation.metric import interval

NO_WEIGHTS = "no constant weights"
NO_ORACLE = "no oracle"
WEAK_ORACLE = "the oracle is not clearly above the base"
NOT_MEASURED = "not measured"
ONE_STRENGTH = "one strength"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bootstrap means (1 + draws,) of a share, or why it is not known."""

    means: np.ndarray | None = None
    unknown: str = ""


def share_of_oracle(table: Cells, i: int) -> Share:
    """(Σ_k w_k (r_k − r_k,base)/σ_k of a cell) / (that of its oracle), both by the same draws of prompts.

    The ratio of means, not the mean of ratios. Unknown where the interval of the oracle's gain does not lie above 0.
    """
    cell = table.cells[i]
    if not cell.weighted:
        return Share(unknown=NO_WEIGHTS)
    if (oracle := table.oracle_of(cell)) is None:
        return Share(unknown=NO_ORACLE)
    return _over_oracle(table, oracle, table.gains[i])


def kl_of_oracle(table: Cells, i: int) -> np.ndarray | None:
    """The KL to the base of a cell as a multiple of that of its oracle."""
    own, whole = table.mean_kl(i), table.mean_kl(table.oracle_of(table.cells[i]))
    return None if own is None or whole is None else own / np.where(whole > 0, whole, np.nan)


def share_at_oracle_kl(table: Cells, i: int) -> Share:
    """The share of the oracle's gain that the rule of a cell has at its weights where its KL is the oracle's.

    The gain is interpolated linearly over the KL between two of the strengths that the rule was run at: those whose KL
    enclose the oracle's. In every draw of prompts they are the same two.
    """
    cell = table.cells[i]
    plain = share_of_oracle(table, i)
    if plain.unknown:
        return plain
    held = [k for k in table.where(cell.rule) if table.cells[k].weights == cell.weights]
    if len(held) < 2:
        return Share(unknown=ONE_STRENGTH)
    oracle = table.oracle_of(cell)
    target, kls = table.mean_kl(oracle), {k: kl for k in held if (kl := table.mean_kl(k)) is not None}
    if oracle is None or target is None or len(kls) < 2:
        return Share(unknown=NOT_MEASURED)
    order = sorted(kls, key=lambda k: kls[k][0])
    for low, high in pairwise(order):
        if kls[low][0] <= target[0] <= kls[high][0] and kls[low][0] < kls[high][0]:
            with np.errstate(divide="ignore", invalid="ignore"):  # in a few draws the two may have the same KL
                fraction = (target - kls[low]) / (kls[high] - kls[low])
            return _over_oracle(table, oracle, table.gains[low] + fraction * (table.gains[high] - table.gains[low]))
    least, most = kls[order[0]][0], kls[order[-1]][0]
    side = "below" if target[0] < least else "above"
    return Share(unknown=f"the oracle's {target[0]:.4g} nats are {side} the rule's {least:.4g} to {most:.4g}")


def cell_shares(table: Cells, i: int) -> dict[str, Any]:
    """The figures of one cell, with `unknown`: why those that are None are not known."""
    shares = {"share_of_oracle": share_of_oracle(table, i), "share_at_oracle_kl": share_at_oracle_kl(table, i)}
    figures: dict[str, Any] = {name: interval(share.means) for name, share in shares.items()}
    reasons = {name: share.unknown or NOT_MEASURED for name, share in shares.items() if figures[name] is None}
    return figures | {"kl_of_oracle": interval(kl_of_oracle(table, i)), "unknown": reasons}


def rule_shares(table: Cells, held: Sequence[int], full: Sequence[int]) -> dict[str, Any]:
    """Means over the mixed weights with an oracle, of a rule's cells and of those at strength 1."""
    mixed = [i for i in held if table.cells[i].weighted and not table.cells[i].one_hot]
    by_weights = {table.cells[i].weights: i for i in mixed}
    return {
        "share_of_oracle": _mean(share_of_oracle(table, i) for i in mixed if i in full),
        "share_at_oracle_kl": _mean(share_at_oracle_kl(table, i) for i in by_weights.values()),
    }


def _over_oracle(table: Cells, oracle: int, gain: np.ndarray) -> Share:
    whole = table.gains[oracle]
    if not percentile_interval(whole).low > ROUNDING:
        return Share(unknown=WEAK_ORACLE)
    with np.errstate(divide="ignore", invalid="ignore"):  # in a few draws the oracle's gain may be 0
        return Share(means=gain / whole)


def _mean(shares: Iterable[Share]) -> dict[str, Any] | None:
    known = [share.means for share in shares if share.means is not None and np.isfinite(share.means[0])]
    return {"weights": len(known), "mean": interval(np.mean(known, axis=0))} if known else None

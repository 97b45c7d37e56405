"""Users' weights as a table: shares that sum to 1, for every step and image."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.names import nearest
from stepfuse.fuse.rules.weights import Weights, WeightSchedule, label_weights


def weight_table(
    weights: Sequence[Weights], names: Sequence[str], steps: int = 1
) -> Float[Tensor, "steps objectives batch"]:
    """Users' weights by objective name → columns that sum to 1 at every step, float64.

    Raises:
        ValueError: for an unknown objective, a weight that is not finite, or weights that do not have a positive,
            finite sum at some step.
    """
    table = torch.zeros(steps, len(names), len(weights), dtype=torch.float64)
    for column, given in enumerate(weights):
        for name, weight in given.items():
            if name not in names:
                raise ValueError(
                    f"weights name the objective {name!r}; this set has {', '.join(names)}{nearest(name, names)}"
                )
            values = [weight.at(k, steps) if isinstance(weight, WeightSchedule) else weight for k in range(steps)]
            table[:, names.index(name), column] = torch.tensor(values, dtype=torch.float64)
        if not bool(torch.isfinite(table[..., column]).all()):
            raise ValueError(f"weights {label_weights(given)} are not all finite; give each objective a number")
        sums = table[..., column].sum(1)
        if not bool(torch.isfinite(sums).all()):
            raise ValueError(f"weights {label_weights(given)} have a sum that is not finite; give smaller ones")
        if bool((sums <= 0).any()):
            first = int((sums <= 0).nonzero()[0])
            where = f" at step {first + 1} of {steps}" if steps > 1 else ""
            raise ValueError(
                f"weights {label_weights(given)} sum to {sums[first].item():g}{where}; expected a positive sum"
            )
    return table / table.sum(1, keepdim=True)

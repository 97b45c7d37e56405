"""Weights by objective, constant or changing over the steps."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightSchedule:
    """A weight that changes over the run.

    Attributes:
        pieces: (weight, begin, end), begin and end as shares of the steps: 0 is the first, noisiest step, 1 the end
            of the last. Step k of T belongs to the piece with begin ≤ k / T < end; outside all pieces, which must not
            overlap, the weight is 0.
    """

    pieces: tuple[tuple[float, float, float], ...]

    def __post_init__(self) -> None:
        last = 0.0
        for weight, begin, end in sorted(self.pieces, key=lambda piece: piece[1]):
            if not 0 <= begin < end <= 1:
                raise ValueError(f"weight {weight:g}@{begin:g}-{end:g}; expected shares of the steps, such as 0-0.5")
            if begin < last:
                raise ValueError(f"weight {weight:g}@{begin:g}-{end:g} overlaps the piece that ends at {last:g}")
            last = end

    def at(self, step_index: int, count: int) -> float:
        """The weight of one of `count` steps, from 0."""
        return sum(weight for weight, begin, end in self.pieces if begin <= step_index / count < end)

    def __str__(self) -> str:
        return ",".join(f"{weight:g}@{begin:g}-{end:g}" for weight, begin, end in self.pieces)


Weights = Mapping[str, float | WeightSchedule]


def lowest(weight: float | WeightSchedule) -> float:
    """The least that a weight is over the run, where it is stated."""
    return min(piece[0] for piece in weight.pieces) if isinstance(weight, WeightSchedule) else weight


def parse_weights(text: str) -> dict[str, float | WeightSchedule]:
    """`a=0.7,b=0.3`, or over the steps `a=0.9@0-0.5,0.2@0.5-1,b=0.5` → weights by name; a ValueError for other text."""
    parsed: dict[str, float | tuple[tuple[float, float, float], ...]] = {}
    try:
        for entry in re.split(r",(?=[^,=]*=)", text):  # at commas before another name
            name, _, value = (part.strip() for part in entry.partition("="))
            if not name or name in parsed:
                raise ValueError(f"no new name before {value!r}")
            parsed[name] = _parse_pieces(value) if "@" in value else float(value)
    except ValueError as error:
        raise ValueError(
            f"weights {text!r}; expected NAME=NUMBER,NAME=NUMBER with each name once, "
            "or over the steps NAME=0.9@0-0.5,0.2@0.5-1"
        ) from error
    return {name: WeightSchedule(value) if isinstance(value, tuple) else value for name, value in parsed.items()}


def _parse_pieces(text: str) -> tuple[tuple[float, float, float], ...]:
    pieces = []
    for piece in text.split(","):
        weight, _, interval = piece.partition("@")
        begin, _, end = interval.partition("-")
        pieces.append((float(weight), float(begin), float(end)))
    return tuple(pieces)


def weight_rows(weights: Weights | Sequence[Weights], names: Sequence[str]) -> list[Weights]:
    """One mapping, or one an image, as a list; a ValueError for numbers without names, and anything else."""
    rows = [weights] if isinstance(weights, Mapping) else list(weights) if isinstance(weights, Sequence) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        example = ", ".join(f"{name!r}: {1 / len(names):.2g}" for name in names)
        raise ValueError(
            f"weights {weights!r}; expected a mapping from objectives to weights, {{{example}}} for instance, or a "
            "list of such mappings, one an image"
        )
    return rows


def label_weights(weights: Weights) -> str:
    """The inverse of `parse_weights`."""
    return ",".join(f"{k}={v}" if isinstance(v, WeightSchedule) else f"{k}={v:g}" for k, v in weights.items())


def shown_weights(weights: Weights | str, *, separator: str = " · ", space: str = " ") -> str:
    """Weights for people: `a 0.75 · b 0.25`, without those that are 0 where others are not.

    A text that is no weights, as a stranger's set may have, stays as it is. In headings, `separator` may be a line
    break, and `space` the no-break space between a name and its weight.
    """
    try:
        mapping = parse_weights(weights) if isinstance(weights, str) else weights
    except ValueError:
        return str(weights)
    counted = {name: weight for name, weight in mapping.items() if weight != 0} or mapping
    return separator.join(
        f"{name}{space}{str(weight).replace(',', ', ') if isinstance(weight, WeightSchedule) else f'{weight:.3g}'}"
        for name, weight in counted.items()
    )

"""What a metric is: a number for each image, and the figures that a cell of images has of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from stepfuse.rewards.statistics import paired_interval, percentile_interval
from stepfuse.scripts.evaluation.batch import MetricBatch

Means = Callable[[np.ndarray], np.ndarray]  # (…, images) → (…, 1 + draws): of all, then of every bootstrap draw
Statistic = Callable[[np.ndarray], Any]


@dataclass(frozen=True, kw_only=True)
class CellValues:
    """One metric in one cell and in the base. Index k of both arrays is the same prompt and seed."""

    values: np.ndarray  # (images,), NaN where an image has none
    base: np.ndarray
    is_base: bool  # whether the cell is the base itself
    prompts: Sequence[str]
    means: Means  # by the same draws of prompts for every metric and cell

    @property
    def paired(self) -> np.ndarray | None:
        """Which images have a value here and in the base; None for the base and for fewer than two prompts."""
        both = np.isfinite(self.values) & np.isfinite(self.base)
        return None if self.is_base or len(set(np.asarray(self.prompts)[both].tolist())) < 2 else both


Aggregate = Callable[[CellValues], Any]


def mean(cell: CellValues) -> dict | None:
    return interval(cell.means(cell.values))


def ratio_to_base(cell: CellValues) -> dict | None:
    """The mean as a multiple of the base's mean."""
    base = cell.means(cell.base)
    return interval(cell.means(cell.values) / np.where(base > 0, base, np.nan))


def gain(cell: CellValues) -> dict | None:
    """The mean difference from the base, over the pairs."""
    if (paired := cell.paired) is None:
        return None
    prompts = np.asarray(cell.prompts)[paired].tolist()
    return vars(paired_interval(cell.values[paired].tolist(), cell.base[paired].tolist(), prompts))


def wins(cell: CellValues) -> dict | None:
    """The share of the pairs whose value is above the base's, ties counted half."""
    if (paired := cell.paired) is None:
        return None
    return interval(cell.means(np.where(paired, np.heaviside(cell.values - cell.base, 0.5), np.nan)))


def missing(cell: CellValues) -> int:
    """The number of images without a finite value."""
    return int((~np.isfinite(cell.values)).sum())


def over_images(statistic: Statistic) -> Aggregate:
    """A statistic of the images' values, without an interval."""
    return lambda cell: over(statistic, cell.values)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure in summary.json, and the column of the page that shows it.

    Attributes:
        path: keys that lead to it in a cell, or in a rule.
        heading: of the column; without one there is no column.
        description: what the page says that the column means.
        aggregate: computes it from the images of a cell; None where it depends on several metrics or cells.
        signed: intervals are shown with a sign.
        places: decimals of a number; by default as many as give three significant digits.
        suffix: follows a number.
    """

    path: tuple[str, ...]
    heading: str = ""
    description: str = ""
    aggregate: Aggregate | None = None
    signed: bool = False
    places: int | None = None
    suffix: str = ""

    def of(self, row: Mapping[str, Any]) -> Any:
        """The figure of a cell or rule; None where it is not known."""
        value: Any = row
        for key in self.path:
            value = None if value is None else value.get(key)
        return value

    def store(self, row: dict[str, Any], value: Any) -> None:
        for key in self.path[:-1]:
            row = row.setdefault(key, {})
        row[self.path[-1]] = value


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number for each image; `METRICS` in metrics.py lists them.

    Attributes:
        name: its column in results.parquet.
        title, description: what the page calls it, and says of it.
        unit: of its values.
        per_image: its value for each image of a batch, or one value for all of them; NaN where there is none.
        aggregate: the figure of a cell.
        path: where a cell of summary.json holds that figure; by default under the name.
        further: other figures of a cell.
        over_cells: for costs, the average of several cells' figures; each cell then has the multiple of one adapter's.
        of_rules: for costs, the description of their column in the table of rules; without one they have none.
        plotted: whether the page plots the weighted gain against it.
    """

    name: str
    title: str
    description: str
    unit: str = ""
    per_image: Callable[[MetricBatch], Tensor | Sequence[float] | float]
    aggregate: Aggregate = mean
    path: tuple[str, ...] = ()
    further: tuple[Figure, ...] = ()
    over_cells: Statistic | None = None
    of_rules: str = ""
    plotted: bool = True

    @property
    def figure(self) -> Figure:
        """The first of its figures."""
        description = f"{self.description}, {self.unit}" if self.unit else self.description
        path = self.path or (self.name,)
        return Figure(path=path, heading=self.title, description=description, aggregate=self.aggregate)

    @property
    def figures(self) -> tuple[Figure, ...]:
        if self.over_cells is None:
            return (self.figure, *self.further)
        multiple = "as a multiple of one adapter's: product at strength 1, all weight on one objective"
        relative = Figure(
            path=("of_one_adapter", self.name),
            heading=f"{self.title} / one",
            description=f"{self.figure.description}, {multiple}",
            places=2,
            suffix=" ×",
        )
        return (self.figure, relative, *self.further)

    def measure(self, batch: MetricBatch) -> np.ndarray:
        """Its value for each image of a batch."""
        values, count = np.asarray(self.per_image(batch), dtype=np.float64), len(batch.images)
        if values.shape not in ((), (count,)):
            raise ValueError(f"metric {self.name!r} gave values of shape {values.shape} for {count} images")
        return np.broadcast_to(values, count)


def interval(means: np.ndarray | None) -> dict[str, float | None] | None:
    """Bootstrap means (1 + draws,) as an interval in JSON; None where there is not even an estimate."""
    if means is None or not np.isfinite(means[0]):
        return None
    return {key: finite(value) for key, value in vars(percentile_interval(means)).items()}


def finite(value: float) -> float | None:
    """A number as JSON has it."""
    return float(value) if np.isfinite(value) else None


def over(statistic: Statistic, values: Iterable[float | None]) -> float | None:
    """A statistic of those values that are known; None without any."""
    array = np.array(list(values), dtype=np.float64)
    known = array[np.isfinite(array)]
    return float(statistic(known)) if len(known) else None


def ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None

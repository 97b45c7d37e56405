"""Pictures of samples for people."""

from collections.abc import Sequence

from PIL import Image

from stepfuse.data.grid import ImageRows, labelled_grid
from stepfuse.data.lettering import GLUE, enlarge
from stepfuse.fuse.rules.weights import Weights, WeightSchedule


def sampled_picture(
    rows: ImageRows, prompts: Sequence[str], columns: Sequence[Weights], *, factor: int | None = None
) -> Image.Image:
    """What `stepfuse sample` saves: one image as it was sampled, or a labelled grid of several.

    Args:
        rows: a row for each prompt, a column for each mixture.
        prompts: of the rows.
        columns: weights of the columns.
        factor: of enlargement; by default a single image keeps its pixels, so that it can be compared and scored.
    """
    if len(prompts) == len(columns) == 1:
        return enlarge(rows[0][0], factor or 1)
    return labelled_grid(rows, prompts, [weights_heading(column) for column in columns], factor=factor)


def weights_heading(weights: Weights) -> str:
    """Weights as the heading of a column: a line for each objective, with its name and weight kept together."""
    return "\n".join(
        f"{name}{GLUE}{str(weight).replace(',', ', ') if isinstance(weight, WeightSchedule) else f'{weight:.3g}'}"
        for name, weight in weights.items()
    )

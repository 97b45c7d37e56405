"""Pictures of samples for people."""

from collections.abc import Sequence

from PIL import Image

from stepfuse.data.grid import ImageRows, labelled_grid
from stepfuse.data.lettering import GLUE, enlarge
from stepfuse.data.seeds import numbered_generator
from stepfuse.fuse.rules.weights import Weights, shown_weights
from stepfuse.fuse.sampling.sampler import FusedSampler

STRIP_ROWS = 3  # of the picture on a card


def sampled_picture(
    rows: ImageRows, prompts: Sequence[str], columns: Sequence[Weights], *, factor: int | None = None
) -> Image.Image:
    """What `stepfuse sample` saves: one image as it was sampled, or a labelled grid of several.

    Args:
        rows: a row for each prompt, a column for each mixture.
        columns: weights of the columns.
        factor: of enlargement; by default a single image keeps its pixels, so that it can be compared and scored.
    """
    if len(prompts) == len(columns) == 1:
        return enlarge(rows[0][0], factor or 1)
    return labelled_grid(rows, prompts, [weights_heading(column) for column in columns], factor=factor)


def draw_strip(sampler: FusedSampler, prompts: Sequence[str], *, seed: int = 0, progress: bool = False) -> Image.Image:
    """The picture on a set's card: base, adapters alone and their mixture. A row begins with one noise."""
    columns: list[Weights] = [{name: 1.0} for name in sampler.names]
    columns += [sampler.default_weights] if len(columns) > 1 else []
    drawn = []
    for used, weights in [(sampler.with_rule("base"), None), *((sampler, weights) for weights in columns)]:
        generators = [numbered_generator(seed, row) for row in range(len(prompts))]
        drawn.append(used.sample(prompts, weights, generator=generators, progress=progress))
    return labelled_grid(list(zip(*drawn, strict=True)), prompts, ["base", *map(weights_heading, columns)])


def weights_heading(weights: Weights | str) -> str:
    """Weights as the heading of a column: a line for each objective."""
    return shown_weights(weights, separator="\n", space=GLUE)

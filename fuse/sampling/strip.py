"""The picture on a set's card: base, adapters alone, and their mixture, of the same noise."""

from collections.abc import Sequence

from PIL import Image

from stepfuse.data.grid import labelled_grid
from stepfuse.data.seeds import numbered_generator
from stepfuse.fuse.rules.weights import Weights
from stepfuse.fuse.sampling.pictures import weights_heading
from stepfuse.fuse.sampling.sampler import FusedSampler

ROWS = 3


def draw_strip(sampler: FusedSampler, prompts: Sequence[str], *, seed: int = 0, progress: bool = False) -> Image.Image:
    """A row a prompt; every column of a row begins with the same noise."""
    columns: list[Weights] = [{name: 1.0} for name in sampler.names]
    columns += [sampler.default_weights] if len(sampler.names) > 1 else []

    def draw(sampler: FusedSampler, weights: Weights) -> list[Image.Image]:
        generators = [numbered_generator(seed, row) for row in range(len(prompts))]
        images = sampler.sample(list(prompts), weights, generator=generators, progress=progress)
        assert isinstance(images, list)
        return images

    drawn = [draw(sampler.with_rule("base"), sampler.default_weights)]
    drawn += [draw(sampler, weights) for weights in columns]
    rows = [[images[row] for images in drawn] for row in range(len(prompts))]
    return labelled_grid(rows, prompts, ["base", *map(weights_heading, columns)])

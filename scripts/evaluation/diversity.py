"""How much the images of one prompt differ."""

from torch import Tensor
from torch.nn import functional

from stepfuse.rewards.clip import CLIPReward
from stepfuse.scripts.evaluation.batch import MetricBatch
from stepfuse.scripts.evaluation.metric import Figure, Metric, ratio_to_base


def mean_distances(embedder: CLIPReward, pixels: Tensor, seeds: int) -> list[float]:
    """Mean 1 - cos between the CLIP embeddings of the `seeds` images of each prompt, which follow each other."""
    embeddings = functional.normalize(embedder.embed_images(pixels), dim=1).unflatten(0, (-1, seeds))
    cosines = embeddings @ embeddings.transpose(1, 2)
    off_diagonal = (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (seeds * (seeds - 1))
    return (1 - off_diagonal).repeat_interleave(seeds).tolist()


def _per_image(batch: MetricBatch) -> list[float] | float:
    embedder, seeds = batch.evaluation.embedder, batch.evaluation.config.seeds_per_prompt
    return float("nan") if embedder is None or seeds < 2 else mean_distances(embedder, batch.pixels, seeds)


DIVERSITY = Metric(
    name="diversity",
    title="diversity",
    description="Mean distance between embeddings of a prompt's images",
    per_image=_per_image,
    further=(
        Figure(
            path=("diversity_ratio",),
            heading="diversity / base",
            description="Diversity as a multiple of the base's",
            aggregate=ratio_to_base,
        ),
    ),
    plotted=False,
)

"""What sampling an image costs, as metrics. A batch is measured as a whole, so its images have equal shares."""

import numpy as np

from stepfuse.scripts.evaluation.metric import Figure, Metric, over_images

FORWARDS = Metric(
    name="nfe",
    title="NFE",
    description="Network evaluations an image",
    per_image=lambda batch: batch.forwards / len(batch.images),
    aggregate=over_images(np.mean),
    over_cells=np.mean,
    of_rules="Network evaluations an image, mean over the cells",
    plotted=False,
)
SECONDS = Metric(
    name="seconds",
    title="s / image",
    description="Seconds an image in its batch, median",
    per_image=lambda batch: batch.seconds / len(batch.images),
    aggregate=over_images(np.median),
    further=(
        Figure(
            path=("seconds_p95",),
            heading="s / image, p95",
            description="Seconds an image in its batch, 95th percentile",
            aggregate=over_images(lambda values: np.percentile(values, 95)),
        ),
    ),
    over_cells=np.median,
    of_rules="Seconds an image, median over the cells' medians",
    plotted=False,
)
PEAK_MEMORY = Metric(
    name="peak_memory_mb",
    title="MB",
    description="Peak memory",
    unit="MB",
    per_image=lambda batch: batch.peak_memory_mb,
    aggregate=over_images(np.max),
    over_cells=np.mean,
    plotted=False,
)

"""How far a cell's policy is from the base's, along the path of each image."""

import torch
from torch import Tensor

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.lora.mixture import BASE
from stepfuse.fuse.rules.step import FusionStep
from stepfuse.scripts.evaluation.batch import MetricBatch
from stepfuse.scripts.evaluation.metric import Metric


def kl_to_base(batch: MetricBatch) -> Tensor:
    """Σ_t KL( p(x_s | x_t) ‖ p_ref(x_s | x_t) ) along the path of each image, in nats, by sampling it once more.

    For rules that select one expert at random it is the KL of the policy selected, which bounds that of the mixture.
    Deterministic steps have no density and are left out. NaN for seeds beyond `kl_seeds` and for rules that choose
    among several latents of an image, which is no Gaussian step.
    """
    total = torch.full((len(batch.images),), float("nan"), dtype=torch.float64)
    measured = [i for i, seed in enumerate(batch.seeds) if seed < batch.evaluation.config.kl_seeds]
    if not measured or batch.cell.rule.latents_per_image > 1:
        return total
    total[measured] = 0

    def add(step: FusionStep, gaussian: Gaussian, conditioning: Conditioning, rows: slice) -> None:
        variance = step.variance(step.plan.base)
        if bool((gaussian.variance > 0).all()) and bool((variance > 0).all()):
            (prediction,) = batch.sampler.denoiser.predictions(step.x_t, step.t, conditioning, [BASE])
            total[measured[rows]] += gaussian.kl(step.transition(prediction, variance)).double().cpu()

    batch.sample_again(measured, add)
    return total


KL_TO_BASE = Metric(
    name="kl",
    title="KL",
    description="Mean divergence of the path from the base's (Kullback-Leibler)",
    unit="nats",
    per_image=kl_to_base,
    plotted=False,
)

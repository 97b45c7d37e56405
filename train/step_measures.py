"""What is measured of an optimiser step: gathered on the device, and read by the host once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from accelerate import Accelerator
from torch import Tensor

from stepfuse.data.devices import to_device


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What the host reads of an optimiser step.

    Attributes:
        faulty: prompts of the losses of this process that are not finite.
        faults: number of such losses of all processes.
        norm: norm of the gradient, which all processes share; None if it was not given.
        by_step: for each denoising step, sums over all processes of its mean losses, KL, shares that were kept, and
            how often it was added.
        vertices: for each objective and denoising step, the sum of the KL over the images of all processes that have
            all weight on this objective, and their number; empty for one objective.
    """

    faulty: list[str]
    faults: float
    norm: float | None
    by_step: list[list[float]]
    vertices: dict[str, list[list[float]]]


class StepMeasures:
    """Losses and KL of an optimiser step, in float32 on the device until they are read.

    Args:
        count: number of denoising steps of an image.
        names: of the objectives.
    """

    def __init__(self, accelerator: Accelerator, count: int, names: Sequence[str]) -> None:
        self.accelerator, self.names = accelerator, names if len(names) > 1 else []
        self.totals = torch.zeros(count, 4, device=accelerator.device)
        self.vertices = torch.zeros(count, len(names), 2, device=accelerator.device)
        self.prompts: list[str] = []  # of each flag
        self.flags: list[Tensor] = []

    def add(
        self,
        prompts: Sequence[str],
        values: Tensor,
        kl: Tensor,
        step_index: int,
        kept: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """Add the samples of one denoising step.

        Args:
            prompts: of each sample.
            values: loss of each sample.
            kl: KL of each sample in nats.
            kept: samples that count in the loss; None for all.
            weights: of the objectives for each sample, on any device.
        """
        self.prompts += prompts
        self.flags.append((~torch.isfinite(values)).to(self.totals))
        one = values.new_ones(())
        share = one if kept is None else kept.float().mean().to(values)
        self.totals[step_index] += torch.stack([values.mean(), kl.mean().to(values), share, one]).to(self.totals)
        if self.names and weights is not None:
            alone = to_device(weights == 1, kl.device, self.totals.dtype)
            kl = kl.to(self.totals)
            self.vertices[step_index] += torch.stack([(alone * kl[:, None]).sum(0), alone.sum(0)], dim=1)

    def read(self, norm: Tensor | None = None) -> StepReading:
        """Everything in one copy from the device. It is the only time in a step that the host waits for the device.

        Args:
            norm: a number to read with it.
        """
        flags = torch.cat(self.flags)
        own = [flags] if norm is None else [flags, norm.to(flags)]
        sums = [flags.sum(), self.totals, self.vertices]
        packed = [_flat(own), self.accelerator.reduce(_flat(sums), "sum")]
        values = torch.cat(packed).cpu().split([each.numel() for each in (*own, *sums)])
        shaped = [value.view(each.shape) for value, each in zip(values, (*own, *sums), strict=True)]
        marked, *norms, faults, totals, vertices = shaped
        return StepReading(
            faulty=list(compress(self.prompts, marked.tolist())),
            faults=faults.item(),
            norm=norms[0].item() if norms else None,
            by_step=totals.tolist(),
            vertices={name: by_step.tolist() for name, by_step in zip(self.names, vertices.unbind(1), strict=False)},
        )


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])

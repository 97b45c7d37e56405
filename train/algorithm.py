"""What every training algorithm declares: the steps it stores, their densities, and its loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.train.checkpoints import Progress
from stepfuse.train.health import Health
from stepfuse.train.losses import dpo_loss
from stepfuse.train.rollout import Sampling
from stepfuse.train.settings import DPOSettings, TrainSettings
from stepfuse.train.setup import Setup

S = TypeVar("S")  # the step that an algorithm stores
StepGaussians = tuple[Gaussian, Gaussian | None]  # of the policy and of the base


@dataclass(frozen=True, kw_only=True)
class Batch(Generic[S]):
    """A micro-batch: the prompt of each row, the steps to train on, and the embeddings that they are predicted with."""

    prompts: Sequence[str]
    steps: Sequence[S]
    conditioning: Conditioning


# The index of an optimiser step → this process's micro-batches, and values that were measured over all processes.
Source = Callable[[int], tuple[list[Batch[S]], dict[str, float]]]


class Algorithm(ABC, Generic[S]):
    """A training algorithm, by the steps that it stores.

    Attributes:
        name: name in an adapter's record.
        settings: settings of the run.
        group_size: number of consecutive samples that share a prompt.
        updates_per_rollout: number of optimiser steps on each rollout.
        adds_kl: whether beta times the KL is added to the loss, which otherwise contains it already.
        measures_kl: whether the KL of its Gaussians is the KL of denoising steps.
        margin: how far the rewards of a pair have to differ, of an algorithm that makes pairs.
    """

    name: ClassVar[str]
    group_size: int = 1
    updates_per_rollout: int = 1
    adds_kl: bool = False
    measures_kl: bool = True
    margin: float = 0.0

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings

    @abstractmethod
    def gaussians(
        self, policy: nn.Module, sampling: Sampling, steps: Sequence[S], conditioning: Conditioning
    ) -> Sequence[StepGaussians]:
        """p_θ, with gradients, and p_ref of stored steps of one batch, from one forward pass.

        Args:
            policy: the `Policy`, wrapped or not.
            sampling: denoiser and initial schedule.
        """

    @abstractmethod
    def loss(self, policy: Gaussian, reference: Gaussian | None, step: S) -> Float[Tensor, " batch"]:
        """One value per sample; the reference is None if `measures_kl` is False and no step has one."""

    def beta(self, weights: Float[Tensor, "batch objectives"]) -> Float[Tensor, " batch"]:
        """Σ w_i beta_i of each sample, by its weights of the objectives."""
        return (weights * weights.new_tensor([each.beta for each in self.settings.each])).sum(1)

    def temperature(self, beta: float, dimensions: int) -> float:
        """The beta of the loss's optimum p ∝ p_ref exp(r / beta), for densities over that many dimensions.

        With `log_prob_reduction: mean` the loss of DPO has beta / dimensions times the difference of log-densities.

        Args:
            beta: of the settings of an objective.
        """
        return beta / (dimensions if self.settings.log_prob_reduction == "mean" else 1)

    def weights(self, step: S) -> Float[Tensor, "batch objectives"] | None:
        """The weights of the objectives for each sample of a step; None if `measures_kl` is False and it has none."""
        return None

    def step_index(self, step: S) -> int:
        """The index of a step among the denoising steps of an image; 0 if `measures_kl` is False and it has none."""
        return 0

    def update_log_probs(self, step: S, policy: Gaussian) -> None:
        """Replace stored log-probabilities by those of the policy, which has not been updated since the rollout."""

    def kept(self, step: S) -> Bool[Tensor, " batch"] | None:
        """The samples of a step that count in the loss; None if all do."""
        return None

    def log_prob_scale(self, x: Latents) -> float:
        """1, or with `log_prob_reduction: mean` 1 / dimensions of a latent."""
        return 1 / x[0].numel() if self.settings.log_prob_reduction == "mean" else 1.0


class AlignmentAlgorithm(Algorithm[S]):
    """An algorithm that trains on rewards or preferences."""

    @abstractmethod
    def source(self, setup: Setup, progress: Progress, health: Health) -> Source[S]:
        """Where its micro-batches come from."""


def preference_loss(
    settings: DPOSettings, beta: float | Float[Tensor, " batch"], *log_probs: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """`dpo_loss` of four log-probabilities, as the settings configure it, and with a beta for each sample."""
    return dpo_loss(
        *log_probs,
        beta=beta,
        label_smoothing=settings.label_smoothing,
        loss_type=settings.loss_type,
        clip_range=settings.train_clip_range,
    )

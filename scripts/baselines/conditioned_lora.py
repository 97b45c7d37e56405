"""A baseline of joint training: one LoRA whose scales depend on the weights, as in ParetoSlider.

    python -m stepfuse.scripts.baselines.conditioned_lora dpo --config dpo/emoji-joint --output_dir outputs/conditioned

With one pair of factors and a vector s_i for each objective, the LoRA at weights w is

    ΔW(w) = B diag(Σ_i w_i s_i) A = Σ_i w_i (B diag(s_i)) A,

the soup of N LoRAs whose factors are tied. So it is trained by the loss and on the mixtures of joint training, and
written as N ordinary adapters, whose soup it is. Its rank is the sum of the objectives' ranks, so that it has about as
many parameters as their LoRAs.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepfuse.data.run_lock import locked
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.fuse.lora.layers import lora_layers
from stepfuse.fuse.lora.rows import AdapterRows
from stepfuse.train.algorithms import ALGORITHMS
from stepfuse.train.arguments import parse_settings
from stepfuse.train.launch import make_accelerator
from stepfuse.train.loop import run
from stepfuse.train.lora import Policy, add_lora
from stepfuse.train.output import find_start
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import SETTINGS, TrainSettings
from stepfuse.train.setup import Setup


class ScaledUp(nn.Module):
    """B diag(s) in the place of an objective's B, which all objectives have in common."""

    def __init__(self, up: nn.Module, rank: int) -> None:
        super().__init__()
        self.up = up
        self.scales = nn.Parameter(torch.ones(rank))

    @property
    def weight(self) -> Tensor:
        """(out, r) or (out, r, 1, 1)."""
        shared: Any = self.up.weight
        return shared * self.scales.view(1, -1, *[1] * (shared.ndim - 2))

    @property
    def bias(self) -> None:
        return None


class ConditionedPolicy(Policy):
    """The policy of the tied LoRAs; its state has the factors of every objective, as others have."""

    def trainable_state(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layers = {path: layer for path, layer in self.network.named_modules() if isinstance(layer, BaseTunerLayer)}
        return {
            f"{adapter}/{path}.{kind}.weight": factors[adapter].weight
            for adapter in self.adapters
            for path, layer in layers.items()
            for kind, factors in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
        }

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        raise ValueError("a conditioned LoRA cannot be resumed; train it again with --overwrite")


def conditioned_policy(
    backbone: Backbone, settings: TrainSettings, schedules: Sequence[VarianceSchedule], *_: Any, **__: Any
) -> Policy:
    """One LoRA on the network under the names of all objectives, with scales for each."""
    network, names = backbone.network, [each.name for each in settings.each]
    if len(names) < 2:
        raise ValueError(f"{len(names)} objective; expected two or more, under `objectives`")
    if any(schedule.trainable() for schedule in schedules):
        raise ValueError("a conditioned LoRA has no learned variance; train with another variance")
    for setting in ("lora_alpha", "init_set", "resume_from_checkpoint"):
        if value := getattr(settings, setting):
            raise ValueError(f"{setting} is {value}; expected it unset for a conditioned LoRA")
    rank = sum(each.rank for each in settings.each)
    targets = settings.lora_target_modules or list(backbone.targets)
    for name in names:
        add_lora(network, name, rank=rank, alpha=None, targets=targets, seed=settings.seed)
    first = names[0]
    for layer in lora_layers(network):
        layer.lora_A[first].requires_grad_(True)
        shared = layer.lora_B[first].requires_grad_(True)
        for name in names:
            layer.lora_A[name] = layer.lora_A[first]
            layer.lora_B[name] = ScaledUp(shared, rank)
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    network.train()
    return ConditionedPolicy(backbone, names, schedules, AdapterRows(network, names, backbone.unbatched))


def train_conditioned(settings: TrainSettings) -> Path:
    """Train it, and write an adapter for each objective below `output_dir`, which is returned."""
    output = Path(settings.output_dir)
    # Without checkpoints, from which it could not be resumed.
    settings = replace(settings, checkpointing_steps=settings.max_train_steps + 1)
    algorithm = ALGORITHMS[settings.algorithm](settings)
    with locked(output):
        find_start(output, None, names=[each.name for each in settings.each], overwrite=settings.overwrite)
        accelerator = make_accelerator(settings)
        prompts = settings.load_prompts(settings.seed)
        with closing(TrainingReward(settings, accelerator.device)) as reward:
            run(Setup(settings, accelerator, reward, prompts, make=conditioned_policy), algorithm, None)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=SETTINGS)
    arguments, others = parser.parse_known_args()
    try:
        train_conditioned(parse_settings(SETTINGS[arguments.algorithm], others))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

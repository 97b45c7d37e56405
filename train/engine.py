"""Backward pass, clipping, optimiser and learning rate of the policy, with or without DeepSpeed."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from torch import Tensor

from stepfuse.train.lora import Policy
from stepfuse.train.settings import TrainSettings


class Engine:
    """A policy and its optimiser, prepared for the processes of this run.

    Attributes:
        policy: the module itself.
        wrapped: the module that is called for a loss: the policy in DistributedDataParallel, or DeepSpeed's engine.
    """

    def __init__(self, accelerator: Accelerator, policy: Policy, settings: TrainSettings) -> None:
        self.accelerator, self.policy, self.max_grad_norm = accelerator, policy, settings.max_grad_norm
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        # On a CPU the fused kernel rounds otherwise than torch's default, and DeepSpeed chooses its own.
        fused = not self.deepspeed and all(parameter.device.type == "cuda" for parameter in self.trainable)
        self.wrapped, self.optimizer = accelerator.prepare(policy, make_optimizer(policy, settings, fused=fused))
        self.rate = get_scheduler(
            settings.lr_scheduler,
            self.optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        accelerator.register_for_checkpointing(self.rate)
        # Checkpoints are without the base model. DeepSpeed, which has no weights and models here, saves its own.
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    @property
    def partitioned(self) -> bool:
        """Whether parameters are partitioned (ZeRO-3), so that all processes take part in each forward pass."""
        return self.deepspeed and self.wrapped.zero_optimization_stage() == 3

    def synchronised(self, last: bool) -> Any:
        """A context for forward and backward: only the last backward of a step averages gradients over processes."""
        return nullcontext() if last or self.deepspeed else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self.deepspeed:
            self.wrapped.set_gradient_accumulation_boundary(is_boundary=last)
            self.wrapped.backward(loss)
        else:
            self.accelerator.backward(loss)

    def clip(self) -> Tensor | None:
        """Clip the gradient; its norm before that, on the device, which DeepSpeed knows after its step only."""
        if self.deepspeed:
            return None
        return self.accelerator.clip_grad_norm_(self.trainable, self.max_grad_norm)

    def step(self, norm: float | None) -> tuple[float, bool]:
        """Update the parameters, and the learning rate if they were.

        Returns the gradient's norm before it was clipped, and whether parameters were updated: where the gradient is
        beyond the range of fp16, DeepSpeed lowers its scale instead.

        Args:
            norm: what `clip` found, which is finite: another gradient is dropped. None with DeepSpeed.
        """
        applied = True
        if self.deepspeed:
            self.wrapped.step()
            norm, applied = float(self.wrapped.get_global_grad_norm()), self.wrapped.was_step_applied()
        self.optimizer.step()  # no effect with DeepSpeed, which has its own
        self.optimizer.zero_grad()
        if applied:
            self.rate.step()
        assert norm is not None
        return norm, applied

    def drop(self) -> None:
        """Discard the gradient after `clip`: parameters and learning rate stay, and a gradient scale is adapted."""
        self.optimizer.zero_grad()
        if self.scaled:  # `clip` has told the scaler what it found, and may do so once between two updates of the scale
            self.accelerator.scaler.update()

    @property
    def scaled(self) -> bool:
        """Whether gradients are scaled (fp16), so that one beyond that range is no fault and lowers the scale."""
        return self.accelerator.scaler is not None

    def trainable_state(self) -> dict[str, Tensor]:
        """LoRA tensors and schedule parameters by name, in float32, on the CPU. All processes take part."""
        values: dict[str, Tensor] = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        if self.deepspeed:
            from deepspeed.utils import safe_get_full_fp32_param

            full = {name: safe_get_full_fp32_param(parameter) for name, parameter in values.items()}
            values |= {name: value for name, value in full.items() if value is not None}
        state = self.policy.trainable_state(values)
        return {name: value.detach().float().contiguous().cpu().clone() for name, value in state.items()}

    def schedule_parameters(self) -> list[dict[str, Tensor]]:
        """The trained parameters of each objective's schedule by name, on the CPU. All processes take part."""
        parameters = self.policy.schedule_parameters()
        held = [parameter for each in parameters for parameter in each.values()]
        gathered: Any = nullcontext()
        if held and self.partitioned:
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(held)
        with gathered:
            return [
                {name: parameter.detach().float().cpu().clone() for name, parameter in each.items()}
                for each in parameters
            ]

    def save(self, folder: Path) -> None:
        """Save optimiser, learning rate and generators; DeepSpeed also saves its part of the trained parameters."""
        self.accelerator.save_state(str(folder), exclude_frozen_parameters=True)  # an option of DeepSpeed

    def load(self, folder: Path, state: dict[str, Tensor]) -> None:
        """The inverse of `save`; `state` is the `trainable_state` at that time."""
        self.policy.check_objectives(state)
        self.accelerator.load_state(str(folder), load_module_strict=False)  # an option of DeepSpeed
        if not self.deepspeed:
            self.policy.load_trainable_state(state)


def make_optimizer(policy: Policy, settings: TrainSettings, *, fused: bool = False) -> torch.optim.Optimizer:
    """AdamW for the LoRAs, and with another learning rate for the parameters of the schedules.

    Args:
        fused: update all parameters in one kernel. It has no effect on 8-bit states, which have their own.
    """
    variance = [parameter for each in policy.schedule_parameters() for parameter in each.values()]
    of_schedules = {id(parameter) for parameter in variance}
    lora = [p for p in policy.parameters() if p.requires_grad and id(p) not in of_schedules]
    groups: list[dict[str, Any]] = [{"params": lora, "lr": settings.learning_rate}]
    if variance:
        groups.append({"params": variance, "lr": settings.variance_learning_rate, "weight_decay": 0.0})
    kind: Any = partial(torch.optim.AdamW, fused=fused or None)  # None leaves the other kernels to torch
    if settings.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError("use_8bit_adam needs bitsandbytes; pip install 'stepfuse[8bit]'") from error
        kind = AdamW8bit
    optimizer = kind(
        groups,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
    )
    if not settings.use_8bit_adam:
        optimizer.register_load_state_dict_pre_hook(_with_own_kernel)
    return optimizer


def _with_own_kernel(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state with the kernel of this run in place of that of the run that saved it, on another device perhaps."""
    own = {"fused": optimizer.param_groups[0]["fused"]}
    return state | {"param_groups": [saved | own for saved in state["param_groups"]]}

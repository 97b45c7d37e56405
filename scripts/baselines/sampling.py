"""Other implementations of sampling with several adapters, as their authors have it.

Each predicts the blended noise Σ w_i [e_u,i + g (e_c,i - e_u,i)] of a step.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from peft import PeftModel
from torch import Tensor, nn

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.unet import unet_arguments

Blend = Callable[[Tensor, Tensor, Conditioning], Tensor]
CopyOf = Callable[[Sequence[str]], nn.Module]  # a copy of the UNet, with these adapters alone, active


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """An implementation: its prediction of the blended noise with its networks, and how many copies of a UNet it holds.

    `build` is given the UNet, its copies, names of adapters and the guidance scale.
    """

    build: Callable[[nn.Module, CopyOf, Sequence[str], float], tuple[Blend, list]]
    copies: Callable[[Sequence[str]], int] = lambda names: 0


def diffusion_blend(unet: nn.Module, copy_of: CopyOf, names: Sequence[str], scale: float) -> tuple[Blend, list]:
    """DB-MPA as published (arXiv:2505.18547): N whole UNets in memory, each run with and without the prompt.

    Attention is the present default of diffusers, not the explicit one of 2022 that the published code ran on.
    """
    unets = [copy_of([name]) for name in names]

    def blend(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return _average([_guided(unet, x, t, conditioning, scale) for unet in unets])

    return blend, unets


def set_adapters(unet: Any, copy_of: CopyOf, names: Sequence[str], scale: float) -> tuple[Blend, list]:
    """One UNet, diffusers' `set_adapters` before each of N forward passes a step, as in Multi-LoRA-Composition."""

    def blend(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        outputs = []
        for name in names:
            unet.set_adapters(name)
            outputs.append(_guided(unet, x, t, conditioning, scale))
        return _average(outputs)

    return blend, [unet]


def mixed_batch(unet: nn.Module, copy_of: CopyOf, names: Sequence[str], scale: float) -> tuple[Blend, list]:
    """peft's mixed batch, `adapter_names`: one forward pass, in which each layer loops over the adapters.

    The unconditional rows are the base's, shared by all adapters as in `BatchedAdapters`: N + 1 rows an image.
    """
    unet_copy: Any = copy.deepcopy(copy_of(names))
    dtype, device = unet_copy.dtype, unet_copy.device
    configs, weights = dict(unet_copy.peft_config), {k: v for k, v in unet_copy.state_dict().items() if ".lora_" in k}
    unet_copy.unload_lora()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        wrapped = PeftModel(unet_copy, configs[names[0]], adapter_name=names[0])  # diffusers leaves this wrapper out
        for name in names[1:]:
            wrapped.add_adapter(name, configs[name])
    unet_copy.load_state_dict(weights, strict=False)
    wrapped.to(device, dtype).requires_grad_(False).eval()

    def blend(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        rows = [name for name in ("__base__", *names) for _ in range(len(x))]
        inputs = unet_arguments(conditioning.inputs("-" + "+" * len(names)))
        batch = torch.cat([x] * (1 + len(names))).to(conditioning.positive["prompt_embeds"].dtype)
        output = wrapped(batch, t.expand(len(batch)), adapter_names=rows, return_dict=False, **inputs)[0]
        e_u, *e_c = output.float().chunk(1 + len(names))
        return _average([e_u + scale * (e - e_u) for e in e_c])

    return blend, [unet_copy]


def denoise(blend: Blend, scheduler: DDIMScheduler, steps: int, x: Tensor, conditioning: Conditioning) -> Tensor:
    """From x_T to x_0, by diffusers' own DDIM with eta 1."""
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        x = scheduler.step(blend(x, t, conditioning), t, x, eta=1.0).prev_sample
    return x


def _guided(unet: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning, scale: float) -> Tensor:
    """e_u + g (e_c - e_u) of one network, in one forward pass of two rows an image."""
    batch = torch.cat([x, x]).to(conditioning.positive["prompt_embeds"].dtype)
    output = unet(batch, t.expand(len(batch)), return_dict=False, **unet_arguments(conditioning.inputs("-+")))[0]
    e_u, e_c = output.float().chunk(2)
    return e_u + scale * (e_c - e_u)


def _average(predictions: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(predictions)).mean(0)


BASELINES = {
    "diffusion_blend": Baseline(build=diffusion_blend, copies=len),
    "set_adapters": Baseline(build=set_adapters),
    "mixed_batch": Baseline(build=mixed_batch, copies=lambda names: 2),
}

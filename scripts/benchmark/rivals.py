"""Other ways to sample a blend of adapters, as their authors do it; kept with the benchmark, outside the library.

Each predicts the blended noise Σ w_i [e_u,i + g (e_c,i - e_u,i)] of a step.
"""

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler
from peft import PeftModel
from torch import Tensor, nn

from stepfuse.fuse.pipeline import Conditioning, stack_inputs
from stepfuse.scripts.benchmark.models import Model

Blend = Callable[[Tensor, Tensor, Conditioning], Tensor]


def diffusion_blend(model: Model, names: Sequence[str], scale: float) -> Blend:
    """DB-MPA as published (arXiv:2505.18547): N whole UNets held at once, each run in turn with and without prompt.

    Attention is diffusers' present default, not the explicit one of 2022 that the published code ran on.
    """
    unets = [_with_adapters(model, [name]) for name in names]

    def blend(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return _average([_guided(unet, x, t, conditioning, scale) for unet in unets])

    return blend


def set_adapters(model: Model, names: Sequence[str], scale: float) -> Blend:
    """One UNet, diffusers' `set_adapters` before every forward: N forwards a step, as Multi-LoRA-Composition has it."""
    unet = model.pipeline.unet

    def blend(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        outputs = []
        for name in names:
            unet.set_adapters(name)
            outputs.append(_guided(unet, x, t, conditioning, scale))
        return _average(outputs)

    return blend


def mixed_batch(model: Model, names: Sequence[str], scale: float) -> Blend:
    """peft's mixed batch, `adapter_names`: one forward, in which each layer loops over the adapters.

    The unconditional rows are the base's, shared by all, as in our own batch: N + 1 rows an image.
    """
    unet = _with_adapters(model, names)
    configs, weights = dict(unet.peft_config), {k: v for k, v in unet.state_dict().items() if ".lora_" in k}
    unet.unload_lora()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        wrapped = PeftModel(unet, configs[names[0]], adapter_name=names[0])  # diffusers leaves this wrapper out
        for name in names[1:]:
            wrapped.add_adapter(name, configs[name])
    wrapped.base_model.model.load_state_dict(weights, strict=False)
    wrapped.to(unet.device, unet.dtype).requires_grad_(False).eval()

    def blend(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        rows = [name for name in ("__base__", *names) for _ in range(len(x))]
        inputs = stack_inputs([conditioning.inputs(kind) for kind in ("-", *"+" * len(names))])
        batch = torch.cat([x] * (1 + len(names))).to(conditioning.positive.dtype)
        output = wrapped(batch, t.expand(len(batch)), adapter_names=rows, return_dict=False, **inputs)[0]
        e_u, *e_c = output.float().chunk(1 + len(names))
        return _average([e_u + scale * (e - e_u) for e in e_c])

    return blend


def denoise(blend: Blend, scheduler: DDIMScheduler, steps: int, x: Tensor, conditioning: Conditioning) -> Tensor:
    """From x_T to x_0, by diffusers' own DDIM with eta 1."""
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        x = scheduler.step(blend(x, t, conditioning), t, x, eta=1.0).prev_sample
    return x


def _guided(unet: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning, scale: float) -> Tensor:
    """e_u + g (e_c - e_u) of one network, in one forward of two rows an image."""
    batch = torch.cat([x, x]).to(conditioning.positive.dtype)
    output = unet(batch, t.expand(len(batch)), return_dict=False, **conditioning.inputs("-+"))[0]
    e_u, e_c = output.float().chunk(2)
    return e_u + scale * (e_c - e_u)


def _average(predictions: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(predictions)).mean(0)


def _with_adapters(model: Model, names: Sequence[str]) -> nn.Module:
    """A whole UNet of its own, with some of the adapters alone."""
    unet = copy.deepcopy(model.pipeline.unet)
    unet.set_adapters(list(names))  # first, for peft warns of an active adapter that goes
    unet.delete_adapters([name for name in model.adapters if name not in names])
    return unet


RIVALS: dict[str, Callable[[Model, Sequence[str], float], Blend]] = {
    "diffusion_blend": diffusion_blend,
    "set_adapters": set_adapters,
    "mixed_batch": mixed_batch,
}

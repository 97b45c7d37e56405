"""Other implementations of sampling with several adapters, as their authors have it.

Each predicts the blended noise Σ w_i [e_u,i + g (e_c,i - e_u,i)] of a step, or Σ w_i e_c,i of networks that take g
as an input.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time
from stepfuse.fuse.lora.layers import several_adapters

Blend = Callable[[Tensor, Time, Conditioning], Tensor]
CopyOf = Callable[[Sequence[str]], Any]  # a copy of the network, with these adapters alone, active


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """An implementation: its prediction of the blended noise with its networks, and how many copies of one it holds.

    `build` is given the model, its guidance and its network's copies, and the names of adapters.
    """

    build: Callable[[Denoiser, CopyOf, Sequence[str]], tuple[Blend, list]]
    copies: Callable[[Sequence[str]], int] = lambda names: 0


def diffusion_blend(denoiser: Denoiser, copy_of: CopyOf, names: Sequence[str]) -> tuple[Blend, list]:
    """DB-MPA as published (arXiv:2505.18547): N whole networks in memory, each run with and without the prompt.

    Attention is the present default of diffusers, not the explicit one of 2022 that the published code ran on.
    """
    networks = [copy_of([name]) for name in names]

    def blend(x: Tensor, t: Time, conditioning: Conditioning) -> Tensor:
        return _average([_guided(denoiser, network, x, t, conditioning) for network in networks])

    return blend, networks


def set_adapters(denoiser: Denoiser, copy_of: CopyOf, names: Sequence[str]) -> tuple[Blend, list]:
    """One network, diffusers' `set_adapters` before each of N forward passes a step, as in Multi-LoRA-Composition."""
    network = denoiser.network

    def blend(x: Tensor, t: Time, conditioning: Conditioning) -> Tensor:
        outputs = []
        for name in names:
            network.set_adapters(name)
            outputs.append(_guided(denoiser, network, x, t, conditioning))
        return _average(outputs)

    return blend, [network]


def mixed_batch(denoiser: Denoiser, copy_of: CopyOf, names: Sequence[str]) -> tuple[Blend, list]:
    """peft's mixed batch, `adapter_names`: one forward pass, in which each layer loops over the adapters.

    The unconditional rows are the base's, shared by all adapters as in `BatchedAdapters`: N + 1 rows an image.
    """
    network = copy.deepcopy(copy_of(names))
    dtype, device = network.dtype, network.device
    configs, weights = dict(network.peft_config), {k: v for k, v in network.state_dict().items() if ".lora_" in k}
    network.unload_lora()
    with several_adapters():
        wrapped = PeftModel(network, configs[names[0]], adapter_name=names[0])  # diffusers leaves this wrapper out
        for name in names[1:]:
            wrapped.add_adapter(name, configs[name])
    network.load_state_dict(weights, strict=False)
    wrapped.to(device, dtype).requires_grad_(False).eval()
    negatives = int(denoiser.guidance.subtracts)

    def blend(x: Tensor, t: Time, conditioning: Conditioning) -> Tensor:
        rows = [name for name in (*["__base__"] * negatives, *names) for _ in range(len(x))]
        run: Any = partial(wrapped, adapter_names=rows)
        outputs = _predict(denoiser, run, x, t, conditioning, "-" * negatives + "+" * len(names))
        e_u, e_c = outputs[:negatives], outputs[negatives:]
        return _average([denoiser.backbone.guide(e_u[0], e, denoiser.guidance.scale) for e in e_c] if e_u else e_c)

    return blend, [network]


def denoise(blend: Blend, path: NoisePath, steps: int, x: Tensor, conditioning: Conditioning) -> Tensor:
    """From x_T to x_0, by diffusers' own DDIM with eta 1, or its Euler steps."""
    times, scheduler = path.steps(steps), path.scheduler_of(steps)
    options = {"eta": 1.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    for (t, _), own in zip(times, scheduler.timesteps.to(x.device), strict=True):
        x = scheduler.step(blend(x, t, conditioning), own, x, **options).prev_sample
    return x


def _guided(denoiser: Denoiser, network: Any, x: Tensor, t: Time, conditioning: Conditioning) -> Tensor:
    """e_u + g (e_c - e_u) of one network, in one forward pass of two rows an image."""
    if not denoiser.guidance.subtracts:
        return _predict(denoiser, network, x, t, conditioning, "+")[0]
    e_u, e_c = _predict(denoiser, network, x, t, conditioning, "-+")
    return denoiser.backbone.guide(e_u, e_c, denoiser.guidance.scale)


def _predict(
    denoiser: Denoiser, network: nn.Module, x: Tensor, t: Time, conditioning: Conditioning, kinds: str
) -> tuple[Tensor, ...]:
    """Raw predictions, one for each of the prompts: `-` negative and `+` positive."""
    batch = torch.cat([x] * len(kinds))
    times = denoiser.path.network_time(t).to(x.device).expand(len(batch))
    inputs = conditioning.inputs(kinds) | denoiser.backbone.guidance_inputs(denoiser.guidance, batch)
    return denoiser.backbone.predict(batch, times, inputs, network=network).chunk(len(kinds))


def _average(predictions: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(predictions)).mean(0)


BASELINES = {
    "diffusion_blend": Baseline(build=diffusion_blend, copies=len),
    "set_adapters": Baseline(build=set_adapters),
    "mixed_batch": Baseline(build=mixed_batch, copies=lambda names: 2),
}

"""`stepfuse set profile`: measure, step by step, how far the soup is from the product."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor
from tqdm import tqdm

from stepfuse.data.seeds import numbered_generator
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.prompt_length import warn_of_cuts
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.lora.layers import check_mergeable, lora_layers
from stepfuse.fuse.rules.gap_profile import GapProfile
from stepfuse.fuse.rules.product import gated
from stepfuse.fuse.rules.step import FusionStep
from stepfuse.fuse.sampling.sampler import FusedSampler


def mixtures_of(names: Sequence[str], default: Mapping[str, float]) -> list[dict[str, float]]:
    """What a profile is measured at: the set's default weights and each pair, half and half."""
    first = {name: share for name, share in default.items() if share}
    pairs = [dict.fromkeys(pair, 0.5) for pair in combinations(names, 2) if first.keys() != set(pair)]
    return [first, *pairs] if len(first) > 1 else pairs


@torch.no_grad()
def measure_gaps(
    sampler: FusedSampler,
    prompts: Sequence[str],
    *,
    num_inference_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> GapProfile:
    """KL( product ‖ soup ) in nats at each step, along the product's own runs, one image a prompt, their mean.

    Raises:
        ValueError: for a set of one objective, one with a DoRA, or one whose steps have no noise.
    """
    mixtures = mixtures_of(sampler.names, dict(sampler.default_weights))  # type: ignore[arg-type]
    if not mixtures:
        raise ValueError(
            f"the set has one objective, {sampler.names[0]!r}, whose soup is the product; a gap is of two or more, "
            "and a gate too"
        )
    check_mergeable(lora_layers(sampler.denoiser.network), sampler.names)
    sampler = sampler.with_rule("product")
    warn_of_cuts(sampler.backbone, prompts, counted=True)
    count = len(sampler.plan(mixtures[0], 1, num_inference_steps=num_inference_steps).steps)
    gaps = torch.full((len(mixtures), count, len(prompts)), torch.nan, dtype=torch.float64)
    batches = -(-len(prompts) // batch_size)
    with tqdm(total=len(mixtures) * count * batches, disable=not progress, desc="profile") as bar:

        def observe(of: Tensor, step: FusionStep, gaussian: Gaussian, _: Conditioning, which: slice) -> None:
            bar.update()
            if bool((gaussian.variance > 0).all()):
                soup = gated(step, torch.ones(len(step.x_t), dtype=torch.bool))
                of[step.step_index, which] = gaussian.kl(soup).double().cpu()

        for index, mixture in enumerate(mixtures):
            sampler.sample(
                prompts,
                mixture,
                num_inference_steps=num_inference_steps,
                generator=[numbered_generator(seed, i) for i in range(len(prompts))],
                batch_size=batch_size,
                output_type="latent",
                progress=False,
                observe=partial(observe, gaps[index]),
                report_cuts=False,
            )
    means = gaps.mean(2)
    if bool(means.isnan().all()):
        raise ValueError("the set's steps have no noise (eta 0), so a soup has no KL to the product; gates need none")
    guidance = sampler.denoiser.guidance
    return GapProfile(
        num_inference_steps=count,
        guidance=guidance.source,
        guidance_scale=guidance.effective_scale,
        images=len(prompts),
        mixtures=tuple(mixtures),
        gaps=tuple(tuple(None if math.isnan(gap) else max(gap, 0.0) for gap in row) for row in means.tolist()),
    )


def describe_gaps(profile: GapProfile) -> str:
    """The gaps as a table, and for the first mixture what gates cost and lose."""
    of = [" + ".join(f"{w:.3g} {name}" for name, w in mixture.items()) for mixture in profile.mixtures]
    guidance = Guidance(source=profile.guidance, scale=profile.guidance_scale)
    lines = [
        f"KL( product ‖ soup ) at each of {profile.num_inference_steps} steps, guidance {guidance}, in nats, "
        f"means of {profile.images} images",
        *(f"  {index}: {mixture}" for index, mixture in enumerate(of, 1)),
        "step" + "".join(f"{index}:".rjust(10) for index in range(1, len(of) + 1)),
    ]
    for number, row in enumerate(zip(*profile.gaps, strict=True), 1):
        lines.append(f"{number:4}" + "".join(("–" if gap is None else f"{gap:.2g}").rjust(10) for gap in row))
    mixture = profile.mixtures[0]
    weights = torch.tensor(list(mixture.values()), dtype=torch.float64)[None, :, None]
    gaps = profile.at(weights.expand(profile.num_inference_steps, -1, 1), list(mixture))[:, 0]
    known = sorted(gaps[gaps.isfinite()].tolist())
    steps = profile.num_inference_steps
    lines += [
        f"gates for {of[0]}: of {len(mixture) * steps} rows of adapters an image, and what of the product is lost",
        "    gate  steps by soup  rows  nats a run",
    ]
    for count in sorted({max(1, round(share * len(known))) for share in (0.25, 0.5, 0.75, 0.9, 1.0)}):
        rows = count + (steps - count) * len(mixture)
        lines.append(f"{_up(known[count - 1]):8.2g}{count:15}{rows:6}{sum(known[:count]):12.2g}")
    return "\n".join(lines)


def _up(value: float) -> float:
    """A number rounded up to two digits, so that a gate as printed takes it in."""
    unit = 10 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1
    return math.ceil(value / unit) * unit

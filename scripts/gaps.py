"""`stepfuse set profile`: measure, step by step, how far the soup is from the product."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from tqdm import tqdm

from stepfuse.fuse.gate import GapProfile
from stepfuse.fuse.gaussian import Gaussian
from stepfuse.fuse.pipeline import Conditioning
from stepfuse.fuse.plan import FusionStep
from stepfuse.fuse.rules import gated
from stepfuse.fuse.sampler import FusedSampler


def mixtures_of(names: Sequence[str], default: Mapping[str, float]) -> list[dict[str, float]]:
    """What a profile is measured at: the set's default weights and each pair, half and half."""
    mixtures = [{name: share for name, share in default.items() if share}]
    for pair in combinations(names, 2):
        if not any(mixture.keys() == set(pair) for mixture in mixtures):
            mixtures.append(dict.fromkeys(pair, 0.5))
    return [mixture for mixture in mixtures if len(mixture) > 1]


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
    """KL( soup ‖ product ) in nats at each step, along the product's own runs, one image a prompt, their mean.

    Raises:
        ValueError: for a set of one objective, or one whose steps have no noise.
    """
    mixtures = mixtures_of(sampler.names, dict(sampler.default_weights))  # type: ignore[arg-type]
    if not mixtures:
        raise ValueError(f"the set has one objective in use, {', '.join(sampler.names)}: a gap needs two")
    sampler = sampler.with_rule("product")
    count = len(sampler.plan(mixtures[0], 1, num_inference_steps=num_inference_steps).steps)
    rows = []
    batches = -(-len(prompts) // batch_size)
    with tqdm(total=len(mixtures) * count * batches, disable=not progress, desc="profile") as bar:
        for mixture in mixtures:
            gaps = torch.zeros(count, len(prompts), dtype=torch.float64)

            def observe(
                step: FusionStep, gaussian: Gaussian, _: Conditioning, which: slice, gaps: Tensor = gaps
            ) -> None:
                bar.update()
                if bool((gaussian.variance > 0).all()):
                    soup = gated(step, torch.ones(len(step.x_t), dtype=torch.bool))
                    gaps[step.number, which] = soup.kl(gaussian).double().cpu()
                else:
                    gaps[step.number, which] = torch.nan

            sampler.sample(
                prompts,
                mixture,
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
                batch_size=batch_size,
                output_type="latent",
                progress=False,
                observe=observe,
            )
            rows.append(tuple(None if gap != gap else max(gap, 0.0) for gap in gaps.mean(1).tolist()))
    if all(gap is None for row in rows for gap in row):
        raise ValueError("the set's steps have no noise (eta 0), so a soup has no KL to the product; gates need none")
    denoiser = sampler.denoiser
    return GapProfile(
        num_inference_steps=count,
        guidance=denoiser.guidance,
        guidance_scale=denoiser.guidance_scale,
        images=len(prompts),
        mixtures=tuple(mixtures),
        gaps=tuple(rows),
    )


def describe_gaps(profile: GapProfile) -> str:
    """The gaps as a table, and what gates at some of them cost and save, for the first mixture."""
    heads = [" + ".join(f"{w:g} {name}" for name, w in mixture.items()) for mixture in profile.mixtures]
    lines = ["KL( soup ‖ product ), nats a step", "step  " + "  ".join(heads)]
    for k, row in enumerate(zip(*profile.gaps, strict=True), 1):
        cells = [("–" if gap is None else f"{gap:.3g}").rjust(len(head)) for gap, head in zip(row, heads, strict=True)]
        lines.append(f"{k:4}  " + "  ".join(cells))
    known = sorted(gap for gap in profile.gaps[0] if gap is not None)
    branches, steps = len(profile.mixtures[0]), profile.num_inference_steps
    lines += ["", f"gates, for {heads[0]}:", "  --gate  soup steps  forwards of a branch a run  nats a run"]
    for share in (0.25, 0.5, 0.75, 1.0):
        soups = max(1, round(share * len(known)))
        tau = known[soups - 1]
        forwards = soups + (steps - soups) * branches
        lines.append(f"  {tau:6.3g}  {soups:10}  {forwards:14} of {steps * branches:9}  {sum(known[:soups]):10.3g}")
    return "\n".join(lines)

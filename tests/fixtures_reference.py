"""Latents of a set under every rule: what later versions of the code must draw again.

The set is the first one of the bundled base, of adapters that were trained separately and have different variance
schedules (docs/evaluation-separate), with one of its oracles.

    python -m tests.fixtures_reference      writes tests/reference/latents.safetensors

Floating-point sums depend on the processor, so a file says which processor drew it: there latents are equal bit for
bit, elsewhere up to rounding.
"""

import hashlib
import json
import platform
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepfuse.fuse.rules.registry import get_rule
from stepfuse.fuse.sampling.sampler import FusedSampler

FILE = Path(__file__).parent / "reference" / "latents.safetensors"
SET = Path(__file__).parent / "reference" / "emoji-set"
PROMPTS = ["a fox on a green background", "a red apple on a blue background"]
HALVES = {"compressibility": 0.5, "alignment": 0.5}
MIXED = [{"compressibility": 0.2, "colourfulness": 0.3, "alignment": 0.5}, {"colourfulness": 1.0}]
ONE = {"colourfulness": 1.0}
COLOURFUL = {"colourfulness": 0.6, "alignment": 0.4}  # differentiable
SHARED = {"guidance": "shared", "guidance_scale": 3.0}
# (rule, its options, the sampler's options, weights, options of sample)
CASES: dict[str, tuple[str, dict, dict, object, dict]] = {
    "base": ("base", {}, {}, HALVES, {}),
    "product": ("product", {}, {}, MIXED, {}),
    "product-beyond": ("product", {}, {}, HALVES, {"strength": 1.2}),
    "product-shared": ("product", {}, SHARED, MIXED, {}),
    "product-full": ("product", {}, SHARED | {"guidance": "full"}, MIXED, {}),
    "product-interval": ("product", {}, SHARED, MIXED, {"guidance_interval": (0.25, 0.75)}),
    "product-rewards": ("product", {}, {}, HALVES, {"weights_on": "rewards"}),
    "product-separate": ("product", {}, {"forwards": "separate"}, MIXED, {}),
    "product-rows": ("product", {}, SHARED | {"rows_at_once": 3}, MIXED, {}),
    "product-gate": ("product", {"gate": 0.01}, {}, MIXED, {"num_inference_steps": 10}),
    "average_noise": ("average_noise", {}, {}, MIXED, {}),
    "kl": ("kl", {}, {}, ONE, {"strength": 1.5}),
    "oracle": ("oracle", {}, {}, HALVES, {}),
    "switch": ("switch", {}, SHARED, MIXED, {}),
    "systematic": ("systematic", {}, {}, MIXED, {}),
    "soup": ("soup", {}, SHARED, MIXED, {}),
    "soup-alike": ("soup", {}, {}, HALVES, {}),
    "soup-separate": ("soup", {}, {"forwards": "separate"}, HALVES, {}),
    "soup_factors": ("soup_factors", {}, {}, MIXED, {}),
    "code": ("code", {"candidates": 3, "block_size": 2}, {}, MIXED, {}),
    "rgg": ("rgg", {}, {}, COLOURFUL, {}),
}


@cache
def load_sampler(loading: str) -> FusedSampler:
    return FusedSampler.from_pretrained(SET, **json.loads(loading))


def draw(case: str) -> Tensor:
    """Final latents of two prompts in four steps."""
    rule, options, loading, weights, sampling = CASES[case]
    sampler = load_sampler(json.dumps(loading)).with_rule(get_rule(rule, **options))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    sampling = {"num_inference_steps": 4} | sampling
    latents = sampler.sample(
        PROMPTS, weights, generator=generators, output_type="latent", progress=False, negative_prompt="grey", **sampling
    )
    assert isinstance(latents, Tensor)
    return latents


def processor() -> str:
    """What sums depend on: the kind of processor, its instructions, and torch."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0].partition(': ')[2] if names else platform.processor()}, {capability}, torch {torch.__version__}"


def sha256(latents: Tensor) -> str:
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()


def read() -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Latents and their hashes by case, and the processor that drew them."""
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
        latents = {case: file.get_tensor(case) for case in CASES}
    return latents, json.loads(metadata["sha256"]), metadata["processor"]


def main() -> None:
    torch.set_num_threads(1)
    latents = {case: draw(case) for case in CASES}
    hashes = {case: sha256(value) for case, value in latents.items()}
    FILE.parent.mkdir(exist_ok=True)
    save_file(latents, FILE, {"sha256": json.dumps(hashes), "processor": processor()})


if __name__ == "__main__":
    main()

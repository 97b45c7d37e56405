"""Measure a bundled base, write its model card, and a grid of samples.

    python -m stepfuse.scripts.emoji.measure_base emoji-flow --package emoji-datasource-google-16.0.0.tgz \
        --training outputs/emoji-flow/training.json

Over 256 pairs of held-out prompts and seeds, for sampled images and for real ones: how often the bundled CLIP ranks
the true caption first among 32 held-out captions; the sharpness, as the energy of differences of neighbouring pixels;
and the CLIP distance, 1 - cos, to another real image of the same caption. The sharpness is also measured of what the
autoencoder makes of real images.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stepfuse.data import emoji
from stepfuse.data.grid import captioned_grid
from stepfuse.data.images import to_image, to_pixels
from stepfuse.data.json_file import write_json
from stepfuse.data.text_files import read_text, write_text
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.rules.plan import Expert
from stepfuse.rewards.clip import CLIPReward
from stepfuse.rewards.clip_score import clip_score
from stepfuse.scripts.emoji.images import draw_batch, read_package, render
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.rollout import rollout, sample_generator

GUIDANCE_SCALE = 4.0
STEPS = 20
PAIRS = 256
CHOICES = 32
FOLDERS = {
    "emoji": {
        emoji.PIPELINE: ("diffusers", "text-to-image", "base"),
        emoji.CLIP: ("transformers", "zero-shot-image-classification", "CLIP"),
    },
    "emoji-flow": {emoji.FLOW: ("diffusers", "text-to-image", "flow base")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="emoji", choices=FOLDERS)
    parser.add_argument("--package", type=Path, required=True, help="the npm package, for the real images")
    parser.add_argument("--training", type=Path, help="training.json of the build; with it, model cards are written")
    parser.add_argument("--note", default="", help="a sentence for the cards, on how the run differed from the script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--picture", type=Path, help="write a grid of sampled images here")
    arguments = parser.parse_args()
    clip, captions, pictures = clip_score(), emoji.captions(held_out=True), read_package(arguments.package)
    generator = torch.Generator().manual_seed(arguments.seed)
    prompts = [captions[i] for i in torch.randint(len(captions), (PAIRS,), generator=generator).tolist()]
    settings = dict(guidance_scale=arguments.guidance_scale, eta=arguments.eta, steps=arguments.steps)
    begun = time.monotonic()
    folder, *_ = FOLDERS[arguments.base]
    backbone = backbone_of(load_pipeline(str(folder)))
    sampled = sample_base(backbone, prompts, arguments.seed, **settings)
    seconds = time.monotonic() - begun
    names, real = draw_batch(pictures, PAIRS, generator, held_out=True)
    ranks = {
        "sampled": rank_first(clip, sampled, prompts, generator),
        "real": rank_first(clip, (real + 1) / 2, names, generator),
    }
    first, second = (render_captions(pictures, prompts, generator) for _ in range(2))
    figures = {
        **ranks,
        "gradient_energy": {
            "sampled": gradient_energy(sampled),
            "reconstructed": gradient_energy(reconstruct(backbone, first)),
            "real": gradient_energy(first),
        },
        "clip_distance": {"sampled": clip_distance(clip, sampled, first), "real": clip_distance(clip, second, first)},
        "seconds": seconds,
        **settings,
        "pairs": PAIRS,
        "choices": CHOICES,
        "seed": arguments.seed,
    }
    print(json.dumps(figures))
    if arguments.output:
        write_json(arguments.output, figures)
    if arguments.picture:
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        captioned_grid([to_image(pixels) for pixels in sampled[:48]], prompts[:48], columns=8).save(arguments.picture)
    if arguments.training:
        write_cards(arguments.base, json.loads(read_text(arguments.training)), figures, arguments.note)


def sample_base(
    backbone: Backbone, prompts: list[str], seed: int, *, guidance_scale: float, eta: float, steps: int
) -> Tensor:
    """Pixels of one image per prompt."""
    images, shape = [], backbone.shape()
    path = backbone.path(shape)
    sampling = Sampling(
        denoiser=Denoiser(backbone=backbone, path=path, guidance=Guidance(scale=guidance_scale)),
        objectives=(Expert.base(EtaSchedule(eta=eta)),),
        steps=path.steps(steps),
        shape=shape,
    )
    for start in tqdm(range(0, len(prompts), 64), desc="sample"):
        batch = prompts[start : start + 64]
        generators = [sample_generator(seed, "measure", start + i) for i in range(len(batch))]
        latents = rollout(sampling, backbone.encode(batch), generators, reference=False).latents
        with torch.no_grad():
            images.append(backbone.decode(latents))
    return torch.cat(images)


@torch.no_grad()
def reconstruct(backbone: Backbone, images: Tensor) -> Tensor:
    """Images, encoded and decoded by the autoencoder."""
    generators = [sample_generator(0, "reconstruct", i) for i in range(len(images))]
    return backbone.decode(backbone.encode_pixels(images, generators))


def render_captions(pictures: Mapping[str, Image.Image], captions: Sequence[str], generator: torch.Generator) -> Tensor:
    """Pixels of a real image of each caption."""
    known = {prompt.caption: prompt for prompt in emoji.prompts()}
    chosen = [known[caption] for caption in captions]
    return torch.stack([to_pixels(render(pictures[p.concept], p.background, generator)) for p in chosen])


def gradient_energy(images: Tensor) -> float:
    """Σ_d E[(x_{i+1} - x_i)²] over the directions d, of pixels in [0, 1]: soft images have less than sharp ones."""
    return sum(torch.diff(images, dim=d).square().mean().item() for d in (2, 3))


@torch.no_grad()
def clip_distance(clip: CLIPReward, images: Tensor, others: Tensor) -> float:
    """E[1 - cos] of the embeddings of pairs of images."""
    return 1 - (clip.embed_images(images) * clip.embed_images(others)).sum(1).mean().item()


@torch.no_grad()
def rank_first(clip: CLIPReward, images: Tensor, prompts: list[str], generator: torch.Generator) -> float:
    """Share of images whose own caption scores highest among 32 held-out captions."""
    captions = emoji.captions(held_out=True)
    similarity = clip.embed_images(images) @ clip.embed_prompts(captions).T
    hits = 0
    for row, prompt in zip(similarity, prompts, strict=True):
        true = captions.index(prompt)
        others = [i for i in torch.randperm(len(captions), generator=generator).tolist() if i != true]
        hits += bool((row[true] > row[others[: CHOICES - 1]]).all())
    return hits / len(prompts)


def write_cards(base: str, training: dict, figures: dict, note: str) -> None:
    stages = "\n".join(
        f"| {name} | {stage['parameters'] / 1e6:.2f} M | {stage['steps']} | {stage['batch_size']} | "
        f"{stage['learning_rate']:g} | {stage['seconds'] / 60:.0f} min |"
        for name, stage in training["stages"].items()
    )
    energy, distance = figures["gradient_energy"], figures["clip_distance"]
    build = "build_base" if base == "emoji" else "build_flow_base"
    body = f"""
Trained from scratch on {len(emoji.concepts())} Noto emoji (artwork Apache-2.0, from the npm package
`{training["package"]}`) on twelve background colours, captioned "a red apple on a blue background"; two
colours a concept are held out. Seed {training["seed"]}, two CPU cores, torch {training["torch"]}.

| stage | parameters | steps | batch | learning rate | time |
|---|---|---|---|---|---|
{stages}

{note}

Measured over {figures["pairs"]} held-out prompt and seed pairs, {figures["steps"]} steps with eta {figures["eta"]:g}
and guidance {figures["guidance_scale"]:g}: the CLIP ranks the true caption first among {figures["choices"]} for
{100 * figures["sampled"]:.1f} % of sampled images and {100 * figures["real"]:.1f} % of real ones. The energy of
differences of neighbouring pixels is {100 * energy["sampled"] / energy["real"]:.0f} % of that of real images, and
{100 * energy["reconstructed"] / energy["real"]:.0f} % for real images after the autoencoder. The CLIP distance to a
real image of the same caption is {distance["sampled"]:.3f}, that of another real one {distance["real"]:.3f}.

Rebuilt by `python -m stepfuse.scripts.emoji.{build}` and measured by
`python -m stepfuse.scripts.emoji.measure_base {base}` in a checkout of the repository; see their `--help`.

Limits: 64 pixels, {len(emoji.concepts())} concepts, twelve grounds. It is made to be small and quick, for tests,
demos and benchmarks; it generates nothing else.
"""
    head = "---\nlicense: apache-2.0\nlibrary_name: {}\npipeline_tag: {}\n---\n\n# The stepfuse emoji {}\n"
    for folder, facts in FOLDERS[base].items():
        write_text(folder / "README.md", head.format(*facts) + body)


if __name__ == "__main__":
    main()

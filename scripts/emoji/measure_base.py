"""Measure the embedded emoji base, and write its model cards and a grid of samples.

    python -m stepfuse.scripts.emoji.measure_base --package emoji-datasource-google-16.0.0.tgz \
        --training outputs/emoji-base/training.json

Over 256 pairs of held-out prompts and seeds: how often the embedded CLIP ranks the true caption first among 32 held-out
captions, for sampled images and for real ones.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from stepfuse.data import emoji
from stepfuse.data.grid import captioned_grid
from stepfuse.data.images import to_image
from stepfuse.data.text_files import read_text, write_text
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.rewards.clip import CLIPReward
from stepfuse.rewards.clip_score import clip_score
from stepfuse.scripts.emoji.images import draw_batch, read_package
from stepfuse.train.rollout import sample_generator

GUIDANCE_SCALE = 4.0
STEPS = 20
PAIRS = 256
CHOICES = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the npm package, for the real images")
    parser.add_argument("--training", type=Path, help="training.json of the build; with it, model cards are written")
    parser.add_argument("--note", default="", help="a sentence for the cards, on how the run differed from the script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--picture", type=Path, help="write a grid of sampled images here")
    arguments = parser.parse_args()
    clip, captions = clip_score(), emoji.captions(held_out=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    prompts = [captions[i] for i in torch.randint(len(captions), (PAIRS,), generator=generator).tolist()]
    sampled = sample_base(prompts, arguments.guidance_scale, arguments.seed)
    names, real = draw_batch(read_package(arguments.package), PAIRS, generator, held_out=True)
    figures = {
        "sampled": rank_first(clip, sampled, prompts, generator),
        "real": rank_first(clip, (real + 1) / 2, names, generator),
        "guidance_scale": arguments.guidance_scale,
        "steps": STEPS,
        "pairs": PAIRS,
        "choices": CHOICES,
        "seed": arguments.seed,
    }
    print(json.dumps(figures))
    if arguments.picture:
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        captioned_grid([to_image(pixels) for pixels in sampled[:48]], prompts[:48], columns=8).save(arguments.picture)
    if arguments.training:
        write_cards(json.loads(read_text(arguments.training)), figures, arguments.note)


def sample_base(prompts: list[str], guidance_scale: float, seed: int) -> Tensor:
    """Pixels of one image per prompt, by diffusers' DDIM with eta 1."""
    pipeline, images = load_pipeline("emoji"), []
    pipeline.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(prompts), 64), desc="sample"):
        batch = prompts[start : start + 64]
        generators = [sample_generator(seed, "measure", start + i) for i in range(len(batch))]
        options = dict(guidance_scale=guidance_scale, num_inference_steps=STEPS, eta=1.0, output_type="pt")
        images.append(pipeline(batch, generator=generators, **options).images)
    return torch.cat(images)


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


def write_cards(training: dict, figures: dict, note: str) -> None:
    stages = "\n".join(
        f"| {name} | {stage['parameters'] / 1e6:.2f} M | {stage['steps']} | {stage['batch_size']} | "
        f"{stage['learning_rate']:g} | {stage['seconds'] / 60:.0f} min |"
        for name, stage in training["stages"].items()
    )
    body = f"""
Trained from scratch on {len(emoji.concepts())} Noto emoji (artwork Apache-2.0, from the npm package
`{training["package"]}`) on twelve background colours, captioned "a red apple on a blue background"; two
colours a concept are held out. Seed {training["seed"]}, two CPU cores, torch {training["torch"]}.

| stage | parameters | steps | batch | learning rate | time |
|---|---|---|---|---|---|
{stages}

{note}

Measured over {figures["pairs"]} held-out prompt and seed pairs, {figures["steps"]} DDIM steps with eta 1 and guidance
{figures["guidance_scale"]:g}: the CLIP ranks the true caption first among {figures["choices"]} for
{100 * figures["sampled"]:.1f} % of sampled images and {100 * figures["real"]:.1f} % of real ones.

Rebuilt by `python -m stepfuse.scripts.emoji.build_base` and measured by
`python -m stepfuse.scripts.emoji.measure_base` in a checkout of the repository; see their `--help`.

Limits: 64 pixels, {len(emoji.concepts())} concepts, twelve grounds. It is made to be small and quick, for tests,
demos and benchmarks; it draws nothing else.
"""
    head = "---\nlicense: apache-2.0\nlibrary_name: {}\npipeline_tag: {}\n---\n\n# The stepfuse emoji {}\n"
    for folder, facts in (
        (emoji.PIPELINE, ("diffusers", "text-to-image", "base")),
        (emoji.CLIP, ("transformers", "zero-shot-image-classification", "CLIP")),
    ):
        write_text(folder / "README.md", head.format(*facts) + body)


if __name__ == "__main__":
    main()

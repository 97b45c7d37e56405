"""The demo: raw rewards → two adapters → a set → the slider and the front, measured."""

import json
import time
from pathlib import Path

import torch

from stepfuse.configs import FOLDER
from stepfuse.data import emoji
from stepfuse.data.emoji import to_image
from stepfuse.data.text_files import write_text
from stepfuse.fuse.make_set import claim_output, create_set
from stepfuse.fuse.pipeline import quiet_libraries
from stepfuse.fuse.sampler import FusedSampler
from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.statistics import Interval, paired_interval
from stepfuse.scripts.build_set import ALONE, launch
from stepfuse.scripts.pictures import labelled_grid, save_front, weights_heading
from stepfuse.scripts.plots import axis_label
from stepfuse.train import ddpo, dpo
from stepfuse.train.rollout import sample_generator

TRAINING = {  # objective → program, config
    "colourfulness": (dpo.__file__, "dpo/emoji-colourfulness.yaml"),
    "compressibility": (ddpo.__file__, "ddpo/emoji-compressibility.yaml"),
}
SLIDER = (0.0, 0.25, 0.5, 0.75, 1.0)  # weight of the second objective
PROMPTS, SEEDS, GRID_ROWS = 48, 2, 6


def demo(output: Path, *, seed: int, overwrite: bool, quick: bool) -> bool:
    """Train, fuse, measure and show; True where every claim held on held-out prompts.

    Writes `slider.png`, `front.png` and `results.json`.

    Raises:
        ValueError: for an output folder that is not empty, and where training fails.
    """
    began = time.monotonic()
    claim_output(output, overwrite=overwrite)
    output.mkdir(parents=True, exist_ok=True)
    for name, (program, config) in TRAINING.items():
        train_adapter(name, program, config, output / name, seed=seed, quick=quick)
    print("\nFusing them, and measuring on held-out prompts …", flush=True)
    create_set(output / "set", [output / name for name in TRAINING], overwrite=overwrite)
    results = measure(output, seed=seed, prompts=8 if quick else PROMPTS)
    results["minutes"] = (time.monotonic() - began) / 60
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    return report(output, results)


def train_adapter(name: str, program: str, config: str, folder: Path, *, seed: int, quick: bool) -> None:
    """Run one training as a user would, by `accelerate launch`."""
    arguments = ["--config", str(FOLDER / config), "--output_dir", str(folder)]
    arguments += ["--seed", str(seed), "--overwrite", "true"]
    if quick:
        arguments += ["--max_train_steps", "1", "--num_validation_images", "2", "--sample_num_steps", "4"]
    print(
        f"\nTraining {name!r}: accelerate launch {Path(program).parent.name}/{Path(program).name} "
        f"--config configs/{config}",
        flush=True,
    )
    launch(program, arguments, ALONE, name)


def measure(output: Path, *, seed: int, prompts: int) -> dict:
    """Scores of base and fused images on held-out prompts, with paired intervals; writes the pictures."""
    quiet_libraries()
    sampler = FusedSampler.from_pretrained(output / "set")
    first, second = sampler.names
    rewards = {o.name: load_reward(o.reward) for o in sampler.objectives}
    pool = emoji.captions(held_out=True)
    order = torch.randperm(len(pool), generator=sample_generator(seed, "demo")).tolist()
    chosen = [pool[i] for i in order[:prompts] for _ in range(SEEDS)]

    def draw(weight: float, strength: float = 1.0) -> tuple[torch.Tensor, dict[str, list[float]]]:
        images = sampler.sample(
            chosen,
            {first: 1 - weight, second: weight},
            strength=strength,
            generator=[sample_generator(seed, "demo", i) for i in range(len(chosen))],
            batch_size=32,
            output_type="pt",
        )
        assert isinstance(images, torch.Tensor)
        return images, {name: score(r, images, chosen, name=name).tolist() for name, r in rewards.items()}

    base_images, base = draw(0.5, strength=0.0)
    drawn = {weight: draw(weight) for weight in SLIDER}
    columns = [base_images, *[images for images, _ in drawn.values()]]
    heads = ["base", *[weights_heading({first: 1 - w, second: w}) for w in SLIDER]]
    rows = [[to_image(images[i]) for images in columns] for i in range(0, GRID_ROWS * SEEDS, SEEDS)]
    labelled_grid(rows, chosen[: GRID_ROWS * SEEDS : SEEDS], heads).save(output / "slider.png")
    scores = {weight: values for weight, (_, values) in drawn.items()}
    means = [{name: sum(v) / len(v) for name, v in values.items()} for values in (base, *scores.values())]

    def gain(weight: float, name: str) -> dict[str, float]:
        return vars(paired_interval(scores[weight][name], base[name], chosen))

    results = {
        "objectives": [first, second],
        "rewards": [o.reward for o in sampler.objectives],
        "prompts": prompts,
        "seeds_per_prompt": SEEDS,
        "means": dict(zip(["base", *map(str, SLIDER)], means, strict=True)),
        "gain_over_base": {
            _mixture(weight, first, second): {name: gain(weight, name) for name in (first, second)} for weight in SLIDER
        },
    }
    draw_front(output / "front.png", results)
    return results


def draw_front(file: Path, results: dict) -> None:
    """Plot the mean rewards of the mixtures in `results.json`, with the intervals of their gains over the base."""
    first, second = results["objectives"]
    rewards = results.get("rewards", results["objectives"])
    means, gains = results["means"], results["gain_over_base"]
    weights = [name for name in means if name != "base"]
    measured = [gains.get(_mixture(float(weight), first, second)) for weight in weights]
    save_front(
        file,
        [(means[weight][first], means[weight][second]) for weight in weights],
        [f"{float(weight):g}" for weight in weights],
        (means["base"][first], means["base"][second]),
        intervals=[values and (values[first], values[second]) for values in measured],
        legend=f"fused, with the weight of {second}; the rest is {first}",
        x_label=axis_label(first, rewards[0]),
        y_label=axis_label(second, rewards[1]),
    )


def _mixture(weight: float, first: str, second: str) -> str:
    """What the results call the mixture with this weight of the second objective."""
    named = {0.0: f"{first} alone", 0.5: "middle", 1.0: f"{second} alone"}
    return named.get(weight, f"{first} {1 - weight:g}, {second} {weight:g}")


def report(output: Path, results: dict) -> bool:
    """Print the intervals and say, claim by claim, whether they show it."""
    first, second = results["objectives"]
    gains = results["gain_over_base"]
    print(
        f"\nGain over the base, {results['prompts']} held-out prompts × {results['seeds_per_prompt']} seeds, "
        "mean [95 % interval, paired bootstrap over prompts]"
    )
    wide = max(map(len, gains)) + 2
    print(f"{'':{wide}}{first:>30}{second:>30}")
    for name, values in gains.items():
        print(f"{name:{wide}}" + "".join(f"{Interval(**values[o])!s:>30}" for o in (first, second)))
    claims = {
        f"the {first} adapter raises {first}": gains[f"{first} alone"][first]["low"] > 0,
        f"the {second} adapter raises {second}": gains[f"{second} alone"][second]["low"] > 0,
        f"the middle fusion beats the base in {first}": gains["middle"][first]["low"] > 0,
        f"the middle fusion beats the base in {second}": gains["middle"][second]["low"] > 0,
    }
    print()
    for claim, held in claims.items():
        print(f"{'shown    ' if held else 'NOT SHOWN'}  {claim}")
    print(f"\n{output / 'slider.png'}\n{output / 'front.png'}\n{output / 'results.json'}")
    print(f"{results['minutes']:.1f} minutes")
    return all(claims.values())

"""How visible rewards are: a short training on each, and what it changes in the images of the bundled flow base.

    python -m stepfuse.scripts.emoji.visible_rewards --output_dir outputs/visible

Every adapter is trained with configs/dpo/emoji-flow-colourfulness.yaml and another reward. Of images of held-out
prompts with the noise of the base's images, it measures the gain with its 95 % interval, the same in standard
deviations of the base's images, and the mean colour difference CIEDE2000 of a pixel (Sharma et al. 2005; about 1 can
just be seen). It writes visible.json and visible.png. An interrupted command is continued when it is run again.
"""

import argparse
from pathlib import Path

import torch
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor

from stepfuse.configs import FOLDER
from stepfuse.data import emoji
from stepfuse.data.devices import default_device
from stepfuse.data.grid import labelled_grid
from stepfuse.data.images import to_image
from stepfuse.data.json_file import write_json
from stepfuse.data.settings_file import load_settings
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import load_reward, reward_unit
from stepfuse.rewards.statistics import paired_interval
from stepfuse.scripts.recipes.demo import GUIDANCE
from stepfuse.scripts.recipes.training import Training, train
from stepfuse.train.rollout import sample_generator
from stepfuse.train.settings import DPOSettings

CONFIG = "dpo/emoji-flow-colourfulness.yaml"
REWARDS = ("lightness", "subject_size", "warmth", "contrast", "symmetry", "colourfulness", "compressibility")
PROMPTS, ROWS = 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/visible"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    output, seed = arguments.output_dir, arguments.seed
    output.mkdir(parents=True, exist_ok=True)
    pool = emoji.captions(held_out=True)
    order = torch.randperm(len(pool), generator=sample_generator(seed, "visible")).tolist()
    prompts = [pool[i] for i in order[:PROMPTS]]
    columns: dict[str, Tensor] = {}
    rows = {}
    for name in REWARDS:
        changes = {"reward": name, "objective_name": name, "seed": seed, "checkpointing_steps": 1}
        settings = load_settings(FOLDER / CONFIG, DPOSettings, changes)
        training = Training(settings=settings, folder=output / name)
        if not training.finished:
            train(training)
        create_set(output / f"{name}-set", [training.folder], overwrite=True, **GUIDANCE)
        sampler = FusedSampler.from_pretrained(output / f"{name}-set", device=default_device())
        if not columns:
            columns["base"] = draw(sampler, prompts, strength=0.0, seed=seed)
        columns[name] = draw(sampler, prompts, strength=1.0, seed=seed)
        rows[name] = measured(name, columns[name], columns["base"], prompts)
        print(f"{name}: {rows[name]}", flush=True)
        write_json(output / "visible.json", {"prompts": PROMPTS, "steps": settings.max_train_steps, "rewards": rows})
        grid = [[to_image(images[i]) for images in columns.values()] for i in range(ROWS)]
        labelled_grid(grid, prompts[:ROWS], list(columns)).save(output / "visible.png")


def draw(sampler: FusedSampler, prompts: list[str], *, strength: float, seed: int) -> Tensor:
    """Images of the prompts, with the same noise at every call."""
    generator = [sample_generator(seed, "visible", i) for i in range(len(prompts))]
    (name,) = sampler.names
    images = sampler.sample(
        prompts, {name: 1.0}, strength=strength, generator=generator, batch_size=len(prompts), output_type="pt"
    )
    assert isinstance(images, Tensor)
    return images


def measured(name: str, images: Tensor, base: Tensor, prompts: list[str]) -> dict:
    """The gain of a reward, and the mean colour difference to the base's images."""
    reward = load_reward(name)
    before, after = (score(reward, pixels, prompts, name=name) for pixels in (base, images))
    gain = paired_interval(after.tolist(), before.tolist(), prompts)
    old, new = (rgb2lab(pixels.permute(0, 2, 3, 1).numpy()) for pixels in (base, images))
    difference = deltaE_ciede2000(old, new).mean((1, 2)).tolist()
    return {
        "unit": reward_unit(name),
        "base": before.mean().item(),
        "gain": vars(gain),
        "gain_in_deviations": gain.mean / before.std().item(),
        "colour_difference": vars(paired_interval(difference, [0.0] * len(prompts), prompts)),
    }


if __name__ == "__main__":
    main()

"""The measurement of the demo: held-out prompts with the base and at mixtures of the objectives, and the pictures."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from tqdm import tqdm

from stepfuse.data import emoji
from stepfuse.data.devices import default_device
from stepfuse.data.grid import labelled_grid
from stepfuse.data.images import to_image
from stepfuse.data.output_file import atomic_file
from stepfuse.fuse.backbones.loading import quiet_libraries
from stepfuse.fuse.rules.weights import label_weights, shown_weights
from stepfuse.fuse.sampling.pictures import weights_heading
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.statistics import paired_interval
from stepfuse.scripts.evaluation.mixture_front import Mixture, draw_mixture_front
from stepfuse.train.rollout import sample_generator

STEPS = 4  # from one objective to the other
ROWS = 6  # of the picture
BATCH_SIZE = 16

Weights = dict[str, float]


def mixtures(objectives: Sequence[str]) -> dict[str, Weights]:
    """The mixtures that are measured, by their names in `results.json`, in the order of the picture.

    For two objectives, five from the first to the second; for three, the objectives alone, each two in equal parts, and
    all in equal parts.
    """
    alone: list[Weights] = [{name: 1.0} for name in objectives]
    equal: Weights = dict.fromkeys(objectives, 1 / len(objectives))
    if len(objectives) == 2:
        first, second = objectives
        between: list[Weights] = [{first: 1 - i / STEPS, second: i / STEPS} for i in range(1, STEPS)]
        ordered = [alone[0], *between, alone[1]]
    else:
        ordered = [*alone, *(dict.fromkeys(pair, 0.5) for pair in combinations(objectives, 2)), equal]

    def named(weights: Weights) -> str:
        if weights == equal:
            return "equal weights"
        return shown_weights(weights) if len(weights) > 1 else f"{next(iter(weights))} alone"

    return {named(weights): weights for weights in ordered}


def measure(adapter_set: Path, pictures: Sequence[Path], *, seed: int, prompts: int) -> dict:
    """Return the rewards of the base and of every mixture, with paired intervals of the gains; draw the pictures.

    All columns of the picture begin with the same noise. Intervals are 95 % by a bootstrap over prompts.

    Args:
        adapter_set: Folder of the set.
        pictures: Files of the slider and of the front.
        seed: Seed of the choice of prompts and of the noise.
        prompts: Number of held-out prompts.
    """
    quiet_libraries()
    sampler = FusedSampler.from_pretrained(adapter_set, device=default_device())
    names = [objective.name for objective in sampler.objectives]
    rewards = {objective.name: load_reward(objective.reward) for objective in sampler.objectives}
    pool = emoji.captions(held_out=True)
    order = torch.randperm(len(pool), generator=sample_generator(seed, "demo")).tolist()
    chosen = [pool[i] for i in order[:prompts]]
    measured = mixtures(names)
    images: dict[str, torch.Tensor] = {}
    batches = -(-prompts // BATCH_SIZE) * (1 + len(measured))
    # Of denoising steps, since a batch of images takes seconds.
    with tqdm(total=batches * sampler.num_inference_steps, desc="sampling", unit="step") as bar:

        def advance(*_: object) -> None:
            bar.update()

        for column, weights in {"base": measured["equal weights"], **measured}.items():
            drawn = sampler.sample(
                chosen,
                weights,
                strength=0.0 if column == "base" else 1.0,
                generator=[sample_generator(seed, "demo", i) for i in range(prompts)],
                batch_size=BATCH_SIZE,
                output_type="pt",
                progress=False,
                observe=advance,
            )
            assert isinstance(drawn, torch.Tensor)
            images[column] = drawn
    scores = {
        column: {name: score(reward, drawn, chosen, name=name).tolist() for name, reward in rewards.items()}
        for column, drawn in images.items()
    }
    slider, front = pictures
    heads = ["base", *map(weights_heading, measured.values())]
    rows = [[to_image(drawn[i]) for drawn in images.values()] for i in range(min(ROWS, prompts))]
    with atomic_file(slider) as temporary:
        labelled_grid(rows, chosen[:ROWS], heads).save(temporary)
    results = {
        "objectives": names,
        "rewards": [objective.reward for objective in sampler.objectives],
        "prompts": prompts,
        "weights": measured,
        "means": {column: {name: sum(v) / len(v) for name, v in by.items()} for column, by in scores.items()},
        "gain_over_base": {
            column: {name: vars(paired_interval(scores[column][name], scores["base"][name], chosen)) for name in names}
            for column in measured
        },
    }
    draw_fronts(front, results)
    return results


def evaluation_of(results: Mapping, rule: str) -> dict:
    """The gains as the manifest of the set keeps them, for its page and its card."""
    return {
        "prompts": results["prompts"],
        "seeds": 1,
        "objectives": dict(zip(results["objectives"], results["rewards"], strict=True)),
        "cells": [
            {
                "rule": rule,
                "weights": label_weights(weights),
                "strength": 1.0,
                "gains": results["gain_over_base"][column],
            }
            for column, weights in results["weights"].items()
        ],
    }


def draw_fronts(file: Path, results: Mapping) -> None:
    """Draw the front of every two objectives, of the mixtures that have no weight on others."""
    rewards = dict(zip(results["objectives"], results["rewards"], strict=True))
    measured = {
        column: Mixture(weights=weights, means=results["means"][column], gains=results["gain_over_base"][column])
        for column, weights in results["weights"].items()
    }
    title = f"Mean rewards on {results['prompts']} held-out prompts"
    draw_mixture_front(file, rewards, results["means"]["base"], list(measured.values()), title=title)

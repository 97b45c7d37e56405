"""`stepfuse demo`: train two adapters from raw rewards, fuse them, measure the mixtures and plot the front."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepfuse.configs import FOLDER
from stepfuse.data import emoji
from stepfuse.data.folder_files import files_named
from stepfuse.data.grid import labelled_grid
from stepfuse.data.images import to_image
from stepfuse.data.intervals import half_lengths
from stepfuse.data.json_file import read_json, write_json
from stepfuse.data.output_file import atomic_file
from stepfuse.data.output_folder import delete_files, require_empty_dir
from stepfuse.data.settings_file import load_settings
from stepfuse.fuse.backbones.loading import quiet_libraries
from stepfuse.fuse.sampling.pictures import weights_heading
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set, set_files
from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.statistics import Interval, paired_interval
from stepfuse.scripts.evaluation.plots import axis_label
from stepfuse.scripts.recipes.training import SINGLE_PROCESS, Training, train
from stepfuse.train.output import LOCK, locked, training_files
from stepfuse.train.rollout import sample_generator
from stepfuse.train.settings import SETTINGS

ALGORITHMS = {"colourfulness": "dpo", "compressibility": "ddpo"}  # of each objective
# Guidance of the images that are drawn; adapters of the flow base are trained without.
GUIDANCE: dict[str, dict[str, Any]] = {"emoji-flow": {"guidance": "shared", "guidance_scale": 2.0}, "emoji": {}}
QUICK = {"max_train_steps": 1, "num_validation_images": 2, "sample_num_steps": 4}
STATE, SET, RESULTS, PICTURES = "demo.json", "set", "results.json", ("slider.png", "front.png")
FILES = (STATE, RESULTS, *PICTURES, *(f"{name}.yaml" for name in ALGORITHMS))
SLIDER = (0.0, 0.25, 0.5, 0.75, 1.0)  # weight of the second objective
PROMPTS, SEEDS, GRID_ROWS = 48, 2, 6


def demo(output: Path, *, seed: int, overwrite: bool, quick: bool, base: str = "emoji-flow") -> None:
    """Train, fuse, measure on held-out prompts, and print what the intervals show.

    Writes `slider.png`, `front.png` and `results.json`. Interrupted and called again, it resumes.

    Raises:
        ValueError: for a folder that holds something else or a demo of other settings, and where training fails.
    """
    began = time.monotonic()
    trainings = [training(base, name, output / name, seed=seed, quick=quick) for name in ALGORITHMS]
    state = {
        "base": base,
        "seed": seed,
        "quick": quick,
        "trainings": {one.settings.name: one.sha256 for one in trainings},
    }
    with locked(output):
        claim(output, state, overwrite=overwrite)
        if (output / RESULTS).is_file():
            print(f"finished before; --overwrite starts again: {output}")
            report(output, read_json(output / RESULTS, "the results of a demo"))
            return
        for one in trainings:
            algorithm = ALGORITHMS[one.settings.name]
            command = f"accelerate launch train/{algorithm}.py --config configs/{config_name(base, one.settings.name)}"
            finished = one.finished
            what = f"finished, {one.folder}" if finished else command
            print(f"\nTraining {one.settings.name!r}: {what}", flush=True)
            if not finished:
                train(one, SINGLE_PROCESS)
        print("\nFusing them, and measuring on held-out prompts …", flush=True)
        create_set(output / SET, [one.folder for one in trainings], overwrite=True, **GUIDANCE[base])
        results = measure(output, seed=seed, prompts=8 if quick else PROMPTS)
        results["minutes"] = (time.monotonic() - began) / 60
        write_json(output / RESULTS, results)
        report(output, results)


def training(base: str, name: str, folder: Path, *, seed: int, quick: bool) -> Training:
    """One training of the demo, with a checkpoint after every step."""
    changes = {"seed": seed, "checkpointing_steps": 1} | (QUICK if quick else {})
    settings = load_settings(FOLDER / config_name(base, name), SETTINGS[ALGORITHMS[name]], changes)
    return Training(settings=settings, folder=folder)


def config_name(base: str, objective: str) -> str:
    return f"{ALGORITHMS[objective]}/{base}-{objective}.yaml"


def claim(output: Path, state: dict, *, overwrite: bool) -> None:
    """Accept an empty folder, one where the same demo was begun, or with `overwrite` one without files in the way."""
    if overwrite:
        require_empty_dir(output, overwrite=True, ours=demo_files, writes=(*ALGORITHMS, SET, *FILES), besides=(LOCK,))
        delete_files(output, demo_files(output))
    known = read_state(output)
    if known is None:
        require_empty_dir(output, overwrite=overwrite, besides=(LOCK,))
        write_json(output / STATE, state)
        return
    known = {"base": "emoji"} | known  # which states without a base are of
    if known != state:
        begun = f"--base {known['base']} --seed {known.get('seed')}" + (" --quick" if known.get("quick") else "")
        same = all(known.get(name) == state[name] for name in ("base", "seed", "quick"))
        how = "of another version of stepfuse" if same else f"that was begun with {begun}"
        unwanted = " and leave out --quick" if state["quick"] and not known.get("quick") else ""
        remedy = "" if same else f"; pass {begun}{unwanted} to resume it"
        raise ValueError(f"output {output} holds a demo {how}{remedy}; --overwrite starts again")


def read_state(output: Path) -> dict | None:
    """The settings of the demo that was begun in a folder; None where there is none."""
    try:
        return read_json(output / STATE, "the state of a demo")
    except ValueError:
        return None


def demo_files(folder: Path) -> set[Path]:
    """The files of the demo in a folder, which --overwrite replaces; none where no demo was begun."""
    if read_state(folder) is None:
        return set()
    files = files_named(folder, *FILES)
    for name in ALGORITHMS:
        files |= {Path(name, file) for file in (Path(LOCK), *training_files(folder / name))}
    return files | {Path(SET, file) for file in set_files(folder / SET)}


def measure(output: Path, *, seed: int, prompts: int) -> dict:
    """Scores of base and fused images on held-out prompts, with paired intervals; writes the pictures."""
    quiet_libraries()
    sampler = FusedSampler.from_pretrained(output / SET)
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

    drawn = {"base": draw(0.5, strength=0.0)} | {str(weight): draw(weight) for weight in SLIDER}
    heads = ["base", *[weights_heading({first: 1 - w, second: w}) for w in SLIDER]]
    rows = [[to_image(images[i]) for images, _ in drawn.values()] for i in range(0, GRID_ROWS * SEEDS, SEEDS)]
    slider, front = (output / name for name in PICTURES)
    with atomic_file(slider) as temporary:
        labelled_grid(rows, chosen[: GRID_ROWS * SEEDS : SEEDS], heads).save(temporary)
    scores = {column: values for column, (_, values) in drawn.items()}
    gains = {
        mixture_name(weight, first, second): {
            name: vars(paired_interval(scores[str(weight)][name], scores["base"][name], chosen)) for name in rewards
        }
        for weight in SLIDER
    }
    results = {
        "objectives": [first, second],
        "rewards": [o.reward for o in sampler.objectives],
        "prompts": prompts,
        "seeds_per_prompt": SEEDS,
        "means": {column: {name: sum(v) / len(v) for name, v in values.items()} for column, values in scores.items()},
        "gain_over_base": gains,
    }
    with atomic_file(front) as temporary:
        draw_front(temporary, results)
    return results


def report(output: Path, results: dict) -> None:
    """Print the intervals, and for each claim whether they show it."""
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
    claims = {f"the {name} adapter raises {name}": gains[f"{name} alone"][name] for name in (first, second)}
    claims |= {f"the middle fusion beats the base in {name}": gains["middle"][name] for name in (first, second)}
    print()
    for claim, gain in claims.items():
        print(f"{'shown    ' if gain['low'] > 0 else 'NOT SHOWN'}  {claim}")
    print("", *(output / name for name in (*PICTURES, RESULTS)), sep="\n")
    print(f"{results['minutes']:.1f} minutes")


def mixture_name(weight: float, first: str, second: str) -> str:
    """The name in `results.json` of the mixture with this weight of the second objective."""
    named = {0.0: f"{first} alone", 0.5: "middle", 1.0: f"{second} alone"}
    return named.get(weight, f"{first} {1 - weight:g}, {second} {weight:g}")


def draw_front(file: Path, results: dict) -> None:
    """Plot the mean rewards of the mixtures in `results.json` with the 95 % intervals of their gains over the base.

    Every mixture is a point, labelled with the weight of the second objective; one without a gain has no bars.
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    names = results["objectives"]
    base, means = results["means"]["base"], {w: m for w, m in results["means"].items() if w != "base"}
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    points = np.array([[mean[name] for name in names] for mean in means.values()])
    legend = f"fused, with the weight of {names[1]}; the rest is {names[0]}"
    axes.plot(*points.T, "-o", color="tab:blue", label=legend, zorder=3)
    gains = [results["gain_over_base"].get(mixture_name(float(weight), *names)) for weight in means]
    if known := [i for i, gain in enumerate(gains) if gain]:
        x, y = points[known].T
        x_bars, y_bars = (np.transpose([half_lengths(gains[i][name]) for i in known]) for name in names)
        axes.errorbar(
            x, y, xerr=x_bars, yerr=y_bars, fmt="none", ecolor="tab:blue", elinewidth=1, capsize=2.5,
            alpha=0.7, label="95 % interval of the gain over the base",
        )  # fmt: skip
    for weight, point in zip(means, points, strict=True):
        axes.annotate(
            f"{float(weight):g}", point, textcoords="offset points", xytext=(7, 7), fontsize=9, zorder=5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    axes.plot(*(base[name] for name in names), "s", color="dimgray", label="base", zorder=3)
    axes.margins(0.12)
    labels = [axis_label(name, reward) for name, reward in zip(names, results["rewards"], strict=True)]
    axes.set(xlabel=labels[0], ylabel=labels[1], title="Mean rewards on held-out prompts")
    figure.legend(loc="outside lower center", frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130, metadata={"Software": None})

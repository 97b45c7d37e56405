"""How often the host waits for the device, by rule and by part of training; docs/speed/waits.json holds the budget.

    python -m tests.pretended.budget            measure, and write the file and the table of docs/speed/waits.md
    python -m tests.pretended.budget --lines    measure, and print the lines that wait

Waits of each denoising step are told from those that are there once by two runs of different length, after one that
fills caches.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from stepfuse.fuse.backbones.loading import quiet_libraries
from stepfuse.fuse.sampling.sampler import FusedSampler
from tests.pretended.device import install
from tests.pretended.families import FAMILIES, FamilySet, draw_family, save_family_set
from tests.pretended.waits import Waits, counted
from tests.pretended.worlds import (
    RULES,
    RUNS,
    Case,
    draw,
    load_sampler,
    rollout_and_update,
    save_base,
    save_world,
    training_settings,
)

SPEED = Path(__file__).parents[2] / "docs/speed"
FILE, PAGE = SPEED / "waits.json", SPEED / "waits.md"
STEPS = (2, 4)  # denoising steps of the two runs
GENERATORS = {"host": "cpu", "device": "cuda"}
TRAINED = (
    ("DDPO", "one objective"),
    ("DDPO", "soup of two objectives"),
    ("DDPO", "product of two objectives"),
    ("DPO", "one objective"),
    ("DPO", "soup of two objectives"),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Waits of one kind of work.

    Attributes:
        each: waits of one denoising step.
        once: waits beside those.
        lines: how often each line waits, in the longer run.
    """

    each: float
    once: float
    lines: Counter[tuple[str, str, str]]

    @classmethod
    def of(cls, short: Waits, long: Waits, steps: tuple[int, int]) -> "Measured":
        each = (long.total - short.total) / (steps[1] - steps[0])
        return cls(each=each, once=short.total - steps[0] * each, lines=long.lines)

    def where(self) -> str:
        return "\n".join(f"  {count} × {' '.join(line)}" for line, count in self.lines.most_common())


def check_budget(name: str, measured: Measured) -> None:
    """Compare with the budget, in which waits of each step count first; an AssertionError for more, and for fewer."""
    allowed = tuple(json.loads(FILE.read_text())["now"][name].values())
    found = (measured.each, measured.once)
    told = (
        f"{name}: {found[0]:g} waits a step and {found[1]:g} once, and the budget is {allowed[0]:g} and {allowed[1]:g}"
    )
    assert found <= allowed, f"{told}. In {STEPS[1]} steps the host waits at\n{measured.where()}"
    assert found == allowed, f"{told}; lower the budget: python -m tests.pretended.budget"


def of_sampling(sampler: FusedSampler, case: Case, kind: str) -> tuple[Measured, torch.Tensor]:
    """Waits of sampling two images by a rule, with generators of this kind of device; and the latents of two steps."""
    latents, runs = [], []
    for steps in STEPS:
        with counted() as waits:
            latents.append(draw(sampler, case, steps, kind))
        runs.append(waits)
    return Measured.of(*runs, STEPS), latents[0]


def of_family(sampler: FusedSampler, family: FamilySet) -> Measured:
    """Waits of sampling two images by the product, from a model family that has sampled before."""
    runs = []
    for steps in STEPS:
        with counted() as waits:
            draw_family(sampler, family, steps)
        runs.append(waits)
    return Measured.of(*runs, STEPS)


def of_training(base: Path, output: Path, algorithm: str, run: str) -> dict[str, Measured]:
    """Waits of a rollout of two images, by denoising step, and of an optimiser step, by stored denoising step."""
    short, long = (
        rollout_and_update(training_settings(base, output, algorithm, sample_num_steps=steps, **RUNS[run]))
        for steps in STEPS
    )
    return {
        "rollout": Measured.of(short.rollout, long.rollout, STEPS),
        "update": Measured.of(short.update, long.update, (short.stored, long.stored)),
    }


def sampling_name(rule: str, where: str) -> str:
    return f"{rule}, generators on the {where}"


def family_name(family: str) -> str:
    return f"product, {family}"


def training_name(algorithm: str, run: str, part: str) -> str:
    return f"{algorithm}, {run}: {part}"


def measure(folder: Path) -> Iterator[tuple[str, Measured]]:
    """Everything in the budget, by its name there."""
    sampler = load_sampler(save_world(folder), "cuda")
    for rule, case in RULES.items():
        draw(sampler, case, STEPS[0])
        for where, kind in GENERATORS.items():
            yield sampling_name(rule, where), of_sampling(sampler, case, kind)[0]
    for family in FAMILIES:
        saved = save_family_set(family, folder / family)
        sampler = FusedSampler.from_pretrained(saved.folder, device="cuda")
        draw_family(sampler, saved, STEPS[0])
        yield family_name(family), of_family(sampler, saved)
    base = save_base(folder)
    for algorithm, run in TRAINED:
        for part, measured in of_training(base, folder / "out", algorithm, run).items():
            yield training_name(algorithm, run, part), measured


def table(budget: dict[str, dict[str, dict[str, float]]]) -> str:
    """The two columns of the file in Markdown."""
    rows = ["| | before: a step | once | now: a step | once |", "|---|--:|--:|--:|--:|"]
    for name, now in budget["now"].items():
        before = budget["before"].get(name, {}).values()
        rows.append(f"| {name} | {' | '.join(f'{value:g}' for value in (*before, *now.values()))} |")
    return "\n".join(rows)


def main() -> None:
    install()
    quiet_libraries()
    found = {}
    with TemporaryDirectory() as folder:
        for name, measured in measure(Path(folder)):
            print(f"{name}: {measured.each:g} a step, {measured.once:g} once", flush=True)
            if "--lines" in sys.argv:
                print(measured.where())
            found[name] = {"each": measured.each, "once": measured.once}
    budget = json.loads(FILE.read_text()) | {"now": found}
    FILE.write_text(json.dumps(budget, indent=1) + "\n")
    page = PAGE.read_text()
    begin = page.index("| | before")
    PAGE.write_text(page[:begin] + table(budget) + "\n" + page[begin:].partition("\n\n")[2])


if __name__ == "__main__":
    main()

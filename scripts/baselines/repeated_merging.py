"""A baseline of joint training: adapters are trained separately in rounds, each from the average of the round before.

    python -m stepfuse.scripts.baselines.repeated_merging dpo --config dpo/emoji-joint --output_dir outputs/merged

As in MapReduce LoRA: a round trains every objective by itself for `max_train_steps` / (rounds × objectives) steps,
all from the same LoRA, which is the average of the adapters of the round before, truncated to the sum of the
objectives' ranks. The adapters of the last round are the result. The images drawn are those of one joint run of
`max_train_steps`.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from stepfuse.fuse.lora.merge import merge_factors
from stepfuse.fuse.sets.adapter import read_adapter, read_factors, write_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.train.arguments import parse_settings
from stepfuse.train.loop import train_adapter
from stepfuse.train.settings import SETTINGS, TrainSettings


def repeated_merging(settings: TrainSettings, rounds: int) -> Path:
    """Train, and write the set of each round to `output_dir`/round-NUMBER; the last one is returned.

    A round that was finished is not trained again.
    """
    output, names = Path(settings.output_dir), [each.name for each in settings.each]
    if len(names) < 2:
        raise ValueError(f"{len(names)} objectives; expected two or more, under `objectives`")
    steps = settings.max_train_steps // (rounds * len(names))
    if steps < 1:
        raise ValueError(f"max_train_steps {settings.max_train_steps}; expected {rounds * len(names)} or more")
    start = ""
    for number in range(1, rounds + 1):
        folder = output / f"round-{number}"
        if not (folder / "set").exists():
            trained = [
                train_adapter(_alone(each, folder / "adapters" / each.name, start, steps, settings.seed + number))
                for each in settings.each
            ]
            create_set(folder / "set", trained, rule="soup")
        start = str(folder / "start")
        if number < rounds and not Path(start).exists():
            average(folder, names, sum(each.rank for each in settings.each))
    return output / f"round-{rounds}" / "set"


def _alone(each: TrainSettings, folder: Path, start: str, steps: int, seed: int) -> TrainSettings:
    return replace(
        each,
        objective_name=each.name,
        output_dir=str(folder),
        init_set=start,
        max_train_steps=steps,
        seed=seed,  # other prompts and noise in every round
        overwrite=True,
        resume_from_checkpoint=None,
    )


def average(folder: Path, names: list[str], rank: int) -> None:
    """The set that the next round starts from: the average of the adapters under every name."""
    adapters = [read_adapter(folder / "adapters" / name) for name in names]
    parts, factors = zip(*(read_factors(adapter) for adapter in adapters), strict=True)
    weighted = [(name, 1 / len(names), layers) for name, layers in zip(names, factors, strict=True)]
    merged, _ = merge_factors(weighted, rank)
    copies = [write_adapter(replace(a, folder=folder / "average" / a.name), merged, parts[0]) for a in adapters]
    create_set(folder / "start", [copy.folder for copy in copies], rule="soup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=4)
    arguments, others = parser.parse_known_args()
    try:
        print(repeated_merging(parse_settings(SETTINGS[arguments.algorithm], others), arguments.rounds))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

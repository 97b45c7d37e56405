"""Distil the product of a set's adapters into a soup, which runs one network in place of all adapters.

accelerate launch --quiet -m stepfuse.train.distill SET --config distill/emoji --output_dir outputs/distilled
"""

from stepfuse.train.command import run_training
from stepfuse.train.distill_settings import DistillSettings


def main() -> None:
    """Parse the command line and train."""
    run_training(DistillSettings, _distill)


def _distill(settings: DistillSettings) -> None:
    from stepfuse.train.distill_run import distill  # imports torch

    distill(settings)


if __name__ == "__main__":
    main()

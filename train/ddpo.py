"""Train one adapter by step-level DDPO.

accelerate launch --quiet train/ddpo.py --config ddpo/emoji-compressibility --output_dir outputs/compressibility
"""

from typing import TYPE_CHECKING

from stepfuse.train.command import run_training
from stepfuse.train.settings import DDPOSettings

if TYPE_CHECKING:
    from stepfuse.train.algorithms import Algorithm


def main() -> None:
    """Parse the command line and train."""
    run_training(DDPOSettings, make_algorithm, description="Train one LoRA by DDPO, to increase one reward.")


def make_algorithm(settings: DDPOSettings) -> "Algorithm":
    """DDPO with these settings."""
    from stepfuse.train.algorithms import DDPO

    return DDPO(settings)


if __name__ == "__main__":
    main()

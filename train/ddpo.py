"""Train one adapter by step-level DDPO.

accelerate launch --quiet train/ddpo.py --config ddpo/emoji-compressibility --output_dir outputs/compressibility
"""

from stepfuse.train.command import run_training
from stepfuse.train.settings import DDPOSettings


def main() -> None:
    """Parse the command line and train."""
    run_training(DDPOSettings)


if __name__ == "__main__":
    main()

"""Train one adapter by step-level DDPO.

accelerate launch --quiet -m stepfuse.train.ddpo --config ddpo/emoji-compressibility --output_dir outputs/jpeg
"""

from stepfuse.train.command import run_training
from stepfuse.train.settings import DDPOSettings


def main() -> None:
    """Parse the command line and train."""
    run_training(DDPOSettings)


if __name__ == "__main__":
    main()

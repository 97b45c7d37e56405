"""Train one adapter by step-level DPO.

accelerate launch --quiet -m stepfuse.train.dpo --config dpo/emoji-alignment --output_dir outputs/alignment
"""

from stepfuse.train.command import run_training
from stepfuse.train.settings import DPOSettings


def main() -> None:
    """Parse the command line and train."""
    run_training(DPOSettings)


if __name__ == "__main__":
    main()

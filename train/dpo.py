"""Train one adapter by step-level DPO.

accelerate launch --quiet train/dpo.py --config dpo/emoji-alignment --output_dir outputs/alignment
"""

from typing import TYPE_CHECKING

from stepfuse.train.command import run_training
from stepfuse.train.settings import DPOSettings

if TYPE_CHECKING:
    from stepfuse.train.algorithms import Algorithm


def main() -> None:
    """Parse the command line and train."""
    run_training(DPOSettings, make_algorithm, description="Train one LoRA by step-level DPO, to increase one reward.")


def make_algorithm(settings: DPOSettings) -> "Algorithm":
    """Step-level DPO on rollouts, or Diffusion-DPO if there are preference pairs."""
    from stepfuse.train.algorithms import DPO
    from stepfuse.train.offline import DiffusionDPO

    return DiffusionDPO(settings) if settings.pairs else DPO(settings)


if __name__ == "__main__":
    main()

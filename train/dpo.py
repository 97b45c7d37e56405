"""Train one adapter by step-level DPO.

accelerate launch train/dpo.py --config configs/dpo/emoji-alignment.yaml --output_dir outputs/alignment
"""

import sys

from stepfuse.data.text_files import print_any_text, printable
from stepfuse.fuse.pipeline import quiet_libraries
from stepfuse.train.algorithms import DPO
from stepfuse.train.loop import train
from stepfuse.train.offline import DiffusionDPO
from stepfuse.train.settings import DPOSettings, parse_settings


def main() -> None:
    """Parse, train, and turn a wrong setting into one line."""
    print_any_text()
    quiet_libraries()
    try:
        settings = parse_settings(DPOSettings, sys.argv[1:], description=__doc__ or "")
        train(settings, DiffusionDPO(settings) if settings.pairs else DPO(settings))
    except ValueError as error:
        sys.exit(f"error: {printable(error)}")


if __name__ == "__main__":
    main()

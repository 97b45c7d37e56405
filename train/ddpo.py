"""Train one adapter by step-level DDPO.

accelerate launch train/ddpo.py --config configs/ddpo/emoji-compressibility.yaml --output_dir outputs/compressibility
"""

import sys

from stepfuse.data.text_files import print_any_text, printable
from stepfuse.fuse.pipeline import quiet_libraries
from stepfuse.train.algorithms import DDPO
from stepfuse.train.loop import train
from stepfuse.train.settings import DDPOSettings, parse_settings


def main() -> None:
    """Parse, train, and turn a wrong setting into one line."""
    print_any_text()
    quiet_libraries()
    try:
        settings = parse_settings(DDPOSettings, sys.argv[1:], description=__doc__ or "")
        train(settings, DDPO(settings))
    except ValueError as error:
        sys.exit(f"error: {printable(error)}")


if __name__ == "__main__":
    main()

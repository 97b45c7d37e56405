"""Sample images of a run, as one captioned picture."""

from collections.abc import Sequence
from pathlib import Path

from stepfuse.data.grid import captioned_grid
from stepfuse.data.images import to_image
from stepfuse.rewards.protocol import Pixels


def save_samples(file: Path, images: Pixels, labels: Sequence[str], columns: int = 4) -> None:
    """Save images as PNG, each with its complete caption below; see `captioned_grid`.

    Args:
        file: its folder is created.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid([to_image(pixels) for pixels in images], labels, columns).save(file)

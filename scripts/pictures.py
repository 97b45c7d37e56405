"""Pictures for people: a labelled grid of images, and the front between two rewards."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Rows = Sequence[Sequence[Image.Image]]


def labelled_grid(
    rows: Rows, row_labels: Sequence[str], column_labels: Sequence[str], *, cell: int | None = None
) -> Image.Image:
    """Rows of images with a label beside each row and above each column.

    Args:
        rows: images of one size.
        cell: side of a cell in pixels; by default the image's own, at least 96.
    """
    first = rows[0][0]
    width = cell or max(first.width, 96)
    height = round(width * first.height / first.width)
    size = max(11, width // 9)
    font = ImageFont.load_default(size)
    line = size + 4
    margin = max(width, 150)
    lines = [_wrapped(label, font, margin - 12) for label in row_labels]
    heads = [_wrapped(label, font, width) for label in column_labels]
    top = line * max(len(head) for head in heads) + 8
    sheet = Image.new("RGB", (margin + len(rows[0]) * (width + 6), top + len(rows) * (height + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, head in enumerate(heads):
        for k, text in enumerate(head):
            x = margin + j * (width + 6) + width / 2
            draw.text((x, 4 + line * (k + 0.5)), text, fill="black", font=font, anchor="mm")
    for i, row in enumerate(rows):
        y = top + i * (height + 6)
        for k, text in enumerate(lines[i]):
            middle = y + height / 2 + (k - (len(lines[i]) - 1) / 2) * line
            draw.text((8, middle), text, fill="black", font=font, anchor="lm")
        for j, image in enumerate(row):
            sheet.paste(image.resize((width, height), Image.Resampling.BICUBIC), (margin + j * (width + 6), y))
    return sheet


def save_front(
    file: Path,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    base: tuple[float, float],
    *,
    x_label: str,
    y_label: str,
) -> None:
    """Plot mean reward against mean reward, one point a set of weights, and the base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    axes.plot(*zip(*points, strict=True), "-o", color="tab:blue", label="fused")
    for point, label in zip(points, labels, strict=True):
        axes.annotate(label, point, textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.plot(*base, "s", color="tab:gray", label="base")
    axes.margins(x=0.38, y=0.15)  # room for labels at the right
    axes.set(xlabel=x_label, ylabel=y_label, title="Front between two rewards, held-out prompts")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Words in lines no wider than `width`."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines

"""What is drawn, measured: where text and images lie, which pixels they have, what axes and legends say."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw

from stepfuse.data import lettering
from stepfuse.data.grid import captioned_grid, labelled_grid
from stepfuse.data.images import to_image
from stepfuse.data.lettering import Lettering, drawable
from stepfuse.fuse.rules.weights import parse_weights, shown_weights
from stepfuse.fuse.sampling.pictures import sampled_picture, weights_heading
from stepfuse.rewards.image_files import PromptedImage
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.recipes.rewards import show_ranked
from tests.fixtures_pictures import WORD, Box, apart

LONG = "a very detailed painting of a red apple on a blue table, seen from above in the light of an early morning, "
LONG += "with a long shadow, in the manner of the Dutch still lifes of the seventeenth century, oil on canvas, 4k"
FONTS = Path(get_data_path(), "fonts", "ttf")


def bare(text: str) -> str:
    return "".join(text.split())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Box]]:
    """Every piece of text that Pillow draws, with the box of its ink."""
    pieces: list[tuple[str, Box]] = []
    draw = ImageDraw.ImageDraw.text

    def record(self, xy, text, *args, **options):
        pieces.append((text, self.textbbox(xy, text, font=options["font"], anchor=options["anchor"])))
        return draw(self, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return pieces


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def cells(sheet: Image.Image, colours: list[tuple[int, int, int]]) -> list[Box]:
    """Where each of these colours is."""
    pixels = np.asarray(sheet)
    found = []
    for colour in colours:
        y, x = (pixels == colour).all(2).nonzero()
        found.append((int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1))
    return found


# Grids.


@pytest.mark.parametrize(
    ("size", "names", "columns", "prompts"),
    [
        ((64, 64), ("colourfulness", "compressibility"), 5, ["a fox", LONG]),
        ((64, 64), ("colourfulness", "compressibility", "alignment"), 12, ["a fox"]),
        ((64, 48), (WORD, "b"), 3, [LONG * 3, "a fox", LONG]),
        ((16, 16), ("a", "b"), 1, ["x"]),
        ((1024, 1024), ("image_reward", "laion_aesthetic"), 2, [LONG]),
        ((100, 130), ("a",), 2, ["", "word" * 40]),
    ],
)
def test_no_text_of_a_grid_meets_another_or_an_image(drawn, size, names, columns, prompts):
    """Headings and prompts are complete, a name is on the line of its weight, and every cell is its image's pixels."""
    weights = [{name: round(1 / (i + k + 1), 2) for k, name in enumerate(names)} for i in range(columns)]
    heads = [weights_heading(one) for one in weights]
    colours = [(200, 10 + i, 10 + j) for i in range(len(prompts)) for j in range(columns)]
    plain = [Image.new("RGB", size, colour) for colour in colours]
    boxes = cells(labelled_grid(rows(plain, columns), prompts, heads), colours)
    drawn.clear()
    images = [noise(size, seed) for seed in range(len(colours))]
    sheet = labelled_grid(rows(images, columns), prompts, heads)

    ink = [box for text, box in drawn if text]
    everything = [*ink, *boxes]
    assert all(apart(a, b) for i, a in enumerate(everything) for b in everything[:i])
    assert all(0 <= box[0] <= box[2] <= sheet.width and 0 <= box[1] <= box[3] <= sheet.height for box in ink)
    headings = []
    middles = [(box[0] + box[2]) / 2 for box in boxes[:columns]]
    for middle, one in zip(middles, weights, strict=True):
        above = sorted((p for p in drawn if abs((p[1][0] + p[1][2]) / 2 - middle) < 1), key=lambda p: p[1][1])
        headings += above
        lines = [text for text, _ in above]
        assert bare("".join(lines)) == bare("".join(f"{name}{weight:g}" for name, weight in one.items()))
        for weight in one.values():  # behind at least the end of a name
            assert any(line.endswith(f"\u00a0{weight:g}") and line[0] != "\u00a0" for line in lines)
    assert all(box[3] <= boxes[0][1] for _, box in headings)
    beside = sorted((box[1], text) for text, box in drawn if (text, box) not in headings)
    assert bare("".join(text for _, text in beside)) == bare("".join(prompts))
    factor = (boxes[0][2] - boxes[0][0]) // size[0]
    assert factor * max(size) >= 128
    for image, box in zip(images, boxes, strict=True):
        expected = np.asarray(image).repeat(factor, 0).repeat(factor, 1)
        assert np.array_equal(np.asarray(sheet.crop(box)), expected)


def rows(images: list[Image.Image], columns: int) -> list[list[Image.Image]]:
    return [images[i : i + columns] for i in range(0, len(images), columns)]


def test_a_single_image_keeps_its_pixels_unless_it_is_to_be_enlarged():
    image = noise((16, 16), 0)
    columns = [parse_weights("a=1")]
    assert np.array_equal(np.asarray(sampled_picture([[image]], ["x"], columns)), np.asarray(image))
    larger = np.asarray(sampled_picture([[image]], ["x"], columns, factor=16))
    assert np.array_equal(larger, np.asarray(image).repeat(16, 0).repeat(16, 1))


def test_the_command_enlarges_on_request(tmp_path):
    command = ["sample", "emoji", "--prompt", "a fox on a green background", "--steps", "1", "--output"]
    main([*command, str(tmp_path / "large.png"), "--enlarge", "4"])
    large = np.asarray(Image.open(tmp_path / "large.png"))
    assert large.shape == (256, 256, 3)
    assert np.array_equal(large, large[::4, ::4].repeat(4, 0).repeat(4, 1))
    with pytest.raises(SystemExit, match="enlarge 0"):
        main([*command, str(tmp_path / "none.png"), "--enlarge", "0"])
    assert not (tmp_path / "none.png").exists()


def test_weights_that_change_over_the_steps_have_a_heading():
    weights = parse_weights("a=0.9@0-0.5,0.2@0.5-1,b=0.333333")
    assert weights_heading(weights) == "a\u00a00.9@0-0.5, 0.2@0.5-1\nb\u00a00.333"


def test_weights_are_written_for_people_without_those_that_are_0():
    assert shown_weights("a=0.75,b=0.25,c=0") == shown_weights({"a": 0.75, "b": 0.25}) == "a 0.75 · b 0.25"
    assert shown_weights({"a": 0.0, "b": 0.0}) == "a 0 · b 0"
    assert shown_weights("no weights") == "no weights"


# Captions.


@pytest.mark.parametrize("side", [16, 64, 256])
def test_captions_below_images_are_complete(drawn, tmp_path, side):
    captions = ["a fox", LONG, WORD * 2, "", "Привет, мир", "f"]
    images = torch.rand(6, 3, side, side, generator=torch.Generator().manual_seed(0))
    sheet = np.asarray(captioned_grid([to_image(pixels) for pixels in images], captions))
    ink = [box for text, box in drawn if text]
    assert all(apart(a, b) for i, a in enumerate(ink) for b in ink[:i])
    assert all(box[0] >= 0 and box[2] <= sheet.shape[1] and box[3] <= sheet.shape[0] for box in ink)
    # Captions of a row are side by side: each piece belongs to the column in which it begins.
    width = sheet.shape[1] / 4
    found = dict.fromkeys(range(4), "")
    for text, box in sorted(drawn, key=lambda piece: piece[1][1]):
        found[int(box[0] // width)] += text
    expected = [captions[0] + captions[4], captions[1] + captions[5], captions[2], captions[3]]
    assert [bare(text) for text in found.values()] == [bare(text) for text in expected]
    factor = max(1, 128 // side)
    for pixels in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        tile = pixels.repeat(factor, 0).repeat(factor, 1)
        corners = (sheet[: sheet.shape[0] - len(tile) + 1, : sheet.shape[1] - len(tile) + 1] == tile[0, 0]).all(2)
        places = zip(*corners.nonzero(), strict=True)
        assert any(np.array_equal(sheet[y : y + len(tile), x : x + len(tile)], tile) for y, x in places)


def test_ranked_images_are_enlarged_by_a_whole_factor_or_shrunk(drawn, tmp_path):
    """32 × 24 pixels four times as large, 512 × 128 pixels a quarter as large, both on squares of 128 pixels."""
    small = noise((32, 24), 0)
    small.save(tmp_path / "0.png")
    Image.new("RGB", (512, 128), (10, 200, 30)).save(tmp_path / "1.png")
    items = [
        PromptedImage(file=tmp_path / f"{i}.png", name=f"{i}.png", prompt=text) for i, text in enumerate([LONG, "b"])
    ]
    show_ranked(items, [-2.0, -3.25], tmp_path / "best.png", unit="kB")
    sheet = np.asarray(Image.open(tmp_path / "best.png"))
    expected = np.asarray(small).repeat(4, 0).repeat(4, 1)
    y, x = next(
        (y, x) for y, x in zip(*(sheet == expected[0, 0]).all(2).nonzero(), strict=True)
        if np.array_equal(sheet[y : y + 96, x : x + 128], expected)
    )  # fmt: skip
    assert (sheet[y - 8 : y, x : x + 128] == 255).all()
    box = cells(Image.fromarray(sheet), [(10, 200, 30)])[0]
    assert (box[2] - box[0], box[3] - box[1]) == (128, 32)
    assert bare("".join(text for text, _ in drawn)) == bare(f"−2 kB {LONG} −3.25 kB b")


def use_fonts(monkeypatch: pytest.MonkeyPatch, *files: Path) -> None:
    monkeypatch.setattr(lettering, "_installed", lambda: files)
    monkeypatch.setattr(lettering, "_font_file", cache(lettering._font_file.__wrapped__))


@pytest.fixture
def only_dejavu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any other font."""
    use_fonts(monkeypatch)


def test_what_the_font_has_is_drawn_as_it_is(only_dejavu):
    for text in ("Füchse", "Лиса на зелёном фоне", "ἀλεπού", "é", "50 % → ½ σ²", "a\u00a00.5"):
        assert drawable(text) == text


def test_what_no_font_has_is_named_and_what_cannot_be_seen_is_left_out(only_dejavu):
    assert drawable("a 🦊 on 中") == "a [fox face] on \\u4e2d"
    assert drawable("a\U000e0100b") == "ab"  # a variation selector
    assert drawable("a\x00b\udcffc") == "a\\x00b\\udcffc"


def test_an_installed_font_is_used_for_what_the_first_lacks(monkeypatch, drawn):
    """STIX, which comes with matplotlib too, has letters that DejaVu Sans lacks."""
    stix, dejavu = (FT2Font(str(FONTS / name)) for name in ("STIXGeneral.ttf", "DejaVuSans.ttf"))
    letter = next(chr(code) for code in stix.get_charmap() if chr(code).isalpha() and not dejavu.get_char_index(code))
    use_fonts(monkeypatch, FONTS / "STIXGeneral.ttf")
    text = Lettering(20)
    sheet = Image.new("RGB", (100, 40), "white")
    text.draw(ImageDraw.Draw(sheet), 0, 20, f"a{letter}b")
    assert [piece for piece, _ in drawn] == ["a", letter, "b"]
    assert drawn[0][1][2] <= drawn[1][1][0] + 1
    assert drawn[1][1][2] <= drawn[2][1][0] + 1


def test_lines_are_as_long_as_they_may_be_and_no_longer():
    text = Lettering(13)
    for width in (60, 144, 400):
        lines = text.wrap(f"{LONG} {WORD}", width)
        assert all(text.width(line) <= width for line in lines)
        words = [line.split()[0] for line in lines]
        for line, word in zip(lines, words[1:], strict=False):
            assert text.width(f"{line} {word}") > width or word not in LONG.split()
        assert bare("".join(lines)) == bare(LONG + WORD)

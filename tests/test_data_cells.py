"""Cells of data sets and pictures as people have them: missing, of another kind, turned, broken."""

import io
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, PngImagePlugin

from stepfuse.data.data_set import read_caption, read_label, read_picture
from stepfuse.data.images import open_picture
from stepfuse.data.prompts import load_prompts
from stepfuse.rewards.image_files import read_pixels
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.train.preference_pairs import PreferencePairs
from stepfuse.train.settings import DPOSettings
from tests.fixtures_tiny import refused

ARRAY = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
PICTURE = Image.fromarray(ARRAY)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def encoded(picture=PICTURE, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def parquet(file, rows):
    pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


# Captions


@pytest.mark.parametrize("cell", [None, float("nan"), "", " \n", [], [None], ["", None, " "]])
def test_a_cell_without_a_text_is_no_caption(cell):
    assert read_caption(cell, draw="0") is None


@pytest.mark.parametrize("cell", [3, 0, 1.5, True, b"a fox", {"en": "a fox"}, ["a fox", 3], [["a fox"]], PICTURE])
def test_a_cell_of_another_kind_is_refused(cell):
    with refused("holds", "text"):
        read_caption(cell, draw="0")


def test_of_a_list_each_caption_is_drawn_about_as_often_and_the_same_by_the_same_seed():
    cell = ["a fox", None, "a red fox", ""]
    drawn = [read_caption(cell, draw=str(i)) for i in range(400)]
    assert drawn == [read_caption(list(cell), draw=str(i)) for i in range(400)]
    counts = Counter(drawn)
    assert set(counts) == {"a fox", "a red fox"}
    assert 140 < counts["a fox"] < 260  # six deviations of 10 about 200


def test_rows_of_a_data_set_without_a_caption_are_passed_over_and_counted(capfd):
    rows = [{"caption": c} for c in (["a fox", "a red fox"], ["a cat"], None, [], [None, ""])]
    name = parquet("captions.parquet", rows)
    found = load_prompts("", dataset_name=name, seed=3)
    assert found[1:] == ["a cat"]
    assert found[0] in ("a fox", "a red fox")
    assert load_prompts("", dataset_name=name, seed=3) == found
    assert {load_prompts("", dataset_name=name, seed=seed)[0] for seed in range(12)} == {"a fox", "a red fox"}
    assert "3 of 5 rows" in capfd.readouterr().err
    load_prompts("", dataset_name=parquet("whole.parquet", [{"caption": "None"}]))
    assert "rows" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder"])
def test_data_sets_of_any_file_format_give_their_captions(kind):
    table = [{"caption": c} for c in ("a fox", None, "für Zoë")]
    file = Path(f"rows.{kind}")
    if kind == "csv":
        file.write_bytes(b"\xef\xbb\xbfcaption,n\r\n" + "a fox,1\r\n,2\r\nfür Zoë,3\r\n".encode())
    elif kind == "jsonl":
        file.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in table).encode())
    elif kind == "folder":
        file.mkdir()
        parquet(file / "train.parquet", table)
        for hidden in (".DS_Store", "._train.parquet"):
            (file / hidden).write_bytes(b"\0\5\x16\7")
    else:
        parquet(file, table)
    assert load_prompts("", dataset_name=str(file)) == ["a fox", "für Zoë"]
    for settings in (DPOSettings(dataset_name=str(file)), EvaluationConfig(dataset_name=str(file))):
        assert settings.load_prompts(0) == ["a fox", "für Zoë"]


def test_data_sets_that_give_no_captions_are_named():
    name = parquet("rows.parquet", [{"caption": "a fox", "label": 3, "empty": None}])
    with refused(name, "row 0", "'label'", "3"):
        load_prompts("", dataset_name=name, column="label")
    with refused(name, "no prompts", "'empty'"):
        load_prompts("", dataset_name=name, column="empty")
    with refused(name, "'captoin'", "did you mean 'caption'"):
        load_prompts("", dataset_name=name, column="captoin")
    Path("broken.parquet").write_bytes(b"PAR1 broken")
    Path("broken.jsonl").write_text("{")
    for broken in ("broken.parquet", "broken.jsonl", "gone.parquet"):
        with refused(broken):
            load_prompts("", dataset_name=broken)
    Path("prompts.txt").write_text("a fox\n")
    with refused("prompts.txt", ".parquet", ".csv"):
        load_prompts("", dataset_name="prompts.txt")
    Path("folder").mkdir()
    with refused("folder"):
        load_prompts("", dataset_name="folder")
    parquet("folder/train.parquet", [{"caption": "a fox"}])
    with refused("folder", "test"):
        load_prompts("", dataset_name="folder", split="test")


# Labels


@pytest.mark.parametrize(("cell", "value"), [(1, 1), (0.5, 0.5), (True, 1), (False, 0), (None, None), (np.nan, None)])
def test_labels_are_numbers_or_missing(cell, value):
    assert read_label(cell) == value


@pytest.mark.parametrize("cell", ["1", "yes", [1], {"label": 1}, b"1"])
def test_labels_of_another_kind_are_refused(cell):
    with refused("number"):
        read_label(cell)


# Pairs


def settings(**changes):
    return DPOSettings(**({"pairs": "x", "pairs_shuffle_buffer": 1} | changes))


def rows(count=6, **changes):
    return [dict(jpg_0=encoded(), jpg_1=encoded(), label_0=1.0, caption=f"fox {i}") | changes for i in range(count)]


def taken(pairs, start, count):
    stream = pairs(start)
    return [next(stream) for _ in range(count)]


def test_pairs_without_a_value_are_passed_over_counted_once_and_change_no_place(capfd):
    table = rows()
    for i, row in enumerate(table):
        row["jpg_0"], row["jpg_1"] = (encoded(Image.new("RGB", (2, 2), colour)) for colour in ((i, 0, 0), (0, i, 9)))
    table[1]["caption"], table[2]["jpg_1"], table[4]["label_0"] = None, None, None
    pairs = PreferencePairs(parquet("pairs.parquet", table), settings())
    found = taken(pairs, 0, 9)
    assert [pair.prompt for pair in found] == ["fox 0", "fox 3", "fox 5"] * 3
    said = capfd.readouterr().err
    for column in ("caption", "jpg_1", "label_0"):
        assert said.count(f"1 rows without a value in column '{column}'") == 1
    contents = [(pair.prompt, pair.winner().getpixel((0, 0)), pair.loser().getpixel((0, 0))) for pair in found]
    assert contents[:3] == [(f"fox {i}", (i, 0, 0), (0, i, 9)) for i in (0, 3, 5)]
    resumed = taken(pairs, 4, 5)
    assert [(p.prompt, p.winner().getpixel((0, 0)), p.loser().getpixel((0, 0))) for p in resumed] == contents[4:]


def test_of_lists_of_captions_a_resumed_run_draws_the_same(capfd):
    name = parquet("pairs.parquet", rows(caption=["a fox", "a red fox", None]))
    drawn = [pair.prompt for pair in taken(PreferencePairs(name, settings()), 0, 30)]
    assert set(drawn) == {"a fox", "a red fox"}
    assert [pair.prompt for pair in taken(PreferencePairs(name, settings()), 13, 17)] == drawn[13:]
    assert [pair.prompt for pair in taken(PreferencePairs(name, settings(seed=1)), 0, 30)] != drawn


@pytest.mark.parametrize(
    ("changes", "culprits"),
    [
        ({"caption": 7}, ["'caption'", "7"]),
        ({"caption": {"en": "a fox"}}, ["'caption'", "a fox"]),
        ({"label_0": "1"}, ["'label_0'", "'1'"]),
        ({"caption": None}, ["no pair", "6 rows", "'caption'"]),
        ({"jpg_0": None}, ["no pair", "'jpg_0'"]),
        ({"jpg_0": {"bytes": None, "path": None}}, ["no pair", "'jpg_0'"]),
    ],
)
def test_pairs_of_which_none_is_right_are_refused_by_column(changes, culprits):
    with refused("pairs.parquet", *culprits):
        taken(PreferencePairs(parquet("pairs.parquet", rows(**changes)), settings()), 0, 1)


def test_paths_of_pairs_are_relative_to_their_data_set():
    Path("set/pictures").mkdir(parents=True)
    PICTURE.save("set/pictures/a.png")
    absolute = str(Path("set/pictures/a.png").resolve())
    for cell in ("pictures/a.png", {"bytes": None, "path": "pictures/a.png"}, absolute):
        for source in (parquet("set/pairs.parquet", rows(jpg_0=cell)), "set"):
            (pair,) = taken(PreferencePairs(source, settings()), 0, 1)
            assert np.array_equal(pair.winner(), ARRAY)
    gone = parquet("set/pairs.parquet", rows(jpg_0="pictures/gone.png"))
    (pair,) = taken(PreferencePairs(gone, settings()), 0, 1)
    with refused("'jpg_0'", "pictures/gone.png", "'fox 0'"):
        pair.winner()


def test_a_folder_of_pairs_may_hold_what_systems_leave_there():
    Path("pairs").mkdir()
    lines = []
    for i in range(2):
        for side in (0, 1):
            PICTURE.save(f"pairs/{i}-{side}.PNG")
        names = {f"jpg_{side}_file_name": f"{i}-{side}.PNG" for side in (0, 1)}
        lines.append(json.dumps(names | {"label_0": 1, "caption": f"fox {i}"}))
    Path("pairs/metadata.jsonl").write_text("\n".join(lines))
    for hidden in (".DS_Store", "._0-0.PNG"):
        Path("pairs", hidden).write_bytes(b"\0\5\x16\7")
    Path("pairs/.ipynb_checkpoints").mkdir()
    PICTURE.save("pairs/.ipynb_checkpoints/0-0-checkpoint.png")
    found = taken(PreferencePairs("pairs", settings()), 0, 4)
    assert sorted({pair.prompt for pair in found}) == ["fox 0", "fox 1"]
    assert np.array_equal(found[0].loser(), ARRAY)


def test_a_folder_of_pairs_whose_metadata_names_a_missing_picture_is_refused_in_a_line():
    Path("pairs").mkdir()
    PICTURE.save("pairs/a.png")
    row = {"jpg_0_file_name": "a.png", "jpg_1_file_name": "gone.png", "label_0": 1, "caption": "a fox"}
    Path("pairs/metadata.jsonl").write_text(json.dumps(row))
    with refused("pairs"):
        taken(PreferencePairs("pairs", settings()), 0, 1)[0].loser()


# Pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_by_exif_as_datasets_turns_them(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(exif=exif)
    theirs = datasets.Image().decode_example({"bytes": data, "path": None})
    Path("a.png").write_bytes(data)
    mappings = ({"bytes": data, "path": None}, {"bytes": None, "path": "a.png"})
    for cell in (*mappings, data, "a.png", theirs, Image.open("a.png")):
        assert np.array_equal(read_picture(cell, Path(), "it"), theirs)
    assert theirs.size == ((6, 4) if orientation < 5 else (4, 6))
    expected = torch.tensor(np.array(theirs)).permute(2, 0, 1)[None] / 255
    assert torch.equal(read_pixels(Path("a.png")), expected)


def test_reward_score_sees_pictures_upright(capsys):
    Path("images").mkdir()
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned clockwise: the left side comes to the top
    left = np.zeros((8, 8, 3), np.uint8)
    left[:, :4] = 255
    Image.fromarray(left).save("images/a.png", exif=exif)
    Path("p.txt").write_text("a fox")
    Path("mine.py").write_text("def top(images, prompts):\n    return images[:, 0, :4].mean((1, 2))\n")
    main(["reward", "score", "mine.py:top", "--images", "images", "--prompts", "p.txt", "--output", "s.csv"])
    assert Path("s.csv").read_text().splitlines()[1] == "a.png,a fox,1.0"


def animation():
    frames = [PICTURE, Image.fromarray(ARRAY[::-1].copy())]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


def transparent_palette():
    quantised = PICTURE.quantize(8)
    return encoded(quantised, transparency=bytes(range(8))), np.array(quantised.convert("RGB"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (animation(), ARRAY),
        transparent_palette(),
        (encoded(PICTURE.convert("CMYK"), "TIFF"), np.array(PICTURE.convert("CMYK").convert("RGB"))),
        (encoded(Image.fromarray(ARRAY[..., 0]).convert("LA")), np.stack([ARRAY[..., 0]] * 3, -1)),
        (encoded(Image.fromarray(ARRAY[..., 0].astype(np.uint16) * 257)), np.stack([ARRAY[..., 0]] * 3, -1)),
    ],
    ids=["animation", "palette with transparency", "CMYK", "LA", "16 bits"],
)
def test_pictures_of_other_kinds_are_their_colours(data, expected):
    assert np.array_equal(open_picture(data), expected)


def with_texts(exif=None, *, last=False):
    """A PNG that PIL refuses to read for texts and a colour profile of more than 1 MB, or for a text at its end."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (2**20 + 1), zip=True)
    data = encoded(pnginfo=info, **({"exif": exif} if exif else {}))
    start = data.index(b"zTXt") - 4
    text = data[start : start + 12 + int.from_bytes(data[start : start + 4])]
    if last:
        data = data.replace(text, b"").replace(data[-12:], text + data[-12:])
    else:
        info.add_itxt("parameters", "y" * (2**20 + 1), zip=True)
        data = encoded(pnginfo=info, icc_profile=bytes(2**20 + 1), **({"exif": exif} if exif else {}))
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(data)).load()
    return data


@pytest.mark.parametrize("last", [False, True])
def test_a_png_is_read_whatever_its_texts_are_and_turned_by_its_exif(last):
    assert np.array_equal(open_picture(with_texts(last=last)), ARRAY)
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned clockwise
    Path("a.png").write_bytes(with_texts(exif, last=last))
    assert np.array_equal(open_picture(Path("a.png")), np.rot90(ARRAY, -1))


def test_an_orientation_that_stands_in_a_text_of_a_png_counts_beside_long_texts():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    info.add_text("workflow", "x" * (2**20 + 1), zip=True)
    assert np.array_equal(open_picture(encoded(pnginfo=info)), np.rot90(ARRAY, -1))


def test_many_texts_of_a_png_are_not_read_either(monkeypatch):
    info = PngImagePlugin.PngInfo()
    for i in range(4):
        info.add_text(f"text {i}", "x" * 1000)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2000)
    assert np.array_equal(open_picture(encoded(pnginfo=info)), ARRAY)


def test_pairs_and_reward_score_read_a_png_with_a_long_text(capsys):
    Path("images").mkdir()
    Path("images/a.png").write_bytes(with_texts())
    Path("images/b.png").write_bytes(encoded())
    Path("p.txt").write_text("a fox")
    main(["reward", "score", "colourfulness", "--images", "images", "--prompts", "p.txt", "--output", "s.csv"])
    first, second = Path("s.csv").read_text().splitlines()[1:]
    assert first.removeprefix("a.png") == second.removeprefix("b.png")
    (pair,) = taken(PreferencePairs(parquet("pairs.parquet", rows(1, jpg_1=with_texts())), settings()), 0, 1)
    assert np.array_equal(pair.loser(), ARRAY)


BROKEN = {
    "text chunk": with_texts()[:-60],
    "cut off": encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 90, 3), np.uint8)))[:9000],
    "no picture": b"no picture",
    "empty": b"",
    "floats": encoded(Image.fromarray(ARRAY[..., 0].astype(np.float32)), "TIFF"),
    "damaged": encoded()[:40] + b"\xff" * 40,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_one_line_that_names_it_wherever_it_lies(kind):
    Path("images").mkdir()
    file = Path("images/a.png")
    file.write_bytes(BROKEN[kind])
    with refused("a.png"):
        read_pixels(file)
    (pair,) = taken(PreferencePairs(parquet("pairs.parquet", rows(1, jpg_1=BROKEN[kind] or b"-")), settings()), 0, 1)
    with refused("'jpg_1'", "'fox 0'"):
        pair.loser()
    Path("p.txt").write_text("a fox")
    with pytest.raises(SystemExit, match=r"\Aerror: [^\n]*a\.png[^\n]*\Z"):
        main(["reward", "score", "colourfulness", "--images", "images", "--prompts", "p.txt", "--output", "s.csv"])
    assert not Path("s.csv").exists()


def test_a_picture_too_large_is_refused_by_name(monkeypatch):
    data = encoded()  # 24 pixels, more than twice the limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with refused("the image", "24"):
        open_picture(data)


@pytest.mark.parametrize(
    "cell", [3, [1, 2], {"url": "a"}, "https://example.org/a.png", Image.new("RGB", (0, 3)), "gone.png"]
)
def test_a_cell_that_is_no_picture_is_refused_by_name(cell):
    with refused("column 'jpg_0'"):
        read_picture(cell, Path(), "column 'jpg_0'")

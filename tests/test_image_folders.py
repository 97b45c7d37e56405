"""Folders of images and the prompts beside them as people have them: with other files, and rows that lack a value."""

from pathlib import Path

import pytest
from PIL import Image

from stepfuse.rewards.image_files import list_images, pair_prompts
from tests.fixtures_tiny import refused

PICTURE = Image.new("RGB", (6, 4), "red")


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_a_folder_gives_its_pictures_in_counting_order_and_says_what_it_leaves_out(capfd):
    folder = Path("images")
    folder.mkdir()
    for name in ("b10.PNG", "b2.Jpg", "a.webp", "b1.jpeg"):
        PICTURE.save(folder / name)
    for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"\0")
    (folder / ".ipynb_checkpoints").mkdir()
    assert [file.name for file in list_images(folder)] == ["a.webp", "b1.jpeg", "b2.Jpg", "b10.PNG"]
    assert capfd.readouterr().err == ""
    for name in ("notes.md", "more.MD", "a.json", "b.json", "LICENSE"):
        (folder / name).write_bytes(b"")
    (folder / "more.png").mkdir()
    assert len(list_images(folder)) == 4
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    for part in ("2 .json", "1 .md", "1 .MD", "1 folder", "1 file without"):
        assert part in said


def test_a_folder_without_pictures_says_what_is_taken_and_what_is_there():
    Path("images").mkdir()
    with refused("images", ".png", ".webp"):
        list_images(Path("images"))
    Path("images/a.heic").write_bytes(b"")
    with refused("images", ".png", "1 .heic"):
        list_images(Path("images"))


@pytest.mark.parametrize(
    ("name", "text", "culprits"),
    [
        ("p.csv", "file_name,prompt\na.png\n", ["row 1", "prompt", "empty"]),
        ("p.csv", "file_name,prompt\na.png,x\n,y\n", ["row 2"]),
        ("p.CSV", "file_name;prompt\na.png;x\n", ["row 1", "file_name"]),
        ("p.jsonl", '{"file_name": "a.png", "prompt": null}', ["row 1", "prompt"]),
        ("p.jsonl", '{"file_name": "a.png", "prompt": null, "text": "x"}', ["row 1", "prompt"]),
        ("p.jsonl", '{"file_name": "a.png", "prompt": NaN}', ["row 1", "prompt", "nan"]),
        ("p.jsonl", '{"file_name": "a.png", "prompt": ["x", "y"]}', ["row 1", "prompt"]),
        ("p.jsonl", '{"file_name": null, "prompt": "x"}', ["row 1", "file_name"]),
        ("p.jsonl", '{"file_name": "a.png", "prompt": "x"}\n{"file', ["row 2"]),
        ("p.jsonl", "[" * 5000, ["row 1"]),
    ],
)
def test_rows_of_a_table_that_lack_a_prompt_are_named(name, text, culprits):
    Path("images").mkdir()
    PICTURE.save("images/a.png")
    Path(name).write_text(text)
    with refused(name, *culprits):
        pair_prompts(Path("images"), Path(name))

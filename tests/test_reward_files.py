"""Prompts in every file, reward files, and the commands over them."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from stepfuse.rewards.catalogue import REWARDS
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.rewards.image_files import pair_prompts, read_pixels
from stepfuse.rewards.registry import load_reward
from stepfuse.scripts.cli.main import main
from tests.fixtures_rewards import photographs, save_image_reward
from tests.fixtures_tiny import refused

ARRAY = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)


# Prompts.


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in (10, 2, 1):
        Image.fromarray(np.roll(ARRAY, number, 2) if number < 10 else np.tile(ARRAY, (2, 1, 1))).save(
            images / f"img{number}.png"
        )
    (images / "notes.md").write_text("not a picture")
    return tmp_path


def pairs(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return [(item.name, item.prompt) for item in pair_prompts(folder / "images", folder / name)]


def test_prompts_go_with_images_in_counting_order(folder):
    ordered = ["img1.png", "img2.png", "img10.png"]
    assert pairs(folder, "p.txt", "a\n\n夜空\n") == list(zip(ordered, ["a", "", "夜空"], strict=True))
    assert pairs(folder, "p.txt", "for all\n") == [(name, "for all") for name in ordered]
    rows = [("img10.png", 'a "b", c'), ("img1.png", "x"), ("img1.png", "y")]
    table = "prompt,file_name\r\n" + "".join(f'"{p.replace(chr(34), chr(34) * 2)}",{n}\r\n' for n, p in rows)
    assert pairs(folder, "p.csv", table) == rows
    lines = "".join(json.dumps({"file_name": n, "text": p}) + "\n" for n, p in rows)
    assert pairs(folder, "p.jsonl", lines) == rows


@pytest.mark.parametrize(
    ("name", "text", "culprits"),
    [
        ("p.txt", "a\nb\n", ["2 lines", "3 images"]),
        ("p.txt", "", ["0 lines"]),
        ("p.csv", "file_name,prompt\nimg3.png,a\n", ["row 1", "img3.png"]),
        ("p.csv", "file,prompt\nimg1.png,a\n", ["row 1", "file_name"]),
        ("p.jsonl", "{", ["cannot be read"]),
        ("p.jsonl", "[1]", ["row 1"]),
        ("p.csv", "file_name,prompt\n", ["no rows"]),
    ],
)
def test_prompts_that_do_not_fit_are_named(name, text, culprits, folder):
    with refused(name, *culprits):
        pairs(folder, name, text)


def test_folders_and_files_that_are_not_there_are_named(folder):
    for images, prompts in ((folder / "none", folder / "p.txt"), (folder / "images", folder / "none.txt")):
        with refused("none"):
            pair_prompts(images, prompts)
    (folder / "bare").mkdir()
    (folder / "p.txt").write_text("a")
    with refused("bare", ".png"):
        pair_prompts(folder / "bare", folder / "p.txt")


# Reward files.


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("reward: colourfulness\nscales: 2", "'scale'"),
        ("{}", "one of reward, worker and http"),
        ("reward: colourfulness\nhttp: {url: http://a}", "reward and http"),
        ("worker: {functoin: a.py:b}", "'function'"),
        ("worker: {batch_size: 3}", "function is None"),
        ("worker: {function: a.py:b, batch_size: 0}", "batch_size"),
        ("worker: {function: a.py:b, timeout: soon}", "timeout"),
        ("http: {url: 3}", "url"),
        ("reward: colourfulness\nscale: 0", "scale"),
        ("reward: colourfulness\nclip: [3, 1]", "clip"),
        ("reward: colourfulness\nclip: [1]", "clip"),
        ("reward: colourfulness\ndtype: float8", "dtype"),
        ("reward: beauty", "beauty"),
        ("reward: mine.yaml", "another reward file"),
        ("dtype: bfloat16\nworker: {function: a.py:b}", "bfloat16"),
        ("worker: {function: a.py:b, start_timeout: 0}", "start_timeout"),
        ("reward: [", "YAML"),
    ],
)
def test_a_reward_file_with_a_fault_is_refused_by_name(text, culprit, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with refused("mine.yaml", culprit):
        load_reward(str(tmp_path / "mine.yaml"))


def test_a_reward_file_shifts_scales_and_clips(tmp_path):
    images = photographs(8)[0][0]
    raw = colourfulness(images, [""] * 8).tolist()
    shift, scale = sorted(raw)[3], (max(raw) - min(raw)) / 2
    (tmp_path / "mine.yaml").write_text(f"reward: colourfulness\nshift: {shift}\nscale: {scale}\nclip: [-0.2, 0.3]\n")
    found = load_reward(str(tmp_path / "mine.yaml"))(images, [""] * 8)
    expected = [min(max((value - shift) / scale, -0.2), 0.3) for value in raw]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert {-0.2, 0.0, 0.3} < {round(value, 6) for value in found.tolist()}


def test_a_reward_file_says_in_which_precision_networks_run(tmp_path):
    save_image_reward(tmp_path / "weights")
    (tmp_path / "mine.yaml").write_text(f"reward: image_reward:{tmp_path / 'weights'}\ndtype: bfloat16\n")
    assert load_reward(str(tmp_path / "mine.yaml")).dtype == torch.bfloat16


# The list.


def listed(printed: str) -> dict[str, list[str]]:
    rows = [re.split(r"\s{2,}", line) for line in printed.splitlines()[1 : 1 + len(REWARDS)]]
    return {name: cells for name, *cells in rows}


def test_every_reward_is_in_the_list_with_what_it_needs(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPFUSE_CACHE", str(tmp_path))
    main(["reward", "list"])
    rows = listed(capsys.readouterr().out)
    assert list(rows) == list(REWARDS)
    assert rows["image_reward"] == ["yes", "1.8 GB", "1.8 GB", "downloads 1.8 GB"]
    assert rows["compressibility"] == ["no", "–", "–", "ready"]
    assert rows["image_reward_original"][3] == "creates an environment"
    assert all(len(cells) == 4 for cells in rows.values())
    main(["reward", "list", "--sources"])
    rows = listed(capsys.readouterr().out)
    assert list(rows) == list(REWARDS)
    assert rows["contrast"] == ["Apache-2.0", "Peli 1990"]


@pytest.mark.parametrize("options", [[], ["--sources"]])
def test_the_list_fits_into_a_terminal(capsys, monkeypatch, options):
    monkeypatch.setattr("stepfuse.scripts.cli.reward_list.terminal_width", lambda: 80)
    main(["reward", "list", *options])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split(" ")[0] for line in lines} > set(REWARDS)


@pytest.mark.parametrize("name", [n for n, info in REWARDS.items() if not (info.files or info.file or info.package)])
def test_the_list_says_rightly_whether_there_is_a_gradient(name):
    reward = load_reward("weighted:1*colourfulness" if name == "weighted" else name)
    images = (0.2 + 0.6 * torch.rand(1, 3, 64, 64)).requires_grad_(True)
    assert reward(images, ["a fox on a red background"]).requires_grad == REWARDS[name].differentiable


# Scoring a folder.


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.reader(handle))


def run_score(folder, *more, reward="colourfulness"):
    main(
        [
            *("reward", "score", reward, "--images", str(folder / "images"), "--prompts", str(folder / "p.txt")),
            *("--output", str(folder / "scores.csv"), "--device", "cpu", *more),
        ]
    )


def test_scores_of_a_folder_become_a_table(folder, capsys):
    (folder / "p.txt").write_text('a\nb, "c"\n日本\n', encoding="utf-8")
    run_score(folder, "--picture", str(folder / "best.png"), "--batch_size", "2")
    head, *rows = rows_of(folder / "scores.csv")
    assert head == ["file_name", "prompt", "score"]
    assert [row[:2] for row in rows] == [["img1.png", "a"], ["img2.png", 'b, "c"'], ["img10.png", "日本"]]
    for row in rows:
        assert float(row[2]) == colourfulness(read_pixels(folder / "images" / row[0]), [""]).item()
    assert "3 images" in capsys.readouterr().out
    with Image.open(folder / "best.png") as picture:
        assert picture.size[0] > 3 * 128
    assert [p.name for p in folder.iterdir() if "partial" in p.name] == []
    with pytest.raises(SystemExit, match="overwrite"):
        run_score(folder)
    run_score(folder, "--overwrite")


def test_scoring_goes_on_where_it_was_interrupted(folder):
    """Killed after the second batch: its scores are kept, none is lost and none is doubled."""
    (folder / "p.txt").write_text("a\nb\nc\n")
    (folder / "slow.py").write_text(
        "import os, time, torch\n"
        "def slow(images, prompts):\n"
        "    open('asked', 'a').write(prompts[0])\n"
        "    if prompts == ['c'] and not os.path.exists('let'):\n"
        "        time.sleep(600)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    arguments = ["reward", "score", "slow.py:slow", "--images", "images", "--prompts", "p.txt", "--batch_size", "1"]
    command = [sys.executable, "-m", "stepfuse.scripts.cli.main", *arguments, "--device", "cpu"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while (not (folder / "asked").exists() or (folder / "asked").read_text() != "abc") and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "scores.csv").exists()
    (folder / "let").touch()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (folder / "asked").read_text() == "abcc"
    expected = [read_pixels(folder / "images" / f"img{i}.png").mean((1, 2, 3)).item() for i in (1, 2, 10)]
    assert [float(row[2]) for row in rows_of(folder / "scores.csv")[1:]] == pytest.approx(expected)


def test_scoring_does_not_go_on_from_another_reward_or_from_half_a_row(folder):
    lines = ({"file_name": f"img{i}.png", "prompt": prompt} for i, prompt in ((1, "a"), (2, "b\nc"), (10, "é")))
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = (
        "def mine(images, prompts):\n    if {}:\n        raise RuntimeError('not yet')\n"
        "    return images.mean((1, 2, 3)) * {}\n"
    )

    def run(when, factor):
        (folder / "mine.py").write_text(code.format(when, factor))
        arguments = ["--images", str(folder / "images"), "--prompts", str(folder / "p.jsonl"), "--batch_size", "1"]
        name = f"{folder / 'mine.py'}:mine"
        main(["reward", "score", name, *arguments, "--output", str(folder / "s.csv"), "--device", "cpu"])

    with pytest.raises(SystemExit, match="not yet"):
        run("'é' in prompts", 1)
    (partial,) = folder.glob(".s.csv.*")
    whole = partial.read_bytes()
    assert [json.loads(line)[1] for line in whole.splitlines()] == ["a", "b\nc"]
    for cut in (whole[:-4], whole[:-1], whole[: whole.index(b"\n") + 1], b"", whole + "é".encode()[:1]):
        partial.write_bytes(cut)
        with pytest.raises(SystemExit, match="not yet"):
            run("'é' in prompts", 1)
        assert partial.read_bytes() == whole
    run("False", 3)  # another formula: nothing of the old one is in its table
    found = [float(row[2]) for row in rows_of(folder / "s.csv")[1:]]
    expected = [3 * read_pixels(folder / "images" / f"img{i}.png").mean().item() for i in (1, 2, 10)]
    assert found == pytest.approx(expected)
    assert [row[1] for row in rows_of(folder / "s.csv")[1:]] == ["a", "b\nc", "é"]


def test_an_output_that_cannot_be_written_is_named_before_anything_is_scored(folder):
    (folder / "p.txt").write_text("a\n")
    (folder / "taken").mkdir()
    (folder / "file").write_text("")
    for output in (folder / "taken", folder / "file" / "s.csv"):
        with pytest.raises(SystemExit, match=str(output.name)):
            run_score(folder, "--overwrite", "--output", str(output))


def test_a_failure_midway_names_the_images_and_keeps_what_was_scored(folder, tmp_path):
    (folder / "p.txt").write_text("a\nb\nc\n")
    (folder / "odd.py").write_text(
        "def odd(images, prompts):\n    if 'b' in prompts:\n        raise RuntimeError('no b')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    with pytest.raises(SystemExit, match=r"img2\.png to img2\.png: .*no b"):
        run_score(folder, "--batch_size", "1", reward=f"{folder / 'odd.py'}:odd")
    (partial,) = [p for p in folder.iterdir() if "partial" in p.name]
    assert [json.loads(line)[0] for line in partial.read_text().splitlines()] == ["img1.png"]
    assert not (folder / "scores.csv").exists()


def test_bad_arguments_are_one_line(folder):
    (folder / "p.txt").write_text("a\nb\nc\n")
    for more, culprit in ((["--batch_size", "0"], "batch_size"), (["--picture", "a.txt"], "a.txt")):
        with pytest.raises(SystemExit, match=culprit):
            run_score(folder, *more)
    with pytest.raises(SystemExit, match="beauty"):
        run_score(folder, reward="beauty")
    assert not os.path.exists(folder / "scores.csv")

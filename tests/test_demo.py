"""The demo, run small through the real command; its verdict, on numbers chosen to pass and to fail."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from stepfuse.data import emoji
from stepfuse.data.intervals import interval_text
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.cli.main import main, parse
from stepfuse.scripts.cli.set_show import measured_table
from stepfuse.scripts.recipes.demo import demo, joint_training, progress
from stepfuse.scripts.recipes.demo_mixtures import evaluation_of, mixtures
from stepfuse.scripts.recipes.demo_report import claims, next_commands, report
from stepfuse.train.arguments import parse_settings
from stepfuse.train.settings import DPOSettings
from tests.fixtures_tiny import refused

ROOT = Path(__file__).parents[1]


def results(equal_low: float, objectives: tuple[str, ...] = ("lightness", "subject_size")) -> dict:
    """Results whose intervals are all above 0, but for the last reward at equal weights."""

    def gain(low: float) -> dict[str, float]:
        return {"mean": low + 1, "low": low, "high": low + 2}

    rows = {f"{name} alone": {other: gain(0.5 if other == name else -3) for other in objectives} for name in objectives}
    rows["equal weights"] = dict.fromkeys(objectives, gain(0.25)) | {objectives[-1]: gain(equal_low)}
    return {
        "objectives": list(objectives),
        "rewards": list(objectives),
        "prompts": 4,
        "gain_over_base": rows,
        "minutes": 1.5,
    }


def test_the_demo_says_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    report(Path("out"), results(equal_low=0.125))
    printed = capsys.readouterr().out
    assert "It took 1.5 minutes." in printed
    assert "NOT SHOWN" not in printed
    assert "+1.1 [+0.1, +2.1]" in printed
    assert re.search(r"^ +lightness, L\* +subject_size, percent$", printed, re.MULTILINE)


def test_the_demo_says_what_it_does_not_show(capsys: pytest.CaptureFixture[str]) -> None:
    for names in (("lightness", "subject_size"), ("lightness", "subject_size", "colourfulness")):
        report(Path("out"), results(equal_low=-0.125, objectives=names))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOT SHOWN")]
        assert lines == [f"NOT SHOWN  fused with equal weights, {names[-1]} rises"]


def test_the_next_commands_are_valid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The activation is added where the shell does not find `stepfuse`."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    report(Path("my demo"), results(equal_low=0.125))
    lines = capsys.readouterr().out.splitlines()
    sample, serve, training = (shlex.split(line, comments=True) for line in lines[lines.index("Next:") + 1 :])
    for words in (sample, serve):
        assert words[0] == "stepfuse"
        assert "my demo/set" in words
        assert callable(parse(words[1:]).run)
    settings = parse_settings(DPOSettings, training[training.index("stepfuse.train.dpo") + 1 :])
    assert [each.name for each in settings.each] == ["warmth", "compressibility"]
    monkeypatch.setenv("PATH", "")
    activation, *others = next_commands(Path("my demo"), results(equal_low=0.125))
    assert shlex.split(activation, comments=True) == ["source", f"{sys.prefix}/bin/activate"]
    assert len(others) == 3


@pytest.mark.parametrize("count", [2, 3])
def test_the_mixtures_go_from_one_objective_to_another(count: int) -> None:
    """Names in `results.json` tell what is named in them, and the weights of each add up to 1."""
    names = ["a", "b", "c"][:count]
    measured = mixtures(names)
    assert next(iter(measured)) == "a alone"
    assert len(measured) == {2: 5, 3: 7}[count]
    for column, weights in measured.items():
        assert sum(weights.values()) == pytest.approx(1)
        if column == "equal weights":
            assert set(weights) == set(names)
        else:
            assert all(f"{name} {weight:g}" in column or column == f"{name} alone" for name, weight in weights.items())


def test_the_manifest_of_the_demo_keeps_every_measured_gain() -> None:
    """By its own rule, with the weights as they are typed."""
    measured = results(equal_low=0.125) | {"weights": {"lightness alone": {"lightness": 1.0}}}
    (cell,) = evaluation_of(measured, "soup")["cells"]
    assert (cell["rule"], cell["weights"], cell["strength"]) == ("soup", "lightness=1", 1)
    assert cell["gains"]["lightness"] == {"mean": 1.5, "low": 0.5, "high": 2.5}


@pytest.mark.slow
def test_the_demo_goes_the_whole_way_and_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "stepfuse.scripts.cli.main", "demo", "--quick", "--output_dir", str(output)]
    killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not (output / "adapters" / ".lock").exists():  # the training has begun
        assert killed.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    started = psutil.Process(killed.pid).children(recursive=True)
    assert any("dpo.py" in word for process in started for word in process.cmdline())
    killed.kill()
    killed.wait()
    _, living = psutil.wait_procs(started, timeout=10)
    assert not living

    monkeypatch.setattr("stepfuse.scripts.recipes.demo.measure", stop)
    with pytest.raises(KeyboardInterrupt):  # after the training
        demo(output, seed=0, overwrite=False, quick=True)
    assert "lightness and subject_size" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr("stepfuse.scripts.recipes.demo.train", stop)  # it is not trained again
    main(command[3:])  # in this process, which saves the imports of another
    printed = capsys.readouterr().out
    written = json.loads((output / "results.json").read_text())
    assert written["minutes"] is None  # of the last call alone it would be too few
    assert set(written["means"]) == {"base", *mixtures(["lightness", "subject_size"])}
    loaded = load_set(output / "set", read_weights=False)
    assert loaded.evaluation == evaluation_of(written, "soup")
    for adapter in loaded.adapters:
        assert adapter.gain == written["gain_over_base"][f"{adapter.name} alone"][adapter.name]
        assert interval_text(adapter.gain, signed=True) in measured_table(loaded)
    for name in ("slider.png", "front.png"):
        with Image.open(output / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 100  # not a blank sheet
    for column, gains in written["gain_over_base"].items():
        row = next(line for line in printed.splitlines() if line.strip().startswith(f"{column} "))
        for objective in written["objectives"]:
            difference = written["means"][column][objective] - written["means"]["base"][objective]
            assert gains[objective]["mean"] == pytest.approx(difference, abs=1e-5)
            assert interval_text(gains[objective], signed=True) in row

    def files() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}

    before = files()
    demo(output, seed=0, overwrite=False, quick=True)  # finished: it says again what it showed
    assert f"{output / 'slider.png'}" in capsys.readouterr().out
    for seed, quick, objectives in ((1, True, 2), (0, False, 2), (0, True, 3)):
        with refused(str(output), "--objectives 2 --seed 0 --quick", "--overwrite"):
            demo(output, seed=seed, overwrite=False, quick=quick, objectives=objectives)
    (output / "set" / "mine.txt").write_text("mine")
    with refused("set/mine.txt"):
        demo(output, seed=1, overwrite=True, quick=True)
    (output / "set" / "mine.txt").rename(output / "mine.txt")
    assert files().keys() == before.keys() | {str(output / "mine.txt")}

    with pytest.raises(KeyboardInterrupt):
        demo(output, seed=1, overwrite=True, quick=True)  # begins anew, and keeps what is not its own
    assert {file.name for file in output.rglob("*") if file.is_file()} == {"mine.txt", "demo.json"}


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_demo_of_an_earlier_version_is_refused_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {
        "base": "emoji-flow",
        "seed": 0,
        "quick": True,
        "trainings": {"colourfulness": "0", "compressibility": "1"},
    }
    (tmp_path / "demo.json").write_text(json.dumps(state))
    (tmp_path / "colourfulness").mkdir()
    (tmp_path / "colourfulness" / "objective.json").write_text("{}")
    (tmp_path / "colourfulness.yaml").write_text("")
    with refused("of another version of stepfuse; --overwrite starts again"):
        demo(tmp_path, seed=0, overwrite=False, quick=True)
    monkeypatch.setattr("stepfuse.scripts.recipes.demo.train", stop)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, seed=0, overwrite=True, quick=True)
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"demo.json"}


def test_three_objectives_are_trained_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    monkeypatch.setattr("stepfuse.scripts.recipes.demo.train", lambda training, *_, **__: trained.append(training))
    monkeypatch.setattr("stepfuse.scripts.recipes.demo.create_set", stop)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, seed=0, overwrite=False, quick=False, objectives=3)
    assert [training.names for training in trained] == [["lightness", "subject_size", "contrast"]]


def test_a_demo_says_after_which_step_it_continues(tmp_path: Path) -> None:
    training = joint_training(tmp_path / "adapters", seed=0, quick=False, objectives=2)
    assert progress(training, continued=False) == "It takes 7 steps"
    assert progress(training, continued=True) == "No step was saved yet, so it begins with the first of 7 steps"
    for step in (3, 5):
        (tmp_path / "adapters" / f"checkpoint-{step}").mkdir(parents=True)
    assert progress(training, continued=True) == "Continuing after step 5 of 7 steps"


def test_a_demo_is_not_begun_in_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "adapter_set.json").write_text("mine")
    with refused(str(tmp_path), "--overwrite"):
        demo(tmp_path, seed=0, overwrite=False, quick=True)
    with refused("set/adapter_set.json"):
        demo(tmp_path, seed=0, overwrite=True, quick=True)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()] == [
        "set/adapter_set.json"
    ]


def cell(gain: dict[str, float], decimals: int = 1) -> str:
    mean, low, high = (f"{gain[end]:+.{decimals}f}".replace("-", "−") for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def test_the_documents_show_the_committed_results() -> None:
    written = json.loads((ROOT / "docs" / "demo-results.json").read_text())
    rows = {
        "lightness alone": "lightness alone",
        "lightness ¾, subject size ¼": "lightness 0.75 · subject_size 0.25",
        "both, half and half": "equal weights",
        "lightness ¼, subject size ¾": "lightness 0.25 · subject_size 0.75",
        "subject size alone": "subject_size alone",
    }
    assert set(rows.values()) == set(written["gain_over_base"])
    text = (ROOT / "docs" / "get-started.md").read_text()
    for head, name in rows.items():
        gains = [written["gain_over_base"][name][objective] for objective in written["objectives"]]
        assert f"| {head} | {' | '.join(map(cell, gains))} |" in text
    assert f"{written['prompts']} held-out prompts" in text
    for file in ("README.md", "docs/get-started.md"):
        assert f"{written['minutes']:.1f} minutes" in (ROOT / file).read_text()
    assert all(claim["low"] > 0 for claim in claims(written).values())


def test_the_documents_show_the_results_of_separate_training() -> None:
    """An earlier demo measured them, on both bundled bases."""
    runs = [json.loads((ROOT / f"docs/bundled-bases/separate-{base}.json").read_text()) for base in emoji.BASES]
    rows = {
        "colourfulness adapter alone": "colourfulness alone",
        "colourfulness ¾, compressibility ¼": "colourfulness 0.75, compressibility 0.25",
        "both, half and half": "middle",
        "colourfulness ¼, compressibility ¾": "colourfulness 0.25, compressibility 0.75",
        "compressibility adapter alone": "compressibility alone",
    }
    text = (ROOT / "docs" / "flow-models.md").read_text()
    for head, name in rows.items():
        gains = [run["gain_over_base"][name][objective] for run in runs for objective in run["objectives"]]
        assert f"| {head} | {' | '.join(cell(gain, decimals=2) for gain in gains)} |" in text
    first, second = (f"{run['minutes']:.1f}" for run in runs)
    assert f"{first} and {second} minutes" in text

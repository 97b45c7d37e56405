"""The demo, run small through the real command; its verdict, on numbers chosen to pass and to fail."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from stepfuse.scripts.cli.main import main
from stepfuse.scripts.recipes.demo import demo, report
from tests.fixtures_tiny import refused

ROOT = Path(__file__).parents[1]


def results(middle_low: float) -> dict:
    """Results whose intervals are all above 0, but for the middle fusion's first reward."""

    def gain(low: float) -> dict[str, float]:
        return {"mean": low + 1, "low": low, "high": low + 2}

    rows = {
        "a alone": {"a": gain(0.5), "b": gain(-3)},
        "b alone": {"a": gain(-3), "b": gain(0.5)},
        "middle": {"a": gain(middle_low), "b": gain(0.25)},
    }
    return {"objectives": ["a", "b"], "prompts": 4, "seeds_per_prompt": 2, "gain_over_base": rows, "minutes": 1.5}


def test_the_demo_says_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    report(Path("out"), results(middle_low=0.125))
    printed = capsys.readouterr().out
    assert "NOT SHOWN" not in printed
    assert "+1.125 [+0.125, +2.125]" in printed


def test_the_demo_says_what_it_does_not_show(capsys: pytest.CaptureFixture[str]) -> None:
    report(Path("out"), results(middle_low=-0.125))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOT SHOWN")]
    assert lines == ["NOT SHOWN  the middle fusion beats the base in a"]


@pytest.mark.slow
def test_the_demo_goes_the_whole_way_and_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "stepfuse.scripts.cli.main", "demo", "--quick", "--output_dir", str(output)]
    killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not (output / "compressibility" / ".lock").exists():  # the second training has begun
        assert killed.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    started = psutil.Process(killed.pid).children(recursive=True)
    assert any("ddpo.py" in word for process in started for word in process.cmdline())
    killed.kill()
    killed.wait()
    _, living = psutil.wait_procs(started, timeout=10)
    assert not living
    first = (output / "colourfulness" / "objective.json").stat().st_mtime_ns

    main(command[3:])  # in this process, which saves the imports of another
    printed = capsys.readouterr().out
    assert (output / "colourfulness" / "objective.json").stat().st_mtime_ns == first  # not trained again
    written = json.loads((output / "results.json").read_text())
    assert set(written["means"]) == {"base", "0.0", "0.25", "0.5", "0.75", "1.0"}
    for name in ("slider.png", "front.png"):
        with Image.open(output / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 100  # not a blank sheet
    gains = written["gain_over_base"]
    for row, weight in (("colourfulness alone", "0.0"), ("middle", "0.5"), ("compressibility alone", "1.0")):
        for objective in written["objectives"]:
            difference = written["means"][weight][objective] - written["means"]["base"][objective]
            assert gains[row][objective]["mean"] == pytest.approx(difference, abs=1e-6)
            assert f"{difference:+.3f}" in printed

    def files() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}

    before = files()
    demo(output, seed=0, overwrite=False, quick=True)  # finished: it says again what it showed
    assert f"{output / 'slider.png'}" in capsys.readouterr().out
    for seed, quick in ((1, True), (0, False)):
        with refused(str(output), "--base emoji-flow --seed 0 --quick", "--overwrite"):
            demo(output, seed=seed, overwrite=False, quick=quick)
    (output / "set" / "mine.txt").write_text("mine")
    with refused("set/mine.txt"):
        demo(output, seed=1, overwrite=True, quick=True)
    (output / "set" / "mine.txt").rename(output / "mine.txt")
    assert files().keys() == before.keys() | {str(output / "mine.txt")}

    monkeypatch.setattr("stepfuse.scripts.recipes.demo.train", stop)
    with pytest.raises(KeyboardInterrupt):
        demo(output, seed=1, overwrite=True, quick=True)  # begins anew, and keeps what is not its own
    assert {file.name for file in output.rglob("*") if file.is_file()} == {"mine.txt", "demo.json"}


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_demo_from_before_there_were_two_bases_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfuse.scripts.recipes.demo.train", stop)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, seed=0, overwrite=False, quick=True, base="emoji")
    state = json.loads((tmp_path / "demo.json").read_text())
    del state["base"]
    (tmp_path / "demo.json").write_text(json.dumps(state))
    with refused("--base emoji --seed 0 --quick to resume it"):
        demo(tmp_path, seed=0, overwrite=False, quick=True)
    with pytest.raises(KeyboardInterrupt):  # it is trained further
        demo(tmp_path, seed=0, overwrite=False, quick=True, base="emoji")
    (tmp_path / "demo.json").write_text(json.dumps(state | {"quick": False}))
    with refused("pass --base emoji --seed 0 and leave out --quick to resume it"):
        demo(tmp_path, seed=0, overwrite=False, quick=True, base="emoji")


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


def cell(gain: dict[str, float]) -> str:
    return f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]".replace("-", "−")


def test_the_documents_show_the_committed_results() -> None:
    written = json.loads((ROOT / "docs" / "demo-results.json").read_text())
    rows = {
        "colourfulness adapter alone": "colourfulness alone",
        "colourfulness ¾, compressibility ¼": "colourfulness 0.75, compressibility 0.25",
        "both, half and half": "middle",
        "colourfulness ¼, compressibility ¾": "colourfulness 0.25, compressibility 0.75",
        "compressibility adapter alone": "compressibility alone",
    }
    assert set(rows.values()) == set(written["gain_over_base"])
    text = (ROOT / "README.md").read_text()
    for head, name in rows.items():
        gains = [written["gain_over_base"][name][objective] for objective in written["objectives"]]
        assert f"| {head} | {' | '.join(map(cell, gains))} |" in text
    assert f"{written['prompts']} held-out prompts × {written['seeds_per_prompt']} seeds" in text
    assert f"It took {written['minutes']:.1f} minutes" in text
    other = json.loads((ROOT / "docs" / "demo-results-emoji.json").read_text())
    both = (ROOT / "docs" / "flow-models.md").read_text()
    assert f"the demos took {written['minutes']:.1f} and {other['minutes']:.1f} minutes" in both
    for head, name in rows.items():
        gains = [run["gain_over_base"][name][objective] for run in (written, other) for objective in run["objectives"]]
        assert f"| {head} | {' | '.join(map(cell, gains))} |" in both
    middle = written["gain_over_base"]["middle"]
    assert all(middle[objective]["low"] > 0 for objective in written["objectives"])

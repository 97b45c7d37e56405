"""The demo, run small through the real command; its verdict, on numbers chosen to pass and to fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from stepfuse.scripts.demo import report


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
    assert report(Path("out"), results(middle_low=0.125))
    printed = capsys.readouterr().out
    assert "NOT SHOWN" not in printed
    assert "+1.125 [+0.125, +2.125]" in printed


def test_the_demo_says_what_it_does_not_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert not report(Path("out"), results(middle_low=-0.125))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOT SHOWN")]
    assert lines == ["NOT SHOWN  the middle fusion beats the base in a"]


@pytest.mark.slow
def test_the_demo_goes_the_whole_way(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stepfuse.scripts.main", "demo", "--quick", "--output_dir", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(written["means"]) == {"base", "0.0", "0.25", "0.5", "0.75", "1.0"}
    for name in ("slider.png", "front.png"):
        with Image.open(tmp_path / "demo" / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 100  # not a blank sheet
    gains = written["gain_over_base"]
    for row, weight in (("colourfulness alone", "0.0"), ("middle", "0.5"), ("compressibility alone", "1.0")):
        for objective in written["objectives"]:
            difference = written["means"][weight][objective] - written["means"]["base"][objective]
            assert gains[row][objective]["mean"] == pytest.approx(difference, abs=1e-6)
            assert f"{difference:+.3f}" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("error: output")

"""The training programs: what their help says, what they import, and how they end."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from stepfuse.train import dpo
from stepfuse.train.arguments import parse_settings
from stepfuse.train.distill_settings import DistillSettings
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_training import SINGLE_PROCESS

REPOSITORY = Path(__file__).parents[1]


# Help


@pytest.mark.parametrize(
    ("algorithm", "settings"), [("dpo", DPOSettings), ("ddpo", DDPOSettings), ("distill", DistillSettings)]
)
def test_help_explains_every_setting_once_under_a_heading_with_its_default(capsys, algorithm, settings):
    with pytest.raises(SystemExit) as end:
        parse_settings(settings, ["--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    listed = text.partition("\n\n")[2]
    flags = re.findall(r"^  (--\S+)", listed, flags=re.MULTILINE)
    names = [field.name for field in dataclasses.fields(settings) if field.name not in settings.fixed]
    assert [flag.rstrip(",").removeprefix("--") for flag in flags] == ["config", *names]
    assert not re.search(r"--\w+-", listed)  # one spelling
    entries = re.split(r"^  --", listed, flags=re.MULTILINE)[2:]
    for name, entry in zip(names, entries, strict=True):
        told = " ".join(entry.split())
        assert "(default: " in told, name
        assert len(told.partition(" ")[2].split()) > 4, name
    headings = re.findall(r"^(\S.*):$", listed, flags=re.MULTILINE)
    assert len(headings) == len(set(headings)) > 8
    assert ("DDPO" in headings) == (algorithm == "ddpo")


def test_help_and_wrong_arguments_need_neither_torch_nor_a_warning(tmp_path):
    Path(tmp_path, "wrong.yaml").write_text("rank: 0\n")
    program = """
import sys
from stepfuse.train import ddpo, distill, dpo
for main in (dpo.main, ddpo.main, distill.main):
    for words in (["--help"], ["--rank", "x"], ["--config", "wrong.yaml"], ["--config", "none"], ["--beta", "-1"],
                  ["--output_dir", "."]):
        sys.argv = ["train", *words]
        try:
            main()
        except SystemExit as end:
            print("ended:", end.code)
assert not {"torch", "transformers", "diffusers", "accelerate"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    endings = [line for line in done.stdout.splitlines() if line.startswith("ended:")]
    assert [line.startswith("ended: error: ") for line in endings] == [False, True, True, True, True, True] * 3


# As a program


def test_program_prints_one_line_and_exits_with_1(tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train" / "dpo.py"), "--sample_eta", "1.5"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: sample_eta is 1.5; expected a number in (0, 1]")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_launched_quietly_the_line_is_the_last(tmp_path):
    words = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *SINGLE_PROCESS, "-m", "stepfuse.train.dpo"]
    done = subprocess.run([*words, "--rank", "0"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: rank is 0; expected 1 or more"
    assert "Traceback" not in done.stderr


def test_torchrun_gets_the_line_for_its_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(sys, "argv", ["train/dpo.py", "--rank", "0"])
    with pytest.raises(SystemExit):
        dpo.main()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    summary = ChildFailedError("train/dpo.py", {0: failure}).format_msg()
    assert "error: rank is 0; expected 1 or more" in summary


def test_only_the_command_line_has_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # transformers' HfArgumentParser would read them from a file with the program's name, too
    Path("dpo.args").write_text("--rank 3")
    monkeypatch.setattr(sys, "argv", ["dpo.py"])
    assert parse_settings(DPOSettings, []) == DPOSettings()

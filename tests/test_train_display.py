"""What a run tells: on the terminal, in a log file, and to trackers."""

import fcntl
import io
import os
import re
import shlex
import struct
import termios
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import tracking
from PIL import Image
from scipy.stats import bootstrap
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepfuse.data.grid import captioned_grid
from stepfuse.data.kl_steps import KL_PICTURE
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.cli.main import main
from stepfuse.train import loop
from stepfuse.train.arguments import parse_settings
from stepfuse.train.checkpoints import Progress
from stepfuse.train.display import ProgressDisplay, describe_gain
from stepfuse.train.run_settings import TRACKERS
from stepfuse.train.settings import DPOSettings
from tests.fixtures_training import refused_by

REWARDS = """
def slope(images, prompts):
    return (images[:, 0, :, :8] - images[:, 2, :, 8:]).mean((1, 2)) * images.new_tensor([len(p) for p in prompts])
"""


def events(folder):
    (file,) = sorted(Path(folder).glob("logs/stepfuse/events.out.tfevents.*"))[-1:]
    log = EventAccumulator(str(file), size_guidance={"images": 0})
    log.Reload()
    return log


def pictures(folder):
    """Step → pixels of the validation picture in tensorboard's log."""
    log = events(folder)
    return {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in log.Images("validation")}


def number(text):
    return float(re.match(r"[-+0-9.e]*[0-9]", text)[0])


# The end, and the beginning of a resumed run


def test_the_end_tells_where_the_adapter_is_what_was_gained_and_what_comes_next(run_training, capsys):
    run_training("ddpo", max_train_steps=2, checkpointing_steps=1, output_dir="my run/slope")
    told = capsys.readouterr().out
    record = read_adapter("my run/slope").record
    assert "my run/slope" in told.splitlines()[0]
    before, after = (record["validation"][moment]["reward"] for moment in ("before", "after"))
    assert f"{before:.4g} → {after:.4g}, gain {after - before:+.4g} (95 % interval" in told
    assert f"{record['kl']:.4g} nats per image" in told
    # the commands work as they are printed
    commands = [shlex.split(line) for line in told.splitlines() if line.startswith("  stepfuse ")]
    assert [words[1] for words in commands] == ["set", "sample"]
    for words in commands:
        main(words[1:])
    (adapter,) = load_set("my run/slope-set").adapters
    assert adapter.name == "slope"
    # the set has the interval that was printed, up to its digits
    printed = {end: number(told.partition(word)[2]) for end, word in (("low", "interval "), ("high", " to "))}
    assert adapter.gain == record["gain"]
    assert {end: float(f"{adapter.gain[end]:.4g}") for end in printed} == printed
    with Image.open("out.png") as drawn:
        assert drawn.size[0] > 0
    main(commands[1][1:])  # once more: the first image stays
    assert Path("out-2.png").read_bytes() == Path("out.png").read_bytes()


def test_a_run_that_resumes_says_from_where(run_training, capsys):
    run_training("ddpo", max_train_steps=1, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert "no checkpoint in out yet" in capsys.readouterr().out
    first = yaml.safe_load(Path("out/checkpoint-1/progress.json").read_text())
    run_training("ddpo", max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest")
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "resuming from out/checkpoint-1: step 1 of 2"
    # the gain is over the images before training, not over those of the checkpoint
    before = read_adapter("out").record["validation"]["before"]["reward"]
    assert np.mean(first["validation_rewards"]["before"]) == pytest.approx(before, rel=1e-6)
    assert f": {before:.4g} → " in told


@pytest.mark.parametrize("changes", [{"seed": 5}, {"sample_num_steps": 5}])
def test_a_run_that_resumes_with_another_seed_or_sampling_states_no_gain(run_training, capsys, changes):
    run_training("ddpo", max_train_steps=1, checkpointing_steps=1)
    assert ", gain " in capsys.readouterr().out
    run_training("ddpo", max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest", **changes)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "validation images" in line]
    assert ", gain " not in line
    assert "another seed" in line


def test_the_interval_of_the_gain_is_that_of_a_paired_bootstrap():
    generator = np.random.default_rng(1)
    before, gain = generator.normal(5, 2, 40), generator.normal(0.3, 0.5, 40)
    progress = Progress(
        validation_prompts=[f"prompt {i}" for i in range(40)],
        validation_rewards={"before": before.tolist(), "after": (before + gain).tolist()},
    )
    told = describe_gain(progress.validation_rewards, progress.validation_prompts)
    mean, low, high = (number(told.partition(word)[2]) for word in ("gain ", "interval ", " to "))
    interval = bootstrap((gain,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert mean == pytest.approx(gain.mean(), rel=1e-3)
    assert (low, high) == (pytest.approx(interval.low, abs=0.01), pytest.approx(interval.high, abs=0.01))


@pytest.mark.parametrize("rewards", [{}, {"before": [1.0, 2.0]}, {"before": [1.0, 2.0], "after": []}])
def test_a_run_without_rewards_to_pair_has_no_interval(rewards):
    assert describe_gain(rewards, ["a", "b"]) == ""


def test_one_prompt_has_no_interval():
    progress = Progress(validation_prompts=["a", "a"], validation_rewards={"before": [1.0, 2.0], "after": [2.0, 2.0]})
    assert "%" not in describe_gain(progress.validation_rewards, progress.validation_prompts)


# While it runs


def test_a_log_file_gets_few_lines_with_a_running_mean(monkeypatch, capsys):
    clock = iter(np.arange(0, 1000, 0.5).tolist())  # half a second from one look to the next
    monkeypatch.setattr("stepfuse.train.display.time.monotonic", lambda: next(clock))
    display = ProgressDisplay(DPOSettings(max_train_steps=100), 0, images=4, shown=True)
    for step in range(100):
        display.resume_clock()
        display.advance({"reward": float(step), "loss": 0.5}, new_images=True)
    display.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 20
    # the last 20 rewards are 80 to 99; 4 images in half a second
    assert "step 100/100, mean reward 89.5, loss 0.5, 8 images/s" in lines[-1]
    assert lines[9].endswith("step 50/100, mean reward 39.5, loss 0.5, 8 images/s, 00:25 left")


def test_other_processes_show_nothing(capsys):
    display = ProgressDisplay(DPOSettings(max_train_steps=2), 0, images=4, shown=False)
    for _ in range(2):
        display.advance({"reward": 1.0}, new_images=True)
    display.close()
    assert capsys.readouterr() == ("", "")


@contextmanager
def terminal(columns, monkeypatch):
    """A terminal of so many columns as stderr; a list, which at the end has the lines that it was given."""
    shown, stderr = os.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    lines, written = [], b""
    with os.fdopen(stderr, "w") as file, monkeypatch.context() as patched:
        patched.setattr("sys.stderr", file)
        yield lines
    with suppress(OSError):  # the end of what the closed terminal was given
        while part := os.read(shown, 10_000):
            written += part
    os.close(shown)
    lines += [line.rstrip() for line in re.split(r"[\r\n]", written.decode()) if line.strip()]


@pytest.mark.parametrize(
    ("columns", "last"), [(160, "images/s"), (110, "kl 0.5"), (80, "lightness 0.5"), (50, "00:00")]
)
def test_the_line_of_a_terminal_holds_whole_values_and_is_no_longer_than_it(monkeypatch, columns, last):
    with terminal(columns, monkeypatch) as lines:
        display = ProgressDisplay(DPOSettings(max_train_steps=2), 0, images=4, shown=True)
        measured = {"reward/lightness": 0.5, "reward/subject_size": 0.5, "loss": 0.5, "kl": 0.5}
        for _ in range(2):
            display.advance(measured, new_images=True)
        display.close()
    assert max(map(len, lines)) < columns
    assert re.search(rf"{last}\]$", lines[-1]), lines[-1]


def test_the_line_of_a_terminal_has_the_names_of_several_objectives_once(monkeypatch):
    settings = DPOSettings(objectives=[{"reward": "lightness"}, {"reward": "subject_size"}], max_train_steps=7)
    with terminal(80, monkeypatch) as lines:
        display = ProgressDisplay(settings, 6, images=4, shown=True)
        display.advance({"reward/lightness": 64.53, "reward/subject_size": 31.22, "loss": 0.5}, new_images=True)
        display.close()
    assert re.fullmatch(r"train: 7/7 \[.*, mean lightness 64\.53, mean subject_size 31\.22\]", lines[-1]), lines[-1]


def test_updates_on_one_rollout_count_its_images_once(monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr("stepfuse.train.display.time.monotonic", lambda: next(clock))
    display = ProgressDisplay(DPOSettings(max_train_steps=2), 0, images=6, shown=True)
    display.advance({"reward": 1.0}, new_images=True)
    display.advance({"reward": 1.0}, new_images=False)
    assert "mean reward 1, 3 images/s" in capsys.readouterr().err.splitlines()[-1]  # 6 in 2 seconds


# Trackers


def test_tensorboard_has_the_validation_images_with_the_base_beside_them(run_training):
    run_training("ddpo", max_train_steps=2, validation_steps=1, report_to="tensorboard")
    found = pictures("out")
    assert sorted(found) == [0, 1, 2]
    first, last = found[0], found[2]
    # four images of 16 pixels, 8 times as large, in one row with gaps of 11: the base alone, and then pairs
    assert first.shape[1] == 4 * (128 + 11) + 11
    assert last.shape[1] == 4 * (256 + 11) + 11
    for i in range(4):
        base = first[11:139, 11 + i * 139 :][:, :128]
        left = last[11:139, 11 + i * 267 :][:, :128]
        right = last[11:139, 139 + i * 267 :][:, :128]
        assert (left == base).all()
        assert (right != base).any()


def test_the_base_is_the_same_beside_the_images_of_a_resumed_run(run_training):
    flags = dict(report_to="tensorboard", checkpointing_steps=1, variance="learned")
    run_training("ddpo", max_train_steps=1, **flags)
    before = pictures("out")
    run_training("ddpo", max_train_steps=2, resume_from_checkpoint="latest", **flags)
    after = pictures("out")
    assert (list(before), list(after)) == ([0, 1], [2])
    assert (after[2][11:139, 11:139] == before[0][11:139, 11:139]).all()


@pytest.mark.parametrize("algorithm", ["dpo", "ddpo"])
def test_kept_pairs_are_logged_where_there_are_pairs(run_training, algorithm):
    run_training(algorithm, max_train_steps=1, report_to="tensorboard")
    tags = set(events("out").Tags()["scalars"])
    assert {"loss", "reward", "kl", "diversity", "gradient_norm", "learning_rate", "validation_reward"} <= tags
    assert ("kept_pairs" in tags) == (algorithm == "dpo")


def test_no_tracker_leaves_no_log(run_training):
    run_training("dpo", max_train_steps=1, report_to="none")
    assert not list(Path("out").rglob("events.*"))


def test_a_tracker_that_is_not_installed_is_an_error_that_says_how_to_install_it(run_training, monkeypatch):
    monkeypatch.setattr("stepfuse.train.trackers.get_available_trackers", lambda: ["tensorboard"])
    for report_to, package in (("wandb", "wandb"), ("tensorboard,comet_ml", "comet-ml")):
        line = refused_by(run_training, "dpo", report_to=report_to)
        assert f"pip install {package}" in line
        assert not Path("out").exists()


def test_all_trackers_are_those_that_are_installed(run_training):
    run_training("dpo", max_train_steps=1, report_to="all")
    assert 1 in {e.step for e in events("out").Scalars("loss")}


def test_the_trackers_are_those_of_accelerate():
    assert set(TRACKERS) == set(tracking.LOGGER_TYPE_TO_CLASS)


def test_a_list_of_trackers_is_taken_in_any_spacing():
    def trackers(*words):
        return parse_settings(DPOSettings, ["--report_to", *words]).trackers

    assert trackers("tensorboard, wandb") == trackers("tensorboard,wandb,") == ["tensorboard", "wandb"]
    assert trackers("none") == []


class Recorder(tracking.GeneralTracker):
    """A tracker of a user, with accelerate's own way to take images."""

    name, requires_logging_directory = "recorder", False

    def __init__(self):
        super().__init__()
        self.images = {}

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        pass

    def log_images(self, values, step):
        self.images.setdefault(step, {}).update(values)


def test_other_trackers_get_the_images_by_their_log_images(run_training, monkeypatch):
    recorder = Recorder()
    made = loop.make_accelerator

    def make_accelerator(settings):
        accelerator = made(settings)
        accelerator.log_with = [recorder]
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", make_accelerator)
    run_training("dpo", max_train_steps=2, report_to="tensorboard")
    assert sorted(recorder.images) == [0, 2]
    (picture,) = recorder.images[2]["validation"]
    assert picture.shape[1] == 4 * (256 + 11) + 11
    (figure,) = recorder.images[2]["kl_steps"]
    with Image.open(Path("out", KL_PICTURE)) as drawn:
        assert np.array_equal(figure, np.asarray(drawn))


def test_a_tracker_that_cannot_start_is_an_error_of_one_line(run_training, monkeypatch):
    def start(self):
        raise RuntimeError("no API key configured")

    monkeypatch.setattr(tracking.TensorBoardTracker, "start", start)
    line = refused_by(run_training, "dpo", report_to="tensorboard", max_train_steps=1)
    assert "tensorboard" in line
    assert "no API key configured" in line


def test_line_breaks_of_a_caption_are_kept():
    images = [Image.new("RGB", (128, 128), "white")] * 2
    drawn = np.asarray(captioned_grid(images, ["a cat\nreward 1", ""]).convert("L"))
    dark = (drawn[139:, :140] < 128).any(1)
    assert np.diff(dark.astype(int)).tolist().count(1) == 2  # two lines

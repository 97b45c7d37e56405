"""A setting that cannot work ends a run with one line that names it, before anything is written."""

import math
import os
import sys
from pathlib import Path

import diffusers
import pytest
import transformers
import yaml
from accelerate.state import AcceleratorState, GradientState

from stepfuse.train import ddpo, dpo
from stepfuse.train.arguments import parse_settings
from stepfuse.train.settings import DDPOSettings, DPOSettings

REPOSITORY = Path(__file__).parents[1]
MAIN = {"dpo": dpo.main, "ddpo": ddpo.main}
# What a test does not give itself. Should a wrong setting pass, the missing base ends the run at once.
OTHERWISE = ["--prompts", "prompts.txt", "--reward", "colourfulness", "--pretrained_model_name_or_path", "./nowhere"]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty folder to work in, but for prompts."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red apple\na cat\n")
    verbosity = [library.utils.logging.get_verbosity() for library in (diffusers, transformers)]
    yield tmp_path
    for library, before in zip((diffusers, transformers), verbosity, strict=True):
        library.utils.logging.set_verbosity(before)
        library.utils.logging.enable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def contents(folder):
    return {str(file): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def refusal(monkeypatch, algorithm, *arguments):
    """The line that main() exits with; it writes and loses nothing."""
    before = contents(".")
    monkeypatch.setattr(sys, "argv", [f"train/{algorithm}.py", *OTHERWISE, *arguments])
    with pytest.raises(SystemExit) as error:
        MAIN[algorithm]()
    line = error.value.code
    assert isinstance(line, str)  # Python prints it to stderr, and exits with 1
    assert line.startswith("error: ")
    assert "\n" not in line
    assert contents(".") == before
    assert not Path("outputs").exists()
    return line


def parsed(config, settings=DPOSettings):
    Path("config.yaml").write_text(config)
    return parse_settings(settings, ["--config", "config.yaml"])


# Names


def test_unknown_setting_of_a_config_is_answered_with_the_nearest(desk, monkeypatch):
    Path("my.yaml").write_text("rank: 2\nlerning_rate: 1.0e-3\n")
    line = refusal(monkeypatch, "dpo", "--config", "my.yaml")
    assert line == "error: my.yaml: unknown setting 'lerning_rate'; did you mean 'learning_rate'?"


def test_setting_of_the_other_algorithm_is_unknown(desk, monkeypatch):
    Path("my.yaml").write_text("num_candidates: 2\n")
    assert "my.yaml: unknown setting 'num_candidates'" in refusal(monkeypatch, "ddpo", "--config", "my.yaml")
    assert "unknown flag --num_generations" in refusal(monkeypatch, "dpo", "--num_generations", "4")


@pytest.mark.parametrize("flag", ["--lerning_rate", "--lerning-rate", "--learning_rat", "--lr"])
def test_unknown_flag_is_answered_with_the_nearest(desk, monkeypatch, flag):
    assert refusal(monkeypatch, "dpo", flag, "1") == f"error: unknown flag {flag}; did you mean '--learning_rate'?"


@pytest.mark.parametrize("arguments", [["--config", "none.yaml"], ["--config=none.yaml"]])
def test_missing_config_is_named(desk, monkeypatch, arguments):
    assert refusal(monkeypatch, "dpo", *arguments).startswith("error: no config file 'none.yaml'")


def test_config_without_a_file_is_refused(desk, monkeypatch):
    assert "--config" in refusal(monkeypatch, "dpo", "--rank", "2", "--config")


@pytest.mark.parametrize("name", ["dpo/emoji-alignment", "configs/dpo/emoji-alignment.yaml", "emoji-alignment"])
def test_packaged_config_is_taken_by_its_name(desk, name):
    settings = parse_settings(DPOSettings, ["--config", name, "--rank", "3"])
    written = yaml.safe_load((REPOSITORY / "configs/dpo/emoji-alignment.yaml").read_text())
    assert written.items() <= (vars(settings) | {"rank": written["rank"]}).items()
    assert settings.rank == 3


def test_misspelt_packaged_config_is_answered_with_the_nearest(desk, monkeypatch):
    line = refusal(monkeypatch, "ddpo", "--config", "ddpo/emoji-compresibility")
    assert "'ddpo/emoji-compressibility'" in line


@pytest.mark.parametrize(
    "text", ["", "- rank\n", "rank: [2\n", b"\xff\xfe\xd0"], ids=["empty", "list", "half", "binary"]
)
def test_config_that_is_no_yaml_mapping_is_named(desk, monkeypatch, text):
    Path("my.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "my.yaml" in refusal(monkeypatch, "dpo", "--config", "my.yaml")


# Values


@pytest.mark.parametrize("eta", ["1.5", "-0.1", "nan", "inf"])
def test_eta_outside_the_unit_interval_is_refused(desk, monkeypatch, eta):
    line = refusal(monkeypatch, "dpo", "--sample_eta", eta)
    expected = "a number in (0, 1]" if math.isfinite(float(eta)) else "a finite number"
    assert f"sample_eta is {float(eta)}; expected {expected}" in line


@pytest.mark.parametrize("kind", ["eta", "learned"])
def test_eta_0_cannot_be_trained_with(desk, monkeypatch, kind):
    line = refusal(monkeypatch, "ddpo", "--sample_eta", "0", "--variance", kind)
    assert "sample_eta is 0.0" in line
    assert "no log-prob" in line


@pytest.mark.parametrize("etas", ["1.0 0.0 0.5", "0.5 1.25", ""])
def test_every_eta_of_a_table_is_checked(desk, monkeypatch, etas):
    line = refusal(monkeypatch, "dpo", "--variance", "table", "--sample_etas", *etas.split())
    assert f"sample_etas is {[float(eta) for eta in etas.split()]}; expected one number in (0, 1] per step" in line


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ("--variance_options eta=0.5", "variance_options has 'eta'; expected none for variance eta"),
        ("--variance_options eta", "'eta'; expected NAME=NUMBER"),
        ("--variance sde", "variance sde needs noise_level among variance_options; expected noise_level ("),
    ],
)
def test_options_that_a_variance_does_not_have_are_refused(desk, monkeypatch, words, culprit):
    assert culprit in refusal(monkeypatch, "ddpo", *words.split())


def test_a_run_that_skips_all_its_steps_is_refused(desk, monkeypatch):
    words = "--sample_num_steps 10 --skip_first_steps 4 --skip_last_steps"
    line = refusal(monkeypatch, "ddpo", *words.split(), "6")
    assert "skip_last_steps is 6; expected 0 or more, and with skip_first_steps (4) below sample_num_steps (10)" in line
    assert parse_settings(DDPOSettings, [*words.split(), "5"]).skip_last_steps == 5


@pytest.mark.parametrize(
    ("algorithm", "flag", "value"),
    [
        ("dpo", "max_train_steps", "0"),
        ("dpo", "rank", "0"),
        ("dpo", "beta", "0.0"),
        ("dpo", "learning_rate", "nan"),
        ("dpo", "learning_rate", "inf"),
        ("ddpo", "beta", "nan"),
        ("dpo", "num_candidates", "1"),
        ("dpo", "margin", "-1.0"),
        ("dpo", "label_smoothing", "0.5"),
        ("dpo", "skip_first_steps", "20"),
        ("dpo", "skip_last_steps", "20"),
        ("dpo", "timesteps_per_forward", "0"),
        ("ddpo", "num_generations", "1"),
        ("ddpo", "train_clip_range", "0.0"),
        ("ddpo", "num_inner_epochs", "0"),
        ("ddpo", "beta", "-1.0"),
        ("ddpo", "train_adv_clip_max", "0.0"),
        ("ddpo", "lora_alpha", "0"),
        ("dpo", "resolution", "0"),
        ("dpo", "variance_learning_rate", "-1.0"),
        ("dpo", "lr_warmup_steps", "-1"),
        ("dpo", "adam_beta1", "1.0"),
        ("dpo", "adam_beta2", "-0.5"),
        ("dpo", "adam_weight_decay", "-1.0"),
        ("dpo", "adam_epsilon", "0.0"),
        ("dpo", "validation_steps", "-1"),
        ("dpo", "reward_clip", "nan"),
    ],
)
def test_value_out_of_range_is_named(desk, monkeypatch, algorithm, flag, value):
    assert f"{flag} is {value}; expected" in refusal(monkeypatch, algorithm, f"--{flag}", value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("variance", "lerned"),
        ("loss_type", "hinge"),
        ("log_prob_reduction", "Mean"),
        ("guidance", "shard"),
        ("lr_scheduler", "cosinus"),
    ],
)
def test_choice_that_a_config_misspells_is_refused(desk, monkeypatch, setting, value):
    Path("my.yaml").write_text(f"{setting}: {value}\n")
    line = refusal(monkeypatch, "dpo", "--config", "my.yaml")
    assert setting in line
    assert repr(value) in line
    assert ("did you mean" in line) == (value != "hinge")


@pytest.mark.parametrize(
    ("flag", "value"), [("variance", "lerned"), ("guidance", "shard"), ("report_to", "tensorbord")]
)
def test_choice_that_a_flag_misspells_is_answered_with_the_nearest(desk, monkeypatch, flag, value):
    line = refusal(monkeypatch, "dpo", f"--{flag}", value)
    assert flag in line
    assert value in line
    assert f"did you mean {dict(lerned='learned', shard='shared', tensorbord='tensorboard')[value]!r}?" in line


@pytest.mark.parametrize("report_to", ["tensorboard,wandbb", "none,tensorboard", "tensorboard,,None"])
def test_every_tracker_of_a_list_is_checked(desk, monkeypatch, report_to):
    assert "report_to is" in refusal(monkeypatch, "dpo", "--report_to", report_to)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_train_steps", "null"), ("rank", "2.5"), ("variance: table\nsample_etas", "[a]"), ("beta", "[1]")],
)
def test_value_of_another_type_in_a_config_is_refused(desk, monkeypatch, setting, value):
    Path("my.yaml").write_text(f"{setting}: {value}\n")
    line = refusal(monkeypatch, "dpo", "--config", "my.yaml")
    assert setting.split("\n")[-1].removesuffix("s") in line


def test_off_and_no_mean_themselves_in_a_config(desk):
    # to YAML 1.1 both are the boolean false
    assert parsed("guidance: off\n").guidance == "off"
    assert parsed("mixed_precision: no\n").mixed_precision == "no"


def test_flags_win_over_the_config_and_the_config_over_defaults(desk):
    Path("my.yaml").write_text("rank: 2\nlearning_rate: 1e-3\n")
    settings = parse_settings(DDPOSettings, ["--config", "my.yaml", "--rank", "3"])
    assert (settings.rank, settings.learning_rate, settings.num_generations) == (3, 1e-3, 8)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        *[(words, True) for words in ("--overwrite", "--overwrite true", "--overwrite=yes")],
        *[(words, False) for words in ("", "--no_overwrite", "--no-overwrite", "--overwrite false")],
        *[("--overwrite --no_overwrite", False), ("--no_overwrite --overwrite", True)],
        *[("--overwrite on", True), ("--overwrite=OFF", False)],
    ],
)
def test_boolean_flag_and_its_negation(words, value):
    assert parse_settings(DPOSettings, words.split()).overwrite is value


def test_boolean_of_the_config_is_negated_by_its_flag(desk):
    Path("my.yaml").write_text("async_scoring: true\noverwrite: true\n")
    settings = parse_settings(DPOSettings, ["--config", "my.yaml", "--no_async_scoring", "--no_overwrite"])
    assert (settings.async_scoring, settings.overwrite) == (False, False)


def test_boolean_that_is_no_truth_value_is_refused(desk, monkeypatch):
    line = refusal(monkeypatch, "dpo", "--overwrite", "maybe")
    assert "--overwrite" in line
    assert "'maybe'" in line


def test_flags_may_have_dashes_and_their_values_keep_theirs(desk):
    words = "--train-batch-size=2 --output-dir my-run --prompts=emoji-heldout --lora-target-modules a-b"
    settings = parse_settings(DPOSettings, words.split())
    assert (settings.train_batch_size, settings.output_dir) == (2, "my-run")
    assert (settings.prompts, settings.lora_target_modules) == ("emoji-heldout", ["a-b"])


@pytest.mark.parametrize("number", ["-1e-3", "-1E3", "-.5e-2", "-5.e+1", "-0.5", "-2"])
def test_a_negative_number_with_an_exponent_is_the_value_of_a_flag(number):
    settings = parse_settings(DPOSettings, ["--reward_shift", number, "--reward_clip", number, "1e9"])
    assert (settings.reward_shift, settings.reward_clip) == (float(number), [float(number), 1e9])


def test_none_unsets_what_may_be_unset(desk):
    Path("my.yaml").write_text("checkpoints_total_limit: 3\nlora_alpha: 8\n")
    words = ["--config", "my.yaml", "--checkpoints_total_limit", "none", "--lora_alpha=none"]
    settings = parse_settings(DPOSettings, words)
    assert (settings.checkpoints_total_limit, settings.lora_alpha) == (None, None)


@pytest.mark.parametrize(
    ("setting", "value"), [("mixed_precision", "fp16"), ("revision", "main"), ("resume_from_checkpoint", "latest")]
)
def test_none_unsets_texts_and_choices_too(desk, setting, value):
    Path("my.yaml").write_text(f"{setting}: {value}\n")
    assert getattr(parse_settings(DPOSettings, ["--config", "my.yaml"]), setting) == value
    settings = parse_settings(DPOSettings, ["--config", "my.yaml", f"--{setting}", "None"])
    assert getattr(settings, setting) is None


def test_flag_without_values_empties_a_list(desk):
    Path("my.yaml").write_text("reward_clip: [-1, 1]\n")
    assert parse_settings(DPOSettings, ["--config", "my.yaml", "--reward_clip"]).reward_clip == []


def test_a_lora_of_no_modules_is_refused(desk, monkeypatch):
    assert "lora_target_modules is []; expected" in refusal(monkeypatch, "dpo", "--lora_target_modules")


def test_quoted_values_of_a_config_are_converted_or_named_with_the_file(desk, monkeypatch):
    settings = parsed("rank: '3'\nlearning_rate: '1e-3'\noverwrite: 'yes'\n")
    assert (settings.rank, settings.learning_rate, settings.overwrite) == (3, 1e-3, True)
    Path("my.yaml").write_text("rank: many\n")
    line = refusal(monkeypatch, "dpo", "--config", "my.yaml", "--seed", "1")
    assert line.startswith("error: my.yaml: rank")
    assert "'many'" in line


def test_environment_of_a_config_is_set(desk, monkeypatch):
    monkeypatch.setenv("STEPFUSE_TRIED", "no")
    parsed("env:\n  STEPFUSE_TRIED: 1\n")
    assert os.environ["STEPFUSE_TRIED"] == "1"


# Places


@pytest.mark.parametrize("text", ["", "\n  \n"], ids=["empty", "blank lines"])
def test_empty_prompt_file_is_named(desk, monkeypatch, text):
    Path("mine.txt").write_text(text)
    line = refusal(monkeypatch, "dpo", "--prompts", "mine.txt")
    assert line == "error: prompt file 'mine.txt' is empty; expected one prompt per line"


def test_missing_prompt_file_is_named(desk, monkeypatch):
    assert "no prompts 'mine.txt'; expected a text file" in refusal(monkeypatch, "dpo", "--prompts", "mine.txt")


def test_group_that_does_not_divide_the_batch_is_refused(desk, monkeypatch):
    arguments = "--train_batch_size 3 --gradient_accumulation_steps 2 --num_generations 4"
    line = refusal(monkeypatch, "ddpo", *arguments.split())
    assert line.startswith("error: 6 images per step")
    assert "num_generations = 4" in line


@pytest.mark.parametrize(
    ("reward", "culprit"),
    [
        ("compresibility", "no reward 'compresibility'; expected one of clip_score"),
        ("mine.py:score", "no file 'mine.py'"),
        ("here.py:score", "here.py has no function or class 'score'"),
        ("colourfulness:big", "takes no argument, got 'big'"),
    ],
)
def test_reward_that_is_not_there_is_named(desk, monkeypatch, reward, culprit):
    Path("here.py").write_text("other = 1\n")
    assert culprit in refusal(monkeypatch, "dpo", "--reward", reward)


def test_base_that_is_not_there_is_named(desk, monkeypatch):
    Path("empty").mkdir()
    line = refusal(monkeypatch, "dpo", "--pretrained_model_name_or_path", "./empty")
    assert "no diffusers pipeline at './empty'" in line


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning")  # diffusers passes it
def test_a_misspelt_embedded_base_is_suggested(desk, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "did you mean 'emoji-flow'?" in refusal(monkeypatch, "dpo", "--pretrained_model_name_or_path", "emoji-flw")


@pytest.mark.parametrize("algorithm", MAIN)
def test_output_folder_that_holds_something_is_left_as_it_is(desk, monkeypatch, algorithm):
    Path("mine").mkdir()
    Path("mine/objective.json").write_text("precious")
    line = refusal(monkeypatch, algorithm, "--output_dir", "mine")
    assert "--output_dir mine exists and is not empty" in line
    assert "resume_from_checkpoint" not in line
    Path("mine/checkpoint-3").mkdir()
    assert "to continue its run, pass --resume_from_checkpoint latest" in refusal(
        monkeypatch, algorithm, "--output_dir", "mine"
    )
    assert "--overwrite" in line


def test_overwriting_loses_nothing_where_another_setting_is_wrong(desk, monkeypatch):
    Path("mine").mkdir()
    Path("mine/objective.json").write_text("precious")
    assert "'./nowhere'" in refusal(monkeypatch, "dpo", "--output_dir", "mine", "--overwrite")


@pytest.mark.parametrize(("wanted", "exists"), [("latest", True), ("checkpoint-7", True), ("checkpoint-7", False)])
def test_resuming_from_nothing_is_refused(desk, monkeypatch, wanted, exists):
    if exists:
        Path("mine/checkpoint-3").mkdir(parents=True)  # of a run cut off while it wrote: no progress.json
    line = refusal(monkeypatch, "dpo", "--output_dir", "mine", "--resume_from_checkpoint", wanted)
    assert "no checkpoint" in line
    assert "mine" in line
    assert Path("mine").exists() == exists

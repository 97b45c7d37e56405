"""Names that are suggested in place of unknown ones, and paths that are refused."""

from pathlib import Path

import pytest

from stepfuse.data.json_file import read_json
from stepfuse.data.names import near_names, nearest
from stepfuse.data.run_lock import check_free
from stepfuse.fuse.rules.registry import RULES
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.main import main
from stepfuse.train.arguments import parse_values
from stepfuse.train.settings import DPOSettings
from tests.fixtures_tiny import refused

FLAGS = ("--output_dir", "--overwrite", "--objectives", "--seed", "--quick", "--help")  # of the demo


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("prodct", RULES, ["product"]),
        ("PRODUCT", RULES, ["product"]),
        ("average-noise", RULES, ["average_noise"]),
        ("avg_noise", RULES, ["average_noise"]),
        ("sys", RULES, ["systematic"]),
        ("soup_factor", RULES, ["soup_factors"]),
        ("", RULES, []),
        ("x", RULES, []),
        ("quite another", RULES, []),
        ("--sede", FLAGS, ["--seed"]),
        ("--objectivs", FLAGS, ["--objectives"]),
        ("--out", FLAGS, ["--output_dir"]),
        ("--quik", FLAGS, ["--quick"]),
        ("--reward", FLAGS, []),
        ("--steps", FLAGS, []),
        ("--device", FLAGS, []),
        ("emoji-flo", ("emoji-joint", "emoji-flow-two", "emoji-flow"), ["emoji-flow", "emoji-flow-two"]),
        ("sd21", ("emoji", "sdxl"), []),
    ],
)
def test_names_are_suggested_that_are_near_and_no_others(name, names, expected):
    assert near_names(name, names) == expected
    assert nearest(name, names) == (f"; did you mean {expected[0]!r}?" if expected else "")


def test_suggestions_are_made_for_names_in_settings_and_files():
    """Where a name does not come from the command line."""
    from stepfuse.data.settings_file import check_names
    from stepfuse.fuse.rules.registry import get_rule
    from stepfuse.fuse.rules.schedules import schedule_from_dict
    from stepfuse.fuse.rules.weight_table import weight_table
    from stepfuse.rewards.registry import load_reward
    from stepfuse.scripts.evaluation.config import EvaluationConfig

    for refuse, meant in [
        (lambda: get_rule("sistematic"), "systematic"),
        (lambda: get_rule("code", candidate=3), "candidates"),
        (lambda: weight_table([{"alinment": 1.0}], ["alignment", "style"]), "alignment"),
        (lambda: load_reward("image-reward"), "image_reward"),
        (lambda: schedule_from_dict({"kind": "etta"}), "eta"),
        (lambda: schedule_from_dict({"kind": "eta", "eto": 1}), "eta"),
        (lambda: check_names({"seed_per_prompt": 1}, EvaluationConfig), "seeds_per_prompt"),
    ]:
        with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
            refuse()


@pytest.mark.parametrize("name", ["ada/emoji-flow", "emoji/mine", "lab/sd15"])
def test_an_id_of_the_hub_is_not_taken_for_a_mistyped_name_of_a_bundled_set(name):
    assert check_set(Path(name), instead=("sd15",)) is None


def test_a_path_that_the_system_refuses_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="name too long"):
        check_free(tmp_path / ("x" * 300), empty=True)
    with pytest.raises(ValueError, match="name too long"):
        read_json(tmp_path / ("x" * 300), "a file")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sample", "emoji", "--prompt"], "--prompt: expected a value (Prompt; required, repeat for more rows)"),
        (["sample", "--steps", "--prompt", "x"], "--steps: expected a value (Number of denoising steps, such as 25)"),
        (["reward"], "the following arguments are required: action"),
    ],
)
def test_an_option_without_its_value_is_told_with_what_the_value_is(capsys, arguments, told):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert f"{told}\n" in capsys.readouterr().err


def test_a_flag_of_training_without_its_value_is_told_with_what_the_value_is():
    told = "--lora_alpha: expected a value (LoRA alpha; the update is scaled by alpha / rank)"
    with refused(told):
        parse_values(DPOSettings, ["--lora_alpha"])
    with refused("--resume_from_checkpoint: expected a value (Checkpoint to resume from", "`latest`"):
        parse_values(DPOSettings, ["--resume_from_checkpoint", "--overwrite"])

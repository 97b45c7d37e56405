"""Settings of several objectives that cannot work: one line that names the objective and the setting."""

from pathlib import Path

import pytest

from stepfuse.train.arguments import parse_settings
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_tiny import refused
from tests.fixtures_training import refused_by

REWARDS = """
def slope(images, prompts):
    return images.mean((1, 2, 3))
"""
TWO = ["{reward: a}", "{reward: b}"]


def test_objectives_are_mappings_of_a_file_or_of_the_command_line(tmp_path):
    words = ["--objectives", "{reward: a, rank: 2, variance: learned}", "{reward: b, beta: 1e-3}", "--beta", "0.5"]
    file = tmp_path / "joint.yaml"
    entries = "- reward: a\n  rank: 2\n  variance: learned\n- reward: b\n  beta: 1e-3\n"
    file.write_text(f"beta: 0.5\nobjectives:\n{entries}")
    for given in (words, ["--config", str(file)]):
        first, second = parse_settings(DDPOSettings, given).each
        assert [(each.name, each.rank, each.beta, each.trains_variance) for each in (first, second)] == [
            ("a", 2, 0.5, True),
            ("b", 4, 1e-3, False),
        ]
        assert first.objectives == []
    assert parse_settings(DDPOSettings, ["--config", str(file), "--objectives"]).each[0].name == "clip_score"


def test_a_flag_that_every_objective_overrides_is_refused():
    words = ["--config", "dpo/emoji-flow-joint"]
    with refused("--reward mine.py:bleu has no effect: each of the objectives has its own reward (lightness, subject"):
        parse_settings(DPOSettings, [*words, "--reward", "mine.py:bleu"])
    with refused("--beta 0.5 has no effect"):
        parse_settings(DPOSettings, ["--objectives", "{beta: 1, reward: a}", "{beta: 2, reward: b}", "--beta=0.5"])
    assert [each.beta for each in parse_settings(DPOSettings, [*words, "--beta", "0.5"]).each] == [0.5, 0.5]
    one = ["--objectives", "{reward: a}", "{objective_name: b}", "--reward", "c"]
    assert [each.reward for each in parse_settings(DPOSettings, one).each] == ["a", "c"]


@pytest.mark.parametrize(
    ("entries", "culprit"),
    [
        (TWO[:1], "objectives is [{'reward': 'a'}]; expected two mappings or more"),
        ([TWO[0], "b"], "objectives is b; expected a mapping for each, such as {reward: clip_score}"),
        ([TWO[0], "{rewrad: b}"], "a setting of objectives is 'rewrad'; expected any of beta, reward"),
        ([TWO[0], "{rewrad: b}"], "did you mean 'reward'?"),
        ([TWO[0], "{reward:b}"], "objectives has 'reward:b'; write a space after the colon, {reward: b}"),
        ([TWO[0], "{reward: b, seed: 1}"], "a setting of objectives is 'seed'"),
        ([TWO[0], "{reward: b, 1: 2}"], "a setting of objectives is 1"),
        ([TWO[0], TWO[0]], "objective_name is a; expected another name for each objective"),
        ([TWO[0], "{reward: b, objective_name: A}"], "objective_name is A; expected another name for each objective"),
        ([TWO[0], "{reward: b, objective_name: centre}"], "objective_name is centre; expected another name"),
        ([TWO[0], "{reward: b, objective_name: samples}"], "objective_name is samples; expected another name"),
        ([TWO[0], "{reward: b, objective_name: logs}"], "objective_name is logs; expected another name"),
        ([TWO[0], "{reward: b, objective_name: checkpoint-3}"], "objective_name is checkpoint-3; expected another"),
        ([TWO[0], "{reward: b, rank: many}"], "objective b: rank is 'many'; expected int"),
        ([TWO[0], "{reward: b, rank: 0}"], "objective b: rank is 0; expected 1 or more"),
        (["{objective_name: x, reward: 3}", TWO[1]], "objective x: reward is 3; expected str"),
        (["{beta: -1}", TWO[1]], "objective number 1: beta is -1; expected 0, for none, or a positive number"),
        ([TWO[0], "{reward: b, variance: lerned}"], "objective b: variance is 'lerned'"),
        ([TWO[0], "{reward: b"], "--objectives: '{reward: b', line 1 is not YAML"),
        (["{reward:", "a}"], "quote each mapping, as in '{reward: warmth}'"),
        ([TWO[0], "{reward: b, reward: c}"], "the key 'reward' comes twice"),
        ([TWO[0], "{reward: b, vertex_turns: 0}"], "objective b: vertex_turns is 0; expected"),
        ([TWO[0], "{reward: b, vertex_turns: 1001}"], "objective b: vertex_turns is 1001; expected"),
        ([TWO[0], "{reward: b, vertex_turns: 1.5}"], "objective b: vertex_turns is 1.5; expected"),
        # A deterministic schedule beside a random one: no density of the product, and nothing to train it with.
        ([TWO[0], "{reward: b, sample_eta: 0}"], "objective b: sample_eta is 0"),
        ([TWO[0], "{reward: b, variance: table, sample_etas: [1.0, 0.0]}"], "objective b: sample_etas is [1.0, 0.0]"),
        ([TWO[0], "{reward: b, variance: sde, variance_options: {noise_level: 0}}"], "objective b: noise_level is 0"),
    ],
)
def test_faulty_objectives_are_named(entries, culprit):
    with refused(culprit):
        parse_settings(DDPOSettings, ["--objectives", *entries])


def test_objectives_that_are_no_list_are_refused(tmp_path):
    file = tmp_path / "joint.yaml"
    for text in ("objectives: a\n", "objectives: {reward: a}\n"):
        file.write_text(text)
        with refused("objectives is ", "expected list"):
            parse_settings(DDPOSettings, ["--config", str(file)])


@pytest.mark.parametrize(
    ("kind", "words", "culprit"),
    [
        (DPOSettings, "--pairs data", "pairs is data; expected none with objectives"),
        (DPOSettings, "--margin 0.1", "margin is 0.1; expected 0 with objectives"),
        (DDPOSettings, "--per_prompt_stat_tracking_buffer_size 4", "_buffer_size is 4; expected 0 with objectives"),
        (DDPOSettings, "--no_per_prompt_stat_tracking", "expected on with objectives: weights differ between prompts"),
        (DDPOSettings, "--multi_objective_aggregation normalize_then_sum", "expected unset with objectives"),
        (DDPOSettings, "--num_generations 1", "num_generations is 1; expected 2 or more per prompt"),
        (DDPOSettings, "--beta 0 --max_kl 2", "objective a: beta is 0.0; expected a positive number beside max_kl"),
        (DDPOSettings, "--vertex_share 1.5", "vertex_share is 1.5; expected a number in [0, 1]"),
        (DDPOSettings, "--weight_concentration 0", "weight_concentration is 0.0; expected 0.01 or more"),
        (DDPOSettings, "--train_rule average_noise", "train_rule is 'average_noise'; expected one of soup, product"),
        (DDPOSettings, "--train_rule prodcut", "did you mean 'product'?"),
    ],
)
def test_settings_of_a_run_that_do_not_go_with_objectives_are_named(kind, words, culprit):
    with refused(culprit):
        parse_settings(kind, ["--objectives", *TWO, *words.split()])


@pytest.mark.parametrize("name", ["two words", "../x", "v1.5", "train"])
def test_a_name_that_no_adapter_can_have_is_found_before_anything_is_written(run_training, name):
    slope = "reward: rewards.py:slope"
    Path("joint.yaml").write_text(f"objectives:\n- {slope}\n- {slope}\n  objective_name: {name}\n")
    assert f"objective name {name!r}" in refused_by(run_training, "ddpo", config="joint.yaml", max_train_steps=1)
    assert {path.name for path in Path().rglob("*")} == {"joint.yaml", "prompts.txt", "rewards.py"}


def test_the_run_has_no_name_beside_those_of_its_objectives():
    with pytest.raises(ValueError, match="objective_name is both"):
        DDPOSettings(objectives=[{"reward": "compressibility"}, {"reward": "colourfulness"}], objective_name="both")

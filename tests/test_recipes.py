"""The recipes in configs/ can be launched as their headers say, and what they train can go into one set."""

import shlex
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from stepfuse.data.prompts import PROMPT_SETS
from stepfuse.fuse.rules.objective import Objective
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.train.arguments import parse_settings
from stepfuse.train.settings import DDPOSettings, DPOSettings

ROOT = Path(__file__).parents[1]
SETTINGS = {"dpo": DPOSettings, "ddpo": DDPOSettings}
BASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "z-image": "Tongyi-MAI/Z-Image",
    "qwen-image": "Qwen/Qwen-Image",
}
UNETS = ("sd15", "sdxl")
CARD = dict.fromkeys(BASES, "24 GB") | {"qwen-image": "80 GB"}  # of the first command
LATENT = {  # numbers of a latent at the resolution of training
    "sd15": 4 * 64 * 64,
    "sdxl": 4 * 128 * 128,
    "sd35": 16 * 64 * 64,
    "flux2-klein": 128 * 32 * 32,
    "z-image": 16 * 64 * 64,
    "qwen-image": 16 * 64 * 64,
}
TRAINED = {
    "pickscore": ("dpo", "pickscore"),
    "hpsv2": ("dpo", "hpsv2"),
    "image-reward": ("ddpo", "image_reward"),
    "aesthetic": ("ddpo", "laion_aesthetic"),
    "compressibility": ("ddpo", "compressibility"),
    "ocr": ("ddpo", "ocr"),
}
NAMES = [(base, name) for base in BASES for name in TRAINED if name != ("ocr" if base in UNETS else "compressibility")]
CONFIGS = sorted(path.relative_to(ROOT) for name in SETTINGS for path in (ROOT / "configs" / name).glob("*.yaml"))
RECIPES = [Path("configs", TRAINED[name][0], f"{base}-{name}.yaml") for base, name in NAMES]
README = Path("configs/dpo/sd15-clip-score.yaml")  # README makes a set of it and compressibility
ACCELERATE = sorted(path.relative_to(ROOT) for path in (ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def settings_of(config, *flags):
    return parse_settings(SETTINGS[config.parent.name], ["--config", str(config), *flags])


def commands(config):
    """What the header tells to run, in order: words of each command, lines joined."""
    header = [line[1:] for line in config.read_text().split("\n\n", 1)[0].splitlines()]
    lines = "\n".join(header).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("accelerate launch ")]


def processes(config):
    return yaml.safe_load(config.read_text())["num_processes"]


def images(settings, count):
    return settings.train_batch_size * settings.gradient_accumulation_steps * count


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_parses(config):
    settings = settings_of(config)
    Objective(name=settings.name, reward=settings.reward, variance=settings.initial_schedule(), beta=settings.beta)


@pytest.mark.parametrize(("base", "name"), NAMES)
def test_each_base_has_a_recipe_for_each_reward(base, name):
    algorithm, reward = TRAINED[name]
    settings = settings_of(Path("configs", algorithm, f"{base}-{name}.yaml"))
    assert settings.pretrained_model_name_or_path == BASES[base]
    assert settings.reward == reward
    assert reward in REWARDS


@pytest.mark.parametrize("config", RECIPES, ids=str)
def test_header_has_a_command_for_one_card_and_one_for_eight_with_the_same_images_a_step(config):
    single, multi = commands(config)
    launchers, steps = [], []
    for words in (single, multi):
        assert words[:4] == ["accelerate", "launch", "--quiet", "--config_file"]
        launcher, program, *arguments = words[4:]
        assert Path(launcher).is_file()
        assert program == f"train/{config.parent.name}.py"
        assert Path(program).is_file()
        assert arguments[:2] == ["--config", str(config)]
        launchers.append(launcher)
        steps.append(images(settings_of(config, *arguments[2:]), processes(Path(launcher))))
    assert launchers == ["configs/accelerate/single-gpu.yaml", "configs/accelerate/multi-gpu.yaml"]
    assert single[-2:] == ["--config", str(config)]  # the file as it stands
    assert [processes(Path(launcher)) for launcher in launchers] == [1, 8]
    assert steps[0] == steps[1]
    assert f" {steps[0]} images per step" in config.read_text()
    base = next(base for base in BASES if config.name.startswith(base))
    assert f"# One GPU with {CARD[base]}:\n" in config.read_text()


@pytest.mark.parametrize("config", RECIPES, ids=str)
def test_header_says_what_was_not_measured(config):
    assert " not measured yet" in config.read_text()


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.parent.name == "ddpo"], ids=str)
@pytest.mark.parametrize("launcher", ACCELERATE, ids=lambda path: path.stem)
def test_groups_divide_the_images_of_a_step_under_every_accelerate_config(config, launcher):
    settings = settings_of(config)
    assert images(settings, processes(launcher)) % settings.num_generations == 0


@pytest.mark.parametrize("config", RECIPES, ids=str)
def test_precision_is_left_to_the_accelerate_config(config):
    assert settings_of(config).mixed_precision is None


@pytest.mark.parametrize("config", RECIPES, ids=str)
def test_prompts_are_sets_and_validation_ones_are_others(config):
    settings = settings_of(config)
    training, validation = (name.partition(":")[0] for name in (settings.prompts, settings.validation_set))
    assert settings.dataset_name is None
    assert {training, validation} <= set(PROMPT_SETS)
    assert training != validation


@pytest.mark.parametrize("config", RECIPES, ids=str)
def test_the_checkpoints_that_are_compared_are_those_that_are_validated(config):
    settings = settings_of(config)
    assert settings.load_best_model_at_end
    assert settings.checkpointing_steps == settings.validation_steps
    assert settings.max_train_steps % settings.checkpointing_steps == 0


@pytest.mark.parametrize("base", BASES)
def test_adapters_of_one_base_fit_into_one_set(base):
    """What `create_set` refuses: two of one name, and another guidance."""
    configs = [c for c in (*RECIPES, README) if c.name.startswith(base)]
    adapters = {config: settings_of(config) for config in configs}
    for (a, one), (b, other) in combinations(adapters.items(), 2):
        assert one.name != other.name, f"{a} and {b}"
        assert one.output_dir != other.output_dir, f"{a} and {b}"
        assert (one.guidance, one.sample_guidance_scale) == (other.guidance, other.sample_guidance_scale), f"{a}, {b}"
        assert one.pretrained_model_name_or_path == other.pretrained_model_name_or_path


@pytest.mark.parametrize("base", BASES)
def test_kl_weighs_against_the_log_probs_as_in_the_sources_where_both_are_per_dimension(base):
    """The loss has log-probs divided by the latent's numbers, and the KL as it is.

    Flow-GRPO's coefficient is of a KL without the length of the step, which is a tenth on average; for UNets it is
    taken as it is.
    """
    length = 1 if base in UNETS else 1 / 10
    for config in RECIPES:
        if config.parent.name == "ddpo" and config.name.startswith(base):
            settings = settings_of(config)
            assert settings.log_prob_reduction == "mean"
            coefficient = 0.04 if settings.name == "ocr" else 0.01
            assert settings.beta * LATENT[base] == pytest.approx(coefficient * length, rel=0.03)
            if base not in UNETS:
                assert settings.sample_num_steps == 1 / length
                assert f" = {settings.beta:.1e}. ".replace("e-0", "e-") in _joined(config)


def _joined(config):
    """A file's comments as running text."""
    return " ".join(config.read_text().replace("#", " ").split())

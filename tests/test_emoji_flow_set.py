"""The bundled set of the flow base: the adapters of the demo, and what is measured of them."""

import json
from pathlib import Path

import pytest

from stepfuse.data import emoji
from stepfuse.data.intervals import interval_text as text
from stepfuse.data.prompts import load_prompts
from stepfuse.data.settings_file import load_settings
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.recipes.demo import GUIDANCE, joint_training
from tests.fixtures_tiny import generators

ROOT = Path(__file__).parents[1]
CARD = emoji.FLOW_ADAPTER_SET / "README.md"
SUMMARY = json.loads((ROOT / "docs/bundled-bases/flow-set-evaluation.json").read_text())
OBJECTIVES = ["lightness", "subject_size"]


def test_the_set_has_the_adapters_that_the_demo_trains() -> None:
    loaded = load_set("emoji-flow")
    training = joint_training(Path("outputs/demo/adapters"), seed=0, quick=False, objectives=2)
    assert loaded.names == training.names == OBJECTIVES
    assert {adapter.record["config_sha256"] for adapter in loaded.adapters} == {training.sha256}
    assert {"guidance": loaded.guidance, "guidance_scale": loaded.guidance_scale} == GUIDANCE
    assert loaded.default_rule == "soup"
    assert sum(file.stat().st_size for file in emoji.FLOW_ADAPTER_SET.rglob("*") if file.is_file()) <= 2e6


def test_the_evaluation_is_that_of_its_configuration_on_held_out_prompts() -> None:
    config = load_settings(ROOT / "configs/eval/emoji-flow.yaml", EvaluationConfig, {})
    prompts = load_prompts(config.prompts)
    assert (SUMMARY["prompts"], SUMMARY["seeds"]) == (len(prompts), config.seeds_per_prompt)
    assert set(prompts).isdisjoint(load_prompts("emoji"))
    cells = {(cell["rule"], cell["weights"]) for cell in SUMMARY["cells"]}
    assert len(cells) == 1 + 5 + 1  # the base, quarters by soup, and halves by product


def test_every_mixture_raises_the_rewards_that_it_has_weight_on() -> None:
    """With intervals above 0, in the manifest as in the evaluation that it was taken from."""
    stored = load_set("emoji-flow").evaluation
    assert stored is not None
    measured = {(cell["rule"], cell["weights"]): cell["rewards"] for cell in SUMMARY["cells"]}
    raised = 0
    for cell in stored["cells"]:
        for name, gain in cell["gains"].items():
            expected = measured[cell["rule"], cell["weights"]][name]["gain"]
            assert gain == {key: pytest.approx(expected[key]) for key in ("mean", "low", "high")}
            if f"{name}=" in cell["weights"]:
                raised += gain["low"] > 0
    assert raised == 2 * 1 + 3 * 2 + 1 * 2  # two alone, three mixtures by soup, and one by product


def test_the_card_shows_the_gains_of_the_evaluation() -> None:
    card = CARD.read_text(encoding="utf-8")
    for cell in SUMMARY["cells"]:
        if cell["rule"] == "soup":
            gains = [text(cell["rewards"][name]["gain"], signed=True) for name in (*OBJECTIVES, "clip_score")]
            assert all(gain in card for gain in gains), (cell["weights"], gains)


def test_the_ends_of_the_slider_differ_at_a_glance() -> None:
    """The same noise: with weight on lightness the image is lighter, on average by many 8-bit levels."""
    sampler = FusedSampler.from_pretrained("emoji-flow")
    weights = [{name: 1.0} for name in OBJECTIVES]
    images = sampler.sample(
        ["a red apple on a blue background"] * 2, weights, generator=generators(0, 0), output_type="pt", progress=False
    )
    assert not isinstance(images, list)
    light, large = images.mean((1, 2, 3)).tolist()
    assert light > large + 0.1


def test_the_page_of_questions_has_the_figures_of_the_collapse() -> None:
    measured = json.loads((ROOT / "docs/bundled-bases/overtrained.json").read_text())
    cells = {(cell["rule"], cell["weights"]): cell for cell in measured["cells"]}
    base, white = cells["base", ""], cells["soup", "lightness=1"]
    means = [cell["rewards"]["clip_score"]["mean"]["mean"] for cell in (base, white)]
    before, after = (f"{mean:.0f}".replace("-", "−") for mean in means)
    page = " ".join((ROOT / "docs/questions.md").read_text(encoding="utf-8").split())
    assert f"is {white['rewards']['lightness']['mean']['mean']:.0f} of 100" in page
    assert f"falls from {before} to {after} points" in page
    assert f"at a KL divergence of {white['kl']['mean']:.0f} nats per image" in page

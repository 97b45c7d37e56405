"""The embedded adapter set, what is measured of it, and that the figures shown are those of its tables."""

import itertools
import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
import yaml

from stepfuse.data import emoji
from stepfuse.data.intervals import interval_text as text
from stepfuse.data.prompts import load_prompts
from stepfuse.data.settings_file import load_settings
from stepfuse.fuse.rules.registry import RULES
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.rewards.statistics import deviation_within
from stepfuse.scripts.evaluation.config import EvaluationConfig, Setup, cells_of
from stepfuse.scripts.evaluation.figures import summarise
from stepfuse.scripts.evaluation.report import sentences
from stepfuse.scripts.oracle_world.page import page, verdicts
from tests.fixtures_tiny import generators

ROOT = Path(__file__).parents[1]
EVALUATION = ROOT / "docs" / "evaluation"
CONFIG = ROOT / "configs" / "eval" / "emoji.yaml"
OBJECTIVES = ["compressibility", "colourfulness", "alignment"]


def test_the_set_is_small_and_holds_three_objectives_and_their_mixtures() -> None:
    files = [file for file in emoji.ADAPTER_SET.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    loaded = load_set("emoji")
    assert loaded.names == OBJECTIVES
    mixtures = [{name: round(w, 3) for name, w in oracle.weights.items()} for oracle in loaded.oracles]
    assert mixtures == [
        dict.fromkeys(OBJECTIVES, 0.333),
        {"compressibility": 0.5, "colourfulness": 0.5},
        {"compressibility": 0.5, "alignment": 0.5},
        {"colourfulness": 0.5, "alignment": 0.5},
    ]


def test_a_folder_of_that_name_without_a_set_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert load_set("emoji").names == OBJECTIVES


def test_the_set_belongs_to_the_embedded_base_and_its_variances_differ() -> None:
    sampler = FusedSampler.from_pretrained("emoji", rule="oracle")
    schedules = [objective.variance for objective in sampler.objectives]
    assert len(set(map(str, schedules))) == 3
    prompts, weights = ["a fox on a green background"] * 2, [{"colourfulness": 0.5, "alignment": 0.5}, {"alignment": 1}]
    images = sampler.sample(prompts, weights, num_inference_steps=2, generator=generators(0, 0), progress=False)
    assert isinstance(images, list)
    assert images[0].tobytes() != images[1].tobytes()


def test_every_adapter_names_the_command_that_remakes_it() -> None:
    """The card's commands, and the settings that training recorded."""
    card = (emoji.ADAPTER_SET / "README.md").read_text()
    loaded = load_set("emoji")
    for adapter in [*loaded.adapters, *(oracle.adapter for oracle in loaded.oracles)]:
        config = adapter.record["config"]
        lines = card.replace("\\\n", " ").splitlines()
        (line,) = [line for line in lines if f"--output_dir outputs/{adapter.name}" in line]
        assert f"train/{adapter.record['algorithm']}.py" in line
        file = next(word for word in line.split() if word.endswith(".yaml"))
        settings = yaml.safe_load((ROOT / file).read_text())
        words = shlex.split(line)
        given = {word[2:]: value for word, value in itertools.pairwise(words) if word.startswith("--")}
        for name in given.keys() & settings.keys() - {"output_dir"}:
            settings[name] = type(settings[name])(given[name])
        ours = {"output_dir", "checkpointing_steps", "overwrite", "validation_steps"}
        assert {k: v for k, v in config.items() if k in settings.keys() - ours} == {
            k: v for k, v in settings.items() if k not in ours
        }


def test_the_evaluation_is_of_held_out_prompts_and_every_rule() -> None:
    config = load_settings(CONFIG, EvaluationConfig)
    prompts = load_prompts(config.prompts)
    assert len(prompts) >= 64
    assert config.seeds_per_prompt >= 8
    assert not set(prompts) & set(load_prompts("emoji"))
    cells = cells_of(config, OBJECTIVES)
    assert {type(cell.rule) for cell in cells} == set(RULES.values())
    assert len([cell for cell in cells if cell.label == "oracle"]) >= 3
    identity = json.loads((EVALUATION / "evaluation.json").read_text())
    loaded = load_set("emoji")
    everyone = [*loaded.adapters, *(oracle.adapter for oracle in loaded.oracles)]
    assert identity["adapters"] == {adapter.name: adapter.sha256 for adapter in everyone}
    results = pd.read_parquet(EVALUATION / "results.parquet", columns=["rule", "weights", "strength", "prompt"])
    assert set(results.prompt) == set(prompts)
    images = len(prompts) * config.seeds_per_prompt
    expected = {(cell.label, cell.weights_label, cell.strength): images for cell in cells}
    assert results.groupby(["rule", "weights", "strength"]).size().to_dict() == expected


def test_the_scales_are_told_beside_the_deviations_of_the_bases_images() -> None:
    """The evaluation was drawn with scales that its configuration gave; now it measures them."""
    told = (EVALUATION / "README.md").read_text()
    given = json.loads((EVALUATION / "evaluation.json").read_text())["config"]["scales"]
    assert "units σ of {compressibility:g} kB, {colourfulness:g} and {alignment:g} CLIP".format(**given) in told
    base = pd.read_parquet(EVALUATION / "results.parquet").query("rule == 'base'")
    rewards = (f"reward_{objective.reward}" for objective in load_set("emoji").objectives)
    measured = [deviation_within(base[reward], base["prompt"].tolist()) for reward in rewards]
    assert "{:.3f}, {:.2f} and {:.2f}".format(*measured) in told
    for config in CONFIG.parent.glob("*.yaml"):
        assert not load_settings(config, EvaluationConfig).scales


def numbers(values: object, place: str = "") -> dict[str, object]:
    """Every leaf of nested figures, by its place."""
    if not isinstance(values, dict | list):
        return {place: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {key: leaf for name, value in items for key, leaf in numbers(value, f"{place}/{name}").items()}


@pytest.mark.slow
def test_the_summary_is_that_of_the_table() -> None:
    summary = json.loads((EVALUATION / "summary.json").read_text())
    setup = Setup(
        objectives=tuple(summary["objectives"].items()),
        rewards=tuple(summary["rewards"]),
        scales=summary["scales"],
        held_out=tuple(summary["held_out"]),
        steps=0,
        guidance=0,
    )
    again = summarise(pd.read_parquet(EVALUATION / "results.parquet"), setup, draws=summary["draws"])
    got, shown = numbers(again), numbers(summary)
    assert got.keys() >= shown.keys()  # it may have been written before there were some of the figures
    values = {place for place, value in shown.items() if isinstance(value, float)}
    assert len(values) > 1000
    assert {place: got[place] for place in values} == pytest.approx({place: shown[place] for place in values}, rel=1e-6)
    assert all(got[place] == shown[place] for place in shown.keys() - values)


MIXTURES = [
    "compressibility=0.5,colourfulness=0.5",
    "compressibility=0.5,alignment=0.5",
    "colourfulness=0.5,alignment=0.5",
    "compressibility=0.333333,colourfulness=0.333333,alignment=0.333333",
]


def test_the_tables_shown_are_those_of_the_summary() -> None:
    summary = json.loads((EVALUATION / "summary.json").read_text())
    readme, account = (ROOT / "README.md").read_text(), (EVALUATION / "README.md").read_text()
    shown = {"product at strength 1.5": "`product`, λ = 1.5"}
    mixed = {(cell["rule"], cell["weights"]): cell for cell in summary["cells"] if cell["weights"] in MIXTURES}
    rules = dict.fromkeys(rule for rule, _ in mixed)
    assert len(rules) == 10  # all but base and kl, and product at another strength
    for rule in rules:
        cells = [mixed.get((rule, weights)) for weights in MIXTURES]
        gains = " | ".join("–" if cell is None else text(cell["scalarised_gain"], signed=True) for cell in cells)
        row = f"| {shown.get(rule, f'`{rule}`')} | {gains} |"
        assert row in readme
        assert row in account
    assert all(f"- {sentence}" in account for sentence in sentences(summary))


def test_the_page_of_the_oracle_world_is_that_of_its_figures() -> None:
    result = json.loads((ROOT / "docs" / "world" / "world.json").read_text())
    assert (ROOT / "docs" / "world" / "world.md").read_text() == page(result)
    assert result["verdicts"] == list(verdicts(result["cells"]))
    assert {(c["objectives"], c["steps"], c["variances"]) for c in result["cells"]} == {
        (n, t, kind) for n in (2, 3, 4) for t in (10, 20, 50) for kind in ("equal", "distinct")
    }
    assert all(cell["product_exact"] for cell in result["cells"])

"""The bundled adapter set, what is measured of it, and that the figures shown are those of its tables."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest

from stepfuse.data import emoji
from stepfuse.data.intervals import interval_text as text
from stepfuse.data.prompts import load_prompts
from stepfuse.data.settings_file import load_settings
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.registry import RULES
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.card import card
from stepfuse.fuse.sets.set_training import SetTraining
from stepfuse.rewards.statistics import deviation_within, percentile_interval, resample_prompts, resampled_means
from stepfuse.scripts.baselines.product_or_soup import effects, resolved, sentence
from stepfuse.scripts.evaluation.config import EvaluationConfig, Setup, cells_of
from stepfuse.scripts.evaluation.figures import summarise
from stepfuse.scripts.evaluation.report import sentences
from stepfuse.scripts.oracle_world.page import page, verdicts
from stepfuse.scripts.recipes.build_set import read_build
from tests.fixtures_tiny import generators

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
EVALUATION = ROOT / "docs" / "evaluation"
SEPARATE = ROOT / "docs" / "evaluation-separate"  # of adapters that were trained separately, which the set had before
CONFIG_OF = {EVALUATION: CONFIGS / "eval" / "emoji-joint.yaml", SEPARATE: CONFIGS / "eval" / "emoji.yaml"}
ACCOUNTS = pytest.mark.parametrize("account", CONFIG_OF, ids=lambda folder: folder.name)
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


def test_a_card_on_a_bundled_base_has_its_licence_and_a_prompt_that_it_knows() -> None:
    loaded = load_set("emoji")
    unstated = replace(loaded, base={name: value for name, value in loaded.base.items() if name != "license"})
    for each in (loaded, unstated):
        shown = card(each, source="emoji", shown=[])
        assert 'pipe("a fox on a green background"' in shown
        assert re.search(r"^\| base, .*\| apache-2\.0 \|$", shown, re.MULTILINE)


def test_a_folder_of_that_name_without_a_set_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert load_set("emoji").names == OBJECTIVES


def test_the_set_belongs_to_the_embedded_base_and_was_trained_for_its_rule() -> None:
    loaded = load_set("emoji")
    assert loaded.default_rule == "soup"
    assert loaded.training == SetTraining(how="jointly", rule="soup")
    sampler = FusedSampler.from_pretrained(loaded, rule="oracle")
    prompts, weights = ["a fox on a green background"] * 2, [{"colourfulness": 0.5, "alignment": 0.5}, {"alignment": 1}]
    images = sampler.sample(prompts, weights, num_inference_steps=2, generator=generators(0, 0), progress=False)
    assert isinstance(images, list)
    assert images[0].tobytes() != images[1].tobytes()


def test_the_command_of_the_card_remakes_every_adapter() -> None:
    """The build of its configuration has the settings that training recorded."""
    assert "stepfuse build configs/sets/emoji.yaml" in (emoji.ADAPTER_SET / "README.md").read_text()
    _, objectives, oracles, _ = read_build(CONFIGS / "sets" / "emoji.yaml")
    built = {name: training.sha256 for training in (*objectives, *oracles) for name in training.names}
    assert built == {adapter.name: adapter.record["config_sha256"] for adapter in load_set("emoji").all_adapters}


def test_the_runs_that_it_is_compared_with_have_no_fewer_images_and_the_same_settings() -> None:
    _, (joint,), long_oracles, _ = read_build(CONFIGS / "sets" / "emoji.yaml")
    _, objectives, oracles, _ = read_build(CONFIGS / "sets" / "emoji-apart.yaml")
    assert joint.settings.max_train_steps <= sum(t.settings.max_train_steps for t in (*objectives, *long_oracles))
    assert {t.settings.max_train_steps for t in (*objectives, *oracles)} == {18}
    assert {t.settings.max_train_steps for t in long_oracles} == {3 * 18}
    betas = {each.name: each.beta for each in joint.settings.each}
    own = {"reward", "objective_name", "objectives", "beta", "max_train_steps", "output_dir"}
    own |= {"checkpointing_steps", "validation_steps", "num_validation_images"}
    expected = {name: value for name, value in asdict(joint.settings).items() if name not in own}
    for training in (*objectives, *oracles, *long_oracles):
        assert {name: value for name, value in asdict(training.settings).items() if name not in own} == expected
        names = training.settings.name.removeprefix("oracle-").split("-")
        names = OBJECTIVES if names == ["thirds"] else names
        assert training.settings.beta == pytest.approx(sum(betas[name] for name in names) / len(names), abs=1e-4)
        rewards = [next(each.reward for each in joint.settings.each if each.name == name) for name in names]
        assert all(reward in training.settings.reward for reward in rewards)


@ACCOUNTS
def test_the_evaluation_is_of_held_out_prompts_and_every_cell(account: Path) -> None:
    config = load_settings(CONFIG_OF[account], EvaluationConfig)
    prompts = load_prompts(config.prompts)
    assert len(prompts) >= 64
    assert config.seeds_per_prompt >= 8
    assert not set(prompts) & set(load_prompts("emoji"))
    cells = cells_of(config, OBJECTIVES)
    assert len([cell for cell in cells if cell.label == "oracle"]) >= 4
    results = pd.read_parquet(account / "results.parquet", columns=["rule", "weights", "strength", "prompt"])
    assert set(results.prompt) == set(prompts)
    images = len(prompts) * config.seeds_per_prompt
    expected = {(cell.label, cell.weights_label, cell.strength): images for cell in cells}
    assert results.groupby(["rule", "weights", "strength"]).size().to_dict() == expected


def test_the_evaluation_is_of_the_set() -> None:
    identity = json.loads((EVALUATION / "evaluation.json").read_text())
    assert identity["adapters"] == {adapter.name: adapter.sha256 for adapter in load_set("emoji").all_adapters}


def test_the_evaluation_of_adapters_trained_apart_has_every_rule() -> None:
    config = load_settings(CONFIG_OF[SEPARATE], EvaluationConfig)
    assert {type(cell.rule) for cell in cells_of(config, OBJECTIVES)} == set(RULES.values())


def test_the_scales_are_told_beside_the_deviations_of_the_bases_images() -> None:
    """The evaluation of adapters trained separately had scales that its configuration gave; now they are measured."""
    told = (SEPARATE / "README.md").read_text()
    given = json.loads((SEPARATE / "evaluation.json").read_text())["config"]["scales"]
    assert "units σ of {compressibility:g} kB, {colourfulness:g} and {alignment:g} CLIP".format(**given) in told
    base = pd.read_parquet(SEPARATE / "results.parquet").query("rule == 'base'")
    rewards = (f"reward_{objective.reward}" for objective in load_set("emoji").objectives)
    measured = [deviation_within(base[reward], base["prompt"].tolist()) for reward in rewards]
    assert "{:.3f}, {:.2f} and {:.2f}".format(*measured) in told
    for config in (CONFIGS / "eval").glob("*.yaml"):
        assert not load_settings(config, EvaluationConfig).scales


def numbers(values: object, place: str = "") -> dict[str, object]:
    """Every leaf of nested figures, by its place."""
    if not isinstance(values, dict | list):
        return {place: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {key: leaf for name, value in items for key, leaf in numbers(value, f"{place}/{name}").items()}


def setup_of(summary: dict) -> Setup:
    """What was measured, as a summary and the set have it; the first account is of before there were shares."""
    rules = summary["rules"].items()
    images = {rule: figures["training_images"] for rule, figures in rules if "training_images" in figures}
    oracles = tuple((oracle.weights, oracle.scales) for oracle in load_set("emoji").oracles) if images else ()
    return Setup(
        objectives=tuple(summary["objectives"].items()),
        rewards=tuple(summary["rewards"]),
        scales=summary["scales"],
        held_out=tuple(summary["held_out"]),
        oracles=oracles,
        sets=summary.get("sets", {}),
        training_images=images,
        steps=0,
        guidance=0,
    )


@pytest.mark.slow
@ACCOUNTS
def test_the_summary_is_that_of_the_table(account: Path) -> None:
    summary = json.loads((account / "summary.json").read_text())
    again = summarise(pd.read_parquet(account / "results.parquet"), setup_of(summary), draws=summary["draws"])
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


def figures_of(summary: dict) -> dict[tuple[str, float], dict[str, dict]]:
    """By rule and strength, and then by weights, the cells of mixed weights that the tables show."""
    rows: dict[tuple[str, float], dict[str, dict]] = {}
    for cell in summary["cells"]:
        if cell["weights"] in MIXTURES:
            rows.setdefault((cell["rule"], cell["strength"]), {})[cell["weights"]] = cell
    return rows


def rows_of(summary: dict, figure: str, *, signed: bool) -> list[str]:
    """The beginnings of the rows of a table: rule, and an interval at each of the mixtures."""
    rows = []
    for (rule, strength), cells in figures_of(summary).items():
        known = [cells[weights].get(figure) if weights in cells else None for weights in MIXTURES]
        shown = ["–" if interval is None else text(interval, signed=signed) for interval in known]
        name = f"`{rule.removesuffix(f' at strength {strength:g}')}`" + (f", λ = {strength:g}" if strength != 1 else "")
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return rows


@ACCOUNTS
def test_the_tables_shown_are_those_of_the_summary(account: Path) -> None:
    summary = json.loads((account / "summary.json").read_text())
    page = (account / "README.md").read_text()
    gains = rows_of(summary, "scalarised_gain", signed=True)
    assert len(gains) >= 10  # all but the base, and of the earlier set kl
    assert [row for row in gains if row not in page] == []
    assert all(f"- {sentence}" in page for sentence in sentences(summary))


def test_the_page_on_evaluations_shows_the_gains_of_the_embedded_set() -> None:
    gains = rows_of(json.loads((EVALUATION / "summary.json").read_text()), "scalarised_gain", signed=True)
    shown = (ROOT / "docs/how-to/evaluate.md").read_text()
    assert [row for row in gains if "λ" not in row and row not in shown] == []


def with_oracles(results: pd.DataFrame, label: str) -> pd.DataFrame:
    """The table with the oracles of another label in the place of the set's own."""
    return results[results.rule != "oracle"].replace({"rule": {label: "oracle"}})


@pytest.mark.slow
@pytest.mark.parametrize("oracles", ["oracle", "oracle, 18 steps"])
def test_the_shares_shown_follow_from_the_table_of_images(oracles: str) -> None:
    results = pd.read_parquet(EVALUATION / "results.parquet")
    summary = json.loads((EVALUATION / "summary.json").read_text())
    if oracles != "oracle":
        results = with_oracles(results, oracles)
    again = summarise(results, setup_of(summary), draws=summary["draws"])
    page = (EVALUATION / "README.md").read_text()
    section = page.split(f"### Of the `{oracles}`")[1].split("###")[0]
    for figure in ("share_of_oracle", "share_at_oracle_kl"):
        rows = [row for row in rows_of(again, figure, signed=False) if set(row.split(" | ")[1:]) - {"–", "– |"}]
        ours = [row for row in rows if row.startswith(("| `soup` |", "| `product` |"))]
        assert ours
        assert [row for row in ours if row not in section] == []


def test_the_images_of_training_shown_are_those_of_the_records() -> None:
    page = (EVALUATION / "README.md").read_text().split("## What is compared")[1].split("## Mixtures")[0]
    rules = json.loads((EVALUATION / "summary.json").read_text())["rules"]
    images = {rule: figures["training_images"] for rule, figures in rules.items() if rule != "base"}
    assert all(f"{count:,}" in page for count in images.values())
    assert images["soup"] <= images["soup, trained separately"] + images["oracle"]
    assert f"{images['soup, trained separately'] + images['oracle']:,}" in page


def test_the_gains_of_single_adapters_are_compared_as_the_table_of_images_says() -> None:
    """Ratios of the joint adapters' gains to those of others, and the interval where it matters."""
    results = pd.read_parquet(EVALUATION / "results.parquet").sort_values(["prompt", "seed"])
    page = re.sub(r"\s+", " ", (EVALUATION / "README.md").read_text())
    base = results[results.rule == "base"]
    resamples = resample_prompts(base.prompt.tolist(), draws=2000)

    def ratio(objective: Objective, other: str) -> dict:
        rows = (
            results[(results.rule == rule) & (results.weights == f"{objective.name}=1")] for rule in ("soup", other)
        )
        column = f"reward_{objective.reward}"
        ours, theirs = (resampled_means(row[column].to_numpy() - base[column].to_numpy(), resamples) for row in rows)
        return vars(percentile_interval(ours / theirs))

    compressibility, colourfulness, alignment = load_set("emoji").objectives
    apart = [ratio(objective, "soup, trained separately")["mean"] for objective in (compressibility, colourfulness)]
    assert "gain {:.1f} and {:.1f} times as much as the adapters".format(*apart) in page
    first = [ratio(objective, "soup, first set") for objective in (compressibility, colourfulness, alignment)]
    shown = "the joint ones have {:.1f}, {:.1f} and {}".format(first[0]["mean"], first[1]["mean"], text(first[2]))
    assert shown in page


def test_where_the_product_is_better_than_the_soup_follows_from_the_sweep() -> None:
    sweep = json.loads((EVALUATION / "product-or-soup.json").read_text())
    page, cells, prompts = (EVALUATION / "README.md").read_text(), sweep["cells"], sweep["identity"]["prompts"]
    assert prompts == load_prompts("emoji-heldout:64")
    assert len({str(cell["factors"]) for cell in cells}) == len(cells) == 72
    shown = effects(cells, prompts)
    assert shown == sweep["effects"]
    assert all(f"| {one['cells']} | {text(one['difference'], signed=True)} |" in page for one in shown)
    better, worse = resolved(cells, prompts)
    assert sentence(better, worse, len(cells)) in page
    rest = len(cells) - worse - better  # whose interval holds 0
    told = f"of {len(cells)} measured cases it was better in {worse}, `product` in {better}, and {rest} did not differ"
    assert f"{told} beyond noise" in (ROOT / "README.md").read_text()
    assert all(one["difference"]["low"] <= 0 for one in shown)  # at no level the product
    for size, schedules in ((1.0, "as trained"), (2.0, "distinct")):
        held = [c for c in cells if (c["factors"]["size"], c["factors"]["schedules"]) == (size, schedules)]
        assert text(effects(held, prompts)[0]["difference"], signed=True) in page


def test_the_page_of_the_oracle_world_is_that_of_its_figures() -> None:
    result = json.loads((ROOT / "docs" / "world" / "world.json").read_text())
    assert (ROOT / "docs" / "world" / "world.md").read_text() == page(result)
    assert result["verdicts"] == list(verdicts(result["cells"]))
    assert {(c["objectives"], c["steps"], c["variances"]) for c in result["cells"]} == {
        (n, t, kind) for n in (2, 3, 4) for t in (10, 20, 50) for kind in ("equal", "distinct")
    }
    assert all(cell["product_exact"] for cell in result["cells"])

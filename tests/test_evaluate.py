"""`stepfuse evaluate` on a tiny pipeline with real adapters: what it draws, resumes, shares out and refuses."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.scripts.evaluation.batch import sample_batch
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.evaluation.diversity import mean_distances
from stepfuse.scripts.evaluation.kl import kl_to_base
from stepfuse.scripts.evaluation.metric import Metric
from stepfuse.scripts.evaluation.metrics import METRICS
from stepfuse.scripts.evaluation.prepare import Evaluation
from stepfuse.scripts.evaluation.run import evaluate
from stepfuse.train.rollout import sample_generator
from tests.fixtures_evaluated import CONFIG, MEASURED, PROMPTS, save_desk, table, without_costs
from tests.fixtures_tiny import networks, refused, save_adapter


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return save_desk(tmp_path_factory.mktemp("desk"))


@pytest.fixture(autouse=True)
def at_the_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)


@pytest.fixture(scope="module")
def drawn(desk):
    """One whole evaluation."""
    before = Path.cwd()
    os.chdir(desk)
    try:
        evaluate("set", EvaluationConfig(**CONFIG), desk / "out")
    finally:
        os.chdir(before)
    return desk / "out"


# What is drawn


def test_every_cell_holds_every_prompt_and_seed(drawn):
    frame = table(drawn)
    cells = frame.groupby(["rule", "weights", "strength"]).size()
    # base; product and systematic at 1, ½ + ½ and 1; kl on each adapter; code as the first two
    assert len(cells) == 1 + 3 + 3 + 2 + 3
    assert (cells == 3 * 2).all()
    assert set(frame.prompt) == set(PROMPTS)
    assert set(frame.seed) == {0, 1}


def test_rewards_are_those_of_the_images_that_the_sampler_draws(drawn):
    frame = table(drawn)
    row = frame[(frame.rule == "product") & (frame.weights == "a=0.5,b=0.5")].iloc[3]
    (image,) = FusedSampler.from_pretrained("set").sample(
        [row.prompt],
        {"a": 0.5, "b": 0.5},
        num_inference_steps=3,
        generator=[sample_generator(0, "evaluate", row.prompt, int(row.seed))],
        output_type="pt",
        progress=False,
    )
    assert row.reward_colourfulness == pytest.approx(colourfulness(image[None], [row.prompt]).item(), abs=1e-3)


def test_network_evaluations_are_counted(drawn):
    """3 steps without guidance: one expert 3, two 6; kl at 0.5 runs the base too; code of 2: 1 + 2 · 2."""
    nfe = table(drawn).groupby(["rule", "weights"]).nfe.first()
    assert nfe["base", ""] == 3
    assert nfe["product", "a=1"] == 3
    assert nfe["product", "a=0.5,b=0.5"] == 6
    assert nfe["systematic", "a=0.5,b=0.5"] == 3
    assert nfe["kl", "a=1"] == 6
    assert nfe["code", "a=1"] == 5


def test_kl_to_the_base_is_0_for_the_base_and_measured_for_the_seeds_asked_for(drawn):
    frame = table(drawn)
    base = frame[frame.rule == "base"]
    assert base[base.seed == 0].kl.abs().max() < 1e-6
    assert base[base.seed == 1].kl.isna().all()
    assert frame[frame.rule == "code"].kl.isna().all()
    assert (frame[(frame.rule == "product") & (frame.seed == 0)].kl > 0).all()


def test_kl_of_one_adapter_is_the_sum_over_its_steps(desk):
    """Σ_t |m - m_ref|² / 2 v_ref + D/2 (r - 1 - log r), r = v / v_ref = 0.5² of the ancestral variance, eta_ref 1."""
    config = EvaluationConfig(**CONFIG | dict(rules=["product"]))
    evaluation = Evaluation.prepare(_loaded(), config, device="cpu", dtype=torch.float32)
    cell = next(c for c in evaluation.cells if c.weights == {"a": 1})
    sampler = evaluation.sampler_of(cell)
    got, unmeasured = kl_to_base(sample_batch(evaluation, cell, range(1))).tolist()  # of two seeds the first
    assert np.isnan(unmeasured)
    expected, steps = 0.0, []
    generator = [sample_generator(0, "evaluate", PROMPTS[0], 0)]
    sampler.sample(
        [PROMPTS[0]],
        {"a": 1},
        num_inference_steps=3,
        generator=generator,
        progress=False,
        observe=lambda *x: steps.append(x),
    )
    for step, gaussian, conditioning, _ in steps:
        with torch.no_grad():
            (e,) = sampler.denoiser.predictions(step.x_t, step.t, conditioning, networks(None))
        reference = step.transition(e, step.variance(step.plan.base))
        v = reference.variance.item()
        expected += ((gaussian.mean - reference.mean) ** 2).sum().item() / (2 * v)
        expected += 4 * 8 * 8 / 2 * (0.25 - 1 - np.log(0.25))
    assert got == pytest.approx(expected, rel=1e-4)


def _loaded():
    from stepfuse.fuse.sets.adapter_set import load_set

    return load_set("set")


def test_one_adapter_alone_is_drawn_once_for_all_rules_that_fuse(drawn):
    """base, product's three and ½ + ½ of systematic, kl twice, code three times, in two batches each; not 12 cells."""
    assert len(list((drawn / "parts").iterdir())) == 2 * 10
    frame = table(drawn).drop(columns="rule")
    for weights in ("a=1", "b=1"):
        rows = [frame[(table(drawn).rule == rule) & (frame.weights == weights)] for rule in ("product", "systematic")]
        pd.testing.assert_frame_equal(*(r.reset_index(drop=True) for r in rows))


def test_pictures_are_kept_of_the_first_prompts_and_seed_for_the_page(drawn):
    frame = table(drawn)
    kept = frame[frame.image.notna()]
    assert set(kept.prompt) == {PROMPTS[0]}
    assert set(kept.seed) == {0}
    assert (drawn / "report.html").read_text().count("data:image/webp;base64,") >= 12


def test_the_summary_speaks_of_every_cell(drawn):
    summary = json.loads((drawn / "summary.json").read_text())
    assert len(summary["cells"]) == 12
    assert summary["held_out"] == ["emoji_background"]


def test_diversity_is_the_mean_cosine_distance_within_a_prompt():
    """Of three unit vectors at 0°, 90° and 180° the pairs are 1, 1 and 2 apart: 4/3; equal ones are 0 apart."""

    class Embedder:
        def embed_images(self, pixels):
            return torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, 1], [0, 2], [0, 3]])

    expected = [4 / 3] * 3 + [0] * 3
    assert mean_distances(Embedder(), torch.zeros(6, 3, 4, 4), 3) == pytest.approx(expected)


def test_images_have_the_resolution_of_the_configuration(desk):
    config = EvaluationConfig(**CONFIG | dict(rules=["product"], resolution=32))
    evaluation = Evaluation.prepare(_loaded(), config, device="cpu", dtype=torch.float32)
    assert sample_batch(evaluation, evaluation.cells[0], range(1)).pixels.shape[2:] == (32, 32)
    assert evaluation.identity(torch.float32)["config"]["resolution"] == 32
    with refused("height is 30"):
        config = EvaluationConfig(**CONFIG | dict(rules=["product"], resolution=30))
        Evaluation.prepare(_loaded(), config, device="cpu", dtype=torch.float32)


def test_a_metric_gives_one_number_for_each_image(desk):
    config = EvaluationConfig(**CONFIG | dict(rules=["product"]))
    evaluation = Evaluation.prepare(_loaded(), config, device="cpu", dtype=torch.float32)
    batch = sample_batch(evaluation, evaluation.cells[0], range(2))
    for value, expected in ((3.0, [3.0] * 4), (torch.arange(4), [0, 1, 2, 3])):
        metric = Metric(name="m", title="m", description="", per_image=lambda batch, value=value: value)
        assert metric.measure(batch).tolist() == expected
    with refused("'m'", "(3,)", "4 images"):
        Metric(name="m", title="m", description="", per_image=lambda batch: [1, 2, 3]).measure(batch)


def test_parts_that_lack_a_metric_are_resumed_and_their_images_have_no_value(drawn, desk, tmp_path, monkeypatch):
    """As when a metric is added while an evaluation is interrupted."""
    shutil.copytree(drawn, tmp_path / "out")
    last = sorted((tmp_path / "out" / "parts").iterdir())[-1]
    last.unlink()
    brightness = Metric(name="level", title="level", description="", per_image=lambda b: b.pixels.mean((1, 2, 3)))
    monkeypatch.setitem(METRICS, "level", brightness)
    summary = evaluate("set", EvaluationConfig(**CONFIG), tmp_path / "out")
    known = table(tmp_path / "out")["level"].notna()
    assert known.sum() == len(pd.read_parquet(last))
    assert [cell["level"] is not None for cell in summary["cells"]].count(True) == 1


# Going on, and sharing out


def test_an_interrupted_evaluation_goes_on_with_the_same_numbers(drawn, desk):
    parts = sorted((drawn / "parts").iterdir())
    before = table(drawn)
    kept = {part: part.stat().st_mtime_ns for part in parts[::3]}
    for part in parts:
        if part not in kept:
            part.unlink()
    (drawn / "results.parquet").unlink()
    evaluate("set", EvaluationConfig(**CONFIG), drawn)
    pd.testing.assert_frame_equal(without_costs(table(drawn)), without_costs(before))
    assert {part: part.stat().st_mtime_ns for part in kept} == kept  # not drawn again


def test_two_processes_draw_the_numbers_of_one(measured, desk):
    (desk / "config.yaml").write_text(yaml.safe_dump(MEASURED))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [
        "-m",
        "stepfuse.scripts.cli.main",
        "evaluate",
        "plain",
        "--config",
        "config.yaml",
        "--output_dir",
        "two",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=desk)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("report.html") == 1  # the main process alone reports
    scales = [json.loads((output / "summary.json").read_text())["scales"] for output in (desk / "two", measured)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)
    pd.testing.assert_frame_equal(without_costs(table(desk / "two")), without_costs(table(measured)), rtol=1e-5)


def test_another_evaluation_is_not_written_into_the_folder(drawn):
    with refused("another evaluation", "--overwrite"):
        evaluate("set", EvaluationConfig(**CONFIG | dict(seed=1)), drawn)
    with refused("not empty"):
        evaluate("set", EvaluationConfig(**CONFIG), drawn / "parts")


# Judges and scales


@pytest.fixture(scope="module")
def measured(desk):
    """An evaluation that measures the scale of b; that of a is given."""
    before = Path.cwd()
    os.chdir(desk)
    try:
        evaluate("plain", EvaluationConfig(**MEASURED), desk / "measured")
    finally:
        os.chdir(before)
    return desk / "measured"


def test_a_judge_is_measured_and_marked_everywhere(measured, drawn):
    """The same reward, once as a judge and once among the others."""
    summaries = [json.loads((output / "summary.json").read_text()) for output in (measured, drawn)]
    assert [summary["judges"] for summary in summaries] == [["emoji_background"], []]
    assert [summary["held_out"] for summary in summaries] == [["emoji_background"]] * 2
    bases = [table(output).query("rule == 'base'").reset_index(drop=True) for output in (measured, drawn)]
    pd.testing.assert_series_equal(*(base["reward_emoji_background"] for base in bases))
    pages = [(output / "report.html").read_text() for output in (measured, drawn)]
    for text in ("emoji_background (judge) gain", "(judge: nothing was trained on it)", "The judge emoji_background"):
        assert [text in page for page in pages] == [True, False]


def test_without_a_judge_an_evaluation_is_described_as_before_there_were_any(drawn, measured):
    """So that one that was begun then is resumed."""
    described = [json.loads((output / "evaluation.json").read_text())["config"] for output in (drawn, measured)]
    assert ["judges" in config for config in described] == [False, True]


def test_a_scale_is_the_deviation_among_the_bases_images_of_one_prompt(measured):
    """σ² is the mean over prompts of the sample variance, of two images (r - r')² / 2."""
    base = table(measured).query("rule == 'base'")
    pairs = base.pivot(index="prompt", columns="seed", values="reward_compressibility")
    expected = ((pairs[0] - pairs[1]) ** 2 / 2).mean() ** 0.5
    summary = json.loads((measured / "summary.json").read_text())
    assert summary["scales"] == {"colourfulness": 5.0, "compressibility": pytest.approx(expected)}
    recorded = json.loads((measured / "evaluation.json").read_text())
    assert recorded["measured_scales"] == {"a": 5.0, "b": pytest.approx(expected)}
    assert recorded["scales"] == {"a": 5.0}


def test_measured_scales_are_those_of_rules_that_weigh_rewards_while_sampling(measured, desk):
    """`code` chooses by them: drawn with the measured scales given, it has the same images."""
    scales = json.loads((measured / "evaluation.json").read_text())["measured_scales"]
    rules = [{"rule": "code", "candidates": 2, "block_size": 2}]
    evaluate("plain", EvaluationConfig(**CONFIG | dict(rules=rules, scales=scales)), desk / "given")
    code = [table(output).query("rule == 'code'").reset_index(drop=True) for output in (measured, desk / "given")]
    pd.testing.assert_frame_equal(*map(without_costs, code))


def test_an_evaluation_that_is_resumed_measures_the_same_scales(measured):
    before, parts = table(measured), sorted((measured / "parts").iterdir())
    for part in (parts[0], *parts[3::2]):  # of the base too
        part.unlink()
    evaluate("plain", EvaluationConfig(**MEASURED), measured)
    pd.testing.assert_frame_equal(without_costs(table(measured)), without_costs(before))


def test_a_scale_that_cannot_be_measured_is_asked_for(desk, tmp_path):
    (desk / "flat.py").write_text("def flat(images, prompts):\n    return images.new_ones(len(images))\n")
    save_adapter(desk / "flat", desk / "base", "flat", reward="flat.py:flat", guidance="off")
    create_set(tmp_path / "set", [desk / "a", desk / "flat"])
    config = EvaluationConfig(**CONFIG | dict(rules=["product"], scales={"a": 1}))
    with refused("'flat'", "scales"):
        evaluate(tmp_path / "set", config, tmp_path / "out", trust_rewards=True)
    with refused("'a'", "seeds_per_prompt", "scale"):
        evaluate("plain", EvaluationConfig(**CONFIG | dict(seeds_per_prompt=1, scales={})), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_oracles_may_be_trained_in_other_units_than_are_measured(desk, tmp_path):
    """Regret is of the reward the oracle was trained on, Σ w r/s with its scales s: 5 and 0.2."""
    config = EvaluationConfig(**CONFIG | dict(rules=["product", "oracle"], scales={}, kl_seeds=0))
    summary = evaluate("set", config, tmp_path / "out")
    frame = table(tmp_path / "out").query("weights == 'a=0.5,b=0.5'")
    mean = frame.groupby("rule")[["reward_colourfulness", "reward_compressibility"]].mean()
    gap = mean.loc["oracle"] - mean.loc["product"]
    sigma = summary["scales"]
    ratios = np.array([sigma["colourfulness"] / 5, sigma["compressibility"] / 0.2])
    expected = (gap.iloc[0] / 5 + gap.iloc[1] / 0.2) / ratios.sum()  # weights that sum to 1 in units of σ
    (cell,) = (c for c in summary["cells"] if c["rule"] == "product" and c["weights"] == "a=0.5,b=0.5")
    assert cell["regret"]["mean"] == pytest.approx(expected)
    assert summary["rules"]["product"]["regret"]["mean"]["mean"] == pytest.approx(expected)


def test_a_set_of_one_objective_has_figures_and_a_page_and_no_fronts(desk, tmp_path):
    create_set(tmp_path / "set", [desk / "a"])
    config = EvaluationConfig(**CONFIG | dict(rules=["product"], scales={"a": 5.0}, kl_seeds=0))
    summary = evaluate(tmp_path / "set", config, tmp_path / "out")
    assert [cell["rule"] for cell in summary["cells"]] == ["base", "product"]
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"evaluation.json", "parts", "results.parquet", "summary.json", "report.html"}


# Folders


def test_overwriting_deletes_the_evaluation_and_nothing_else(drawn, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(drawn, output)
    (output / "parts" / "mine.txt").write_text("mine")
    (output / "notes.md").write_text("mine")
    place = output.stat().st_ino
    config = EvaluationConfig(**CONFIG | dict(rules=["product"], seed=1, kl_seeds=0))
    with refused("parts/mine.txt"):
        evaluate("set", config, output, overwrite=True)
    (output / "parts" / "mine.txt").rename(output / "mine.txt")
    with refused("nowhere"):
        evaluate("set", dataclasses.replace(config, prompts="nowhere.txt"), output, overwrite=True)
    assert (output / "results.parquet").read_bytes() == (drawn / "results.parquet").read_bytes()
    evaluate("set", config, output, overwrite=True)
    assert output.stat().st_ino == place
    assert len(table(output)) == 4 * 6
    assert (output / "notes.md").read_text() == (output / "mine.txt").read_text() == "mine"

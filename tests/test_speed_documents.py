"""What the documents say of speed and memory agrees with the measurements."""

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

from stepfuse.fuse.sampling.measure_gaps import describe_gaps
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.benchmark.sampling import sampling_table
from stepfuse.scripts.benchmark.serve import serve_table
from stepfuse.scripts.benchmark.settings import SamplingBenchmark, TrainingBenchmark
from stepfuse.scripts.cli.main import parse
from stepfuse.scripts.cli.options import settings_of
from stepfuse.scripts.load.soak import FLAT, account

ROOT = Path(__file__).parents[1]
SPEED = ROOT / "docs" / "speed"
ACCOUNT = (SPEED / "README.md").read_text()


def read(name: str) -> dict:
    return json.loads((SPEED / name).read_text())


def rows_of(name: str) -> dict[tuple[str, int], dict]:
    return {(row["way"], row["adapters"]): row for row in read(name)["rows"]}


def cells(document: str, begin: str) -> list[str]:
    (line,) = [line for line in document.splitlines() if line.startswith(f"| {begin}")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


@pytest.mark.parametrize("name", ["bench.json", "sd15-two-rows.json", "sd35.json", "flux.json", "qwen.json"])
def test_the_tables_are_those_of_the_measurements(name: str) -> None:
    assert sampling_table(read(name)) in ACCOUNT


def test_the_tables_of_the_gpu_are_those_of_its_check() -> None:
    measured = read("gpu.json")
    parts = measured["parts"]
    assert {part["status"] for part in parts.values()} == {"passed"}
    rows = parts["b-sd15-eager-1"]["result"]["rows"]
    assert sampling_table(parts["b-sd15-eager-1"]["result"]) in ACCOUNT
    ratio = {row["way"]: row["ratio"] for row in rows if row["adapters"] == 8}
    assert f"adapters takes {ratio['product']:.1f} times as long as one adapter" in " ".join(ACCOUNT.split())
    assert f"for each adapter, takes {ratio['set_adapters']:.1f} times. Of the 15" in " ".join(ACCOUNT.split())
    minutes = read("gpu-demo-results.json")["minutes"]
    assert f"took {minutes:.1f} minutes there" in ACCOUNT


@pytest.mark.parametrize(
    ("begin", "way"),
    [
        ("`product`: all", "product"),
        ("`systematic`", "systematic"),
        ("`soup`", "soup"),
        ("`product`, `--forwards", "separate"),
        ("peft's mixed batch", "mixed_batch"),
        ("Diffusion Blend:", "diffusion_blend"),
        ("diffusers: `set_adapters`", "set_adapters"),
    ],
)
def test_the_page_of_rules_has_the_measured_ratios(begin: str, way: str) -> None:
    rows = rows_of("bench.json")
    table = (ROOT / "docs/rules.md").read_text().split("| method | 2 adapters | 4 | 8 |")[1].split("\n\n")[0]
    assert cells(table, begin) == [f"{rows[way, n]['ratio']:.2f}" for n in (2, 4, 8)]


@pytest.mark.parametrize(("begin", "way"), [(f"`{way}`, at most", way) for way in ("product", "systematic", "soup")])
def test_goals_stand_beside_what_was_measured(begin: str, way: str) -> None:
    rows = rows_of("bench.json")
    assert cells(ACCOUNT, begin) == [f"{rows[way, n]['ratio']:.2f}" for n in (2, 4, 8)]


def test_the_report_states_the_measured_increases_of_memory() -> None:
    two, everything = rows_of("sd15-two-rows.json"), rows_of("sd15-all-rows.json")

    def more(rows: dict, key: str) -> float:
        return 100 * (rows["product", 8][key] / rows["one adapter", 1][key] - 1)

    expected = [
        f"{more(two, 'weights_mb'):.1f}",
        f"{more(two, 'peak_memory_mb'):.1f}",
        f"{more(everything, 'peak_memory_mb'):.0f}",
    ]
    memory = ACCOUNT.split("## Memory")[1].split("## The gate")[0]
    for text in (memory, (ROOT / "docs/how-to/small-gpu.md").read_text()):
        assert sorted(re.findall(r"([\d.]+) % (?:more|above)", re.sub(r"\s+", " ", text))) == sorted(expected)


def test_the_gaps_are_those_of_the_embedded_set() -> None:
    (profile,) = load_set("emoji").profiles
    assert describe_gaps(profile) in ACCOUNT


def test_the_commands_for_a_gpu_have_settings_that_can_be_measured() -> None:
    (block,) = [block for block in re.findall("```bash\n(.*?)```", ACCOUNT, re.DOTALL) if "--device cuda" in block]
    commands = [parse(shlex.split(line)[1:]) for line in block.replace("\\\n", " ").splitlines()]
    sampling, training = commands[:3], commands[3:]
    assert [settings_of(SamplingBenchmark, each, model=each.architecture).layers for each in sampling] == [0, 0, 0]
    assert {settings_of(TrainingBenchmark, each).model for each in training} == {"sd35"}


@pytest.mark.parametrize("name", ["sd35.json", "flux.json", "qwen.json"])
def test_the_depth_of_a_reduced_network_is_stated(name: str) -> None:
    assert f"\n{read(name)['depth']}.\n" in ACCOUNT


def test_the_measurements_name_their_machine_and_settings() -> None:
    for name in ("bench.json", "sd15-two-rows.json", "sd15-all-rows.json", "sd35.json", "flux.json", "qwen.json"):
        results = read(name)
        assert re.search(r"threads of \d+ cores, torch 2", results["machine"])
        assert results["settings"]["device"] == "cpu"
        assert results["lora"]["rank"] == 4


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("versions.json", "## Between versions"),
        ("versions-flow.json", "### With the flow"),
        ("versions-gpu.json", "### Without waits"),
    ],
)
def test_the_table_of_versions_is_of_their_measurements(name: str, section: str) -> None:
    measured, text = read(name), ACCOUNT.partition(section)[2].partition("\n### ")[0]
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert len(rows) == len(measured["sampling"]) + len(measured["training"])
    for what, method, *shown in rows:
        values = measured[what.partition(",")[0]][method]
        ratios = [new / old for old, new in zip(values["old"], values["new"], strict=True)]
        expected = [statistics.median(values["old"]), statistics.median(values["new"]), statistics.median(ratios)]
        assert [float(cell) for cell in shown] == pytest.approx(expected, abs=6e-4)


def test_the_table_of_the_server_is_of_its_measurement() -> None:
    text = (SPEED / "serve.md").read_text()
    assert serve_table(read("serve.json")) in text
    commands = re.findall(r"^stepfuse (benchmark serve .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert callable(parse(shlex.split(command)).run)


def test_the_soak_lasted_half_an_hour_and_found_nothing() -> None:
    soak = read("serve-soak.json")
    assert account(soak) in re.sub(r"\s+", " ", (SPEED / "serve.md").read_text())
    assert (soak["settings"]["minutes"], soak["faults"]) == (30, [])
    before, after = soak["memory"]["second_and_last_fifth"]["rss_mb"]
    assert after <= (1 + FLAT) * before


def test_the_times_of_the_page_are_those_of_the_measurement() -> None:
    pytest.importorskip("playwright", reason="the page is driven by playwright")
    from stepfuse.scripts.load.page import page_table

    assert page_table(read("serve-page.json")) in (SPEED / "serve.md").read_text()

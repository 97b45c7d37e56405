"""The benchmark: that every method of its table does what it is called, and what it counts and keeps."""

import json
import re
from dataclasses import replace

import pytest
import torch

from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.sets.create import create_set
from stepfuse.scripts.baselines.sampling import BASELINES
from stepfuse.scripts.benchmark import harness
from stepfuse.scripts.benchmark.harness import Method, measure
from stepfuse.scripts.benchmark.models import set_model
from stepfuse.scripts.benchmark.sampling import (
    ONE_ADAPTER,
    REFERENCE,
    Bench,
    Row,
    benchmark_sampling,
    memory_of,
    rows_of,
    sampling_table,
)
from stepfuse.scripts.benchmark.settings import SamplingBenchmark
from stepfuse.scripts.cli.main import main
from tests.fixtures_tiny import networks, refused, save_adapter, save_stable_diffusion

SCALE = 3.0


@pytest.fixture(scope="module")
def set_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    base = save_stable_diffusion(root / "base")
    save_adapter(root / "a", base, "a", rank=3)
    create_set(root / "set", [root / "a"])
    return root / "set"


@pytest.fixture(scope="module")
def settings(set_folder):
    return SamplingBenchmark(
        model=str(set_folder), adapters=(1, 3), images=2, steps=2, repeats=1, guidance_scale=SCALE, memory=False
    )


@pytest.fixture(scope="module")
def results(settings):
    return benchmark_sampling(settings)


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_predicts_the_average_of_what_each_adapter_predicts(settings, baseline):
    """Ours, one adapter after the other, guided by the adapter itself; peft's mixed batch shares the base's e_u."""
    bench = Bench(settings)
    names = bench.adapters
    guidance = "shared" if baseline == "mixed_batch" else "full"
    denoiser = replace(bench.sampler.denoiser, guidance=Guidance(source=guidance, scale=SCALE))
    t = torch.tensor(500)
    each = denoiser.predictions(bench.x_T, t, bench.conditioning, networks(*names))
    blend, _ = BASELINES[baseline].build(bench.unbatched(), bench.copy_of, names)
    with torch.no_grad():
        got = blend(bench.x_T, t, bench.conditioning)
    torch.testing.assert_close(got, torch.stack(each).mean(0), atol=3e-5, rtol=1e-5)
    assert (each[0] - each[1]).abs().max() > 1e-3


def test_a_set_lends_its_base_and_the_shape_of_its_adapters(set_folder):
    configs = set_model(str(set_folder), 5).unet.peft_config
    assert len(configs) == 5
    for config in configs.values():
        assert (config.r, config.target_modules) == (3, {"to_q", "to_k", "to_v", "to_out.0"})


def test_rows_are_counted_not_said(results):
    """Of an image at a step, by hooks on every UNet: N + 1 for the product, 2 for one network, 2 N for N networks."""
    counted = {(row["way"], row["adapters"]): row["rows_an_image"] for row in results["rows"]}
    assert counted == {
        (ONE_ADAPTER, 1): 2,
        ("product", 3): 4,
        ("systematic", 3): 2,
        ("soup", 3): 2,
        ("separate", 1): 2,
        ("separate", 3): 4,
        ("diffusion_blend", 1): 2,
        ("diffusion_blend", 3): 6,
        ("set_adapters", 1): 2,
        ("set_adapters", 3): 6,
        ("mixed_batch", 1): 2,
        ("mixed_batch", 3): 4,
    }
    assert all(row["rows_ratio"] == row["rows_an_image"] / 2 for row in results["rows"])


def test_the_median_lies_within_the_rounds_and_the_reference_is_one(settings):
    measured = benchmark_sampling(replace(settings, baselines=(), repeats=3))
    assert [(row["ratio_min"], row["ratio"], row["ratio_max"]) for row in measured["rows"][:1]] == [(1, 1, 1)]
    assert all(0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] for row in measured["rows"])
    assert torch.__version__ in measured["machine"]
    assert measured["libraries"]["torch"] == torch.__version__


def test_a_row_is_measured_for_each_number_of_adapters_and_one_adapter_of_a_rule_is_the_reference(settings):
    rows = rows_of(replace(settings, adapters=(1, 2), rules=("product",), baselines=("set_adapters",)))
    assert rows == [REFERENCE, Row("product", 2), Row("set_adapters", 1), Row("set_adapters", 2)]


def test_eight_adapters_weigh_what_their_factors_weigh(settings):
    """peft's own copy of N adapters and the stack of N + 1: 4-byte numbers, rank 3, over the layers' widths."""
    alone = replace(settings, images=1, steps=1, baselines=())
    bench = Bench(replace(alone, adapters=(1,)))
    layers = [module for name, module in bench.pipeline.unet.named_modules() if name.endswith(".base_layer")]
    factors = 4 * 3 * sum(sum(layer.weight.shape) for layer in layers)
    one, eight = (memory_of(replace(alone, adapters=(n,)), Row("product", n))["weights_mb"] for n in (1, 8))
    assert 1e6 * (eight - one) == pytest.approx(2 * 7 * factors)


def test_a_baseline_that_copies_the_network_weighs_as_many(settings):
    """Three times one UNet with one adapter, whatever the adapters of the model that they are copied from."""
    one, three = (memory_of(replace(settings, adapters=(n,)), Row("diffusion_blend", n))["weights_mb"] for n in (1, 3))
    assert three == pytest.approx(3 * one)


def test_what_does_not_fit_is_left_out_and_said(settings, monkeypatch):
    monkeypatch.setattr("stepfuse.scripts.benchmark.memory.free_memory", lambda device: 2e5)
    measured = benchmark_sampling(replace(settings, rules=()))
    assert set(measured["skipped"]) >= {"diffusion_blend, 3 adapters"}
    assert "diffusion_blend, 3 adapters: left out, copies of the network take" in sampling_table(measured)


def test_without_a_checkout_baselines_are_left_out_which_one_line_says(settings, monkeypatch, capsys):
    monkeypatch.setattr(harness, "has_baselines", lambda: False)
    few = replace(settings, rules=(), baselines=("separate", "set_adapters", "mixed_batch"))
    measured = benchmark_sampling(few)
    assert [(row["way"], row["adapters"]) for row in measured["rows"]] == [
        (ONE_ADAPTER, 1),
        ("separate", 1),
        ("separate", 3),
    ]
    line = (
        "set_adapters, mixed_batch: left out, comparing with other implementations needs a checkout of the repository."
    )
    assert capsys.readouterr().err.startswith(f"{line}\n")
    assert sampling_table(measured).splitlines()[-1] == line


def test_one_adapter_that_does_not_fit_is_an_error_and_other_methods_are_left_out():
    """Out of memory in the second round: 3 × 1 warm-up, then one more each."""
    calls = []

    def method(name, full=False):
        def run():
            calls.append(name)
            if full and calls.count(name) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return lambda: Method(run=run, close=lambda: calls.append(f"close {name}"))

    device = torch.device("cpu")
    builders = {"a": method("a"), "b": method("b", full=True), "c": method("c")}
    measured = measure(builders, repeats=2, device=device)
    assert calls == [*"abcab", "close b", *"cac", "close a", "close c"]
    assert {name: len(seconds) for name, seconds in measured.seconds.items()} == {"a": 2, "c": 2}
    assert measured.skipped == {"b": "out of memory"}
    calls.clear()
    with refused("b does not fit in memory; give less"):
        measure(builders, repeats=2, device=device, required=["b"], hint="give less")
    assert calls[-3:] == ["close a", "close b", "close c"]


def test_the_warm_up_may_be_another_run_and_batches_are_counted_in_it():
    class Network(torch.nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    network = Network(2, 2)

    def forward(rows, gradient):
        with torch.set_grad_enabled(gradient):
            network(torch.zeros(rows, 2))

    method = Method(
        run=lambda: forward(5, True), warm_up=lambda: (forward(3, True), forward(4, False)), networks=[network]
    )
    measured = measure({"a": lambda: method}, repeats=1, device=torch.device("cpu"))
    assert measured.batch_rows == {"a": (7, 3)}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_compiled_methods_run_beside_eager_ones(settings):
    torch.compiler.reset()
    measured = benchmark_sampling(replace(settings, compile="regional", rules=("product", "soup")))
    compiled = {row["way"] for row in measured["rows"] if row["compiled"]}
    assert compiled == {ONE_ADAPTER, "product", "soup"}
    assert {row["way"] for row in measured["rows"]} - compiled == {"separate", *BASELINES}
    torch.compiler.reset()


def test_times_are_reported_before_memory_is_measured(settings):
    seen = []
    small = replace(settings, rules=(), baselines=(), memory=True)
    benchmark_sampling(small, report=lambda r: seen.append(r["rows"][0]["peak_memory_mb"]))
    assert seen[0] is None
    assert seen[1] > 0


def test_the_table_has_a_line_a_row(results):
    lines = sampling_table(results).splitlines()
    assert len(lines) == 2 + len(results["rows"])
    row = next(row for row in results["rows"] if row["way"] == "product")
    (line,) = [line for line in lines if line.startswith("| product | 3 |")]
    assert f"| {row['ratio']:.2f} |" in line


# The command.


def test_the_command_writes_the_results_and_prints_the_table(set_folder, tmp_path, capsys):
    output = tmp_path / "new" / "bench.json"
    main(
        f"benchmark {set_folder} --adapters 1,2 --rules product --baselines= --images 1 --steps 1 "
        f"--repeats 1 --device cpu --output {output}".split()  # two rows, whose memory is measured in two processes
    )
    results = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert sampling_table(results) in printed
    assert (results["settings"]["adapters"], results["settings"]["rivals"]) == ([1, 2], [])
    assert [(row["way"], row["adapters"]) for row in results["rows"]] == [(ONE_ADAPTER, 1), ("product", 2)]
    assert all(row["peak_memory_mb"] > row["weights_mb"] > 0 for row in results["rows"])


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ("", "one of them"),
        ("SET --architecture sd15", "one of them"),
        ("SET --rules rgg", "rgg"),
        ("SET --rules sum", "'sum'"),
        ("SET --rivals lora_hub", "'lora_hub'"),
        ("SET --adapters 0", "adapters"),
        ("SET --repeats 0", "repeats"),
        ("SET --compile full --mode fast", "'fast'"),
        ("SET --mode reduce-overhead", "--compile"),
        ("SET --guidance_scale 1", "guidance_scale 1"),
    ],
)
def test_what_cannot_be_measured_is_named_and_nothing_is_written(set_folder, tmp_path, options, culprit):
    output = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as stop:
        main(
            ["benchmark", *options.replace("SET", str(set_folder)).split(), "--device", "cpu", "--output", str(output)]
        )
    assert re.fullmatch(r"error: [^\n]+", str(stop.value.code))
    assert culprit in stop.value.code
    assert not output.exists()


def test_results_that_are_there_are_kept(set_folder, tmp_path):
    output = tmp_path / "bench.json"
    output.write_text("mine")
    with pytest.raises(SystemExit, match="exists"):
        main(["benchmark", str(set_folder), "--output", str(output)])
    assert output.read_text() == "mine"

"""The benchmark of the server: that all methods draw the same images, and how times become figures."""

import json
from dataclasses import replace

import numpy as np
import pytest

from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.benchmark.serve import images_a_second, percentile, serve_table
from stepfuse.scripts.benchmark.serve_baseline import eta_of
from stepfuse.scripts.benchmark.serve_load import Answer, poisson_arrivals, random_requests
from stepfuse.scripts.cli.main import main


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("serve") / "serve.json"
    size = "--requests 4 --steps 2 --repeats 1 --rate 100 --light 2 --max_rows 4 --threads 1"
    main(["benchmark", "serve", "emoji", *size.split(), "--output", str(output)])
    return json.loads(output.read_text())


@pytest.mark.slow
def test_all_methods_draw_the_same_images(results):
    images = results["images"]
    assert images["equal_to_the_first_drawn_alone"] == images["drawn_by_the_server"] == 4 * 2 * 2
    assert images["largest_difference_to_set_adapters"] <= 2  # of 255: rounding, and sums in another order


@pytest.mark.slow
def test_every_method_is_measured_under_both_loads(results):
    rows = [(row["load"], row["way"]) for row in results["rows"]]
    assert len(rows) == len({*rows}) == 6
    assert {load for load, _ in rows} == {"heavy", "light"}
    assert results["requests_a_second"]["heavy"] == 100
    assert results["requests_a_second"]["light"] == pytest.approx(2 / results["seconds_an_image_of_set_adapters"])
    for row in results["rows"]:
        assert len(row["latencies"][0]) == 4
        assert 0 < row["p50_seconds"] <= row["p95_seconds"]
        assert (row["throughput_ratio"] == 1) == (row["way"] == "set_adapters")
        assert f"| {row['load']} | {row['way']} | {row['images_a_second']:.2f} |" in serve_table(results)


def answers(*times):
    return [Answer(arrival=arrival, answered=answered, pixels=np.zeros(0)) for arrival, answered in times]


def test_latency_counts_the_wait_and_throughput_the_whole_time():
    served = answers((0.0, 1.0), (0.5, 2.0), (3.0, 4.0))  # latencies 1, 1.5 and 1 in 4 seconds
    assert images_a_second(served) == 3 / 4
    assert percentile(served, 50) == 1
    assert percentile(served, 95) == pytest.approx(1.45)  # 0.9 of the way from 1 to 1.5


def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process():
    gaps = np.diff(poisson_arrivals(4001, 5.0, seed=0))
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 5, rel=0.1)  # of an exponential distribution, the mean
    assert poisson_arrivals(9, 5.0, seed=1) == poisson_arrivals(9, 5.0, seed=1) != poisson_arrivals(9, 5.0, seed=2)


def test_requests_are_of_different_mixtures():
    requests = random_requests(["x", "y"], ["a", "b", "c"], 32, seed=0, fields={})
    assert len({tuple(request.weights.values()) for request in requests}) == 32
    assert all(sum(request.weights.values()) == pytest.approx(1) for request in requests)


def test_the_eta_of_the_pipeline_has_the_variance_of_the_soup():
    loaded = load_set("emoji", read_weights=False)
    adapters = [
        replace(adapter, objective=replace(adapter.objective, variance=EtaSchedule(eta=eta)))
        for adapter, eta in zip(loaded.adapters, (1.0, 0.5, 0.0), strict=True)
    ]
    changed = replace(loaded, adapters=tuple(adapters))
    first, second, third = changed.names
    assert eta_of(changed, {first: 0.5, second: 0.5, third: 0.0}) ** 2 == pytest.approx((1 + 0.25) / 2)

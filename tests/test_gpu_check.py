"""What scripts/gpu_check counts and refuses, without a GPU; tests/pretended/test_gpu_check.py runs it."""

import os
import subprocess
import sys

import pytest
import torch

from stepfuse.scripts.gpu.check import main
from stepfuse.scripts.gpu.parts import all_parts, chosen
from stepfuse.scripts.gpu.shares import Span, covered, shares
from stepfuse.scripts.gpu.summary import summary
from tests.fixtures_tiny import refused


def test_shares_are_of_the_union_of_spans():
    """In 100 µs: kernels in [10, 40] and [30, 60] on two streams, launches of 5 and 15 µs, and a wait of 20."""
    spans = [
        Span("gemm", True, 10, 40),
        Span("norm", True, 30, 60),
        Span("Memcpy DtoH (Device -> Pinned)", True, 60, 70),
        Span("cudaLaunchKernel", False, 0, 5),
        Span("cuLaunchKernelEx", False, 5, 20),
        Span("cudaStreamSynchronize", False, 70, 90),
        Span("cudaMemcpyAsync", False, 60, 70),
        Span("aten::mm", False, 0, 60),
    ]
    found = shares(spans, 100e-6)
    counts = {kind: value["count"] for kind, value in found.items() if kind != "seconds"}
    assert counts == {"launches": 2, "waits": 1, "copies": 1, "kernels": 2}
    for kind, share in dict(launches=0.2, waits=0.2, copies=0.1, kernels=0.5).items():
        assert found[kind]["share"] == pytest.approx(share)
    assert covered([]) == 0


def test_parts_are_chosen_by_the_beginnings_of_their_names():
    parts = all_parts(pretend=False)
    assert chosen(["e", "c-sd35"], parts) == ["e", "c-sd35-ddpo", "c-sd35-dpo"]
    assert chosen(["b"], parts) == [
        f"b-{model}-{how}-{images}"
        for how in ("eager", "graphs", "compiled")
        for model in ("sd15", "sdxl", "sd35", "flux")
        for images in (1, 8)
    ]
    assert chosen(["c-sd35-dpo", "a", "c-sd35"], parts) == ["c-sd35-dpo", "a", "c-sd35-ddpo"]
    with refused("no part 'b-sd'; expected some of a, e, b-sd15-eager-1"):
        chosen(["b-sd"], parts)


def test_the_summary_divides_by_the_fastest_way_that_was_measured():
    """Baselines of 30, 40 and 50 ms beside 20 ms eager and 10 ms with graphs."""

    def part(**seconds):
        rows = [
            {"way": way, "adapters": 2, "seconds_a_step": 1e-3 * value, "ratio": 1.5} for way, value in seconds.items()
        ]
        return {"status": "passed", "seconds": 1.0, "result": {"rows": rows}}

    eager = part(product=20, diffusion_blend=30, set_adapters=40, mixed_batch=50)
    parts = {"b-flux-eager-1": eager, "b-flux-graphs-1": part(product=10)}
    failed = {"a": {"status": "failed", "seconds": 1.0, "result": None, "reason": "no luck"}}
    text = summary({"machine": "one", "parts": parts | failed})
    assert "| flux | 1 | 2 | 20.0 | 10.0 | – | 1.50 | 1.50 | – | 3.00 | 4.00 | 5.00 |" in text.splitlines()
    assert "a: failed, no luck" in text.splitlines()


def test_another_file_is_no_place_for_results(tmp_path):
    output = tmp_path / "bench.json"
    output.write_text('{"rows": []}')
    with refused("holds no results of scripts/gpu_check"):
        main(["--output", str(output)])
    assert output.read_text() == '{"rows": []}'


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "stepfuse.scripts.gpu.check", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.stderr == (
        "error: no CUDA device; run this where there is one, or try its parts on a pretended one: --pretend\n"
    )
    assert (done.returncode, done.stdout, output.exists()) == (1, "", False)

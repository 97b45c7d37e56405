"""The soak of a server: a short one as it is run, and that it sees what it is there to see."""

import json
from collections import Counter

import psutil
import pytest

from stepfuse.scripts.load.soak import main
from stepfuse.scripts.load.tally import Tally
from stepfuse.scripts.load.watch import Sample, Watch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("soak") / "soak.json"
    size = "--pool 6 --most_steps 2 --sizes 32x32 --clients 2 --max_queue 2 --max_rows 2 --threads 1"
    main(["emoji", "--minutes", "0.05", *size.split(), "--output", str(output)])  # exits with 1 for any fault
    return json.loads(output.read_text())


def test_a_server_under_mixed_load_answers_every_request_as_it_answers_it_alone(results):
    assert results["faults"] == []
    requests = results["requests"]
    assert {"200", "400", "404", "405", "413", "415", "429"} == set(requests["answers"])
    assert requests["left"] >= 3  # a stream, a request and a body, each once at least
    assert requests["images"] > requests["drawn_alone"]


def test_a_server_that_is_told_to_stop_draws_what_it_has_accepted(results):
    stopped = results["stopped"]
    assert stopped["exit_status"] == 0
    assert stopped["drawn"] == stopped["sent"] == 2
    assert set(stopped["later_requests"]) <= {"503", "no connection"}
    assert sum(stopped["at_sigterm"].values()) > 0


def seen():
    tally = Tally()
    for status in (200, 200, 429):
        tally.answered(status, images=2 if status == 200 else 0)
    tally.abandoned(images=3)
    return tally


@pytest.mark.parametrize("drawn", [2, 3])  # with or without the request whose client left
def test_counts_that_agree_are_no_fault(drawn):
    assert seen().compare(Counter({200: drawn, 499: 3 - drawn, 429: 1}), 4 if drawn == 2 else 7) == []


@pytest.mark.parametrize(
    ("counted", "images"),
    [
        ({200: 1, 499: 1, 429: 1}, 4),  # one lost
        ({200: 4, 499: 0, 429: 1}, 4),  # one doubled
        ({200: 2, 499: 1, 429: 1, 500: 1}, 4),
        ({200: 2, 499: 1}, 4),
        ({200: 2, 499: 1, 429: 1}, 8),
    ],
)
def test_counts_that_do_not_agree_are_a_fault(counted, images):
    assert len(seen().compare(Counter(counted), images)) >= 1


def watch(rss, threads=(9,) * 10):
    samples = [
        Sample(seconds=5.0 * k, rss_mb=mb, threads=n, files=12)
        for k, (mb, n) in enumerate(zip(rss, threads, strict=True))
    ]
    return Watch(process=psutil.Process(), every=5.0, samples=samples)


def test_memory_that_grows_is_told_from_memory_that_is_flat():
    """Of ten samples, the third and fourth are compared with the last two."""
    flat, grows = [300.0] + [600.0, 612.0] * 4 + [606.0], [500.0 + 10 * k for k in range(10)]
    assert watch(flat).grown(share=0.02) == []
    (line,) = watch(grows).grown(share=0.02)  # 525 and 585 MB
    assert "525.0" in line
    assert "585.0" in line
    assert len(watch(flat, range(9, 29, 2)).grown(share=0.02)) == 1  # 14 and 26 threads

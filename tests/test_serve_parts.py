"""Parts of the server: turns in the queue, numbers of rows that agree, and several sets on one base."""

import platform
import threading

import httpx2
import numpy as np
import psutil
import pytest
import torch
from diffusers import DDIMScheduler

from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sampling.equal_counts import candidates, find_equal_counts, mean_cost
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.scripts.serve.access import is_loopback
from stepfuse.scripts.serve.fair_queue import FairQueue
from stepfuse.scripts.serve.host_memory import release_free_memory
from stepfuse.scripts.serve.served_sets import names_of
from tests.fixtures_serve import load_service, picture, running_service, settings_of
from tests.fixtures_tiny import generators, save_adapter, save_stable_diffusion


def test_clients_take_turns_and_each_is_first_in_first_out():
    queue = FairQueue(10)
    for client, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)]:
        queue.put(client, item)
    assert list(queue) == [1, 4, 5, 2, 6, 3]
    assert [queue.take() for _ in range(6)] == [1, 4, 5, 2, 6, 3]
    with pytest.raises(IndexError):
        queue.take()


def test_a_queue_is_full_for_all_or_for_one():
    queue = FairQueue(3, 2)
    queue.put("a", 1)
    queue.put("a", 2)
    assert queue.is_full("a")
    assert not queue.is_full("b")
    queue.put("b", 3)
    assert queue.is_full("c")
    assert queue.remove(2)
    assert not queue.remove(2)
    assert list(queue) == [1, 3]


def test_candidates_are_few_and_near_to_each_other():
    assert candidates(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert candidates(10) == [1, 2, 3, 4, 6, 8, 10]
    assert candidates(1) == [1]


def by_kernels(*limits):
    """A forward whose rows depend on how many there are: another kernel from each limit on."""

    def forward(rows):
        kernel = sum(len(rows) >= limit for limit in limits)
        return torch.tensor([[float(row), float(kernel)] for row in rows])

    return forward


def test_counts_that_agree_are_found():
    assert find_equal_counts(by_kernels(), candidates(8)) == candidates(8)
    # Kernels change at 4 and at 16: of {1, 2, 3}, {4, 6, 8, 12} and {16} the second is the cheapest.
    assert find_equal_counts(by_kernels(4, 16), candidates(16)) == [4, 6, 8, 12]


def test_rows_that_depend_on_their_position_go_alone():
    def forward(rows):
        return torch.tensor([[row + 1e-6 * (place > 0)] for place, row in enumerate(rows)], dtype=torch.float64)

    assert find_equal_counts(forward, candidates(8)) == [1]


def test_the_mean_cost_is_that_of_the_fewest_rows_in_vain():
    # Forwards of 2 rows cost 5; one of k rows would cost k + 3: 1 -> 5/4, 2 -> 5/5, 3 -> 10/6, 4 -> 10/7.
    assert mean_cost([2], 4) == pytest.approx((5 / 4 + 1 + 10 / 6 + 10 / 7) / 4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
def test_freed_memory_between_what_stays_is_returned():
    memory = psutil.Process().memory_info
    release_free_memory()  # or blocks would take the place of what is free now
    begin = memory().rss
    blocks = [bytearray(b"x" * 50_000) for _ in range(2000)]
    full = memory().rss
    assert full - begin > 80e6
    last = blocks[-1]
    del blocks
    release_free_memory()
    assert full - memory().rss > 80e6
    assert len(last) == 50_000


def test_addresses_that_only_this_machine_reaches():
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.8.0.1", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.0.1", "example.org", ""]))


def test_steps_asked_for_by_several_threads_are_ones_own():
    path = NoisePath.from_scheduler(DDIMScheduler(clip_sample=False))
    expected = {count: path.steps(count) for count in (5, 10, 50)}
    wrong = []

    def ask(count):
        for _ in range(200):
            if path.steps(count) != expected[count]:
                wrong.append(count)

    threads = [threading.Thread(target=ask, args=(count,)) for count in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("folder", "name", "source"),
    [
        ("outputs/demo/set", "demo", "outputs/demo/set"),
        ("outputs/style", "style", "outputs/style"),
        ("outputs/set", "set", "outputs/set"),
        ("/srv/mine/set", "mine", "mine/set"),
        ("../mine/set", "mine", "mine/set"),
        ("ada/fox@main", "ada/fox", "ada/fox@main"),
    ],
)
def test_a_set_is_named_by_its_folder_and_loaded_by_a_relative_path_or_its_id(
    folder, name, source, tmp_path, monkeypatch
):
    """A folder that is only called `set` has the name of the one around it; others do not see absolute paths."""
    monkeypatch.chdir(tmp_path)
    if "@" not in folder and not folder.startswith(("/", "..")):
        (tmp_path / folder).mkdir(parents=True)
    assert names_of(folder) == (name, source)


def test_sets_of_one_base_share_it_and_their_forwards(tmp_path):
    base = save_stable_diffusion(tmp_path / "base")
    for number in range(2):  # objectives of the same names, and other adapters
        folders = [tmp_path / f"{name}{number}" for name in "ab"]
        for seed, folder in enumerate(folders, 2 * number):
            save_adapter(folder, base, folder.name[0], seed=seed, variance=EtaSchedule(eta=0.7))
        create_set(tmp_path / f"set{number}", folders, base_schedule=EtaSchedule(eta=0.5))
    with running_service(load_service(tmp_path / "set0", tmp_path / "set1")) as server:
        names = ["set0", "set1"]
        assert list(server.service.sets) == names
        body = {"prompt": "a fox", "weights": {"a": 1, "b": 1}, "seed": 1, "steps": 2, "rule": "product"}
        bodies = [body | {"model": name} for name in names]
        together = server.draw_together(bodies)
        assert [settings_of(files[0])["set"] for files in together] == names
        assert together == [server.draw(each) for each in bodies]
        for name, files in zip(names, together, strict=True):
            alone = FusedSampler.from_pretrained(tmp_path / name)
            pixels = alone.sample(
                "a fox",
                {"a": 1, "b": 1},
                generator=generators(1),
                num_inference_steps=2,
                output_type="pt",
                progress=False,
            )
            found = np.asarray(picture(files[0])) / 255
            assert np.abs(found - pixels[0].permute(1, 2, 0).numpy()).max() < 0.6 / 255
        assert np.abs(np.asarray(picture(together[0][0])).astype(int) - np.asarray(picture(together[1][0]))).max() > 1
        unknown = server.post(bodies[1] | {"weights": {"alpha": 1}}).json()["error"]["message"]
        assert unknown.startswith("weights name the objective 'alpha'; this set has a, b")
        assert "a=2, b=-1;" in server.post(bodies[1] | {"weights": {"a": 2, "b": -1}, "rule": "switch"}).text
        assert server.post({"prompt": "a fox"}).json()["error"]["param"] == "model"
        assert len({id(each.sampler.denoiser.network) for each in server.service.sets.values()}) == 1
        assert str(tmp_path) not in httpx2.get(f"{server.url}/v1/sets").text

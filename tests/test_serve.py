"""The server: requests in company and alone, in OpenAI's shape, as streams, and what ends them."""

import base64
import json
import socket
import threading
import time
from dataclasses import replace
from itertools import product

import httpx2
import numpy as np
import openai
import pytest
import torch

from stepfuse.fuse.rules.registry import RULES
from stepfuse.scripts.serve.access import Access
from tests.fixtures_serve import PATH, another, events_of, picture, running_service, settings_of
from tests.fixtures_tiny import generators

PROMPT = "a fox on a green background"
NAMES = ["compressibility", "colourfulness", "alignment"]
MIXED = dict(zip(NAMES, (0.2, 0.3, 0.5), strict=True))


@pytest.fixture(scope="module")
def server(emoji_service):
    with running_service(another(emoji_service)) as running:
        yield running


def request(seed=0, **more):
    return {"prompt": PROMPT, "weights": MIXED, "seed": seed, "steps": 2} | more


def test_a_request_has_the_same_bits_alone_and_beside_others_of_every_kind(server):
    kinds = [
        {"rule": "soup"},
        {"rule": "product", "strength": 0.8},
        {"rule": "switch", "steps": 3},
        {"rule": "base", "n": 2},
        {"rule": "average_noise", "guidance": "full", "guidance_scale": 2.0},
        {"rule": "soup", "guidance": "shared", "negative_prompt": "a house"},
        {"rule": "soup_factors", "weights": {"alignment": 1.0, "colourfulness": 1.0}},
        {"rule": "product", "size": "32x32", "priority": "low"},
        {"rule": "oracle", "weights": {"alignment": 1.0}, "output_format": "webp"},
        {"weights": "alignment=0.9@0-0.5,0.2@0.5-1,colourfulness=0.5"},
    ]
    bodies = [request(seed, **kind) for seed, kind in enumerate(kinds)]
    forwards = server.metric("stepfuse_forward_rows_count")
    together = server.draw_together(bodies)
    shared = server.metric("stepfuse_forward_rows_count") - forwards
    assert together == [server.draw(body) for body in bodies]
    alone = server.metric("stepfuse_forward_rows_count") - forwards - shared
    assert shared < alone  # they did share forwards


def test_the_image_is_the_samplers(server):
    (file,) = server.draw(request(7, rule="product"))
    sampler = server.service.sets["emoji"].sampler.with_rule("product")  # a forward for each adapter
    pixels = sampler.sample(
        PROMPT, MIXED, generator=generators(7), num_inference_steps=2, output_type="pt", progress=False
    )
    assert np.abs(np.asarray(picture(file)) / 255 - pixels[0].permute(1, 2, 0).numpy()).max() < 0.6 / 255


def test_the_settings_in_a_picture_draw_it_again(server):
    first = server.draw(request(3, n=2, rule="product", strength=0.9, negative_prompt="a dog", guidance="shared"))
    for seed, file in enumerate(first, 3):
        settings = settings_of(file)
        assert (settings["seed"], settings["steps"], settings["width"]) == (seed, 2, 64)
        again = {name: settings[name] for name in settings if name not in ("stepfuse", "set", "width", "height")}
        assert server.draw(again | {"model": settings["set"], "size": "64x64"}) == [file]


def test_weights_that_change_over_the_steps_are_settings_with_all_their_digits(server):
    third = 2 / 3
    body = request(4, weights=f"alignment=1@0-{third!r},colourfulness=1@{third!r}-1", steps=3)
    (file,) = server.draw(body)
    assert server.draw(body | {"weights": settings_of(file)["weights"]}) == [file]


def test_a_strip_of_seeds_has_settings_that_draw_it_again(server):
    body = request(4, n=2, layout="strip")
    (file,) = server.draw(body)
    settings = settings_of(file)
    again = {name: settings[name] for name in ("prompt", "weights", "seed", "steps", "n", "layout")}
    assert server.draw(again) == [file]


def test_a_list_of_weights_is_drawn_from_one_noise_as_images_a_strip_and_a_loop(server):
    ends = [{"alignment": 1 - k / 2, "colourfulness": k / 2} for k in range(3)]
    body = request(5, weights=ends)
    assert server.draw(body) == [server.draw(request(5, weights=each))[0] for each in ends]
    (strip,) = server.draw(body | {"layout": "strip"})
    assert picture(strip).width > 3 * 128  # enlarged, side by side
    for output_format in ("gif", "webp"):
        (loop,) = server.draw(body | {"layout": "loop", "output_format": output_format})
        shown = picture(loop)
        assert (shown.format.lower(), shown.n_frames, shown.size) == (output_format, 4, (256, 256))


def test_openais_client_draws_an_image_unchanged(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["emoji"]
    answer = client.images.generate(
        model="emoji", prompt=PROMPT, n=1, size="64x64", extra_body={"weights": MIXED, "seed": 1, "steps": 2}
    )
    assert answer.size == "64x64"
    (file,) = server.draw(request(1, steps=2))
    assert base64.b64decode(answer.data[0].b64_json) == file
    stream = client.images.generate(
        model="emoji", prompt=PROMPT, stream=True, extra_body={"weights": MIXED, "seed": 1, "steps": 2}
    )
    last = [event for event in stream if event.type == "image_generation.completed"]
    assert [event.b64_json for event in last] == [answer.data[0].b64_json]
    with pytest.raises(openai.BadRequestError, match="unknown field"):
        client.images.generate(model="emoji", prompt=PROMPT, extra_body={"wieghts": MIXED})


def test_a_stream_tells_the_steps_and_then_the_pictures(server):
    answer = server.post(request(2, n=2, stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    steps = [data["step"] for name, data in events if name == "image_generation.progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 2
    done = [data for name, data in events if name == "image_generation.completed"]
    assert [(data["index"], data["seed"]) for data in done] == [(0, 2), (1, 3)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_request(server, stream):
    body = json.dumps(request(0, steps=200, stream=stream)).encode()
    cancelled = server.metric('stepfuse_requests_total{status="499"}')
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        connection.sendall(head.encode() + b"\r\n" + body)
        wait_for(lambda: server.service.engine.running == 1)
    wait_for(lambda: server.service.engine.running == 0)
    wait_for(lambda: server.metric('stepfuse_requests_total{status="499"}') == cancelled + 1)


def wait_for(fact):
    deadline = time.monotonic() + 30
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_queue_a_late_request_and_a_stopping_server_are_told(server):
    with running_service(another(server.service, exact=False, max_rows=1, max_waiting=1, time_limit=6.0)) as server:
        answers = []
        longer = request(0, n=4, rule="product", steps=200)  # than the time limit by far
        threads = [threading.Thread(target=lambda: answers.append(server.post(longer))) for _ in range(2)]
        engine = server.service.engine
        for number, thread in enumerate(threads, 1):
            thread.start()
            wait_for(lambda number=number: engine.running + engine.waiting == number)
        refused = server.post(request(0))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [504, 504]
        server.service.engine.refuse()
        stopping = server.post(request(0))
        assert (stopping.status_code, stopping.json()["error"]["code"]) == (503, "stopping")
        assert httpx2.get(f"{server.url}/health").json()["status"] == "stopping"


def test_a_stop_lets_what_was_accepted_end(server):
    with running_service(another(server.service)) as other:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(other.post(request(0, steps=4)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        engine = other.service.engine
        wait_for(lambda: engine.running + engine.waiting == 3)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200, 200]


def test_low_priority_is_drawn_in_the_rows_that_are_left(server):
    with running_service(another(server.service, exact=False, max_rows=2)) as server:
        order = []
        bodies = [("low", request(1, steps=12, priority="low")), ("normal", request(2, steps=6, n=2))]
        threads = []
        for name, body in bodies:
            thread = threading.Thread(target=lambda name=name, body=body: (server.draw(body), order.append(name)))
            thread.start()
            threads.append(thread)
            wait_for(lambda: server.service.engine.running >= len(threads))
        for thread in threads:
            thread.join()
        assert order == ["normal", "low"]


def test_a_large_request_does_not_keep_others_waiting(server):
    with running_service(another(server.service, exact=False, max_rows=4)) as server:
        order = []

        def draw(name, **more):
            server.draw(request(0, **more))
            order.append(name)

        large = threading.Thread(target=draw, args=["large"], kwargs=dict(n=4, rule="product", steps=8))
        large.start()
        wait_for(lambda: server.service.engine.running == 1)
        draw("small", steps=1)
        large.join()
        assert order == ["small", "large"]


def test_a_fault_of_the_engine_ends_its_requests_and_not_itself(server, monkeypatch):
    service = another(server.service, exact=False)
    with running_service(service) as other, monkeypatch.context() as patch:
        patch.setattr("stepfuse.scripts.serve.engine.split", lambda *_: 1 / 0)
        assert other.post(request(0)).status_code == 500
        assert httpx2.get(f"{other.url}/health").json()["status"] == "failing"
        patch.undo()
        assert other.post(request(0)).status_code == 200
        assert httpx2.get(f"{other.url}/health").json()["status"] == "ok"


def test_a_token_is_asked_for_where_there_is_one(server):
    access = Access(token="0123456789abcdef", any_host=True)
    with running_service(another(server.service, access=access)) as guarded:
        wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \u00e9".encode()}]
        for headers, path in product(wrong, ("/v1/sets", "/metrics", "/v1/models", "/no/such/path")):
            assert httpx2.get(f"{guarded.url}{path}", headers=headers).status_code == 401
            assert guarded.post(request(0), headers=headers).status_code == 401
        assert guarded.post(request(0), headers={"Authorization": f"Bearer {access.token}"}).status_code == 200
        assert httpx2.get(f"{guarded.url}/health").status_code == 200
        assert httpx2.get(f"{guarded.url}/").status_code == 200


def test_without_a_token_a_page_of_another_site_cannot_draw(server):
    for name in ("127.0.0.2:80", "LOCALHOST", "[::1]:8000"):
        assert httpx2.get(f"{server.url}/health", headers={"Host": name}).status_code == 200
    rebound = server.post(request(0), headers={"Host": "attacker.example:8000"})
    assert rebound.status_code == 403
    simple = httpx2.post(f"{server.url}{PATH}", content=json.dumps(request(0)), headers={"Content-Type": "text/plain"})
    assert simple.status_code == 415
    policy = httpx2.get(f"{server.url}/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_forward_too_large_for_the_memory_is_split(server, monkeypatch):
    service = another(server.service, exact=False)
    forwards = service.engine.forwards
    real = forwards._forward
    sizes = []

    def small(pieces, count):
        sizes.append(count)
        if count > 3:  # a stand-in: a memory that is full cannot be had in a test
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pieces, count)

    monkeypatch.setattr(forwards, "_forward", small)
    with running_service(service) as other:
        assert len(other.draw(request(0, n=4))) == 4
    assert max(sizes) > 3


def test_memory_that_is_too_small_for_decoding_is_told(server, monkeypatch):
    service = another(server.service, exact=False)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")  # as above

    monkeypatch.setattr("stepfuse.fuse.sampling.batch_invariant.decode_finite", full)
    with running_service(service) as other:
        answer = other.post(request(0))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")


def test_a_forward_that_fails_ends_its_requests_and_no_others(server, monkeypatch):
    service = another(server.service, exact=False)
    real = service.engine.forwards._forward

    def failing(pieces, count):
        if any(len(piece.network.weights) == 0 for piece in pieces):
            raise RuntimeError("a fault of the network at /root/secret")
        return real(pieces, count)

    monkeypatch.setattr(service.engine.forwards, "_forward", failing)
    with running_service(service) as other:
        failed = other.post(request(0, rule="base"))
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal")
        assert "/root" not in failed.text
        assert other.post(request(0)).status_code == 200


def test_a_set_is_known_by_its_adapters_and_rules_by_plain_words(emoji_service):
    served = emoji_service.sets["emoji"]
    first, *others = served.loaded.adapters
    changed = replace(served.loaded, adapters=(replace(first, sha256="0" * 64), *others))
    described, other = served.describe(), replace(served, loaded=changed).describe()
    assert described == served.describe()
    assert described["id"] != other["id"]
    summaries = {rule["name"]: rule["summary"] for rule in described["rules"]}
    assert summaries["soup"] == "One network with the weighted sum of the LoRAs; the cheapest."
    assert all(RULES[name].summary == summary and summary.endswith(".") for name, summary in summaries.items())

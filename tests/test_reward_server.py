"""A reward behind HTTP: the same scores, one token, and one clear line for each thing that can go wrong."""

import contextlib
import functools
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest
import torch

from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.server import RewardServer
from stepfuse.rewards.worker.messages import decode, encode
from tests.fixtures_tiny import refused

TOKEN = "a-token-of-some-length"
IMAGES = (torch.rand(7, 3, 8, 9, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
PROMPTS = [f"number {i} 番" for i in range(7)]


def telling(images, prompts):
    """Tells every image and every prompt apart."""
    return (images * 255).round().sum((1, 2, 3)) * 100 + torch.tensor([float(p.split()[1]) for p in prompts])


@pytest.fixture
def serve(monkeypatch):
    """Serve a reward; its address."""
    monkeypatch.setenv("STEPFUSE_REWARD_TOKEN", TOKEN)
    running = []

    def start(reward=telling):
        server = RewardServer(reward, name="mine", address=("127.0.0.1", 0), token=TOKEN)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        running.append((server, thread))
        return server.url

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def post(url, body, token=TOKEN, path="/score", **headers):
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.request("POST", path, body, {"Authorization": f"Bearer {token}"} | headers)
    response = connection.getresponse()
    said = response.read()
    connection.close()
    return response.status, said


def message(images=None, prompts=PROMPTS[:2], **extra):
    images = np.zeros((2, 4, 5, 3), np.uint8) if images is None else images
    return encode({"kind": "score", "id": 0, "prompts": prompts} | extra, [images])


def test_scores_are_those_of_the_reward_itself_in_order(serve):
    url = serve()
    assert load_reward(url)(IMAGES, PROMPTS).tolist() == telling(IMAGES, PROMPTS).tolist()
    reward = load_reward(serve(colourfulness))
    torch.testing.assert_close(reward(IMAGES, PROMPTS), colourfulness(IMAGES, PROMPTS))


def test_a_reward_file_names_the_server_its_token_and_the_size_of_a_batch(serve, tmp_path, monkeypatch):
    sizes = []

    def counting(images, prompts):
        sizes.append(len(images))
        return telling(images, prompts)

    url = serve(counting)
    monkeypatch.delenv("STEPFUSE_REWARD_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "there.yaml").write_text(f"http:\n  url: {url}\n  token_file: token\n  batch_size: 3\n")
    found = load_reward(str(tmp_path / "there.yaml"))(IMAGES, PROMPTS)
    assert found.tolist() == telling(IMAGES, PROMPTS).tolist()
    assert sizes == [3, 3, 1]


def test_many_clients_at_once_get_each_their_own_scores(serve):
    url, found = serve(), {}

    def ask(i):
        found[i] = load_reward(url)(IMAGES[i : i + 1], PROMPTS[i : i + 1]).item()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(7)] == telling(IMAGES, PROMPTS).tolist()


@pytest.mark.parametrize("token", ["", "another-token-of-some-length", TOKEN[:-1], TOKEN + "x"])
def test_a_wrong_token_is_refused_and_says_where_it_is_taken_from(token, serve, monkeypatch, tmp_path):
    called = []
    url = serve(lambda images, prompts: called.append(1))
    monkeypatch.setenv("STEPFUSE_REWARD_TOKEN", token)
    large = torch.zeros(16, 3, 640, 640)  # 20 MB, more than a socket holds: the answer must be read all the same
    for images in (IMAGES, large):
        with refused(url, "rejects the token", "STEPFUSE_REWARD_TOKEN"):
            load_reward(url)(images, [""] * len(images))
    if token:
        (tmp_path / "token").write_text(token)
        (tmp_path / "there.yaml").write_text(f"http: {{url: '{url}', token_file: token}}")
        with refused(url, "rejects the token", "token"):
            load_reward(str(tmp_path / "there.yaml"))(IMAGES, PROMPTS)
    assert post(url, message(), token=token)[0] == 401
    assert not called


@pytest.mark.parametrize("token", ["", "two words", "two\nlines", "tökén-of-some-length", "\x00"])
def test_a_token_that_is_none_is_refused_without_being_shown(token, tmp_path, monkeypatch):
    (tmp_path / "token").write_text(token)
    (tmp_path / "there.yaml").write_text("http: {url: 'http://127.0.0.1:1', token_file: token}")
    with refused("token file", "one word") as _:
        load_reward(str(tmp_path / "there.yaml"))
    if token and "\x00" not in token:
        monkeypatch.setenv("STEPFUSE_REWARD_TOKEN", token)
        with pytest.raises(ValueError, match="STEPFUSE_REWARD_TOKEN") as error:
            load_reward("http://127.0.0.1:1")
        assert token not in str(error.value)


def test_the_token_goes_to_no_other_address(serve, monkeypatch):
    """A server that sends its clients elsewhere, and a proxy for everything: neither gets a request."""
    elsewhere = []
    with socket.socket() as other, socket.socket() as listener:
        for one in (other, listener):
            one.bind(("127.0.0.1", 0))
            one.listen()
            one.settimeout(5)
        there = f"http://127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", there)

        def redirect():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(f"HTTP/1.1 303 See\r\nLocation: {there}/score\r\nContent-Length: 0\r\n\r\n".encode())

        thread = threading.Thread(target=redirect)
        thread.start()
        with refused("303"):
            load_reward(f"http://127.0.0.1:{listener.getsockname()[1]}")(IMAGES[:1], PROMPTS[:1])
        thread.join()
        assert load_reward(serve())(IMAGES, PROMPTS).tolist() == telling(IMAGES, PROMPTS).tolist()
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            elsewhere.append(other.accept())
    assert not elsewhere


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"GET me out of here", 400),
        (message()[:-1], 400),
        (message() + b"x", 400),
        (message(np.zeros((2, 4, 5, 3), np.float32)), 400),
        (message(np.zeros((2, 4, 5), np.uint8)), 400),
        (message(np.zeros((2, 4, 5, 4), np.uint8)), 400),
        (message(np.zeros((2, 0, 5, 3), np.uint8)), 400),
        (message(prompts=["one"]), 400),
        (message(prompts="ab"), 400),
        (message(prompts=[1, 2]), 400),
        (encode({"prompts": ["a"]}), 400),
        (encode({}, [np.zeros((1, 2, 2, 3), np.uint8)]), 400),
    ],
)
def test_a_request_that_is_none_is_refused_and_the_server_goes_on(body, status, serve):
    url = serve()
    assert post(url, body)[0] == status
    assert load_reward(url)(IMAGES, PROMPTS).tolist() == telling(IMAGES, PROMPTS).tolist()


def test_other_paths_methods_and_lengths_are_refused(serve):
    url = serve()
    assert post(url, message(), path="/")[0] == 404
    assert post(url, b"", **{"Content-Length": str(10**12)})[0] == 413
    assert post(url, b"", **{"Content-Length": "-5"})[0] == 411
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.request("GET", "/score")
    assert connection.getresponse().status == 405
    connection.close()
    status, answer = post(url, message(prompts=["a 1", "b 2"]))
    assert (status, decode(answer)[1][0].tolist()) == (200, [1.0, 2.0])


def test_what_a_reward_raises_there_is_said_here(serve):
    def broken(images, prompts):
        raise RuntimeError("no such colour")

    url = serve(broken)
    with refused("mine", "no such colour", url):
        score(load_reward(url), IMAGES, PROMPTS, name="mine")
    with refused("nan", "number 1"):
        load_reward(serve(lambda images, prompts: torch.tensor([0.0, float("nan")])))(IMAGES[:2], PROMPTS[:2])


def test_a_server_that_runs_out_of_memory_says_so_and_goes_on(serve):
    def hungry(images, prompts):
        if len(images) == 1:
            raise MemoryError("no room")
        return telling(images, prompts)

    url = serve(hungry)
    with refused(url, "no room"):
        load_reward(url)(IMAGES[:1], PROMPTS[:1])
    assert load_reward(url)(IMAGES, PROMPTS).tolist() == telling(IMAGES, PROMPTS).tolist()


def test_a_server_that_is_not_there_is_named_with_what_starts_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with refused(f"http://127.0.0.1:{port}", "stepfuse reward serve"):
        load_reward(f"http://127.0.0.1:{port}")(IMAGES, PROMPTS)


def http_response(body):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.fixture
def answering():
    """A server that answers every request with these bytes: its address, and the requests."""
    asked, threads = [], []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer(response):
            with contextlib.suppress(OSError):  # the listener is shut down
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        asked.append(connection.recv(65536))
                        connection.sendall(response)

        def start(response):
            threads.append(threading.Thread(target=answer, args=(response,)))
            threads[-1].start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}", asked

        yield start
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    "response",
    [b"", b"hello\r\n\r\n", http_response(b"hello")[:-2]],
    ids=["closes at once", "no HTTP", "cut off"],
)
def test_a_server_whose_answer_does_not_arrive_is_asked_twice_and_named(response, answering):
    url, asked = answering(response)
    with refused(url, "twice", "images 0 to 0", "stepfuse reward serve"):
        load_reward(url)(IMAGES[:1], PROMPTS[:1])
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("body", "culprits"),
    [
        (b"hello", ["b'hello'", "a message"]),
        (encode({"kind": "scores", "id": 77}, [np.zeros(1)]), ["'id': 77", "request 1"]),
        (encode({"kind": "scores"}, [np.zeros(2)]), ["[(2,)]", "expected", "shape (1,)"]),
        (encode({"kind": "scores"}), ["shapes []", "expected", "shape (1,)"]),
        (encode({"kind": "images"}, [np.zeros(1)]), ["'images'", "expected the scores"]),
    ],
    ids=["no message", "another request's", "two scores for an image", "none", "no scores"],
)
def test_a_wrong_answer_is_not_asked_for_again_and_said_beside_what_was_expected(body, culprits, answering):
    url, asked = answering(http_response(body))
    with pytest.raises(ValueError, match=re.escape(url)) as error:
        load_reward(url)(IMAGES[:1], PROMPTS[:1])
    assert all(culprit in str(error.value) for culprit in culprits)
    assert not any(hint in str(error.value) for hint in ("twice", "stepfuse reward serve", "\n"))
    assert len(asked) == 1


def test_a_server_that_hangs_is_given_up(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        (tmp_path / "there.yaml").write_text(f"http: {{url: '{url}', timeout: 0.5}}")
        with refused(url, "0.5 s"):
            load_reward(str(tmp_path / "there.yaml"))(IMAGES[:1], PROMPTS[:1])


@pytest.mark.parametrize("url", ["http://", "https:nowhere", "ftp://a"])
def test_an_address_that_is_none_is_named(url):
    with refused(url.split(":")[0]):
        load_reward(url)


def test_a_short_token_and_a_port_that_is_taken_are_refused(serve):
    with refused("16"):
        RewardServer(telling, name="mine", address=("127.0.0.1", 0), token="short")
    port = int(serve().rpartition(":")[2])
    for taken in (port, 99999):
        with refused(str(taken)):
            RewardServer(telling, name="mine", address=("127.0.0.1", taken), token=TOKEN)


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    command = [sys.executable, "-m", "stepfuse.scripts.cli.main", "reward", "serve", "colourfulness", "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "STEPFUSE_REWARD_TOKEN"}
    # Where tests run in the background, an interrupt is ignored, and what they start would ignore it too.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, cwd=tmp_path, env=environment, preexec_fn=listen) as process:
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
            token = process.stdout.readline().rpartition("=")[2].strip()
            (tmp_path / "token").write_text(token)
            (tmp_path / "there.yaml").write_text(f"http: {{url: '{url}', token_file: token}}")
            found = load_reward(str(tmp_path / "there.yaml"))(IMAGES, PROMPTS)
            torch.testing.assert_close(found, colourfulness(IMAGES, PROMPTS))
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "interrupted"

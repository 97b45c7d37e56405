"""What the server refuses: one sentence that names the culprit, with a status of 4xx, and nothing drawn."""

import json
import os

import httpx2
import pytest

from stepfuse.scripts.cli.main import main
from stepfuse.scripts.serve.drawing import Limits, read_drawing
from stepfuse.scripts.serve.errors import RequestError
from tests.fixtures_serve import PATH, another, running_service

WEIGHTS = {"alignment": 1.0}
REFUSED = {
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "a prompt that is no text": ({"prompt": ["a fox"]}, 400, "prompt"),
    "a long prompt": ({"prompt": "a" * 4001}, 400, "prompt"),
    "half a character": ({"prompt": "\ud800"}, 400, "prompt"),
    "an unknown objective": ({"weights": {"beauty": 1.0}}, 400, "beauty"),
    "a mistyped objective": ({"weights": {"alignement": 1.0}}, 400, "did you mean 'alignment'"),
    "weights with an infinite sum": ({"weights": {"alignment": 1e308, "colourfulness": 1e308}}, 400, "not finite"),
    "weights that sum to 0": ({"weights": {"alignment": 0.0}}, 400, "sum to 0"),
    "a weight that is a text": ({"weights": {"alignment": "much"}}, 400, "alignment"),
    "a weight that is a truth": ({"weights": {"alignment": True}}, 400, "alignment"),
    "a weight beyond floats": ({"weights": {"alignment": 10**400}}, 400, "alignment"),
    "weights that are a number": ({"weights": 1}, 400, "weights"),
    "no weights in a list": ({"weights": []}, 400, "0 mixtures"),
    "too many mixtures": ({"weights": [WEIGHTS] * 65}, 400, "65 mixtures"),
    "another count than mixtures": ({"weights": [WEIGHTS] * 2, "n": 3}, 400, "n is 3"),
    "a strength below 0": ({"strength": -1}, 400, "strength"),
    "a strength beyond the valid": ({"strength": 1e6, "rule": "kl"}, 400, "0 to 2"),
    "a rule with rewards": ({"rule": "code"}, 400, "code"),
    "a rule that is a file": ({"rule": "/etc/evil.py:Rule"}, 400, "expected one of"),
    "an option of another rule": ({"rule": "soup", "rule_options": {"gate": 1}}, 400, "gate"),
    "an option of another type": ({"rule": "product", "rule_options": {"gate": "wide"}}, 400, "gate"),
    "an option with the name of an argument": ({"rule": "product", "rule_options": {"name": "x"}}, 400, "'name'"),
    "an option beyond floats": ({"rule": "product", "rule_options": {"gate": 10**400}}, 400, ""),
    "a size that is no size": ({"size": "large"}, 400, "size"),
    "a size that cannot be drawn": ({"size": "65x64"}, 400, "65"),
    "a size beyond the limit": ({"size": "4096x4096"}, 400, "16,384 pixels"),
    "no images": ({"n": 0}, 400, "n is 0"),
    "too many images": ({"n": 17}, 400, "1 to 16"),
    "half an image": ({"n": 1.5}, 400, "n is 1.5"),
    "no steps": ({"steps": 0}, 400, "steps"),
    "too many steps": ({"steps": 201}, 400, "1 to 200"),
    "a seed below 0": ({"seed": -1}, 400, "seed"),
    "a seed beyond 64 bits": ({"seed": 2**64}, 400, "seed"),
    "guidance of another kind": ({"guidance": "strong"}, 400, "guidance"),
    "guidance that the base does not take": ({"guidance": "embedded"}, 400, "embedded"),
    "addresses of images": ({"response_format": "url"}, 400, "b64_json"),
    "another format": ({"output_format": "bmp"}, 400, "bmp"),
    "a format that is not of the layout": ({"layout": "loop", "output_format": "png"}, 400, "gif or webp"),
    "a quality": ({"quality": "hd"}, 400, "no effect"),
    "a name of many characters": ({"weights": {"a" * 900_000: 1}}, 400, "weights name"),
    "an unknown field": ({"strenght": 1}, 400, "did you mean 'strength'"),
    "another set": ({"model": "dall-e-3"}, 404, "expected one of emoji"),
    "a stream that is a text": ({"stream": "yes"}, 400, "stream"),
}


@pytest.fixture(scope="module")
def server(emoji_service):
    with running_service(another(emoji_service)) as running:
        yield running


def check(answer, status, word):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    message = error["message"]
    assert word in message
    assert "\n" not in message
    assert len(message) <= 600
    assert error["type"] == ("invalid_request_error" if status != 401 else "authentication_error")
    assert "/work" not in answer.text
    assert os.getcwd() not in answer.text


@pytest.mark.parametrize("case", REFUSED)
def test_a_field_at_fault_is_named(server, case):
    changes, status, word = REFUSED[case]
    body = {"prompt": "a fox", "seed": 0, "steps": 1} | changes
    answer = server.post(None, content=json.dumps(body), headers={"Content-Type": "application/json"})
    check(answer, status, word)


def test_a_strength_beyond_the_valid_is_told_with_the_largest(server):
    # eta 1 for all experts: any strength leaves the product a precision, and switch has probabilities up to 1 only.
    answer = server.post({"prompt": "a fox", "rule": "switch", "strength": 1.5})
    check(answer, 400, "0 to 1")


@pytest.mark.parametrize(
    ("content", "status", "word"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[1]", 400, "JSON object"),
        (b'"a fox"', 400, "JSON object"),
        (b'{"prompt": "a fox", "strength": NaN}', 400, "NaN is not a number in JSON"),
        (b'{"prompt": "a fox", "weights": {"alignment": Infinity}}', 400, "Infinity"),
        (b"\xff\xfe", 400, "UTF-8"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, "1,048,576 bytes"),
    ],
    ids=["nothing", "half", "list", "text", "nan", "infinity", "latin", "deep", "10 MB"],
)
def test_what_is_not_a_request_in_json_is_refused(server, content, status, word):
    answer = httpx2.post(f"{server.url}{PATH}", content=content, headers={"Content-Type": "application/json"})
    check(answer, status, word)


def test_other_paths_and_methods_are_refused(server):
    check(httpx2.get(f"{server.url}/no/such"), 404, "GET /v1/sets")
    check(httpx2.get(f"{server.url}/page/..%2f..%2fapp.py"), 404, "no such")
    check(httpx2.get(f"{server.url}/page/app.py"), 404, "no such file")
    check(httpx2.get(f"{server.url}{PATH}"), 405, "GET is not a method")
    check(httpx2.get(f"{server.url}/docs"), 404, "GET /v1/sets")


def test_a_prompt_comes_back_as_text_and_in_no_other_way(server):
    script = "<script>alert(1)</script>"
    answer = server.post({"prompt": "a fox", "weights": {script: 1.0}})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert script in answer.json()["error"]["message"]


def test_every_refusal_is_counted_once(server):
    before = server.metric('stepfuse_requests_total{status="400"}')
    server.post({"prompt": 1})
    server.post({})
    assert server.metric('stepfuse_requests_total{status="400"}') == before + 2
    assert server.metric('stepfuse_requests_total{status="500"}') == 0


def test_null_is_as_if_a_field_were_left_out():
    drawing = read_drawing({"prompt": "a fox", "weights": None, "n": None, "strength": 0}, Limits())
    assert (drawing.weights, drawing.count, drawing.strength) == (None, 1, 0.0)
    with pytest.raises(RequestError, match="missing"):
        read_drawing({"prompt": None}, Limits())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["no/such/set"], "no/such/set"),
        (["emoji", "--host", "0.0.0.0"], "--token_file"),
        (["emoji", "--mode", "reduce-overhead"], "add --compile"),
        (["emoji", "--compile", "full", "--mode", "reduce-overhead", "--device", "cpu"], "CUDA graphs"),
        (["emoji", "--host", "256.256.256.256", "--public"], "cannot listen on 256.256.256.256:8000"),
        (["emoji", "emoji"], "two sets are named 'emoji'"),
    ],
)
def test_what_cannot_be_served_ends_in_one_line(arguments, word, monkeypatch):
    monkeypatch.delenv("STEPFUSE_SERVE_TOKEN", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    message = str(ended.value.code)
    assert message.startswith("error: ")
    assert word in message
    assert "\n" not in message


def test_a_port_in_use_is_named(server):
    port = server.url.rpartition(":")[2]
    with pytest.raises(SystemExit, match=rf"cannot listen on 127\.0\.0\.1:{port} .*choose another --port"):
        main(["serve", "emoji", "--port", port])

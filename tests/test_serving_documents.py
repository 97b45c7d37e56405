"""The commands and examples of docs/serving.md, sent to a server on the bundled set as they stand."""

import base64
import io
import json
import re
import shlex
import subprocess

import pytest
from PIL import Image

from stepfuse.scripts.cli.main import main, parse
from tests.fixtures_documents import ROOT, blocks
from tests.fixtures_serve import another, running_service

DOCUMENT, WRITTEN = "docs/serving.md", "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def address(emoji_service):
    with running_service(another(emoji_service)) as running:
        yield running.url


def lines():
    """The words of each command; one that has a line's end in quotes goes on in the next line."""
    text = "".join(blocks(DOCUMENT, "bash"))
    written = re.findall(r"(?:[^\n'#]|'[^']*'|#[^\n]*)+", text)
    return [shlex.split(line, comments=True) for line in written]


def picture(answer):
    (data,) = answer["data"]
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


def test_every_stepfuse_command_is_parsed():
    written = [words for words in lines() if words[0] == "stepfuse"]
    assert len(written) >= 7
    for words in written:
        assert callable(parse(words[1:]).run)


def test_requests_by_curl_are_answered(address, tmp_path):
    written = [words for words in lines() if words[0] == "curl"]
    answers = []
    for words in written:
        words = [word.replace(WRITTEN, address) for word in words]
        subprocess.run([*words, "--silent", "--show-error", "--fail"], cwd=tmp_path, check=True)
        answers.append(json.loads((tmp_path / "answer.json").read_text()))
    one, strip = answers
    assert one["data"][0]["settings"]["weights"] == {"colourfulness": 0.7, "alignment": 0.3}
    assert picture(one).size == (64, 64)
    assert picture(strip).width > 3 * 64


def test_the_example_in_python_draws_and_streams(address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "".join(blocks(DOCUMENT, "python"))
    assert WRITTEN in code
    names = {}
    exec(compile(code.replace(WRITTEN, address), DOCUMENT, "exec"), names)
    names["client"].close()
    written = {file.name: Image.open(io.BytesIO(file.read_bytes())).size for file in tmp_path.iterdir()}
    assert written == dict.fromkeys(["fox.png", "fox-0.png", "fox-1.png"], (64, 64))
    assert "10 of 10 steps, position 0" in capsys.readouterr().out


def test_loras_for_comfyui_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = [words[1:] for words in lines() if words[1:2] == ["set"]]
    for words in written:
        main(words)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["alignment.safetensors", "mixture.safetensors"]


def test_every_metric_that_is_named_is_there(address):
    named = set(re.findall(r"`(stepfuse_\w+)", (ROOT / DOCUMENT).read_text()))
    scraped = subprocess.run(["curl", "--silent", f"{address}/metrics"], capture_output=True, text=True).stdout
    there = set(re.findall(r"^# TYPE (\w+) (?:counter|gauge|histogram)", scraped, re.MULTILINE))
    assert named == {name for name in there if not name.endswith("_created")}

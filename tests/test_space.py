"""`stepfuse publish --space`, by the real client, to a hub on this machine. No Space is built or run there."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import HfApi, SpaceCard
from packaging.requirements import Requirement
from PIL import Image

from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import copy_set, create_set
from stepfuse.fuse.sets.space_files import requirement
from stepfuse.scripts.cli.main import main
from tests.fixtures_hub import hub_of_clients
from tests.fixtures_tiny import refused, save_adapter, save_stable_diffusion

SET, SPACE = "ada/emoji-rewards", "ada/emoji"
FORK = "git+https://example.org/ada/stepfuse@1a2b3c4"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """With two adapters of the bundled set, as ada published them with their Space."""
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch, hub_of_clients(root, patch) as hub:
        patch.setenv("HF_TOKEN", "hf_of_ada")
        copy_set("emoji", root / "whole")
        create_set(root / "set", [root / "whole" / name for name in load_set("emoji").names[:2]])
        run("publish", root / "set", SET, "--space", SPACE, "--yes")
        hub.set = root / "set"
        yield hub


def run(*arguments):
    main([str(argument) for argument in arguments])


def stopped(*arguments):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    raise ValueError(str(error.value.code))


def read(name, space=SPACE):
    with open(HfApi().hf_hub_download(space, name, repo_type="space")) as file:
        return file.read()


def steps(dockerfile):
    """The instructions of a Dockerfile; those in JSON as lists."""
    lines = [line.partition(" ") for line in dockerfile.splitlines() if line and not line.startswith("#")]
    return [(word, json.loads(rest) if rest.startswith("[") else rest) for word, _, rest in lines]


def files(space):
    return {file.rfilename for file in HfApi().space_info(space).siblings} - {".gitattributes"}


def test_the_space_runs_the_commit_of_the_set_that_was_made_before_it(hub):
    sha = HfApi().model_info(SET).sha
    (command,) = [given for word, given in steps(read("Dockerfile")) if word == "CMD"]
    assert command[:3] == ["stepfuse", "serve", f"{SET}@{sha}"]
    assert HfApi().list_repo_commits(SPACE, repo_type="space")[0].title == f"Serve {SET}@{sha}"
    assert f"`{sha}`" in read("README.md")
    assert load_set(command[2]).names == load_set(hub.set).names


def test_its_card_has_what_the_hub_asks_of_a_docker_space(hub):
    """Colours and the length of the description: the hub here refuses what the reference of Spaces does not have."""
    info, card = HfApi().space_info(SPACE), SpaceCard(read("README.md")).data
    assert (info.sdk, card.sdk, info.private) == ("docker", "docker", False)
    assert (card.title, card.license, card.models) == ("emoji", "apache-2.0", [SET])
    assert "stepfuse" in card.tags
    instructions = dict(steps(read("Dockerfile")))
    port = instructions["CMD"][instructions["CMD"].index("--port") + 1]
    assert str(card.app_port) == instructions["EXPOSE"] == port


def test_its_packages_are_the_tested_ones_and_torch_is_the_build_for_the_cpu(hub):
    installs = [given for word, given in steps(read("Dockerfile")) if word == "RUN" and "pip" in given]
    torch, stepfuse = installs
    assert torch[-3:-1] == ["--index-url", "https://download.pytorch.org/whl/cpu"]
    assert torch[-1] in read("constraints.txt").splitlines()
    assert stepfuse[-1].startswith("stepfuse[serve]==")
    assert "constraints.txt" in stepfuse


def test_the_space_alone_is_written_for_a_set_on_the_hub_and_again_only_if_it_changes(hub, capsys):
    first = HfApi().space_info(SPACE).sha
    for words in ([SET], [hub.set, SET]):
        run("publish", *words, "--space", SPACE, "--yes")
        assert HfApi().space_info(SPACE).sha == first
    run("publish", f"{SET}@main", "--space", SPACE, "--package", FORK, "--torch", "cu128", "--yes")
    instructions = steps(read("Dockerfile"))
    installs = [given for word, given in instructions if word == "RUN" and "pip" in given]
    assert installs[0][-2:] == ["https://download.pytorch.org/whl/cu128", "torch"]
    assert installs[1][-1] == f"stepfuse[serve] @ {FORK}"
    before = instructions.index(("RUN", installs[0]))
    assert any("install --yes --no-install-recommends git" in str(given) for _, given in instructions[:before])
    assert files(SPACE) == {"README.md", "Dockerfile"}  # the constraints of the release are deleted
    run("publish", SET, "--space", SPACE, "--yes")
    assert files(SPACE) == {"README.md", "Dockerfile", "constraints.txt"}
    assert "it installs stepfuse[serve] @ git+" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "installed"),
    [
        ("stepfuse==2.0", "stepfuse[serve]==2.0"),
        ("stepfuse[ocr]>=1", "stepfuse[ocr,serve]>=1"),
        (FORK, f"stepfuse[serve] @ {FORK}"),
        (f"other @ {FORK}", f"other[serve] @ {FORK}"),
    ],
)
def test_what_is_installed_can_always_serve(given, installed):
    assert Requirement(requirement(given)) == Requirement(installed)


def test_a_dry_run_shows_the_files_and_sends_nothing(hub, capsys):
    for words in ([hub.set, "ada/other", "--space", "ada/other"], [SET, "--space", "ada/other"]):
        hub.requests.clear()
        run("publish", *words, "--dry-run")
        assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
        said = capsys.readouterr().out
        for text in ("sdk: docker", "FROM python:3.11-slim", "constraints.txt", "nothing was sent"):
            assert text in said
    assert HfApi().model_info(SET).sha in said  # of a set that is there, the commit is known


def test_what_the_space_cannot_load_by_itself_needs_a_secret(hub, capsys):
    run("publish", hub.set, "ada/closed", "--space", "ada/closed", "--private", "--yes")
    assert "HF_TOKEN" in capsys.readouterr().out
    assert HfApi().space_info("ada/closed").private
    run("publish", "ada/closed", "--space", "ada/open", "--yes")
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "HF_TOKEN" in line]
    assert "ada/closed is private" in note
    assert "hf_of_ada" not in note
    with refused(SPACE, "public"):
        stopped("publish", SET, "--space", SPACE, "--private", "--yes")


def test_a_space_of_others_is_not_overwritten(hub):
    api = HfApi()
    api.create_repo("ada/gradio", repo_type="space", space_sdk="gradio")
    with refused("ada/gradio", "SDK gradio"):
        stopped("publish", SET, "--space", "ada/gradio", "--yes")
    api.create_repo("ada/docker", repo_type="space", space_sdk="docker")
    api.upload_file(path_or_fileobj=b"FROM scratch", path_in_repo="Dockerfile", repo_id="ada/docker", repo_type="space")
    with refused("ada/docker", "not written by stepfuse"):
        stopped("publish", SET, "--space", "ada/docker", "--yes")
    with refused("bob/emoji", "hub answers"):
        stopped("publish", SET, "--space", "bob/emoji", "--yes")


def test_if_only_the_space_is_refused_the_set_is_there_and_the_command_for_the_rest_is_told(hub):
    with refused("bob/emoji", "the set is there", "stepfuse publish ada/twice@"):
        stopped("publish", hub.set, "ada/twice", "--space", "bob/emoji", "--yes")
    assert load_set("ada/twice").names == load_set(hub.set).names


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([SET, "--space", "emoji"], ["--space 'emoji'", "OWNER/NAME"]),
        ([SET, "--space", f"{SPACE}@main"], [f"'{SPACE}@main'", "OWNER/NAME"]),
        (["ada/nothing", "--space", SPACE], ["'ada/nothing'", "no repository on the hub"]),
        ([f"{SET}@nowhere", "--space", SPACE], ["nowhere", "no such revision"]),
        (["emoji", "--space", SPACE], ["'emoji'", "stepfuse publish emoji OWNER/NAME"]),
        ([SET, "--space", SPACE, "--revision", "next"], ["SET@next"]),
        ([SET, "--space", SPACE, "--package", "two words"], ["--package 'two words'", "git+https"]),
        ([SET, "--space", SPACE, "--torch", "cpu; true"], ["--torch 'cpu; true'", "cu128"]),
        (["emoji", SET, "--package", "stepfuse"], ["--package", "--space OWNER/NAME"]),
        (["emoji"], ["OWNER/NAME"]),
    ],
)
def test_what_no_space_can_be_written_from_is_refused(hub, words, parts):
    with refused(*parts):
        stopped("publish", *words, "--yes")


def test_a_set_that_the_space_could_not_load_is_refused(hub, tmp_path):
    """The base is a folder here, or nowhere; or nobody said what the licence is."""
    base = save_stable_diffusion(tmp_path / "base")
    save_adapter(tmp_path / "a", base, "a")
    for name, given, parts in [
        ("local", dict(license="mit"), [str(base), "--base"]),
        ("nowhere", dict(license="mit", base="ada/absent"), ["'ada/absent'", "no repository on the hub"]),
        ("unlicensed", dict(base="ada/absent"), ["'a'", "--license"]),
    ]:
        create_set(tmp_path / name, [tmp_path / "a"], **given)
        HfApi().create_repo(f"ada/{name}")
        HfApi().upload_folder(repo_id=f"ada/{name}", folder_path=tmp_path / name)
        with refused(*parts):
            stopped("publish", f"ada/{name}", "--space", "ada/never", "--yes")
    assert not HfApi().repo_exists("ada/never", repo_type="space")


@pytest.mark.slow
def test_what_the_space_starts_loads_the_set_with_the_secret_and_lets_anybody_draw(hub, tmp_path):
    """The Dockerfile's CMD as a process, on another port; its image is not built here."""
    run("publish", hub.set, "ada/secret", "--space", "ada/secret", "--private", "--yes")
    ((_, command),) = [step for step in steps(read("Dockerfile", "ada/secret")) if step[0] == "CMD"]
    command[command.index("--port") + 1] = "0"
    command += ["--max_rows", "2"]  # few numbers of rows to try
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HOME": str(tmp_path / "new" / "home")}
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    body = json.dumps({"prompt": "a fox on a green background", "steps": 2, "seed": 0}).encode()
    with subprocess.Popen(
        command, env=os.environ | here | settings | {"HF_TOKEN": "hf_of_ada"}, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            name, _, address = server.stdout.readline().strip().partition(" at ")
            assert name == "ada/secret"
            with urlopen(address.replace("0.0.0.0", "127.0.0.1") + "/") as page:
                # The hub shows a Space in a frame of its own page.
                assert "x-frame-options" not in page.headers
                assert "frame-ancestors" not in page.headers["content-security-policy"]
            request = Request(page.url + "v1/images/generations", body, {"Content-Type": "application/json"})
            with urlopen(request) as answer:
                (picture,) = json.load(answer)["data"]
        finally:
            server.terminate()
    assert picture["settings"]["set"] == "ada/secret"
    assert Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).size == (64, 64)

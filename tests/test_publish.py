"""`stepfuse publish` and `pull`, by the real client, to and from a hub on this machine."""

import json
import os
import pty
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi

from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.pipeline import FusedPipeline
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.card import card
from stepfuse.fuse.sets.create import copy_set, create_set
from stepfuse.fuse.sets.hub import fetch_set
from stepfuse.fuse.sets.manifest import MANIFEST
from stepfuse.fuse.sets.publish import prepare, publish
from stepfuse.scripts.cli.main import main
from tests.fixtures_hub import TRIES, hub_of_clients
from tests.fixtures_sampler import save_set, save_three_adapters
from tests.fixtures_tiny import generators, refused, save_adapter, save_stable_diffusion
from tests.hub_server import Cuts

REPOSITORY = "ada/emoji-rewards"
TOKEN = "hf_of_ada"

either_way = pytest.mark.parametrize("hub", ["xet", "lfs"], indirect=True)


@pytest.fixture
def hub(request, tmp_path, monkeypatch):
    """Logged in as ada."""
    with hub_of_clients(tmp_path, monkeypatch, xet=getattr(request, "param", "xet") == "xet") as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set of the embedded one's adapters, without its oracles."""
    root = tmp_path_factory.mktemp("made")
    copy_set("emoji", root / "whole")
    create_set(root / "set", [root / "whole" / name for name in load_set("emoji").names])
    return root / "set"


@pytest.fixture
def mine(made, tmp_path):
    return shutil.copytree(made, tmp_path / "mine")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def draw(place):
    pipe = FusedPipeline.from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    weights = {"compressibility": 0.2, "colourfulness": 0.5, "alignment": 0.3}
    options = dict(num_inference_steps=2, output_type="pt", generator=generators(0, 1))
    return pipe(["a red apple on a blue background", "a fox on a green background"], weights, **options).images


def run(*arguments):
    main([str(argument) for argument in arguments])


@either_way
def test_what_is_pulled_is_what_was_published_to_the_last_bit_of_its_images(hub, mine, tmp_path, capsys):
    expected = draw(mine)
    run("publish", mine, REPOSITORY, "--private", "--yes")
    run("pull", REPOSITORY, tmp_path / "pulled")
    published = contents(mine)
    pulled = contents(tmp_path / "pulled")
    assert pulled.keys() == published.keys() | {"README.md"}
    assert all(pulled[name] == published[name] for name in published)
    assert torch.equal(draw(tmp_path / "pulled"), expected)
    assert torch.equal(draw(REPOSITORY), expected)
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert HfApi().model_info(REPOSITORY).private


def test_it_is_one_commit_with_a_card_the_hub_reads(hub, mine):
    run("publish", mine, REPOSITORY, "--yes")
    commits = HfApi().list_repo_commits(REPOSITORY)
    assert [one.title for one in commits] == [
        "Adapter set: alignment, colourfulness, compressibility",
        "initial commit",
    ]
    card = HfApi().model_info(REPOSITORY).card_data
    assert (card.license, card.library_name, card.model_name) == ("apache-2.0", "diffusers", "emoji-rewards")
    assert len(card.eval_results) == 3
    assert HfApi().model_info(REPOSITORY, files_metadata=True).siblings


def test_a_base_of_the_hub_is_related_as_the_hub_relates_adapters(hub, tmp_path):
    folders = save_three_adapters(tmp_path, save_stable_diffusion(tmp_path / "base"))
    create_set(tmp_path / "set", list(folders.values()), base="owner/base", license="mit", base_license="mit")
    text = prepare(tmp_path / "set", REPOSITORY, ask_hub=False).files["README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("owner/base", "adapter")
    assert "[owner/base](https://huggingface.co/owner/base)" in text


@either_way
def test_an_upload_cut_in_the_middle_and_repeated_sends_what_had_not_arrived(hub, mine):
    """The second adapter's; no commit is made of half a set."""
    size = (mine / "alignment" / WEIGHTS).stat().st_size
    before = [one.commit_id for one in _made(hub)]
    sent = prepare(mine, REPOSITORY)
    hub.cut_uploads = Cuts(after=size // 2, times=TRIES, skip=1)
    with refused(REPOSITORY, "ry again"):
        publish(sent)
    assert [one.commit_id for one in _made(hub)][1:] == before
    arrived = [one for one in hub.uploads() if one.status == 200]
    assert len(arrived) == 1
    hub.requests.clear()
    publish(prepare(mine, REPOSITORY))
    assert len(hub.uploads()) == 2
    assert torch.equal(draw(REPOSITORY), draw(mine))


def _made(hub):
    try:
        return HfApi().list_repo_commits(REPOSITORY)
    except OSError:
        return []


def test_a_published_set_is_changed_in_place_and_the_old_one_can_still_be_had(hub, mine, tmp_path):
    run("publish", mine, REPOSITORY, "--yes")
    first = HfApi().model_info(REPOSITORY).sha
    expected = draw(f"{REPOSITORY}@{first}")
    create_set(tmp_path / "fewer", [mine / "alignment", mine / "colourfulness"])
    publication = prepare(tmp_path / "fewer", REPOSITORY)
    assert publication.stale == (f"compressibility/{WEIGHTS}",)
    assert "deleted  compressibility/" in str(publication)
    publish(publication)
    assert load_set(REPOSITORY).names == ["alignment", "colourfulness"]
    assert torch.equal(draw(f"{REPOSITORY}@{first}"), expected)
    hub.requests.clear()
    publish(prepare(tmp_path / "fewer", REPOSITORY))  # once more: nothing changes
    assert hub.uploads() == []


def test_it_can_be_sent_to_a_branch(hub, mine):
    run("publish", mine, REPOSITORY, "--yes", "--revision", "next")
    assert MANIFEST not in HfApi().list_repo_files(REPOSITORY)
    assert load_set(f"{REPOSITORY}@next").names == load_set(mine).names
    with refused(REPOSITORY, MANIFEST):
        load_set(REPOSITORY)


def test_every_command_that_takes_a_set_takes_its_id(hub, mine, tmp_path, capsys):
    run("publish", mine, REPOSITORY, "--yes")
    run("set", "validate", REPOSITORY, "--load")
    run("set", "show", REPOSITORY)
    run("set", "export", REPOSITORY, "alignment", "--output", tmp_path / "alignment.safetensors")
    run("set", "merge", REPOSITORY, "--output", tmp_path / "merged.safetensors")
    prompt = ["--prompt", "a fox on a green background", "--steps", 2, "--device", "cpu"]
    run("sample", REPOSITORY, *prompt, "--output", tmp_path / "hub.png")
    run("sample", mine, *prompt, "--output", tmp_path / "mine.png")
    assert (tmp_path / "hub.png").read_bytes() == (tmp_path / "mine.png").read_bytes()
    assert (tmp_path / "merged.safetensors").is_file()
    with refused("pull"):
        run_refused("set", "profile", REPOSITORY)


def run_refused(*arguments):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    raise ValueError(str(error.value.code))


def test_a_set_fetched_before_is_there_when_the_hub_is_not(hub, mine, monkeypatch):
    run("publish", mine, REPOSITORY, "--yes")
    expected = draw(REPOSITORY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(draw(REPOSITORY), expected)
    with refused("ada/other", "cannot be asked"):
        load_set("ada/other")
    with refused(
        "'runwayml/stable-diffusion-v1-5' is the name of the base model", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    ):
        load_set("runwayml/stable-diffusion-v1-5")


def test_a_repository_of_a_base_model_is_told_from_a_set(hub):
    HfApi().create_repo("ada/base")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="model_index.json", repo_id="ada/base")
    with refused("'ada/base' is a base model, not an adapter set", "set create"):
        load_set("ada/base")


# What is shown and asked before anything is sent.


def test_a_dry_run_shows_files_and_sizes_and_asks_nobody(hub, mine, capsys):
    run("publish", mine, REPOSITORY, "--dry-run")
    said = capsys.readouterr().out
    for name in ("README.md", MANIFEST, f"alignment/{WEIGHTS}", "in all", "nothing was sent"):
        assert name in said
    assert hub.requests == []


@pytest.mark.parametrize(("answer", "sent"), [("y", True), ("", False)])
def test_a_person_at_a_terminal_is_asked(hub, mine, monkeypatch, capsys, answer, sent):
    main_end, other_end = pty.openpty()
    with open(other_end) as terminal, open(main_end, "w") as keyboard:
        monkeypatch.setattr("sys.stdin", terminal)
        print(answer, file=keyboard, flush=True)
        run("publish", mine, REPOSITORY)
    said, complaints = capsys.readouterr()
    assert f"Send to {REPOSITORY}? [y/N]" in said
    assert ("nothing was sent" in said) is not sent
    assert TOKEN not in said + complaints
    assert (f"POST /api/models/{REPOSITORY}/commit/main" in [f"{r.method} {r.path}" for r in hub.requests]) is sent


def test_without_a_terminal_somebody_must_have_said_yes(hub, mine, monkeypatch):
    with open(os.devnull) as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        with refused("--yes", "--dry_run"):
            run_refused("publish", mine, REPOSITORY)
    assert not any(request.method == "POST" for request in hub.requests)


# What is refused.


def test_a_base_that_others_do_not_have_is_refused(hub, tmp_path):
    base = save_stable_diffusion(tmp_path / "base")
    save_set(tmp_path / "set", save_three_adapters(tmp_path, base))
    with refused(str(base), "--base"):
        prepare(tmp_path / "set", REPOSITORY)


def test_a_set_without_licences_is_refused(hub, tmp_path):
    save_adapter(tmp_path / "a", save_stable_diffusion(tmp_path / "base"), "a")
    create_set(tmp_path / "set", [tmp_path / "a"], base="owner/base")
    with refused("'a'", "licence", "--license"):
        prepare(tmp_path / "set", REPOSITORY)


def test_a_password_in_what_training_recorded_is_not_sent(mine):
    values = json.loads((mine / MANIFEST).read_text())
    values["adapters"][0]["training"]["config"]["reward"] = "http://ada:secret@rewards.example:8765/score"
    (mine / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="with a name or password in it") as error:
        prepare(mine, REPOSITORY, ask_hub=False)
    assert "secret" not in str(error.value)


def test_what_the_hub_does_not_allow_is_told(hub, mine, monkeypatch):
    with refused("bob/mine", "hub answers"):
        publish(prepare(mine, "bob/mine"))
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with refused(REPOSITORY):
        publish(prepare(mine, REPOSITORY))
    monkeypatch.delenv("HF_TOKEN")
    with refused("log in"):
        run_refused("publish", mine, REPOSITORY, "--yes")


def test_what_is_public_is_not_taken_for_private(hub, mine):
    run("publish", mine, REPOSITORY, "--yes")
    with refused(REPOSITORY, "public"):
        prepare(mine, REPOSITORY, private=True)


@pytest.mark.parametrize("name", ["set", "ada/set@next", "ada/a/set", "/ada/set", ""])
def test_a_name_that_is_no_hub_id_is_refused(mine, name):
    with refused(repr(name), "OWNER/NAME"):
        prepare(mine, name, ask_hub=False)


def test_what_is_not_there_is_named(hub, mine):
    run("publish", mine, REPOSITORY, "--yes")
    with refused("ada/nothing", "no folder here"):
        load_set("ada/nothing")
    with refused(f"{REPOSITORY}@nowhere", "revision"):
        load_set(f"{REPOSITORY}@nowhere")
    HfApi().create_repo("ada/plain")
    with refused("ada/plain", MANIFEST):
        load_set("ada/plain")


def test_a_repository_of_somebody_elses_is_private_to_others(hub, mine, monkeypatch):
    run("publish", mine, REPOSITORY, "--private", "--yes")
    monkeypatch.setenv("HF_TOKEN", "hf_of_bob")
    with refused(REPOSITORY, "log in"):
        load_set(REPOSITORY)


def test_a_pickle_in_a_repository_is_refused_before_anything_is_fetched(hub, mine):
    run("publish", mine, REPOSITORY, "--yes")
    HfApi().upload_file(path_or_fileobj=b"pickle", path_in_repo="extra/model.bin", repo_id=REPOSITORY)
    hub.requests.clear()
    with refused("extra/model.bin", "pickle"):
        fetch_set(REPOSITORY)
    assert [request.method for request in hub.requests] == ["GET"]  # what it holds


def test_a_pull_that_fails_leaves_nothing(hub, mine, tmp_path):
    run("publish", mine, REPOSITORY, "--yes")
    HfApi().upload_file(
        path_or_fileobj=b"other", path_in_repo=f"alignment/{WEIGHTS}", repo_id=REPOSITORY, commit_message="damage"
    )
    hub.requests.clear()
    with refused(f"5 bytes at alignment/{WEIGHTS}", "damaged"):
        copy_set(REPOSITORY, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert not (tmp_path / "pulled.tmp").exists()


def test_rewards_that_are_not_sent_are_told(tmp_path, capsys):
    """A file of code, a recipe as one term of a sum, a folder of weights and a server; of the catalogue none is."""
    base = save_stable_diffusion(tmp_path / "base")
    rewards = {
        "coded": "rewards/mine.py:sharpness",
        "summed": "weighted:1*compressibility/0.1 + 2*recipes/style.yaml/3",
        "folder": "clip_score:models/clip",
        "served": "http://127.0.0.1:8765",
        "known": "compressibility",
        "both": "weighted:1*compressibility/0.1 + 1*colourfulness/5",
    }
    for name, reward in rewards.items():
        save_adapter(tmp_path / name, base, name, reward=reward)
    create_set(tmp_path / "set", [tmp_path / name for name in rewards], base="o/b", license="mit", base_license="mit")
    run("publish", tmp_path / "set", REPOSITORY, "--dry-run")
    told = [line for line in capsys.readouterr().out.splitlines() if "not sent" in line]
    unsent = ["rewards/mine.py:sharpness", "recipes/style.yaml", "clip_score:models/clip", "http://127.0.0.1:8765"]
    assert len(told) == len(unsent)
    limits = card(load_set(tmp_path / "set"), source="x", shown=[]).split("## Limits")[1]
    for name, reward, line in zip(rewards, unsent, told, strict=False):
        assert name in line
        assert reward in line
        assert reward in limits

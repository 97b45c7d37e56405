"""What the tests' hub keeps and refuses, asked by the real client."""

import os
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.fixtures_hub import TRIES, hub_of_clients
from tests.hub_server import Cuts

MODEL = "ada/painter"
CARD = "---\nlicense: apache-2.0\n---\n# A painter\n"

by_lfs = pytest.mark.parametrize("hub", ["lfs"], indirect=True)
either_way = pytest.mark.parametrize("hub", ["xet", "lfs"], indirect=True)


@pytest.fixture
def hub(request, tmp_path, monkeypatch):
    with hub_of_clients(tmp_path, monkeypatch, xet=getattr(request, "param", "xet") == "xet") as hub:
        yield hub


@pytest.fixture
def ada(hub):
    api = HfApi(token="hf_of_ada")
    api.create_repo(MODEL, private=True)
    return api


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "unet" / "weights.safetensors").write_bytes(os.urandom(50_000))
    (folder / "weights.safetensors").write_bytes(os.urandom(300_000))
    return folder


def files(folder):
    found = {path.relative_to(folder): path for path in Path(folder).rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if name.name != ".gitattributes"}


def sizes(requests):
    return sorted(one.received for one in requests)


@either_way
def test_what_was_uploaded_is_what_is_downloaded(hub, ada, model):
    commit = ada.upload_folder(repo_id=MODEL, folder_path=model)
    assert files(ada.snapshot_download(MODEL)) == files(model)
    info = ada.model_info(MODEL, files_metadata=True)
    assert (info.sha, info.private, info.card_data.license) == (commit.oid, True, "apache-2.0")
    assert {one.rfilename: one.lfs is not None for one in info.siblings} == {
        ".gitattributes": False,
        "README.md": False,
        "config.json": False,
        "unet/weights.safetensors": True,
        "weights.safetensors": True,
    }
    shown = [one.path for one in ada.list_repo_tree(MODEL)]
    assert shown == [".gitattributes", "README.md", "config.json", "unet", "weights.safetensors"]
    assert [one.path for one in ada.get_paths_info(MODEL, ["config.json", "absent"])] == ["config.json"]


@either_way
def test_a_second_upload_is_a_second_commit_and_the_first_can_still_be_had(hub, ada, model):
    first, before = ada.upload_folder(repo_id=MODEL, folder_path=model), files(model)
    (model / "weights.safetensors").write_bytes(os.urandom(200_000))
    (model / "config.json").unlink()
    second = ada.upload_folder(repo_id=MODEL, folder_path=model, delete_patterns="*.json", commit_message="Better")
    commits = ada.list_repo_commits(MODEL)
    assert [one.commit_id for one in commits[:2]] == [second.oid, first.oid]
    assert (commits[0].title, commits[2].title) == ("Better", "initial commit")
    assert files(ada.snapshot_download(MODEL)) == files(model)
    assert files(ada.snapshot_download(MODEL, revision=first.oid)) == before


@either_way
def test_the_same_folder_again_sends_nothing_and_commits_nothing(hub, ada, model):
    first = ada.upload_folder(repo_id=MODEL, folder_path=model)
    hub.requests.clear()
    assert ada.upload_folder(repo_id=MODEL, folder_path=model).oid == first.oid
    assert hub.uploads() == []


def test_branches_and_tags_are_revisions(hub, ada, model):
    first = ada.model_info(MODEL).sha
    ada.create_branch(MODEL, branch="draft")
    second = ada.upload_folder(repo_id=MODEL, folder_path=model, revision="draft").oid
    ada.create_tag(MODEL, tag="v1", revision="draft")
    assert [ada.model_info(MODEL, revision=one).sha for one in ("main", "draft", "v1")] == [first, second, second]
    assert [one.target_commit for one in ada.list_repo_refs(MODEL).tags] == [second]


@pytest.mark.parametrize("token", [False, "hf_of_bob"])
def test_a_private_model_is_not_there_for_others(hub, ada, token):
    other = HfApi(token=token)
    for ask in (other.model_info, other.snapshot_download):
        with pytest.raises(RepositoryNotFoundError):
            ask(MODEL)


def test_a_public_model_is_read_by_all_and_written_by_its_owner(hub, ada, model):
    ada.create_repo("ada/open")
    ada.upload_folder(repo_id="ada/open", folder_path=model)
    assert Path(hf_hub_download("ada/open", "README.md")).read_text() == CARD
    bob = HfApi(token="hf_of_bob")
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.upload_folder(repo_id="ada/open", folder_path=model)
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.create_repo("ada/other")


def test_an_unknown_token_is_refused_and_a_known_one_has_a_name(hub, ada):
    assert ada.whoami()["name"] == "ada"
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token="hf_of_nobody").model_info(MODEL)


def test_a_model_is_created_once(hub, ada):
    assert ada.create_repo(MODEL, exist_ok=True).repo_id == MODEL
    with pytest.raises(HfHubHTTPError, match="409"):
        ada.create_repo(MODEL)


def test_what_is_not_there_is_said_to_be_missing(hub, ada):
    for revision in ("v9", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            ada.snapshot_download(MODEL, revision=revision)
        with pytest.raises(RevisionNotFoundError):
            ada.model_info(MODEL, revision=revision)
    with pytest.raises(EntryNotFoundError):
        ada.hf_hub_download(MODEL, "absent.json")


@either_way
def test_a_commit_on_another_parent_is_refused_whole(hub, ada, model):
    first = ada.model_info(MODEL).sha
    second = ada.upload_folder(repo_id=MODEL, folder_path=model / "unet", parent_commit=first).oid
    with pytest.raises(HfHubHTTPError, match="412"):
        ada.upload_folder(repo_id=MODEL, folder_path=model, parent_commit=first)
    assert ada.model_info(MODEL).sha == second


@pytest.mark.parametrize("metadata", ["license: [", "words", "- a list"])
def test_a_card_that_cannot_be_read_is_refused_before_anything_is_sent(hub, ada, model, metadata):
    (model / "README.md").write_text(f"---\n{metadata}\n---\n# A painter\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        ada.upload_folder(repo_id=MODEL, folder_path=model)
    assert hub.uploads() == []


@either_way
def test_a_commit_of_what_was_not_uploaded_is_refused(hub, ada):
    pretended = CommitOperationAdd("weights.safetensors", b"never sent")
    pretended._upload_mode, pretended._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match=r"does not exist\. Offending file: weights\.safetensors"):
        ada.create_commit(MODEL, [pretended], commit_message="Pretended")


@by_lfs
def test_other_bytes_than_were_announced_are_refused(hub, ada):
    batch = dict(operation="upload", objects=[dict(oid="0" * 64, size=4)])
    address, headers = f"{hub.endpoint}/{MODEL}.git/info/lfs/objects/batch", {"Authorization": "Bearer hf_of_ada"}
    told = get_session().post(address, json=batch, headers=headers).json()["objects"][0]
    upload = told["actions"]["upload"]["href"]
    assert get_session().put(upload, content=b"four").status_code == 400
    assert get_session().put(upload.replace("size=4", "size=5"), content=b"four").status_code == 403


@either_way
def test_tokens_do_not_reach_the_storage(hub, ada, model):
    ada.upload_folder(repo_id=MODEL, folder_path=model)
    ada.snapshot_download(MODEL)
    stored = [one for one in hub.requests if one.path.split("/")[1] in ("upload", "download", "xorbs")]
    assert stored
    assert not any("authorization" in one.headers for one in stored)


@either_way
def test_an_upload_that_is_cut_is_tried_again(hub, ada, model):
    hub.cut_uploads = Cuts(after=100_000, times=TRIES - 1)
    ada.upload_folder(repo_id=MODEL, folder_path=model)
    assert [one.received for one in hub.uploads() if one.status is None] == [100_000] * (TRIES - 1)
    assert files(ada.snapshot_download(MODEL)) == files(model)


@either_way
def test_an_upload_that_is_cut_for_good_commits_nothing_and_the_next_one_does(hub, ada, model):
    before = ada.list_repo_commits(MODEL)
    hub.cut_uploads = Cuts(after=100_000, times=TRIES)
    with pytest.raises((RuntimeError, ConnectionError)):  # by LFS, by xet
        ada.upload_folder(repo_id=MODEL, folder_path=model)
    assert ada.list_repo_commits(MODEL) == before
    ada.upload_folder(repo_id=MODEL, folder_path=model)
    assert files(ada.snapshot_download(MODEL)) == files(model)
    assert ada.list_repo_commits(MODEL)[1:] == before


@by_lfs
def test_by_lfs_files_that_arrived_are_not_sent_again(hub, ada, model):
    hub.cut_uploads = Cuts(after=100_000, times=TRIES)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'weights\.safetensors'"):
        ada.upload_folder(repo_id=MODEL, folder_path=model)
    assert sizes(hub.uploads()) == [50_000, *[100_000] * TRIES]
    hub.requests.clear()
    ada.upload_folder(repo_id=MODEL, folder_path=model)
    assert sizes(hub.uploads()) == [300_000]


@by_lfs
def test_by_lfs_a_large_file_goes_in_parts_and_only_a_part_is_sent_again(hub, ada, model):
    hub.part_size, hub.cut_uploads = 100_000, Cuts(after=60_000, times=1)
    ada.upload_folder(repo_id=MODEL, folder_path=model)
    assert sizes(hub.uploads()) == [50_000, 60_000, 100_000, 100_000, 100_000]
    assert files(ada.snapshot_download(MODEL)) == files(model)


def test_by_xet_xorbs_that_arrived_are_not_sent_again(hub, ada, monkeypatch):
    # hf_xet writes down what has arrived every 20 seconds; here, every xorb.
    monkeypatch.setenv("HF_XET_DATA_SESSION_XORB_METADATA_FLUSH_MAX_COUNT", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "200ms")  # long enough for the small one to arrive
    weights = os.urandom(72 * 1024**2)  # a xorb of about 64 MiB and a small one
    hub.cut_uploads = Cuts(after=20 * 1024**2, times=TRIES)
    with pytest.raises(ConnectionError):
        ada.create_commit(MODEL, [CommitOperationAdd("weights.safetensors", weights)], commit_message="Weights")
    arrived = [one.received for one in hub.uploads() if one.status == 200]
    hub.requests.clear()
    ada.create_commit(MODEL, [CommitOperationAdd("weights.safetensors", weights)], commit_message="Weights")
    sent = [one.received for one in hub.uploads()]
    assert (len(arrived), len(sent)) == (1, 1)
    assert len(weights) < arrived[0] + sent[0] < 1.01 * len(weights)
    assert Path(ada.hf_hub_download(MODEL, "weights.safetensors")).read_bytes() == weights


@by_lfs
def test_a_download_that_is_cut_goes_on_from_there(hub, ada, model, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what did not fill a chunk is lost: 10 MiB
    ada.upload_folder(repo_id=MODEL, folder_path=model)
    hub.cut_downloads = Cuts(after=120_000, times=1)
    path = ada.hf_hub_download(MODEL, "weights.safetensors")
    assert Path(path).read_bytes() == (model / "weights.safetensors").read_bytes()
    ranges = [one.headers.get("range") for one in hub.requests if one.path.startswith("/download/")]
    assert ranges == [None, "bytes=120000-"]

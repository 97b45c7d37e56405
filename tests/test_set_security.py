"""Sets from strangers are refused in one line or harmless: nothing of them is run, or followed to elsewhere."""

import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest

from stepfuse.fuse import manifest as manifests
from stepfuse.fuse.adapter import WEIGHTS
from stepfuse.fuse.adapter_set import MANIFEST, load_set
from tests.fixtures_strangers import (
    edit,
    evil,
    frugal,
    insert,
    put_weights,
    small_set,
)
from tests.fixtures_tiny import refused, save_stable_diffusion


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def original(base, tmp_path_factory):
    return small_set(base, tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the set, to be made evil."""
    return shutil.copytree(original, tmp_path / "set")


# What lies in the folder.


@pytest.mark.parametrize(
    "name", ["x.bin", "a/optimizer.pt", "b/deep/er/x.pkl", "x.CKPT", "a/x\ny.pt", "a/x.pth/README"]
)
def test_a_pickle_anywhere_in_a_set_is_refused_by_its_name(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"")
    with refused(str(folder), Path(name.removesuffix("/README")).name.split("\n")[-1], "pickle"):
        load_set(folder)


def test_a_pickle_under_the_name_of_weights_is_refused_and_not_read(folder, tmp_path):
    content = evil(tmp_path / "made")
    file = put_weights(folder, content)
    with refused(str(file), "no safetensors"):
        load_set(folder)
    assert not (tmp_path / "made").exists()
    pickle.loads(content).close()
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["a", f"a/{WEIGHTS}", MANIFEST])
def test_a_link_to_outside_is_refused(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with refused(str(folder / name), "link", str(tmp_path / "outside")):
        load_set(folder)


def test_a_link_to_outside_that_nothing_names_is_refused(folder, tmp_path):
    (folder / "a" / "notes").symlink_to("../../../outside\nand more")
    with refused(str(folder / "a" / "notes"), "link"):
        load_set(folder)


@pytest.mark.parametrize("name", ["a", f"a/{WEIGHTS}", MANIFEST, "notes"])
def test_a_ring_of_links_is_refused(folder, name):
    shutil.rmtree(folder / name) if name == "a" else (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("ring")
    (folder / name).with_name("ring").symlink_to(Path(name).name)
    with refused(str(folder), "link"):
        load_set(folder)


@pytest.mark.parametrize("name", [f"a/{WEIGHTS}", MANIFEST])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with refused(str(folder), Path(name).name):
        load_set(folder)


def test_the_hubs_cache_is_a_set_and_its_links_to_elsewhere_are_not(original, tmp_path):
    blobs, commit = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    for file in original.rglob("*.*"):
        (place := commit / file.relative_to(original)).parent.mkdir(parents=True, exist_ok=True)
        blob = shutil.copyfile(file, blobs / hashlib.sha256(str(file).encode()).hexdigest())
        place.symlink_to(os.path.relpath(blob, place.parent))
    assert load_set(commit).names == ["a", "b"]
    shutil.move(blob, tmp_path / "outside")
    blob.symlink_to(tmp_path / "outside")
    with refused(str(commit), "link", str(tmp_path / "outside")):
        load_set(commit)


# What a manifest says.


@pytest.mark.parametrize(("key", "value"), [("sha256", "0" * 64), ("bytes", 1000), ("rank", 3)])
def test_weights_other_than_the_manifest_says_are_refused(folder, key, value):
    edit(folder, "adapters", 0, "weights", **{key: value})
    with refused(str(folder / "a" / WEIGHTS), "fetch it again"):
        load_set(folder)


@pytest.mark.parametrize("version", ["2", "99", "0", "-1", '"1"', "1.0", "true", "null", "[1]", None])
def test_another_version_of_the_format_is_refused_with_what_to_do(folder, version):
    insert(folder, version or "0", "format_version")
    if version is None:
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"format_version"', '"another"'))
    newer = version in ("2", "99")
    with refused(str(folder / MANIFEST), "format_version", "pip install --upgrade" if newer else "create it again"):
        load_set(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "eta", "eta": 1, "eta": 0}',
        "NaN",
        "-Infinity",
        "1e999",
        "9" * 5000,
        "1" + "0" * 400,
        "[" * 10**5,
        "[" * 10**5 + "]" * 10**5,
        '{"a":' * 10**5,
        '"\ud800"',
        '"\\ud800"',
        '"\\u0000"',
        "\x00",
        "\ufeff",
    ],
    ids=lambda text: ascii(text)[:30],
)
@pytest.mark.parametrize("path", [["reference"], ["adapters", 0, "name"]], ids=str)
def test_what_is_no_json_or_no_value_is_refused(folder, text, path):
    insert(folder, "@", *path)
    content = (folder / MANIFEST).read_text().replace('"@"', text)
    (folder / MANIFEST).write_bytes(content.encode(errors="surrogatepass"))
    with frugal(), refused(str(folder / MANIFEST)):
        load_set(folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_another_encoding_is_refused(folder, encoding):
    edit(folder, "base", name_or_path="é")
    text = (folder / MANIFEST).read_text().replace("\\u00e9", "é")
    (folder / MANIFEST).write_bytes(text.encode(encoding))
    with refused(str(folder / MANIFEST), "JSON"):
        load_set(folder)


def test_a_huge_manifest_is_refused_unread(folder):
    os.truncate(folder / MANIFEST, 2**36)
    with frugal(seconds=1.0), refused(str(folder / MANIFEST), "bytes"):
        load_set(folder)
    assert manifests.MOST_BYTES <= 2**24


def test_no_depth_of_nesting_is_too_much(folder):
    """Python's limit is met by JSON, by the schema and by what is told, each at a depth of its own."""
    edit(folder, "adapters", 0, training={"steps": "@"})
    text = (folder / MANIFEST).read_text()
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 10, 2):
        (folder / MANIFEST).write_text(text.replace('"@"', "[" * depth + "]" * depth))
        with refused(str(folder / MANIFEST)):
            load_set(folder)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (["versions"], "{" + ",".join(f'"{i}":0' for i in range(30000)) + ',"x":0,"x":0}'),
        (["reference"], '{"kind": "table", "etas": [' + "2," * 300000 + "2]}"),
        (["adapters"], "[" + "[]," * 400000 + "[]]"),
        (["evaluation"], '{"prompts":1,"seeds":1,"objectives":{},"cells":[' + "{}," * 100000 + "{}]}"),
        (["adapters", 1, "reward", "name"], '"weighted:1*' + " " * 1900 + 'x\\ny"'),
    ],
    ids=["keys", "numbers", "adapters", "cells", "reward"],
)
def test_large_and_tangled_manifests_take_no_time(folder, path, text):
    insert(folder, text, *path)
    if path[-1] == "name":
        values = json.loads((folder / MANIFEST).read_text())
        oracle = {"weights": {"a": 1}, "adapter": values["adapters"].pop()}
        edit(folder, adapters=values["adapters"], oracles=[oracle], default_weights={"a": 1})
    with frugal(most=2**28), refused(str(folder / MANIFEST)):
        load_set(folder)


@pytest.mark.parametrize("key", ["versions", "default_weights"])
def test_a_key_of_several_lines_is_told_in_one(folder, key):
    edit(folder, key, **{"x\ny": None})
    with refused(str(folder / MANIFEST), key):
        load_set(folder)


def test_a_whole_number_may_be_written_with_a_point(folder):
    edit(folder, num_inference_steps=3.0)
    edit(folder, "adapters", 0, num_inference_steps=3.0)
    loaded = load_set(folder)
    counts = [loaded.num_inference_steps, loaded.adapters[0].num_inference_steps]
    assert [(count, type(count)) for count in counts] == [(3, int), (3, int)]

"""Sets from strangers are refused in one line or harmless: nothing of them is run, or followed to elsewhere."""

import codecs
import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest

from stepfuse.data import json_file
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.manifest import MANIFEST
from tests.fixtures_strangers import (
    edit,
    evil,
    frugal,
    insert,
    put_weights,
)
from tests.fixtures_tiny import refused

# What lies in the folder.


@pytest.mark.parametrize(
    "name", ["x.bin", "a/optimizer.pt", "b/deep/er/x.pkl", "x.CKPT", "a/x\ny.pt", "a/x.pth/README"]
)
def test_a_pickle_anywhere_in_a_set_is_refused_by_its_name(stranger, name):
    (stranger / name).parent.mkdir(parents=True, exist_ok=True)
    (stranger / name).write_bytes(b"")
    with refused(str(stranger), Path(name.removesuffix("/README")).name.split("\n")[-1], "pickle"):
        load_set(stranger)


def test_a_pickle_under_the_name_of_weights_is_refused_and_not_read(stranger, tmp_path):
    content = evil(tmp_path / "made")
    file = put_weights(stranger, content)
    with refused(str(file), "no safetensors"):
        load_set(stranger)
    assert not (tmp_path / "made").exists()
    pickle.loads(content).close()
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["a", f"a/{WEIGHTS}", MANIFEST])
def test_a_link_to_outside_is_refused(stranger, tmp_path, name):
    shutil.move(stranger / name, tmp_path / "outside")
    (stranger / name).symlink_to(tmp_path / "outside")
    with refused(str(stranger / name), "link", str(tmp_path / "outside")):
        load_set(stranger)


def test_a_link_to_outside_that_nothing_names_is_refused(stranger, tmp_path):
    (stranger / "a" / "notes").symlink_to("../../../outside\nand more")
    with refused(str(stranger / "a" / "notes"), "link"):
        load_set(stranger)


@pytest.mark.parametrize("name", ["a", f"a/{WEIGHTS}", MANIFEST, "notes"])
def test_a_ring_of_links_is_refused(stranger, name):
    shutil.rmtree(stranger / name) if name == "a" else (stranger / name).unlink(missing_ok=True)
    (stranger / name).symlink_to("ring")
    (stranger / name).with_name("ring").symlink_to(Path(name).name)
    with refused(str(stranger), "link"):
        load_set(stranger)


@pytest.mark.parametrize("name", [f"a/{WEIGHTS}", MANIFEST])
def test_a_pipe_is_not_waited_for(stranger, name):
    (stranger / name).unlink()
    os.mkfifo(stranger / name)
    with refused(str(stranger), Path(name).name):
        load_set(stranger)


def test_the_hubs_cache_is_a_set_and_its_links_to_elsewhere_are_not(small_set, tmp_path):
    blobs, commit = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    for file in small_set.rglob("*.*"):
        (place := commit / file.relative_to(small_set)).parent.mkdir(parents=True, exist_ok=True)
        blob = shutil.copyfile(file, blobs / hashlib.sha256(str(file).encode()).hexdigest())
        place.symlink_to(os.path.relpath(blob, place.parent))
    assert load_set(commit).names == ["a", "b"]
    shutil.move(blob, tmp_path / "outside")
    blob.symlink_to(tmp_path / "outside")
    with refused(str(commit), "link", str(tmp_path / "outside")):
        load_set(commit)


# What a manifest says.


@pytest.mark.parametrize(("key", "value"), [("sha256", "0" * 64), ("bytes", 1000), ("rank", 3)])
def test_weights_other_than_the_manifest_says_are_refused(stranger, key, value):
    edit(stranger, "adapters", 0, "weights", **{key: value})
    with refused(str(stranger / "a" / WEIGHTS), "fetch it again"):
        load_set(stranger)


@pytest.mark.parametrize("version", ["2", "99", "0", "-1", '"1"', "1.0", "true", "null", "[1]", None])
def test_another_version_of_the_format_is_refused_with_what_to_do(stranger, version):
    insert(stranger, version or "0", "format_version")
    if version is None:
        (stranger / MANIFEST).write_text((stranger / MANIFEST).read_text().replace('"format_version"', '"another"'))
    newer = version in ("2", "99")
    with refused(str(stranger / MANIFEST), "format_version", "pip install --upgrade" if newer else "create it again"):
        load_set(stranger)


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
def test_what_is_no_json_or_no_value_is_refused(stranger, text, path):
    insert(stranger, "@", *path)
    content = (stranger / MANIFEST).read_text().replace('"@"', text)
    (stranger / MANIFEST).write_bytes(content.encode(errors="surrogatepass"))
    with frugal(), refused(str(stranger / MANIFEST)):
        load_set(stranger)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_another_encoding_is_refused(stranger, encoding):
    edit(stranger, "base", name_or_path="é")
    text = (stranger / MANIFEST).read_text().replace("\\u00e9", "é")
    (stranger / MANIFEST).write_bytes(text.encode(encoding))
    with refused(str(stranger / MANIFEST), "JSON"):
        load_set(stranger)


def test_a_byte_order_mark_is_no_part_of_a_manifest(stranger):
    """RFC 8259, section 8.1: who reads JSON may ignore one. Windows Notepad and PowerShell write it."""
    wanted = load_set(stranger)
    (stranger / MANIFEST).write_bytes(codecs.BOM_UTF8 + (stranger / MANIFEST).read_bytes())
    assert load_set(stranger) == wanted


def test_a_huge_manifest_is_refused_unread(stranger):
    os.truncate(stranger / MANIFEST, 2**36)
    with frugal(seconds=1.0), refused(str(stranger / MANIFEST), "bytes"):
        load_set(stranger)
    assert json_file.MAX_BYTES <= 2**24


def test_no_depth_of_nesting_is_too_much(stranger):
    """Python's limit is met by JSON, by the schema and by what is told, each at a depth of its own."""
    edit(stranger, "adapters", 0, training={"steps": "@"})
    text = (stranger / MANIFEST).read_text()
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 10, 2):
        (stranger / MANIFEST).write_text(text.replace('"@"', "[" * depth + "]" * depth))
        with refused(str(stranger / MANIFEST)):
            load_set(stranger)


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
def test_large_and_tangled_manifests_take_no_time(stranger, path, text):
    insert(stranger, text, *path)
    if path[-1] == "name":
        values = json.loads((stranger / MANIFEST).read_text())
        oracle = {"weights": {"a": 1}, "adapter": values["adapters"].pop()}
        edit(stranger, adapters=values["adapters"], oracles=[oracle], default_weights={"a": 1})
    with frugal(most=2**28), refused(str(stranger / MANIFEST)):
        load_set(stranger)


@pytest.mark.parametrize("key", ["versions", "default_weights"])
def test_a_key_of_several_lines_is_told_in_one(stranger, key):
    edit(stranger, key, **{"x\ny": None})
    with refused(str(stranger / MANIFEST), key):
        load_set(stranger)


def test_a_whole_number_may_be_written_with_a_point(stranger):
    edit(stranger, num_inference_steps=3.0)
    edit(stranger, "adapters", 0, num_inference_steps=3.0)
    loaded = load_set(stranger)
    counts = [loaded.num_inference_steps, loaded.adapters[0].num_inference_steps]
    assert [(count, type(count)) for count in counts] == [(3, int), (3, int)]

"""How often a set's files are opened and read, and that what is written again has the same bytes."""

import builtins
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
from safetensors import safe_open

from stepfuse.data.json_file import write_json
from stepfuse.fuse.lora import tensor_file
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import OBJECTIVE, read_adapter
from stepfuse.fuse.sets.adapter_set import load_set, save_manifest
from stepfuse.fuse.sets.entries import adapter_to_dict
from stepfuse.fuse.sets.manifest import FORMAT_VERSION, MANIFEST

REFERENCE = Path(__file__).parent / "reference"
watched: dict[str, int] = {}  # opens by path
sys.addaudithook(lambda event, details: event == "open" and watch(details[0]))


def watch(path: object) -> None:
    if str(path) in watched:
        watched[str(path)] += 1


@pytest.fixture
def reads(adapter_set, monkeypatch):
    """Opens by any Python function, and bytes read from the disk, of the weights of each adapter."""
    files = [str(adapter_set / name / WEIGHTS) for name in "ab"]
    sizes = dict.fromkeys(files, 0)

    class Counted(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            sizes[str(self.name)] += count
            return count

    def counting_open(file, mode):
        assert mode == "rb"
        return io.BufferedReader(Counted(file))

    def not_of_adapters(file, *arguments, **options):
        assert str(file) not in files
        return safe_open(file, *arguments, **options)

    monkeypatch.setattr(tensor_file, "open", counting_open, raising=False)
    for module in (safetensors, safetensors.torch):
        monkeypatch.setattr(module, "safe_open", not_of_adapters)
    watched.update(dict.fromkeys(files, 0))
    yield lambda: {file: (watched[file], sizes[file]) for file in files}
    watched.clear()


def once(adapter_set):
    files = [adapter_set / name / WEIGHTS for name in "ab"]
    return {str(file): (1, file.stat().st_size) for file in files}


def test_the_audit_sees_opens(adapter_set, reads):
    with builtins.open(adapter_set / "a" / WEIGHTS, "rb"):
        assert [count for count, _ in reads().values()] == [1, 0]


def test_a_set_is_validated_by_one_read_of_each_file(adapter_set, reads):
    load_set(adapter_set)
    assert reads() == once(adapter_set)


def test_a_set_is_put_on_its_base_by_one_read_of_each_file(adapter_set, reads):
    FusedSampler.from_pretrained(adapter_set)
    assert reads() == once(adapter_set)


def test_a_manifest_is_read_without_opening_weights(adapter_set, reads):
    load_set(adapter_set, read_weights=False)
    assert set(reads().values()) == {(0, 0)}


@pytest.mark.parametrize("algorithm", ["dpo", "ddpo"])
def test_objective_json_of_before_is_written_again_byte_for_byte(algorithm, tmp_path):
    adapter = read_adapter(REFERENCE / algorithm)
    write_json(tmp_path / OBJECTIVE, {"format_version": FORMAT_VERSION, **adapter_to_dict(adapter)})
    assert (tmp_path / OBJECTIVE).read_bytes() == (REFERENCE / algorithm / OBJECTIVE).read_bytes()


def test_a_manifest_of_before_is_written_again_byte_for_byte(tmp_path):
    shutil.copytree(REFERENCE / "set", tmp_path / "set")
    (tmp_path / "set" / MANIFEST).chmod(0o644)
    save_manifest(tmp_path / "set", load_set(tmp_path / "set"))
    assert (tmp_path / "set" / MANIFEST).read_bytes() == (REFERENCE / "set" / MANIFEST).read_bytes()
    assert json.loads((tmp_path / "set" / MANIFEST).read_bytes())["reference"]["kind"] == "eta"

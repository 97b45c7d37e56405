"""How often a set's files are opened and read, and that what is written again has the same bytes."""

import builtins
import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepfuse.data.json_file import write_json
from stepfuse.fuse.lora import tensor_file
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import load_set, save_manifest
from stepfuse.fuse.sets.create import create_set, find_adapter
from stepfuse.fuse.sets.edit import set_licences
from stepfuse.fuse.sets.entries import adapter_to_dict
from stepfuse.fuse.sets.export import export
from stepfuse.fuse.sets.manifest import FORMAT_VERSION, MANIFEST, OBJECTIVE
from tests.fixtures_strangers import edit
from tests.fixtures_tiny import refused

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
    sizes = Counter()

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


def test_a_set_that_was_read_is_put_on_its_base_by_one_read_of_each_file(adapter_set, reads):
    loaded = load_set(adapter_set, read_weights=False)
    headers = reads()
    FusedSampler.from_pretrained(loaded)
    expected = {file: (opens + 1, size + headers[file][1]) for file, (opens, size) in once(adapter_set).items()}
    assert reads() == expected


def test_of_weights_that_are_loaded_next_only_the_headers_are_read(adapter_set, reads):
    load_set(adapter_set, read_weights=False)
    for file, (opens, size) in reads().items():
        with builtins.open(file, "rb") as handle:
            header = 8 + int.from_bytes(handle.read(8), "little")
        assert opens == 1
        assert size < header + io.DEFAULT_BUFFER_SIZE < Path(file).stat().st_size


def test_an_adapter_of_a_set_is_found_without_reading_the_others(adapter_set, reads):
    find_adapter(adapter_set / "a")
    found, other = reads().values()
    assert found == (1, (adapter_set / "a" / WEIGHTS).stat().st_size)
    assert other == (0, 0)


def test_a_set_is_made_by_three_reads_of_each_file(adapter_set, reads, tmp_path):
    """To check it, to see whether its layout is the current one, and to copy it; the copy is then checked."""
    create_set(tmp_path / "made", [adapter_set / "a"])
    assert reads()[str(adapter_set / "a" / WEIGHTS)][0] == 3


def test_an_export_reads_the_weights_of_its_adapter_alone(adapter_set, reads, tmp_path):
    load_set(adapter_set, read_weights=False)
    headers = reads()
    export(adapter_set, "a", form="diffusers", output=tmp_path / "x.safetensors")
    a, b = once(adapter_set)
    assert reads()[a][1] == 2 * headers[a][1] + (adapter_set / "a" / WEIGHTS).stat().st_size
    assert reads()[b][1] == 2 * headers[b][1]


def test_a_licence_is_stated_without_reading_weights(adapter_set, reads):
    load_set(adapter_set, read_weights=False)
    headers = reads()
    set_licences(adapter_set, license="mit", base_license=None)
    assert all(size == opens * headers[file][1] for file, (opens, size) in reads().items())


@pytest.mark.parametrize("fault", ["bytes", "rank", "text_encoder"])
def test_a_fault_of_a_header_is_found_before_the_base_is_loaded(adapter_set, monkeypatch, fault):
    def not_loaded(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr("stepfuse.fuse.sampling.load.load_base", not_loaded)
    file = adapter_set / "a" / WEIGHTS
    if fault == "text_encoder":
        state = load_file(file)
        save_file(state | {f"text_encoder.x.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}, file)
        edit(adapter_set, "adapters", 0, "weights", bytes=file.stat().st_size)
    else:
        edit(adapter_set, "adapters", 0, "weights", **{fault: 1000})
    with refused(str(file), "--network_only" if fault == "text_encoder" else "fetch it again"):
        FusedSampler.from_pretrained(adapter_set)


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

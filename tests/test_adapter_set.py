"""Adapter folders and sets: what is written is read again, and what is broken is named."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepfuse.data.file_info import file_hash
from stepfuse.fuse.backbones.fingerprint import base_fingerprint, describe_base
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, TableSchedule
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import load_adapter, read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.manifest import MANIFEST, OBJECTIVE
from tests.fixtures_tiny import refused, save_adapter


def edit(file, **changes):
    """Change keys of a JSON file; ... deletes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_entry(adapter_set, place, **changes):
    """Change keys of one adapter's entry in a manifest."""
    entries = json.loads((adapter_set / MANIFEST).read_text())["adapters"]
    entries[place] |= changes
    edit(adapter_set / MANIFEST, adapters=entries)


def replace_weights(folder, tensors):
    """Other tensors, and their hash in the record, so that nothing but the tensors is wrong."""
    save_file(tensors, folder / WEIGHTS)
    edit(folder / OBJECTIVE, sha256=file_hash(folder / WEIGHTS))


# What is written is read again.


@pytest.mark.parametrize(
    ("variance", "values"),
    [
        (EtaSchedule(eta=0.25), {"kind": "eta", "eta": 0.25}),
        (TableSchedule(etas=(1.0, 0.5)), {"kind": "table", "etas": [1.0, 0.5]}),
        (
            LearnedSchedule(offsets=torch.tensor([-0.5, 0.25]), eta=0.5),
            {"kind": "learned", "offsets": [-0.5, 0.25], "eta": 0.5},
        ),
    ],
    ids=["eta", "table", "learned"],
)
def test_an_adapter_reads_as_it_was_written(bases, tmp_path, variance, values):
    written = save_adapter(tmp_path / "x", bases["first"], "x", variance=variance, beta=0.3, guidance="off")
    assert json.loads((tmp_path / "x" / OBJECTIVE).read_text())["variance"] == values
    read = read_adapter(tmp_path / "x")
    assert (read.name, read.objective.reward, read.objective.beta) == ("x", "reward_of_x", 0.3)
    assert (read.guidance, read.guidance_scale, read.num_inference_steps) == ("off", 3.0, 3)
    assert read.base == written.base
    assert type(read.objective.variance) is type(variance)
    for key, value in values.items():
        if key != "kind":
            assert torch.as_tensor(getattr(read.objective.variance, key)).tolist() == pytest.approx(value)


def test_a_set_holds_copies_of_its_adapters_with_their_guidance_and_the_most_steps(adapters, adapter_set, bases):
    for name in ("a", "b"):
        assert (adapter_set / name / WEIGHTS).read_bytes() == (adapters / name / WEIGHTS).read_bytes()
    shutil.rmtree(adapters)
    read = load_set(adapter_set)
    assert read.names == ["a", "b"]
    assert read.base["name_or_path"] == str(bases["first"])
    assert (read.guidance, read.guidance_scale, read.num_inference_steps) == ("shared", 3.0, 4)
    assert read.default_weights == {"a": 0.5, "b": 0.5}
    assert read.base_schedule == EtaSchedule(eta=0.6)
    assert [o.variance for o in read.objectives] == [TableSchedule(etas=(0.2, 0.4)), EtaSchedule(eta=0.7)]


def test_a_set_can_be_moved(adapter_set, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(adapter_set, tmp_path / "elsewhere" / "renamed")
    assert load_set(moved).names == ["a", "b"]


# An adapter that is broken.


@pytest.mark.parametrize(
    "key",
    ["name", "reward", "beta", "variance", "guidance", "guidance_scale", "num_inference_steps", "base", "sha256"],
)
def test_a_missing_key_of_an_adapter_is_named(adapters, key):
    edit(adapters / "a" / OBJECTIVE, **{key: ...})
    with refused(str(adapters / "a" / OBJECTIVE), repr(key)):
        read_adapter(adapters / "a")


@pytest.mark.parametrize("version", [0, 2, "1", None, ...])
def test_an_unknown_format_version_is_named(adapters, adapter_set, version):
    for file, read in ((adapters / "a" / OBJECTIVE, read_adapter), (adapter_set / MANIFEST, load_set)):
        edit(file, format_version=version)
        with refused(str(file), repr(None if version is ... else version)):
            read(file.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\0"])
def test_a_file_that_is_no_json_object_is_named(adapters, adapter_set, text):
    for file, read in ((adapters / "a" / OBJECTIVE, read_adapter), (adapter_set / MANIFEST, load_set)):
        file.write_text(text)
        with refused(str(file), "JSON"):
            read(file.parent)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        (dict(name="../x"), "'../x'"),
        (dict(name=""), "''"),
        (dict(name=5), OBJECTIVE),
        (dict(beta=math.inf), "Infinity"),
        (dict(beta=-0.1), "-0.1"),
        (dict(beta=math.nan), "NaN"),
        (dict(beta=None), OBJECTIVE),
        (dict(guidance="both"), "'both'"),
        (dict(guidance_scale="strong"), "strong"),
        (dict(num_inference_steps=None), OBJECTIVE),
        (dict(variance={"kind": "cosine"}), "cosine"),
        (dict(variance={"kind": "eta", "eta": 1.5}), "1.5"),
        (dict(variance={"kind": "eta", "etas": [1]}), "etas"),
        (dict(variance=0.5), "0.5"),
        (dict(base="stable-diffusion"), "base"),
        (dict(base={"name_or_path": "x"}), "architecture"),
        (dict(base={"name_or_path": "x", "architecture": "y", "probe": "z"}), "probe"),
        (dict(record=None), "record"),
        (dict(record={"gain": {"mean": 1.0}}), "expected an object with the numbers mean, low and high"),
    ],
    ids=str,
)
def test_a_value_that_makes_no_adapter_is_named(adapters, changes, culprit):
    edit(adapters / "a" / OBJECTIVE, **changes)
    with refused(str(adapters / "a" / OBJECTIVE), culprit):
        read_adapter(adapters / "a")


def test_missing_folders_and_files_are_named(adapters, adapter_set):
    with refused(str(adapters / "none"), OBJECTIVE):
        read_adapter(adapters / "none")
    with refused(str(adapters), MANIFEST):
        load_set(adapters)
    (adapters / "a" / WEIGHTS).unlink()
    with refused(str(adapters / "a" / WEIGHTS)):
        read_adapter(adapters / "a")
    shutil.rmtree(adapter_set / "b")
    with refused(str(adapter_set / "b")):
        load_set(adapter_set)


def test_truncated_weights_are_named(adapter_set):
    file = adapter_set / "b" / WEIGHTS
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        edit_entry(adapter_set, 1, weights={"sha256": file_hash(file), "bytes": max(8, length), "rank": 2})
        with refused(str(file), "truncated"):
            load_set(adapter_set)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(adapters, value):
    tensors = load_file(adapters / "a" / WEIGHTS)
    culprit = sorted(tensors)[3]
    tensors[culprit].view(-1)[-1] = value
    replace_weights(adapters / "a", tensors)
    with refused(str(adapters / "a" / WEIGHTS), culprit, "finite"):
        read_adapter(adapters / "a")


def test_weights_without_tensors_are_named(adapters):
    replace_weights(adapters / "a", {})
    with refused(str(adapters / "a" / WEIGHTS), "no tensors"):
        read_adapter(adapters / "a")


def test_weights_other_than_those_recorded_are_named(adapters):
    shutil.copyfile(adapters / "b" / WEIGHTS, adapters / "a" / WEIGHTS)
    with refused(str(adapters / "a" / WEIGHTS), "sha256"):
        read_adapter(adapters / "a")


# An adapter and a base that do not fit.


@pytest.mark.parametrize("other", ["second", "wider"])
def test_an_adapter_of_another_base_is_refused(bases, adapters, adapter_set, other):
    pipeline = load_pipeline(str(bases[other]))
    with refused("'a'", str(adapters / "a"), str(bases["first"])):
        load_adapter(backbone_of(pipeline), read_adapter(adapters / "a"), base_fingerprint(pipeline.unet))
    with refused(str(bases["first"])):
        FusedSampler.from_pretrained(adapter_set, pipeline=pipeline)
    assert not hasattr(pipeline.unet, "peft_config")


def test_tensors_that_did_not_arrive_are_named(bases, adapters):
    """A layer the base lacks; diffusers says so in its log alone."""
    tensors = load_file(adapters / "a" / WEIGHTS)
    culprit = sorted(tensors)[0]
    stray = culprit.replace("attn1", "attn9")
    assert stray != culprit
    replace_weights(adapters / "a", tensors | {stray: tensors[culprit].clone()})
    pipeline = load_pipeline(str(bases["first"]))
    with refused(str(adapters / "a" / WEIGHTS), "attn9"):
        load_adapter(backbone_of(pipeline), read_adapter(adapters / "a"), base_fingerprint(pipeline.unet))


# A manifest that is broken.


@pytest.mark.parametrize(
    "key",
    ["base", "adapters", "reference", "guidance", "guidance_scale", "num_inference_steps", "default_weights"],
)
def test_a_missing_key_of_a_set_is_named(adapter_set, key):
    edit(adapter_set / MANIFEST, **{key: ...})
    with refused(str(adapter_set / MANIFEST), repr(key)):
        load_set(adapter_set)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("place", ["../a", "..", ".", "", "sub/a", "/a", "a/", 5, None])
def test_a_manifest_can_not_point_outside_its_set(adapters, adapter_set, place):
    shutil.copytree(adapters / "a", adapter_set.parent / "a")  # what ../a would find
    edit_entry(adapter_set, 0, folder=place)
    with refused(str(adapter_set / MANIFEST), repr(place)):
        load_set(adapter_set)


def test_an_absolute_folder_in_a_manifest_is_refused(adapters, adapter_set):
    edit_entry(adapter_set, 0, folder=str(adapters / "a"))
    with refused(str(adapter_set / MANIFEST), str(adapters / "a")):
        load_set(adapter_set)


def test_an_adapter_exchanged_after_the_set_was_made_is_named(adapters, adapter_set):
    """Of the same size and whole in itself."""
    shutil.copyfile(adapters / "scale" / WEIGHTS, adapter_set / "b" / WEIGHTS)
    with refused(str(adapter_set / "b" / WEIGHTS), "sha256"):
        load_set(adapter_set)


def test_an_adapter_exchanged_after_the_set_was_read_is_named(adapters, adapter_set, bases):
    """What is loaded is what was checked, whatever happens to the file in between."""
    loaded = load_set(adapter_set)
    shutil.copyfile(adapters / "scale" / WEIGHTS, adapter_set / "b" / WEIGHTS)
    with refused(str(adapter_set / "b" / WEIGHTS), "sha256"):
        FusedSampler.from_pretrained(loaded)


def test_a_set_that_names_another_base_is_refused(adapters, adapter_set):
    edit(adapter_set / MANIFEST, base=read_adapter(adapters / "of-second").base | {"name_or_path": "emoji"})
    with refused("'emoji'", "base"):
        FusedSampler.from_pretrained(adapter_set)


def test_a_set_whose_base_has_another_noise_path_is_refused(adapter_set, bases):
    base = json.loads((adapter_set / MANIFEST).read_text())["base"]
    pipeline = load_pipeline(str(bases["first"]))
    path = describe_base(backbone_of(pipeline), "first")["noise_path"]
    assert (path["beta_schedule"], path["prediction_type"]) == ("scaled_linear", "epsilon")
    edit(adapter_set / MANIFEST, base=base | {"noise_path": path})
    assert FusedSampler.from_pretrained(adapter_set).names == ["a", "b"]
    edit(adapter_set / MANIFEST, base=base | {"noise_path": path | {"beta_schedule": "linear"}})
    with refused("beta_schedule", "'scaled_linear'", "'linear'"):
        FusedSampler.from_pretrained(adapter_set)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        (dict(default_weights={"a": 1, "bright": 1}), "'bright'"),
        (dict(default_weights={"a": 0, "b": 0}), "a=0"),
        (dict(default_weights={"a": "much", "b": 1}), MANIFEST),
        (dict(default_weights=5), MANIFEST),
        (dict(adapters=[]), MANIFEST),
        (dict(adapters=5), MANIFEST),
        (dict(adapters=["a", "b"]), MANIFEST),
        (dict(base="stable-diffusion"), MANIFEST),
        (dict(base={"name_or_path": "x"}), "architecture"),
        (dict(reference={"kind": "eta", "eta": -1}), "-1"),
        (dict(guidance="both"), "'both'"),
        (dict(guidance_scale=None), MANIFEST),
        (dict(num_inference_steps=0), "0"),
        (dict(num_inference_steps="many"), "many"),
    ],
    ids=str,
)
def test_a_value_that_makes_no_set_is_named(adapter_set, changes, culprit):
    edit(adapter_set / MANIFEST, **changes)
    with refused(str(adapter_set / MANIFEST), culprit):
        load_set(adapter_set)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"sha256": None}, "sha256"),
        ({"sha256": "0" * 63}, "sha256"),
        ({"num_inference_steps": 2.7}, "2.7"),
        ({"guidance_scale": 1e308 * 10}, "NaN and Infinity"),
        ({"guidance_scale": "1e999"}, "guidance_scale inf"),
    ],
)
def test_a_value_of_an_adapter_folder_that_would_be_bent_is_refused(adapters, change, culprit):
    values = json.loads((adapters / "a" / OBJECTIVE).read_text()) | change
    (adapters / "a" / OBJECTIVE).write_text(json.dumps(values))
    with refused(str(adapters / "a" / OBJECTIVE), culprit):
        read_adapter(adapters / "a")


def test_a_file_that_changes_while_a_set_is_made_of_it_is_not_copied(adapters, tmp_path, monkeypatch):
    copy = shutil.copyfile

    def other(source, target):
        return copy(adapters / "b" / WEIGHTS, target)  # as if it was replaced after its header was read

    monkeypatch.setattr("stepfuse.fuse.sets.adapter.shutil.copyfile", other)
    with refused(f"a/{WEIGHTS}", "sha256"):
        create_set(tmp_path / "set", [adapters / "a"])
    assert list(tmp_path.iterdir()) == [adapters]

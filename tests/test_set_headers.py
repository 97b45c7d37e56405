"""LoRA files from strangers: nothing of a header is believed, and no tensor is read before its header was."""

import json
import shutil
import time
from contextlib import nullcontext, suppress

import pytest
import torch
from safetensors.torch import load_file, save

from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.lora.config import METADATA, Patterns
from stepfuse.fuse.lora.file import open_lora
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import load_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.manifest import MANIFEST
from tests.fixtures_strangers import (
    LAYER,
    A,
    B,
    edit,
    enlarged,
    frugal,
    packed,
    put_weights,
    tensors,
)
from tests.fixtures_tiny import refused

# What a file of weights says of itself.


def test_a_header_of_a_billion_elements_a_thousand_times_is_refused_unread(stranger):
    header, size = tensors({A: (1, 10**12), B: (32, 1)})
    file = stranger / "a" / WEIGHTS
    with frugal():
        put_weights(stranger, packed(header), rank=1)
        with refused(str(file), "truncated"):
            load_set(stranger)
        try:
            enlarged(file, header, size)
        except OSError:
            pytest.skip("no file of 4 TB here, even of nothing")
        with refused(str(file), "bytes"):
            load_set(stranger)
        edit(stranger, "adapters", 0, weights={"sha256": "0" * 64, "bytes": file.stat().st_size, "rank": 1})
        with refused(str(stranger / MANIFEST), "bytes"):
            load_set(stranger)
        with refused(str(file), "bytes"), open_lora(file, ["unet"]):
            pass


def test_a_tensor_too_large_for_a_lora_is_refused_unread(stranger):
    header, size = tensors({A: (1, 2**30), B: (32, 1)})
    file = enlarged(stranger / "a" / WEIGHTS, header, size)
    edit(stranger, "adapters", 0, weights={"sha256": "0" * 64, "bytes": file.stat().st_size, "rank": 1})
    with frugal(), refused(str(file), "too large"):
        load_set(stranger)


def test_a_tensor_of_many_dimensions_is_refused_before_they_are_multiplied(stranger):
    header, size = tensors({A: (2, 32), B: (32, 2)})
    header[A]["shape"] = [10**19] * 300_000
    file = put_weights(stranger, packed(header, bytes(size)))
    with frugal(), refused(str(file), "300,000 dimensions"):
        load_set(stranger)


def test_a_header_that_other_readers_would_not_take_is_refused(stranger):
    header, size = tensors({A: (2, 32), B: (32, 2)})
    text = b"\xef\xbb\xbf" + json.dumps(header).encode()
    file = put_weights(stranger, len(text).to_bytes(8, "little") + text + bytes(size))
    with refused(str(file), "not a JSON object"):
        load_set(stranger)


def test_of_two_spellings_of_one_layer_in_a_rank_pattern_the_first_counts():
    patterns = Patterns({"r": 2, "rank_pattern": {"a.b": 4, "a\\.b": 8}})
    assert patterns.rank("x.a.b", 2) == 4


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 2**24 + 1, 0])
def test_a_length_that_no_header_has_is_refused(stranger, length):
    header, size = tensors({A: (2, 32), B: (32, 2)})
    file = put_weights(stranger, packed(header, bytes(size), length))
    with frugal(), refused(str(file), "truncated or no safetensors"):
        load_set(stranger)


@pytest.mark.parametrize(
    "offsets",
    [([0, 256], [128, 384]), ([0, 256], [264, 520]), ([0, 256], [512, 256]), ([0, 256], [256, 2**62])],
    ids=str,
)
def test_tensors_that_overlap_or_leave_holes_are_refused(stranger, offsets):
    shapes = {A: [2, 32], B: [32, 2]}
    header = {
        key: {"dtype": "F32", "shape": shape, "data_offsets": place}
        for (key, shape), place in zip(shapes.items(), offsets, strict=True)
    }
    file = put_weights(stranger, packed(header, bytes(520)))
    with refused(str(file), "truncated or no safetensors"):
        load_set(stranger)


@pytest.mark.parametrize("dtype", ["F\n32", "\0", "I64", "F8_E4M3", "BOOL"])
def test_another_kind_of_numbers_is_refused(stranger, dtype):
    header, size = tensors({A: (2, 32), B: (32, 2)})
    header = {key: own | {"dtype": dtype} for key, own in header.items()}
    file = put_weights(stranger, packed(header, bytes(size)))
    with refused(str(file)):
        load_set(stranger)


def long_name(size):
    """A name of 1,250 times as many parts."""
    return {f"unet.{'a.' * 1250 * size}a.lora_{factor}.weight": (1, 1) for factor in "AB"}, {"unet.r": 1}


def many_patterns(size):
    """250 times as many layers, beside 6,250 times as many patterns."""
    shapes = {f"unet.m{i}.lora_{factor}.weight": (1, 1) for i in range(250 * size) for factor in "AB"}
    return shapes, {"unet.r": 1, "unet.rank_pattern": {f"x{i}": 1 for i in range(6250 * size)}}


@pytest.mark.parametrize("make", [long_name, many_patterns])
def test_long_names_and_many_patterns_take_time_in_proportion(stranger, make):
    """Files of 8 times the size: 8 times as long where each part is read once, 64 times where it meets all others."""
    seconds = {1: [], 8: []}
    for size in (1, 8) * 3:  # the least of three, for the machine may have other work
        shapes, config = make(size)
        header, end = tensors(shapes, metadata=json.dumps(config))
        (stranger / "a" / WEIGHTS).write_bytes(packed(header, bytes(end)))
        begun = time.process_time()
        with frugal(), suppress(ValueError), open_lora(stranger / "a" / WEIGHTS, ["unet"]):
            pass
        seconds[size].append(time.process_time() - begun)
    assert min(seconds[8]) < 24 * min(seconds[1])


# peft's configuration in a file of weights.


def put_config(stranger, metadata):
    """The weights of `a` again, with this metadata: text, or settings."""
    if not isinstance(metadata, str):
        metadata = json.dumps({f"unet.{name}": value for name, value in metadata.items()})
    return put_weights(stranger, save(load_file(stranger / "a" / WEIGHTS), metadata={METADATA: metadata}))


def test_settings_that_no_forward_needs_are_not_handed_on(stranger):
    idle = dict(
        megatron_core="os",
        target_modules="(.*.*)*(.*.*)*x",
        exclude_modules="(.*.*)*(.*.*)*x",
        layers_to_transform=[9],
        layers_pattern="(a+)+$",
        auto_mapping={"parent_library": "os", "base_model_class": "system"},
        base_model_name_or_path="/etc/passwd",
        lora_dropout=0.5,
        task_type="x",
    )
    put_config(stranger, idle | {"r": 2})
    with frugal(seconds=20.0, most=2**29):
        config = FusedSampler.from_pretrained(stranger).pipeline.unet.peft_config["a"]
    assert not [name for name, value in idle.items() if getattr(config, name) == value]
    assert config.target_modules == {LAYER}


@pytest.mark.parametrize(
    ("metadata", "culprit"),
    [
        (dict(r=10**9), "1000000000"),
        (dict(r=3), "rank 2"),
        (dict(r=True), "True"),
        (dict(lora_alpha=-1), "-1"),
        (dict(lora_alpha=0), "lora_alpha 0"),
        (dict(lora_alpha=float("nan")), "NaN and Infinity are not valid JSON"),
        (dict(lora_alpha=float("inf")), "NaN and Infinity are not valid JSON"),
        (dict(lora_alpha="x"), "'x'"),
        (dict(lora_alpha=None), "None"),
        (dict(rank_pattern={"(a+)+$": 2}), "'(a+)+$'"),
        (dict(rank_pattern={LAYER: 3}), "rank 2"),
        (dict(alpha_pattern={LAYER: -1}), "alpha_pattern"),
        (dict(alpha_pattern=[[LAYER, 1]]), "alpha_pattern"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(modules_to_save=["conv_in"]), "modules_to_save"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(init_lora_weights="pissa_niter_4"), "'pissa_niter_4'"),
        (dict(peft_type="IA3"), "'IA3'"),
        (dict(bias="all"), "'all'"),
        (dict(use_dora="a\nb"), "use_dora"),
        ("no JSON", "metadata"),
        ('["unet.r"]', "metadata"),
        ('{"unet.r": 1e999}', "too large a number"),
        ('{"unet.r": ' + "9" * 5000 + "}", "metadata"),
        ("[" * 10**5, "metadata"),
        ('{"a\\nb": 1}', "metadata"),
        ('{"text_encoder.r": 2}', "text_encoder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_of_something_else_than_a_lora_are_refused(stranger, metadata, culprit):
    file = put_config(stranger, metadata)
    with frugal(seconds=1.0), refused(str(file), culprit):
        load_set(stranger)


# What a set is put on.


@pytest.mark.parametrize(
    "shapes", [{A: (1, 2**27), B: (32, 1)}, {A: (2, 32), B: (2**26, 2)}], ids=["inputs", "outputs"]
)
def test_tensors_of_another_layer_are_refused_by_the_base_unread(stranger, small_base, shapes):
    """Exchanged after the set was read: a quarter of a GB."""
    loaded, pipeline = load_set(stranger), load_pipeline(str(small_base))
    file = enlarged(stranger / "a" / WEIGHTS, *tensors(shapes, dtype="F16"))
    with frugal():
        with refused(str(file), LAYER, "shape"):
            load_adapter(backbone_of(pipeline), loaded.adapters[0], base_fingerprint(pipeline.unet))
        with refused(str(file), LAYER, "shape"):
            FusedSampler.from_pretrained(loaded, pipeline=pipeline)
    assert not hasattr(pipeline.unet, "peft_config")


@pytest.mark.parametrize("more", [{"lora_magnitude_vector": (1, 32)}, {"lora_B.bias": (1, 32)}], ids=str)
def test_magnitudes_and_biases_of_another_shape_are_refused(stranger, more):
    header, size = tensors({A: (2, 32), B: (32, 2)} | {f"unet.{LAYER}.{key}": shape for key, shape in more.items()})
    file = put_weights(stranger, packed(header, bytes(size)))
    with refused(str(file), LAYER, "[1, 32]"):
        FusedSampler.from_pretrained(stranger)


def test_a_lora_on_another_adapters_lora_is_refused(stranger):
    """Of `a` on `b`, which is there when `a` comes."""
    shapes = {"A": (2, 32), "B": (2, 2)}
    state = {f"unet.{LAYER}.lora_A.b.lora_{factor}.weight": torch.ones(shape) for factor, shape in shapes.items()}
    file = put_weights(stranger, save(state))
    edit(stranger, adapters=json.loads((stranger / MANIFEST).read_text())["adapters"][::-1])
    with refused(str(file), "lora_A.b"):
        FusedSampler.from_pretrained(stranger)


def test_numbers_that_the_base_cannot_hold_are_refused(stranger):
    state = {key: value.double() * 1e300 for key, value in load_file(stranger / "a" / WEIGHTS).items()}
    file = put_weights(stranger, save(state))
    with refused(str(file), "lora_"):
        FusedSampler.from_pretrained(stranger)


NAMES = ["half", "keys", "training", "_modules", "__class__", "default", "base_layer", "lora_A"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_put_on_the_base_or_refused(stranger, name):
    edit(stranger, "adapters", 0, name=name)
    edit(stranger, default_weights={name: 1})
    told = str(stranger)
    try:
        assert FusedSampler.from_pretrained(stranger).names == [name, "b"]
    except ValueError as error:
        told = str(error)
    assert str(stranger) in told
    assert told.isprintable()


@pytest.mark.parametrize("probe", [[0] * 64, [10**19] * 64, [1e30] * 64], ids=["whole", "large whole", "large"])
def test_any_probe_of_a_base_is_compared(stranger, probe):
    edit(stranger, "base", probe=probe)
    with refused("not the set's base"):
        FusedSampler.from_pretrained(stranger)


@pytest.mark.parametrize("rule", ["product", "code", "rgg"])
def test_a_set_runs_nothing_that_it_names_as_a_reward(stranger, tmp_path, rule):
    """The rule is the set's own choice too."""
    marker, file = tmp_path / "made", tmp_path / "evil.py"
    file.write_text(
        f"open({str(marker)!r}, 'w').close()\n\n\ndef f(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    edit(stranger, default_rule=rule)
    for place in (0, 1):
        edit(stranger, "adapters", place, "reward", name=f"{file}:f")
    load_set(stranger)
    with nullcontext() if rule == "product" else refused(str(file)):
        FusedSampler.from_pretrained(stranger)
    assert not marker.exists()


def test_a_set_whose_base_brings_code_does_not_run_it(stranger, small_base, tmp_path):
    marker, own = tmp_path / "made", shutil.copytree(small_base, stranger / "own")
    index = json.loads((own / "model_index.json").read_text())
    for name, changes in {"pipeline": {"_class_name": ["evil", "Evil"]}, "unet": {"unet": ["evil", "Evil"]}}.items():
        (own / "model_index.json").write_text(json.dumps(index | changes))
        for place in (own / "evil.py", own / "unet" / "evil.py"):
            place.write_text(f"open({str(marker)!r}, 'w').close()\n\n\nclass Evil: ...\n")
        edit(stranger, "base", name_or_path=str(own))
        with pytest.raises(Exception):  # noqa: B017, PT011
            FusedSampler.from_pretrained(stranger)
        assert not marker.exists(), name

"""Sets mutated by chance: each is refused in one line that names a file of it, or holds what a set should.

STEPFUSE_FUZZ is the number of mutations by chance, of manifests and weights together; each kind of them comes beside
these whatever the number.
"""

import copy
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, example, given, reject, settings
from hypothesis import strategies as st

from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, TableSchedule
from stepfuse.fuse.lora.config import METADATA
from stepfuse.fuse.lora.factors import Factors
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.fuse.sets.manifest import MANIFEST
from tests.fixtures_tiny import save_stable_diffusion

EXAMPLES = int(os.environ.get("STEPFUSE_FUZZ", "1000"))
SECONDS = 2.0  # of computing, of one example
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
REWARDS = {"a": "reward_of_a", "b": "reward_of_b", "both": "weighted:0.5*reward_of_a/2 + 0.5*reward_of_b"}
SCHEDULES = {
    "a": EtaSchedule(eta=0.5),
    "b": TableSchedule(etas=(1.0, 0.5)),
    "both": LearnedSchedule(offsets=torch.tensor([-0.5, 0.5])),
}
# What `json` would not write, put in as text.
RAW = {'"@1e999@"': "1e999", '"@digits@"': "9" * 5000, '"@deep@"': "[" * 2000 + "]" * 2000, "@twice@": ""}
VALUES = r"""
null, true, false, 0, 1, -1, 2, 3.0, 0.5, -0.0, 5e-324, 1e30, -1e30, 1e308, NaN, Infinity, -Infinity, "@1e999@"
2147483648, 9223372036854775808, 18446744073709551615, 99999999999999999999, "@deep@"
"", "@digits@", "a", "b", "both", "a\n", "x\ny", "\u0000", "\ud800", "\u2028", "é", "../a", "..", "/", "NaN", "F\n32"
"code", "soup", "keys", "half", "off", "eta", "table", "learned", "/nowhere/evil.py:f", "weighted:1*reward_of_a"
"weighted:", "(a+)+$", "F16", "BF16", "F64", "I64", "F8_E4M3", "pissa", "IA3", "-", "0.5", "to_q"
[], {}, [[]], [{}], [0], [1], [0, 1], [2, 32], [32, 2], [9223372036854775808, 0], [-1, 1], [0, 256], [[[[[[]]]]]]
{"a": 1}, {"a": -1, "b": 2}, {"a": 1e30, "b": 1}, {"kind": "eta", "eta": 0}, {"x": {"y": [null]}}, {"to_q": 2}, [[0, 1]]
"""
VALUES = [value for line in VALUES.strip().splitlines() for value in json.loads(f"[{line}]")] + ["x" * 3000, [1] * 64]
KEYS = ["a", "x\ny", "", "\ud800", "@twice@name", "@twice@shape", "inputs", "__metadata__", METADATA]
KEYS += ["unet.r", "unet.use_dora", "unet.alpha_pattern", "unet.modules_to_save"]
KEYS += [f"unet.{LAYER}.{kind}" for kind in ("lora_A.weight", "lora_B.bias", "lora_magnitude_vector")]

HOW = ["nudge"] * 6 + ["replace"] * 4 + ["add"] * 2 + ["delete", "rename", "double", "wrap", "graft"]
MORE = ("oracles", "profiles", "evaluation")
WALK = st.tuples(st.integers(1, 6), st.integers(0, 2**36 - 1))  # how far, and a place out of 64 at each level
EDIT = st.tuples(WALK, st.sampled_from(HOW), st.sampled_from(VALUES), st.sampled_from(KEYS))
EDITS = st.lists(EDIT, min_size=1, max_size=2)
# Each value in the place of another and beside others, each key, and what has neither in many places.
KINDS = [(how, value, "a") for value in VALUES for how in ("replace", "add")]
KINDS += [(how, None, key) for key in KEYS for how in ("rename", "double")]
KINDS += [(how, None, "a") for how in ("nudge", "delete", "wrap", "graft") for _ in range(24)]
WHERE = st.sampled_from(["header", "metadata"])
NUDGE = st.tuples(WALK, st.just("nudge"), st.none(), st.just("a"))
PLACE = st.integers(0, 2**13)
FLIP = st.tuples(PLACE, st.integers(1, 255))
BYTES = st.tuples(st.lists(FLIP, max_size=2), st.none() | PLACE, st.sampled_from([b"", b"}", b"\xff", b"\0"]))
FUZZ = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=EXAMPLES
)


def with_each_kind(run, **chosen):
    """Examples of one edit each, at places spread over the document, beside those by chance."""
    for number, kind in enumerate(KINDS):
        walk = (1 + number % 6, number * 0x9E3779B97 % 2**36)
        run = example(edits=[(walk, *kind)], **chosen)(run)
    return run


def share(tenths: int) -> int:
    return max(1, EXAMPLES * tenths // 10)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A set to be mutated: its folder, and what its manifest and the weights of `a` were."""

    folder: Path
    manifest: bytes
    header: bytes
    data: bytes

    @property
    def weights(self) -> Path:
        return self.folder / "a" / WEIGHTS

    def restore(self) -> None:
        rewrite(self.folder / MANIFEST, self.manifest)
        rewrite(self.weights, len(self.header).to_bytes(8, "little") + self.header + self.data)

    def values(self, *, whole: bool) -> dict:
        """The manifest; or less of it, which takes half the time."""
        values = json.loads(self.manifest)
        return values if whole else {key: value for key, value in values.items() if key not in MORE}

    def put(self, content: bytes, known: bool) -> None:
        """Other weights for `a`, in a set of `a` alone; where they are known, its manifest is of them."""
        values = self.values(whole=False) | {"default_weights": {"a": 1}}
        del values["adapters"][1]
        if known:
            sha256 = hashlib.sha256(content).hexdigest()
            values["adapters"][0]["weights"] |= {"sha256": sha256, "bytes": len(content)}
        rewrite(self.weights, content)
        rewrite(self.folder / MANIFEST, json.dumps(values).encode())


def rewrite(file: Path, content: bytes) -> None:
    """In place: a file cut to nothing first is written to the disk each time by some file systems."""
    with open(file, "r+b") as handle:
        handle.write(content)
        handle.truncate()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Two adapters and an oracle of one layer each, with a profile and an evaluation; and files beside the set."""
    root = tmp_path_factory.mktemp("fuzz")
    base = save_stable_diffusion(root / "base")
    described = {"name_or_path": str(base)} | base_fingerprint(load_pipeline(str(base)).unet)
    generator = torch.Generator().manual_seed(0)
    for name, reward in REWARDS.items():
        down, up = (0.1 * torch.randn(shape, generator=generator) for shape in ((2, 32), (32, 2)))
        write_adapter(
            Adapter(
                folder=root / name,
                objective=Objective(name=name, reward=reward, variance=SCHEDULES[name], beta=0.1),
                base=described,
                guidance="shared",
                guidance_scale=3.0,
                num_inference_steps=3,
                record={"steps": 5, "validation": {"before": {"reward": 0.5, "deviation": 0.1, "images": 8}}},
            ),
            {LAYER: Factors(down=down, up=up, alpha=4.0)},
            "unet",
        )
    create_set(root / "set", [root / "a", root / "b"], oracles=[root / "both"])
    manifest = json.loads((root / "set" / MANIFEST).read_text())
    run = dict(num_inference_steps=3, guidance="shared", guidance_scale=3.0)
    manifest["profiles"] = [run | dict(images=2, mixtures=[{"a": 0.5, "b": 0.5}], gaps=[[0.1, 0.2, None]])]
    cell = dict(rule="product", weights="a=1", strength=1, gains={"a": dict(mean=1.0, low=0.5, high=None)})
    manifest["evaluation"] = dict(prompts=1, seeds=1, objectives=REWARDS, cells=[cell])
    content = (root / "set" / "a" / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    manifest = json.dumps(manifest).encode()
    made = Target(folder=root / "set", manifest=manifest, header=content[8:end], data=content[end:])
    made.restore()
    load_set(made.folder)
    return made


def contents(folder):
    """Names, and hashes of the files."""
    return {
        str(place.relative_to(folder)): hashlib.sha256(place.read_bytes()).hexdigest() if place.is_file() else None
        for place in folder.rglob("*")
    }


def mutate(values, edits):
    """Change JSON values at the ends of walks through them."""
    for (length, turns), how, value, key in edits:
        holder, place, node = None, None, values
        for level in range(length):
            if not isinstance(node, dict | list) or not node:
                break
            places = list(node) if isinstance(node, dict) else range(len(node))
            holder, place = node, places[(turns >> 6 * level) % len(places)]
            node = holder[place]
        if holder is None:
            continue
        if how == "replace":
            holder[place] = copy.deepcopy(value)
        elif how == "nudge":
            holder[place] = nudged(node, length + turns % 5)
        elif how == "delete":
            del holder[place]
        elif how == "add":
            node = node if isinstance(node, dict | list) else holder
            more = copy.deepcopy(value)
            node.append(more) if isinstance(node, list) else node.update({key: more})
        elif how in ("rename", "double") and isinstance(holder, dict):
            holder[key] = holder.pop(place) if how == "rename" else copy.deepcopy(node)
        elif how == "double":
            holder.insert(place, copy.deepcopy(node))
        elif how == "wrap":
            holder[place] = [node] if length % 2 else {key: node}
        elif how == "graft":
            holder[place] = copy.deepcopy(list(values.values())[turns % len(values)])
    return values


def nudged(value, way):
    """Another of its type, or nearly."""
    if isinstance(value, bool | None):
        return [not value, int(bool(value)), str(value)][way % 3]
    if isinstance(value, int | float):
        return [float(value), -value, value + 1, value * 10**6, str(value), value / 3][way % 6]
    if isinstance(value, str):
        return [value + "\n", value + "\u2028", "../" + value, value.upper(), value[:-1], [value], value * 9][way % 7]
    if isinstance(value, list):
        return [value[::-1], value * 2, value[:-1], dict.fromkeys(map(str, value)), value[:1]][way % 5]
    return [dict(reversed(value.items())), list(value.values()), dict.fromkeys(value), {}][way % 4]


def written(values):
    text = json.dumps(values)
    for placeholder, raw in RAW.items():
        text = text.replace(placeholder, raw)
    return text.encode()


def broken(content, damage):
    """With bytes flipped, cut short, and with more bytes at its end."""
    flips, cut, more = damage
    content = bytearray(content)
    for place, byte in flips:
        if content:
            content[place % len(content)] ^= byte
    return bytes(content[: None if cut is None else cut % (len(content) + 1)] + more)


def mutated_header(target, where, edits):
    header = json.loads(target.header)
    if where == "header":
        return written(mutate(header, edits))
    header["__metadata__"][METADATA] = written(mutate(json.loads(header["__metadata__"][METADATA]), edits)).decode()
    return json.dumps(header).encode()


def load_or_refuse(folder):
    """Of `load_set`, in good time: a set that is one, or None where an error of one line names a file of the folder."""
    begun = time.process_time()
    loaded, told = made_or_told(lambda: load_set(folder))
    assert time.process_time() - begun < SECONDS
    event("refused" if loaded is None else "loaded")
    if loaded is None:
        assert f"{folder}/" in told, told
    else:
        check_values(loaded)
    return loaded


def made_or_told(make):
    """What is made, or None and why not, in one line."""
    told = ""
    try:
        return make(), told
    except ValueError as error:
        told = str(error)
    assert told.isprintable(), repr(told)
    return None, told


def check_values(loaded):
    numbers = [loaded.guidance_scale, *loaded.reward_scales.values()]
    for adapter in loaded.all_adapters:
        objective = adapter.objective
        numbers += [objective.temperature, objective.shaping.shift, *objective.shaping.clip, adapter.guidance_scale]
        assert objective.temperature >= 0
        assert adapter.folder.resolve().parent == loaded.adapters[0].folder.resolve().parent
        for count in (adapter.num_inference_steps, loaded.num_inference_steps):
            assert type(count) is int
            assert count >= 1
    table = weight_table([loaded.default_weights, *(oracle.weights for oracle in loaded.oracles)], loaded.names)
    assert all(math.isfinite(number) for number in numbers)
    assert torch.isfinite(table).all()
    assert ((table.sum(1) - 1).abs() <= 1e-9 * table.abs().sum(1)).all()
    assert len({adapter.name for adapter in loaded.all_adapters}) == len(loaded.all_adapters)


@pytest.fixture
def untouched(target):
    """See that nothing is changed or left beside what a test changes itself."""
    before = contents(target.folder.parent)
    yield
    target.restore()
    assert contents(target.folder.parent) == before


@pytest.mark.usefixtures("untouched")
def test_a_mutated_manifest_is_refused_or_makes_a_set(target):
    @settings(FUZZ, max_examples=share(4))
    @given(edits=EDITS, whole=st.sampled_from([True, False, False, False]))
    def run(edits, whole):
        rewrite(target.folder / MANIFEST, written(mutate(target.values(whole=whole), edits)))
        load_or_refuse(target.folder)

    with_each_kind(run, whole=True)()


@pytest.mark.usefixtures("untouched")
def test_a_manifest_with_other_bytes_is_refused_or_makes_a_set(target):
    @settings(FUZZ, max_examples=share(2))
    @given(damage=BYTES)
    def run(damage):
        rewrite(target.folder / MANIFEST, broken(target.manifest, damage))
        load_or_refuse(target.folder)

    run()


@pytest.mark.usefixtures("untouched")
def test_mutated_weights_are_refused_or_make_a_set(target):
    @settings(FUZZ, max_examples=share(3))
    @given(
        where=WHERE, edits=EDITS, fixed=st.sampled_from([True, True, True, False]), known=st.sampled_from([True, False])
    )
    def run(where, edits, fixed, known):
        header = mutated_header(target, where, edits)
        length = len(header if fixed else target.header)
        target.put(length.to_bytes(8, "little") + header + target.data, known)
        load_or_refuse(target.folder)

    for where in ("header", "metadata"):
        run = with_each_kind(run, where=where, fixed=True, known=True)
    run()


@pytest.mark.usefixtures("untouched")
def test_weights_with_other_bytes_are_refused_or_make_a_set(target):
    whole = target.weights.read_bytes()

    @settings(FUZZ, max_examples=share(1))
    @given(damage=BYTES, known=st.sampled_from([True, False]))
    def run(damage, known):
        target.put(broken(whole, damage), known)
        load_or_refuse(target.folder)

    run()


@pytest.mark.usefixtures("untouched")
def test_a_mutated_set_that_loads_goes_on_its_base_or_is_refused(target):
    base = str(target.folder.parent / "base")

    @settings(FUZZ, max_examples=max(1, EXAMPLES // 100))
    @given(
        edits=st.lists(NUDGE, max_size=2) | st.lists(EDIT, max_size=1),
        where=WHERE,
        weights_edits=st.lists(NUDGE | EDIT, max_size=1),
        flips=st.lists(FLIP, max_size=1),
    )
    def run(edits, where, weights_edits, flips):
        header = mutated_header(target, where, weights_edits)
        content = len(header).to_bytes(8, "little") + header + broken(target.data, (flips, None, b""))
        target.put(content, known=True)
        values = mutate(json.loads((target.folder / MANIFEST).read_text()), edits)
        rewrite(target.folder / MANIFEST, written(values))
        if (loaded := load_or_refuse(target.folder)) is None:
            reject()
        pipeline = load_pipeline(base)
        sampler, _ = made_or_told(lambda: FusedSampler.from_pretrained(loaded, pipeline=pipeline))
        event("refused by the base" if sampler is None else "on the base")
        if sampler is None:
            return
        assert sampler.names == loaded.names
        for name, parameter in sampler.pipeline.unet.named_parameters():
            assert torch.isfinite(parameter).all(), name

    run()

"""A set of a flow base is sampled on the noise path and the grid of times that its adapters were trained on."""

import json

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepfuse.fuse.backbones.fingerprint import check_path
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.manifest import MANIFEST
from tests.fixtures_tiny import refused

REWARDS = "def slope(images, prompts):\n    return images.mean((1, 2, 3))\n"
GRID = "linspace(1, 1/N)"


def path_of(**config):
    return NoisePath.from_scheduler(FlowMatchEulerDiscreteScheduler(**config))


def recorded(path, **changes):
    """The base of a manifest, through JSON."""
    return json.loads(json.dumps({"noise_path": path.describe() | changes}))


SHIFTED = dict(shift=3.0, use_dynamic_shifting=False)
DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)


@pytest.mark.parametrize("config", [SHIFTED, DYNAMIC])
def test_a_path_is_that_of_its_own_record(config):
    check_path(recorded(path_of(**config)), path_of(**config))


@pytest.mark.parametrize(
    ("config", "change", "culprits"),
    [
        (SHIFTED, {"shift": 1.0}, ["shift 1.0", "3.0"]),
        (SHIFTED, {"use_dynamic_shifting": True}, ["use_dynamic_shifting True", "False"]),
        (DYNAMIC, {"max_shift": 1.15}, ["max_shift 1.15", "0.9"]),
        (DYNAMIC, {"base_image_seq_len": 1024}, ["base_image_seq_len 1024", "256"]),
        (DYNAMIC, {"shift_terminal": None}, ["shift_terminal None", "0.02"]),
        (DYNAMIC, {"time_shift_type": "linear"}, ["time_shift_type 'linear'", "'exponential'"]),
    ],
)
def test_a_scheduler_with_another_shift_is_refused(config, change, culprits):
    with refused(*culprits, "load the base's own scheduler"):
        check_path(recorded(path_of(**config)), path_of(**config | change))


def test_a_flow_base_is_none_of_the_diffusion_kind():
    ddim = NoisePath.from_scheduler(DDIMScheduler(clip_sample=False))
    for of, loaded in ((ddim, path_of()), (path_of(), ddim)):
        with refused("family", "'flow'", "'variance_preserving'"):
            check_path(recorded(of), loaded)


def test_a_path_of_the_diffusion_kind_needs_no_record():
    check_path({}, NoisePath.from_scheduler(DDIMScheduler(clip_sample=False)))


@pytest.mark.parametrize(
    "base", [{}, {"noise_path": None}, {"noise_path": {"shift": 3.0}}, {"noise_path": {"family": "flow"}}]
)
def test_a_flow_base_without_a_grid_is_refused_with_the_remedy(base):
    with refused("no grid", "train its adapters again", f'add "grid": "{GRID}" to base.noise_path'):
        check_path(base, path_of(shift=3.0))


def test_another_grid_is_refused():
    with refused("the grid 'scheduler'", GRID):
        check_path(recorded(path_of(), grid="scheduler"), path_of())


def test_a_set_whose_record_was_made_by_hand_is_refused_until_it_is_complete(words, run_training, tmp_path):
    run_training("ddpo", pretrained_model_name_or_path=words, max_train_steps=1, objective_name="mine")
    create_set("set", ["out"])
    file = tmp_path / "set" / MANIFEST
    values = json.loads(file.read_text())
    path = values["base"]["noise_path"]
    assert (path["grid"], path["shift"], path["family"]) == (GRID, 2.0, "flow")
    assert {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"} <= path.keys()
    del path["grid"]
    file.write_text(json.dumps(values))
    with refused("no grid"):
        FusedSampler.from_pretrained("set")
    path["grid"] = GRID
    file.write_text(json.dumps(values))
    assert FusedSampler.from_pretrained("set").names == ["mine"]

"""Adapters of every kind on Stable Diffusion and Stable Diffusion XL, as training leaves them, for tests of layouts."""

import copy

import pytest
import torch
from torch import nn

from stepfuse.fuse.adapter import WEIGHTS, Objective, write_adapter
from stepfuse.fuse.factors import read_factors
from stepfuse.fuse.lora_export import export_adapter
from stepfuse.fuse.lora_file import open_lora
from stepfuse.fuse.pipeline import base_fingerprint, load_pipeline
from stepfuse.fuse.variance import EtaSchedule
from tests.fixtures_tiny import save_stable_diffusion, save_stable_diffusion_xl
from tests.fixtures_zoo import KINDS, add

FACTORS_ALONE = [kind for kind in KINDS if kind not in ("dora", "with_bias")]  # as kohya's files hold


def load_bases(root):
    """Never changed: whoever puts something on them takes a copy."""
    saved = {"sd": save_stable_diffusion(root / "sd"), "xl": save_stable_diffusion_xl(root / "xl")}
    return {name: load_pipeline(str(folder)) for name, folder in saved.items()}


def make_adapters(bases, root):
    """Folders as training leaves them, and the UNets they come from, by base and kind."""
    made = {}
    kinds = [("sd", kind) for kind in KINDS] + [("xl", kind) for kind in FACTORS_ALONE]
    for seed, (base, kind) in enumerate(kinds):
        pipeline = copy.deepcopy(bases[base])
        add(pipeline.unet, kind, KINDS[kind], seed=seed)
        adapter = write_adapter(
            root / base / kind,
            pipeline.unet,
            Objective(name=kind, reward="some", variance=EtaSchedule(), beta=0.1),
            base={"name_or_path": base} | base_fingerprint(pipeline.unet),
            guidance="shared",
            guidance_scale=3.0,
            num_inference_steps=3,
            record={},
            pipeline_class=type(pipeline),
        )
        made[base, kind] = adapter, pipeline.unet
    return made


def factors_of(adapters):
    return {made: read_factors(open_lora(adapter.folder / WEIGHTS)) for made, (adapter, _) in adapters.items()}


def assert_same(got, expected):
    """Layers bit for bit, and what they are multiplied by to the float32 that a file has."""
    assert got.keys() == expected.keys()
    for name, layer in expected.items():
        for tensor in ("down", "up", "magnitude", "bias"):
            one, other = getattr(got[name], tensor), getattr(layer, tensor)
            assert (one is None and other is None) or torch.equal(one, other)
        assert got[name].alpha == pytest.approx(layer.alpha, rel=1e-7)


def layers(unet):
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def export(adapters, base, kind, form, place):
    adapter, unet = adapters[base, kind]
    export_adapter(adapter, place, form=form, config=unet.config, prediction="epsilon")
    return place

"""Adapters of every kind on Stable Diffusion and Stable Diffusion XL, as training leaves them, for tests of layouts."""

import copy
import json

import torch
from torch import nn

from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.unet_names import UNetNames
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.config import METADATA
from stepfuse.fuse.lora.convert import read_foreign
from stepfuse.fuse.lora.export import save_kohya, save_lora, save_peft
from stepfuse.fuse.lora.factors import network_factors, peft_state
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sets.adapter import read_factors, write_adapter
from stepfuse.fuse.sets.entries import Adapter
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
            Adapter(
                folder=root / base / kind,
                objective=Objective(name=kind, reward="some", variance=EtaSchedule(), beta=0.1),
                base={"name_or_path": base} | base_fingerprint(pipeline.unet),
                guidance="shared",
                guidance_scale=3.0,
                num_inference_steps=3,
            ),
            network_factors(pipeline.unet, kind),
            "unet",
        )
        made[base, kind] = adapter, pipeline.unet
    return made


def read_any_layout(file, unet, *, network_only=False):
    """The layers of a LoRA in any layout, for a UNet."""
    return read_foreign(file, unet, UNetNames(config=unet.config), network_only=network_only)


def factors_of(adapters):
    """As peft holds them, before a file is written."""
    return {(base, kind): network_factors(unet, kind) for (base, kind), (_, unet) in adapters.items()}


def peft_states(adapters, base, kind):
    """Tensors and configuration as peft has them, and as files in diffusers' plain layout have them."""
    _, unet = adapters[base, kind]
    config = unet.peft_config[kind].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    header = json.dumps({f"unet.{key}": value for key, value in config.items()})
    state = {f"unet.{key}": value for key, value in peft_state(network_factors(unet, kind)).items()}
    return state, {METADATA: header}


def assert_same(got, expected):
    """A and magnitudes bit for bit; s B and s b, in which a file may have s or not, to the precision of float32."""
    assert got.keys() == expected.keys()
    for name, layer in expected.items():
        own = got[name]
        assert torch.equal(own.down, layer.down)
        torch.testing.assert_close(own.up * own.scaling, layer.up * layer.scaling, rtol=1e-6, atol=0)
        assert (own.magnitude is None) == (layer.magnitude is None)
        assert layer.magnitude is None or torch.equal(own.magnitude, layer.magnitude)
        assert (own.bias is None) == (layer.bias is None)
        if layer.bias is not None:
            torch.testing.assert_close(own.bias * own.scaling, layer.bias * layer.scaling, rtol=1e-6, atol=0)


def layers(unet):
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def export(adapters, base, kind, form, place):
    adapter, unet = adapters[base, kind]
    names = UNetNames(config=unet.config)
    part, factors = read_factors(adapter)
    if form == "diffusers":
        save_lora(place, factors, part)
    elif form == "peft":
        save_peft(place, factors, base)
    else:
        save_kohya(place, factors, names, title=adapter.name, prediction="epsilon")
    return place

"""Every LoRA file that stepfuse writes is read completely or not at all by diffusers, peft, ComfyUI and AUTOMATIC1111.

diffusers and peft are asked themselves. Of the other two, which are no packages, the names that they look for are
restated here as facts (ComfyUI comfy/lora.py and comfy/weight_adapter/lora.py, October 2025; AUTOMATIC1111
extensions-builtin/Lora/networks.py, 1.10).
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save

from stepfuse.data import emoji
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.unet_names import sgm_path
from stepfuse.fuse.lora.config import METADATA
from stepfuse.fuse.lora.export import save_lora
from stepfuse.fuse.lora.factors import network_factors, peft_state
from stepfuse.fuse.lora.file import open_lora
from stepfuse.fuse.lora.layers import lora_layers
from stepfuse.fuse.lora.merge import merge_factors
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import copy_set
from stepfuse.fuse.sets.manifest import MANIFEST
from stepfuse.train.checkpoints import read_state, write_state
from tests.fixtures_formats import FACTORS_ALONE, assert_same, export, layers, peft_states, read_any_layout
from tests.fixtures_strangers import LAYER, A, B, put_weights
from tests.fixtures_tiny import read_lora, refused
from tests.fixtures_zoo import KINDS, assert_alike, predict

# peft 0.21 takes the bias of a factor B for a factor that lost a dimension.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape.*lora_B.bias")

GUARDED = ["dora", "with_bias"]  # ComfyUI and AUTOMATIC1111 do not compute what these do
MADE = [("sd", kind) for kind in KINDS] + [("xl", kind) for kind in FACTORS_ALONE]


def comfyui_names(unet):
    """Names under which ComfyUI looks for the LoRA of a layer, by name."""
    names = {}
    for path in layers(unet):
        stability = sgm_path(path, unet.config)
        names |= {f"lora_unet_{spelling.replace('.', '_')}": path for spelling in (stability, path)}
        names |= {f"lycoris_{path.replace('.', '_')}": path, f"diffusion_model.{stability}": path}
        processor = path.replace(".to_", ".processor.to_")  # of attention, and of nothing else in these UNets
        if processor.endswith(".to_out.0"):
            processor = processor.removesuffix(".0")
        names |= {processor: path, f"unet.{processor}": path}
    return names


UPS = {  # the factors of one layer, after its name; the first that is there counts
    ".lora_up.weight": ".lora_down.weight",
    "_lora.up.weight": "_lora.down.weight",
    ".lora_B.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora.down.weight",
    ".lora_B": ".lora_A",
    ".lora_linear_layer.up.weight": ".lora_linear_layer.down.weight",
    ".lora_B.default.weight": ".lora_A.default.weight",
}


def comfyui(state, unet):
    """What ComfyUI adds to each layer, by A, B and alpha, and the number of tensors that it does not use."""
    added, used = {}, set()
    for name, path in comfyui_names(unet).items():
        up = next((end for end in UPS if name + end in state), None)
        if up is None:
            continue
        a, b = state[name + UPS[up]].double(), state[name + up].double()
        alpha = float(state.get(f"{name}.alpha", len(a)))
        added[path] = alpha / len(a) * b.flatten(1) @ a.flatten(1)
        used |= {name + up, name + UPS[up], f"{name}.alpha"}
    return added, len(state.keys() - used)


def automatic1111(state, unet):
    """Layers that AUTOMATIC1111 finds: what stands before the first dot is Stability's name of one, or diffusers'."""
    flat = {f"lora_unet_{sgm_path(path, unet.config).replace('.', '_')}": path for path in layers(unet)}
    flat |= {f"lora_unet_{path.replace('.', '_')}": path for path in layers(unet) if "add_embedding" not in path}
    return {flat[name] for name in {key.partition(".")[0] for key in state} if name in flat}


def true_sum(factors):
    return {
        name: layer.scaling * layer.up.double().flatten(1) @ layer.down.double().flatten(1)
        for name, layer in factors.items()
    }


def assert_whole(state, unet, factors):
    added, left = comfyui(state, unet)
    expected = true_sum(factors)
    assert (added.keys(), left) == (expected.keys(), 0)
    for name, delta in expected.items():
        torch.testing.assert_close(added[name], delta, rtol=0, atol=1e-6 * float(delta.abs().max()))


def assert_nothing(state, unet):
    assert comfyui(state, unet) == ({}, len(state))
    assert not automatic1111(state, unet)


def test_the_rules_find_a_part_of_a_file_in_diffusers_plain_layout(lora_bases, lora_adapters):
    """The layout that is not written: convolutions and feed-forward layers are found, attention is not."""
    state, _ = peft_states(lora_adapters, "sd", "plain")
    unet = lora_bases["sd"].unet
    found = comfyui(state, unet)[0].keys()
    assert found == {name for name in layers(unet) if ".attn" not in name}
    assert 0 < len(found) < len(layers(unet))


def test_the_policy_of_a_checkpoint_is_nothing_to_other_tools(lora_bases, lora_adapters, tmp_path):
    """It holds the tensors of that layout, and no scale."""
    state, _ = peft_states(lora_adapters, "sd", "plain")
    file, unet = tmp_path / "policy.safetensors", lora_bases["sd"].unet
    write_state({key.removeprefix("unet."): value for key, value in state.items()}, file)
    assert_nothing(load_file(file), unet)
    with refused(str(file), "checkpoint"):
        read_any_layout(file, unet, network_only=False)
    assert {f"unet.{key}" for key in read_state(file)} == set(state)


@pytest.mark.parametrize(("base", "kind"), MADE)
def test_the_file_of_an_adapter_is_read_completely_or_not_at_all(lora_bases, lora_adapters, lora_factors, base, kind):
    adapter, _ = lora_adapters[base, kind]
    state, unet = load_file(adapter.folder / WEIGHTS), lora_bases[base].unet
    if kind in GUARDED:
        assert_nothing(state, unet)
    else:
        assert_whole(state, unet, lora_factors[base, kind])
        assert not automatic1111(state, unet)


@pytest.mark.parametrize(("base", "kind"), MADE)
def test_diffusers_predicts_from_the_file_of_an_adapter_what_was_trained(lora_bases, lora_adapters, base, kind):
    adapter, trained = lora_adapters[base, kind]
    pipeline = copy.deepcopy(lora_bases[base])
    pipeline.load_lora_weights(adapter.folder)
    assert_alike(predict(pipeline.unet), predict(trained))


def test_peft_refuses_the_folder_of_an_adapter(lora_bases, lora_adapters):
    adapter, _ = lora_adapters["sd", "plain"]
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(copy.deepcopy(lora_bases["sd"].unet), str(adapter.folder))


@pytest.mark.parametrize(("base", "kind"), [(base, kind) for base, kind in MADE if kind not in GUARDED])
def test_an_export_to_kohyas_layout_is_read_completely_by_both(
    lora_bases, lora_adapters, lora_factors, base, kind, tmp_path
):
    state = load_file(export(lora_adapters, base, kind, "kohya", tmp_path / "x.safetensors"))
    unet = lora_bases[base].unet
    assert_whole(state, unet, lora_factors[base, kind])
    assert automatic1111(state, unet) == lora_factors[base, kind].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_to_pefts_layout_is_read_by_peft_alone(lora_bases, lora_adapters, kind, tmp_path):
    folder = export(lora_adapters, "sd", kind, "peft", tmp_path / "x")
    assert_nothing(load_file(folder / "adapter_model.safetensors"), lora_bases["sd"].unet)
    pipeline = copy.deepcopy(lora_bases["sd"])
    pipeline.load_lora_weights(folder, weight_name="adapter_model.safetensors")  # says so in its log
    assert not hasattr(pipeline.unet, "peft_config")


def test_a_merged_file_is_read_completely(lora_bases, lora_factors, tmp_path):
    merged, _ = merge_factors(
        [(kind, 0.5, lora_factors["sd", kind]) for kind in ("plain", "rank_stabilised", "patterns")]
    )
    save_lora(tmp_path / "x.safetensors", merged, "unet")
    assert_whole(load_file(tmp_path / "x.safetensors"), lora_bases["sd"].unet, merged)


def test_the_embedded_adapters_are_read_completely_by_diffusers_and_comfyui():
    pipeline = load_pipeline("emoji")
    files = sorted(emoji.ADAPTER_SET.glob(f"*/{WEIGHTS}"))
    assert len(files) == 7
    for file in files:
        state = load_file(file)
        added, left = comfyui(state, pipeline.unet)
        assert (len(added), left) == (92, 0)
    pipeline.load_lora_weights(files[0])
    (name,) = pipeline.unet.peft_config
    loaded, read = peft_state(network_factors(pipeline.unet, name)), read_lora(files[0])
    assert len(loaded) == len(read) == 2 * 92
    assert all(torch.equal(loaded[key.removeprefix("unet.")], value.float()) for key, value in read.items())
    assert {layer.scaling[name] for layer in lora_layers(pipeline.unet)} == {1}


WRITERS = """
import sys
from pathlib import Path
from diffusers import UNet2DConditionModel
from stepfuse.data.file_info import file_hash
from stepfuse.fuse.backbones.unet_names import UNetNames
from stepfuse.fuse.lora.export import save_kohya, save_lora, save_peft
from stepfuse.fuse.sets.adapter import read_factors
from stepfuse.fuse.sets.create import create_set
from tests.fixtures_tiny import save_adapter

base, root = map(Path, sys.argv[1:])
adapter = save_adapter(root / "a", base, "a", rank=2, alpha=3)
names = UNetNames(config=UNet2DConditionModel.load_config(base, subfolder="unet"))
part, factors = read_factors(adapter)
save_lora(root / "diffusers.safetensors", factors, part)
save_peft(root / "peft.safetensors", factors, str(base))
save_kohya(root / "kohya.safetensors", factors, names, title="a", prediction="epsilon")
for half in (False, True):
    create_set(root / f"set-{half}", [root / "a"], half=half)
for file in sorted(file for file in root.rglob("*") if file.is_file()):
    print(file.relative_to(root), file_hash(file))
"""


def test_a_file_is_the_same_whatever_the_order_of_hashes(small_base, tmp_path):
    """Of Python's sets, which differs from process to process: training's targets are one."""
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WRITERS, str(small_base), str(tmp_path / seed)],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    first, second = (process.communicate(timeout=120)[0].splitlines() for process in started)
    assert len(first) == 10  # two of the adapter, four of exports, two of each set
    assert first == second


def test_a_set_in_the_former_layout_is_read_and_is_pulled_in_todays(stranger, tmp_path):
    """diffusers' plain keys, alpha in the header: all else in the manifest stays as it is."""
    state = {A: torch.randn(2, 32), B: torch.randn(32, 2)}
    header = json.dumps({"unet.r": 2, "unet.lora_alpha": 3})
    put_weights(stranger, save(state, metadata={METADATA: header}))
    with open_lora(load_set(stranger).adapters[0].folder / WEIGHTS, ["unet"]) as lora:
        former = lora.factors()
    assert former[LAYER].scaling == 1.5
    copy_set(str(stranger), tmp_path / "pulled")
    with open_lora(tmp_path / "pulled" / "a" / WEIGHTS, ["unet"]) as lora:
        assert lora.as_written
        assert_same(lora.factors(), former)
    before, after = (json.loads((folder / MANIFEST).read_text()) for folder in (stranger, tmp_path / "pulled"))
    entries = zip(before["adapters"], after["adapters"], strict=True)
    changed = [one.pop("weights") != other.pop("weights") for one, other in entries]
    assert (changed, before) == ([True, False], after)
    copy_set(str(tmp_path / "pulled"), tmp_path / "again")
    for name in (MANIFEST, f"a/{WEIGHTS}", f"b/{WEIGHTS}"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "pulled" / name).read_bytes()

"""Every kind of adapter that peft and diffusers make: it fuses, as pipelines of its own would, or is refused."""

import copy
import json
import math
import shutil
from dataclasses import fields
from functools import cache

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from stepfuse.data.file_info import file_hash
from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.config import METADATA, UNUSED_SETTINGS, USED_SETTINGS
from stepfuse.fuse.lora.file import check_fits, open_lora
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter, write_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.fuse.sets.manifest import OBJECTIVE
from tests.fixtures_formats import read_any_layout
from tests.fixtures_sampler import ALPHA_BAR, PROMPTS, SCALE, assert_near, noise
from tests.fixtures_tiny import ddim, refused, save_stable_diffusion
from tests.fixtures_zoo import FUSES, NETWORK_ONLY, SEPARATE, ZOO, load_alone, make

# peft 0.21 takes the bias of a factor B for a factor that lost a dimension.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape.*lora_B.bias")
PARTNER = "rank_4"  # the other adapter of each step
SHARES = (0.6, 0.4)
ETAS = (0.4, 0.9)
STEPS, NUMBER, T, S = 4, 1, 501, 251  # the second of four steps
FUSING = [name for name, specimen in ZOO.items() if specimen.outcome in (FUSES, SEPARATE, NETWORK_ONLY)]
REFUSED = [name for name, specimen in ZOO.items() if specimen.refused]
# What a set holds as it is, without importing it.
AS_WRITTEN = [name for name in FUSING if ZOO[name].layout in ("diffusers", "bare") and not ZOO[name].refused]
# Each in both kinds of forwards, if it has both, and both imported and as it is, if a set takes it.
WAYS = {
    ("imported", "batched"): [name for name in FUSING if ZOO[name].outcome != SEPARATE],
    ("imported", "separate"): [name for name in FUSING if ZOO[name].outcome == SEPARATE or name not in AS_WRITTEN],
    ("as written", "separate"): AS_WRITTEN,
}
PAIRS = [(name, *way) for way, names in WAYS.items() for name in names if name != PARTNER]
TOGETHER = 6  # on one UNet


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Never changed: whoever puts something on it takes a copy."""
    return load_pipeline(str(save_stable_diffusion(tmp_path_factory.mktemp("base"))))


@pytest.fixture(scope="module")
def places(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    return {name: make(specimen, root / name, base, seed=seed) for seed, (name, specimen) in enumerate(ZOO.items())}


@pytest.fixture(scope="module")
def adapters(base, places, tmp_path_factory):
    """Two folders each of what fuses: imported, and with the very file where a set takes it."""
    root = tmp_path_factory.mktemp("adapters")
    fingerprint = base_fingerprint(base.unet)
    for name in FUSING:
        factors = read_any_layout(places[name], base.unet, network_only=ZOO[name].outcome == NETWORK_ONLY)
        check_fits(places[name], factors, base.unet)
        eta = ETAS[name == PARTNER]
        write_adapter(
            Adapter(
                folder=root / "imported" / name,
                objective=Objective(name=name, reward=f"reward_of_{name}", variance=EtaSchedule(eta=eta), beta=0.1),
                base={"name_or_path": base.name_or_path} | fingerprint,
                guidance="shared",
                guidance_scale=SCALE,
                num_inference_steps=STEPS,
            ),
            factors,
            "unet",
        )
    for name in AS_WRITTEN:
        put(root / "imported" / name, root / "as written" / name, places[name])
    return root


def put(adapter, folder, file):
    """A copy of an adapter's folder around another file."""
    shutil.copytree(adapter, folder)
    shutil.copyfile(file, folder / WEIGHTS)
    record = json.loads((folder / OBJECTIVE).read_text()) | {"sha256": file_hash(folder / WEIGHTS)}
    (folder / OBJECTIVE).write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def samplers(base, adapters, tmp_path_factory):
    """Of sets of some specimens and the partner, by how they came and how they run, and one of the specimens."""
    root = tmp_path_factory.mktemp("sets")

    @cache
    def load(came, forwards, first):
        some = [name for name in WAYS[came, forwards][first : first + TOGETHER] if name != PARTNER]
        folder = root / f"{came} {forwards} {first}"
        create_set(folder, [adapters / came / name for name in (PARTNER, *some)])
        return FusedSampler.from_pretrained(folder, pipeline=copy.deepcopy(base), forwards=forwards)

    def find(name, came, forwards):
        place = WAYS[came, forwards].index(name)
        return load(came, forwards, place - place % TOGETHER)

    return find


@pytest.fixture(scope="module")
def alone(base, places):
    """Guided predictions of pipelines that have only their own adapters, by these and their weights."""
    positive, negative = base.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=[""] * 2)
    known = {}

    @torch.no_grad()
    def predict(weights):
        key = tuple(weights.items())
        if key not in known:
            unet = load_alone(base, {places[name]: weight for name, weight in weights.items()}).unet
            unconditional = base.unet(noise(2), T, negative).sample
            known[key] = unconditional + SCALE * (unet(noise(2), T, positive).sample - unconditional)
        return known[key]

    return predict


def ddim_step(prediction, eta):
    """Mean and variance of diffusers' own step; the variance as in arXiv:2010.02502, eq. 16."""
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    still = torch.zeros_like(prediction)
    mean = scheduler.step(prediction, T, noise(2), eta=eta, variance_noise=still).prev_sample
    now, after = ALPHA_BAR[T], ALPHA_BAR[S]
    return mean.double(), eta**2 * (1 - after) / (1 - now) * (1 - now / after)


def fused_step(sampler, name, rule):
    plan = sampler.with_rule(rule).plan({name: SHARES[0], PARTNER: SHARES[1]}, 2, num_inference_steps=STEPS)
    with torch.no_grad():
        conditioning = sampler.backbone.encode(PROMPTS, [""] * 2)
        return sampler.with_rule(rule).step(noise(2), NUMBER, plan, conditioning)


@pytest.mark.parametrize(("name", "came", "forwards"), PAIRS)
def test_a_product_of_two_is_that_of_two_pipelines(samplers, alone, name, came, forwards):
    """1/v* = Σ a_i / v_i, m* = v* Σ a_i m_i / v_i (MSDDA, arXiv:2604.14379)."""
    got = fused_step(samplers(name, came, forwards), name, "product")
    gaussians = [ddim_step(alone({n: 1.0}), eta) for n, eta in zip((name, PARTNER), ETAS, strict=True)]
    precision = sum(a / v for a, (_, v) in zip(SHARES, gaussians, strict=True))
    mean = sum(a * m / v for a, (m, v) in zip(SHARES, gaussians, strict=True)) / precision
    assert_near(got.mean, mean)
    torch.testing.assert_close(got.variance.flatten(), torch.full((2,), 1 / precision).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("name", "came", "forwards"), [pair for pair in PAIRS if "dora" not in pair[0]])
def test_a_soup_of_two_is_one_pipeline_with_both_at_their_weights(samplers, alone, name, came, forwards):
    """v = Σ a_i v_i; `set_adapters` weighs what each adapter adds to a layer."""
    got = fused_step(samplers(name, came, forwards), name, "soup")
    eta = math.sqrt(sum(a * eta**2 for a, eta in zip(SHARES, ETAS, strict=True)))
    mean, _ = ddim_step(alone({name: SHARES[0], PARTNER: SHARES[1]}), eta)
    assert_near(got.mean, mean)


@pytest.mark.parametrize("name", FUSING)
def test_each_of_them_changes_what_the_base_predicts(alone, name):
    """Or the others would show nothing."""
    base = alone({})
    assert (alone({name: 1.0}) - base).abs().max() > 0.01 * base.abs().max()


@pytest.mark.parametrize(("name", "came", "forwards"), [pair for pair in PAIRS if "dora" in pair[0]])
def test_a_dora_is_no_part_of_a_soup(samplers, name, came, forwards):
    with refused(f"'{name}'", "DoRA", "product"):
        fused_step(samplers(name, came, forwards), name, "soup")


def test_a_bias_is_no_part_of_a_soup_of_factors(samplers):
    with refused("'with_bias'", "bias", "soup"):
        sampler = samplers("with_bias", "imported", "separate").with_rule("soup_factors")
        sampler.plan({"with_bias": 1.0}, 2, num_inference_steps=STEPS)


@pytest.mark.parametrize("name", [name for name, specimen in ZOO.items() if specimen.outcome == SEPARATE])
def test_what_has_no_batched_form_says_which_has(adapters, name, tmp_path):
    create_set(tmp_path / "set", [adapters / "imported" / name])
    with refused(f"'{name}'", "bias", "forwards='separate'"):
        FusedSampler.from_pretrained(tmp_path / "set")


# Refusals


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_of_a_unet_is_refused_for_what_it_is(base, places, name):
    with refused(*ZOO[name].refused):
        read_any_layout(places[name], base.unet, network_only=False)


@pytest.mark.parametrize("name", [name for name in REFUSED if ZOO[name].layout != "peft"])
def test_a_set_does_not_take_it_either(adapters, places, name, tmp_path):
    folder = put(adapters / "imported" / PARTNER, tmp_path / "adapter", places[name])
    with refused(str(folder / WEIGHTS), *ZOO[name].refused):
        read_adapter(folder)


def test_a_text_encoder_alone_leaves_nothing_of_a_unet(base, places):
    with refused(str(places["text_alone"]), "no layers of the network"):
        read_any_layout(places["text_alone"], base.unet, network_only=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "OLoRA"),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 2}),
        ("fan_in_fan_out", True),
        ("kasa_config", {"beta": 1e-4}),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"hidden_size": 32}),
        ("modules_to_save", ["conv_in"]),
        ("monteclora_config", {"monteclora_n": 4}),
        ("target_parameters", ["weight"]),
        ("trainable_token_indices", [3]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("velora_config", {"num_groups": 4}),
        ("some_day", True),
    ],
)
def test_settings_that_compute_something_else_are_refused_by_name(places, tmp_path, setting, value):
    """Not all of them can be made of a UNet; a header can say anything."""
    config = LoraConfig(r=4, lora_alpha=8).to_dict() | {"target_modules": ["to_q"], setting: value}
    packed = json.dumps({f"unet.{key}": own for key, own in config.items()})
    save_file(load_file(places[PARTNER]), tmp_path / "x.safetensors", metadata={METADATA: packed})
    with refused(str(tmp_path / "x.safetensors"), setting if setting != "init_lora_weights" else repr(value)):
        open_lora(tmp_path / "x.safetensors", ["unet"]).__enter__()


def test_every_setting_of_peft_is_taken_or_known_to_be_refused():
    """A release of peft that has another must be looked at."""
    refused_above = {
        "alora_invocation_tokens",
        "arrow_config",
        "fan_in_fan_out",
        "kasa_config",
        "layer_replication",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    }
    assert {field.name for field in fields(LoraConfig)} - {*UNUSED_SETTINGS, *USED_SETTINGS} == refused_above


# Names


@pytest.mark.parametrize("name", ["half", "type", "train", "keys", "bfloat16"])
def test_what_torch_calls_its_own_is_no_name_of_an_objective(name):
    with refused(f"'{name}'"):
        Objective(name=name, reward="some", variance=EtaSchedule(), beta=0.1)


@pytest.mark.parametrize("name", ["0", "to_q", "weight", "lora_A"])
def test_an_adapter_may_be_called_as_a_part_of_the_network_is(base, adapters, name, tmp_path):
    """Loaded before another."""
    folder = shutil.copytree(adapters / "imported" / PARTNER, tmp_path / name)
    record = json.loads((folder / OBJECTIVE).read_text()) | {"name": name}
    (folder / OBJECTIVE).write_text(json.dumps(record))
    create_set(tmp_path / "set", [folder, adapters / "imported" / "rank_1"])
    FusedSampler.from_pretrained(tmp_path / "set", pipeline=copy.deepcopy(base))

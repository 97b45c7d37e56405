"""Several LoRAs as one: the soup exactly, or the nearest to it of a rank."""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraModel, set_peft_model_state_dict

from stepfuse.fuse.lora.export import save_lora
from stepfuse.fuse.lora.layers import merged_adapters
from stepfuse.fuse.lora.merge import merge_factors
from tests.fixtures_formats import peft_states
from tests.fixtures_tiny import refused
from tests.fixtures_zoo import FIRST, KINDS, assert_alike, predict

# peft 0.21 takes the bias of a factor B for a factor that lost a dimension.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape.*lora_B.bias")


WEIGHTED = {"plain": 0.7, "rank_stabilised": -0.4, "patterns": 0.5}


def delta(layer):
    """s B A, as a matrix."""
    return layer.alpha / len(layer.down) * layer.up.flatten(1).double() @ layer.down.flatten(1).double()


def soup(lora_factors):
    """Σ w_i s_i B_i A_i of each layer."""
    total = {}
    for kind, weight in WEIGHTED.items():
        for name, layer in lora_factors["sd", kind].items():
            total[name] = total.get(name, 0) + weight * delta(layer)
    return total


def everyone(lora_factors):
    return [(kind, weight, lora_factors["sd", kind]) for kind, weight in WEIGHTED.items()]


def test_an_exact_merge_predicts_what_the_soup_does(lora_bases, lora_adapters, lora_factors, tmp_path):
    """Its rank is Σ r_i; what has weight 0 is left out, a DoRA too."""
    pipeline = copy.deepcopy(lora_bases["sd"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for kind in WEIGHTED:
            pipeline.load_lora_weights(lora_adapters["sd", kind][0].folder, adapter_name=kind)
    merged, error = merge_factors([*everyone(lora_factors), ("dora", 0.0, lora_factors["sd", "dora"])])
    assert error == 0
    assert merged[FIRST].rank == 4 + 6 + 4
    assert merged["time_embedding.linear_1"].rank == 4 + 4
    save_lora(tmp_path / "x.safetensors", merged, "unet")
    alone = copy.deepcopy(lora_bases["sd"])
    alone.load_lora_weights(tmp_path / "x.safetensors")
    with merged_adapters(pipeline.unet, WEIGHTED):
        assert_alike(predict(alone.unet), predict(pipeline.unet))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_merge_of_a_rank_is_the_nearest_to_the_soup(lora_bases, lora_adapters, lora_factors, rank):
    """As far as the singular values left out (Eckart and Young 1936), and no farther than peft's own."""
    merged, error = merge_factors(everyone(lora_factors), rank)
    exact = soup(lora_factors)
    assert {layer.rank for layer in merged.values()} == {rank}
    missed = {name: float((delta(merged[name]) - whole).norm()) for name, whole in exact.items()}
    total = math.sqrt(sum(float(whole.norm()) ** 2 for whole in exact.values()))
    assert error == pytest.approx(math.hypot(*missed.values()) / total, rel=1e-5)
    for name, whole in exact.items():
        assert missed[name] == pytest.approx(float(torch.linalg.svdvals(whole)[rank:].norm()), rel=1e-4, abs=1e-6)
    model = peft_model(lora_bases, lora_adapters)
    model.add_weighted_adapter(list(WEIGHTED), list(WEIGHTED.values()), "svd", combination_type="svd", svd_rank=rank)
    for name, whole in exact.items():
        other = model.get_submodule(f"model.{name}").get_delta_weight("svd").flatten(1).double()
        assert missed[name] <= float((other - whole).norm()) * (1 + 1e-5) + 1e-6


def peft_model(lora_bases, lora_adapters):
    """peft's own model of the adapters that are merged."""
    unet = copy.deepcopy(lora_bases["sd"].unet)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        models = [LoraModel(unet, copy.deepcopy(KINDS[kind]), kind) for kind in WEIGHTED]
    for kind in WEIGHTED:
        state, _ = peft_states(lora_adapters, "sd", kind)
        set_peft_model_state_dict(unet, {k.removeprefix("unet."): v for k, v in state.items()}, kind)
    return models[-1]


@pytest.mark.parametrize(("kind", "what"), [("dora", "DoRA"), ("with_bias", "bias")])
def test_what_has_no_merge_is_refused(lora_factors, kind, what):
    with refused(repr(kind), what, "weight 0"):
        merge_factors([*everyone(lora_factors), (kind, 0.1, lora_factors["sd", kind])])


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_1_is_refused(lora_factors, rank):
    with refused(f"rank {rank}"):
        merge_factors(everyone(lora_factors), rank)

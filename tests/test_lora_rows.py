"""Rows with weights of their own in one forward: outputs and gradients against peft and the written-out sum."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional

from stepfuse.fuse.lora.layers import lora_layers, merged_adapters, several_adapters
from stepfuse.fuse.lora.mixture import BASE, Network
from stepfuse.fuse.lora.rows import AdapterRows
from stepfuse.train.lora import train_all
from tests.fixtures_tiny import refused
from tests.fixtures_training import tiny_unet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
ZOO = {
    "attention": dict(r=4, lora_alpha=8, target_modules=ATTENTION),
    "convolutions": dict(r=1, target_modules=CONVOLUTIONS),
    "both": dict(r=3, lora_alpha=2, rank_pattern={"to_k": 5}, target_modules=[*ATTENTION, *CONVOLUTIONS, "proj_in"]),
}
# By row: mixtures, one alone, none, and weights that do not sum to 1.
WEIGHTS = torch.tensor(
    [[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.5, 0.0, -0.5], [0.25, 0.25, 0.5]], dtype=torch.float64
)


def with_adapters(network, zoo, add):
    """The network with trainable LoRAs whose factors are random."""
    with torch.random.fork_rng(devices=[]), several_adapters():
        torch.manual_seed(1)
        for name, config in zoo.items():
            add(LoraConfig(**config), name)
        for name, value in network.named_parameters():
            if "lora_" in name:
                value.data.normal_(std=0.3)
    train_all(network, list(zoo))
    return network


@pytest.fixture
def unet():
    network = tiny_unet()
    return with_adapters(network, ZOO, network.add_adapter).double()


def inputs():
    generator = torch.Generator().manual_seed(2)
    x, states = (torch.randn(5, *shape, generator=generator).double() for shape in ((4, 8, 8), (7, 32)))
    return x, torch.tensor([10, 900, 500, 1, 300]), states


def factors(network):
    return {name: value for name, value in network.named_parameters() if "lora_" in name}


def gradients(network, output):
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    own = factors(network)
    return dict(zip(own, torch.autograd.grad((output * cotangent).sum(), list(own.values())), strict=True))


def by_rows(network, rows, weights, *given):
    with rows.routed(weights):
        output = network(*given)
    return output if isinstance(output, torch.Tensor) else output.sample


@pytest.mark.parametrize("as_modules", [False, True])
def test_each_row_is_what_peft_says_of_its_merged_adapters(unet, as_modules):
    """Linear layers and convolutions, strides and 1×1, ranks 1 to 5, and layers that some adapters do not have."""
    x, t, states = inputs()
    with torch.no_grad():
        expected, alone = [], dict.fromkeys(ZOO, 1.0)
        for k, row in enumerate(WEIGHTS.tolist()):
            with merged_adapters(unet, dict(zip(ZOO, row, strict=True))):
                expected.append(unet(x[k : k + 1], t[k : k + 1], states[k : k + 1]).sample)
        with merged_adapters(unet, alone):
            before = unet(x, t, states).sample
        rows = AdapterRows(unet, list(ZOO), as_modules=as_modules)
        found = by_rows(unet, rows, WEIGHTS, x, t, states)
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-10)
        assert (found[2] - found[0]).abs().max() > 0.01
        with merged_adapters(unet, alone):  # without a route the layers are peft's, as before
            assert torch.equal(unet(x, t, states).sample, before)


class Small(nn.Module):
    """A convolution with stride and padding, and a linear layer on the positions that it leaves."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        return self.linear(torch.tanh(self.conv(x)).flatten(2).mT)


SMALL = {
    "one": dict(r=2, lora_alpha=3, target_modules=["conv", "linear"]),
    "two": dict(r=1, target_modules=["conv"]),
    "three": dict(r=4, lora_alpha=1, target_modules=["linear"]),
}


def written_out(network, x, weights):
    """W x_k + Σ_i w_ki s_i B_i A_i x_k, layer by layer, row by row."""
    added = {}
    for name in ("conv", "linear"):
        layer = getattr(network, name)
        added[name] = [
            sum(
                w * layer.scaling[i] * (layer.lora_B[i].weight.flatten(1) @ layer.lora_A[i].weight.flatten(1))
                for i, w in zip(SMALL, row, strict=True)
                if i in layer.r
            )
            for row in weights.tolist()
        ]
    base, outputs = {name: getattr(network, name).get_base_layer() for name in added}, []
    for k in range(len(x)):
        kernel = base["conv"].weight + added["conv"][k].view_as(base["conv"].weight)
        h = functional.conv2d(x[k : k + 1], kernel, base["conv"].bias, stride=2, padding=1)
        weight = base["linear"].weight + added["linear"][k]
        outputs.append(functional.linear(torch.tanh(h).flatten(2).mT, weight, base["linear"].bias))
    return torch.cat(outputs)


@pytest.mark.parametrize("as_modules", [False, True])
def test_gradients_of_every_factor_are_those_of_the_written_out_sum(as_modules):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Small().double().requires_grad_(False)
    with_adapters(network, SMALL, lambda config, name: inject_adapter_in_model(config, network, name))
    x = torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rows = AdapterRows(network, list(SMALL), as_modules=as_modules)
    found, expected = by_rows(network, rows, WEIGHTS, x), written_out(network, x, WEIGHTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    wanted = gradients(network, expected)
    assert {name.split(".")[2] for name in wanted} == set(SMALL)
    for name, value in gradients(network, found).items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-11, msg=name)
        assert value.abs().max() > 1e-3, name


def test_factors_as_modules_and_recomputed_activations_have_the_same_gradients(unet):
    given = inputs()
    rows = AdapterRows(unet, list(ZOO))
    expected = gradients(unet, by_rows(unet, rows, WEIGHTS, *given))
    unet.train().enable_gradient_checkpointing()
    calls = []
    unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    rows.route = WEIGHTS  # until the next forward, as the policy of a training has it
    recomputed = gradients(unet, unet(*given).sample)
    assert len(calls) == 2
    rows.route = None
    unet.disable_gradient_checkpointing()
    as_modules = gradients(unet, by_rows(unet, AdapterRows(unet, list(ZOO), as_modules=True), WEIGHTS, *given))
    for found in (recomputed, as_modules):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=name)


def test_an_adapter_without_weight_has_a_gradient_of_exactly_0(unet):
    rows = AdapterRows(unet, list(ZOO))
    found = gradients(unet, by_rows(unet, rows, torch.tensor([[0.0, 1.0, 0.0]]).expand(5, 3), *inputs()))
    for name, value in found.items():
        assert bool((value != 0).any()) == (".convolutions." in name), name


def test_routes_of_networks_are_their_weights_by_column(unet):
    rows = AdapterRows(unet, ["both", "attention"])
    networks = [BASE, Network.of("attention"), Network.merged({"attention": 0.3, "both": 0.7})]
    expected = [[0.0, 0.0], [0.0, 1.0], [0.7, 0.3]]
    assert rows.route_of(networks, torch.device("cpu")).tolist() == expected  # in float64, as the network
    unet.bfloat16()
    assert torch.equal(rows.route_of(networks, torch.device("cpu")), torch.tensor(expected))  # in float32


@pytest.mark.parametrize(
    ("config", "unbatched", "culprits"),
    [
        (dict(r=2, use_dora=True, target_modules=["to_q"]), [], ["'odd' is a DoRA", "cannot be trained with others"]),
        (dict(r=2, target_modules=["to_q"]), ["attn2"], ["attn2.to_q", "mixes the images of a batch", "leave it out"]),
        (dict(r=2, lora_bias=True, target_modules=["to_out.0"]), [], ["has a bias", "leave it out"]),
    ],
)
def test_adapters_that_cannot_be_trained_together_are_refused_with_the_remedy(config, unbatched, culprits):
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(**config), adapter_name="odd")
    before = [type(layer) for layer in lora_layers(unet)]
    with refused("'odd'", *culprits):
        AdapterRows(unet, ["odd"], unbatched)
    assert [type(layer) for layer in lora_layers(unet)] == before  # nothing was changed
    with refused("'absent'"):
        AdapterRows(unet, ["odd", "absent"])

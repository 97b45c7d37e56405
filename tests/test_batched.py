"""One forward for all adapters against peft's own forwards, one adapter after the other."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig

from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.guidance import Branch, Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.lora.mixture import BASE, Network
from stepfuse.fuse.lora.stack import LoRAStack
from stepfuse.fuse.sampling.shared_forwards import SharedForwards, split
from tests.fixtures_tiny import LATENT, ddim, denoiser_of, networks, prompt_embeds, refused, save_stable_diffusion

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
LINEAR = ["ff.net.0.proj", "ff.net.2", "time_emb_proj"]
ZOO = {
    "thin": dict(r=1, target_modules=ATTENTION),
    "attention": dict(r=4, lora_alpha=8, target_modules=ATTENTION),
    "everything": dict(r=3, lora_alpha=2, target_modules=[*ATTENTION, *CONVOLUTIONS, *LINEAR, "proj_in"]),
    "wide": dict(r=64, target_modules=["to_q", "conv1"]),
    "rank_stabilised": dict(r=6, lora_alpha=4, use_rslora=True, target_modules=ATTENTION),
    "ranks_of_their_own": dict(
        r=2, rank_pattern={"to_k": 5}, alpha_pattern={"to_v": 7}, target_modules=[*ATTENTION, "conv2"]
    ),
    "dora": dict(r=2, use_dora=True, target_modules=[*ATTENTION, *LINEAR]),
    "dora_of_convolutions": dict(r=2, lora_alpha=5, use_dora=True, target_modules=[*CONVOLUTIONS, "to_out.0"]),
}
PLAIN = [name for name in ZOO if "dora" not in name]


def unet_with(folder, zoo):
    """A UNet with adapters of random weights; DoRAs have other magnitudes than the base's."""
    unet = load_pipeline(str(folder)).unet
    torch.manual_seed(3)
    for name, config in zoo.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            unet.add_adapter(LoraConfig(**config), adapter_name=name)
    generator = torch.Generator().manual_seed(4)
    for key, value in unet.named_parameters():
        if "lora_B" in key:
            value.data.normal_(std=0.1, generator=generator)
        if "lora_magnitude" in key:
            value.data.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
    return unet.requires_grad_(False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def denoiser(base):
    """Guidance `off`: predictions are what the UNet says."""
    unet = unet_with(base, ZOO)
    return denoiser_of(unet, ddim(), guidance="off", batched=BatchedAdapters(unet, list(ZOO)))


def one_by_one(denoiser):
    return replace(denoiser, batched=None)


def inputs(images, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(images, *LATENT, generator=generator)
    states = torch.randn(2, images, 7, 32, generator=generator).to(dtype)
    return x_t, 500, prompt_embeds(states[0], states[1])


def assert_near(got, expected, atol=1e-5):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


def test_every_kind_of_lora_in_one_forward_is_what_peft_says_of_each(denoiser):
    """Ranks 1 to 64, alpha ≠ rank, rank-stabilised, DoRA; linear layers, convolutions of stride 1 and 2 and 1×1."""
    names = networks(None, *ZOO)
    given = inputs(2)
    expected = one_by_one(denoiser).predictions(*given, names)
    assert_near(denoiser.predictions(*given, names), expected)
    for name, prediction in zip(ZOO, expected[1:], strict=True):
        assert (prediction - expected[0]).abs().max() > 0.01, f"{name} changes nothing, so nothing was tested"


@pytest.mark.parametrize("names", [ZOO, PLAIN], ids=["with DoRAs", "without"])
def test_forwards_that_are_shared_run_every_kind_of_lora_at_its_own_time(base, names):
    """Each adapter at another time, some together with the base; without DoRAs as mixtures, with them as adapters."""
    unet = unet_with(base, {name: ZOO[name] for name in names})
    separate = denoiser_of(unet, ddim(), guidance="off")
    forwards = SharedForwards(
        separate.backbone, BatchedAdapters(unet, list(names)), max_rows=len(names) + 2, exact=False
    )
    x_t, _, conditioning = inputs(1)
    expected, rows = [], []
    for number, network in enumerate(networks(None, *names)):
        expected += separate.predictions(x_t, 100 + number, conditioning, [network])
        rows.append(separate.rows_of(Branch(network, "+"), x_t, 100 + number, conditioning))
    assert len({forwards.shapes(each) for each in rows}) == 1
    assert_near(split(forwards.run(rows).outputs, rows), expected)


@pytest.mark.parametrize("guidance", ["shared", "full", "off"])
def test_rows_of_their_own_adapters_are_guided_alike(denoiser, guidance):
    """Five images, each adapter for some of them, in no order, one of them for none."""
    chosen = replace(denoiser, guidance=Guidance(source=guidance, scale=3.0))
    names = networks("dora", None, "wide", "attention", None)
    rows = [torch.tensor([4, 0]), None, torch.tensor([1]), torch.tensor([0, 1, 2, 4]), torch.tensor([3])]
    given = inputs(5)
    assert_near(chosen.predictions(*given, names, rows), one_by_one(chosen).predictions(*given, names, rows), atol=3e-5)


def test_a_prediction_for_some_rows_is_that_of_these_images_alone(denoiser):
    x_t, t, conditioning = inputs(4)
    rows = torch.tensor([2, 0])
    (some,) = denoiser.predictions(x_t, t, conditioning, networks("everything"), [rows])
    assert_near([some], denoiser.predictions(x_t[rows], t, conditioning[rows], networks("everything")))


@pytest.mark.parametrize("images", [1, 3])
def test_one_soup_for_all_images_is_what_peft_says_of_scaled_adapters(denoiser, images):
    weights = {"thin": 0.5, "everything": -0.3, "wide": 1.4, "ranks_of_their_own": 0.2}
    given = inputs(images)
    expected = one_by_one(denoiser).predictions(*given, [Network.merged(weights)])
    for cacheable in (False, True):  # by factors, and by merged weights
        assert_near(denoiser.predictions(*given, [Network.merged(weights, cacheable=cacheable)]), expected)


def test_soups_of_their_own_run_together_with_the_base(denoiser):
    """Two images under one mixture and one under another, which one forward of low rank serves."""
    soups = [
        Network.merged({name: 0.7 / (index + 1) for index, name in enumerate(PLAIN)}),
        Network.merged({"attention": 1.5, "everything": -0.5}),
    ]
    rows = [torch.tensor([0, 2]), torch.tensor([1])]
    chosen = replace(denoiser, guidance=Guidance(source="shared", scale=3.0))
    given = inputs(3)
    calls = []
    hook = denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    got = chosen.predictions(*given, soups, rows)
    hook.remove()
    assert len(calls) == 1
    assert_near(got, one_by_one(chosen).predictions(*given, soups, rows), atol=3e-5)


@pytest.mark.parametrize("own", [False, True])
def test_averaged_factors_are_those_of_peft(base, own):
    """Alike for all images, or with one of its own for each of two."""
    zoo = {name: dict(r=2, lora_alpha=3, target_modules=[*ATTENTION, "conv1"]) for name in "ab"}
    unet = unet_with(base, zoo)
    denoiser = denoiser_of(unet, ddim(), guidance="off", batched=BatchedAdapters(unet, "ab"))
    averages = [
        Network.merged({"a": 0.9, "b": 0.4}, "factors"),
        Network.merged({"a": 0.2, "b": 0.8}, "factors"),
    ]
    given = inputs(2)
    rows = [torch.tensor([0]), torch.tensor([1])] if own else [None, None]
    expected = one_by_one(denoiser).predictions(*given, averages, rows)
    if own:
        assert_near(denoiser.predictions(*given, averages, rows), expected)
    else:
        for average, prediction in zip(averages, expected, strict=True):
            for cacheable in (False, True):
                assert_near(denoiser.predictions(*given, [replace(average, cacheable=cacheable)]), [prediction])


def test_experts_and_mixtures_at_once_are_each_their_own(denoiser):
    wanted = [*networks("thin"), Network.merged({"thin": 0.5, "wide": 0.5}), *networks(None, "dora")]
    given = inputs(2)
    assert_near(denoiser.predictions(*given, wanted), one_by_one(denoiser).predictions(*given, wanted))


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_fewer_rows_at_once_change_no_number_and_bound_every_forward(denoiser, rows_at_once):
    chosen = replace(denoiser, guidance=Guidance(source="shared", scale=3.0), rows_at_once=rows_at_once)
    given = inputs(2)
    names = networks("thin", "everything", "dora")
    sizes = []
    hook = denoiser.network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    got = chosen.predictions(*given, names)
    hook.remove()
    assert sum(sizes) == 2 * (3 + 1)
    assert max(sizes) == min(rows_at_once, 8)
    assert_near(got, replace(chosen, rows_at_once=None).predictions(*given, names))


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_near_what_peft_says_of_each(base, dtype, unit):
    """bfloat16 rounds at 2⁻⁸, float16 at 2⁻¹¹; the order of sums differs from peft's, so some roundings do."""
    unet = unet_with(base, ZOO).to(dtype)
    denoiser = denoiser_of(unet, ddim(), guidance="off", batched=BatchedAdapters(unet, list(ZOO)))
    given = inputs(2, dtype=dtype)
    soup = Network.merged({"attention": 0.5, "everything": 0.5}, cacheable=True)
    wanted = [*networks(*ZOO), soup]
    expected = one_by_one(denoiser).predictions(*given, wanted)
    scale = torch.stack(expected).abs().max()
    for got, one in zip(denoiser.predictions(*given, wanted), expected, strict=True):
        assert (got - one).abs().max() < 8 * unit * scale


def test_outside_a_batch_peft_goes_on_as_before(base):
    unet = unet_with(base, {"a": ZOO["attention"]})
    x_t, t, conditioning = inputs(2)
    before = unet(x_t, t, conditioning.positive["prompt_embeds"]).sample
    fingerprint, keys = base_fingerprint(unet), list(unet.state_dict())
    denoiser = denoiser_of(unet, ddim(), guidance="off", batched=BatchedAdapters(unet, ["a"]))
    denoiser.predictions(x_t, t, conditioning, [BASE])
    denoiser.predictions(x_t, t, conditioning, [Network.merged({"a": 0.5}, cacheable=True)])
    assert torch.equal(unet(x_t, t, conditioning.positive["prompt_embeds"]).sample, before)
    assert (base_fingerprint(unet), list(unet.state_dict())) == (fingerprint, keys)


def test_a_copy_of_the_unet_is_a_unet_of_its_own(base):
    unet = unet_with(base, {"a": ZOO["attention"]})
    denoiser = denoiser_of(unet, ddim(), guidance="off", batched=BatchedAdapters(unet, ["a"]))
    copied = copy.deepcopy(denoiser)
    given = inputs(2)
    (expected,) = denoiser.predictions(*given, networks("a"))
    for value in unet.state_dict().values():
        value.zero_()
    assert torch.equal(copied.predictions(*given, networks("a"))[0], expected)
    assert not torch.equal(denoiser.predictions(*given, networks("a"))[0], expected)


def test_two_samplers_of_one_unet_do_not_touch_each_other(base):
    """Each has stacks of its own, whatever adapters the other knows."""
    unet = unet_with(base, {"a": ZOO["attention"], "b": ZOO["everything"]})
    first = denoiser_of(unet, ddim(), guidance="off", batched=BatchedAdapters(unet, ["a", "b"]))
    second = denoiser_of(unet, ddim(), guidance="off", batched=BatchedAdapters(unet, ["b"]))
    given = inputs(2)
    expected = one_by_one(first).predictions(*given, networks("a", "b"))
    assert_near(first.predictions(*given, networks("a", "b")), expected)
    assert_near(second.predictions(*given, networks("b")), expected[1:])


def test_a_cacheable_mixture_is_merged_until_another_is_or_it_is_released(denoiser):
    given = inputs(1)
    first, second = (Network.merged({"thin": weight, "wide": 1.0}, cacheable=True) for weight in (0.5, 1.5))
    passing = replace(first, cacheable=False)
    stacks = [module for module in denoiser.network.modules() if isinstance(module, LoRAStack)]
    expected = dict(zip([first, second], one_by_one(denoiser).predictions(*given, [first, second]), strict=True))
    denoiser.batched.release()
    assert_near(denoiser.predictions(*given, [passing]), [expected[first]])
    assert all(stack.merged is None for stack in stacks)
    for soup in (first, first, second, first):
        assert_near(denoiser.predictions(*given, [soup]), [expected[soup]])
        assert all(stack.merged is not None for stack in stacks)
    denoiser.batched.release()
    assert all(stack.merged is None for stack in stacks)
    assert_near(denoiser.predictions(*given, [first]), [expected[first]])


def test_one_soup_at_a_time_for_few_rows_is_each_its_own(denoiser):
    """Rows of two mixtures in turns, so that a forward of few has one or the other."""
    soups = [Network.merged({"thin": 0.5, "wide": 0.5}, cacheable=True), Network.merged({"everything": 1.0})]
    rows = [torch.tensor([0, 2]), torch.tensor([1, 3])]
    given = inputs(4)
    for most in (1, 2, 3):
        chosen = replace(denoiser, guidance=Guidance(source="shared", scale=3.0), rows_at_once=most)
        assert_near(
            chosen.predictions(*given, soups, rows), one_by_one(chosen).predictions(*given, soups, rows), atol=3e-5
        )


def test_a_mixture_of_a_dora_is_refused(denoiser):
    with refused("'dora'", "merged"):
        denoiser.predictions(*inputs(1), [Network.merged({"thin": 0.5, "dora": 0.5})])


def test_offloaded_layers_run_every_kind_of_lora(base, denoiser):
    """Their weights are elsewhere between forwards; the stacks stay."""
    unet = unet_with(base, ZOO)
    offloaded = denoiser_of(unet, ddim(), guidance="off", batched=BatchedAdapters(unet, list(ZOO)))
    cpu_offload(unet, execution_device=torch.device("cpu"))
    soup = Network.merged({"thin": 0.5, "everything": 0.5}, cacheable=True)
    given = inputs(2)
    wanted = [*networks(*ZOO), soup]
    assert_near(offloaded.predictions(*given, wanted), denoiser.predictions(*given, wanted))


@pytest.mark.parametrize(
    ("config", "culprits"),
    [
        (LoraConfig(r=2, lora_bias=True, target_modules=["to_out.0"]), ["'odd'", "to_out.0", "bias"]),
        (LoraConfig(r=2, target_modules=["conv_in"]), ["'odd'", "conv_in", "padding"]),
    ],
)
def test_a_lora_that_cannot_be_batched_is_refused_by_name(base, config, culprits):
    unet = load_pipeline(str(base)).unet
    if "padding" in culprits:
        unet.conv_in.padding_mode = "circular"
    unet.add_adapter(config, adapter_name="odd")
    with refused(*culprits, "forwards='separate'"):
        BatchedAdapters(unet, ["odd"])


def test_adapters_that_are_not_there_or_of_another_unet_are_refused(base, denoiser):
    with refused("'absent'"):
        BatchedAdapters(denoiser.network, ["thin", "absent"])
    with refused("another network"):
        replace(denoiser, backbone=backbone_of(load_pipeline(str(base))))


def test_fixed_routes_move_with_the_network_and_are_written_where_they_changed(base):
    unet = unet_with(base, {"thin": ZOO["thin"], "attention": ZOO["attention"]})
    batched = BatchedAdapters(unet, ["thin", "attention"])
    batched.fix(4, torch.device("cpu"))
    routes = [batched.route_of(networks(*names), torch.device("cpu")) for names in (["thin"], [None, "attention"])]
    assert routes[0].experts is routes[1].experts
    assert routes[1].experts.tolist() == [2, 1, 0, 0]
    routes[1].experts.zero_()
    batched.route_of(networks(None, "attention"), torch.device("cpu"))
    assert routes[1].experts.tolist() == [0, 0, 0, 0]  # the same networks, so nothing was written
    batched.route_of([Network.merged({"thin": 0.5})], torch.device("cpu"))
    unet.to("meta")
    assert {value.device.type for value in unet.buffers()} == {"meta"}
    meta = torch.device("meta")
    assert batched.route_of(networks("thin"), meta).experts.device == meta
    assert batched.route_of([Network.merged({"thin": 0.5})], meta).up.device == meta


def test_a_route_goes_to_the_device_once(denoiser):
    """Also within inference mode, and can be used with gradients later."""
    cpu = torch.device("cpu")
    for names in (networks(None, "thin", "wide"), [Network.merged({"thin": 0.5, "wide": 0.5})]):
        with torch.inference_mode():
            first = denoiser.batched.route_of(names, cpu)
        again = denoiser.batched.route_of(list(names), cpu)
        assert again.experts is first.experts
        assert again.up is first.up
        assert not (first.experts if first.up is None else first.up).is_inference()
    assert denoiser.batched.route_of(networks("thin", "wide"), cpu).experts is not None

"""Compiled networks: what is a value to them and compiles nothing anew."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from stepfuse.data import emoji
from stepfuse.fuse.backbones.denoiser import Router
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.mixture import BASE
from stepfuse.fuse.rules.weights import WeightSchedule
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.train.settings import DDPOSettings
from stepfuse.train.setup import make_policy
from tests.fixtures_tiny import (
    ddim,
    denoiser_of,
    generators,
    prompt_embeds,
    refused,
    save_adapter,
    save_stable_diffusion,
)
from tests.fixtures_training import COMMON, run_main, save_tiny_pipeline, tiny_unet, training_desk

SCRIPT_METHOD = pytest.mark.filterwarnings(  # torch's own
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
REWARDS = "def slope(images, prompts):\n    return images.mean((1, 2, 3))\n"
ETAS = {"a": 0.3, "b": 0.7, "c": 1.0}
LAYERS = ["attn1.to_q", "attn2.to_out.0"]  # of each block: a LoRA on all of them takes longer to trace
ALL = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.fixture(scope="module")
def set_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    base = save_stable_diffusion(root / "base")
    for seed, (name, eta) in enumerate(ETAS.items()):
        own = dict(seed=seed, variance=EtaSchedule(eta=eta), rank=1 + seed, targets=LAYERS)
        save_adapter(root / name, base, name, **own)
    create_set(root / "set", [root / name for name in ETAS], base_schedule=EtaSchedule(eta=0.6))
    return root / "set"


@pytest.fixture(scope="module")
def eager(set_folder):
    return FusedSampler.from_pretrained(set_folder)


@pytest.fixture
def compiled(set_folder):
    """A sampler whose compilations start from nothing."""
    torch.compiler.reset()
    yield FusedSampler.from_pretrained(set_folder)
    torch.compiler.reset()


def draw(sampler, weights, *, rule="product", images=2, **options):
    return sampler.with_rule(rule).sample(
        ["a fox"] * images,
        weights,
        generator=generators(*range(images)),
        output_type="latent",
        progress=False,
        num_inference_steps=2,
        **options,
    )


@pytest.mark.parametrize("how", ["regional", "full"])
def test_weights_strengths_and_the_adapters_in_use_compile_nothing_anew(eager, compiled, how):
    """One graph for the first number of rows, one for all others; a soup is another network, and so one graph more.

    The graphs run as they are, without a compiler behind them, so that the numbers are the same.
    """
    counter = CompileCounter()
    compiled.compile(how, backend=counter)

    def check(weights, **options):
        expected = draw(eager, weights, **options)
        torch.testing.assert_close(draw(compiled, weights, **options), expected, atol=2e-5, rtol=1e-5)

    check(ALL)
    assert counter.frame_count == 1
    check(ALL, strength=0.7)  # the base takes part: more rows
    assert counter.frame_count == 2
    for weights, options in [
        ({"a": 0.1, "b": 0.3, "c": 0.6}, {}),
        (ALL, {"strength": 0.3}),
        (ALL, {"strength": 1.1}),
        ({"b": 0.6, "c": 0.4}, {}),
        ({"c": 1.0}, {}),
        ([{"a": 1.0}, {"b": 0.5, "c": 0.5}], {}),
        ({"a": WeightSchedule(((0.9, 0.0, 0.5), (0.1, 0.5, 1.0))), "b": 0.5}, {}),
        (ALL, {"rule": "systematic"}),
        (ALL, {"rule": "switch"}),
        (ALL, {"rule": "average_noise"}),
    ]:
        check(weights, **options)
    assert counter.frame_count == 2
    check(ALL, rule="soup")
    assert counter.frame_count == 3
    check({"b": 0.6, "c": 0.4}, rule="soup")
    check([{"a": 1.0}, {"b": 0.5, "c": 0.5}], rule="soup", strength=0.8)
    assert counter.frame_count == 3


@torch._dynamo.config.patch(recompile_limit=8)
def test_blocks_of_two_widths_under_every_kind_of_network_stay_within_torchs_limit(tmp_path):
    """The bundled base's transformer blocks are of two widths, which share one piece of code and its limit of graphs.

    Two widths, and three kinds of network (an adapter a row, soups, averaged factors), each for one number of rows, any
    number, and a single row at most: 18 graphs, and torch gives up at 8 unless told otherwise.
    """
    torch.compiler.reset()
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, emoji.PIPELINE, name, seed=seed, targets=LAYERS[:1], guidance="off")
    sampler = FusedSampler.from_pretrained(create_set(tmp_path / "set", [tmp_path / "a", tmp_path / "b"]))
    counter = CompileCounter()
    sampler.compile("regional", backend=counter)
    halves, others = ({"a": w, "b": 1 - w} for w in (0.5, 0.3))
    for rule in ("product", "systematic", "soup", "soup_factors"):
        for images in (2, 3, 1):
            draw(sampler, halves, rule=rule, images=images)
    count = counter.frame_count
    assert 8 < count <= 18
    for rule in ("product", "systematic", "soup", "soup_factors"):
        for images in (1, 2, 4):
            draw(sampler, others, rule=rule, images=images)
    assert counter.frame_count == count
    torch.compiler.reset()


def test_more_rows_than_foreseen_compile_once_more(eager, compiled):
    counter = CompileCounter()
    compiled.compile("regional", backend=counter, rows=2)
    torch.testing.assert_close(draw(compiled, ALL, images=3), draw(eager, ALL, images=3), atol=1e-5, rtol=1e-5)
    count = counter.frame_count
    draw(compiled, {"a": 0.4, "b": 0.4, "c": 0.2}, images=3)
    assert counter.frame_count == count


@pytest.mark.slow
@SCRIPT_METHOD
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_by_inductor_the_numbers_are_the_same(eager, compiled):
    compiled.compile("regional")
    torch.testing.assert_close(draw(compiled, ALL), draw(eager, ALL), atol=1e-4, rtol=1e-4)
    other = {"a": 0.2, "b": 0.2, "c": 0.6}
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(draw(compiled, other), draw(eager, other), atol=1e-4, rtol=1e-4)


class ForwardingRouter(Router):
    """A router of no class that the sampler knows."""

    def __init__(self, inner):
        self.inner, self.network, self.calls = inner, inner.network, []

    def route_of(self, networks, device):
        return self.inner.route_of(networks, device)

    def routed(self, route):
        return self.inner.routed(route)

    def fix(self, rows, device):
        self.calls.append(("fix", rows))

    def release(self):
        self.calls.append(("release",))


def test_a_router_of_any_class_is_told_of_compilation_and_release(compiled):
    router = ForwardingRouter(compiled.denoiser.batched)
    sampler = replace(compiled, denoiser=replace(compiled.denoiser, batched=router))
    sampler.compile("regional", rows=8, backend="eager")
    sampler.release()
    assert router.calls == [("fix", 8), ("release",)]


def test_what_cannot_be_compiled_is_refused(set_folder):
    with refused("'most'", "regional or full"):
        FusedSampler.from_pretrained(set_folder).compile("most")
    with refused("batched"):
        FusedSampler.from_pretrained(set_folder, forwards="separate").compile()
    with refused("'max-autotune'", "GPU"):
        FusedSampler.from_pretrained(set_folder).compile(mode="max-autotune")


@SCRIPT_METHOD
@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
@torch.compiler.set_stance("default", force_backend="eager")
def test_a_policy_that_is_compiled_for_training_stays_within_torchs_limit():
    """Beyond it torch runs a network as it is, with no more than a warning; here from the second width of blocks on."""
    torch.compiler.reset()
    unet = tiny_unet()
    denoiser = denoiser_of(unet, ddim(), guidance="off")
    settings = DDPOSettings(**COMMON, pretrained_model_name_or_path="none", compile="regional")
    make_policy(denoiser.backbone, settings, [EtaSchedule()])
    embeds = torch.zeros(2, 7, 32)
    denoiser.predictions(torch.zeros(2, 4, 8, 8), 500, prompt_embeds(embeds, embeds), [BASE])
    torch.compiler.reset()


@pytest.mark.slow
@SCRIPT_METHOD
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo asks
@torch.compiler.set_stance("default", force_backend="eager")
def test_a_compiled_training_uses_the_graphs_of_its_rollouts_in_validation(monkeypatch, tmp_path):
    """Blocks of two widths, in rollouts, where the base and the policy are two networks, and in updates: 6 graphs, 9
    with those for any number of rows."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    save_tiny_pipeline(tmp_path / "pipeline")
    with training_desk(monkeypatch, tmp_path, REWARDS):
        own = dict(max_train_steps=2, num_validation_images=2, train_batch_size=2, validation_steps=1)
        run_main(monkeypatch, "ddpo", pretrained_model_name_or_path="pipeline", compile="regional", **own)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 9
    torch.compiler.reset()

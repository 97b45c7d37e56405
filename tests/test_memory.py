"""What diffusers offers for memory, reached through the sampler's pipeline; and fewer rows at once."""

import pytest
import torch
from accelerate import cpu_offload

from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from tests.fixtures_tiny import generators, refused, save_adapter, save_stable_diffusion

ETAS = {"a": 0.3, "b": 0.7}
RULES = ("product", "systematic", "soup")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def set_folder(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    for seed, (name, eta) in enumerate(ETAS.items()):
        save_adapter(root / name, base, name, seed=seed, variance=EtaSchedule(eta=eta))
    create_set(root / "set", [root / name for name in ETAS], base_schedule=EtaSchedule(eta=0.6))
    return root / "set"


@pytest.fixture(scope="module")
def expected(set_folder):
    return images(FusedSampler.from_pretrained(set_folder))


def images(sampler):
    """One picture under each of the rules that run adapters in different ways."""
    return {
        rule: sampler.with_rule(rule).sample(
            ["a fox", "a cat"], {"a": 0.4, "b": 0.6}, generator=generators(0, 1), output_type="pt", progress=False
        )
        for rule in RULES
    }


def slice_autoencoder(pipeline):
    pipeline.vae.enable_slicing()


def slice_attention(pipeline):
    pipeline.enable_attention_slicing()


def other_attention(pipeline):
    pipeline.unet.set_attention_backend("_native_math")


def offload(pipeline):
    """Layer by layer, as enable_sequential_cpu_offload does it, which itself asks for an accelerator."""
    cpu_offload(pipeline.unet, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in pipeline.unet.parameters())


@pytest.mark.parametrize("change", [slice_autoencoder, slice_attention, other_attention, offload])
def test_what_the_pipeline_offers_changes_no_picture(set_folder, expected, change):
    sampler = FusedSampler.from_pretrained(set_folder)
    change(sampler.pipeline)
    for rule, picture in images(sampler).items():
        torch.testing.assert_close(picture, expected[rule], atol=1e-5, rtol=1e-5)


def test_fewer_rows_at_once_change_no_picture(set_folder, expected):
    for rule, picture in images(FusedSampler.from_pretrained(set_folder, rows_at_once=1)).items():
        torch.testing.assert_close(picture, expected[rule], atol=1e-5, rtol=1e-5)


def test_separate_forwards_change_no_picture(set_folder, expected):
    for rule, picture in images(FusedSampler.from_pretrained(set_folder, forwards="separate")).items():
        torch.testing.assert_close(picture, expected[rule], atol=1e-5, rtol=1e-5)


def test_a_pipeline_offloaded_before_is_refused(set_folder, base):
    pipeline = load_pipeline(str(base))
    offload(pipeline)
    with refused("offloaded", "first"):
        FusedSampler.from_pretrained(set_folder, pipeline=pipeline)


def test_forwards_of_another_name_are_refused(set_folder):
    with refused("'together'", "batched or separate"):
        FusedSampler.from_pretrained(set_folder, forwards="together")

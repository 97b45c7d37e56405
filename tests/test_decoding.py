"""Autoencoders decode and encode in slices that fit into memory, in one precision from the start."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from stepfuse.fuse.backbones import slices
from stepfuse.fuse.backbones.autoencoder import decode, encode
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.backbones.slices import available_bytes, bytes_per_image, images_at_once
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sampling.pipeline import FusedPipeline
from stepfuse.fuse.sets.create import create_set
from tests.fixtures_tiny import generators, refused, save_adapter, save_stable_diffusion_xl

CPU = torch.device("cpu")
SDXL = SimpleNamespace(config={"block_out_channels": (128, 256, 512, 512)}, dtype=torch.float32)


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
        )
    return made.requires_grad_(False).eval()


@pytest.fixture
def passes(vae, monkeypatch):
    """The number of images of every pass of the decoder; more than two do not fit into memory."""
    sizes = []
    forward = vae.decoder.forward

    def limited(z):
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return forward(z)

    monkeypatch.setattr(vae.decoder, "forward", limited)
    return sizes


def latents(count):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_sixteen_images_of_sdxl_in_float32_would_take_52_gigabytes():
    """1024 · 1024 pixels, 256 channels, 4 bytes, 3 feature maps; and an eighth of that of 512² in half precision."""
    assert 16 * bytes_per_image(SDXL, (128, 128)) == 16 * 1024 * 1024 * 256 * 4 * 3 == 51_539_607_552
    half = SimpleNamespace(config=SDXL.config, dtype=torch.float16)
    assert bytes_per_image(half, (64, 64)) * 8 == bytes_per_image(SDXL, (128, 128))


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        ({"block_out_channels": (128, 256, 512, 512)}, 256),
        ({"decoder_block_out_channels": (64, 64, 64, 64)}, 64),
        ({"base_dim": 96, "dim_mult": [1, 2, 4, 4]}, 192),
        ({"block_out_channels": (128, 256, 512, 512), "decoder_block_out_channels": (96, 192, 384, 384)}, 192),
    ],
    ids=["kl", "tiny", "qwen", "flux2"],
)
def test_every_kind_of_autoencoder_states_its_widest_feature_map(config, channels):
    stated = SimpleNamespace(config=config, dtype=torch.bfloat16)
    assert bytes_per_image(stated, (2, 3)) == (2 * 8) * (3 * 8) * channels * 2 * 3


def test_the_host_decodes_as_many_as_fit_into_8_gib():
    assert images_at_once(SDXL, (128, 128), CPU) == 2  # of 3 GiB each
    assert images_at_once(SDXL, (128, 128), CPU, gradients=True) == 1  # of 22 GiB
    assert images_at_once(SDXL, (2, 2), CPU) > 1000


def test_a_gpu_gives_an_eighth_of_its_memory_and_no_more_than_half_of_what_is_free(monkeypatch):
    gib = 2**30
    known = {"mem_get_info": (60 * gib, 80 * gib), "memory_reserved": 5 * gib, "memory_allocated": 3 * gib}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    gpu = torch.device("cuda")
    assert available_bytes(gpu) == 10 * gib
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * gib, 80 * gib))
    assert available_bytes(gpu) == 3 * gib  # of 4 that are free and 2 that the allocator holds
    assert images_at_once(SDXL, (128, 128), gpu) == 1


def test_what_does_not_fit_is_decoded_in_halves(vae, passes):
    with torch.no_grad():
        pixels = decode(vae, latents(5))
        assert passes == [5, 3, 2, 2, 1]
        expected = torch.cat([decode(vae, part) for part in latents(5).split(1)])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_an_image_that_does_not_fit_alone_is_an_error(vae, monkeypatch):
    def full(z):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vae.decoder, "forward", full)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        decode(vae, latents(3))


def test_small_images_are_decoded_all_at_once_and_no_more_than_asked_for(vae, passes):
    with torch.no_grad():
        decode(vae, latents(2))
        decode(vae, latents(2), at_once=1)
    assert passes == [2, 1, 1]


def test_slices_have_the_gradient_of_the_whole(vae, passes, monkeypatch):
    """Each slice is run once more, in the backward pass."""
    gradients = []
    for limit in (8 * 2**30, bytes_per_image(vae, (8, 8), gradients=True)):
        monkeypatch.setattr(slices, "HOST_BYTES", limit)
        x = latents(2).requires_grad_()
        (gradient,) = torch.autograd.grad(decode(vae, x).square().sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert passes == [2, 1, 1, 1, 1]


def test_images_are_encoded_in_slices_with_the_generator_of_each(vae):
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, parts = (encode(vae, pixels, generators(0, 1, 2), at_once=size) for size in (None, 2))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_the_precision_of_an_autoencoder_is_decided_when_a_pipeline_is_loaded(tmp_path):
    """Not by whatever is decoded or encoded first, and in a pipeline that is given too."""
    base = save_stable_diffusion_xl(tmp_path, vae={"force_upcast": True})
    pipeline = load_pipeline(str(base), dtype=torch.float16)
    assert (pipeline.vae.dtype, pipeline.unet.dtype) == (torch.float32, torch.float16)
    pipeline.vae.to(torch.float16)
    backbone = backbone_of(pipeline)
    assert pipeline.vae.dtype == torch.float32
    pixels = torch.rand(1, 3, 16, 16)
    first = backbone.encode_pixels(pixels, generators(0))
    with torch.no_grad():
        backbone.decode(first)
    assert torch.equal(backbone.encode_pixels(pixels, generators(0)), first)


def test_a_fused_pipeline_that_is_cast_keeps_the_autoencoder_in_the_precision_it_needs(tmp_path):
    base = save_stable_diffusion_xl(tmp_path / "base", vae={"force_upcast": True})
    save_adapter(tmp_path / "a", base, "a")
    create_set(tmp_path / "set", [tmp_path / "a"], base_schedule=EtaSchedule())
    fused = FusedPipeline.from_pretrained(tmp_path / "set", decode_batch_size=3)
    assert fused.sampler.backbone.decode_batch_size == 3
    fused.to(torch.float16)
    assert (fused.components["vae"].dtype, fused.components["unet"].dtype) == (torch.float32, torch.float16)
    with refused("decode_batch_size 0"):
        FusedPipeline.from_pretrained(tmp_path / "set", decode_batch_size=0)

"""Models to measure on: a set's base, or an architecture of random weights where none can be loaded."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_base
from stepfuse.fuse.backbones.registry import backbone_class, backbone_of
from stepfuse.fuse.diffusion.schedulers import STABLE_DIFFUSION
from stepfuse.fuse.lora.layers import several_adapters
from stepfuse.fuse.sets.adapter import load_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.benchmark.architectures import ARCHITECTURES

# What the published checkpoints have beside the libraries' defaults; of Stable Diffusion 3.5, whose own autoencoder and
# text encoders are several GB, the smallest that fit its network.
AUTOENCODER: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "sd15": AUTOENCODER | dict(sample_size=512, scaling_factor=0.18215),
    "sdxl": AUTOENCODER | dict(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
    "sd35": AUTOENCODER
    | dict(
        sample_size=1024,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}
TEXT_ENCODER: dict[str, Any] = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
SECOND_TEXT_ENCODER: dict[str, Any] = dict(
    vocab_size=49408,
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
SMALL = dict(vocab_size=2048, num_hidden_layers=2)  # of which the network is given the last but one
TEXT_ENCODERS: dict[str, dict[str, tuple[type, dict[str, Any]]]] = {
    "sd15": {"": (CLIPTextModel, TEXT_ENCODER)},
    "sdxl": {"": (CLIPTextModel, TEXT_ENCODER), "_2": (CLIPTextModelWithProjection, SECOND_TEXT_ENCODER)},
    "sd35": {
        "": (CLIPTextModelWithProjection, TEXT_ENCODER | SMALL | dict(projection_dim=768)),
        "_2": (CLIPTextModelWithProjection, SECOND_TEXT_ENCODER | SMALL),
    },
}


def random_model(
    architecture: str, count: int, *, layers: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> DiffusionPipeline:
    """A network of random weights, with LoRAs of rank 4 on its attention, in a pipeline that has no other network.

    Raises:
        ValueError: for a number of layers that the architecture cannot have, and one whose pipeline is of no family.
    """
    published = ARCHITECTURES[architecture]
    part, pipeline_class = backbone_class(published.pipeline).part, getattr(diffusers, published.pipeline)
    config = {**published.config, **published.reduced(layers)}
    with _random_weights(dtype, device):
        network = getattr(diffusers, published.network)(**config).requires_grad_(False).eval()
    flow = published.flow
    scheduler = DDIMScheduler(**STABLE_DIFFUSION) if flow is None else FlowMatchEulerDiscreteScheduler(**flow)
    parameters = list(inspect.signature(pipeline_class).parameters.values())
    absent = {each.name: None for each in parameters if each.default is inspect.Parameter.empty}
    unchecked = {each.name: False for each in parameters if each.name == "requires_safety_checker"}
    pipeline = pipeline_class(**absent | unchecked | {part: network, "scheduler": scheduler})
    targets = list(backbone_of(pipeline).targets)
    _add_loras(network, count, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    return pipeline


def random_pipeline(
    architecture: str, *, layers: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> DiffusionPipeline:
    """A pipeline of random weights, with the tokenizer of the bundled base, which has fewer tokens than published."""
    pipeline = random_model(architecture, 0, layers=layers, dtype=dtype, device=device)
    tokenizer = CLIPTokenizer.from_pretrained(emoji.PIPELINE / "tokenizer", model_max_length=77)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    encoders = TEXT_ENCODERS[architecture]
    with _random_weights(dtype, device):
        parts = {"vae": AutoencoderKL(**AUTOENCODERS[architecture])}
        for suffix, (model_class, config) in encoders.items():
            parts[f"text_encoder{suffix}"] = model_class(CLIPTextConfig(**config, **ids))
    pipeline.register_modules(**{name: part.requires_grad_(False).eval() for name, part in parts.items()})
    pipeline.register_modules(**{f"tokenizer{suffix}": tokenizer for suffix in encoders})
    return pipeline


@contextmanager
def _random_weights(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Build models there in this precision from the start: in float32 the largest would not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def set_model(folder: str, count: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiffusionPipeline:
    """A set's base, with LoRAs of random weights configured as its first adapter is: as many as are wanted."""
    adapter_set = load_set(folder, read_weights=False)
    pipeline = load_base(adapter_set.base, dtype=dtype).to(device)
    backbone, first = backbone_of(pipeline), adapter_set.adapters[0]
    load_adapter(backbone, first, base_fingerprint(backbone.network))
    config = backbone.network.peft_config[first.name]
    pipeline.unload_lora_weights()
    _add_loras(backbone.network, count, config)
    return pipeline


def _add_loras(network: Any, count: int, config: LoraConfig) -> None:
    """Add LoRAs that are not zero, in the network's precision; their time does not depend on their values."""
    with several_adapters():
        for i in range(count):
            network.add_adapter(copy.deepcopy(config), adapter_name=f"adapter{i + 1}")
    generator = torch.Generator().manual_seed(0)
    for key, value in network.named_parameters():
        if ".lora_" in key:
            value.requires_grad_(False)
            value.data = value.data.to(network.dtype)
        if ".lora_A." in key or ".lora_B." in key:
            value.copy_(0.01 * torch.randn(value.shape, generator=generator))


def random_conditioning(backbone: Backbone, model: str, images: int, **options: Any) -> Conditioning:
    """Conditioning of an architecture with random embeddings, or of a set's base with those of a prompt.

    Args:
        options: of `Backbone.encode`: the height and width of images, and the device.
    """
    if model not in ARCHITECTURES:
        return backbone.encode(["a photo"] * images, **options)
    generator = torch.Generator().manual_seed(1)
    embeds: dict[str, Any] = {
        prefix + name: torch.randn(images, *shape, generator=generator)
        for prefix in ("", "negative_")
        for name, shape in ARCHITECTURES[model].embeds.items()
    }
    return backbone.encode(None, **embeds, **options)


def with_copied_network(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The same parts, with a copy of the network that can have another LoRA: other modules, the same frozen weights."""
    part = backbone_of(pipeline).part
    network = getattr(pipeline, part)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copied = copy.copy(pipeline)
    setattr(copied, part, copy.deepcopy(network, shared))
    return copied

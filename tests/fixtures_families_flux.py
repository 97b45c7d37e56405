"""Tiny FLUX.1 and FLUX.2: T5 of letters and a language model of bytes as text encoders, with random weights."""

from string import ascii_lowercase

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from stepfuse.data import emoji
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.flow import LENGTH
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.registry import backbone_of
from tests.fixtures_tiny import text_config

PROMPTS = ["a red apple", "a cat on a blue background"]
HEIGHT, WIDTH = 16, 24
STEPS = 3
SCALE = 3.0
T5_TOKENS, CHAT_TOKENS = 32, 64  # a prompt's, with the template; 512 in the released models
LEVELS = dict(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
    latent_channels=4,
)
# what FLUX.2 dev says as a list of parts, Klein says as text
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.content is string else m.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5_tokenizer() -> T5Tokenizer:
    """A token a letter, and one before a word."""
    letters = [(letter, -2.0) for letter in ascii_lowercase + "▁"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def chat_tokenizer() -> Qwen2Tokenizer:
    """A token a byte."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: index for index, piece in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:], chat_template=CHAT)


class Processor(ProcessorMixin):
    """What FLUX.2 dev has as its tokenizer, without the part that reads images."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)


def recording(pipeline: DiffusionPipeline, length: int) -> DiffusionPipeline:
    """The pipeline as one that was trained with so many tokens of a prompt."""
    pipeline.register_to_config(**{LENGTH: length})
    return pipeline


def flux(*, guidance_embeds: bool, scheduler: FlowMatchEulerDiscreteScheduler, **config: object) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        **dict(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2)
        | dict(joint_attention_dim=16, pooled_projection_dim=32, axes_dims_rope=(2, 2, 4))
        | dict(guidance_embeds=guidance_embeds)
        | config
    )
    text = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=AutoencoderKL(
            **LEVELS, scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=CLIPTokenizer.from_pretrained(emoji.CLIP),
        text_encoder_2=T5EncoderModel(text),
        tokenizer_2=t5_tokenizer(),
    )
    return recording(pipeline, T5_TOKENS)


def flux_dev(**config: object) -> FluxPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15)
    return flux(guidance_embeds=True, scheduler=scheduler, **config)


def flux_schnell(**config: object) -> FluxPipeline:
    return flux(guidance_embeds=False, scheduler=FlowMatchEulerDiscreteScheduler(), **config)


def _flux2(kind: type[DiffusionPipeline], config: dict, **options: object) -> DiffusionPipeline:
    layers = 30 if kind is Flux2Pipeline else 27  # the last hidden states that the pipeline takes
    language = Qwen3Config(
        vocab_size=259,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = Flux2Transformer2DModel(
        **dict(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2)
        | dict(joint_attention_dim=24, timestep_guidance_channels=16, mlp_ratio=2.0, axes_dims_rope=(2, 2, 2, 2))
        | config
    )
    vae = AutoencoderKLFlux2(**LEVELS)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    pipeline = kind(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(language),
        tokenizer=Processor(chat_tokenizer()) if kind is Flux2Pipeline else chat_tokenizer(),
        **options,
    )
    return recording(pipeline, CHAT_TOKENS)


def flux2_klein(*, is_distilled: bool = False, **config: object) -> Flux2KleinPipeline:
    return _flux2(Flux2KleinPipeline, dict(guidance_embeds=False) | config, is_distilled=is_distilled)


def flux2_dev(**config: object) -> Flux2Pipeline:
    """With the language model of Klein, which is called in the same way, and a short system message."""
    pipeline = _flux2(Flux2Pipeline, dict(guidance_embeds=True) | config)
    pipeline.system_message = "draw"
    return pipeline


def unpacked(pipeline: FluxPipeline, z: Tensor, height: int, width: int | None = None) -> Tensor:
    """Latents of FLUX.1's pipeline, which are packed."""
    factor = 2 * pipeline.vae_scale_factor
    return pixel_shuffle(z.mT.unflatten(2, (height // factor, (width or height) // factor)), 2)


def untokened(pipeline: Flux2Pipeline, z: Tensor, height: int, width: int) -> Tensor:
    """Latents of FLUX.2 dev's pipeline, which are tokens."""
    factor = 2 * pipeline.vae_scale_factor
    return z.mT.unflatten(2, (height // factor, width // factor))


def normalised(pipeline: Flux2KleinPipeline, z: Tensor, *size: int) -> Tensor:
    """Latents of Klein's pipeline, which are those that the autoencoder decodes."""
    bn = pipeline.vae.bn
    mean, variance = (value.view(1, -1, 1, 1) for value in (bn.running_mean, bn.running_var))
    return (pixel_unshuffle(z, 2) - mean) / torch.sqrt(variance + bn.eps)


def drawn(make, **config):
    """A pipeline of random weights, the same every time, none of which are zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = make(**config)
        for parameter in pipeline.transformer.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipeline


def denoiser_of(pipeline, guidance, height=HEIGHT, width=WIDTH):
    backbone = backbone_of(pipeline)
    backbone.check()
    shape = backbone.shape(height, width)
    chosen = Guidance(source=guidance, scale=SCALE)
    return Denoiser(backbone=backbone, path=backbone.path(shape), guidance=chosen), shape


FLUX = dict(
    size=16,
    call=lambda g: {"guidance_scale": g, "max_sequence_length": T5_TOKENS},
    unpack=unpacked,
    wide=(
        *("context_embedder", "x_embedder", "guidance_embedder.linear_1", "text_embedder.linear_1"),
        *("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"),
        *("ff.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    ),
)
FLUX2 = dict(
    size=16,
    call=lambda g: {"guidance_scale": g, "max_sequence_length": CHAT_TOKENS},
    unpack=normalised,
    wide=(
        *("context_embedder", "x_embedder", "timestep_embedder.linear_1", "norm_out.linear", "proj_out"),
        *("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear"),
        *("single_stream_modulation.linear", "ff.linear_in", "ff_context.linear_out"),
    ),
)

"""Pipelines of SANA and Lumina 2 with a few thousand random weights."""

import inspect
import json
import string

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
WIDTH = 16  # of the text encoder


def gemma_tokenizer() -> GemmaTokenizer:
    """A few hundred pieces of words, those of the instruction to Gemma."""
    learned = GemmaTokenizer().train_new_from_iterator([INSTRUCTION, string.printable], vocab_size=400)
    model = json.loads(learned.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)


def gemma(vocabulary: int) -> Gemma2Model:
    sizes = dict(hidden_size=WIDTH, intermediate_size=16, head_dim=8, num_attention_heads=2, num_key_value_heads=1)
    return Gemma2Model(Gemma2Config(vocab_size=vocabulary, num_hidden_layers=2, **sizes))


def sana() -> SanaPipeline:
    """With twice as many output channels as input channels, the second half a learned variance."""
    levels = dict(block_types="ResBlock", block_out_channels=(4, 4, 8), layers_per_block=(1, 1, 1))
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        scaling_factor=0.4,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in levels.items()},
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
    )
    transformer = SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        timestep_scale=0.5,
        qk_norm="rms_norm_across_heads",
    )
    tokenizer = gemma_tokenizer()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(len(tokenizer)),
        vae=autoencoder,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def lumina2() -> Lumina2Pipeline:
    autoencoder = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=WIDTH,
    )
    tokenizer = gemma_tokenizer()
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder,
        text_encoder=gemma(len(tokenizer)),
        tokenizer=tokenizer,
    )

"""The check of a Stable Diffusion's whole configuration when it is loaded: UNet, autoencoder and text encoders."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModelWithProjection

from stepfuse.fuse.diffusion.configuration import Expected, check_configuration

AUTOENCODERS = (AutoencoderKL, AutoencoderTiny, AsymmetricAutoencoderKL)
STATISTICS = ("latents_mean", "latents_std")  # of an autoencoder's latents, by channel

# The UNet's own forward uses these, whatever their values. Channels are compared with the autoencoder's below, and
# pipelines check `projection_class_embeddings_input_dim`.
UNET_HANDLED = frozenset(
    {
        *("act_fn", "addition_embed_type_num_heads", "addition_time_embed_dim", "attention_head_dim"),
        *("block_out_channels", "center_input_sample", "conv_in_kernel", "conv_out_kernel", "cross_attention_dim"),
        *("cross_attention_norm", "down_block_types", "downsample_padding", "dropout", "encoder_hid_dim"),
        *("flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block", "mid_block_only_cross_attention"),
        *("mid_block_scale_factor", "mid_block_type", "norm_eps", "norm_num_groups", "num_attention_heads"),
        *("only_cross_attention", "out_channels", "projection_class_embeddings_input_dim", "resnet_out_scale_factor"),
        *("resnet_skip_time_act", "resnet_time_scale_shift", "reverse_transformer_layers_per_block", "sample_size"),
        *("time_embedding_act_fn", "time_embedding_dim", "time_embedding_type", "timestep_post_act"),
        *("transformer_layers_per_block", "up_block_types", "upcast_attention", "use_linear_projection"),
    }
)
LABELS = "networks with class labels are not supported"
UNET_EXPECTED = {
    "time_cond_proj_dim": Expected(
        (None,),
        "the network takes the guidance scale as an embedding (a latent consistency model), which is not supported; "
        "take the base that it was distilled from",
    ),
    "class_embed_type": Expected((None,), LABELS),
    "num_class_embeds": Expected((None,), LABELS),
    "class_embeddings_concat": Expected((False,), LABELS),
    "encoder_hid_dim_type": Expected(
        (None, "text_proj"), "image prompts (IP-Adapter) are not supported; call pipeline.unload_ip_adapter() first"
    ),
    "dual_cross_attention": Expected((False, None), "networks with two conditions are not supported"),
    "attention_type": Expected(("default",), "networks with boxes (GLIGEN) are not supported"),
}

# Channels and statistics of latents are checked below; pipelines do not use `latent_magnitude` and `latent_shift`.
AUTOENCODER_HANDLED = frozenset(
    {
        *("act_fn", "block_out_channels", "decoder_block_out_channels", "down_block_out_channels"),
        *("down_block_types", "encoder_block_out_channels", "force_upcast", "latent_channels", "latent_magnitude"),
        *("latent_shift", *STATISTICS, "layers_per_block", "layers_per_down_block"),
        *("layers_per_up_block", "mid_block_add_attention", "norm_num_groups", "num_decoder_blocks"),
        *("num_encoder_blocks", "sample_size", "scaling_factor", "up_block_out_channels", "up_block_types"),
        *("upsample_fn", "upsampling_scaling_factor", "use_post_quant_conv", "use_quant_conv"),
    }
)
AUTOENCODER_EXPECTED = {
    "in_channels": Expected((3,), "images have three channels"),
    "out_channels": Expected((3,), "images have three channels"),
    "shift_factor": Expected((None, 0), "Stable Diffusion's pipelines do not apply a shift of latents"),
}


def check_unet(unet: Any, vae: Any, added: Expected) -> None:
    """Check that everything in a UNet's configuration that changes images is supported."""
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"unet is a {type(unet).__name__}; expected UNet2DConditionModel")
    check_configuration("unet", unet, handled=UNET_HANDLED, expected=UNET_EXPECTED | {"addition_embed_type": added})
    inputs, outputs, latents = unet.config.in_channels, unet.config.out_channels, vae.config.latent_channels
    if inputs != latents:
        kind = {2 * latents + 1: " of inpainting", 2 * latents: " of editing by instructions"}.get(inputs, "")
        raise ValueError(
            f"unet has in_channels {inputs}; expected {latents}, as many as the autoencoder's latents have: a network"
            f"{kind} that takes more than the latent is not supported"
        )
    if outputs != inputs:
        raise ValueError(
            f"unet has out_channels {outputs}; expected {inputs}, as many as in_channels: networks that predict their "
            "variance too are not supported"
        )


def check_autoencoder(vae: Any, not_applied: Sequence[str]) -> None:
    """Check that everything in an autoencoder's configuration that changes images is supported."""
    if not isinstance(vae, AUTOENCODERS):
        known = ", ".join(kind.__name__ for kind in AUTOENCODERS)
        raise ValueError(f"vae is a {type(vae).__name__}; expected one of {known}")
    expected = AUTOENCODER_EXPECTED | dict.fromkeys(not_applied, Expected((None,), "this pipeline does not apply it"))
    check_configuration("vae", vae, handled=AUTOENCODER_HANDLED - set(not_applied), expected=expected)
    scale = vae.config.scaling_factor
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale == 0:
        raise ValueError(f"vae has scaling_factor {scale!r}; expected a finite number other than 0")
    given = {key: vae.config.get(key) for key in STATISTICS}
    stated = [key for key, value in given.items() if value is not None]
    if not stated:
        return
    for key, value in given.items():
        if not isinstance(value, list | tuple) or len(value) != vae.config.latent_channels:
            raise ValueError(
                f"vae has {key} {value!r} beside {', '.join(stated)}; expected {vae.config.latent_channels} numbers"
            )
    if not all(given["latents_std"]):
        raise ValueError(f"vae has latents_std {given['latents_std']!r}; expected numbers other than 0")


def check_texts(pipeline: DiffusionPipeline, encoders: Mapping[str, Sequence[bool]]) -> None:
    """Check that text encoders fit their tokenizers, and the network what all of them give, if there is the last."""
    width = 0
    for suffix, projections in encoders.items():
        encoder, tokenizer = (getattr(pipeline, part + suffix) for part in ("text_encoder", "tokenizer"))
        if (encoder is None) != (tokenizer is None):
            missing = ("text_encoder" if encoder is None else "tokenizer") + suffix
            raise ValueError(f"there is no {missing}; expected a text encoder and its tokenizer, or neither")
        if encoder is None:
            continue
        config = encoder.config
        width += getattr(config, "hidden_size", 0)
        if isinstance(encoder, CLIPTextModelWithProjection) not in projections:
            wanted = "CLIPTextModelWithProjection" if True in projections else "CLIPTextModel"
            raise ValueError(f"text_encoder{suffix} is a {type(encoder).__name__}; expected {wanted}")
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and tokenizer.model_max_length > longest:
            raise ValueError(
                f"tokenizer{suffix} has model_max_length {tokenizer.model_max_length}; expected {longest} at most, the "
                f"positions of text_encoder{suffix}"
            )
    if encoder is None or not width:
        return
    key = "encoder_hid_dim" if pipeline.unet.config.encoder_hid_dim_type else "cross_attention_dim"
    stated = pipeline.unet.config[key]
    if any(dim != width for dim in (stated if isinstance(stated, list | tuple) else [stated])):
        raise ValueError(
            f"unet has {key} {stated}; expected {width}, the width of what the text encoders give for a prompt"
        )

"""The check of a Stable Diffusion's whole configuration when it is loaded: UNet, autoencoder and text encoders."""

import math
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
ADDED_EMBEDDINGS = {
    False: Expected((None, "text"), "this pipeline gives its network nothing beside the prompt"),
    True: Expected(("text_time",), "this pipeline gives its network the pooled prompt and the image size"),
}

# Channels and statistics of latents are checked below; pipelines do not use `latent_magnitude` and `latent_shift`.
AUTOENCODER_HANDLED = frozenset(
    {
        *("act_fn", "block_out_channels", "decoder_block_out_channels", "down_block_out_channels"),
        *("down_block_types", "encoder_block_out_channels", "force_upcast", "latent_channels", "latent_magnitude"),
        *("latent_shift", "latents_mean", "latents_std", "layers_per_block", "layers_per_down_block"),
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


def check_pipeline(pipeline: DiffusionPipeline, *, xl: bool) -> None:
    """Check that everything in a configuration that changes images is supported; see `Backbone.check`.

    Args:
        xl: the pipeline is Stable Diffusion XL.

    Raises:
        ValueError: naming the component, the key, its value and what is expected.
    """
    _check_unet(pipeline, xl)
    _check_autoencoder(pipeline, xl)
    _check_texts(pipeline, xl)


def _check_unet(pipeline: DiffusionPipeline, xl: bool) -> None:
    unet, vae = pipeline.unet, pipeline.vae
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"unet is a {type(unet).__name__}; expected UNet2DConditionModel")
    expected = UNET_EXPECTED | {"addition_embed_type": ADDED_EMBEDDINGS[xl]}
    check_configuration("unet", unet, handled=UNET_HANDLED, expected=expected)
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


def _check_autoencoder(pipeline: DiffusionPipeline, xl: bool) -> None:
    vae = pipeline.vae
    if not isinstance(vae, AUTOENCODERS):
        known = ", ".join(kind.__name__ for kind in AUTOENCODERS)
        raise ValueError(f"vae is a {type(vae).__name__}; expected one of {known}")
    check_configuration("vae", vae, handled=AUTOENCODER_HANDLED, expected=AUTOENCODER_EXPECTED)
    scale = vae.config.scaling_factor
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale == 0:
        raise ValueError(f"vae has scaling_factor {scale!r}; expected a finite number other than 0")
    given = {key: vae.config.get(key) for key in ("latents_mean", "latents_std")}
    stated = {key: value for key, value in given.items() if value is not None}
    if not stated:
        return
    if not xl:
        raise ValueError(
            f"vae has {' and '.join(stated)}, which {type(pipeline).__name__} does not apply; expected None"
        )
    for key, value in given.items():
        if not isinstance(value, list | tuple) or len(value) != vae.config.latent_channels:
            raise ValueError(
                f"vae has {key} {value!r} beside {', '.join(stated)}; expected {vae.config.latent_channels} numbers"
            )
    if not all(given["latents_std"]):
        raise ValueError(f"vae has latents_std {given['latents_std']!r}; expected numbers other than 0")


def _check_texts(pipeline: DiffusionPipeline, xl: bool) -> None:
    width = 0
    for suffix in ("", "_2") if xl else ("",):
        encoder, tokenizer = (getattr(pipeline, part + suffix) for part in ("text_encoder", "tokenizer"))
        if (encoder is None) != (tokenizer is None):
            missing = ("text_encoder" if encoder is None else "tokenizer") + suffix
            raise ValueError(f"there is no {missing}; expected a text encoder and its tokenizer, or neither")
        if encoder is None:
            continue
        config = encoder.config
        width += getattr(config, "hidden_size", 0)
        pooled = isinstance(encoder, CLIPTextModelWithProjection)
        if (suffix == "_2" and not pooled) or (not xl and pooled):
            wanted = "CLIPTextModelWithProjection" if suffix else "CLIPTextModel"
            raise ValueError(f"text_encoder{suffix} is a {type(encoder).__name__}; expected {wanted}")
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and tokenizer.model_max_length > longest:
            raise ValueError(
                f"tokenizer{suffix} has model_max_length {tokenizer.model_max_length}; expected {longest} at most, the "
                f"positions of text_encoder{suffix}"
            )
    if xl and pipeline.text_encoder is not None and pipeline.text_encoder_2 is None:
        return  # benchmarks and users who give embeddings
    if width:
        _check_width(pipeline.unet.config, width)
    if xl and pipeline.text_encoder_2 is not None:
        side = 8 * pipeline.vae_scale_factor
        try:  # its sizes must fit the network's
            pipeline._get_add_time_ids(
                (side, side),
                (0, 0),
                (side, side),
                dtype=pipeline.unet.dtype,
                text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
            )
        except ValueError as error:
            raise ValueError(
                f"unet has projection_class_embeddings_input_dim "
                f"{pipeline.unet.config.projection_class_embeddings_input_dim}, which does not fit the pooled prompt "
                f"and six numbers of the image size: {str(error).splitlines()[0]}"
            ) from error


def _check_width(config: Any, width: int) -> None:
    key = "encoder_hid_dim" if config.encoder_hid_dim_type else "cross_attention_dim"
    wanted = config[key] if isinstance(config[key], list | tuple) else [config[key]]
    if any(dim != width for dim in wanted):
        raise ValueError(
            f"unet has {key} {config[key]}; expected {width}, the width of what the text encoders give for a prompt"
        )

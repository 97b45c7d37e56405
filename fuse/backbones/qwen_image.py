"""Qwen-Image: a joint-attention transformer on packed latents, Qwen2.5-VL as text encoder and a video autoencoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepfuse.fuse.backbones.autoencoder import encoder_input, run_decoder, run_encoder, statistics
from stepfuse.fuse.backbones.base import Pixels
from stepfuse.fuse.backbones.conditioning import Inputs, host_copy
from stepfuse.fuse.backbones.flow import FlowTransformer, as_prediction
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.backbones.qwen_image_names import QwenImageNames
from stepfuse.fuse.diffusion.configuration import Expected, check_configuration
from stepfuse.fuse.diffusion.gaussian import Generators

PATCH = 2  # the side of a token in a latent
EDITS = "networks that edit images, or generate layers, are not supported"
EXPECTED = {
    "patch_size": Expected((PATCH,), "latents are packed so"),
    "guidance_embeds": Expected((False,), "diffusers' network does not take the guidance scale as an input"),
    "zero_cond_t": Expected((False,), EDITS),
    "use_additional_t_cond": Expected((False,), EDITS),
    "use_layer3d_rope": Expected((False,), EDITS),
}
HANDLED = frozenset(
    {
        *("attention_head_dim", "axes_dims_rope", "in_channels", "joint_attention_dim", "num_attention_heads"),
        *("num_layers", "out_channels"),
    }
)


class QwenImage(FlowTransformer):
    """Qwen-Image. Inputs: `prompt_embeds`, padded to the longest prompt of a batch, and `prompt_embeds_mask`.

    The network does not attend to padding, so an image does not depend on the other prompts of its batch. Whatever the
    precision of the times that it is given, it rounds them to that of its weights.
    """

    blocks = ("QwenImageTransformerBlock",)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    network_class = "QwenImageTransformer2DModel"
    layer_names = QwenImageNames
    inputs = ("prompt_embeds", "prompt_embeds_mask")
    default_length = 512

    @property
    def channels(self) -> int:
        return self.network.config.in_channels // PATCH**2

    def check_network(self) -> None:
        vae, longest = self.pipeline.vae, self.pipeline.tokenizer_max_length
        if type(vae).__name__ != "AutoencoderKLQwenImage":
            raise ValueError(f"vae is a {type(vae).__name__}; expected AutoencoderKLQwenImage")
        if vae.config.input_channels != 3:
            raise ValueError(f"vae has input_channels {vae.config.input_channels}; expected 3: {EDITS}")
        channels = vae.config.z_dim
        for key in ("latents_mean", "latents_std"):
            if len(vae.config[key]) != channels:
                raise ValueError(f"vae has {len(vae.config[key])} numbers in {key}; expected {channels}, its z_dim")
        check_configuration("transformer", self.network, handled=HANDLED, expected=EXPECTED)
        for key, number in {"in_channels": PATCH**2 * channels, "out_channels": channels}.items():
            if self.network.config[key] != number:
                raise ValueError(
                    f"transformer has {key} {self.network.config[key]}; expected {number} for an autoencoder of "
                    f"{channels} channels"
                )
        if self.max_sequence_length > longest:
            raise ValueError(f"max_sequence_length is {self.max_sequence_length}; expected {longest} at most")

    def token_limits(self) -> dict[str, int]:
        """The tokens of the prompt itself: those of the template that come before it are dropped."""
        return {} if self.pipeline.tokenizer is None else {"tokenizer": self.max_sequence_length}

    def embed(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        embeds, mask = self.pipeline.encode_prompt(prompts, device, max_sequence_length=self.max_sequence_length)
        full = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return embeds, full if mask is None else mask.bool()

    def predict(self, x: Latents, times: Tensor, inputs: Inputs, *, network: nn.Module | None = None) -> Latents:
        x_t, given = self.in_network_type(x, inputs)
        mask = given["prompt_embeds_mask"].bool()
        tokens = (1, x.shape[2] // PATCH, x.shape[3] // PATCH)  # frames, height and width
        output = (self.network if network is None else network)(
            hidden_states=pack(x_t),
            timestep=times / 1000,
            encoder_hidden_states=given["prompt_embeds"],
            encoder_hidden_states_mask=None if host_copy(mask).all() else mask,  # without one attention is faster
            img_shapes=[[tokens]] * len(x),
            return_dict=False,
        )[0]
        return as_prediction(unpack(output, x.shape[2]), x)

    def guide(self, negative: Latents, positive: Latents, scale: float) -> Latents:
        """‖e_c‖ / ‖e‖ · e with e = e_u + g (e_c - e_u): each token keeps its norm in e_c, as in diffusers' pipeline.

        A token is 2×2 of the latent, in all channels. g is `true_cfg_scale` there.
        """
        guided = pack(super().guide(negative, positive, scale))
        norms = [tokens.norm(dim=-1, keepdim=True) for tokens in (pack(positive), guided)]
        return unpack(guided * (norms[0] / norms[1]), positive.shape[2])

    def decode_unclamped(self, latents: Latents) -> Pixels:
        """Of the one frame that an image is; the autoencoder itself clamps it to [-1, 1]."""
        vae = self.pipeline.vae
        mean, deviation = statistics(vae, latents)
        frames = (latents * deviation + mean).unsqueeze(2)
        return run_decoder(vae, frames, self.decode_batch_size)[:, :, 0]

    def encode_pixels(self, pixels: Pixels, generators: Generators) -> Latents:
        vae = self.pipeline.vae
        frames = encoder_input(vae, pixels).unsqueeze(2)
        z = run_encoder(vae, frames, generators, self.decode_batch_size)[:, :, 0]
        mean, deviation = statistics(vae, z)
        return (z - mean) / deviation


def pack(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) → (batch, tokens, 4 channels): a token is 2×2 of the latent, row by row."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int) -> Tensor:
    """The inverse of `pack`, for latents of this height."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // PATCH, -1)), PATCH)

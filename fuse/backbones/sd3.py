"""Stable Diffusion 3 and 3.5: a joint-attention transformer, two CLIP text encoders and T5, which may be missing."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from stepfuse.fuse.backbones.conditioning import Inputs
from stepfuse.fuse.backbones.flow import FlowTransformer, as_prediction
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.backbones.sd3_names import StableDiffusion3Names


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5.

    The network attends to the padding of prompts, and without T5 to `max_sequence_length` zeros in its place: a base
    that was trained with another number of them records it in its model_index.json.
    """

    blocks = ("JointTransformerBlock",)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    network_class = "SD3Transformer2DModel"
    inputs = ("prompt_embeds", "pooled_prompt_embeds")
    default_length = 256
    layer_names = StableDiffusion3Names
    text_encoders: ClassVar[Sequence[str]] = ("", "_2")

    @property
    def multiple(self) -> int:
        return self.network.config.patch_size * self.pipeline.vae_scale_factor

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        size = super().size(height, width)
        most = self.network.config.pos_embed_max_size * self.multiple
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels > most:
                raise ValueError(f"{name} is {pixels}; expected {most} at most, the network's pos_embed_max_size")
        return size

    def check_network(self) -> None:
        config, channels = self.network.config, self.pipeline.vae.config.latent_channels
        for name in ("in_channels", "out_channels"):
            if config[name] != channels:
                raise ValueError(f"transformer has {name} {config[name]}; expected {channels}, as the autoencoder has")

    def token_limits(self) -> dict[str, int]:
        """Where there is T5, it reads what is cut of a prompt for CLIP."""
        if self.pipeline.tokenizer_3 is not None:
            return {"tokenizer_3": self.max_sequence_length}
        return super().token_limits()

    def embed(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return embeds, pooled

    def predict(self, x: Latents, times: Tensor, inputs: Inputs, *, network: nn.Module | None = None) -> Latents:
        x_t, given = self.in_network_type(x, inputs)
        output = (self.network if network is None else network)(
            hidden_states=x_t,
            timestep=times,
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return as_prediction(output, x)

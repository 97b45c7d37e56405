"""FLUX.1: a transformer on 2×2 patches of latents, with T5's tokens and CLIP's pooled embedding of the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepfuse.fuse.backbones.conditioning import Inputs
from stepfuse.fuse.backbones.flow import FlowTransformer, as_prediction
from stepfuse.fuse.backbones.flux_names import FluxNames
from stepfuse.fuse.backbones.guidance import Latents

PATCH = 2  # latents on a side of a token
JOINT_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Flux(FlowTransformer):
    """FLUX.1 dev, which takes the guidance scale as an input, and schnell, which does not.

    The network attends to the padding of prompts, 512 tokens unless the base records another `max_sequence_length`. It
    rounds the time to its own precision itself.
    """

    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    network_class = "FluxTransformer2DModel"
    layer_names = FluxNames
    inputs = ("prompt_embeds", "pooled_prompt_embeds")
    default_length = 512
    text_encoders: ClassVar[Sequence[str]] = ("", "_2")

    @property
    def targets(self) -> Sequence[str]:
        return (*JOINT_ATTENTION, *single_layers(self.network, "proj_out"))

    @property
    def channels(self) -> int:
        return self.network.config.in_channels // PATCH**2

    def check_network(self) -> None:
        check_patches(self.network, self.pipeline.vae.config.latent_channels)

    @property
    def embeds_guidance(self) -> bool:
        return self.network.config.guidance_embeds

    def token_limits(self) -> dict[str, int]:
        """T5 reads what is cut of a prompt for CLIP."""
        return {} if self.pipeline.tokenizer_2 is None else {"tokenizer_2": self.max_sequence_length}

    def embed(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=device, max_sequence_length=self.max_sequence_length
        )
        return embeds, pooled

    def predict(self, x: Latents, times: Tensor, inputs: Inputs, *, network: nn.Module | None = None) -> Latents:
        x_t, given = self.in_network_type(x, inputs)
        patches = run_on_tokens(
            self.network if network is None else network,
            pixel_unshuffle(x_t, PATCH),
            times,
            given,
            text_ids=torch.zeros(given["prompt_embeds"].shape[1], 3, device=x.device),
            pooled_projections=given["pooled_prompt_embeds"],
        )
        return as_prediction(pixel_shuffle(patches, PATCH), x)


def single_layers(network: Any, name: str) -> list[str]:
    """A layer of all single blocks, which other layers of the network share the end of its name with.

    It is the output projection of both attention and feed-forward there.
    """
    return [f"single_transformer_blocks.{index}.{name}" for index in range(network.config.num_single_layers)]


def run_on_tokens(
    network: nn.Module,
    patches: Float[Tensor, "batch channels height width"],
    times: Float[Tensor, " batch"],
    given: Mapping[str, Tensor],
    *,
    text_ids: Float[Tensor, "text axes"],
    **more: Any,
) -> Float[Tensor, "batch channels height width"]:
    """The output of a network of FLUX.1 or FLUX.2, whose tokens are patches in rows from the top left.

    Args:
        times: 1000 · sigma; the network is given sigma.
        given: the network's inputs by their names here.
        text_ids: the position of each token of the prompt.
        more: other arguments of the network.
    """
    height, width = patches.shape[2:]
    positions = torch.zeros(height, width, text_ids.shape[1], device=patches.device)
    positions[..., 1] = torch.arange(height, device=patches.device)[:, None]
    positions[..., 2] = torch.arange(width, device=patches.device)
    output = network(
        hidden_states=patches.flatten(2).mT.contiguous(),
        timestep=times / 1000,
        guidance=given.get("guidance"),
        encoder_hidden_states=given["prompt_embeds"],
        txt_ids=text_ids,
        img_ids=positions.flatten(0, 1),
        return_dict=False,
        **more,
    )[0]
    return output.mT.unflatten(2, (height, width)).contiguous()


def check_patches(network: Any, latent_channels: int) -> None:
    """Check that a network of FLUX.1 or FLUX.2 takes and gives patches of latents, and nothing beside them."""
    expected = latent_channels * PATCH**2
    for name, channels in (("in_channels", network.config.in_channels), ("out_channels", network.out_channels)):
        if channels != expected:
            raise ValueError(
                f"transformer has {name} {channels}; expected {expected}, {PATCH} x {PATCH} of the autoencoder's "
                f"{latent_channels} channels: variants that take an image too, such as Fill and Control, are not "
                "supported"
            )
    if network.config.patch_size != 1:
        raise ValueError(f"transformer has patch_size {network.config.patch_size}; expected 1")
    if network.config.get("encoder_hid_dim_type"):
        raise ValueError("image prompts (IP-Adapter) are not supported; call pipeline.unload_ip_adapter() first")

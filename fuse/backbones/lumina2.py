"""Lumina 2: a transformer on tokens of text and image, and Gemma 2 as the text encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepfuse.fuse.backbones.base import Shape
from stepfuse.fuse.backbones.conditioning import Inputs
from stepfuse.fuse.backbones.flow import FlowTransformer, as_prediction, check_not_float16, linear_mu
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.backbones.lumina2_names import Lumina2Names
from stepfuse.fuse.diffusion.noise_path import NoisePath

BETWEEN = " <Prompt Start> "  # the system prompt and the prompt


class Lumina2(FlowTransformer):
    """Lumina Image 2.0. Positive prompts follow the pipeline's system prompt, negative ones do not."""

    blocks = ("Lumina2TransformerBlock",)
    network_class = "Lumina2Transformer2DModel"
    layer_names = Lumina2Names
    inputs = ("prompt_embeds", "prompt_attention_mask")
    default_length = 256

    @property
    def multiple(self) -> int:
        return self.network.config.patch_size * self.pipeline.vae_scale_factor

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        size = super().size(height, width)
        _, *lengths = self.network.config.axes_lens
        for name, pixels, length in zip(("height", "width"), size, lengths, strict=True):
            if pixels > length * self.multiple:
                raise ValueError(f"{name} is {pixels}; expected {length * self.multiple} at most, by its axes_lens")
        return size

    def check_network(self) -> None:
        config, channels = self.network.config, self.pipeline.vae.config.latent_channels
        for name in ("in_channels", "out_channels"):
            if config[name] not in (None, channels):
                raise ValueError(f"transformer has {name} {config[name]}; expected {channels}, as the autoencoder has")
        factor = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        if factor != self.pipeline.vae_scale_factor:
            raise ValueError(
                f"the autoencoder shrinks images by {factor}; expected {self.pipeline.vae_scale_factor}, as the "
                "pipeline takes it"
            )
        length, most = self.max_sequence_length, config.axes_lens[0]
        if length > most:
            raise ValueError(f"max_sequence_length is {length}; expected {most} at most, by the network's axes_lens")
        check_not_float16(self.pipeline, "text_encoder")

    def mu(self, path: NoisePath, shape: Shape) -> float:
        """The pipeline takes the channels of latents for their tokens, and so does this."""
        return linear_mu(path, shape[0])

    def token_limits(self) -> dict[str, int]:
        """What the system prompt leaves; its last space is of the prompt's first token."""
        text = self.pipeline.system_prompt + BETWEEN.rstrip()
        before = self.pipeline.tokenizer(text, add_special_tokens=False)
        return {"tokenizer": self.max_sequence_length - len(before.input_ids)}

    def embed(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        return self.embed_negative([self.pipeline.system_prompt + BETWEEN + prompt for prompt in prompts], device)

    def embed_negative(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        return self.pipeline._get_gemma_prompt_embeds(prompts, device, self.max_sequence_length)

    def predict(self, x: Latents, times: Tensor, inputs: Inputs, *, network: nn.Module | None = None) -> Latents:
        x_t, given = self.in_network_type(x, inputs)
        output = (self.network if network is None else network)(
            hidden_states=x_t,
            timestep=1 - times / self.pipeline.scheduler.config.num_train_timesteps,  # its time is that of the image
            encoder_hidden_states=given["prompt_embeds"],
            encoder_attention_mask=given["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return as_prediction(-output, x)

    def guide(self, negative: Latents, positive: Latents, scale: float) -> Latents:
        """e_u + g (e_c - e_u), each row of pixels of the norm that it has in e_c."""
        guided = super().guide(negative, positive, scale)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

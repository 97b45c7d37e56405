"""SANA: a linear-attention transformer, Gemma 2 as the text encoder, and an autoencoder that shrinks by 32 (DC-AE)."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

from stepfuse.fuse.backbones.autoencoder import encoder_input, run_encoder
from stepfuse.fuse.backbones.base import Pixels, Shape
from stepfuse.fuse.backbones.conditioning import Inputs
from stepfuse.fuse.backbones.flow import FlowTransformer, as_prediction, check_not_float16
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.backbones.sana_names import SanaNames
from stepfuse.fuse.diffusion.configuration import check_configuration
from stepfuse.fuse.diffusion.gaussian import Generators
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.schedulers import SCHEDULER_EXPECTED, SCHEDULER_HANDLED


class Sana(FlowTransformer):
    """SANA and SANA 1.5.

    Positive prompts get the instruction to Gemma that is the default of the pipeline, negative ones none.

    Images are not those that the pipeline draws with the multistep solver it is published with, of which only order 1
    is a Gaussian step, but those of the pipeline with FlowMatchEulerDiscreteScheduler in its place.
    """

    blocks = ("SanaTransformerBlock",)
    network_class = "SanaTransformer2DModel"
    layer_names = SanaNames
    inputs = ("prompt_embeds", "prompt_attention_mask")
    default_length = 300

    @property
    def multiple(self) -> int:
        return self.network.config.patch_size * self.pipeline.vae_scale_factor

    @property
    def native(self) -> int:
        return self.network.config.sample_size * self.pipeline.vae_scale_factor

    def check_network(self) -> None:
        config, channels = self.network.config, self.pipeline.vae.config.latent_channels
        if config.in_channels != channels:
            raise ValueError(
                f"transformer has in_channels {config.in_channels}; expected {channels}, as the autoencoder has"
            )
        if config.out_channels not in (None, channels, 2 * channels):  # with twice as many it has learned a variance
            raise ValueError(
                f"transformer has out_channels {config.out_channels}; expected {channels} or {2 * channels}"
            )
        if config.guidance_embeds:
            raise ValueError("transformer has guidance_embeds True; expected False, as SANA has without distillation")
        check_not_float16(self.pipeline, "text_encoder", "vae")

    def path(self, shape: Shape | None = None) -> NoisePath:
        """The path that a flow solver of diffusers integrates: its `flow_shift` on the steps of every flow path."""
        return NoisePath.from_scheduler(euler_of(self.pipeline.scheduler))

    def token_limits(self) -> dict[str, int]:
        """Of the tokens the begin of the text is one, and the instruction leaves one less."""
        return {"tokenizer": self.max_sequence_length - 1}

    def embed(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        call = inspect.signature(type(self.pipeline).__call__).parameters
        return self._embed(prompts, device, complex_human_instruction=call["complex_human_instruction"].default)

    def embed_negative(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        return self._embed(prompts, device)

    def _embed(self, prompts: list[str], device: torch.device, **options: Any) -> Sequence[Tensor]:
        found = self.pipeline.encode_prompt(
            prompt=prompts,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            **options,
        )
        return found[:2]

    def predict(self, x: Latents, times: Tensor, inputs: Inputs, *, network: nn.Module | None = None) -> Latents:
        x_t, given = self.in_network_type(x, inputs)
        output = (self.network if network is None else network)(
            hidden_states=x_t,
            timestep=times * self.network.config.timestep_scale,
            encoder_hidden_states=given["prompt_embeds"],
            encoder_attention_mask=given["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return as_prediction(output[:, : self.channels], x)

    def encode_pixels(self, pixels: Pixels, generators: Generators) -> Latents:
        """See `Backbone.encode_pixels`; this autoencoder has no randomness."""
        vae: Any = self.pipeline.vae
        images = encoder_input(vae, pixels)
        z = run_encoder(vae, images, None, self.decode_batch_size, lambda encoded, generator: encoded.latent)
        return z * vae.config.scaling_factor


def euler_of(scheduler: SchedulerMixin) -> SchedulerMixin:
    """FlowMatchEulerDiscreteScheduler on the path of a multistep flow solver; other schedulers as they are."""
    config: Mapping[str, Any] = scheduler.config
    if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
        return scheduler
    handled = SCHEDULER_HANDLED | {"use_flow_sigmas"}
    check_configuration("the scheduler", scheduler, handled=handled, expected=SCHEDULER_EXPECTED)
    count = config["num_train_timesteps"]
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=count, shift=config["flow_shift"])

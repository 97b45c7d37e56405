"""FLUX.2 dev and Klein: a transformer on latents in patches, with hidden states of a language model for the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import ProcessorMixin

from stepfuse.fuse.backbones.autoencoder import encoder_input, run_decoder, run_encoder
from stepfuse.fuse.backbones.base import Pixels, Shape
from stepfuse.fuse.backbones.conditioning import Inputs
from stepfuse.fuse.backbones.flow import FlowTransformer, as_prediction
from stepfuse.fuse.backbones.flux import JOINT_ATTENTION, PATCH, check_patches, run_on_tokens, single_layers
from stepfuse.fuse.backbones.flux2_names import Flux2Names
from stepfuse.fuse.backbones.guidance import Guidance, Latents
from stepfuse.fuse.diffusion.gaussian import Generators
from stepfuse.fuse.diffusion.noise_path import NoisePath

PROMPT = "PROMPT"  # stands for the prompt in the text that is tokenized


@dataclass(frozen=True, kw_only=True)
class EmpiricalShift:
    """mu of FLUX.2 by the number of steps, for an image of so many tokens."""

    tokens: int

    def __call__(self, steps: int) -> float:
        return compute_empirical_mu(self.tokens, steps)


class Flux2(FlowTransformer):
    """FLUX.2 dev, which takes the guidance scale as an input.

    A latent has the channels of 2×2 patches of the autoencoder's latent, 128, normalised by statistics that the
    autoencoder has (`bn`); noise is drawn so too. The network attends to the padding of prompts, 512 tokens unless the
    base records another `max_sequence_length`.
    """

    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    network_class = "Flux2Transformer2DModel"
    layer_names = Flux2Names
    inputs = ("prompt_embeds",)
    default_length = 512

    @property
    def targets(self) -> Sequence[str]:
        return (*JOINT_ATTENTION, "to_qkv_mlp_proj", *single_layers(self.network, "attn.to_out"))

    def shape(self, height: int | None = None, width: int | None = None) -> Shape:
        channels, *size = super().shape(height, width)
        return (channels, size[0] // PATCH, size[1] // PATCH)

    def check_network(self) -> None:
        kind = type(self.pipeline.vae).__name__
        if kind != "AutoencoderKLFlux2":
            raise ValueError(f"vae is a {kind}; expected AutoencoderKLFlux2, which has the statistics of latents")
        check_patches(self.network, self.pipeline.vae.config.latent_channels)

    @property
    def embeds_guidance(self) -> bool:
        return self.network.config.guidance_embeds

    def tokenizer(self, name: str) -> Any:
        """That of a processor of texts and images, as FLUX.2 dev has one."""
        found = super().tokenizer(name)
        return found.tokenizer if isinstance(found, ProcessorMixin) else found

    def token_limits(self) -> dict[str, int]:
        """What the template leaves: it is cut at the end, and so is the prompt once the text after it is gone."""
        tokenizer = self.tokenizer("tokenizer")
        if tokenizer is None:
            return {}
        before = tokenizer(self.templated(PROMPT).split(PROMPT)[0], add_special_tokens=False).input_ids
        limit = self.max_sequence_length - len(before) + tokenizer.num_special_tokens_to_add()
        return {"tokenizer": max(limit, 0)}

    def templated(self, prompt: str) -> str:
        """The text that the pipeline tokenizes for a prompt."""
        messages = format_input([prompt], self.pipeline.system_message)[0]
        return self.pipeline.tokenizer.apply_chat_template(messages, tokenize=False)

    def mu(self, path: NoisePath, shape: Shape) -> EmpiricalShift:
        return EmpiricalShift(tokens=shape[1] * shape[2])

    def embed(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=device, max_sequence_length=self.max_sequence_length
        )
        return (embeds,)

    def predict(self, x: Latents, times: Tensor, inputs: Inputs, *, network: nn.Module | None = None) -> Latents:
        x_t, given = self.in_network_type(x, inputs)
        text_ids = torch.zeros(given["prompt_embeds"].shape[1], 4, device=x.device)
        text_ids[:, 3] = torch.arange(len(text_ids), device=x.device)
        output = run_on_tokens(self.network if network is None else network, x_t, times, given, text_ids=text_ids)
        return as_prediction(output, x)

    def decode_unclamped(self, latents: Latents) -> Pixels:
        vae = self.pipeline.vae
        mean, deviation = self._statistics(latents)
        z = pixel_shuffle(latents * deviation + mean, PATCH)
        return run_decoder(vae, z, self.decode_batch_size)

    def encode_pixels(self, pixels: Pixels, generators: Generators) -> Latents:
        vae = self.pipeline.vae
        images = encoder_input(vae, pixels)
        patches = pixel_unshuffle(run_encoder(vae, images, generators, self.decode_batch_size), PATCH)
        mean, deviation = self._statistics(patches)
        return (patches - mean) / deviation

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        mean, variance = (
            value.to(like.device, like.dtype).view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, (variance + vae.config.batch_norm_eps).sqrt()


class Flux2Klein(Flux2):
    """FLUX.2 Klein: base models, which are guided by negative prompts, and distilled ones, which are not guided."""

    def check_network(self) -> None:
        super().check_network()
        if self.embeds_guidance:
            raise ValueError("transformer has guidance_embeds True; expected False in a Flux2KleinPipeline")

    def check_guidance(self, guidance: Guidance) -> None:
        super().check_guidance(guidance)
        if guidance.subtracts and self.pipeline.config.is_distilled:
            raise ValueError(
                f"guidance {guidance}, but the base is distilled (is_distilled in its model_index.json) and made for "
                "none; expected guidance off"
            )

    def templated(self, prompt: str) -> str:
        return self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

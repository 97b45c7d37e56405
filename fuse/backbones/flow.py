"""What the flow transformers have in common: a transformer as the network, and a flow-matching scheduler."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from stepfuse.data.devices import without_autocast
from stepfuse.data.library_messages import TRUNCATION, without_messages
from stepfuse.fuse.backbones import autoencoder
from stepfuse.fuse.backbones.base import Backbone, Pixels, Shape
from stepfuse.fuse.backbones.conditioning import Conditioning, Inputs
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.backbones.transformer_names import TransformerNames
from stepfuse.fuse.diffusion.gaussian import Generators
from stepfuse.fuse.diffusion.noise_path import FlowPath, NoisePath
from stepfuse.fuse.lora.names import LayerNames

LENGTH = "_max_sequence_length"  # in the pipeline's configuration, where names without _ are those of components


class FlowTransformer(Backbone):
    """A transformer on flow matching (rectified flow, arXiv:2209.03003): x_t = (1 - t) x_0 + t e.

    Attributes:
        network_class: the name of diffusers' class of the network.
        inputs: the network's inputs from text, which are also the names of arguments that give them in place of
            prompts, with `negative_` before those of the negative prompt.
        default_length: tokens of a prompt, by default (`max_sequence_length`).
        layer_names: names of the network's layers in other tools' files; by default they have none there.
        text_encoders: suffixes of the names of the text encoders and tokenizers that prompts need.
    """

    part = "transformer"
    network_class: ClassVar[str]
    inputs: ClassVar[Sequence[str]]
    default_length: ClassVar[int]
    layer_names: ClassVar[type[TransformerNames] | None] = None
    text_encoders: ClassVar[Sequence[str]] = ("",)

    def __init_subclass__(cls) -> None:
        if "inputs" in vars(cls):
            cls.embeds = (*cls.inputs, *(f"negative_{name}" for name in cls.inputs))

    @classmethod
    def names(cls, config: Mapping[str, Any]) -> LayerNames:
        return super().names(config) if cls.layer_names is None else cls.layer_names(config=config)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of a prompt, with padding that the network attends to: as the base records it, or the default."""
        return self.pipeline.config.get(LENGTH) or self.default_length

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.network.config.in_channels

    @property
    def multiple(self) -> int:
        """What height and width in pixels are multiples of."""
        return 2 * self.pipeline.vae_scale_factor

    @property
    def native(self) -> int:
        """Height and width in pixels that the network is made for."""
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def check(self) -> None:
        kind = type(self.network).__name__
        if kind != self.network_class:
            raise ValueError(f"transformer is a {kind}; expected {self.network_class}")
        if any(vars(module).get("fused_projections") for module in self.network.modules()):
            raise ValueError(
                "transformer has fused projections, which ignore LoRAs silently; call its unfuse_qkv_projections()"
            )
        for suffix in self.text_encoders:
            encoder, tokenizer = (getattr(self.pipeline, part + suffix) for part in ("text_encoder", "tokenizer"))
            if (encoder is None) != (tokenizer is None):
                missing = ("text_encoder" if encoder is None else "tokenizer") + suffix
                raise ValueError(f"there is no {missing}; expected a text encoder and its tokenizer, or neither")
        self.check_network()
        path = self.path(self.shape())
        if path.prediction_type != "flow":
            raise ValueError(
                f"scheduler is a {type(self.pipeline.scheduler).__name__}; expected FlowMatchEulerDiscreteScheduler"
            )
        path.steps(2)

    @abstractmethod
    def check_network(self) -> None:
        """Check what of the network's and autoencoder's configurations changes images; see `Backbone.check`."""

    def check_can_encode(self) -> None:
        for suffix in self.text_encoders:
            for part in (f"tokenizer{suffix}", f"text_encoder{suffix}"):
                if getattr(self.pipeline, part) is None:
                    raise ValueError(f"the pipeline has no {part}; load it, or give {' and '.join(self.embeds)}")

    def check_embeds(self, given: Sequence[str]) -> None:
        super().check_embeds(given)
        for prefix in ("", "negative_"):
            names = [prefix + name for name in self.inputs]
            missing = [name for name in names if name not in given and not name.endswith("mask")]
            if missing and len(missing) < len(names):
                raise ValueError(f"{next(n for n in names if n in given)} is given and {missing[0]} is not; give both")

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        side = self.resolution or self.native
        size = (side if height is None else height, side if width is None else width)
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels <= 0 or pixels % self.multiple:
                raise ValueError(f"{name} is {pixels}; expected a positive multiple of {self.multiple} for this model")
        return size

    def shape(self, height: int | None = None, width: int | None = None) -> Shape:
        size, factor = self.size(height, width), self.pipeline.vae_scale_factor
        return (self.channels, size[0] // factor, size[1] // factor)

    def bind(self, path: NoisePath, shape: Shape) -> NoisePath:
        if not path.scheduler.config.get("use_dynamic_shifting"):
            return path
        return replace(cast(FlowPath, path), mu=self.mu(path, shape))

    def mu(self, path: NoisePath, shape: Shape) -> float | Callable[[int], float]:
        """The shift with `use_dynamic_shifting`, linear in the number of tokens as pipelines mostly have it."""
        side = self.multiple // self.pipeline.vae_scale_factor  # of a token in the latent
        return linear_mu(path, (shape[1] // side) * (shape[2] // side))

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str | None] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        device: torch.device | None = None,
        **embeds: Tensor | None,
    ) -> Conditioning:
        """See `Backbone.encode`. No negative prompt is the same as ""."""
        given = {name: value for name, value in embeds.items() if value is not None}
        first = given.get(self.inputs[0])
        count = len(prompts or ()) if first is None else len(first)
        negatives = [text or "" for text in negative_prompts or [None] * count]
        device = device or self.device
        conditioning = Conditioning(
            positive=self._inputs(prompts or (), "", given, device),
            negative=self._inputs(negatives, "negative_", given, device),
        )
        self._check_lengths(conditioning)
        return conditioning

    def _check_lengths(self, conditioning: Conditioning) -> None:
        """Without a mask, the network would attend to what pads the shorter ones in a common forward."""
        positive, negative = (part[self.inputs[0]].shape[1] for part in (conditioning.positive, conditioning.negative))
        if positive != negative and not any(name.endswith("mask") for name in self.inputs):
            raise ValueError(
                f"{self.inputs[0]} have {positive} tokens and those of the negative prompt {negative}; expected the "
                "same number, for the network attends to padding"
            )

    def _inputs(
        self, prompts: Sequence[str], prefix: str, given: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, Tensor]:
        found = {name: given[prefix + name].to(device) for name in self.inputs if prefix + name in given}
        if found:
            mask = torch.ones(found[self.inputs[0]].shape[:2], dtype=torch.bool, device=device)
            return {name: found.get(name, mask) for name in self.inputs}
        self.check_can_encode()
        with without_messages(*TRUNCATION), without_autocast(device):  # `prompt_length` reports truncation
            embed = self.embed_negative if prefix else self.embed
            return dict(zip(self.inputs, embed(list(prompts), device), strict=True))

    @abstractmethod
    def embed(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        """The values of `inputs` for prompts, by the pipeline's text encoders."""

    def embed_negative(self, prompts: list[str], device: torch.device) -> Sequence[Tensor]:
        """Those for negative prompts, which some pipelines embed without the instructions that others get."""
        return self.embed(prompts, device)

    def in_network_type(self, x: Latents, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and inputs in the network's precision; times stay in float32, where 16 bits are too coarse."""
        dtype = network_dtype(self.network)
        return x.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def decode_unclamped(self, latents: Latents) -> Pixels:
        return autoencoder.decode(self.pipeline.vae, latents, at_once=self.decode_batch_size)

    def encode_pixels(self, pixels: Pixels, generators: Generators) -> Latents:
        return autoencoder.encode(self.pipeline.vae, pixels, generators, at_once=self.decode_batch_size)


def network_dtype(network: Any) -> torch.dtype:
    """diffusers' `network.dtype`, the precision of its inputs, which walks through all modules for layerwise casting.

    Casting hooks every block, so that the first one tells whether there is any.
    """
    blocks = next((part for part in network.children() if isinstance(part, nn.ModuleList)), None)
    hooked = blocks is None or any(hasattr(module, "_diffusers_hook") for module in blocks[0].modules())
    kept = network._keep_in_fp32_modules or ()
    found = (value.dtype for name, value in network.named_parameters() if not any(part in name for part in kept))
    first = next((dtype for dtype in found if dtype.is_floating_point), None)
    return network.dtype if hooked or first is None else first


def as_prediction(output: Tensor, x: Latents) -> Latents:
    """A network's output in float32 or wider, as a copy: the next forward may reuse the memory of this one's output."""
    return output.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def check_not_float16(pipeline: DiffusionPipeline, *parts: str) -> None:
    """Check that parts of a pipeline whose values overflow in float16 are in another precision."""
    for name in parts:
        part = getattr(pipeline, name)
        if part is not None and part.dtype == torch.float16:
            raise ValueError(
                f"{name} is in float16, in which a {type(part).__name__} overflows; use bfloat16 or float32"
            )


def linear_mu(path: NoisePath, tokens: int) -> float:
    """The shift of a scheduler with `use_dynamic_shifting`, linear in the number of tokens, by diffusers' formula."""
    config: Any = path.scheduler.config
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.16),
    )

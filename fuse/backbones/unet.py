"""Stable Diffusion 1.x, 2.x and XL: a UNet, CLIP's text encoders and a convolutional autoencoder."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from stepfuse.data.devices import without_autocast
from stepfuse.data.library_messages import TRUNCATION, without_messages
from stepfuse.fuse.backbones import autoencoder
from stepfuse.fuse.backbones.base import Backbone, Pixels, Shape
from stepfuse.fuse.backbones.conditioning import Conditioning, Inputs
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.backbones.unet_checks import STATISTICS, check_autoencoder, check_texts, check_unet
from stepfuse.fuse.backbones.unet_names import UNetNames
from stepfuse.fuse.diffusion.configuration import Expected
from stepfuse.fuse.diffusion.gaussian import Generators


class StableDiffusion(Backbone):
    """Stable Diffusion 1.x and 2.x. Inputs: `prompt_embeds`.

    Attributes:
        added: the supported values of the UNet's `addition_embed_type`.
        not_applied: keys of the autoencoder's configuration that the pipeline does not apply.
        encoders: suffixes of the names of its text encoders; of each, whether it may have a projection, False or True.
    """

    part = "unet"
    blocks = ("BasicTransformerBlock",)
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    added = Expected((None, "text"), "this pipeline gives its network nothing beside the prompt")
    not_applied: ClassVar[Sequence[str]] = STATISTICS
    encoders: ClassVar[Mapping[str, Sequence[bool]]] = {"": (False,)}

    @classmethod
    def load_options(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """The safety checker is not loaded: rewards see every image as it was drawn."""
        without = {"safety_checker": None, "requires_safety_checker": False}
        return super().load_options(index) | (without if "safety_checker" in index else {})

    @classmethod
    def names(cls, config: Mapping[str, Any]) -> UNetNames:
        return UNetNames(config=config)

    def check(self) -> None:
        check_unet(self.network, self.pipeline.vae, self.added)
        check_autoencoder(self.pipeline.vae, self.not_applied)
        check_texts(self.pipeline, self.encoders)
        self.path().steps(1)  # a scheduler whose steps depend on the size of images has none here

    def check_can_encode(self) -> None:
        *_, suffix = self.encoders
        for part in (f"tokenizer{suffix}", f"text_encoder{suffix}"):
            if getattr(self.pipeline, part) is None:
                raise ValueError(
                    f"the pipeline has no {part}; load it, or give prompt_embeds and negative_prompt_embeds"
                )

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        factor, native = self.pipeline.vae_scale_factor, self.network.config.sample_size
        if self.resolution is not None:
            height, width = (self.resolution if side is None else side for side in (height, width))
        if native is None and (height is None or width is None):
            raise ValueError("the base's UNet has sample_size None; give height and width, or resolution in training")
        native_height, native_width = native if isinstance(native, list | tuple) else (native, native)
        size = (
            native_height * factor if height is None else height,
            native_width * factor if width is None else width,
        )
        step = factor * 2 ** (len(self.network.config.block_out_channels) - 1)
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels <= 0 or pixels % step:
                raise ValueError(f"{name} is {pixels}; expected a positive multiple of {step} for this model")
        return size

    def shape(self, height: int | None = None, width: int | None = None) -> Shape:
        size, factor = self.size(height, width), self.pipeline.vae_scale_factor
        return (self.network.config.in_channels, size[0] // factor, size[1] // factor)

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
        """See `Backbone.encode`.

        No negative prompt is not the same as "": where SDXL's `force_zeros_for_empty_prompt` is set, its embedding is
        zero; elsewhere it is that of "".
        """
        positive, negative = embeds.get("prompt_embeds"), embeds.get("negative_prompt_embeds")
        count = len(cast(Any, prompts if positive is None else positive))
        negatives = [None] * count if negative_prompts is None else list(negative_prompts)
        absent = torch.tensor([text is None for text in negatives])
        zeros = absent & (negative is None and bool(self.pipeline.config.get("force_zeros_for_empty_prompt")))
        if positive is None or (negative is None and not bool(zeros.all())):
            self.check_can_encode()
        device = device or self.device
        with without_messages(*TRUNCATION), without_autocast(device):  # `prompt_length` reports truncation
            found = self.pipeline.encode_prompt(
                prompt=None if prompts is None else list(prompts),
                device=device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=None if bool(absent.all()) else [text or "" for text in negatives],
                **{name: embeds.get(name) for name in self.embeds},
            )
        return self._conditioning(found, zeros, height, width)

    def _conditioning(
        self, found: Sequence[Tensor], zeros: Bool[Tensor, " batch"], height: int | None, width: int | None
    ) -> Conditioning:
        """The network's inputs of what `encode_prompt` gives; in the rows of `zeros` the negative embedding is zero."""
        return Conditioning(positive={"prompt_embeds": found[0]}, negative={"prompt_embeds": found[1]})

    def predict(self, x: Latents, times: Tensor, inputs: Inputs, *, network: nn.Module | None = None) -> Latents:
        arguments = unet_arguments(inputs)
        x_t = x.to(arguments["encoder_hidden_states"].dtype)
        output = (self.network if network is None else network)(x_t, times, return_dict=False, **arguments)[0]
        # a copy, for the next forward may reuse the memory of this one's output
        return output.to(torch.promote_types(x.dtype, torch.float32), copy=True)

    def decode_unclamped(self, latents: Latents) -> Pixels:
        return autoencoder.decode(self.pipeline.vae, latents, at_once=self.decode_batch_size)

    def encode_pixels(self, pixels: Pixels, generators: Generators) -> Latents:
        return autoencoder.encode(self.pipeline.vae, pixels, generators, at_once=self.decode_batch_size)


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL. Inputs: `prompt_embeds`, `text_embeds` (pooled) and `time_ids` (the image size)."""

    embeds = (*Backbone.embeds, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    added = Expected(("text_time",), "this pipeline gives its network the pooled prompt and the image size")
    not_applied = ()
    encoders: ClassVar[Mapping[str, Sequence[bool]]] = {"": (False, True), "_2": (True,)}

    @classmethod
    def load_options(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """The invisible watermark is not loaded either."""
        return super().load_options(index) | {"add_watermarker": False}

    def check(self) -> None:
        super().check()
        encoder, config = self.pipeline.text_encoder_2, self.network.config
        if encoder is None:
            return
        try:
            self._image_size((1, 1), encoder.config.projection_dim, self.network.dtype)
        except ValueError as error:
            raise ValueError(
                f"unet has projection_class_embeddings_input_dim {config.projection_class_embeddings_input_dim}, which "
                f"does not fit the pooled prompt and six numbers of the image size: {str(error).splitlines()[0]}"
            ) from error

    def check_embeds(self, given: Sequence[str]) -> None:
        super().check_embeds(given)
        for name in Backbone.embeds:
            pooled = name.replace("prompt", "pooled_prompt")
            if (name in given) != (pooled in given):
                other, missing = (name, pooled) if name in given else (pooled, name)
                raise ValueError(f"{other} is given and {missing} is not; Stable Diffusion XL needs both")

    def _conditioning(
        self, found: Sequence[Tensor], zeros: Bool[Tensor, " batch"], height: int | None, width: int | None
    ) -> Conditioning:
        positive, negative, pooled, negative_pooled = found
        pooled, negative_pooled = pooled.to(positive), negative_pooled.to(positive)
        zeros = zeros.to(positive.device)
        encoder = self.pipeline.text_encoder_2
        pooled_width = pooled.shape[-1] if encoder is None else encoder.config.projection_dim
        ids = self._image_size(self.size(height, width), pooled_width, positive.dtype)
        ids = ids.to(positive.device).expand(len(positive), -1)
        return Conditioning(
            positive={"prompt_embeds": positive, "text_embeds": pooled, "time_ids": ids},
            negative={
                "prompt_embeds": torch.where(zeros[:, None, None], 0, negative),
                "text_embeds": torch.where(zeros[:, None], 0, negative_pooled),
                "time_ids": ids,
            },
        )

    def _image_size(self, size: tuple[int, int], pooled_width: int, dtype: torch.dtype) -> Tensor:
        """The image size as the network takes it; diffusers checks that it and the pooled prompt fit the network."""
        none = (0, 0)
        return self.pipeline._get_add_time_ids(size, none, size, dtype, text_encoder_projection_dim=pooled_width)


def unet_arguments(inputs: Inputs) -> dict[str, Any]:
    """The arguments of diffusers' `UNet2DConditionModel.forward`."""
    added = {name: value for name, value in inputs.items() if name != "prompt_embeds"}
    return {"encoder_hidden_states": inputs["prompt_embeds"]} | ({"added_cond_kwargs": added} if added else {})

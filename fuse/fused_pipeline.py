"""The multi-objective sampler with the habits of a diffusers pipeline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from stepfuse.data.emoji import to_image
from stepfuse.fuse.adapter_set import AdapterSet, load_set
from stepfuse.fuse.gaussian import Generators
from stepfuse.fuse.rules import FusionRule
from stepfuse.fuse.sampler import FusedSampler
from stepfuse.fuse.weights import Weights

CallbackOnStepEnd = Callable[["FusedPipeline", int, int, dict[str, Any]], dict[str, Any] | None]
OUTPUTS = ("pil", "np", "pt", "latent")


class FusedPipeline:
    """An adapter set as a pipeline: `FusedPipeline.from_pretrained("owner/name")(prompt, weights={…}).images`.

    It holds a `FusedSampler`, `.sampler`, and through it the base's own pipeline with every adapter on its UNet, so
    that what moves, offloads, slices or casts that pipeline does so here. The noise schedule belongs to the set: there
    is no other scheduler to choose.
    """

    def __init__(self, sampler: FusedSampler) -> None:
        self.sampler = sampler
        self._interrupt = False
        self._progress: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        adapter_set: str | Path | AdapterSet,
        *,
        pipeline: DiffusionPipeline | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "FusedPipeline":
        """Load a set and its base, on the CPU.

        Args:
            adapter_set: a folder, a hub id, `owner/name` or `owner/name@revision`, or a set already read.
            pipeline: the base if it is loaded already; by default the one the set names.
            dtype, torch_dtype: of the base; float32 by default.
            options: `rule`, `guidance`, `guidance_scale`, `forwards`, `rows_at_once` and the others of
                `FusedSampler.from_pretrained`.

        Raises:
            ValueError: for a faulty set, and a pipeline that is not the set's base.
        """
        if not isinstance(adapter_set, AdapterSet):
            adapter_set = load_set(adapter_set)
        device = "cpu" if pipeline is None else pipeline.device
        chosen = dtype or torch_dtype or torch.float32
        options = {"device": device} | options
        return cls(FusedSampler.from_pretrained(adapter_set, pipeline=pipeline, dtype=chosen, **options))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        weights: Weights | Sequence[Weights] | None = None,
        *,
        strength: float = 1.0,
        weights_on: str = "exponents",
        rule: str | FusionRule | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance: str | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: CallbackOnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            prompt: one or several.
            weights: by objective: one mapping for all images, one a prompt, or one an image; by default the set's.
            strength: λ; 0 is the base, 1 the trained strength, beyond 1 extrapolates.
            weights_on: `exponents`, or `rewards`: see `FusedSampler.plan`.
            rule: by default the one the pipeline was made with.
            height, width: pixels; by default the base's own.
            num_inference_steps: by default the set's.
            guidance, guidance_scale: by default those the pipeline was made with.
            guidance_interval: (begin, end) as shares of the steps.
            negative_prompt: one for all images, or one a prompt.
            num_images_per_prompt: images of one prompt follow each other.
            generator: one for all images, or one an image; an image depends on its own generator alone.
            output_type: `pil`; `np`, (b, h, w, 3) in [0, 1]; `pt`, (b, 3, h, w) in [0, 1]; or `latent`.
            return_dict: an object with `.images`, or a tuple of it.
            callback_on_step_end: called as `callback(pipeline, step, t, {"latents": x_s})` after each step; it may
                return other latents, and stop the run by setting `pipeline._interrupt`.
            callback_on_step_end_tensor_inputs: `latents` is all there is.
            batch_size: how many images are denoised together; by default all.

        Raises:
            ValueError: for values that make no sense, before anything is computed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt {num_images_per_prompt}; expected 1 or more")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type {output_type!r}; expected one of {', '.join(OUTPUTS)}")
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name != "latents"]:
            raise ValueError(f"callback_on_step_end_tensor_inputs {unknown[0]!r}; latents is all there is")
        each = num_images_per_prompt
        own = weights if weights is None or isinstance(weights, Mapping) else list(weights)
        if isinstance(own, list) and len(own) == len(prompts):
            own = _repeat(own, each)
        negative = negative_prompt or ""
        images = self._sampler(rule, guidance, guidance_scale).sample(
            _repeat(prompts, each),
            own,
            strength=strength,
            weights_on=weights_on,
            num_inference_steps=num_inference_steps,
            guidance_interval=guidance_interval,
            generator=generator,
            negative_prompt=negative if isinstance(negative, str) else _repeat(list(negative), each),
            height=height,
            width=width,
            batch_size=batch_size or max(1, len(prompts) * each),
            output_type="latent" if output_type == "latent" else "pt",
            progress=not self._progress.get("disable", False),
            after=self._after(callback_on_step_end) if callback_on_step_end else None,
        )
        assert isinstance(images, Tensor)
        self.sampler.pipeline.maybe_free_model_hooks()
        result: Any = images
        if output_type == "pil":
            result = [to_image(pixels) for pixels in images]
        elif output_type == "np":
            result = images.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _sampler(self, rule: str | FusionRule | None, guidance: str | None, scale: float | None) -> FusedSampler:
        """The sampler as one call wants it."""
        sampler = self.sampler if rule is None else self.sampler.with_rule(rule)
        denoiser = sampler.denoiser
        if guidance is not None:
            denoiser = replace(denoiser, guidance=guidance)
        if scale is not None:
            denoiser = replace(denoiser, guidance_scale=scale)
        return sampler if denoiser is sampler.denoiser else replace(sampler, denoiser=denoiser)

    def _after(self, callback: CallbackOnStepEnd) -> Callable[[int, int, Tensor], tuple[Tensor, bool]]:
        self._interrupt = False

        def after(number: int, t: int, latents: Tensor) -> tuple[Tensor, bool]:
            returned = callback(self, number, int(t), {"latents": latents}) or {}
            return returned.get("latents", latents), not self._interrupt

        return after

    # What the base's pipeline does ---------------------------------------------------------------

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def names(self) -> list[str]:
        """The objectives, as weights call them."""
        return self.sampler.names

    @property
    def components(self) -> dict[str, Any]:
        return self.sampler.pipeline.components

    @property
    def device(self) -> torch.device:
        return self.sampler.pipeline.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sampler.pipeline.dtype

    def to(self, *arguments: Any, **options: Any) -> "FusedPipeline":
        """Move or cast everything; `DiffusionPipeline.to`."""
        self.sampler.release()
        self.sampler.pipeline.to(*arguments, **options)
        return self

    def enable_model_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """Keep on the device only the model that computes; `DiffusionPipeline.enable_model_cpu_offload`."""
        self.sampler.release()
        self.sampler.pipeline.enable_model_cpu_offload(*arguments, **options)

    def enable_sequential_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """Keep on the device only the layer that computes; `DiffusionPipeline.enable_sequential_cpu_offload`."""
        self.sampler.release()
        self.sampler.pipeline.enable_sequential_cpu_offload(*arguments, **options)

    def enable_attention_slicing(self, slice_size: str | int = "auto") -> None:
        self.sampler.pipeline.enable_attention_slicing(slice_size)

    def enable_vae_slicing(self) -> None:
        self.sampler.pipeline.vae.enable_slicing()

    def enable_vae_tiling(self) -> None:
        self.sampler.pipeline.vae.enable_tiling()

    def compile(self, how: str = "regional", **options: Any) -> None:
        """`FusedSampler.compile`."""
        self.sampler.compile(how, **options)

    def set_progress_bar_config(self, **options: Any) -> None:
        """`disable=True` hides the bar."""
        self._progress = options


def _repeat(values: Sequence[Any], count: int) -> list[Any]:
    """a a b b."""
    return [value for value in values for _ in range(count)]

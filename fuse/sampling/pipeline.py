"""The multi-objective sampler with the interface of a diffusers pipeline."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from stepfuse.data.names import nearest
from stepfuse.fuse.backbones.autoencoder import upcast
from stepfuse.fuse.backbones.registry import known_embeds
from stepfuse.fuse.diffusion.gaussian import Generators
from stepfuse.fuse.diffusion.noise_path import Time
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.registry import RULES
from stepfuse.fuse.rules.run import AfterStep
from stepfuse.fuse.rules.weights import Weights, label_weights, weight_rows
from stepfuse.fuse.sampling.inputs import check_texts, negative_prompts, repeat
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set, save_manifest
from stepfuse.fuse.sets.create import copy_set

CallbackOnStepEnd = Callable[["FusedPipeline", int, int | float, dict[str, Any]], dict[str, Any] | None]
OUTPUTS = ("pil", "np", "pt", "latent")


class FusedPipeline:
    """An adapter set as a pipeline: `FusedPipeline.from_pretrained("owner/name")(prompt, weights={…}).images`.

    It holds a `FusedSampler`, `.sampler`, and through it the base's own pipeline with every adapter on its network, so
    that what moves, offloads, slices or casts that pipeline does so here. The noise schedule belongs to the set: there
    is no other scheduler to choose.
    """

    def __init__(self, sampler: FusedSampler, adapter_set: AdapterSet | None = None) -> None:
        self.sampler, self.adapter_set = sampler, adapter_set
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
            options: the others of `FusedSampler.from_pretrained`.

        Raises:
            ValueError: for a faulty set, and a pipeline that is not the set's base.
        """
        if not isinstance(adapter_set, AdapterSet):
            adapter_set = load_set(adapter_set, read_weights=False)
        options.setdefault("device", pipeline.device if pipeline else "cpu")
        dtype = dtype or torch_dtype or torch.float32
        return cls(FusedSampler.from_pretrained(adapter_set, pipeline=pipeline, dtype=dtype, **options), adapter_set)

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the adapter set to a folder, of which `from_pretrained` makes a pipeline that draws the same images.

        The base is not copied: the set names it, as before. Rule, guidance and guidance scale become those of this
        pipeline. With `overwrite` the content of the folder is replaced.

        Raises:
            ValueError: for a folder that is not empty, a pipeline that was not made of a set, and a rule whose options
                no set holds.
        """
        if self.adapter_set is None:
            raise ValueError("this pipeline was not made of an adapter set; use FusedPipeline.from_pretrained")
        rule, guidance = self.sampler.rule, self.sampler.denoiser.guidance
        if rule.name not in RULES or rule != RULES[rule.name]():
            known = ", ".join(RULES)
            raise ValueError(f"rule {rule!r} cannot be saved: a set holds the names of {known}, without options")
        folder = Path(save_directory)
        saved = copy_set(self.adapter_set.adapters[0].folder.parent, folder, overwrite=overwrite)
        wanted = replace(saved, default_rule=rule.name, guidance=guidance.source, guidance_scale=guidance.scale)
        if wanted != saved:
            save_manifest(folder, wanted)

    def __repr__(self) -> str:
        sampler = self.sampler
        base = type(sampler.pipeline).__name__
        if self.adapter_set is not None:
            base = f"{self.adapter_set.base['name_or_path']!r} ({base})"
        return (
            f"{type(self).__name__}(\n  base: {base}\n  objectives: {label_weights(sampler.default_weights)}\n"
            f"  rule: {sampler.rule}\n  guidance: {sampler.denoiser.guidance}\n"
            f"  num_inference_steps: {sampler.num_inference_steps}\n  device: {self.device}\n  dtype: {self.dtype}\n)"
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
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
        negative_prompt: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: CallbackOnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        batch_size: int | None = None,
        **more_embeds: Tensor | None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            prompt: one or several; None where `prompt_embeds` is given.
            weights: by objective: one mapping for all images, one a prompt, or one an image; by default the set's.
            strength, weights_on, num_inference_steps, guidance_interval: see `FusedSampler.plan`.
            rule, guidance, guidance_scale: by default those the pipeline was made with.
            height, width: pixels; by default the set's resolution, or else the base's own.
            negative_prompt: one for all images, or one a prompt. Without one, Stable Diffusion takes the embedding of
                "" and SDXL, where its `force_zeros_for_empty_prompt` is set, zeros; as diffusers' pipelines do.
            num_images_per_prompt: images of one prompt follow each other.
            generator: one for each image, on which alone the image depends, or a single one. It gives a single image
                the noise that it gives in diffusers, and seeds a generator for each of several.
            latents: noise to begin with, (images, channels, h, w), in place of noise drawn with the generators.
            prompt_embeds, negative_prompt_embeds: embeddings, a row a prompt, in place of prompts.
            pooled_prompt_embeds, negative_pooled_prompt_embeds: the pooled ones, which SDXL and others need too.
            output_type: `pil`; `np`, (b, h, w, 3) in [0, 1]; `pt`, (b, 3, h, w) in [0, 1]; or `latent`.
            return_dict: an object with `.images`, or a tuple of it.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": x_s})` after each step, with
                the scheduler's timestep, 1000 sigma for flow matching; it may return other latents, and stop the run by
                setting `pipeline._interrupt`.
            callback_on_step_end_tensor_inputs: `latents` is all there is.
            batch_size: how many images are denoised together; by default all.
            more_embeds: others that the model family takes (`Backbone.embeds`), such as `prompt_embeds_mask`.

        Raises:
            ValueError: for values that make no sense and embeddings that the family does not take, before anything is
                computed; and for images that are not finite.
            TypeError: for an argument that no family has.
        """
        prompts = None if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        backbone, each = self.sampler.backbone, num_images_per_prompt
        # one that another family takes is refused by `check_embeds`, and None is as if it were not given
        if unknown := [name for name in more_embeds if name not in known_embeds()]:
            known = [*inspect.signature(self.__call__).parameters, *backbone.embeds]
            raise TypeError(f"unknown argument {unknown[0]!r}{nearest(unknown[0], known)}")
        named = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
            **more_embeds,
        }
        embeds: dict[str, Any] = {k: value.to(backbone.device) for k, value in named.items() if value is not None}
        check_texts(backbone, {"prompt": prompt, "negative_prompt": negative_prompt}, embeds)
        if each < 1:
            raise ValueError(f"num_images_per_prompt {each}; expected 1 or more")
        if output_type not in OUTPUTS:
            raise ValueError(
                f"output_type {output_type!r}; expected one of {', '.join(OUTPUTS)}{nearest(output_type, OUTPUTS)}"
            )
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name != "latents"]:
            raise ValueError(f"callback_on_step_end_tensor_inputs {unknown[0]!r}; latents is all there is")
        count = len(embeds["prompt_embeds"] if prompts is None else prompts)
        rows = None if weights is None else weight_rows(weights, self.names)
        if rows and len(rows) == count:
            rows = repeat(rows, each)
        negatives = negative_prompts(negative_prompt, count)
        conditioning = None
        if embeds:
            conditioning = backbone.encode(prompts, negatives, height=height, width=width, **embeds).repeat(each)
        images: Any = self._sampler(rule, guidance, guidance_scale).sample(
            None if conditioning else repeat(prompts or (), each),
            rows,
            strength=strength,
            weights_on=weights_on,
            num_inference_steps=num_inference_steps,
            guidance_interval=guidance_interval,
            generator=generator,
            negative_prompt=repeat(negatives, each),
            conditioning=conditioning,
            latents=latents,
            height=height,
            width=width,
            batch_size=batch_size or max(1, count * each),
            output_type="pt" if output_type == "np" else output_type,
            progress=not self._progress.get("disable", False),
            after=self._after(callback_on_step_end) if callback_on_step_end else None,
        )
        self.sampler.pipeline.maybe_free_model_hooks()
        if output_type == "np":
            images = images.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sampler(self, rule: str | FusionRule | None, guidance: str | None, scale: float | None) -> FusedSampler:
        """The sampler as one call wants it."""
        sampler = self.sampler if rule is None else self.sampler.with_rule(rule)
        now = sampler.denoiser.guidance
        wanted = replace(now, source=guidance or now.source, scale=now.scale if scale is None else scale)
        return replace(sampler, denoiser=replace(sampler.denoiser, guidance=wanted))

    def _after(self, callback: CallbackOnStepEnd) -> AfterStep:
        self._interrupt = False
        path = self.sampler.denoiser.path

        def after(step_index: int, t: Time, latents: Tensor) -> tuple[Tensor, bool]:
            returned = callback(self, step_index, path.network_time(t).item(), {"latents": latents}) or {}
            return returned.get("latents", latents), not self.interrupt

        return after

    # What the base's pipeline does ---------------------------------------------------------------

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the run, by setting `_interrupt` as in diffusers' pipelines."""
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
        upcast(self.components.get("vae"))
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

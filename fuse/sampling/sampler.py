"""The multi-objective sampler: N adapters fused at every denoising step, for any weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stepfuse.data.images import to_image
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Guidance, Latents
from stepfuse.fuse.backbones.prompt_length import warn_of_cuts
from stepfuse.fuse.diffusion.gaussian import Gaussian, Generators, standard_normal
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.registry import get_default_rule, get_rule
from stepfuse.fuse.rules.run import AfterStep, image_generators
from stepfuse.fuse.rules.step import FusionStep
from stepfuse.fuse.rules.user_rule import check_methods, one_line_errors
from stepfuse.fuse.rules.weights import Weights
from stepfuse.fuse.sampling.batch_invariant import check_invariant, decode_each, encode_each
from stepfuse.fuse.sampling.finite import FiniteSteps, check_latents, decode_finite
from stepfuse.fuse.sampling.inputs import negative_prompts
from stepfuse.fuse.sampling.load import load_backbone, make_denoiser
from stepfuse.fuse.sampling.policies import FusedPolicies
from stepfuse.fuse.sampling.rewards import reward_of
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.registry import check_reward_dtype

FORWARDS = ("batched", "separate")
BatchObserver = Callable[[FusionStep, Gaussian, Conditioning, slice], None]


@dataclass(frozen=True, kw_only=True)
class FusedSampler(FusedPolicies):
    """Sample the fusion of several aligned policies over one base, by default their product (MSDDA, arXiv:2604.14379).

    p* ∝ p_ref^(1 - Σ a_i) Π p_i^(a_i),     a_i = λ w_i,  Σ w_i = 1
    """

    @classmethod
    def from_pretrained(
        cls,
        adapter_set: str | Path | AdapterSet,
        *,
        pipeline: DiffusionPipeline | None = None,
        rule: str | FusionRule | None = None,
        guidance: str | None = None,
        guidance_scale: float | None = None,
        forwards: str = "batched",
        rows_at_once: int | None = None,
        batch_invariant: bool = False,
        rewards: Mapping[str, Reward] | None = None,
        reward_scales: Mapping[str, float] | None = None,
        trust_rewards: bool = False,
        reward_dtype: torch.dtype = torch.float32,
        decode_batch_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "FusedSampler":
        """Load a set: the base once, and every adapter on it.

        Args:
            adapter_set: a folder, a hub id, or a set already read.
            pipeline: the base if it is loaded already; by default the one the set names.
            rule: a name in `RULES`, a class in a file, `path/to/file.py:Class`, or a rule; by default the set's, which
                is never a file.
            guidance, guidance_scale: by default those of the set.
            forwards: `batched`, all adapters in one forward, or `separate`, each in one of its own: slower, for kinds
                of LoRA that have no batched form.
            rows_at_once: the most rows in one forward; smaller is slower and takes less memory.
            batch_invariant: an image has the same bits in every batch, also where kernels depend on shapes: forwards of
                exactly `rows_at_once` rows, by default those of one image with all adapters, some computed in vain.
            rewards: by objective, for rules that need them; by default those the objectives name.
            reward_scales: by objective; by default the deviation each adapter's training measured on the base.
            trust_rewards: let the set name rewards that are code or servers, for rules that need them.
            reward_dtype: precision of the networks of rewards that are loaded.
            decode_batch_size: the most images that the autoencoder decodes at once; by default as many as fit into a
                share of the memory.
            dtype, device: where and how the base is kept.

        Raises:
            ValueError: for a faulty set, a pipeline that is not the set's base, or a rule whose rewards are not there.
        """
        if forwards not in FORWARDS:
            raise ValueError(f"forwards {forwards!r}; expected {' or '.join(FORWARDS)}")
        if decode_batch_size is not None and decode_batch_size < 1:
            raise ValueError(f"decode_batch_size {decode_batch_size}; expected 1 or more")
        if isinstance(rule, str):
            rule = get_rule(rule)  # before anything is loaded
        if not isinstance(adapter_set, AdapterSet):
            adapter_set = load_set(adapter_set, read_weights=False)
        rule = rule or get_default_rule(adapter_set.default_rule)
        check_methods(rule)
        scale = adapter_set.guidance_scale if guidance_scale is None else guidance_scale
        chosen = Guidance(source=guidance or adapter_set.guidance, scale=scale)
        backbone = load_backbone(adapter_set, pipeline, dtype, device)
        backbone.decode_batch_size = decode_batch_size
        sampler = cls(
            objectives=adapter_set.objectives,
            denoiser=make_denoiser(
                adapter_set,
                backbone,
                chosen,
                batched=forwards == "batched",
                rows_at_once=rows_at_once,
                batch_invariant=batch_invariant,
            ),
            reference=adapter_set.base_schedule,
            rule=rule,
            num_inference_steps=adapter_set.num_inference_steps,
            default_weights=adapter_set.default_weights,
            oracles=tuple(oracle.adapter.objective for oracle in adapter_set.oracles),
            oracle_weights=tuple(oracle.weights for oracle in adapter_set.oracles),
            rewards=rewards or {},
            reward_scales=adapter_set.reward_scales | dict(reward_scales or {}),
            profiles=adapter_set.profiles,
            trust_rewards=trust_rewards,
            reward_dtype=reward_dtype,
        )
        return sampler.with_rule(rule)

    def with_rule(self, rule: str | FusionRule) -> "FusedSampler":
        """The same sampler under another rule, with the rewards it needs loaded; a ValueError where it cannot be."""
        rule = get_rule(rule) if isinstance(rule, str) else rule
        check_methods(rule)
        if self.denoiser.batch_invariant:
            check_invariant(rule)
        if not rule.needs:
            return replace(self, rule=rule)
        check_reward_dtype([o.reward for o in self.objectives if o.name not in self.rewards], self.reward_dtype)
        load = partial(reward_of, trusted=self.trust_rewards, dtype=self.reward_dtype)
        rewards = {o.name: self.rewards.get(o.name) or load(o, rule, self.backbone.device) for o in self.objectives}
        return replace(self, rule=rule, rewards=rewards)

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str] | None,
        weights: Weights | Sequence[Weights] | None = None,
        *,
        strength: float = 1.0,
        weights_on: str = "exponents",
        num_inference_steps: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generators = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        conditioning: Conditioning | None = None,
        latents: Latents | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
        output_type: str = "pil",
        progress: bool = True,
        observe: BatchObserver | None = None,
        after: AfterStep | None = None,
        report_cuts: bool = True,
    ) -> list[Image.Image] | Tensor:
        """Draw one image a prompt.

        Args:
            prompts: one or several; None where `conditioning` is given.
            weights: by objective name: one mapping for all images, or one an image.
            strength, weights_on, num_inference_steps, guidance_interval: see `plan`.
            generator: one an image, or one for all, which seeds those of several images and is itself that of a single
                one. An image depends on its generator alone, never on the batch it is drawn in.
            negative_prompt: one for all images, or one an image. None is no negative prompt, which in SDXL is not the
                same as "": see `Backbone.encode` of the model family.
            conditioning: embeddings, a row an image, in place of prompts; not for rules that need rewards.
            latents: x_T, a row an image, in place of noise drawn with the generators.
            height, width: pixels; by default the set's resolution, or else the model's own size.
            batch_size: how many images are denoised together; candidates of `code` count as images.
            output_type: `pil`; `pt`, pixels in [0, 1] of shape (b, 3, h, w); or `latent`.
            progress: show a bar over the steps.
            observe: called at each step, before it is sampled, with the step, its Gaussian, the conditioning of the
                batch, and which of the prompts the batch holds.
            after: see `Run`.
            report_cuts: log what is cut of prompts that are longer than the text encoder takes.

        Raises:
            ValueError: for invalid weights, sizes or counts, and for what the rule refuses, before anything is
                computed; and for images that are not finite.
        """
        if (prompts is None) == (conditioning is None):
            raise ValueError("expected prompts or conditioning, one of the two")
        if conditioning is not None:
            self.check_without_prompts()
            prompts = [f"number {row + 1}" for row in range(len(conditioning))]
        prompts = [prompts] if isinstance(prompts, str) else list(prompts or ())
        if not prompts:
            raise ValueError("no prompts; give at least one")
        negatives = negative_prompts(negative_prompt, len(prompts))
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}; expected pil, pt or latent")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}; expected 1 or more")
        latents_per_image = self.rule.latents_per_image
        if after and latents_per_image > 1:
            several = f"rule {self.rule.name} denoises {latents_per_image} latents of each image"
            raise ValueError(f"{several}, and a callback after each step needs one; use another rule")
        shape = self.backbone.shape(height, width)
        plan = self.plan(
            weights,
            len(prompts),
            strength=strength,
            weights_on=weights_on,
            num_inference_steps=num_inference_steps,
            guidance_interval=guidance_interval,
            shape=shape,
        )
        generators = image_generators(generator, len(prompts))
        if latents is not None and tuple(latents.shape) != (len(prompts), *shape):
            raise ValueError(f"latents of shape {tuple(latents.shape)}; expected {(len(prompts), *shape)}")
        if report_cuts and conditioning is None:
            warn_of_cuts(self.backbone, [*prompts, *negatives])
        device = self.backbone.device
        encode, decode = self.backbone.encode, decode_finite
        if self.denoiser.batch_invariant:
            encode, decode = partial(encode_each, self.backbone, self.denoiser.kinds_together), decode_each
        outputs = []
        together = max(1, batch_size // latents_per_image)
        batches = [slice(i, i + together) for i in range(0, len(prompts), together)]
        with tqdm(total=len(batches) * len(plan.steps), disable=not progress, desc="denoise") as bar:
            for rows in batches:
                if conditioning is None:
                    given = encode(prompts[rows], negatives[rows], height=height, width=width)
                else:
                    given = conditioning[rows].to(device)
                run = self.run(plan[rows], given, prompts[rows])
                noise = generators[rows]
                if latents is None:
                    x_T = standard_normal((len(noise), *shape), noise, device=device, dtype=torch.float32)
                else:
                    x_T = latents[rows].to(device, torch.float32)
                finite: FiniteSteps = []

                def watch(
                    c: Conditioning, which: slice, flags: FiniteSteps, step: FusionStep, gaussian: Gaussian
                ) -> None:
                    bar.update()
                    flags.append((step.t, torch.isfinite(gaussian.mean).all()))  # stays on the device
                    if observe:
                        observe(step, gaussian, c, which)

                run = replace(run, observe=partial(watch, given, rows, finite), after=after)
                with one_line_errors(self.rule):
                    x_0 = self.rule.denoise(run, x_T, noise)
                check_latents(x_0, prompts[rows], finite)
                if output_type != "latent":
                    x_0 = decode(self.backbone, x_0, prompts[rows]).cpu()
                outputs.append(x_0)
        output = torch.cat(outputs)
        return [to_image(pixels) for pixels in output] if output_type == "pil" else output

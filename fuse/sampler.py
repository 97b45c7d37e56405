"""The multi-objective sampler: N adapters fused at every denoising step, for any weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stepfuse.data.emoji import to_image
from stepfuse.fuse.adapter import Objective, load_adapter
from stepfuse.fuse.adapter_set import AdapterSet, load_set
from stepfuse.fuse.denoiser import Denoiser, Latents
from stepfuse.fuse.gaussian import Gaussian, Generators
from stepfuse.fuse.pipeline import (
    Conditioning,
    base_fingerprint,
    decode_latents,
    encode_prompts,
    latent_shape,
    load_pipeline,
    same_base,
)
from stepfuse.fuse.rules import FusionRule, blend_weights, get_rule, largest_strength
from stepfuse.fuse.transition import transition
from stepfuse.fuse.variance import VarianceSchedule, step_variance

Weights = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Exponents of one batch: a_i for the objectives, and 1 - λ for the base.

    Attributes:
        objectives: a_i = λ w_i, one an objective and sample, float64.
        strength: λ, their sum.
    """

    objectives: Float[Tensor, "objectives batch"]
    strength: float


@dataclass(frozen=True, kw_only=True)
class FusedSampler:
    """Sample the product of several aligned policies over one base (MSDDA, arXiv:2604.14379).

        p* ∝ p_ref^(1 - Σ a_i) Π p_i^(a_i),     a_i = λ w_i,  Σ w_i = 1

    Attributes:
        pipeline: the base, with one LoRA an objective on its UNet, under the objective's name.
        objectives: what each was aligned to, and with which variance schedule.
        denoiser: the guided predictions.
        reference: variance schedule of the base policy, p_ref.
        rule: how the Gaussians of a step are fused.
        num_inference_steps: default number of steps.
        default_weights: used where `sample` gets none.
    """

    pipeline: DiffusionPipeline
    objectives: tuple[Objective, ...]
    denoiser: Denoiser
    reference: VarianceSchedule
    rule: FusionRule
    num_inference_steps: int
    default_weights: Weights

    @classmethod
    def from_pretrained(
        cls,
        adapter_set: str | Path | AdapterSet,
        *,
        pipeline: DiffusionPipeline | None = None,
        rule: str = "product",
        guidance: str | None = None,
        guidance_scale: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "FusedSampler":
        """Load a set: the base once, and every adapter on it.

        Args:
            adapter_set: a folder, or a set already read.
            pipeline: the base if it is loaded already; by default the one the set names.
            rule: a name in `stepfuse.fuse.rules.RULES`.
            guidance, guidance_scale: by default those of the set.
            dtype, device: where and how the base is kept.

        Raises:
            ValueError: for a faulty set, or a pipeline that is not the set's base.
        """
        chosen_rule = get_rule(rule)
        if not isinstance(adapter_set, AdapterSet):
            adapter_set = load_set(adapter_set)
        if pipeline is None:
            pipeline = load_pipeline(adapter_set.base["name_or_path"], dtype=dtype)
        pipeline.to(device)
        fingerprint = base_fingerprint(pipeline.unet)
        if not same_base(adapter_set.base, fingerprint):
            raise ValueError(f"the pipeline is not the set's base, {adapter_set.base['name_or_path']!r}")
        for adapter in adapter_set.adapters:
            load_adapter(pipeline, adapter, fingerprint)
        return cls(
            pipeline=pipeline,
            objectives=adapter_set.objectives,
            denoiser=Denoiser.from_pipeline(
                pipeline,
                guidance=guidance or adapter_set.guidance,
                guidance_scale=adapter_set.guidance_scale if guidance_scale is None else guidance_scale,
            ),
            reference=adapter_set.reference,
            rule=chosen_rule,
            num_inference_steps=adapter_set.num_inference_steps,
            default_weights=adapter_set.default_weights,
        )

    @property
    def names(self) -> list[str]:
        return [objective.name for objective in self.objectives]

    def blend(
        self, weights: Weights | Sequence[Weights] | None, count: int, strength: float, weights_on: str = "exponents"
    ) -> Blend:
        """Exponents for `count` images.

        Args:
            weights: one mapping for all, or one an image; objectives left out get 0.
            count: how many images.
            strength: λ; 0 is the base, 1 the trained strength, beyond 1 extrapolates.
            weights_on: `exponents`, w_i as given; `rewards`, w_i beta_i: weights on the rewards themselves.

        Raises:
            ValueError: for weights or a strength that make no blend.
        """
        given = self.default_weights if weights is None else weights
        rows = [given] if isinstance(given, Mapping) else list(given)
        if len(rows) not in (1, count):
            raise ValueError(f"{len(rows)} sets of weights for {count} images; expected 1 or {count}")
        table = blend_weights(rows, self.names).expand(-1, count)
        if weights_on == "rewards":
            table = table * torch.tensor([[o.beta] for o in self.objectives], dtype=torch.float64)
            table = table / table.sum(0)
        elif weights_on != "exponents":
            raise ValueError(f"weights_on {weights_on!r}; expected exponents or rewards")
        if not strength >= 0 or strength == float("inf"):
            raise ValueError(f"strength {strength}; expected a finite number, 0 or more")
        return Blend(objectives=table * strength, strength=strength)

    def step(self, x_t: Latents, t: int, s: int, blend: Blend, conditioning: Conditioning) -> Gaussian:
        """The fused Gaussian of x_s given x_t. Objectives of exponent 0 throughout are not run.

        Raises:
            ValueError: for a fused precision that is not positive.
        """
        adapters: list[str | None] = []
        schedules: list[VarianceSchedule] = []
        exponents: list[Tensor] = []
        for objective, row in zip(self.objectives, blend.objectives, strict=True):
            if bool((row != 0).any()):
                adapters.append(objective.name)
                schedules.append(objective.variance)
                exponents.append(row)
        if blend.strength != 1:
            adapters.append(None)
            schedules.append(self.reference)
            exponents.append(torch.full((len(x_t),), 1 - blend.strength, dtype=torch.float64))
        path = self.denoiser.path
        predictions = self.denoiser.predictions(x_t, t, conditioning, adapters)
        gaussians = [
            transition(path, x_t, prediction, t, s, step_variance(schedule, path, t, s, x_t))
            for prediction, schedule in zip(predictions, schedules, strict=True)
        ]
        relative = torch.stack([schedule.relative(path, t, s, x_t).flatten()[0] for schedule in schedules])
        return self.rule(gaussians, torch.stack(exponents), relative)

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        weights: Weights | Sequence[Weights] | None = None,
        *,
        strength: float = 1.0,
        weights_on: str = "exponents",
        num_inference_steps: int | None = None,
        generator: Generators = None,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
        output_type: str = "pil",
        progress: bool = True,
    ) -> list[Image.Image] | Tensor:
        """Draw one image a prompt.

        Args:
            prompts: one or several.
            weights: by objective name: one mapping for all images, or one an image.
            strength, weights_on: see `blend`.
            num_inference_steps: by default the set's.
            generator: one for all images, or one an image. An image depends on its own generator
                alone, never on the batch it is drawn in.
            negative_prompt: one for all images, or one an image.
            height, width: pixels; by default the model's own size.
            batch_size: how many images are denoised together.
            output_type: `pil`; `pt`, pixels in [0, 1] of shape (b, 3, h, w); or `latent`.
            progress: show a bar over the steps.

        Raises:
            ValueError: for weights, sizes or counts that make no sense, and where the strength leaves
                no positive precision at some step, before anything is computed.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if not prompts:
            raise ValueError("no prompts; give at least one")
        if len(negatives) != len(prompts):
            raise ValueError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts; expected 1 or {len(prompts)}"
            )
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}; expected pil, pt or latent")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}; expected 1 or more")
        blend = self.blend(weights, len(prompts), strength, weights_on)
        count = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = self.denoiser.path.steps(count)
        self.check_strength(blend, steps)
        generators = image_generators(generator, len(prompts))
        shape = latent_shape(self.pipeline, height, width)
        device = self.pipeline.unet.device
        outputs = []
        batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
        with tqdm(total=len(batches) * len(steps), disable=not progress, desc="denoise") as bar:
            for rows in batches:
                conditioning = encode_prompts(self.pipeline, prompts[rows], negatives[rows], height=height, width=width)
                part = Blend(objectives=blend.objectives[:, rows], strength=strength)
                own = generators[rows]
                x_t = randn_tensor((len(own), *shape), generator=own, device=device, dtype=torch.float32)
                for t, s in steps:
                    x_t = self.step(x_t, t, s, part, conditioning).sample(own)
                    bar.update()
                outputs.append(x_t if output_type == "latent" else decode_latents(self.pipeline, x_t).cpu())
        output = torch.cat(outputs)
        return [to_image(pixels) for pixels in output] if output_type == "pil" else output

    def check_strength(self, blend: Blend, steps: Sequence[tuple[int, int]]) -> None:
        """See that the fused precision is positive at every step: it depends on variances alone.

        Raises:
            ValueError: naming the step, the weights and the largest valid strength.
        """
        path, like = self.denoiser.path, torch.zeros(1, 1, dtype=torch.float64)
        share = blend.objectives / (blend.strength or 1)
        used = (share != 0).any(1)
        limits = torch.full((len(steps), share.shape[1]), torch.inf, dtype=torch.float64)
        for number, (t, s) in enumerate(steps):
            schedules = [o.variance for o, is_used in zip(self.objectives, used, strict=True) if is_used]
            r = torch.tensor([v.relative(path, t, s, like).item() for v in schedules], dtype=torch.float64)
            reference = self.reference.relative(path, t, s, like).item()
            present = [*r.tolist(), reference] if blend.strength != 1 else r.tolist()
            if min(present) == 0 and max(present) > 0:
                raise ValueError(
                    f"step {number + 1} of {len(steps)} mixes deterministic and random schedules (relative variances "
                    f"{[round(v, 4) for v in present]}); use eta 0 for all, the base included, or for none"
                )
            if max(present) > 0:
                limits[number] = largest_strength(share[used], r, reference or r.max().item())
        if bool((limits <= blend.strength).any()):
            number, image = divmod(int(limits.argmin()), share.shape[1])
            weights = ", ".join(f"{n}={w:g}" for n, w in zip(self.names, share[:, image].tolist(), strict=True))
            raise ValueError(
                f"strength {blend.strength:g} with weights {weights} leaves no positive precision at step "
                f"{number + 1} of {len(steps)}; the largest valid strength is just below {limits.min().item():.4g}"
            )


def image_generators(generator: Generators, count: int) -> list[torch.Generator]:
    """One generator an image: those given, or ones seeded by a single one.

    Raises:
        ValueError: for a list of another length.
    """
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; expected 1 or {count}")
        return generator
    seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device if generator else "cpu")
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]

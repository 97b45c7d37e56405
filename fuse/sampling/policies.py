"""Several aligned policies over one base, and the rule that fuses them at every denoising step, for any weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.fuse.backbones.base import Backbone, Shape
from stepfuse.fuse.backbones.compilation import check_compilation
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.noise_path import Time
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.fuse.lora.layers import check_factors, check_mergeable, lora_layers
from stepfuse.fuse.lora.mixture import Network, Rows
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.gap_profile import GapProfile, find_profile
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.plan import Expert, Plan
from stepfuse.fuse.rules.run import Run, uniform_numbers
from stepfuse.fuse.rules.step import PredictFn
from stepfuse.fuse.rules.user_rule import one_line_errors
from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.rules.weights import Weights, weight_rows
from stepfuse.fuse.sampling.rewards import check_gradients, check_scales, score_batch
from stepfuse.rewards.protocol import Reward


@dataclass(frozen=True, kw_only=True)
class FusedPolicies:
    """Several aligned policies over one base, fused by a rule.

    Attributes:
        objectives: what each was aligned to, and with which variance schedule.
        denoiser: the guided predictions of the base, with one LoRA an objective on it, under the objective's name.
        reference: variance schedule of the base policy, p_ref.
        rule: how the Gaussians of a step are fused.
        num_inference_steps: default number of steps.
        default_weights: used where none are given.
        oracles: adapters trained on weighted rewards, on the network too.
        oracle_weights: what each of them was trained on, by objective.
        rewards: of the objectives, by name; only rules that need rewards read them.
        reward_scales: σ_i, the unit of each reward where rewards are weighed against each other.
        profiles: measured gaps between soup and product, for rules with a gate.
        trust_rewards: load rewards that are files of code or servers, if objectives name such.
        reward_dtype: precision of the networks of rewards that are loaded.
    """

    objectives: tuple[Objective, ...]
    denoiser: Denoiser
    reference: VarianceSchedule
    rule: FusionRule
    num_inference_steps: int
    default_weights: Weights
    oracles: tuple[Objective, ...] = ()
    oracle_weights: tuple[Mapping[str, float], ...] = ()
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    reward_scales: Mapping[str, float] = field(default_factory=dict)
    profiles: tuple[GapProfile, ...] = ()
    trust_rewards: bool = False
    reward_dtype: torch.dtype = torch.float32

    @property
    def backbone(self) -> Backbone:
        return self.denoiser.backbone

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The base, with all adapters on its network."""
        return self.backbone.pipeline

    @property
    def names(self) -> list[str]:
        return [objective.name for objective in self.objectives]

    def plan(
        self,
        weights: Weights | Sequence[Weights] | None,
        count: int,
        *,
        strength: float = 1.0,
        weights_on: str = "exponents",
        num_inference_steps: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        shape: Shape | None = None,
    ) -> Plan:
        """What a run for `count` images will do, checked by the rule before anything is computed.

        Args:
            weights: one mapping for all, or one an image; objectives left out get 0.
            strength: λ; 0 is the base, 1 the trained strength, beyond 1 extrapolates.
            weights_on: `exponents`, w_i as given; `rewards`, w_i beta_i scale_i: weights on the raw rewards.
            num_inference_steps: by default the set's.
            guidance_interval: (begin, end) as shares of the steps: step k of T is guided where begin ≤ k / T < end; at
                the others the prediction is e_c (arXiv:2404.07724).
            shape: of one latent, by default the model's own; the steps of some models depend on it.

        Raises:
            ValueError: for weights, a strength or an interval that make no plan, or that the rule refuses.
        """
        path = self.denoiser.path if shape is None else self.backbone.bind(self.denoiser.path, shape)
        steps = path.steps(self.num_inference_steps if num_inference_steps is None else num_inference_steps)
        table = self._weight_table(self.default_weights if weights is None else weights, count, len(steps), weights_on)
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength {strength}; expected a finite number, 0 or more")
        plan = Plan(
            path=path,
            steps=steps,
            objectives=[Expert.adapter(objective.name, objective.variance) for objective in self.objectives],
            base=Expert.base(self.reference),
            oracles=[Expert.adapter(oracle.name, oracle.variance) for oracle in self.oracles],
            oracle_weights=weight_table(self.oracle_weights, self.names)[0].T,
            weights=torch.cat([table, table.new_zeros(len(steps), len(self.oracles), count)], 1),
            strength=float(strength),
            guidance_interval=guidance_interval,
            batch_invariant=self.denoiser.batch_invariant,
        )
        plan.check_variances()
        rule, guidance = self.rule, self.denoiser.guidance
        used = plan.names_with_weight
        if rule.merges:
            check = check_factors if rule.merges == "factors" else check_mergeable
            check(lora_layers(self.denoiser.network), used)
        if rule.uses_gaps:
            if len(self.objectives) == 1:
                raise ValueError(
                    f"a gate needs a set of two objectives or more, and this one has {self.names[0]!r} alone, whose "
                    "soup is the product; sample without a gate"
                )
            profile = find_profile(self.profiles, len(plan.steps), guidance.source, guidance.effective_scale)
            plan = replace(plan, gaps=profile.at(plan.weights, [expert.name for expert in plan.adapters]))
        if rule.needs == "gradients":
            check_gradients([o for o in self.objectives if o.name in used], self.rewards, rule, self.backbone.device)
        if rule.needs == "rewards":
            check_scales(used, self.reward_scales)
        with one_line_errors(rule):
            return rule.prepare(plan)

    def _weight_table(
        self, weights: Weights | Sequence[Weights], count: int, steps: int, weights_on: str
    ) -> Float[Tensor, "steps objectives batch"]:
        """w_i of the objectives at each step and for each of `count` images, summing to 1."""
        rows = weight_rows(weights, self.names)
        if len(rows) not in (1, count):
            raise ValueError(f"{len(rows)} sets of weights for {count} images; expected 1 or {count}")
        if weights_on not in ("exponents", "rewards"):
            raise ValueError(f"weights_on {weights_on!r}; expected exponents or rewards")
        table = weight_table(rows, self.names, steps).expand(-1, -1, count)
        if weights_on == "exponents":
            return table
        for objective in self.objectives:
            if objective.temperature == 0:
                raise ValueError(
                    f"weights_on rewards goes by every adapter's beta, and {objective.name!r} was trained with none; "
                    "weigh exponents"
                )
        table = table * torch.tensor([[o.temperature] for o in self.objectives], dtype=torch.float64)
        return table / table.sum(1, keepdim=True)

    def step(self, x_t: Latents, step_index: int, plan: Plan, conditioning: Conditioning) -> Gaussian:
        """The fused Gaussian of x_s given x_t at one step of the plan, from 0; networks of weight 0 are not run.

        Rules that select experts at random take generators of the seeds 0, 1, 2 …; `sample` takes each image's.

        Raises:
            ValueError: for a fused precision that is not positive, and for rules that need rewards.
        """
        uniforms = uniform_numbers(plan, [torch.Generator().manual_seed(i) for i in range(len(x_t))])
        return self.rule.fuse(self.run(plan, conditioning).step(step_index, x_t, uniforms))

    @torch.no_grad()
    def denoise(
        self, x_T: Latents, plan: Plan, conditioning: Conditioning, generators: list[torch.Generator]
    ) -> Latents:
        """From x_T to x_0 latents, as `sample` does between encoding and decoding; for rules that need no rewards."""
        return self.rule.denoise(self.run(plan, conditioning), x_T, generators)

    def run(self, plan: Plan, conditioning: Conditioning, prompts: Sequence[str] | None = None) -> Run:
        """The run of one batch; without prompts, for rules that need no rewards."""
        if prompts is None:
            self.check_without_prompts()
        needed = self.objectives if self.rule.needs else ()
        return Run(
            plan=plan,
            predict_fn=self._predict_fn(plan, conditioning),
            rewards=[score_batch(self.rewards[o.name], o.reward, self.backbone, prompts or ()) for o in needed],
            # A reward alone needs no unit; of several, `plan` has checked it.
            scales=[self.reward_scales.get(o.name, 1.0) for o in needed],
        )

    def _predict_fn(self, plan: Plan, conditioning: Conditioning) -> PredictFn:
        """Guided predictions of a batch, and those without guidance at steps outside the plan's interval."""
        guided = self.denoiser.for_run()
        unguided = replace(guided, guidance=replace(guided.guidance, source="off"), _kept={})
        rows_of = _ImageRows(conditioning)
        guided_times = {t for step_index, (t, _) in enumerate(plan.steps) if plan.is_guided(step_index)}

        def predict(
            x_t: Latents, t: Time, networks: Sequence[Network], images: Rows, rows: Sequence[Rows | None]
        ) -> list[Latents]:
            used = guided if t in guided_times else unguided
            return used.predictions(x_t, t, rows_of(images, x_t.device), networks, rows)

        return predict

    def check_without_prompts(self) -> None:
        """Check that the rule needs no rewards, which are of prompts."""
        if self.rule.needs:
            raise ValueError(f"rule {self.rule.name} needs rewards, and those need prompts; use sample with prompts")

    def compile(self, how: str = "regional", *, mode: str = "default", rows: int = 64, **options: Any) -> None:
        """Compile the network and its batched adapters, in place.

        Weights, strengths, schedules and adapters in use are values to it: other ones compile nothing anew. A soup is
        another network than adapters one a row; and a second number of rows in a batch compiles once more, as a single
        row does, but no third. Numbers of rows are multiples of the number of images denoised together, rows being
        repeated where they are not, so that one batch has CUDA graphs for at most so many as an image has rows.

        Args:
            how: `regional` or `full`, see `Backbone.compile`.
            mode: of `torch.compile`; `reduce-overhead` and `max-autotune` record CUDA graphs.
            rows: the most rows of a batch foreseen; more compile once more.
            options: others of `torch.compile`.

        Raises:
            ValueError: for another word, CUDA graphs without a GPU, or without batched forwards.
        """
        check_compilation(how, mode, self.backbone.device.type)
        if self.denoiser.batched is None:
            raise ValueError("only batched forwards compile without doing so for each adapter; use forwards='batched'")
        self.denoiser.batched.fix(rows, self.backbone.device)
        self.backbone.compile(how, fullgraph=True, **({} if mode == "default" else {"mode": mode}), **options)

    def release(self) -> None:
        """Give back the memory of a soup's merged weights, which stay for the next; in float32 soups have them."""
        if self.denoiser.batched:
            self.denoiser.batched.release()


class _ImageRows:
    """The conditioning of a batch by image. That of the images asked for last is kept: a run asks for the same."""

    def __init__(self, conditioning: Conditioning) -> None:
        self._all = conditioning
        self._images, self._rows = torch.arange(len(conditioning)), conditioning

    def __call__(self, images: Rows, device: torch.device) -> Conditioning:
        if images is not self._images:
            same = torch.equal(images, torch.arange(len(self._all)))
            self._images, self._rows = images, self._all if same else self._all[to_device(images, device)]
        return self._rows

"""The one training loop: rollouts → rewards → credit → loss, with checkpoints, logs and sample images."""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from stepfuse.data.prompts import load_prompts
from stepfuse.fuse.adapter import Objective, write_adapter
from stepfuse.fuse.adapter_set import claim_output
from stepfuse.fuse.denoiser import Denoiser
from stepfuse.fuse.pipeline import (
    base_fingerprint,
    decode_latents,
    latent_shape,
    load_pipeline,
)
from stepfuse.fuse.variance import LearnedSchedule, VarianceSchedule
from stepfuse.rewards.protocol import Pixels
from stepfuse.rewards.registry import load_reward
from stepfuse.train.algorithms import Algorithm, Sampling
from stepfuse.train.checkpoints import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from stepfuse.train.conditioning import Embeddings, prompt_order
from stepfuse.train.lora import Policy, add_lora, step_gaussians
from stepfuse.train.rollout import Trajectory, rollout, sample_generator
from stepfuse.train.samples import save_samples
from stepfuse.train.scoring import Scorer, TrainingReward
from stepfuse.train.settings import TrainSettings

logger = logging.getLogger(__name__)


def train(settings: TrainSettings, algorithm: Algorithm) -> Path:
    """Train one adapter and write it to `settings.output_dir`.

    Everything that can be wrong with the settings is found before the first step, and before
    anything is written.

    Raises:
        ValueError: for settings that do not fit together, a faulty reward, and a loss that is not finite.
    """
    output = Path(settings.output_dir)
    checkpoint = find_checkpoint(output, settings.resume_from_checkpoint)
    if settings.resume_from_checkpoint is None:
        claim_output(output, overwrite=settings.overwrite)
    prompts = load_prompts(
        settings.prompts,
        dataset_name=settings.dataset_name,
        split=settings.dataset_split,
        column=settings.caption_column,
    )
    accelerator = _accelerator(settings)
    _check_groups(settings, algorithm, accelerator.num_processes)
    reward = TrainingReward(load_reward(settings.reward, accelerator.device), settings, accelerator.device)
    Objective(name=settings.name, reward=settings.reward, variance=settings.initial_schedule(), beta=settings.beta)
    try:
        _train(settings, algorithm, accelerator, reward, prompts, checkpoint)
    finally:
        reward.close()
    return output


def _train(
    settings: TrainSettings,
    algorithm: Algorithm,
    accelerator: Accelerator,
    reward: TrainingReward,
    prompts: list[str],
    checkpoint: Path | None,
) -> None:
    output = Path(settings.output_dir)
    run = Run(settings, algorithm, accelerator, reward, prompts)
    progress = load_checkpoint(checkpoint, accelerator, run.policy) if checkpoint else Progress()
    run.fit_reward(progress)
    first = run.draw_validation() if checkpoint is None else None  # a faulty reward is found here
    if accelerator.is_main_process:
        if settings.overwrite and checkpoint is None and output.exists():
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    accelerator.wait_for_everyone()
    if accelerator.trackers == [] and settings.report_to != "none":
        accelerator.init_trackers("stepfuse", config=_trackable(settings))
    if first is not None:
        progress.validation["before"] = run.save_validation(0, first)
    run.fit(progress)
    accelerator.end_training()


class Run:
    """The state of one run: the policy, its optimiser and what rollouts need."""

    def __init__(
        self,
        settings: TrainSettings,
        algorithm: Algorithm,
        accelerator: Accelerator,
        reward: TrainingReward,
        prompts: list[str],
    ) -> None:
        self.settings, self.algorithm, self.accelerator = settings, algorithm, accelerator
        self.reward, self.prompts = reward, prompts
        self.output = Path(settings.output_dir)
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        options = {"revision": settings.revision, "variant": settings.variant}
        self.pipeline: DiffusionPipeline = load_pipeline(
            settings.pretrained_model_name_or_path, dtype=dtype, **options
        ).to(accelerator.device)
        unet = self.pipeline.unet
        self.base = {"name_or_path": settings.pretrained_model_name_or_path} | base_fingerprint(unet)
        add_lora(
            unet,
            settings.name,
            rank=settings.rank,
            alpha=settings.lora_alpha,
            targets=settings.lora_target_modules,
            seed=settings.seed,
        )
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        self.schedule = settings.initial_schedule()
        policy = Policy(unet, settings.name, self.schedule).to(accelerator.device)
        trainable = [p for p in policy.parameters() if p.requires_grad]
        offsets = [] if policy.offsets is None else [policy.offsets]
        lora = [p for p in trainable if not any(p is o for o in offsets)]
        optimizer = torch.optim.AdamW(
            [
                {"params": lora, "lr": settings.learning_rate},
                *([{"params": offsets, "lr": settings.variance_learning_rate, "weight_decay": 0.0}] if offsets else []),
            ],
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
        )
        rate = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=settings.max_train_steps * accelerator.num_processes,
        )
        self.wrapped, self.optimizer, self.rate = accelerator.prepare(policy, optimizer, rate)
        self.policy, self.trainable = policy, trainable
        denoiser = Denoiser.from_pipeline(
            self.pipeline, guidance=settings.guidance, guidance_scale=settings.sample_guidance_scale
        )
        self.sampling = Sampling(
            denoiser=denoiser,
            adapter=settings.name,
            schedule=self.schedule,
            steps=denoiser.path.steps(settings.sample_num_steps),
            shape=latent_shape(self.pipeline, settings.resolution, settings.resolution),
        )
        self.embed = Embeddings(self.pipeline, settings.resolution)

    # One step ------------------------------------------------------------------------------

    def fit(self, progress: "Progress") -> None:
        """Train from where `progress` stands to `max_train_steps`, then write the adapter."""
        settings, main = self.settings, self.accelerator.is_main_process
        bar = tqdm(
            total=settings.max_train_steps, initial=progress.step, desc=f"train {settings.name}", disable=not main
        )
        while progress.step < settings.max_train_steps:
            before = progress.step
            trajectories, rewards = self.collect(before)
            for _ in range(min(self.algorithm.updates_per_rollout, settings.max_train_steps - progress.step)):
                measured = self.update(trajectories, progress.step) | {"reward": rewards.mean().item()}
                progress.step += 1
                progress.kl = measured["kl"]
                bar.update()
                bar.set_postfix({k: f"{measured[k]:.4g}" for k in ("reward", "loss", "kl")})
                self.accelerator.log(measured, step=progress.step)
                if settings.validation_steps and progress.step % settings.validation_steps == 0:
                    self.save_validation(progress.step, self.draw_validation())
            # Between rollouts only: one that was half used could not be resumed exactly.
            if progress.step // settings.checkpointing_steps > before // settings.checkpointing_steps:
                save_checkpoint(self.output, self.accelerator, self.policy, progress, settings.checkpoints_total_limit)
        bar.close()
        progress.validation["after"] = self.save_validation(progress.step, self.draw_validation())
        if main:
            self.write(progress)
        self.accelerator.wait_for_everyone()

    def collect(self, step: int) -> tuple[list[Trajectory], Tensor]:
        """Roll out and credit the micro-batches of one step; rewards of all processes."""
        settings, accelerator = self.settings, self.accelerator
        own = settings.train_batch_size * settings.gradient_accumulation_steps
        first = accelerator.process_index * own
        total = own * accelerator.num_processes
        groups = [i // self.algorithm.group_size for i in range(total)]
        order = prompt_order(settings.seed, len(self.prompts), step, groups[-1] + 1)
        trajectories: list[Trajectory] = []
        rewards: list[Future[Tensor]] = []
        sampling = dataclasses.replace(self.sampling, schedule=self.current_schedule())
        for start in range(first, first + own, settings.train_batch_size):
            rows = range(start, start + settings.train_batch_size)
            prompts = [self.prompts[order[groups[i]]] for i in rows]
            generators = [sample_generator(settings.seed, "rollout", step, i) for i in rows]
            scorer = Scorer(self.reward, self.pipeline, prompts, step)
            with accelerator.autocast():
                trajectory = self.algorithm.collect(sampling, self.embed(prompts), generators, scorer)
            rewards.append(scorer.terms(trajectory.latents))  # scored while the next is sampled
            trajectories.append(trajectory)
        everyone = accelerator.gather(torch.cat([future.result() for future in rewards]))
        index = torch.tensor(groups, device=everyone.device)
        size = settings.train_batch_size
        credited = [
            self.algorithm.credit(
                trajectory, everyone, self.reward.term_weights(), index, slice(first + i * size, first + (i + 1) * size)
            )
            for i, trajectory in enumerate(trajectories)
        ]
        return credited, everyone.sum(1)

    def update(self, trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
        """One optimiser step on the mean loss over samples and denoising steps."""
        settings, accelerator = self.settings, self.accelerator
        items = [(trajectory, stored) for trajectory in trajectories for stored in trajectory.steps]
        if not items:
            raise ValueError("no denoising step is random, so there is nothing to learn from; use more steps")
        totals = torch.zeros(4, device=accelerator.device)
        for number, (trajectory, stored) in enumerate(items):
            last = number + 1 == len(items)
            with _synchronised(accelerator, self.wrapped, last):
                with accelerator.autocast():
                    policy, reference = step_gaussians(
                        self.wrapped, self.sampling.denoiser, self.schedule, stored, trajectory.conditioning
                    )
                kl = policy.kl(reference)
                values = self.algorithm.loss(policy, reference, stored) + self.algorithm.beta * kl
                loss = values.mean() / len(items)
                if not bool(torch.isfinite(loss)):
                    raise ValueError(f"the loss is {loss.item()} at step {step + 1}, denoising step {stored.t}")
                accelerator.backward(loss)
            kept = getattr(stored, "kept", None)
            share = 1.0 if kept is None else kept.float().mean()
            mean_kl = kl.detach().mean() * len(items) / len(trajectories)
            totals += torch.stack([loss.detach() * len(items), mean_kl, torch.as_tensor(share), torch.ones(())]).to(
                totals
            )
        norm = accelerator.clip_grad_norm_(self.trainable, settings.max_grad_norm)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        loss_sum, kl_sum, kept_sum, count = accelerator.reduce(totals, "sum").tolist()
        return {
            "loss": loss_sum / max(kept_sum, 1e-12),
            "kl": kl_sum / count,  # nats an image: the sum over its denoising steps
            "kept_pairs": kept_sum / count,
            "gradient_norm": float(norm),
            "learning_rate": self.rate.get_last_lr()[0],
        }

    def fit_reward(self, progress: "Progress") -> None:
        """Fit the reward on images of the base, where that is wanted and not done; the same on all processes."""
        count = self.settings.fit_reward
        if count and not progress.reward:
            if progress.step:
                raise ValueError("fit_reward on a run that has begun without; its policy is no longer the base")
            told: list[Any] = [None]
            if self.accelerator.is_main_process:
                prompts = [self.prompts[i * len(self.prompts) // count] for i in range(count)]
                try:
                    told = [self.reward.fit(self._draw(prompts, "fit"))]
                except ValueError as error:  # for the other processes too
                    told = [error]
            (fitted,) = broadcast_object_list(told)
            if isinstance(fitted, ValueError):
                raise fitted
            progress.reward = fitted
        if progress.reward:
            self.reward.restore(progress.reward)

    # What steps need -----------------------------------------------------------------------

    def current_schedule(self) -> VarianceSchedule:
        """The schedule with the offsets learned so far."""
        if self.policy.offsets is None or not isinstance(self.schedule, LearnedSchedule):
            return self.schedule
        return dataclasses.replace(self.schedule, offsets=self.policy.offsets.detach().clone())

    @torch.no_grad()
    def draw_validation(self) -> tuple[list[str], Tensor, Tensor]:
        """Sample the validation prompts, on the main process: the prompts, their pixels and rewards."""
        if not self.accelerator.is_main_process:
            return [], torch.empty(0), torch.empty(0)
        settings = self.settings
        wanted = settings.validation_prompts or self.prompts
        count = settings.num_validation_images
        prompts = [wanted[i * len(wanted) // count if count < len(wanted) else i % len(wanted)] for i in range(count)]
        values, pictures = [], []
        for batch, pixels in self._draw(prompts, "validation"):
            values.append(self.reward.raw(pixels, batch).cpu())
            pictures.append(pixels.cpu())
        return prompts, torch.cat(pictures), torch.cat(values)

    @torch.no_grad()
    def _draw(self, prompts: Sequence[str], place: str) -> Iterator[tuple[Sequence[str], Pixels]]:
        """Images of the policy as it stands, a micro-batch at a time."""
        settings = self.settings
        sampling = dataclasses.replace(self.sampling, schedule=self.current_schedule())
        for start in range(0, len(prompts), settings.train_batch_size):
            batch = prompts[start : start + settings.train_batch_size]
            generators = [sample_generator(settings.seed, place, start + i) for i in range(len(batch))]
            with self.accelerator.autocast():
                latents = rollout(
                    sampling.denoiser,
                    sampling.adapter,
                    sampling.schedule,
                    sampling.steps,
                    self.embed(batch),
                    sampling.shape,
                    generators,
                ).latents
            yield batch, decode_latents(self.pipeline, latents)

    def save_validation(self, step: int, drawn: tuple[list[str], Tensor, Tensor]) -> dict[str, float]:
        """Save the validation images as a picture and log their reward."""
        prompts, pixels, values = drawn
        if not prompts:
            return {}
        save_samples(self.output / "samples" / f"step-{step:06d}.png", pixels, prompts)
        mean = values.mean().item()
        self.accelerator.log({"validation_reward": mean}, step=step)
        return {"reward": mean, "deviation": values.std(correction=0).item(), "images": len(prompts)}

    def write(self, progress: "Progress") -> None:
        """The adapter, with all that is known of it."""
        settings = self.settings
        objective = Objective(
            name=settings.name,
            reward=self.reward.name,
            variance=self.current_schedule(),
            beta=settings.beta,
            shaping=self.reward.shaping,
        )
        packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "stepfuse")
        write_adapter(
            self.output,
            self.pipeline.unet,
            objective,
            base=self.base,
            guidance=settings.guidance,
            guidance_scale=settings.sample_guidance_scale,
            num_inference_steps=settings.sample_num_steps,
            record={
                "algorithm": type(self.algorithm).__name__.lower(),
                "steps": progress.step,
                "kl": progress.kl,
                "validation": progress.validation,
                "config": dataclasses.asdict(settings),
                "versions": {name: version(name) for name in packages},
            },
            pipeline_class=type(self.pipeline),
        )


def _accelerator(settings: TrainSettings) -> Accelerator:
    output = Path(settings.output_dir)
    if settings.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / settings.logging_dir)),
    )


def _check_groups(settings: TrainSettings, algorithm: Algorithm, processes: int) -> None:
    total = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    if total % algorithm.group_size:
        raise ValueError(
            f"{total} images a step (train_batch_size × gradient_accumulation_steps × processes) do not divide into "
            f"groups of num_generations = {algorithm.group_size}"
        )


def _trackable(settings: TrainSettings) -> dict[str, Any]:
    """tensorboard takes numbers and strings only."""
    plain = dataclasses.asdict(settings)
    return {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in plain.items()}


def _synchronised(accelerator: Accelerator, model: torch.nn.Module, last: bool) -> Any:
    """Gradients are averaged over processes with the last backward of a step only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)

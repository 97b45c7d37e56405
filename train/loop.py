"""The one training loop: what a step learns from → loss → update, with checkpoints, logs and sample images."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from stepfuse.data.prompts import load_prompts
from stepfuse.data.text_files import write_text
from stepfuse.data.yaml_file import yaml_text
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import describe_base
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.unet import decode_unclamped, latent_shape
from stepfuse.fuse.diffusion.variance import LearnedSchedule, VarianceSchedule
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sampling.finite import check_latents, check_pixels
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.rewards.protocol import Pixels
from stepfuse.rewards.registry import load_reward
from stepfuse.train.algorithms import Algorithm, RolloutAlgorithm, Sampling
from stepfuse.train.checkpoints import Progress, load_checkpoint, save_checkpoint
from stepfuse.train.collect import Rollouts, learnable_steps
from stepfuse.train.conditioning import Embeddings
from stepfuse.train.display import ProgressDisplay, describe_end, describe_start
from stepfuse.train.engine import Engine
from stepfuse.train.health import STOPPED, Health
from stepfuse.train.launch import make_accelerator
from stepfuse.train.lora import LastRows, Policy, add_lora
from stepfuse.train.memory import explained_memory
from stepfuse.train.offline import PairSource, PreferencePairs
from stepfuse.train.output import CONFIG, clear, explained_disk, find_start, locked
from stepfuse.train.provenance import config_hash, input_files
from stepfuse.train.rollout import rollout, sample_generator
from stepfuse.train.samples import save_samples
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import DPOSettings, TrainSettings
from stepfuse.train.trackers import SHOWN, log_validation, start_trackers
from stepfuse.train.update import Update
from stepfuse.train.validation import (
    Draw,
    Validation,
    draw_together,
    gathered,
    validate,
    validation_prompts,
    validation_settings,
)

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "stepfuse")


def train(settings: TrainSettings, algorithm: Algorithm) -> Path:
    """Train one adapter and write it to `settings.output_dir`.

    Everything that can be wrong with the settings is found before the first step, and before
    anything is written.

    Raises:
        ValueError: for settings that do not fit together, a folder in use, a faulty reward, a loss that is not finite,
            and a disk or memory that is full.
    """
    output = Path(settings.output_dir)
    main = int(os.environ.get("RANK", "0")) == 0
    with locked(output) if main else nullcontext(), explained_disk(output), explained_memory(settings):
        start = find_start(output, settings.resume_from_checkpoint, overwrite=settings.overwrite)
        prompts = load_prompts(
            settings.prompts,
            dataset_name=settings.dataset_name,
            split=settings.dataset_split,
            column=settings.caption_column,
            seed=settings.seed,
        )
        accelerator = make_accelerator(settings)
        _check_groups(settings, algorithm, accelerator.num_processes)
        reward = TrainingReward(load_reward(settings.reward, accelerator.device), settings, accelerator.device)
        Objective(name=settings.name, reward=settings.reward, variance=settings.initial_schedule(), beta=settings.beta)
        try:
            Run(settings, algorithm, accelerator, reward, prompts).go(start)
        finally:
            reward.close()
    return output


class Run:
    """The state of one run: the policy, its optimiser and what rollouts need.

    Args:
        pipeline: the base, by default loaded as the settings say; its UNet becomes the policy.
    """

    def __init__(
        self,
        settings: TrainSettings,
        algorithm: Algorithm,
        accelerator: Accelerator,
        reward: TrainingReward,
        prompts: list[str],
        pipeline: DiffusionPipeline | None = None,
    ) -> None:
        self.settings, self.algorithm, self.accelerator = settings, algorithm, accelerator
        self.reward, self.prompts = reward, prompts
        self.output, self.main = Path(settings.output_dir), accelerator.is_main_process
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        name, revision = settings.pretrained_model_name_or_path, settings.revision
        self.pipeline: DiffusionPipeline = pipeline or load_pipeline(
            name, dtype=dtype, revision=revision, variant=settings.variant
        )
        self.embed = Embeddings(
            self.pipeline,
            settings.resolution,
            accelerator.device,
            offload=settings.offload_text_encoders,
            report_cuts=self.main,
        )
        unet = self.pipeline.unet
        self.base = describe_base(self.pipeline, name, revision, variant=settings.variant, hashed=self.main)
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
        if settings.compile != "no":
            unet.compile() if settings.compile == "full" else unet.compile_repeated_blocks()
        unet.train()
        self.schedule = settings.initial_schedule()
        self.policy = Policy(unet, settings.name, self.schedule).to(accelerator.device)
        self.engine = Engine(accelerator, self.policy, settings)
        # its hooks would be compiled anew each time, and take partitioned weights out of the order they are gathered in
        shared = settings.timesteps_per_forward > 1 and settings.compile == "no" and not self.engine.partitioned
        denoiser = Denoiser.from_pipeline(
            self.pipeline,
            guidance=settings.guidance,
            guidance_scale=settings.sample_guidance_scale,
            batched=LastRows(unet, settings.name) if shared else None,
        )
        self.sampling = Sampling(
            denoiser=denoiser,
            adapter=settings.name,
            schedule=self.schedule,
            steps=denoiser.path.steps(settings.sample_num_steps),
            shape=latent_shape(self.pipeline, settings.resolution, settings.resolution),
        )
        self.learnable = len(learnable_steps(settings, self.sampling))
        if not self.learnable:
            raise ValueError("no denoising step is random, so there is nothing to learn from; use more steps")
        self.pairs: PreferencePairs | None = None
        if isinstance(settings, DPOSettings) and settings.pairs:
            self.pairs = PreferencePairs(settings.pairs, settings)
        self.progress = Progress()
        self.best: dict[str, Tensor] | None = None
        self.validated: tuple[int, Validation] | None = None
        self.base_validation: Validation | None = None  # for trackers
        self.inputs, self.identity = input_files(settings), config_hash(settings)  # as they are before it begins

    def go(self, start: Path | None) -> None:
        """From the beginning or a checkpoint to the adapter."""
        settings = self.settings
        if start is not None:
            self.progress, self.best = load_checkpoint(start, self.engine)
        if self.main and (told := describe_start(settings, start, self.progress.step)):
            print(told, flush=True)
        self.health = Health(self.progress, skips=settings.nonfinite == "skip", main=self.main)
        self.embed.report([*self.prompts, *validation_prompts(settings, self.prompts)])
        self.fit_reward()
        first = self.validate() if start is None else None  # a faulty reward is found here
        if self.main:
            if settings.overwrite and start is None:
                clear(self.output)
            write_text(self.output / CONFIG, yaml_text(dataclasses.asdict(settings)))
        self.accelerator.wait_for_everyone()
        if self.accelerator.trackers == [] and settings.trackers:
            start_trackers(self.accelerator, settings.trackers, _trackable(settings))
        if first is not None:
            self.progress.validation["before"] = self.save_validation(first)
            self.remember_rewards("before", first)
        if settings.trackers:  # on every process: with ZeRO-3 a forward is a matter of all
            self.base_validation = (first or self.draw_validation(SHOWN, base=True)).first(SHOWN)
        self.fit()
        self.accelerator.end_training()

    # Steps ---------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from where `progress` stands to `max_train_steps`, then write the adapter."""
        settings, progress = self.settings, self.progress
        source = self.rollouts() if self.pairs is None else self.preferences(self.pairs)
        update = self.update()
        display = ProgressDisplay(settings, progress.step, images=self.images_per_step(), shown=self.main)
        stopped = False
        while progress.step < settings.max_train_steps and not stopped:
            before = progress.step
            display.resume_clock()
            batches, of_rollout = source.collect(before, self.current_schedule())
            for place in range(min(self.algorithm.updates_per_rollout, settings.max_train_steps - progress.step)):
                measured = update(batches, progress.step + 1, first=place == 0) | of_rollout
                progress.step += 1
                progress.kl = measured.get("kl")
                display.advance(measured, new_images=place == 0)
                self.accelerator.log(measured, step=progress.step)
                if stopped := self.beyond_kl():
                    break
                if settings.validation_steps and progress.step % settings.validation_steps == 0:
                    self.save_validation(self.validate())
                    display.resume_clock()
            # Between rollouts only: one that was half used could not be resumed exactly.
            crossed = progress.step // settings.checkpointing_steps > before // settings.checkpointing_steps
            if crossed and not stopped:
                self.consider(self.validate() if settings.keeps_best else None)
                save_checkpoint(self.output, self.engine, progress, settings.checkpoints_total_limit, self.best)
        display.close()
        self.finish(stopped)

    def update(self) -> Update:
        """What takes an optimiser step."""
        return Update(
            accelerator=self.accelerator,
            engine=self.engine,
            algorithm=self.algorithm,
            denoiser=self.sampling.denoiser,
            schedule=self.schedule,
            learnable=self.learnable,
            health=self.health,
            together=self.settings.timesteps_per_forward,
        )

    def images_per_step(self) -> int:
        """Images, or pairs of them, of all processes in an optimiser step."""
        settings = self.settings
        return settings.train_batch_size * settings.gradient_accumulation_steps * self.accelerator.num_processes

    def preferences(self, pairs: PreferencePairs) -> PairSource:
        """Steps learn from pairs of a data set."""
        settings = self.settings
        assert isinstance(settings, DPOSettings)
        return PairSource(
            settings=settings,
            accelerator=self.accelerator,
            pipeline=self.pipeline,
            denoiser=self.sampling.denoiser,
            embed=self.embed,
            pairs=pairs(self.progress.step * self.images_per_step()),
        )

    def rollouts(self) -> Rollouts:
        """Steps learn from images that the policy draws."""
        return Rollouts(
            settings=self.settings,
            algorithm=cast(RolloutAlgorithm, self.algorithm),
            accelerator=self.accelerator,
            pipeline=self.pipeline,
            sampling=self.sampling,
            embed=self.embed,
            prompts=self.prompts,
            reward=self.reward,
            health=self.health,
            inference=not self.engine.partitioned,
            history=self.progress.prompt_rewards,
        )

    def beyond_kl(self) -> bool:
        limit, kl = self.settings.max_kl, self.progress.kl
        if limit is None or kl is None or kl <= limit:
            return False
        self.health.note(STOPPED, self.progress.step, kl=kl, max_kl=limit)
        return True

    # The end -------------------------------------------------------------------------------

    def consider(self, validation: Validation | None) -> None:
        """Keep the policy as it stands if none before it had a higher reward on the validation images."""
        if validation is None:
            return
        summary, progress = validation.summary(), self.progress
        if not progress.best or summary["reward"] > progress.best["validation"]["reward"]:
            progress.best = {"step": progress.step, "kl": progress.kl, "validation": summary}
            self.remember_rewards("best", validation)
            self.best = self.engine.trainable_state()

    def finish(self, stopped: bool) -> None:
        """Write the adapter: the policy as it stands, or the best checkpoint."""
        settings, progress = self.settings, self.progress
        if not stopped:
            last = self.validate()
            progress.validation["after"] = self.save_validation(last)
            self.remember_rewards("after", last)
            self.consider(self.validate() if settings.keeps_best else None)
        state, step, kl = self.engine.trainable_state(), progress.step, progress.kl
        if stopped or settings.load_best_model_at_end:
            if self.best is None:
                raise ValueError(
                    f"step {progress.step}: the KL is {progress.kl:.4g} nats an image, beyond max_kl "
                    f"{settings.max_kl:g}, and there is no checkpoint yet; lower checkpointing_steps "
                    f"({settings.checkpointing_steps}) or learning_rate ({settings.learning_rate:g})"
                )
            state, step, kl = self.best, progress.best["step"], progress.best["kl"]
            progress.validation["after"] = progress.best["validation"]
            progress.validation_rewards["after"] = progress.validation_rewards.get("best", [])
        if self.main:
            self.write(state, step, kl)
            self.embed.report_streamed()
            print(describe_end(settings, progress, step, kl, self.reward.name), flush=True)
        self.accelerator.wait_for_everyone()

    def write(self, state: dict[str, Tensor], step: int, kl: float | None) -> None:
        """The adapter, with all that is known of it."""
        settings, progress = self.settings, self.progress
        offsets = state.get("variance_offsets")
        schedule = self.schedule
        if isinstance(schedule, LearnedSchedule) and offsets is not None:
            schedule = dataclasses.replace(schedule, offsets=offsets)
        write_adapter(
            self.output,
            self.pipeline.unet,
            Objective(
                name=settings.name,
                reward=self.reward.name,
                variance=schedule,
                beta=self.algorithm.temperature(math.prod(self.sampling.shape)),
                shaping=self.reward.shaping,
            ),
            state={name: value for name, value in state.items() if name != "variance_offsets"},
            base=self.base,
            guidance=settings.guidance,
            guidance_scale=settings.sample_guidance_scale,
            num_inference_steps=settings.sample_num_steps,
            record={
                "algorithm": self.algorithm.name,
                "steps": step,
                "kl": kl,
                "validation": progress.validation,
                "best": progress.best,
                "health": progress.health,
                "config": dataclasses.asdict(settings),
                "config_sha256": self.identity,
                "inputs": self.inputs,
                "versions": {name: version(name) for name in PACKAGES},
            },
            pipeline_class=type(self.pipeline),
        )

    # What steps need -----------------------------------------------------------------------

    def fit_reward(self) -> None:
        """Fit the reward on images of the base, where that is wanted and not done; the same on all processes."""
        count, progress = self.settings.fit_reward, self.progress
        if count and not progress.reward:
            if progress.step:
                raise ValueError("fit_reward on a run that has begun without; its policy is no longer the base")
            prompts = [self.prompts[i * len(self.prompts) // count] for i in range(count)]
            shares = draw_together(self.accelerator, prompts, self.settings.train_batch_size, self.drawer("fit"))
            columns = torch.cat([self.reward.columns(pixels, batch) for batch, pixels in shares])
            progress.reward = self.reward.fit(gathered(self.accelerator, columns, count))
        if progress.reward:
            self.reward.restore(progress.reward)

    def current_schedule(self) -> VarianceSchedule:
        """The schedule with the offsets learned so far."""
        offsets = self.engine.offsets()
        if offsets is None or not isinstance(self.schedule, LearnedSchedule):
            return self.schedule
        return dataclasses.replace(self.schedule, offsets=offsets)

    def validate(self) -> Validation:
        """The validation images of the policy as it stands, drawn once a step."""
        if self.validated is None or self.validated[0] != self.progress.step:
            self.validated = (self.progress.step, self.draw_validation())
        return self.validated[1]

    def draw_validation(self, count: int | None = None, *, base: bool = False) -> Validation:
        """Draw the first `count` validation images of the policy or the base model, and compute their rewards."""
        return validate(
            self.accelerator,
            validation_prompts(self.settings, self.prompts)[:count],
            self.settings.train_batch_size,
            self.drawer("validation", base=base),
            self.reward.raw,
        )

    def remember_rewards(self, moment: str, validation: Validation) -> None:
        """Keep the rewards of the validation images `before` training, of the `best` checkpoint, or `after` training.

        With other prompts, another seed or other settings of sampling than those before, which a resumed run may have,
        the images are not comparable, and none are kept.
        """
        progress, drawn_by = self.progress, validation_settings(self.settings)
        if moment == "before":
            progress.validation_prompts, progress.validation_settings = validation.prompts, drawn_by
        same = drawn_by == (progress.validation_settings or drawn_by)  # an earlier version did not keep them
        if same and validation.prompts == progress.validation_prompts:
            progress.validation_rewards[moment] = validation.rewards.tolist()
        else:
            progress.validation_rewards.pop(moment, None)

    def save_validation(self, validation: Validation) -> dict[str, float]:
        """Save the validation images as a picture, and log them and their reward."""
        step, summary = self.progress.step, validation.summary()
        if self.main:
            labels = [f"{p}\nreward {r:.4g}" for p, r in zip(validation.prompts, validation.rewards, strict=True)]
            save_samples(self.output / "samples" / f"step-{step:06d}.png", validation.pixels, labels)
            log_validation(self.accelerator, step, validation, self.base_validation)
        self.accelerator.log({"validation_reward": summary["reward"]}, step=step)
        return summary

    def drawer(self, place: str, *, base: bool = False) -> Draw:
        """Images of the policy as it stands, or of the base, by prompts and their places among all that are drawn."""
        sampling = dataclasses.replace(self.sampling, schedule=self.current_schedule())
        if base:
            sampling = dataclasses.replace(self.sampling, adapter=None)

        @torch.no_grad()
        def draw(prompts: Sequence[str], places: Sequence[int]) -> Pixels:
            generators = [sample_generator(self.settings.seed, place, number) for number in places]
            with self.accelerator.autocast():
                latents = rollout(
                    sampling.denoiser,
                    sampling.adapter,
                    sampling.schedule,
                    sampling.steps,
                    self.embed(prompts),
                    sampling.shape,
                    generators,
                    learned=(),
                ).latents
            check_latents(latents, prompts)
            pixels = decode_unclamped(self.pipeline, latents)
            check_pixels(pixels, prompts)
            return VaeImageProcessor.denormalize(pixels)

        return draw


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

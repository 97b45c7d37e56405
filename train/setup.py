"""What a run trains with: base model, policy, optimiser and reward, loaded and checked before anything is written."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import describe_base
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import INPUTS, load_pipeline, register_inputs
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.fuse.lora.layers import has_layer_among
from stepfuse.fuse.lora.rows import AdapterRows
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.plan import Expert
from stepfuse.fuse.rules.product import Product
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.train.conditioning import Embeddings
from stepfuse.train.engine import Engine
from stepfuse.train.fused_sampling import Sampling, fusion_step
from stepfuse.train.init_set import adapter_of, add_adapter_of_set, init_record, initial_schedules
from stepfuse.train.lora import Policy, SharedForward, add_lora, train_all
from stepfuse.train.provenance import provenance
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import TrainSettings


class ModelSetup:
    """What stays the same during a run, whatever it is trained on; complete after `make_engine`.

    Args:
        pipeline: the base model.

    Attributes:
        batch_size: number of images, or pairs of images, of this process in an optimiser step.
        total_batch_size: that number of all processes.
        backbone: the base model, whose network has the policy's LoRA.
        base: fingerprint of the base model.
        engine: the policy and its optimiser.
        sampling: how the policy is sampled, with the initial schedules.
        learnable: indices of the denoising steps that can be trained on.
        record: configuration, input files, versions and number of processes at the start of the run.
    """

    base: dict[str, Any]

    def __init__(
        self, settings: TrainSettings, accelerator: Accelerator, prompts: Sequence[str], pipeline: DiffusionPipeline
    ) -> None:
        self.settings, self.accelerator, self.prompts = settings, accelerator, prompts
        self.output = Path(settings.output_dir)
        self.batch_size = settings.train_batch_size * settings.gradient_accumulation_steps
        self.total_batch_size = self.batch_size * accelerator.num_processes
        self.backbone = backbone_of(pipeline)
        self.backbone.decode_batch_size = settings.decode_batch_size
        main, offload = accelerator.is_main_process, settings.offload_text_encoders
        self.embed = Embeddings(self.backbone, accelerator.device, offload=offload, report_cuts=main)

    def make_engine(self, policy: Policy, schedules: Sequence[VarianceSchedule], rule: FusionRule) -> None:
        """Make the optimiser of a policy, and find the denoising steps that it can be trained on.

        Args:
            policy: on the network of `backbone`.
            schedules: of its objectives.
            rule: fuses the policies of the objectives.

        Raises:
            ValueError: if no step is random.
        """
        settings, backbone = self.settings, self.backbone
        self.engine = Engine(self.accelerator, policy.to(self.accelerator.device), settings)
        shape = backbone.shape()
        path = backbone.path(shape)
        self.sampling = Sampling(
            denoiser=Denoiser(
                backbone=backbone,
                path=path,
                guidance=Guidance(source=settings.guidance, scale=settings.sample_guidance_scale),
                batched=policy.rows or self._shared_forward(),
            ),
            objectives=tuple(map(Expert.adapter, policy.adapters, schedules)),
            rule=rule,
            steps=path.steps(settings.sample_num_steps),
            shape=shape,
        )
        self.learnable = learnable_steps(settings, self.sampling)
        if not self.learnable:
            several = " of every objective" if len(schedules) > 1 else ""
            raise ValueError(f"no denoising step{several} is random, so there is nothing to learn from; use more steps")
        self.record: dict[str, Any] = {"processes": self.accelerator.num_processes}

    def _shared_forward(self) -> SharedForward | None:
        """Base and the one policy in one forward, where the settings ask for shared forwards and it can be done."""
        settings, backbone = self.settings, self.backbone
        # Hooks would be compiled anew each time, and gather partitioned weights in another order.
        separate = settings.compile != "no" or self.engine.partitioned
        separate = separate or has_layer_among(backbone.network, settings.name, backbone.unbatched)
        shared = settings.timesteps_per_forward > 1 and not separate
        return SharedForward(backbone.network, settings.name) if shared else None

    def micro_batches(self) -> list[range]:
        """The indices that this process's images have among those of an optimiser step, by micro-batch."""
        first, size = self.accelerator.process_index * self.batch_size, self.settings.train_batch_size
        return [range(start, start + size) for start in range(first, first + self.batch_size, size)]

    def current_sampling(self, **changes: Any) -> Sampling:
        """How the policy is sampled now, with the parameters of its schedules. All processes take part."""
        return dataclasses.replace(self.sampling.with_schedules(self.engine.schedule_parameters()), **changes)


class Setup(ModelSetup):
    """What stays the same in a run that increases rewards. The base model is loaded, and LoRAs are added.

    Args:
        pipeline: the base model; by default it is loaded as the settings say.
        initial: the set whose adapters the run starts from, in place of new ones.
        make: makes another policy than `make_policy`, with its arguments.

    Raises:
        ValueError: for settings that do not fit the base model.
    """

    def __init__(
        self,
        settings: TrainSettings,
        accelerator: Accelerator,
        reward: TrainingReward,
        prompts: Sequence[str],
        pipeline: DiffusionPipeline | None = None,
        initial: AdapterSet | None = None,
        make: Callable[..., Policy] | None = None,
    ) -> None:
        name, revision, variant = settings.pretrained_model_name_or_path, settings.revision, settings.variant
        inputs = {each: value for each in INPUTS if (value := getattr(settings, each)) is not None}
        if pipeline is None:
            dtype = network_dtype(accelerator)
            pipeline = load_pipeline(name, dtype=dtype, revision=revision, variant=variant, **inputs)
        else:
            register_inputs(pipeline, **inputs)
        super().__init__(settings, accelerator, prompts, pipeline)
        self.reward = reward
        self.base = describe_base(self.backbone, name, revision, variant=variant, hashed=accelerator.is_main_process)
        schedules = initial_schedules(settings, initial)
        policy = (make or make_policy)(self.backbone, settings, schedules, initial, row_modules=zero3(accelerator))
        self.make_engine(policy, schedules, get_rule(settings.train_rule) if len(schedules) > 1 else Product())
        self.record |= provenance(settings, init_record(settings, initial))


def network_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision of the base model's weights."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def learnable_steps(settings: TrainSettings, sampling: Sampling) -> list[int]:
    """Indices of the denoising steps that can be trained on: random ones, but the first and last that are skipped."""
    trained = range(settings.skip_first_steps, len(sampling.steps) - settings.skip_last_steps)
    plan, like = sampling.plan(sampling.equal_weights(1)), torch.zeros(1, 1, 1, 1)
    plan.check_variances()
    return [index for index in trained if sampling.trains_on(fusion_step(plan, index, like))]


def zero3(accelerator: Accelerator) -> bool:
    """Whether parameters will be partitioned (ZeRO-3)."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def make_policy(
    backbone: Backbone,
    settings: TrainSettings,
    schedules: Sequence[VarianceSchedule],
    initial: AdapterSet | None = None,
    *,
    row_modules: bool = False,
) -> Policy:
    """The policy: the base model's network with a LoRA for each objective, and the schedules' parameters.

    Args:
        initial: the set whose LoRAs it starts from; by default they are new ones.
        row_modules: see `AdapterRows`; for several objectives.
    """
    for index, each in enumerate(settings.each):
        if initial is not None:
            add_adapter_of_set(backbone, adapter_of(initial, each.name))
            continue
        add_lora(
            backbone.network,
            each.name,
            rank=each.rank,
            alpha=each.lora_alpha,
            targets=each.lora_target_modules or list(backbone.targets),
            seed=settings.seed + index,
        )
    return policy_of(backbone, settings, schedules, row_modules=row_modules)


def policy_of(
    backbone: Backbone,
    settings: TrainSettings,
    schedules: Sequence[VarianceSchedule],
    *,
    row_modules: bool = False,
    frozen: Sequence[str] = (),
) -> Policy:
    """The policy of the LoRAs that are on the base model's network under the names of the objectives.

    Args:
        row_modules: see `AdapterRows`; for several objectives.
        frozen: names of other LoRAs there, which run in the same forwards and are not trained; schedules are not then.
    """
    network, names = backbone.network, [each.name for each in settings.each]
    train_all(network, names)
    rows = None
    if len(names) > 1:
        rows = AdapterRows(network, [*names, *frozen], backbone.unbatched, as_modules=row_modules)
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if settings.compile != "no":
        backbone.compile(settings.compile)
    network.train()
    return Policy(backbone, names, schedules, rows, trains_schedules=not frozen)

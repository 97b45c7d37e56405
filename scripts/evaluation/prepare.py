"""An evaluation, loaded and checked before anything is sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from stepfuse.data import emoji
from stepfuse.data.file_info import text_hash
from stepfuse.data.names import nearest
from stepfuse.fuse.backbones.prompt_length import warn_of_cuts
from stepfuse.fuse.rules.gap_profile import profile_to_dict
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.rewards.clip import CLIPReward
from stepfuse.rewards.clip_score import clip_score
from stepfuse.rewards.protocol import Reward, score
from stepfuse.rewards.registry import load_reward, summands
from stepfuse.rewards.statistics import deviation_within
from stepfuse.scripts.evaluation.config import EvaluationConfig, PlannedCell, Setup, cells_of
from stepfuse.scripts.evaluation.costs import machine
from stepfuse.train.rollout import sample_generator


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that is needed to sample and score the cells."""

    config: EvaluationConfig
    adapter_set: AdapterSet
    sampler: FusedSampler
    cells: list[PlannedCell]
    prompts: list[str]
    rewards: Mapping[str, Reward]  # of the objectives and held out
    embedder: CLIPReward | None  # for the diversity

    @classmethod
    def prepare(
        cls, adapter_set: AdapterSet, config: EvaluationConfig, *, device: str, dtype: torch.dtype
    ) -> "Evaluation":
        """Load what is needed and check that every cell can be sampled; a ValueError names what cannot."""
        cells = cells_of(config, adapter_set.names)
        prompts = list(dict.fromkeys(config.load_prompts(config.seed)))
        if len(prompts) < 2:
            raise ValueError(f"{len(prompts)} prompt; intervals are over prompts, so give 2 or more")
        check_scales(config, adapter_set, cells)
        check_judges(config, adapter_set)
        by_objective = {o.name: o.reward for o in adapter_set.objectives}
        names = dict.fromkeys([*by_objective.values(), *config.rewards, *config.judges])
        rewards = {name: load_reward(name, device) for name in names}
        for name, reward in rewards.items():  # a gray picture for every prompt: what fails always, fails here
            for begin in range(0, len(prompts), config.batch_size):
                some = prompts[begin : begin + config.batch_size]
                score(reward, torch.full((len(some), 3, 64, 64), 0.5, device=device), some, name=name)
        sampler = FusedSampler.from_pretrained(
            adapter_set,
            guidance=config.guidance,
            guidance_scale=config.guidance_scale,
            rewards={name: rewards[reward] for name, reward in by_objective.items()},
            reward_scales=dict.fromkeys(adapter_set.names, 1.0) | config.scales,  # until they are measured
            dtype=dtype,
            device=device,
        )
        shape = sampler.backbone.shape(config.resolution, config.resolution)
        for cell in cells:
            fused = sampler.with_rule(cell.rule)
            try:
                fused.plan(cell.weights, 1, strength=cell.strength, num_inference_steps=config.steps, shape=shape)
            except ValueError as error:
                raise ValueError(f"{cell}: {error}") from error
        warn_of_cuts(sampler.backbone, prompts, counted=True)
        clip = config.embedding or (emoji.CLIP if adapter_set.base["name_or_path"] in emoji.BASES else None)
        return cls(
            config=config,
            adapter_set=adapter_set,
            sampler=sampler,
            cells=cells,
            prompts=prompts,
            rewards=rewards,
            embedder=clip_score(clip, device) if clip else None,
        )

    @property
    def unscaled(self) -> list[Objective]:
        """Objectives whose scales are measured on the base's images."""
        return [objective for objective in self.sampler.objectives if objective.name not in self.config.scales]

    def with_measured_scales(self, base: pd.DataFrame) -> "Evaluation":
        """The same with the scales of these: the deviations of rewards among the base's images of one prompt."""
        scales = dict(self.sampler.reward_scales)
        for objective in self.unscaled:
            values = base[f"reward_{objective.reward}"].to_numpy()
            scales[objective.name] = scale = deviation_within(values, base["prompt"].to_list())
            if not scale > 1e-9 * abs(values).max():
                raise ValueError(
                    f"the scale of {objective.name!r} cannot be measured: {objective.reward!r} does not differ among "
                    "the base's images of one prompt; add it to scales in the config"
                )
        return replace(self, sampler=replace(self.sampler, reward_scales=scales))

    @property
    def device(self) -> torch.device:
        return self.sampler.denoiser.network.device

    @property
    def steps(self) -> int:
        return self.config.steps or self.sampler.num_inference_steps

    @property
    def batches(self) -> list[range]:
        """Indices of the prompts of each batch; all images of a prompt are in one batch."""
        size = max(1, self.config.batch_size // self.config.seeds_per_prompt)
        return [range(i, min(i + size, len(self.prompts))) for i in range(0, len(self.prompts), size)]

    def sample(
        self, sampler: FusedSampler, cell: PlannedCell, images: Sequence[tuple[str, int]], **options: Any
    ) -> Tensor:
        """Images of prompts and seeds; the randomness of an image depends on these two alone, in every cell."""
        output = sampler.sample(
            [prompt for prompt, _ in images],
            cell.weights,
            strength=cell.strength,
            num_inference_steps=self.config.steps,
            height=self.config.resolution,
            width=self.config.resolution,
            generator=[sample_generator(self.config.seed, "evaluate", prompt, seed) for prompt, seed in images],
            batch_size=self.config.batch_size,
            progress=False,
            report_cuts=False,
            **options,
        )
        assert isinstance(output, Tensor)
        return output

    def setup(self, name: str, command: str) -> Setup:
        """What the tables and the page say was measured."""
        objectives = self.sampler.objectives
        scales = {o.reward: self.sampler.reward_scales[o.name] for o in objectives}
        return Setup(
            objectives=tuple((o.name, o.reward) for o in objectives),
            rewards=tuple(self.rewards),
            scales=scales,
            held_out=tuple(reward for reward in self.rewards if reward not in scales),
            judges=tuple(dict.fromkeys(self.config.judges)),
            rules={cell.label: cell.rule for cell in self.cells},
            title=f"Evaluation of {name}",
            base=str(self.adapter_set.base["name_or_path"]),
            oracles=tuple((oracle.weights, oracle.scales) for oracle in self.adapter_set.oracles),
            steps=self.steps,
            guidance=self.sampler.denoiser.guidance.effective_scale,
            machine=machine(self.device),
            command=command,
        )

    def identity(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the images depend on: an evaluation is resumed where this is the same."""
        identity = {
            "format_version": 1,
            "config": self.config.identity(),
            "adapters": {adapter.name: adapter.sha256 for adapter in self.adapter_set.all_adapters},
            "objectives": [
                [o.name, o.reward, o.beta, schedule_to_dict(o.variance)]
                for o in (*self.sampler.objectives, *self.sampler.oracles)
            ],
            "reference": schedule_to_dict(self.sampler.reference),
            "guidance": [self.sampler.denoiser.guidance.source, self.sampler.denoiser.guidance.scale],
            "steps": self.steps,
            "scales": dict(self.config.scales),
            "dtype": str(dtype),
            "prompts": text_hash("\n".join(self.prompts)),
        }
        if self.sampler.backbone.resolution is not None:
            identity["resolution"] = self.sampler.backbone.resolution
        if any(cell.rule.uses_gaps for cell in self.cells):
            identity["profiles"] = [profile_to_dict(profile) for profile in self.sampler.profiles]
        return identity


def check_judges(config: EvaluationConfig, adapter_set: AdapterSet) -> None:
    """Check that no judge is the reward of an objective, or a term of it."""
    for objective in adapter_set.objectives:
        for part in summands(objective.reward):
            if part.text in config.judges:
                raise ValueError(
                    f"the judge {part.text!r} is what the objective {objective.name!r} is trained on; expected a "
                    "reward that nothing is trained on (those of the objectives are always measured)"
                )


def check_scales(config: EvaluationConfig, adapter_set: AdapterSet, cells: Sequence[PlannedCell]) -> None:
    """Check that scales are of objectives, those left out can be measured, and oracles were trained in these units."""
    names, scales = adapter_set.names, config.scales
    for name in scales:
        if name not in names:
            raise ValueError(f"scales name {name!r}; the set has {', '.join(names)}{nearest(name, names)}")
    unscaled = [name for name in names if name not in scales]
    if unscaled and config.seeds_per_prompt < 2:
        raise ValueError(
            f"the scale of {unscaled[0]!r} is measured among the images of one prompt, and seeds_per_prompt is "
            f"{config.seeds_per_prompt}; expected 2 or more, or a scale for each objective in the config"
        )
    if unscaled or all(cell.rule.accepts != "trained" for cell in cells):
        return
    for oracle in adapter_set.oracles:
        ratios = [scales[name] / scale for name, scale in oracle.scales.items()]
        if max(ratios) > 1.001 * min(ratios):
            trained = ", ".join(f"{name}: {scale:g}" for name, scale in oracle.scales.items())
            given = ", ".join(f"{name}: {scales[name]:g}" for name in oracle.scales)
            raise ValueError(
                f"oracle {oracle.adapter.name!r} was trained in the units {trained}, and the scales here are {given}, "
                "so its regret would be that of another reward. Give its units as scales, or leave scales out to have "
                "them measured"
            )

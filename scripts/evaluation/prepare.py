"""An evaluation, loaded and checked before anything is sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from stepfuse.data import emoji
from stepfuse.data.file_info import text_hash
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.prompt_length import warn_of_cuts
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.rewards.clip import CLIPReward
from stepfuse.rewards.clip_score import clip_score
from stepfuse.rewards.protocol import Reward, score
from stepfuse.rewards.registry import check_reward_dtype, load_reward
from stepfuse.rewards.statistics import deviation_within
from stepfuse.scripts.evaluation.checks import check_judges, check_scales
from stepfuse.scripts.evaluation.config import EvaluationConfig, PlannedCell, Setup, cells_of
from stepfuse.scripts.evaluation.costs import machine
from stepfuse.scripts.evaluation.sets import EVALUATED, Samplers, load_sets, set_identity
from stepfuse.scripts.evaluation.training_images import images_drawn
from stepfuse.train.rollout import sample_generator


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that is needed to sample and score the cells.

    Attributes:
        config: as it was given.
        sets: by the name that cells have for them, the one that is evaluated first.
        samplers: of these sets.
        cells: all of them, the base first.
        prompts: each once.
        rewards: of the objectives and held out.
        scales: σ of each objective's reward, 1 until it is measured.
        embedder: for the diversity.
    """

    config: EvaluationConfig
    sets: Mapping[str, AdapterSet]
    samplers: Samplers
    cells: list[PlannedCell]
    prompts: list[str]
    rewards: Mapping[str, Reward]
    scales: Mapping[str, float]
    embedder: CLIPReward | None

    @classmethod
    def prepare(
        cls,
        adapter_set: AdapterSet,
        config: EvaluationConfig,
        *,
        device: str,
        dtype: torch.dtype,
        reward_dtype: torch.dtype = torch.float32,
        decode_batch_size: int | None = None,
    ) -> "Evaluation":
        """Load what is needed and check that every cell can be sampled; a ValueError names what cannot."""
        cells = cells_of(config, adapter_set.names)
        prompts = list(dict.fromkeys(config.load_prompts(config.seed)))
        if len(prompts) < 2:
            raise ValueError(f"{len(prompts)} prompt; intervals are over prompts, so give 2 or more")
        check_scales(config, adapter_set, cells)
        sets = load_sets(adapter_set, [cell.set for cell in cells])
        for each in sets.values():
            check_judges(config, each)
        by_objective = {o.name: o.reward for o in adapter_set.objectives}
        names = dict.fromkeys([*by_objective.values(), *config.rewards, *config.judges])
        check_reward_dtype(list(names), reward_dtype)
        rewards = {name: load_reward(name, device, reward_dtype) for name in names}
        for name, reward in rewards.items():  # a gray picture for every prompt: what fails always, fails here
            for begin in range(0, len(prompts), config.batch_size):
                some = prompts[begin : begin + config.batch_size]
                score(reward, torch.full((len(some), 3, 64, 64), 0.5, device=device), some, name=name)
        samplers = Samplers(
            sets,
            guidance=config.guidance or adapter_set.guidance,
            guidance_scale=adapter_set.guidance_scale if config.guidance_scale is None else config.guidance_scale,
            rewards={name: rewards[reward] for name, reward in by_objective.items()},
            reward_dtype=reward_dtype,
            decode_batch_size=decode_batch_size,
            dtype=dtype,
            device=device,
        )
        clip = config.embedding or (emoji.CLIP if adapter_set.base["name_or_path"] in emoji.BASES else None)
        evaluation = cls(
            config=config,
            sets=sets,
            samplers=samplers,
            cells=cells,
            prompts=prompts,
            rewards=rewards,
            scales=dict.fromkeys(adapter_set.names, 1.0) | config.scales,
            embedder=clip_score(clip, device) if clip else None,
        )
        evaluation.check_cells()
        warn_of_cuts(samplers.loaded.backbone, prompts, counted=True)
        return evaluation

    def check_cells(self) -> None:
        """Check that every cell can be sampled, set by set."""
        shape = self.samplers.loaded.backbone.shape(self.config.resolution, self.config.resolution)
        for name in self.sets:
            for cell in (cell for cell in self.cells if cell.set == name):
                fused = self.sampler_of(cell)
                try:
                    fused.plan(cell.weights, 1, strength=cell.strength, num_inference_steps=self.steps, shape=shape)
                except ValueError as error:
                    raise ValueError(f"{cell}: {error}") from error

    def sampler_of(self, cell: PlannedCell) -> FusedSampler:
        """The sampler of a cell's set under its rule, to be used before that of a cell of another set is asked for."""
        return replace(self.samplers.of(cell.set), reward_scales=self.scales).with_rule(cell.rule)

    @property
    def adapter_set(self) -> AdapterSet:
        """The set that is evaluated."""
        return self.sets[EVALUATED]

    @property
    def unscaled(self) -> list[Objective]:
        """Objectives whose scales are measured on the base's images."""
        return [objective for objective in self.adapter_set.objectives if objective.name not in self.config.scales]

    def with_measured_scales(self, base: pd.DataFrame) -> "Evaluation":
        """The same with the scales of these: the deviations of rewards among the base's images of one prompt."""
        scales = dict(self.scales)
        for objective in self.unscaled:
            values = base[f"reward_{objective.reward}"].to_numpy()
            scales[objective.name] = scale = deviation_within(values, base["prompt"].to_list())
            if not scale > 1e-9 * abs(values).max():
                raise ValueError(
                    f"the scale of {objective.name!r} cannot be measured: {objective.reward!r} does not differ among "
                    "the base's images of one prompt; add it to scales in the config"
                )
        return replace(self, scales=scales)

    @property
    def device(self) -> torch.device:
        return self.samplers.loaded.denoiser.network.device

    @property
    def steps(self) -> int:
        return self.config.steps or self.adapter_set.num_inference_steps

    @property
    def guidance(self) -> Guidance:
        """Of all cells."""
        return self.samplers.loaded.denoiser.guidance

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
            num_inference_steps=self.steps,
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
        objectives = self.adapter_set.objectives
        scales = {o.reward: self.scales[o.name] for o in objectives}
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
            sets={cell.label: cell.set for cell in self.cells if cell.set},
            training_images={cell.label: images_drawn(self.sets[cell.set], cell.rule) for cell in self.cells},
            steps=self.steps,
            guidance=self.guidance.effective_scale,
            machine=machine(self.device),
            command=command,
        )

    def identity(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the images depend on: an evaluation is resumed where this is the same."""
        gaps = any(cell.rule.uses_gaps for cell in self.cells)
        others = {name: set_identity(each, uses_gaps=gaps) for name, each in self.sets.items() if name != EVALUATED}
        identity = {
            "format_version": 1,
            "config": self.config.identity(),
            **set_identity(self.adapter_set, uses_gaps=gaps),
            "reference": schedule_to_dict(self.adapter_set.base_schedule),
            "guidance": [self.guidance.source, self.guidance.scale],
            "steps": self.steps,
            "scales": dict(self.config.scales),
            "dtype": str(dtype),
            "prompts": text_hash("\n".join(self.prompts)),
        }
        resolution = self.samplers.loaded.backbone.resolution
        reward_dtype = self.samplers.loaded.reward_dtype
        reduced = "" if reward_dtype == torch.float32 else str(reward_dtype)
        added = {"resolution": resolution, "sets": others, "reward_dtype": reduced}  # earlier evaluations have none
        return identity | {name: value for name, value in added.items() if value}

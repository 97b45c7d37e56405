"""`stepfuse evaluate`: draw every cell of an evaluation, score it, and measure what came out.

OUT/
  evaluation.json    what is drawn, which must be the same for a run to be resumed, and the scales that were measured
  parts/             a table for each cell and batch of prompts: what an interrupted run keeps
  results.parquet    a row an image
  summary.json       the figures
  report.html        the page
  fronts.png         its fronts in one picture
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from stepfuse.data.images import to_image
from stepfuse.data.names import nearest
from stepfuse.data.output_folder import check_output, clear, files_below, files_named, written_file
from stepfuse.data.prompts import load_prompts
from stepfuse.data.text_files import write_text
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.loading import EMBEDDED, quiet_libraries
from stepfuse.fuse.backbones.prompt_length import warn_of_cuts
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.lora.safe_files import write_json
from stepfuse.fuse.rules.best_of_n import CoDe
from stepfuse.fuse.rules.gap_profile import profile_to_dict
from stepfuse.fuse.rules.plan import FusionStep
from stepfuse.fuse.rules.product import Oracle
from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.sampling.rewards import check_trusted
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.fuse.sets.manifest import read_json
from stepfuse.rewards.clip import CLIPReward
from stepfuse.rewards.clip_score import clip_score
from stepfuse.rewards.protocol import Reward, score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.statistics import deviation_within
from stepfuse.scripts.evaluation.cells import Setup
from stepfuse.scripts.evaluation.config import EvaluationConfig, PlannedCell, cells_of, shares_of
from stepfuse.scripts.evaluation.costs import counted_rows, machine, now, peak_memory
from stepfuse.scripts.evaluation.figures import summarise
from stepfuse.scripts.evaluation.plots import save_fronts
from stepfuse.scripts.evaluation.report import write_report
from stepfuse.train.rollout import sample_generator

DESCRIPTION, PARTS = "evaluation.json", "parts"
RESULTS = ("results.parquet", "summary.json", "report.html", "fronts.png")
MEASURED = "measured_scales"  # in the description, and no part of what must be the same


def evaluate(
    adapter_set: str | Path,
    config: EvaluationConfig,
    output: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    command: str = "",
    trust_rewards: bool = False,
) -> dict[str, Any]:
    """Draw, score, measure and report; an interrupted run goes on where it stopped, with the same numbers.

    The scale of each reward that the configuration gives none for is measured on the images of the base, which are
    drawn first: the standard deviation among the images of one prompt.

    Rewards that the set names and that are code or servers are loaded with `trust_rewards` only.

    Under `accelerate launch` the batches are shared out between the processes.

    Raises:
        ValueError: for whatever can be known to be wrong, before anything is drawn: an unknown rule, a rule without
            its reward or oracle, a reward that does not work; and for a reward that fails midway.
    """
    quiet_libraries()
    state = PartialState(cpu=device == "cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) != state.num_processes:
        raise ValueError(
            f"launched as {os.environ['WORLD_SIZE']} processes that do not see each other; on CPU launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu"
        )
    loaded = load_set(adapter_set)
    for objective in loaded.objectives:
        check_trusted(objective, trusted=trust_rewards)
    evaluation = Evaluation.prepare(loaded, config, device=device, dtype=dtype)
    identity = evaluation.identity(loaded, dtype)
    if state.is_main_process:
        _claim(output, identity, overwrite=overwrite)
    state.wait_for_everyone()
    if evaluation.unscaled:
        base = evaluation.draw(output / PARTS, state, evaluation.cells[:1])
        state.wait_for_everyone()  # every process measures the same on the parts of all
        evaluation = evaluation.with_measured_scales([part for _, part in base])
        if state.is_main_process:
            measured = {name: evaluation.sampler.reward_scales[name] for name in loaded.names}
            write_json(output / DESCRIPTION, identity | {MEASURED: measured})
    parts = evaluation.draw(output / PARTS, state)
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    tables = [pd.read_parquet(part).assign(rule=cell.label) for cell, part in parts]
    results = pd.concat(tables, ignore_index=True)
    table, figures, page, fronts = (output / name for name in RESULTS)
    with written_file(table) as temporary:
        results.to_parquet(temporary)
    setup = evaluation.setup(str(adapter_set), loaded, command)
    summary = summarise(results, setup)
    with written_file(figures) as temporary:
        write_text(temporary, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    with written_file(page) as temporary:
        write_report(temporary, results, summary, setup)
    with written_file(fronts) as temporary:
        save_fronts(temporary, summary)
    return summary


def evaluation_files(folder: Path) -> set[Path]:
    """The files of the evaluation in a folder, which --overwrite replaces; none where there is no evaluation."""
    try:
        read_json(folder / DESCRIPTION, "an evaluation")
    except ValueError:
        return set()
    parts = {file for file in files_below(folder, PARTS) if file.suffix in (".parquet", ".tmp")}
    return parts | files_named(folder, DESCRIPTION, *RESULTS)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything loaded and checked, ready to draw."""

    config: EvaluationConfig
    sampler: FusedSampler
    cells: list[PlannedCell]
    prompts: list[str]
    rewards: Mapping[str, Reward]
    embedder: CLIPReward | None
    unscaled: tuple[str, ...] = ()  # objectives whose scales are measured

    @classmethod
    def prepare(
        cls, adapter_set: AdapterSet, config: EvaluationConfig, *, device: str, dtype: torch.dtype
    ) -> "Evaluation":
        """Load what is needed and see that every cell can be drawn.

        Raises:
            ValueError: naming the cell, reward or scale at fault.
        """
        cells = cells_of(config, adapter_set.names)
        prompts = load_prompts(
            config.prompts,
            dataset_name=config.dataset_name,
            split=config.dataset_split,
            column=config.caption_column,
            seed=config.seed,
        )
        prompts = list(dict.fromkeys(prompts))
        if len(prompts) < 2:
            raise ValueError(f"{len(prompts)} prompt; intervals are over prompts, so give 2 or more")
        for name in config.scales:
            if name not in adapter_set.names:
                known = adapter_set.names
                raise ValueError(f"scales name {name!r}; the set has {', '.join(known)}{nearest(name, known)}")
        unscaled = tuple(name for name in adapter_set.names if name not in config.scales)
        if unscaled and config.seeds_per_prompt < 2:
            raise ValueError(
                f"the scale of {unscaled[0]!r} is measured among the images of one prompt, and seeds_per_prompt is "
                f"{config.seeds_per_prompt}; expected 2 or more, or a scale for each objective in the config"
            )
        own = {o.name: o.reward for o in adapter_set.objectives}
        rewards = {name: load_reward(name, device) for name in dict.fromkeys([*own.values(), *config.rewards])}
        for name, reward in rewards.items():  # a gray picture for every prompt: what fails always, fails here
            for begin in range(0, len(prompts), config.batch_size):
                some = prompts[begin : begin + config.batch_size]
                score(reward, torch.full((len(some), 3, 64, 64), 0.5, device=device), some, name=name)
        if not unscaled:
            check_oracles(adapter_set, cells, config.scales)
        sampler = FusedSampler.from_pretrained(
            adapter_set,
            guidance=config.guidance,
            guidance_scale=config.guidance_scale,
            rewards={name: rewards[reward] for name, reward in own.items()},
            reward_scales=dict.fromkeys(unscaled, 1.0) | config.scales,  # until they are measured
            dtype=dtype,
            device=device,
        )
        for cell in cells:
            try:
                sampler.with_rule(cell.rule).plan(
                    cell.weights, 1, strength=cell.strength, num_inference_steps=config.steps
                )
            except ValueError as error:
                raise ValueError(f"{cell}: {error}") from error
        warn_of_cuts(sampler.pipeline, prompts, counted=True)
        embedding = config.embedding
        embedded = adapter_set.base["name_or_path"] in EMBEDDED
        embedder = clip_score(embedding, device) if embedding else clip_score(device=device) if embedded else None
        return cls(
            config=config,
            sampler=sampler,
            cells=cells,
            prompts=prompts,
            rewards=rewards,
            embedder=embedder,
            unscaled=unscaled,
        )

    def with_measured_scales(self, base: Sequence[Path]) -> "Evaluation":
        """The same with the scales that the configuration does not give measured on the tables of the base's images.

        Raises:
            ValueError: for a reward that is the same for all images of each prompt.
        """
        table = pd.concat([pd.read_parquet(part) for part in base], ignore_index=True)
        scales = dict(self.sampler.reward_scales)
        for objective in self.sampler.objectives:
            if objective.name in self.unscaled:
                values = table[f"reward_{objective.reward}"].to_numpy()
                scale = deviation_within(values, table["prompt"].to_list())
                if not scale > 1e-9 * abs(values).max():
                    raise ValueError(
                        f"the scale of {objective.name!r} cannot be measured: {objective.reward!r} does not differ "
                        "among the base's images of one prompt; add it to scales in the config"
                    )
                scales[objective.name] = scale
        return dataclasses.replace(self, sampler=dataclasses.replace(self.sampler, reward_scales=scales))

    @property
    def batches(self) -> list[range]:
        """Prompts by their places, whole prompts to a batch."""
        size = max(1, self.config.batch_size // self.config.seeds_per_prompt)
        return [range(i, min(i + size, len(self.prompts))) for i in range(0, len(self.prompts), size)]

    def setup(self, name: str, adapter_set: AdapterSet, command: str) -> Setup:
        """What the tables and the page say of themselves."""
        objectives, config = self.sampler.objectives, self.config
        denoiser = self.sampler.denoiser
        names = tuple(self.rewards)
        own = [o.reward for o in objectives]
        return Setup(
            objectives=tuple((o.name, o.reward) for o in objectives),
            rewards=names,
            scales={o.reward: self.sampler.reward_scales[o.name] for o in objectives},
            held_out=tuple(n for n in names if n not in own),
            title=f"Evaluation of {name}",
            base=str(adapter_set.base["name_or_path"]),
            oracles=tuple((oracle.weights, oracle.scales) for oracle in adapter_set.oracles),
            steps=config.steps or self.sampler.num_inference_steps,
            guidance=1.0 if denoiser.guidance == "off" else denoiser.guidance_scale,
            machine=machine(self.sampler.pipeline.unet.device),
            command=command,
        )

    def identity(self, adapter_set: AdapterSet, dtype: torch.dtype) -> dict[str, Any]:
        """What the images depend on: a run is gone on with where this is the same."""
        sampler, oracles = self.sampler, adapter_set.oracles
        return {
            "format_version": 1,
            "config": dataclasses.asdict(self.config),
            "adapters": {a.name: a.sha256 for a in (*adapter_set.adapters, *(o.adapter for o in oracles))},
            "objectives": [
                [o.name, o.reward, o.beta, schedule_to_dict(o.variance)]
                for o in (*sampler.objectives, *sampler.oracles)
            ],
            "reference": schedule_to_dict(sampler.reference),
            "guidance": [sampler.denoiser.guidance, sampler.denoiser.guidance_scale],
            "steps": self.config.steps or sampler.num_inference_steps,
            "scales": dict(self.config.scales),
            "dtype": str(dtype),
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
        } | ({"profiles": [profile_to_dict(p) for p in sampler.profiles]} if self.gated else {})

    @property
    def gated(self) -> bool:
        """Whether some rule has a gate, which opens by the set's profile."""
        return any(getattr(cell.rule, "gate", None) is not None for cell in self.cells)

    def draw(
        self, folder: Path, state: PartialState, wanted: Sequence[PlannedCell] | None = None
    ) -> list[tuple[PlannedCell, Path]]:
        """Draw and score cells, a file for each batch; files that are there are kept.

        Cells that are one adapter alone under different names are drawn once.

        Args:
            wanted: by default all cells.

        Returns:
            The files of each cell.

        Raises:
            ValueError: for a reward that fails, naming the cell; what was drawn before is kept.
        """
        folder.mkdir(parents=True, exist_ok=True)
        first: dict[tuple, int] = {}
        for i, cell in enumerate(self.cells):
            first.setdefault(cell.draws, i)
        cells = self.cells if wanted is None else wanted
        units = [
            (folder / f"{i:04d}-{j:04d}.parquet", self.cells[i], rows)
            for i in dict.fromkeys(first[cell.draws] for cell in cells)
            for j, rows in enumerate(self.batches)
        ]
        mine = [unit for number, unit in enumerate(units) if number % state.num_processes == state.process_index]
        with tqdm(total=len(mine), disable=not state.is_main_process, desc="evaluate", unit="batch") as bar:
            for file, cell, rows in mine:
                bar.set_postfix_str(str(cell))
                if not file.exists():
                    try:
                        table = self.measure(cell, rows)
                    except ValueError as error:
                        raise ValueError(f"{cell}: {error}; run again to go on, batches drawn are kept") from error
                    with written_file(file) as temporary:
                        table.to_parquet(temporary)
                bar.update()
        return [
            (cell, folder / f"{first[cell.draws]:04d}-{j:04d}.parquet")
            for cell in cells
            for j in range(len(self.batches))
        ]

    @torch.no_grad()
    def measure(self, cell: PlannedCell, rows: range) -> pd.DataFrame:
        """The rows of one batch: all seeds of some prompts in one cell."""
        config, seeds = self.config, self.config.seeds_per_prompt
        places = [(place, seed) for place in rows for seed in range(seeds)]
        prompts = [self.prompts[place] for place, _ in places]
        sampler = self.sampler.with_rule(cell.rule)
        device = sampler.pipeline.unet.device
        with counted_rows(sampler.pipeline.unet) as count, peak_memory(device) as peak:
            begin = now(device)
            pixels = self._sample(sampler, cell, places)
            seconds = now(device) - begin
        scores = {
            f"reward_{name}": score(reward, pixels.to(device), prompts, name=name).cpu().tolist()
            for name, reward in self.rewards.items()
        }
        kl = self.kl_to_base(sampler, cell, places)
        names = [o.name for o in sampler.objectives]
        kept = [
            _png(image) if s == 0 and p < config.strip_prompts else None
            for (p, s), image in zip(places, pixels, strict=True)
        ]
        return pd.DataFrame(
            {
                "rule": cell.label,
                "weights": cell.weights_label,
                **{f"w_{name}": share for name, share in shares_of(cell, names).items()},
                "strength": cell.strength,
                "prompt": prompts,
                "seed": [seed for _, seed in places],
                **scores,
                "kl": kl,
                "diversity": self.diversity(pixels, len(rows)),
                "nfe": count() / len(places),
                "seconds": seconds / len(places),
                "peak_memory_mb": peak(),
                "image": kept,
            }
        )

    def _sample(
        self, sampler: FusedSampler, cell: PlannedCell, places: Sequence[tuple[int, int]], **options: Any
    ) -> Tensor:
        """Pixels of (prompt, seed) pairs; an image's randomness is its own, and the same in every cell."""
        output = sampler.sample(
            [self.prompts[place] for place, _ in places],
            cell.weights,
            strength=cell.strength,
            num_inference_steps=self.config.steps,
            generator=[sample_generator(self.config.seed, "evaluate", self.prompts[p], s) for p, s in places],
            batch_size=self.config.batch_size,
            output_type=options.pop("output_type", "pt"),
            progress=False,
            report_cuts=False,
            **options,
        )
        assert isinstance(output, Tensor)
        return output

    def kl_to_base(self, sampler: FusedSampler, cell: PlannedCell, places: Sequence[tuple[int, int]]) -> list[float]:
        """Σ_t KL( p(x_s | x_t) ‖ p_ref(x_s | x_t) ) along each image's own run, in nats, by drawing it once more.

        For rules that draw lots it is the KL of the policy drawn, which bounds that of the mixture. Deterministic steps
        have no density and are left out. NaN for `code`, whose choice is no Gaussian, and for seeds not measured.
        """
        chosen = [i for i, (_, seed) in enumerate(places) if seed < self.config.kl_seeds]
        total = torch.full((len(places),), float("nan"), dtype=torch.float64)
        if not chosen or (isinstance(cell.rule, CoDe) and cell.rule.candidates > 1):
            return total.tolist()
        sums = torch.zeros(len(chosen), dtype=torch.float64)

        def observe(step: FusionStep, gaussian: Gaussian, conditioning: Conditioning, rows: slice) -> None:
            variance = step.variance(step.plan.base)
            if bool((gaussian.variance > 0).all()) and bool((variance > 0).all()):
                (prediction,) = sampler.denoiser.predictions(step.x_t, step.t, conditioning, [None])
                sums[rows] += gaussian.kl(step.transition(prediction, variance)).double().cpu()

        self._sample(sampler, cell, [places[i] for i in chosen], observe=observe, output_type="latent")
        total[chosen] = sums
        return total.tolist()

    def diversity(self, pixels: Tensor, prompts: int) -> list[float]:
        """Mean 1 - cos between the embeddings of the images of one prompt, on each of its rows."""
        seeds = self.config.seeds_per_prompt
        if self.embedder is None or seeds < 2:
            return [float("nan")] * len(pixels)
        embeddings = functional.normalize(self.embedder.embed_images(pixels), dim=1).reshape(prompts, seeds, -1)
        cosines = embeddings @ embeddings.transpose(1, 2)
        off_diagonal = (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (seeds * (seeds - 1))
        return (1 - off_diagonal).repeat_interleave(seeds).tolist()


def check_oracles(adapter_set: AdapterSet, cells: Sequence[PlannedCell], scales: Mapping[str, float]) -> None:
    """See that the oracles were trained on the weighted rewards that regret is measured in.

    Raises:
        ValueError: for oracles whose rewards were weighed in other units.
    """
    if not any(isinstance(cell.rule, Oracle) for cell in cells):
        return
    for oracle in adapter_set.oracles:
        ratios = [scales[name] / scale for name, scale in oracle.scales.items()]
        if max(ratios) > 1.001 * min(ratios):
            trained = ", ".join(f"{name}: {scale:g}" for name, scale in oracle.scales.items())
            given = ", ".join(f"{name}: {scales[name]:g}" for name in oracle.scales)
            raise ValueError(
                f"oracle {oracle.adapter.name!r} was trained in the units {trained}, and the scales here are {given}; "
                "its regret would be another reward's. Give its units as scales, or none, to have them measured"
            )


def _png(pixels: Tensor) -> bytes:
    buffer = BytesIO()
    to_image(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _claim(output: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Take an empty folder, one that an earlier run of the same evaluation began, or with `overwrite` any."""
    folder = check_output(output, overwrite=True, ours=evaluation_files)
    if overwrite:
        check_output(output, overwrite=True, ours=evaluation_files, writes=(DESCRIPTION, PARTS, *RESULTS))
        clear(output, evaluation_files(folder))
    file = folder / DESCRIPTION
    if file.is_file():
        stored = read_json(file, "an evaluation")
        stored.pop(MEASURED, None)
        if stored != json.loads(json.dumps(identity)):
            raise ValueError(
                f"output {output} holds another evaluation (its config, prompts or adapters differ); choose another or "
                "pass --overwrite"
            )
        return
    if not overwrite:
        check_output(output, overwrite=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, identity)

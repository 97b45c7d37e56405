"""What a step of fused sampling costs, as a ratio to one adapter with guidance, measured in turns in one run."""

import gc
import importlib.metadata
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from stepfuse.fuse.adapter import Objective
from stepfuse.fuse.batched import BatchedAdapters
from stepfuse.fuse.denoiser import Denoiser
from stepfuse.fuse.pipeline import latent_shape, quiet_libraries
from stepfuse.fuse.rules import get_rule
from stepfuse.fuse.sampler import FusedSampler
from stepfuse.fuse.variance import EtaSchedule
from stepfuse.scripts.benchmark.models import Model, random_conditioning, random_model, set_model
from stepfuse.scripts.benchmark.rivals import RIVALS, denoise
from stepfuse.scripts.costs import counted_rows, free_memory, machine, now, peak_memory

REFERENCE = "one adapter"
SEPARATE = "separate"  # product, each adapter in a forward of its own
WAYS = (SEPARATE, *RIVALS)  # beside the rules
MODES = ("", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
LIBRARIES = ("torch", "diffusers", "peft", "transformers")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        model: `sd15` or `sdxl` for random weights of that architecture, else a set.
        adapters: N of each row; the most of them are on the UNet throughout.
        rules: fusion rules.
        rivals: names in `RIVALS`, or `separate`: the product with each adapter in a forward of its own.
        images: a batch.
        height, width: pixels; by default the model's own.
        steps: denoising steps of one measurement.
        repeats: measurements of each row, of which the median counts.
        guidance_scale: g.
        rows_at_once: see `Denoiser`.
        compile: `regional` or `full` for our own; rivals and the reference stay as they are where it is empty.
        mode: of `torch.compile`.
        device, dtype: of the model.
        memory: measure each row's memory too, in a process of its own.

    Raises:
        ValueError: for counts below 1, and names that are not there.
    """

    model: str
    adapters: tuple[int, ...] = (1, 2, 4, 8)
    rules: tuple[str, ...] = ("product", "systematic", "soup")
    rivals: tuple[str, ...] = WAYS
    images: int = 8
    height: int | None = None
    width: int | None = None
    steps: int = 10
    repeats: int = 5
    guidance_scale: float = 5.0
    rows_at_once: int | None = None
    compile: str = ""
    mode: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    memory: bool = True

    def __post_init__(self) -> None:
        for name in ("images", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}; expected 1 or more")
        if not self.adapters or min(self.adapters) < 1:
            raise ValueError(f"adapters {list(self.adapters)}; expected numbers of 1 or more")
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}; expected one of {', '.join(MODES[1:])}")
        for rule in self.rules:
            if getattr(get_rule(rule), "needs", "") or rule in ("kl", "oracle", "base"):
                raise ValueError(f"rule {rule} is not measured here; expected one that fuses adapters without rewards")
        if strange := [rival for rival in self.rivals if rival not in WAYS]:
            raise ValueError(f"rival {strange[0]!r}; expected one of {', '.join(WAYS)}")


@dataclass(frozen=True)
class Row:
    """A row of the table: a way to sample, with so many adapters."""

    way: str
    adapters: int

    def __str__(self) -> str:
        return self.way if self.way == REFERENCE else f"{self.way}, {self.adapters} adapters"


def rows_of(settings: Settings) -> list[Row]:
    """The reference, then rules and rivals at each number of adapters."""
    rows = [Row(REFERENCE, 1)]
    for way in (*settings.rules, *settings.rivals):
        # A rule with one adapter is the reference; a rival has its own way with one.
        rows += [Row(way, n) for n in settings.adapters if n > 1 or way in WAYS]
    return rows


class Bench:
    """A model, ready to run each contestant from the same x_T."""

    def __init__(self, settings: Settings) -> None:
        quiet_libraries()
        self.settings = settings
        most = max(settings.adapters)
        dtype = getattr(torch, settings.dtype)
        build = random_model if settings.model in ("sd15", "sdxl") else set_model
        self.model: Model = build(settings.model, most, dtype=dtype, device=settings.device)
        pipeline = self.model.pipeline
        self.conditioning = random_conditioning(self.model, settings.images)
        shape = latent_shape(pipeline, settings.height, settings.width)
        self.x_T = torch.randn(settings.images, *shape, generator=torch.Generator().manual_seed(0))
        self.x_T = self.x_T.to(settings.device)
        etas = torch.linspace(0.8, 1.0, most).tolist()
        self.sampler = FusedSampler(
            pipeline=pipeline,
            objectives=tuple(
                Objective(name=name, reward=name, variance=EtaSchedule(eta=eta), beta=1.0)
                for name, eta in zip(self.model.adapters, etas, strict=True)
            ),
            denoiser=Denoiser.from_pipeline(pipeline, guidance="shared", guidance_scale=settings.guidance_scale),
            reference=EtaSchedule(eta=1.0),
            rule=get_rule("product"),
            num_inference_steps=settings.steps,
            default_weights={self.model.adapters[0]: 1.0},
        )

    def batch(self) -> None:
        """Put the adapters into one batch; rivals that copy the UNet do so before."""
        batched = BatchedAdapters(self.model.pipeline.unet, self.model.adapters)
        denoiser = replace(self.sampler.denoiser, batched=batched, rows_at_once=self.settings.rows_at_once)
        self.sampler = replace(self.sampler, denoiser=denoiser)
        if self.settings.compile:
            options = {"mode": self.settings.mode} if self.settings.mode else {}
            rows = self.settings.images * (max(self.settings.adapters) + 1)
            self.sampler.compile(self.settings.compile, rows=rows, **options)

    def way(self, row: Row) -> Callable[[], torch.Tensor]:
        """From x_T to x_0, its way; it holds only what it needs."""
        names, steps = self.model.adapters[: row.adapters], self.settings.steps
        x_T, conditioning = self.x_T, self.conditioning
        if row.way in RIVALS:
            blend = RIVALS[row.way](self.model, names, self.settings.guidance_scale)
            scheduler = self.sampler.denoiser.path.scheduler
            return lambda: denoise(blend, scheduler, steps, x_T, conditioning)
        sampler = self.sampler.with_rule("product" if row.way in (REFERENCE, SEPARATE) else row.way)
        if row.way == SEPARATE:
            sampler = replace(sampler, denoiser=replace(sampler.denoiser, batched=None))

        def ours() -> torch.Tensor:
            plan = sampler.plan(dict.fromkeys(names, 1.0), len(x_T))
            generators = [torch.Generator().manual_seed(seed) for seed in range(len(x_T))]
            return sampler.denoise(x_T, plan, conditioning, generators)

        return ours

    def rows_an_image(self, row: Row) -> float:
        """Rows of the network that an image takes at a step, counted; of rivals with networks of their own, known."""
        if row.way in RIVALS:
            return row.adapters + 1 if row.way == "mixed_batch" else 2 * row.adapters
        with counted_rows(self.model.pipeline.unet) as count:
            self.way(row)()
        return count() / self.settings.images / self.settings.steps


@torch.no_grad()
def benchmark_sampling(settings: Settings, *, progress: bool = True) -> dict[str, Any]:
    """Time every row in turns, `repeats` rounds, and measure each one's memory in a process of its own.

    A ratio is of two times of one round, so that what else the machine does falls on both; the median of all rounds
    counts. The first round warms up and is left out.
    """
    bench, rows = Bench(settings), rows_of(settings)
    device = torch.device(settings.device)
    ways: dict[Row, Callable[[], torch.Tensor]] = {}
    skipped: dict[str, str] = {}
    for row in (row for row in rows if row.way in RIVALS):
        if why := _too_large(row, bench.model.pipeline.unet, device):
            skipped[str(row)] = why
        else:
            ways[row] = bench.way(row)
    bench.batch()
    ways |= {row: bench.way(row) for row in rows if row.way not in RIVALS}
    rows = [row for row in rows if row in ways]
    seconds: dict[Row, list[float]] = {row: [] for row in rows}
    with tqdm(total=(settings.repeats + 1) * len(rows), disable=not progress, desc="time") as bar:
        for turn in range(settings.repeats + 1):
            for row in rows:
                bar.set_postfix_str(str(row))
                begin = now(device)
                ways[row]()
                if turn:
                    seconds[row].append(now(device) - begin)
                bar.update()
    networks = {row: bench.rows_an_image(row) for row in rows}
    model = bench.model
    del bench, ways
    gc.collect()
    memory = _memory(settings, rows, progress=progress) if settings.memory else {}
    reference = Row(REFERENCE, 1)
    table = []
    for row in rows:
        ratios = [a / b for a, b in zip(seconds[row], seconds[reference], strict=True)]
        weights, peak = memory.get(row, (None, None))
        table.append(
            {
                "way": row.way,
                "adapters": row.adapters,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "seconds_a_step": statistics.median(seconds[row]) / settings.steps,
                "rows_an_image": networks[row],
                "floor": networks[row] / networks[reference],
                "weights_mb": weights,
                "peak_memory_mb": peak,
            }
        )
    return {
        "machine": machine(device),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "settings": asdict(settings),
        "lora": {"rank": model.rank, "targets": list(model.targets)},
        "skipped": skipped,
        "rows": table,
    }


def _memory(settings: Settings, rows: Sequence[Row], *, progress: bool) -> dict[Row, tuple[float, float]]:
    """MB of weights, and at the peak of one step, of each row alone in a fresh process."""
    measured = {}
    spawn = multiprocessing.get_context("spawn")
    for row in tqdm(rows, disable=not progress, desc="memory"):
        alone = replace(settings, adapters=(row.adapters,), steps=1, compile="", mode="")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            measured[row] = process.submit(memory_of, alone, row).result()
    return measured


@torch.no_grad()
def memory_of(settings: Settings, row: Row) -> tuple[float, float]:
    """MB of weights, and at the peak of a run, in this process."""
    device = torch.device(settings.device)
    bench = Bench(settings)
    if row.way not in RIVALS:
        bench.batch()
    way, weights = bench.way(row), _bytes_of(bench.model.pipeline.unet)
    if row.way == "diffusion_blend":
        weights *= row.adapters
    del bench  # a rival with UNets of its own does without the first
    gc.collect()
    with peak_memory(device) as peak:
        way()
    return weights / 1e6, peak()


def _bytes_of(unet: nn.Module) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in (*unet.parameters(), *unet.buffers()))


def _too_large(row: Row, unet: nn.Module, device: torch.device) -> str | None:
    """Why a rival that copies the UNet cannot be run, if so."""
    copies = {"diffusion_blend": row.adapters, "mixed_batch": 1}.get(row.way, 0)
    free = free_memory(device)
    if copies * _bytes_of(unet) < 0.8 * free:
        return None
    return f"{copies} UNets of {_bytes_of(unet) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def markdown_table(results: dict[str, Any]) -> str:
    """The rows as a table: the ratio with its range over the rounds, and the ratio of the rows that the network ran."""
    lines = [
        "| way | adapters | time ÷ one adapter | range | rows ÷ its rows | ms a step | weights, MB | peak memory, MB |",
        "|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        memory = ["–" if row[key] is None else f"{row[key]:,.0f}" for key in ("weights_mb", "peak_memory_mb")]
        lines.append(
            f"| {row['way']} | {row['adapters']} | {row['ratio']:.2f} | {row['ratio_min']:.2f}–{row['ratio_max']:.2f} "
            f"| {row['floor']:.2f} | {1e3 * row['seconds_a_step']:.1f} | {' | '.join(memory)} |"
        )
    lines += [f"\n{row}: left out, {why}." for row, why in results["skipped"].items()]
    return "\n".join(lines)

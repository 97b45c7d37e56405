"""What a step of fused sampling costs, as a ratio to one adapter with guidance."""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import quiet_libraries
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.scripts.benchmark import harness, memory
from stepfuse.scripts.benchmark.architectures import ARCHITECTURES
from stepfuse.scripts.benchmark.harness import Measured, Method, cell, ratio_range
from stepfuse.scripts.benchmark.models import random_conditioning, random_model, set_model
from stepfuse.scripts.benchmark.settings import BASELINES, SEPARATE, SamplingBenchmark, stated_depth

ONE_ADAPTER = "one adapter"


@dataclass(frozen=True)
class Row:
    """A row of the table: a method of sampling, with a number of adapters."""

    method: str
    adapters: int

    def __str__(self) -> str:
        return self.method if self.method == ONE_ADAPTER else f"{self.method}, {self.adapters} adapters"


REFERENCE = Row(ONE_ADAPTER, 1)  # which ratios are to


def rows_of(settings: SamplingBenchmark) -> list[Row]:
    """The reference, then rules and baselines at each number of adapters; a rule with one adapter is the reference."""
    rules = [Row(rule, n) for rule in settings.rules for n in settings.adapters if n > 1]
    return [REFERENCE, *rules, *(Row(name, n) for name in settings.baselines for n in settings.adapters)]


@torch.no_grad()
def benchmark_sampling(settings: SamplingBenchmark, *, report: memory.Report = lambda results: None) -> dict[str, Any]:
    """Time every row in alternation, then measure each one's memory; both are reported as soon as they are known.

    Raises:
        ValueError: where one adapter does not fit in memory.
    """
    device = torch.device(settings.device)
    rows, missing = harness.available(rows_of(settings), BASELINES[1:])
    with harness.cpu_threads(settings.threads):
        bench = Bench(settings)
        measured = harness.measure(
            # Baselines first: they copy the network as it is before adapters are put into one batch.
            {row: partial(bench.method, row) for row in sorted(rows, key=lambda row: row.method not in BASELINES)},
            repeats=settings.repeats,
            device=device,
            required=[REFERENCE],
            hint="give fewer --images or a smaller --height",
        )
        config = bench.backbone.network.peft_config[bench.adapters[0]]
        lora = {"rank": config.r, "targets": sorted(config.target_modules)}
        del bench
        clear_device_cache(garbage_collection=True)  # each row loads the model again in its process
        described = asdict(settings)
        described["rivals"] = described.pop("baselines")  # their key in published results
        entries = {row: _entry(row, settings, measured) for row in rows if row in measured.seconds}
        results = harness.context(device) | {
            "settings": described,
            "depth": stated_depth(settings.model, settings.layers),
            "lora": lora,
            "skipped": missing | measured.skipped,
            "rows": list(entries.values()),
        }
        report(results)
        if settings.memory:
            memory.add_memory(results, entries, memory_of, settings, report)
    return results


def _entry(row: Row, settings: SamplingBenchmark, measured: Measured[Row]) -> dict[str, Any]:
    seconds, batch_rows = measured.seconds, measured.batch_rows
    separate = harness.ratios(seconds[row], seconds.get(Row(SEPARATE, row.adapters)))
    return {
        "way": row.method,
        "adapters": row.adapters,
        **harness.ratios(seconds[row], seconds[REFERENCE]),
        "ratio_to_separate": separate["ratio"],
        "seconds_a_step": statistics.median(seconds[row]) / settings.steps,
        "rows_an_image": batch_rows[row][0] / settings.images / settings.steps,
        "rows_ratio": batch_rows[row][0] / batch_rows[REFERENCE][0],
        "compiled": bool(settings.compile) and row.method not in BASELINES,
        "weights_mb": None,
        "peak_memory_mb": None,
    }


@torch.no_grad()
def memory_of(settings: SamplingBenchmark, row: Row) -> dict[str, float | None]:
    """MB of weights, LoRAs and their copies included, and at the peak of two steps, in this process."""
    device = torch.device(settings.device)
    with harness.cpu_threads(settings.threads):
        steps = min(settings.steps, 2)  # a scheduler with a terminal shift has no grid of one
        bench = Bench(replace(settings, adapters=(row.adapters,), steps=steps, compile="", mode=""))
        method = bench.method(row)
        weights = sum(network.get_memory_footprint() for network in method.networks)
        del bench  # a baseline that has copied the network does not need the first
        clear_device_cache(garbage_collection=True)
        return {"weights_mb": weights / 1e6, "peak_memory_mb": memory.peak_megabytes(method.run, device)}


def sampling_table(results: dict[str, Any]) -> str:
    compared = any(row.get("ratio_to_separate") for row in results["rows"])
    columns: harness.Columns = [
        ("method", cell("way")),
        ("adapters", cell("adapters")),
        ("rows an image", cell("rows_an_image", "g")),
        ("time ÷ one adapter", cell("ratio", ".2f")),
        ("range", ratio_range),
        *([("time ÷ separate", cell("ratio_to_separate", ".2f"))] if compared else []),
        ("rows ÷ its rows", cell("rows_ratio", ".2f")),
        ("ms a step", lambda row: f"{1e3 * row['seconds_a_step']:.1f}"),
        ("weights, MB", cell("weights_mb", ",.0f")),
        ("peak memory, MB", cell("peak_memory_mb", ",.0f")),
    ]
    return harness.results_table(columns, results)


def check_rules(names: Sequence[str]) -> None:
    """Check that rules fuse any adapters without rewards: the others have nothing to be compared with."""
    for name in names:
        rule = get_rule(name)
        if rule.needs or rule.accepts != "any":
            raise ValueError(f"rule {name} is not measured; expected one that fuses any adapters without rewards")


class Bench:
    """A model and what every method starts from: the same x_T and the same prompts."""

    def __init__(self, settings: SamplingBenchmark) -> None:
        quiet_libraries()
        check_rules(settings.rules)
        self.settings = settings
        dtype, most = getattr(torch, settings.dtype), max(settings.adapters)
        where: dict[str, Any] = dict(dtype=dtype, device=settings.device)
        if settings.model in ARCHITECTURES:
            self.pipeline = random_model(settings.model, most, layers=settings.layers, **where)
        else:
            self.pipeline = set_model(settings.model, most, **where)
        self.backbone = backbone = backbone_of(self.pipeline)
        self.adapters = tuple(backbone.network.peft_config)
        size: dict[str, Any] = dict(height=settings.height, width=settings.width)
        shape = backbone.shape(**size)
        device = torch.device(settings.device)
        self.conditioning = random_conditioning(backbone, settings.model, settings.images, **size, device=device)
        x_T = torch.randn(settings.images, *shape, generator=torch.Generator().manual_seed(0))
        self.x_T = x_T.to(settings.device)
        # Adapters are put into one batch, and compiled, in place: other methods then need a copy of the network.
        self.plain = copy.deepcopy(backbone.network) if settings.compile else backbone.network
        self._copies: dict[tuple[str, ...], nn.Module] = {}
        etas = torch.linspace(0.8, 1.0, most).tolist()
        source = "embedded" if backbone.embeds_guidance else "shared"
        guidance = Guidance(source=source, scale=settings.guidance_scale)
        self.sampler = FusedSampler(
            objectives=tuple(
                Objective(name=name, reward=name, variance=EtaSchedule(eta=eta), beta=1.0)
                for name, eta in zip(self.adapters, etas, strict=True)
            ),
            denoiser=Denoiser(backbone=backbone, path=backbone.path(shape), guidance=guidance),
            reference=EtaSchedule(eta=1.0),
            rule=get_rule("product"),
            num_inference_steps=settings.steps,
            default_weights={self.adapters[0]: 1.0},
        )

    def batch(self) -> None:
        """Put the adapters into one batch, and compile; networks are copied before."""
        batched = BatchedAdapters(self.backbone.network, self.adapters, self.backbone.unbatched)
        denoiser = replace(self.sampler.denoiser, batched=batched, rows_at_once=self.settings.rows_at_once)
        self.sampler = replace(self.sampler, denoiser=denoiser)
        if self.settings.compile:
            options = {"mode": self.settings.mode} if self.settings.mode else {}
            rows = self.settings.images * (max(self.settings.adapters) + 1)
            self.sampler.compile(self.settings.compile, rows=rows, **options)

    def copy_of(self, names: Sequence[str]) -> nn.Module:
        """A copy of the network with some of the adapters alone; the same one for the same names."""
        key = tuple(names)
        if key not in self._copies:
            network = self._copies[key] = copy.deepcopy(self.plain)
            network.set_adapter(list(names))  # first, for peft warns where an active adapter is deleted
            network.delete_adapters([name for name in self.adapters if name not in names])
        return self._copies[key]

    def method(self, row: Row) -> Method:
        """A row's method, which holds only what it needs.

        Raises:
            DoesNotFit: for a baseline whose copies of the network need more memory than is free.
        """
        names = self.adapters[: row.adapters]
        if row.method in BASELINES and row.method != SEPARATE:
            return self._baseline(row.method, names)
        if row.method != SEPARATE and self.sampler.denoiser.batched is None:
            self.batch()
        sampler = self.sampler.with_rule("product" if row.method in (ONE_ADAPTER, SEPARATE) else row.method)
        if row.method == SEPARATE:
            sampler = replace(sampler, denoiser=self.unbatched())
        x_T, conditioning = self.x_T, self.conditioning

        def sample() -> torch.Tensor:
            plan = sampler.plan(dict.fromkeys(names, 1.0), len(x_T))
            generators = [torch.Generator().manual_seed(seed) for seed in range(len(x_T))]
            return sampler.denoise(x_T, plan, conditioning, generators)

        return Method(run=sample, networks=(sampler.denoiser.network,))

    def unbatched(self) -> Denoiser:
        """The denoiser on the network without a batch of adapters."""
        plain = copy.copy(self.pipeline)
        setattr(plain, self.backbone.part, self.plain)
        return replace(self.sampler.denoiser, backbone=backbone_of(plain), batched=None)

    def _baseline(self, name: str, names: Sequence[str]) -> Method:
        from stepfuse.scripts.baselines.sampling import BASELINES, denoise

        baseline = BASELINES[name]
        memory.check_copies(self.plain, baseline.copies(names), torch.device(self.settings.device))
        denoiser = self.unbatched()
        blend, networks = baseline.build(denoiser, self.copy_of, names)
        run = partial(denoise, blend, denoiser.path, self.settings.steps, self.x_T, self.conditioning)
        return Method(run=run, networks=networks)

"""What the bodies of several commands do with torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stepfuse.data import emoji
from stepfuse.data.devices import default_device
from stepfuse.data.json_file import write_json
from stepfuse.data.prompts import load_prompts
from stepfuse.fuse.backbones.loading import quiet_libraries
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.scripts.cli.parser import Arguments


def prepare_device(name: str | None) -> str:
    """Silence the libraries, and return the name of a device that works; without a name, cuda if available, else cpu.

    Raises:
        ValueError: If the device cannot be used.
    """
    quiet_libraries()
    name = name or default_device()
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown, or not part of this build of torch
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
    return name


def load_sampler(adapter_set: AdapterSet, arguments: Arguments, **options: Any) -> FusedSampler:
    device = prepare_device(arguments.device)
    return FusedSampler.from_pretrained(adapter_set, dtype=getattr(torch, arguments.dtype), device=device, **options)


def heldout_prompts(adapter_set: AdapterSet, count: int) -> list[str]:
    """Prompts that suit the base model of a set and that no bundled adapter was trained on."""
    kind = "emoji-heldout" if adapter_set.base["name_or_path"] in emoji.BASES else "colours-heldout"
    return load_prompts(f"{kind}:{count}")


def write_results(
    benchmark: Callable[..., dict[str, Any]], table: Callable[[dict[str, Any]], str], settings: Any, output: Path
) -> None:
    """Run a benchmark, write its results to a JSON file while they arrive, and print them as a table."""
    quiet_libraries()
    results = benchmark(settings, report=lambda results: write_json(output, results))
    print(results["machine"])
    print(table(results))
    print(output)

"""The card of a set: what it holds, how it was made, what was measured, and how it is used."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from stepfuse.fuse.adapter import Adapter
from stepfuse.fuse.adapter_set import AdapterSet
from stepfuse.fuse.variance import schedule_to_dict
from stepfuse.fuse.weights import label_weights

CARD, FRONTS = "README.md", "fronts.png"
CODE = """```python
import torch

from stepfuse.fuse.sampler import FusedSampler

sampler = FusedSampler.from_pretrained("{folder}")
(image,) = sampler.sample(["a lighthouse at dusk"], {weights}, generator=torch.Generator().manual_seed(0))
```"""


def write_card(
    folder: Path, loaded: AdapterSet, summary: dict[str, Any] | None = None, pictures: Path | None = None
) -> Path:
    """Write the set's README.md.

    Args:
        summary: of an evaluation of it; without one the card says that none was made.
        pictures: the evaluation's folder, whose plot of the fronts goes along.
    """
    if pictures is not None and (pictures / FRONTS).is_file():
        shutil.copyfile(pictures / FRONTS, folder / FRONTS)
    file = folder / CARD
    file.write_text(card(loaded, summary, folder=str(folder), plot=(folder / FRONTS).is_file()))
    return file


def card(loaded: AdapterSet, summary: dict[str, Any] | None, *, folder: str, plot: bool) -> str:
    """The card as Markdown with the hub's front matter; every figure is of the set or of the summary."""
    base = loaded.base["name_or_path"]
    front: dict[str, Any] = {"library_name": "diffusers", "tags": ["stepfuse", "lora", "text-to-image"]}
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):  # a hub id
        front |= {"base_model": base, "base_model_relation": "adapter"}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {', '.join(loaded.names)}",
        f"{_count(len(loaded.adapters), 'LoRA')} of `{base}`, one for each reward, to be fused while denoising for any "
        f"weights. Guidance is {loaded.guidance}, scale {loaded.guidance_scale:g}; {loaded.num_inference_steps} steps.",
        CODE.format(folder=folder, weights=json.dumps(loaded.default_weights)),
        "Each adapter is a plain diffusers LoRA in a folder of its own, and alone "
        f'`pipe.load_lora_weights("{folder}/{loaded.names[0]}")` reads it.',
        "## Adapters",
        _adapters(loaded),
        "Reward: mean over the validation images that training drew, before and after. KL: of the last step of "
        "training, in nats an image.",
        "## Measured",
        _measured(loaded, summary),
        *([f"![Mean rewards of every pair of objectives]({FRONTS})"] if plot else []),
        "## Limits",
        _limits(loaded),
    ]
    return "\n\n".join(parts) + "\n"


def _adapters(loaded: AdapterSet) -> str:
    lines = [
        "| adapter | reward | trained by | variance | beta | reward before → after | KL |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    lines += [_adapter(adapter) for adapter in loaded.adapters]
    lines += [_adapter(oracle.adapter, label_weights(oracle.weights)) for oracle in loaded.oracles]
    return "\n".join(lines)


def _adapter(adapter: Adapter, weights: str = "") -> str:
    record, objective = adapter.record, adapter.objective
    schedule = schedule_to_dict(objective.variance)
    values = [round(v, 3) for v in schedule.get("offsets", [])]
    variance = f"{schedule['kind']} {schedule.get('eta', '')}".strip() + (f", offsets {values}" if values else "")
    shown = [record.get("validation", {}).get(moment, {}).get("reward") for moment in ("before", "after")]
    moved = " → ".join("?" if value is None else f"{value:.4g}" for value in shown)
    trained = f"{record.get('algorithm', '?').upper()}, {record.get('steps', '?')} steps"
    kl = "–" if record.get("kl") is None else f"{record['kl']:.4g}"
    reward = f"oracle of {weights}" if weights else f"`{objective.reward}`"
    return f"| {adapter.name} | {reward} | {trained} | {variance} | {objective.beta:g} | {moved} | {kl} |"


def _measured(loaded: AdapterSet, summary: dict[str, Any] | None) -> str:
    """Gains over the base, an adapter or mixture a row."""
    if summary is None:
        return "No evaluation was made of this set."
    rewards = summary["objectives"]
    lines = [
        f"Gain over the base on {summary['prompts']} prompts × {summary['seeds']} seeds, with 95 % intervals by a "
        "paired bootstrap over prompts.",
        "",
        f"| rule | weights | {' | '.join(rewards)} |",
        f"|---|---|{'--:|' * len(rewards)}",
    ]
    for cell in summary["cells"]:
        gains = [cell["rewards"].get(reward, {}).get("gain") for reward in rewards.values()]
        if all(gain is not None for gain in gains):
            strength = "" if cell["strength"] == 1 else f", strength {cell['strength']:g}"
            shown = " | ".join(_interval(gain) for gain in gains)
            lines.append(f"| `{cell['rule']}`{strength} | {cell['weights']} | {shown} |")
    return "\n".join(lines)


def _interval(gain: dict[str, Any]) -> str:
    if gain["low"] is None:
        return f"{gain['mean']:+.3g}"
    return f"{gain['mean']:+.3g} [{gain['low']:+.3g}, {gain['high']:+.3g}]"


def _limits(loaded: AdapterSet) -> str:
    """What is known against it."""
    lines = ["Fused images are of the base: its licence, and what it must not be used for, hold for them too."]
    for adapter in loaded.adapters:
        for entry in adapter.record.get("health", []):
            lines.append(f"- `{adapter.name}`: step {entry['step']}, {entry['what']}.")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""The card of a set: what it holds, how it was made, what was measured, and how it is used."""

import html
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from stepfuse.data import emoji
from stepfuse.data.markdown import markdown_table
from stepfuse.data.output_file import atomic_file
from stepfuse.data.text_files import file_name, write_text
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.schedules import schedule_label
from stepfuse.fuse.rules.weights import label_weights, shown_weights
from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.fuse.sets.hub import parse_id
from stepfuse.fuse.sets.kl_card import kl_text, write_kl_picture
from stepfuse.fuse.sets.manifest import CARD, FRONTS, MANIFEST, SHOWN, STRIP
from stepfuse.fuse.sets.set_name import set_name
from stepfuse.fuse.sets.set_training import STRENGTHS
from stepfuse.rewards.registry import local_parts

CODE_MARKS = str.maketrans("`|<>[]", "'¦‹›()")
CODE = """```python
import torch

from stepfuse import FusedPipeline

pipe = FusedPipeline.from_pretrained("{source}")
image = pipe("{prompt}", weights={weights}, generator=torch.Generator().manual_seed(0)).images[0]
```"""
LOAD_ONE = """```python
pipe.load_lora_weights("{source}", subfolder="{name}", weight_name="{file}")
```"""


def write_card(folder: Path, loaded: AdapterSet, pictures: Path | None = None, source: str | None = None) -> Path:
    """Write the set's README.md; ValueError for one that stepfuse did not write, which is kept.

    Args:
        pictures: an evaluation's folder, whose plot of the fronts is copied.
        source: what users of the card load the set by; by default the folder.
    """
    file = check_card(folder)
    if pictures is not None and (pictures / FRONTS).is_file():
        with atomic_file(folder / FRONTS) as picture:
            shutil.copyfile(pictures / FRONTS, picture)
    write_kl_picture(folder, loaded)
    title = set_name(folder) if source is None else ""
    with atomic_file(file) as temporary:
        write_text(
            temporary, card(loaded, source=source or file_name(folder), title=title, shown=shown_on_card(folder))
        )
    return file


def shown_on_card(folder: Path) -> list[str]:
    """The pictures in a set's folder."""
    return [name for name in SHOWN if name != CARD and (folder / name).is_file()]


def check_card(folder: Path) -> Path:
    """The path of a set's README.md; ValueError for one that stepfuse did not write."""
    file = folder / CARD
    if file.exists() and not is_card(file):
        raise ValueError(f"{file} was not written by stepfuse; move it, and the card can be written")
    return file


def is_card(file: Path) -> bool:
    """Whether a README.md is a card as `write_card` writes one, by the tag in its front matter."""
    try:
        front = yaml.safe_load(file.read_text(encoding="utf-8").split("---\n")[1])
        return "stepfuse" in front["tags"]
    except (OSError, ValueError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return False


def card(loaded: AdapterSet, *, source: str, shown: list[str], title: str = "") -> str:
    """The card as Markdown with the hub's front matter; every figure is of the set.

    Args:
        source: a hub id, or a folder.
        shown: pictures beside it.
        title: by default the last part of the source.
    """
    title = title or source.rpartition("/")[2]
    objectives, training = ", ".join(loaded.names), loaded.training
    weights = json.dumps({name: float(f"{weight:g}") for name, weight in loaded.default_weights.items()})
    parts = [
        f"---\n{front_matter(loaded, title)}---",
        f"# {plain(title)}",
        f"{_count(len(loaded.adapters), 'LoRA')} of {_base(loaded)}, one for each reward ({objectives}), to be fused "
        "while denoising for any weights by stepfuse ([MSDDA](https://arxiv.org/abs/2604.14379)): no training, and no "
        f"reward where images are generated. Guidance is {loaded.describe_guidance()}; "
        f"{loaded.num_inference_steps} steps; {_size(loaded)}rule {code(loaded.default_rule)}.",
        *training.sentences(),
        *([f"![The base, each adapter alone, and their mixture, of the same noise]({STRIP})"] * (STRIP in shown)),
        CODE.format(source=source, prompt=_prompt(loaded), weights=weights),
        "Each adapter is a plain diffusers LoRA in a folder of its own, and loads alone into the base's pipeline:",
        LOAD_ONE.format(source=source, name=loaded.adapters[0].folder.name, file=WEIGHTS),
        "ComfyUI reads the same files, except DoRAs. For AUTOMATIC1111: "
        f"`stepfuse set export {source} {loaded.names[0]} --format kohya`; a mixture as "
        f'one file: `stepfuse set merge {source} --weights "{label_weights(loaded.default_weights)}"`.'
        + (STRENGTHS if training.rule == "soup" and loaded.guidance != "shared" else ""),
        "## Adapters",
        _adapters(loaded),
        "Gain: of the mean reward over the base, with its 95 % interval, by the evaluation where one was made and else "
        "over the validation images of training. KL: of the last step of training, in nats an image.",
        *kl_text(loaded, shown),
        "## Measured",
        _measured(loaded),
        *([f"![Mean rewards of every pair of objectives]({FRONTS})"] * (FRONTS in shown)),
        "## Limits",
        _limits(loaded),
        "## Licences",
        _licences(loaded),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(loaded: AdapterSet, title: str) -> str:
    """The hub's metadata, with what was measured as its model-index."""
    known: dict[str, Any] = {}
    if license := one_license(loaded):
        known["license"] = license
    if parse_id(base := loaded.base["name_or_path"]):
        known |= {"base_model": base, "base_model_relation": "adapter"}
    data = ModelCardData(
        **known,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["stepfuse", "lora", "text-to-image", "multi-objective", "reinforcement-learning"],
        model_name=title,
        eval_results=_results(loaded) or None,
    )
    return data.to_yaml(line_break="\n") + "\n"


def one_license(loaded: AdapterSet) -> str | None:
    """The licence of the adapters, `other` if they have several; None if none is stated."""
    licences = {adapter.license for adapter in loaded.all_adapters if adapter.license}
    return "other" if len(licences) > 1 else licences.pop() if licences else None


def plain(text: object) -> str:
    """Any text as plain text in Markdown: no HTML, link, table cell, line or code comes of it."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    for mark in "\\|`[]*":
        escaped = escaped.replace(mark, f"&#{ord(mark)};")
    return escaped


def code(text: object) -> str:
    """Any text as code in Markdown, where entities are not read: its brackets and marks are replaced."""
    return f"`{' '.join(str(text).split()).translate(CODE_MARKS)}`"


def _results(loaded: AdapterSet) -> list[EvalResult]:
    """Gains of the set's mixtures where it was evaluated, else each adapter's on the reward it was trained on."""
    data = "validation images of training"
    gains = [(f"{a.objective.reward}, gain over the base", a.gain) for a in loaded.adapters if a.gain]
    if (evaluation := loaded.evaluation) is not None:
        data = f"{_count(evaluation['prompts'], 'prompt')}, {_count(evaluation['seeds'], 'seed')}"
        gains = [
            (f"{evaluation['objectives'][name]}, gain over the base at {shown_weights(cell['weights'])}", gain)
            for cell in evaluation["cells"]
            if cell["rule"] == loaded.default_rule and cell["strength"] == 1
            for name, gain in cell["gains"].items()
        ]
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=data,
            metric_type="reward",
            metric_name=metric,
            metric_value=round(gain["mean"], 6),
        )
        for metric, gain in gains
    ]


def _base(loaded: AdapterSet) -> str:
    name, revision = loaded.base["name_or_path"], loaded.base.get("revision")
    link = f"[{name}](https://huggingface.co/{name})" if parse_id(name) else code(name)
    return f"{link} at {code(revision)}" if revision else link


def _adapters(loaded: AdapterSet) -> str:
    headings = ["adapter", "reward", "trained by", "variance", "beta", "rank", "gain", "KL", "licence"]
    rows = [_adapter(adapter) for adapter in loaded.adapters]
    rows += [_adapter(oracle.adapter, shown_weights(oracle.weights)) for oracle in loaded.oracles]
    return markdown_table(headings, rows, right=["beta", "rank", "gain", "KL"])


def _adapter(adapter: Adapter, weights: str = "") -> tuple[object, ...]:
    record, objective = adapter.record, adapter.objective
    trained = f"{plain(record.get('algorithm', '?')).upper()}, {record.get('steps', '?')} steps"
    if adapter.source:
        trained = f"elsewhere: {plain(adapter.source)}"
    kl = "–" if record.get("kl") is None else f"{record['kl']:.4g}"
    reward = f"oracle of {weights}" if weights else code(objective.reward)
    variance, beta, gain = schedule_label(objective.variance), f"{objective.beta:g}", _interval(adapter.gain)
    return (adapter.name, reward, trained, variance, beta, adapter.rank, gain, kl, adapter.license or "?")


def _measured(loaded: AdapterSet) -> str:
    evaluation = loaded.evaluation
    if evaluation is None:
        return "No evaluation was made of this set."
    names = list(evaluation["objectives"])
    mixture = label_weights(loaded.default_weights)
    shown = [cell for cell in evaluation["cells"] if cell["rule"] == loaded.default_rule or cell["weights"] == mixture]
    rows = []
    for cell in shown:
        strength = "" if cell["strength"] == 1 else f", strength {cell['strength']:g}"
        gains = [_interval(cell["gains"].get(name)) for name in names]
        rows.append([f"{code(cell['rule'])}{strength}", plain(shown_weights(cell["weights"])), *gains])
    parts = [
        f"Gain over the base on {_count(evaluation['prompts'], 'prompt')} × {_count(evaluation['seeds'], 'seed')}, "
        "with 95 % intervals by a paired bootstrap over prompts.",
        markdown_table(["rule", "weights", *names], rows, right=names),
    ]
    if hidden := len(evaluation["cells"]) - len(shown):
        parts.append(f"{_count(hidden, 'row')} more, other rules at other weights, in `{MANIFEST}`.")
    return "\n\n".join(parts)


def _interval(gain: dict[str, Any] | None) -> str:
    if not gain:
        return "?"
    return f"{gain['mean']:+.3g}" + ("" if gain["low"] is None else f" [{gain['low']:+.3g}, {gain['high']:+.3g}]")


def _limits(loaded: AdapterSet) -> str:
    lines = ["Fused images are of the base: its licence, and what it must not be used for, hold for them too."]
    lines += ["A reward is what was optimised, not what was meant: what it does not see, it does not keep."]
    for adapter in loaded.adapters:
        if adapter.source:
            lines.append(f"- `{adapter.name}` was trained elsewhere; its variance schedule is declared, not measured.")
        for reward, what in local_parts(adapter.objective.reward):
            lines.append(
                f"- `{adapter.name}`: its reward {code(reward)} is {what} of its author and not part of the set, which "
                "cannot be evaluated by it elsewhere."
            )
        for entry in adapter.record.get("health") or []:
            lines.append(f"- `{adapter.name}`: step {plain(entry['step'])}, {plain(entry['what'])}.")
    return "\n".join(lines)


def _licences(loaded: AdapterSet) -> str:
    bundled = emoji.LICENCE if loaded.base["name_or_path"] in emoji.BASES else None
    base = loaded.base.get("license") or bundled or "not stated here: see its own page"
    rows = [(adapter.name, plain(adapter.license or "not stated")) for adapter in loaded.all_adapters]
    return markdown_table(["part", "licence"], [(f"base, {_base(loaded)}", plain(base)), *rows])


def _prompt(loaded: AdapterSet) -> str:
    """A prompt that the base model has learnt."""
    return "a fox on a green background" if loaded.base["name_or_path"] in emoji.BASES else "a lighthouse at dusk"


def _size(loaded: AdapterSet) -> str:
    resolution = loaded.base.get("resolution")
    return f"{resolution} × {resolution} pixels; " if resolution else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

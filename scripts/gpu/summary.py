"""The results of the check as tables. Nothing here imports torch."""

from collections.abc import Iterator
from typing import Any

from stepfuse.data.markdown import markdown_table
from stepfuse.scripts.gpu.parts import COMPILED

BASELINES = ("diffusion_blend", "set_adapters", "mixed_batch")
NONE = "–"


def summary(results: dict[str, Any]) -> str:
    """What every kind of part found, then each part that has not passed and why."""
    parts = results["parts"]
    found = {name: part["result"] for name, part in parts.items() if part.get("result")}
    tables = [_sampling(found), _training(found), _profiles(found)]
    passed = [name for name, part in parts.items() if part["status"] == "passed"]
    lines = [f"{results.get('machine', '')}: {len(passed)} of {len(parts)} parts passed"]
    if tests := found.get("a", {}).get("tests"):
        outcomes = list(tests.values())
        lines.append(f"tests that need a GPU: {outcomes.count('passed')} of {len(outcomes)} passed")
    if found.get("e", {}).get("equal"):
        lines.append("killed and resumed: the adapter is equal to the bit")
    lines += [f"{name}: {part['status']}, {part['reason']}" for name, part in parts.items() if "reason" in part]
    return "\n\n".join([*filter(None, tables), "\n".join(lines)])


def _sampling(found: dict[str, Any]) -> str:
    """Milliseconds a step of the product, and the eager baselines' times by its best one."""
    rows = [row for model, images, modes in _measured(found) for row in _of_model(model, images, modes)]
    titles = ["model", "images", "adapters", *(f"{how}, ms" for how in COMPILED)]
    titles += [f"{how} ÷ one adapter" for how in COMPILED]
    titles += [f"{name} ÷ best" for name in BASELINES]
    return markdown_table(titles, rows, right=titles[1:]) if rows else ""


def _measured(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, dict[tuple[str, int], dict]]]]:
    """By model and number of images: the entries of each mode by method and number of adapters."""
    groups: dict[tuple[str, str], dict[str, dict[tuple[str, int], dict]]] = {}
    for name, result in found.items():
        if name.startswith("b-"):
            _, model, how, images = name.split("-")
            entries = {(row["way"], row["adapters"]): row for row in result["rows"]}
            groups.setdefault((model, images), {})[how] = entries
    for (model, images), modes in groups.items():
        yield model, images, modes


def _of_model(model: str, images: str, modes: dict[str, dict[tuple[str, int], dict]]) -> Iterator[list[str]]:
    counts = sorted({adapters for entries in modes.values() for _, adapters in entries} | {1})
    for n in counts:
        method = "one adapter" if n == 1 else "product"  # a product of one is that adapter
        own = {how: modes.get(how, {}).get((method, n)) for how in COMPILED}
        seconds = [entry["seconds_a_step"] for entry in own.values() if entry]
        baselines = [modes.get("eager", {}).get((name, n)) for name in BASELINES]
        yield [
            model,
            images,
            str(n),
            *(f"{1e3 * entry['seconds_a_step']:.1f}" if entry else NONE for entry in own.values()),
            *(f"{entry['ratio']:.2f}" if entry else NONE for entry in own.values()),
            *(f"{entry['seconds_a_step'] / min(seconds):.2f}" if entry and seconds else NONE for entry in baselines),
        ]


def _training(found: dict[str, Any]) -> str:
    titles = ["model", "algorithm", "method", "images/s", "baseline's time ÷ its time", "peak memory, MB"]
    rows = [
        [
            name.split("-")[1],
            row["algorithm"],
            row["name"],
            f"{row['images_per_second']:.3g}",
            NONE if row["ratio"] is None else f"{row['ratio']:.2f}",
            NONE if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:,.0f}",
        ]
        for name, result in found.items()
        if name.startswith("c-")
        for row in result["rows"]
    ]
    return markdown_table(titles, rows, right=titles[3:]) if rows else ""


def _profiles(found: dict[str, Any]) -> str:
    kinds = ("launches", "waits", "copies", "kernels")
    titles = ["profile", "ms", *(f"{kind}, % (number)" for kind in kinds)]
    rows = [
        [
            name.removeprefix("d-"),
            f"{1e3 * result['seconds']:.1f}",
            *(f"{100 * result[kind]['share']:.0f} ({result[kind]['count']})" for kind in kinds),
        ]
        for name, result in found.items()
        if name.startswith("d-")
    ]
    return markdown_table(titles, rows, right=titles[1:]) if rows else ""

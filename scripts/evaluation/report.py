"""The report of an evaluation: one HTML page that needs nothing else."""

import base64
import io
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from stepfuse.data.intervals import excludes_zero, interval_text
from stepfuse.data.text_files import write_text
from stepfuse.scripts.evaluation.findings import findings
from stepfuse.scripts.evaluation.metric import finite
from stepfuse.scripts.evaluation.plots import edge, keys, plots, swatches
from stepfuse.scripts.evaluation.setup import Setup
from stepfuse.scripts.evaluation.tables import cells_table, rules_table

SHOWN = 128  # pixels of the page: the longer side of an image is no larger
LARGEST = 256  # pixels; what is larger is shrunk: a page of hundreds of photographs does not open


def write_report(file: Path, results: pd.DataFrame, summary: dict, setup: Setup) -> None:
    """Write the page: images from weight to weight, plots, tables, and then findings and what was measured."""
    rules = list(summary["rules"])
    marks = swatches(rules)
    template = _environment(html=True).get_template("report.html.j2")
    page = template.render(
        setup=setup,
        summary=summary,
        findings=sentences(summary, html=True),
        plots=[{"title": plot["title"], "svg": Markup(plot["svg"])} for plot in plots(summary)],
        keys=[{"mark": Markup(mark), "label": label} for mark, label in keys(summary)],
        legend=[{"rule": rule, "mark": Markup(marks[rule])} for rule in rules],
        tables={"Rules": rules_table(summary), "Cells": cells_table(summary)},
        strips=strips(results, summary),
    )
    write_text(file, page)


def sentences(summary: dict, *, html: bool = False) -> list[str]:
    """The findings in words, as the page and the command line give them."""
    macros = _environment(html=html).get_template("findings.j2").module
    return [getattr(macros, finding.kind)(finding) for finding in findings(summary)]


def _environment(*, html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=html, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"interval": interval_text, "signed": partial(interval_text, signed=True)}
    environment.tests["excluding_zero"] = excludes_zero
    return environment


def strips(results: pd.DataFrame, summary: dict) -> list[dict[str, Any]]:
    """Blocks of one pair of objectives, prompt and seed: a row for each rule and strength, a column for each weight.

    Images off every edge come last, as "other weights".
    """
    images = _images(results)
    shots = list(dict.fromkeys((prompt, seed) for _, _, _, prompt, seed in images))
    drawn = {key[:3] for key in images}
    cells = [cell for cell in summary["cells"] if _key(cell) in drawn and cell["rule"] != "base"]
    base = next(_key(cell) for cell in summary["cells"] if cell["rule"] == "base")
    groups = []
    for first, second in combinations(summary["objectives"], 2):
        on_edge = [(cell, round(cell["shares"][second], 6)) for cell in edge(cells, first, second)]
        columns = {share: f"{1 - share:.3g} / {share:.3g}" for share in sorted({share for _, share in on_edge})}
        groups.append((f"{first} / {second}", on_edge, columns))
    on_edges = {_key(cell) for _, on_edge, _ in groups for cell, _ in on_edge}
    others = [(cell, cell["weights"]) for cell in cells if _key(cell) not in on_edges]
    groups.append(("other weights", others, {weights: weights.replace(",", ", ") for _, weights in others}))
    blocks = [
        _strip(title, members, columns, images, base, shot, list(summary["rules"]))
        for title, members, columns in groups
        for shot in shots
    ]
    return [block for block in blocks if block["rows"]]


def _strip(
    title: str,
    members: list[tuple[dict, Any]],
    columns: dict[Any, str],
    images: dict[tuple, dict[str, Any]],
    base: tuple,
    shot: tuple[str, int],
    rules: list[str],
) -> dict[str, Any]:
    rows: dict[tuple[str, float], dict[Any, dict[str, Any]]] = {}
    for cell, column in members:
        if picture := images.get((*_key(cell), *shot)):
            alt = f"{shot[0]}, seed {shot[1]}: {cell['rule']} at {cell['weights']}, strength {cell['strength']:g}"
            rows.setdefault((cell["rule"], cell["strength"]), {})[column] = {**picture, "alt": alt}
    base_image = images.get((*base, *shot))
    return {
        "title": title,
        "prompt": shot[0],
        "seed": shot[1],
        "columns": list(columns.values()),
        "base": {**base_image, "alt": f"{shot[0]}, seed {shot[1]}: base"} if base_image else None,
        "rows": [
            {
                "label": rule if strength == 1 else f"{rule}, strength {strength:g}",
                "images": [row.get(c) for c in columns],
            }
            for (rule, strength), row in sorted(rows.items(), key=lambda row: (rules.index(row[0][0]), row[0][1]))
        ],
    }


def _key(cell: dict) -> tuple[str, str, float | None]:
    return cell["rule"], cell["weights"], cell["strength"]


def _images(results: pd.DataFrame) -> dict[tuple, dict[str, Any]]:
    """Rule, weights, strength, prompt and seed → picture, in the order of the table."""
    if "image" not in results:
        return {}
    rows = results[results["image"].map(lambda image: isinstance(image, bytes))]
    columns = ["rule", "weights", "strength", "prompt", "seed", "image"]
    return {
        (rule, weights, finite(strength), prompt, seed): _picture(image)
        for rule, weights, strength, prompt, seed, image in rows[columns].itertuples(index=False)
    }


def _picture(png: bytes) -> dict[str, Any]:
    """A data URI and the size an image is shown at; `small` images are shown enlarged, without smoothing."""
    kind = "png"
    with Image.open(io.BytesIO(png)) as image:
        side = max(image.size)
        scale = max(1, SHOWN // side) if side <= SHOWN else SHOWN / side
        width, height = (max(1, round(length * scale)) for length in image.size)
        if side > LARGEST:
            image.thumbnail((LARGEST, LARGEST))
            file = io.BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=88)
            png, kind = file.getvalue(), "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(png).decode()}"
    return {"src": source, "width": width, "height": height, "small": side <= SHOWN // 2}

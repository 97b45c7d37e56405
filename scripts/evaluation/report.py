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
from stepfuse.data.palette import DARK, LIGHT, css_variables
from stepfuse.data.text_files import write_text
from stepfuse.fuse.rules.registry import RULES
from stepfuse.fuse.rules.weights import shown_weights
from stepfuse.fuse.sampling.pictures import weights_heading
from stepfuse.scripts.evaluation.config import Rules, Setup
from stepfuse.scripts.evaluation.findings import findings
from stepfuse.scripts.evaluation.metric import finite
from stepfuse.scripts.evaluation.plots import edge, labels, plots, swatches
from stepfuse.scripts.evaluation.tables import cells_table, rules_table

SHOWN = 128  # pixels of the page: the longer side of an image is no larger
LARGEST = 256  # pixels; a larger image is shrunk, because a browser cannot open a page of hundreds of photographs
QUALITY = 95  # of WebP: a quarter of PNG's size, with small errors at edges; results.parquet has the exact image
Key = tuple[str, str, float | None]  # of a cell: rule, weights, strength
Picture = dict[str, Any]  # the attributes of an <img>


def write_report(file: Path, results: pd.DataFrame, summary: dict, setup: Setup) -> None:
    """Write the page: images from weight to weight, plots, tables, and then findings and what was measured."""
    template = _environment(html=True).get_template("report.html.j2")
    page = template.render(
        setup=setup,
        summary=summary,
        findings=sentences(summary, setup.rules, html=True),
        plots=[{"title": plot["title"], "svg": Markup(plot["svg"])} for plot in plots(summary)],
        swatches=swatches(summary),
        labels=labels(summary),
        tables={"Rules": rules_table(summary), "Cells": cells_table(summary)},
        strips=strips(results, summary),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
    )
    write_text(file, page)


def sentences(summary: dict, rules: Rules = RULES, *, html: bool = False) -> list[str]:
    """The findings in words, as the page and the command line give them."""
    macros = _environment(html=html).get_template("findings.j2").module
    return [getattr(macros, finding.kind)(finding) for finding in findings(summary, rules)]


def _environment(*, html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=html, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"interval": interval_text, "signed": partial(interval_text, signed=True)}
    environment.filters["weights"] = shown_weights
    environment.tests["excluding_zero"] = excludes_zero
    return environment


def strips(results: pd.DataFrame, summary: dict) -> list[dict[str, Any]]:
    """Blocks of one pair of objectives, prompt and seed: a row for each rule and strength, a column for each weight.

    Images off every edge come last, as "other weights".
    """
    pictures = _pictures(results)
    drawn = {key for shot in pictures.values() for key in shot}
    cells = [cell for cell in summary["cells"] if _key(cell) in drawn and cell["rule"] != "base"]
    base = next(_key(cell) for cell in summary["cells"] if cell["rule"] == "base")
    groups, on_edges = [], set()
    for first, second in combinations(summary["objectives"], 2):
        members = [(cell, round(cell["shares"][second], 6)) for cell in edge(cells, first, second)]
        columns = {
            share: weights_heading({first: 1 - share, second: share})
            for share in sorted({share for _, share in members})
        }
        groups.append((f"{first} / {second}", members, columns))
        on_edges |= {_key(cell) for cell, _ in members}
    others = [(cell, cell["weights"]) for cell in cells if _key(cell) not in on_edges]
    groups.append(("other weights", others, {weights: weights_heading(weights) for _, weights in others}))
    blocks = []
    for title, members, columns in groups:
        for (prompt, seed), shot in pictures.items():
            block = {"title": title, "prompt": prompt, "seed": seed, "columns": [*columns.values()]}
            if rows := _rows(members, list(columns), shot, list(summary["rules"])):
                blocks.append(block | {"base": shot.get(base), "rows": rows})
    return blocks


def _rows(members: list[tuple[dict, Any]], columns: list, shot: dict[Key, Picture], rules: list[str]) -> list[dict]:
    """The rows of a block: for each rule and strength the picture of every column that has one."""
    rows: dict[tuple[int, float], dict[Any, Picture]] = {}
    for cell, column in members:
        if picture := shot.get(_key(cell)):
            rows.setdefault((rules.index(cell["rule"]), cell["strength"]), {})[column] = picture
    return [
        {
            "label": rules[i] if strength == 1 else f"{rules[i]}, strength {strength:g}",
            "images": [rows[i, strength].get(column) for column in columns],
        }
        for i, strength in sorted(rows)
    ]


def _key(cell: dict) -> Key:
    return cell["rule"], cell["weights"], cell["strength"]


def _pictures(results: pd.DataFrame) -> dict[tuple[str, int], dict[Key, Picture]]:
    """(prompt, seed) → the picture of each cell that kept one, in the order of the table."""
    pictures: dict[tuple[str, int], dict[Key, Picture]] = {}
    columns = ["rule", "weights", "strength", "prompt", "seed", "image"]
    for rule, weights, strength, prompt, seed, image in results.reindex(columns=columns).itertuples(index=False):
        if isinstance(image, bytes):
            cell = f"{rule} at {shown_weights(weights)}, strength {strength:g}" if weights else rule
            picture = _picture(image) | {"alt": f"{prompt}, seed {seed}: {cell}"}
            pictures.setdefault((prompt, seed), {})[rule, weights, finite(strength)] = picture
    return pictures


def _picture(png: bytes) -> Picture:
    """A data URI and the size an image is shown at; `small` images are shown enlarged, without smoothing."""
    with Image.open(io.BytesIO(png)) as image:
        side = max(image.size)
        scale = max(1, SHOWN // side) if side <= SHOWN else SHOWN / side
        width, height = (max(1, round(length * scale)) for length in image.size)
        image.thumbnail((LARGEST, LARGEST))
        file = io.BytesIO()
        image.convert("RGB").save(file, "WEBP", quality=QUALITY)
    source = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"src": source, "width": width, "height": height, "small": side <= SHOWN // 2}

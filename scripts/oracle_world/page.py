"""The files of an oracle world: its figures in words and tables, `world.md`. Nothing here imports torch."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stepfuse.data.folder_files import files_named
from stepfuse.data.json_file import read_json
from stepfuse.data.markdown import markdown_table

FILES = ("world.json", "world.md")
EXACT = 1e-9  # nats a run: above rounding, far below any difference
GAUSSIAN = ("base", "product", "average_noise")  # one Gaussian given x_t, so the KL has a closed form
PICKING = ("switch", "systematic")
REWARDED = ("code", "rgg")
CLOSER = {
    "the blend, in distribution": "systematic_closer",
    "the blend, path by path": "systematic_coupled_closer",
    "the average step, in distribution": "systematic_average_closer",
}
CANDIDATES = 4
CODE_IMAGES = 1000
NOT_MEASURED = {
    "soup": "there are no network weights to merge",
    "soup_factors": "there are no network weights to merge",
    "kl": "it takes one objective; for one it is product",
    "oracle": "the floor, a second run of the target, stands for a perfectly trained one",
}
INTRODUCTION = """\
`stepfuse evaluate --world gmm` measures fusion rules without a network, on data of which every density is known: a
mixture of Gaussians in two dimensions, with two, three or four objectives. Here the *target* of a denoising step, which
is the optimum for the weighted sum of the rewards, has a closed form. So the error of each rule can be measured.

A *cell* is one choice of weights, number of steps and variances. The variances of the objectives are *equal* or
*distinct*: `.8/.2, 10 steps, distinct` has the weights 0.8 and 0.2 of two objectives with different variances. The
terms of this page are:

| term | meaning |
|---|---|
| distance | the sliced 2-Wasserstein distance between the final samples of two runs |
| floor | the distance between two independent runs of the target; its *bound* is 3 standard deviations above its mean |
| expected KL a run | the KL divergence of a rule's steps from those of the target, in nats, summed over a run |
| blend | the samples of `product` |
| path by path | the root mean square distance of samples with the same initial noise and the same noise in every step |
| average step | a step with the mean Σ a_i m_i and the variance Σ a_i v_i |
| tilted data | the density p(x_0) exp(Σ w_i q_i(x_0)) with rewards q_i, the target of RL on whole runs |"""


def world_files(folder: Path) -> set[Path]:
    """The files that `measure_world` wrote in a folder, which --overwrite replaces; none where there is no world."""
    try:
        values = read_json(folder / FILES[0], "the figures of a world")
    except ValueError:
        return set()
    return files_named(folder, *FILES) if "verdicts" in values else set()


def verdicts(cells: Sequence[dict]) -> Iterator[str]:
    """Sentences computed from the cells."""
    exact = [cell for cell in cells if cell["product_exact"]]
    yield (
        f"`product` is the exact target in {len(exact)} of {len(cells)} cells: final samples within the floor's bound "
        f"and an expected KL a run below {EXACT:g} nats. The largest KL is "
        f"{max(cell['rules']['product']['kl'] for cell in cells):.1e}; with the same noise its samples differ from the "
        f"target's by {max(cell['product_from_target'] for cell in cells):.1e} at most."
        + _listed(" Not", [cell for cell in cells if cell not in exact])
    )
    names = dict.fromkeys(cell["variances"] for cell in cells)
    kinds = {kind: [cell for cell in cells if cell["variances"] == kind] for kind in names}
    for kind, members in kinds.items():
        kls = [cell["rules"]["average_noise"]["kl"] for cell in members]
        yield f"`average_noise`, {kind} variances: an expected KL of {min(kls):.2g} to {max(kls):.2g} nats a run."
    for name in ("base", "average_noise", *PICKING):
        counts = ", ".join(
            f"{sum(cell['rules'][name]['to_target']['mean'] > cell['floor']['bound'] for cell in members)} "
            f"of {len(members)} cells with {kind} variances"
            for kind, members in kinds.items()
        )
        yield f"`{name}` ends beyond the floor's bound in {counts}."
    for lead, key in CLOSER.items():
        for kind, members in kinds.items():
            if pairs := [cell for cell in members if cell["objectives"] == 2]:
                groups = {answer: [c for c in pairs if c[key] == answer] for answer in ("yes", "no", "not resolved")}
                counts = ", ".join(f"{answer} in {len(group)}" for answer, group in groups.items())
                yield (
                    f"`systematic` is closer than `switch` to {lead}; two objectives, {kind} variances: "
                    f"{counts} of {len(pairs)} cells."
                    + _listed(" No", groups["no"])
                    + _listed(" Not resolved", groups["not resolved"])
                )
    for kind, members in kinds.items():
        yield (
            "The average step N(Σ a_i m_i, Σ a_i v_i), the limit of selecting one expert a step in short steps, ends "
            f"{_range(cell['average_step_from_blend'] for cell in members)} from the target with {kind} variances "
            f"(the floor is {_range(cell['floor'] for cell in members)}); from it `switch` ends "
            f"{_range(cell['rules']['switch']['to_average_step'] for cell in members)} and `systematic` "
            f"{_range(cell['rules']['systematic']['to_average_step'] for cell in members)}."
        )
    for name in REWARDED:
        ends = [{rule: figures["to_tilted_data"]["mean"] for rule, figures in cell["rules"].items()} for cell in cells]
        nearer, best = (sum(end[name] < end[other] for end in ends) for other in ("base", "product"))
        yield (
            f"`{name}` uses rewards of x_0, and has no temperature: it ends nearer than the base to the "
            f"tilted data, the target of RL on whole runs, in {nearer} of {len(cells)} cells, and nearer than "
            f"`product`, whose target is the step-level one, in {best}."
        )
    yield "Not measured: " + "; ".join(f"`{name}`, {why}" for name, why in NOT_MEASURED.items()) + "."


def page(result: dict) -> str:
    """`world.md`."""

    def of_rules(names: Sequence[str], figure: str, heading: str = "{}") -> list[tuple[str, str]]:
        return [(heading.format(name), f"rules.{name}.{figure}") for name in names]

    tables = {  # title → columns: heading, and where a cell has it
        "Distance to the step-level target, and expected KL a run": [
            ("floor (bound)", "floor"),
            *of_rules((*GAUSSIAN, *PICKING), "to_target"),
            *of_rules(GAUSSIAN, "kl", "KL {}"),
        ],
        "Distance to the blend, the product's own output": [
            *of_rules(PICKING, "to_blend"),
            ("switch − systematic", "systematic_gain"),
            ("systematic closer", "systematic_closer"),
            *of_rules(PICKING, "coupled_to_blend", "{}, path by path"),
            ("systematic closer", "systematic_coupled_closer"),
            *of_rules(PICKING, "to_average_step", "{} to the average step"),
            ("systematic closer", "systematic_average_closer"),
            ("average step to the blend", "average_step_from_blend"),
        ],
        "Distance to the tilted data, p(x_0) exp(Σ w_i q_i(x_0))": [
            ("floor", "tilted_data.floor"),
            ("floor of code", "rules.code.floor_tilted_data"),
            ("step-level target", "tilted_data.target"),
            *of_rules(("base", "product", *PICKING, *REWARDED), "to_tilted_data"),
        ],
    }
    parts = [
        "# A world in closed form",
        INTRODUCTION,
        "## Results",
        "\n".join(f"- {sentence}" for sentence in result["verdicts"]),
        f"{result['replicates']} replicates of {result['samples']} samples, half as many with 3 or 4 objectives, "
        f"seed {result['seed']}; distances are {result['distance']}. ± is half a 95 % interval; not corrected for the "
        f"number of cells. `code`: best of {CANDIDATES}, at most {CODE_IMAGES} images, so its floor is higher. "
        f"{result['cpu_seconds']:g} s of one core.",
    ]
    for title, columns in tables.items():
        rows = [[label(cell), *(_text(cell, path) for _, path in columns)] for cell in result["cells"]]
        parts += [f"## {title}", markdown_table(["cell", *(heading for heading, _ in columns)], rows)]
    return "\n\n".join(parts) + "\n"


def label(cell: dict) -> str:
    """A cell as ".5/.5, 10 steps, equal"."""
    weights = "/".join(f"{w:.2g}".lstrip("0") for w in cell["weights"])
    return f"{weights}, {cell['steps']} steps, {cell['variances']}"


def _listed(lead: str, cells: Sequence[dict]) -> str:
    return f"{lead}: {'; '.join(label(cell) for cell in cells)}." if cells else ""


def _range(values: Iterable[dict[str, float]]) -> str:
    means = [value["mean"] for value in values]
    return f"{min(means):.3f} to {max(means):.3f}"


def _text(cell: dict, path: str) -> str:
    """A figure of a cell: an interval as mean ± half its width, a number, or a word."""
    value: Any = cell
    for key in path.split("."):
        value = value[key]
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.2g}"
    if "bound" in value:
        return f"{value['mean']:.3f} ({value['bound']:.3f})"
    places = 4 if path == "systematic_gain" else 3
    return f"{value['mean']:.{places}f} ± {(value['high'] - value['low']) / 2:.{places}f}".replace("-", "−")

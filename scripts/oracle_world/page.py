"""The oracle world's figures in words and tables: `world.md`."""

from collections.abc import Iterable, Iterator, Sequence

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
    "oracle": "the target's own second run, the floor, stands for a perfectly trained one",
}


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
    kinds = list(dict.fromkeys(cell["variances"] for cell in cells))
    for kind in kinds:
        kls = [cell["rules"]["average_noise"]["kl"] for cell in cells if cell["variances"] == kind]
        yield f"`average_noise`, {kind} variances: an expected KL of {min(kls):.2g} to {max(kls):.2g} nats a run."
    for name in ("base", "average_noise", *PICKING):
        own = {kind: [cell for cell in cells if cell["variances"] == kind] for kind in kinds}
        beyond = {
            kind: sum(cell["rules"][name]["to_target"]["mean"] > cell["floor"]["bound"] for cell in members)
            for kind, members in own.items()
        }
        counts = ", ".join(f"{beyond[kind]} of {len(own[kind])} cells with {kind} variances" for kind in kinds)
        yield f"`{name}` ends beyond the floor's bound in {counts}."
    pairs = [cell for cell in cells if cell["objectives"] == 2]
    for lead, key in CLOSER.items():
        for kind in kinds:
            own_pairs = [cell for cell in pairs if cell["variances"] == kind]
            if not own_pairs:
                continue
            groups = {answer: [c for c in own_pairs if c[key] == answer] for answer in ("yes", "no", "not resolved")}
            counts = ", ".join(f"{answer} in {len(group)}" for answer, group in groups.items())
            yield (
                f"`systematic` is closer than `switch` to {lead}; two objectives, {kind} variances: "
                f"{counts} of {len(own_pairs)} cells."
                + _listed(" No", groups["no"])
                + _listed(" Not resolved", groups["not resolved"])
            )
    for kind in kinds:
        own_cells = [cell for cell in cells if cell["variances"] == kind]
        floors = [cell["floor"]["mean"] for cell in own_cells]
        yield (
            "The average step N(Σ a_i m_i, Σ a_i v_i), what picking one expert a step tends to in short steps, ends "
            f"{_range(cell['average_step_from_blend'] for cell in own_cells)} from the target with {kind} variances "
            f"(the floor is {min(floors):.3f} to {max(floors):.3f}); from it `switch` ends "
            f"{_range(cell['rules']['switch']['to_average_step'] for cell in own_cells)} and `systematic` "
            f"{_range(cell['rules']['systematic']['to_average_step'] for cell in own_cells)}."
        )
    for name in REWARDED:
        nearer, best = (sum(_mean(cell, name) < _mean(cell, other) for cell in cells) for other in ("base", "product"))
        yield (
            f"`{name}` uses rewards of x_0, with no temperature of its own: it ends nearer than the base to the "
            f"tilted data, the target of RL on whole runs, in {nearer} of {len(cells)} cells, and nearer than "
            f"`product`, whose target is the step-level one, in {best}."
        )
    yield "Not measured: " + "; ".join(f"`{name}`, {why}" for name, why in NOT_MEASURED.items()) + "."


def page(result: dict) -> str:
    """`world.md`."""
    cells = result["cells"]
    lines = ["# The oracle world", "", *(f"- {sentence}" for sentence in result["verdicts"]), ""]
    lines += [
        f"{result['replicates']} replicates of {result['samples']} samples, half as many with 3 or 4 objectives, "
        f"seed {result['seed']}; distances are {result['distance']}. ± is half a 95 % interval; not corrected for the "
        f"number of cells. `code`: best of {CANDIDATES}, at most {CODE_IMAGES} images, so its floor is higher. "
        f"{result['cpu_seconds']:g} s of one core.",
        "",
        "## Distance to the step-level target, and expected KL a run",
        "",
    ]
    names: tuple[str, ...] = (*GAUSSIAN, *PICKING)
    lines += _table(
        ["cell", "floor (bound)", *names, *(f"KL {name}" for name in GAUSSIAN)],
        (
            [
                label(cell),
                f"{cell['floor']['mean']:.3f} ({cell['floor']['bound']:.3f})",
                *(_text(cell["rules"][name]["to_target"]) for name in names),
                *(f"{cell['rules'][name]['kl']:.2g}" for name in GAUSSIAN),
            ]
            for cell in cells
        ),
    )
    lines += ["", "## Distance to the blend, the product's own output", ""]
    lines += _table(
        [
            "cell",
            *PICKING,
            "switch − systematic",
            "systematic closer",
            *(f"{name}, path by path" for name in PICKING),
            "systematic closer",
            *(f"{name} to the average step" for name in PICKING),
            "systematic closer",
            "average step to the blend",
        ],
        (
            [
                label(cell),
                *(_text(cell["rules"][name]["to_blend"]) for name in PICKING),
                _text(cell["systematic_gain"], places=4),
                cell["systematic_closer"],
                *(_text(cell["rules"][name]["coupled_to_blend"]) for name in PICKING),
                cell["systematic_coupled_closer"],
                *(_text(cell["rules"][name]["to_average_step"]) for name in PICKING),
                cell["systematic_average_closer"],
                _text(cell["average_step_from_blend"]),
            ]
            for cell in cells
        ),
    )
    lines += ["", "## Distance to the tilted data, p(x_0) exp(Σ w_i q_i(x_0))", ""]
    names = ("base", "product", *PICKING, *REWARDED)
    lines += _table(
        ["cell", "floor", "floor of code", "step-level target", *names],
        (
            [
                label(cell),
                _text(cell["tilted_data"]["floor"]),
                _text(cell["rules"]["code"]["floor_tilted_data"]),
                _text(cell["tilted_data"]["target"]),
                *(_text(cell["rules"][name]["to_tilted_data"]) for name in names),
            ]
            for cell in cells
        ),
    )
    return "\n".join(lines) + "\n"


def label(cell: dict) -> str:
    """A cell as ".5/.5, 10 steps, equal"."""
    weights = "/".join(f"{w:.2g}".lstrip("0") for w in cell["weights"])
    return f"{weights}, {cell['steps']} steps, {cell['variances']}"


def _listed(lead: str, cells: Sequence[dict]) -> str:
    return f"{lead}: {'; '.join(label(cell) for cell in cells)}." if cells else ""


def _mean(cell: dict, rule: str) -> float:
    return cell["rules"][rule]["to_tilted_data"]["mean"]


def _range(values: Iterable[dict[str, float]]) -> str:
    means = [value["mean"] for value in values]
    return f"{min(means):.3f} to {max(means):.3f}"


def _text(value: dict[str, float], places: int = 3) -> str:
    return f"{value['mean']:.{places}f} ± {(value['high'] - value['low']) / 2:.{places}f}".replace("-", "−")


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)

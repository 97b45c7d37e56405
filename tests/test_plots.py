"""Plots of rewards: axes with units, fronts with their intervals and legends, and labels that meet nothing."""

import json
import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from stepfuse.data.palette import LIGHT
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.rewards.registry import reward_unit
from stepfuse.scripts.evaluation.mixture_front import Mixture, draw_mixture_front
from stepfuse.scripts.evaluation.plots import axis_label, save_fronts, styles
from stepfuse.scripts.recipes.demo_mixtures import draw_fronts
from tests.fixtures_documents import ROOT
from tests.fixtures_evaluation import cell, figures
from tests.fixtures_pictures import WORD, apart


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that matplotlib saves."""
    saved: list[Figure] = []
    save = Figure.savefig

    def record(self, *args, **options):
        save(self, *args, **options)
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def texts_outside(figure: Figure) -> list[str]:
    """Labels, titles and legend texts that reach beyond the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    labels = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label, axes.title)]
    labels += [text for legend in figure.legends for text in legend.get_texts()]
    edges = [(text.get_text(), text.get_window_extent(renderer)) for text in labels if text.get_text()]
    width, height = figure.bbox.width, figure.bbox.height
    return [t for t, b in edges if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]


def test_every_reward_of_the_catalogue_has_a_unit_on_its_axis():
    for name in REWARDS:
        unit = reward_unit(name)
        assert unit
        assert unit in axis_label("x", name).replace("\n", " ")
        assert axis_label(name, name).startswith(name)
    assert reward_unit("clip_score:some/model") == reward_unit("clip_score")
    assert axis_label("compressibility", "compressibility") == "compressibility (kB, higher is better →)"
    assert axis_label("x", "my/file.py:reward") == "x: my/file.py:reward (higher is better →)"


def test_an_axis_label_is_wrapped_and_its_unit_stays_whole():
    label = axis_label(WORD, "weighted:" + " + ".join(f"0.1*some_reward_{i}/3.5" for i in range(30)))
    *others, last = label.split("\n")
    assert last.endswith("(weighted sum, higher is better →)")
    assert max(map(len, label.split("\n"))) <= 44
    assert len(others) < 8


@pytest.fixture
def summary() -> dict:
    """Two objectives; product at two strengths, oracle at one mixture."""
    table = [cell("base", None)]
    for share in (0.0, 0.5, 1.0):
        table.append(cell("product", share, (share, 1 - share), own=jitter))
        table.append(cell("a rule whose name is rather long", share, (share / 2, 0.5 - share / 2), own=jitter))
    table.append(cell("oracle", 0.5, (1, 1), own=jitter))
    table.append(cell("product", 0.5, (1.5, 1.5), strength=2.0, own=jitter))
    return figures(*table)


def jitter(prompt: int, seed: int) -> dict:
    return {"reward_rx": prompt + 0.25 * seed, "reward_ry": 0.5 * prompt}


def test_the_legend_explains_every_mark_of_the_fronts(summary, plotted, tmp_path):
    save_fronts(tmp_path / "fronts.png", summary)
    (figure,) = plotted
    (legend,) = figure.legends
    entries = dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))
    for rule, look in styles(list(summary["rules"])).items():
        assert (entries[rule].get_color(), entries[rule].get_marker()) == (look.colour, look.marker)
        assert entries[rule].get_markerfacecolor() == look.colour
    others = [entry for entry in entries if entry not in summary["rules"]]
    assert len(others) == 2
    (axes,) = figure.axes
    fillings = {line.get_markerfacecolor() for line in axes.lines if line.get_marker() != "None"}
    (hollow,) = [entry for entry in others if entries[entry].get_markerfacecolor() == LIGHT.paper]
    assert hollow.startswith("hollow")
    assert LIGHT.paper in fillings
    assert any("95 %" in entry for entry in others)
    assert "→" in axes.get_xlabel()
    assert "→" in axes.get_ylabel()
    assert texts_outside(figure) == []


def test_nothing_hollow_is_explained_where_nothing_is_hollow(plotted, tmp_path):
    save_fronts(
        tmp_path / "fronts.png", figures(cell("base", None), cell("product", 1.0, (1, 0)), cell("product", 0.0))
    )
    (legend,) = plotted[0].legends
    assert not any(text.get_text().startswith("hollow") for text in legend.get_texts())


def test_bars_of_a_front_are_the_intervals_around_the_means(summary, plotted, tmp_path):
    save_fronts(tmp_path / "fronts.png", summary)
    (axes,) = plotted[0].axes
    drawn = {tuple(np.round(segment.ravel(), 9)) for lines in axes.collections for segment in lines.get_segments()}
    for one in summary["cells"]:
        if one["rule"] == "base":
            continue
        x, y = (one["rewards"][name]["mean"]["mean"] for name in ("rx", "ry"))
        gain = one["rewards"]["rx"]["gain"]
        low, high = (x + gain[end] - gain["mean"] for end in ("low", "high"))
        assert tuple(np.round([low, y, high, y], 9)) in drawn


def test_many_long_names_stay_within_the_picture(plotted, tmp_path, summary):
    """Also where no font has their letters, without a warning."""
    names = {"rx": "中文" * 5, "ry": "path/to/a/folder/of/rewards/" * 4 + "file.py:reward"}

    text = json.dumps(summary)
    for name, other in names.items():
        text = text.replace(json.dumps(name), json.dumps(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_fronts(tmp_path / "fronts.png", json.loads(text))
    assert texts_outside(plotted[0]) == []


def test_the_front_of_three_objectives_has_a_panel_for_each_two(plotted, tmp_path):
    """A line joins the mixtures of the two; that of all three is hollow, and those of the third are left out."""
    names = ("a", "b", "c")
    weights = [{name: 1.0} for name in names]
    weights += [{"a": 0.5, "b": 0.5}, {"b": 0.5, "c": 0.5}, {"a": 0.5, "c": 0.5}, dict.fromkeys(names, 1 / 3)]
    mixtures = [Mixture(weights=w, means={n: w.get(n, 0.0) for n in names}, gains={}) for w in weights]
    rewards = dict.fromkeys(names, "compressibility")
    draw_mixture_front(tmp_path / "front.png", rewards, dict.fromkeys(names, -0.1), mixtures, title="Means")
    (figure,) = plotted
    assert [axes.get_ylabel()[0] for axes in figure.axes] == ["b", "c", "c"]
    for axes in figure.axes:
        line, hollow, base = axes.lines
        assert line.get_xydata().tolist() == [[1, 0], [0.5, 0.5], [0, 1]]
        assert hollow.get_xydata().tolist() == [[pytest.approx(1 / 3), pytest.approx(1 / 3)]]
        assert hollow.get_markerfacecolor() != hollow.get_markeredgecolor()
        assert base.get_xydata().tolist() == [[-0.1, -0.1]]
        assert len(axes.texts) == 5  # four mixtures, and "better"


def test_no_label_of_the_demos_front_meets_a_bar(plotted, tmp_path):
    written = json.loads((ROOT / "docs" / "demo-results.json").read_text())
    draw_fronts(tmp_path / "front.png", written)
    (axes,) = plotted[0].axes
    bars = [axes.transData.transform(segment) for bar in axes.collections for segment in bar.get_segments()]
    assert len(bars) == 2 * len(written["weights"])
    boxes = [text.get_window_extent().extents for text in axes.texts]
    for ends in bars:
        assert all(apart(box, (*ends.min(0), *ends.max(0))) for box in boxes)


def test_the_front_of_two_objectives_says_what_its_points_are_and_where_better_is(plotted, tmp_path):
    """Bars go from mean + low − gain to mean + high − gain; labels meet neither each other nor the axes' ends."""
    gain = {"mean": 1.0, "low": 0.75, "high": 1.5}
    mixtures = [
        Mixture(
            weights={"a": 1 - w, "compressibility": w},
            means={"a": 10 - w, "compressibility": -2 + w},
            gains=dict.fromkeys(("a", "compressibility"), None if w == 0.25 else gain),
        )
        for w in (0.0, 0.25, 0.5, 1.0)
    ]
    rewards, base = {"a": "clip_score", "compressibility": "compressibility"}, {"a": 9.0, "compressibility": -2.0}
    draw_mixture_front(tmp_path / "front.png", rewards, base, mixtures, title="Means of 4 prompts")
    (figure,) = plotted
    (axes,) = figure.axes
    segments = {tuple(np.round(s.ravel(), 9)) for lines in axes.collections for s in lines.get_segments()}
    expected = {(9.75 - w, w - 2, 10.5 - w, w - 2) for w in (0, 0.5, 1)}
    assert segments == expected | {(10 - w, w - 2.25, 10 - w, w - 1.5) for w in (0, 0.5, 1)}
    labels = {text.get_text().replace("\n", " · "): text for text in axes.texts}
    both = {"a 0.75 · compressibility 0.25", "a 0.5 · compressibility 0.5"}
    assert set(labels) == {"a 1", "compressibility 1", "better"} | both
    boxes = [text.get_window_extent().extents for text in axes.texts]
    assert all(apart(one, other) for i, one in enumerate(boxes) for other in boxes[:i])
    *_, base_mark = axes.lines
    assert all(apart(box, base_mark.get_window_extent().extents) for box in boxes)
    assert axes.get_xlabel().replace("\n", " ") == "a: clip_score (100 × cosine, higher is better →)"
    assert axes.get_ylabel() == "compressibility (kB, higher is better →)"
    assert axes.get_title() == "Means of 4 prompts"
    tip, word = axes.transAxes.transform(labels["better"].xy), Text.get_window_extent(labels["better"]).extents
    assert (tip > word[2:]).all()  # from the word up and to the right
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(shown) == 3
    assert any("95 %" in text for text in shown)
    assert texts_outside(figure) == []

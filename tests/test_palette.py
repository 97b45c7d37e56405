"""The colours of pictures: told apart with each form of colour blindness, and clear on their background."""

import re
import runpy
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from skimage.color import deltaE_ciede2000, rgb2lab

from stepfuse.data import palette
from stepfuse.data.palette import DARK, LIGHT, Theme, css_variables, plot_settings, series, with_css_variables
from stepfuse.scripts.evaluation import report
from stepfuse.scripts.serve import app

# Machado, Oliveira and Fernandes (2009), "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# severity 1; the matrices act on linear RGB.
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
LEAST = 10.0  # CIEDE2000; 1 to 2 is just noticeable
THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


def linear(colour: str) -> np.ndarray:
    """sRGB #rrggbb to linear RGB, IEC 61966-2-1."""
    values = np.array(list(bytes.fromhex(colour[1:]))) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def seen(colours: tuple[str, ...], matrix: object) -> np.ndarray:
    """The colours in CIELAB as they appear with the cones that the matrix is for."""
    values = np.clip(np.array([linear(colour) for colour in colours]) @ np.asarray(matrix).T, 0, 1)
    return rgb2lab(np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055))


def closest(colours: tuple[str, ...], sight: str) -> tuple[float, tuple[str, str]]:
    lab = dict(zip(colours, seen(colours, SIGHT[sight]), strict=True))
    return min((float(deltaE_ciede2000(lab[one], lab[two])), (one, two)) for one, two in combinations(colours, 2))


def contrast(one: str, two: str) -> float:
    """WCAG 2: (L + 0.05) / (l + 0.05) of the relative luminances."""
    low, high = sorted(float(linear(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (one, two))
    return (high + 0.05) / (low + 0.05)


def test_the_measures_find_what_is_known():
    """Black on white has 21, #767676 the least grey for text; red and green of one lightness are alike to some."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") < 4.5 < contrast("#767676", "#ffffff")
    alike = ("#c0392b", "#7a7000")
    assert closest(alike, "all cones")[0] > 30
    assert closest(alike, "protanopia")[0] < LEAST or closest(alike, "deuteranopia")[0] < LEAST


@pytest.mark.parametrize("sight", SIGHT)
@THEMES
def test_series_differ_to_people_with_each_form_of_colour_blindness(theme: Theme, sight: str):
    distance, pair = closest((*theme.series, theme.ink), sight)
    assert distance > LEAST, pair


@THEMES
def test_marks_and_text_stand_out_from_the_background(theme: Theme):
    """3 for marks and the outlines of fields, 4.5 for text (WCAG 2.2, 1.4.11 and 1.4.3)."""
    for background in (theme.paper, theme.card):
        assert all(contrast(colour, background) >= 3 for colour in (*theme.series, theme.edge))
    for background in (theme.paper, theme.card, theme.band):
        assert all(contrast(colour, background) >= 4.5 for colour in (theme.ink, theme.soft, theme.accent))
    assert contrast(theme.wrong, theme.card) >= 4.5
    assert contrast(theme.ink, theme.notice) >= 4.5
    assert contrast(theme.accent_ink, theme.accent) >= 4.5


def test_colour_is_not_the_only_difference_between_series():
    """Sixty rules are all drawn differently; those of one colour have another marker and other dashes."""
    looks = series(60)
    assert len(set(looks)) == 60
    again = len(LIGHT.series)
    for one, two in zip(looks, looks[again : 2 * again], strict=False):
        assert one.colour == two.colour
        assert one.marker != two.marker
        assert one.dashes != two.dashes
    assert len({look.marker for look in looks[:again]}) == again


def test_matplotlib_takes_the_settings_and_draws_series_in_order():
    from matplotlib.figure import Figure

    with rc_context(plot_settings()):
        axes = Figure().subplots()
        lines = [axes.plot([0, 1])[0] for _ in LIGHT.series]
    assert tuple(line.get_color() for line in lines) == LIGHT.series
    assert [line.get_marker() for line in lines] == list(palette.MARKERS[: len(lines)])


def test_the_documentation_has_the_accents_of_the_palette(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the file adds to
    options = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "conf.py"))["html_theme_options"]
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        assert set(options[f"{name}_css_variables"].values()) == {theme.accent}


def test_pages_have_these_colours_and_no_others():
    """The style of the server's page states them, the report's template takes them; an SVG refers to them."""
    style = Path(app.__file__).with_name("page").joinpath("style.css").read_text()
    declared = [" ".join(block.split()) for block in re.findall(r"(--paper: [^}]*;)\s*}", style)]
    assert declared == [css_variables(LIGHT), css_variables(DARK)]
    rest = re.sub(r"--[\w-]+: #\w+;", "", style)
    template = Path(report.__file__).with_name("report.html.j2").read_text()
    assert "{{ light }}" in template
    assert "{{ dark }}" in template
    for text in (rest, re.sub(r"&#\w+;", "", template)):
        assert re.findall(r"#[0-9a-fA-F]{3,8}\b(?![^{]*\{)", text) == []
    drawn = with_css_variables(f'<path style="stroke: {LIGHT.series[1]}; fill: {LIGHT.paper}; color: #123456"/>')
    assert drawn == '<path style="stroke: var(--series-1); fill: var(--paper); color: #123456"/>'
    icon = Path(app.__file__).with_name("page").joinpath("icon.svg").read_text()
    assert set(re.findall(r"#[0-9a-f]{6}", icon)) <= set(LIGHT.series)

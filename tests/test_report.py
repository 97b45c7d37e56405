"""The page of a small evaluation: as text, and in a real browser."""

import base64
import html
import io
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from stepfuse.data.palette import DARK as DARK_THEME
from stepfuse.data.palette import LIGHT
from stepfuse.scripts.evaluation.config import Setup
from stepfuse.scripts.evaluation.figures import summarise
from stepfuse.scripts.evaluation.plots import save_fronts, styles
from stepfuse.scripts.evaluation.report import strips, write_report
from stepfuse.scripts.load.browser import find_browser
from tests.fixtures_report import cell_and_prompt, kept_png, png

HOSTILE = '<script>alert(1)</script> & "quoted"'
NAMES = ("left", "<b>up</b> $_x$", "away")  # objectives
REWARDS = ("clip", "size<i>", "colour", "taste")
PROMPTS = (HOSTILE, "a red apple", "a  fish")  # of the first two images are kept
GRID = ((1, 0, 0), (0.5, 0.5, 0), (0, 1, 0), (0, 0.5, 0.5), (0, 0, 1), (0.5, 0, 0.5), (0.4, 0.3, 0.3))
RULES = {"product": GRID, "soup": GRID, "kl": GRID[0:5:2], "rgg": GRID[:3], "oracle": GRID[1:2], "mine </td>": GRID}
SETUP = Setup(
    objectives=tuple(zip(NAMES, REWARDS[:3], strict=True)),
    rewards=REWARDS,
    scales=dict.fromkeys(REWARDS, 1.0),
    held_out=("taste",),
    title="A <title> & more",
    base="emoji",
    steps=20,
    guidance=4.0,
    machine="2 cores",
    command="stepfuse evaluate --weights '<x>'",
)


def rows(rule: str, shares: tuple[float, ...] | None, number: int, strength: float = 1.0) -> list[dict]:
    """Six images of one cell, each kept picture of a colour of its own."""
    label = "" if shares is None else ",".join(f"{n}={s:g}" for n, s in zip(NAMES, shares, strict=True) if s)
    values = [0.0] * 3 if shares is None else [strength * share for share in shares]
    return [
        {"rule": rule, "weights": label, "strength": strength, "prompt": prompt, "seed": seed}
        | {f"w_{name}": float("nan") if shares is None else s for name, s in zip(NAMES, shares or values, strict=True)}
        | {f"reward_{r}": value + i + 0.1 * seed for r, value in zip(REWARDS, [*values, -sum(values)], strict=True)}
        | {"kl": 2.0, "diversity": 0.4, "nfe": 40.0 + number, "seconds": 0.2, "peak_memory_mb": float("nan")}
        | {"image": kept_png(number, i) if seed == 0 and i < 2 else None}
        for i, prompt in enumerate(PROMPTS)
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    cells = [("base", None, 1.0), *((rule, shares, 1.0) for rule, grid in RULES.items() for shares in grid)]
    cells.append(("kl", GRID[0], 2.0))
    return pd.DataFrame(row for i, (rule, w, s) in enumerate(cells) for row in rows(rule, w, i, s))


@pytest.fixture(scope="module")
def summary(results: pd.DataFrame) -> dict:
    return summarise(results, SETUP, draws=50)


@pytest.fixture(scope="module")
def page(results: pd.DataFrame, summary: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report(file, results, summary, SETUP)
    return file


class Reader(HTMLParser):
    """Elements with their attributes, and the text between."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_needs_nothing_else(page):
    """No link, frame or import; what is referred to lies in the page; a policy that forbids the net would hold."""
    reader = Reader(page)
    assert not {"link", "iframe", "base", "object", "embed"} & {tag for tag, _ in reader.elements}
    references = [
        value for _, attributes in reader.elements for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "srcset", "action", "poster")
    ]  # fmt: skip
    assert references
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in references)
    text = page.read_text(encoding="utf-8")
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_names_and_prompts_are_text_even_where_they_look_like_html(page):
    reader = Reader(page)
    assert len(reader.all("script")) == 1
    assert "<script>alert(1)" not in page.read_text(encoding="utf-8")
    words = "".join(reader.words)
    for name in (HOSTILE, *NAMES, *REWARDS, *RULES, SETUP.title, SETUP.command):
        assert name in words
    assert f"{NAMES[1]}: {REWARDS[1]}" in words  # an axis, not a formula
    assert not reader.all("i")
    assert not any("up</b>" in str(a) for a in reader.all("b"))


def test_references_within_the_page_meet_one_element_each(page):
    """Ids of three drawings of one program would clash."""
    reader = Reader(page)
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", page.read_text(encoding="utf-8"))
    assert used
    assert set(used) <= set(ids)


def test_every_picture_kept_is_in_a_strip_with_words_for_it(results, page):
    """A cell of one objective alone is on two edges; the base is at the left of every row."""
    pictures = Reader(page).all("img")
    cells = 1 + sum(map(len, RULES.values())) + 1
    assert results["image"].notna().sum() == 2 * cells
    kept = {(cell, prompt) for cell in range(cells) for prompt in (0, 1)}
    assert {cell_and_prompt(attributes["src"]) for attributes in pictures} == kept
    assert all(attributes["alt"] for attributes in pictures)
    half = f"{NAMES[0]} 0.5 · {NAMES[1]} 0.5"
    product = next(a for a in pictures if a["alt"].endswith(f": product at {half}, strength 1"))
    assert product["alt"].startswith(f"{HOSTILE}, seed 0")
    assert cell_and_prompt(product["src"]) == (2, 0)


def test_a_strip_goes_from_one_objective_to_the_other(results, summary):
    """rgg's cells, numbers 18 to 20, are all on the first edge; of kl's 15 and 16 none is half way."""
    first = strips(results, summary)[0]
    columns = [column.replace("\u00a0", " ").replace("\n", " · ") for column in first["columns"]]
    assert columns == [f"{NAMES[0]} 1", f"{NAMES[0]} 0.5 · {NAMES[1]} 0.5", f"{NAMES[1]} 1"]
    labels = [row["label"] for row in first["rows"]]
    assert labels == ["product", "soup", "kl", "kl, strength 2", "rgg", "oracle", "mine </td>"]
    cells = {
        row["label"]: [image and cell_and_prompt(image["src"])[0] for image in row["images"]] for row in first["rows"]
    }
    assert cells["rgg"] == [18, 19, 20]
    assert cells["kl"] == [15, None, 16]
    assert cell_and_prompt(first["base"]["src"]) == (0, 0)
    others = strips(results, summary)[-1]
    assert (others["title"], [row["label"] for row in others["rows"]]) == (
        "other weights",
        ["product", "soup", "mine </td>"],
    )


def test_a_photograph_is_shrunk(results, summary):
    """From 1024 × 512 pixels to 256 × 128."""
    file = io.BytesIO()
    Image.new("RGBA", (1024, 512), (9, 9, 9, 255)).save(file, "PNG")
    large = results.assign(image=[file.getvalue(), *[None] * 5, png((1, 0, 99)), *[None] * (len(results) - 7)])
    kind, data = strips(large, summary)[0]["base"]["src"].split(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (256, 128)


def test_without_pictures_there_are_no_strips(results, summary):
    assert strips(results.drop(columns="image"), summary) == []
    assert strips(results.assign(image=None), summary) == []


def test_images_and_fronts_come_first_then_tables_then_text(page):
    reader = Reader(page)
    parts = [a.get("class") if tag != "h1" else "h1" for tag, a in reader.elements]
    order = [parts.index(name) for name in ("h1", "block", "fronts", "data", "findings", "facts")]
    assert order == sorted(order)


def outline(file: Path) -> list[str]:
    """Headings, and whatever is shown after them: images, drawings, table cells, paragraphs and list items."""
    shown = ("h1", "h2", "h3", "img", "svg", "td", "li", "dd", "p")
    return [tag for tag, _ in Reader(file).elements if tag in shown]


def test_no_heading_stands_without_anything_below(results, page, tmp_path):
    """Also of an evaluation without images, of one objective, or both."""
    one = Setup(
        objectives=SETUP.objectives[:1], rewards=REWARDS, scales=SETUP.scales, steps=20, guidance=4.0, title="One"
    )
    alone = results[(results["rule"] == "base") | (results[f"w_{NAMES[0]}"] == 1)].drop(columns="image")
    write_report(tmp_path / "one.html", alone, summarise(alone, one, draws=50), one)
    without = results.drop(columns="image")
    write_report(tmp_path / "without.html", without, summarise(without, SETUP, draws=50), SETUP)
    assert not Reader(tmp_path / "one.html").all("svg")
    assert not Reader(tmp_path / "without.html").all("img")
    for file in (page, tmp_path / "one.html", tmp_path / "without.html"):
        tags = outline(file)
        headings = [i for i, tag in enumerate(tags) if tag in ("h1", "h2", "h3")]
        assert len(headings) > 3
        assert all(tags[i + 1] not in ("h1", "h2", "h3") for i in headings if tags[i] != "h1")
        assert headings[-1] < len(tags) - 1


def test_every_figure_has_a_caption_and_words_for_those_who_do_not_see_it(page):
    """Blocks of images and fronts are figures; an image has its alt, a front its label."""
    reader = Reader(page)
    drawings = [a for a in reader.all("svg") if a.get("role") == "img"]
    assert len(drawings) == 3
    assert all(a["aria-label"] for a in drawings)
    assert len(reader.all("figure")) == len(reader.all("figcaption")) == 3 + 8
    words = "".join(reader.words)
    assert f"{NAMES[0]} against {NAMES[1]}" in words
    assert f"{NAMES[0]} / {NAMES[1]}: {HOSTILE}, seed 0" in words


@pytest.mark.parametrize(
    ("size", "shown", "small"),
    [
        ((64, 64), (128, 128), True),
        ((16, 8), (128, 64), True),
        ((48, 48), (96, 96), True),
        ((100, 50), (100, 50), False),
    ],
)
def test_a_small_image_is_shown_at_a_whole_multiple_of_its_size(results, summary, size, shown, small):
    file = io.BytesIO()
    Image.new("RGB", size, (9, 9, 9)).save(file, "PNG")
    cells = results.assign(image=[file.getvalue(), *[None] * 5, png((1, 0, 99)), *[None] * (len(results) - 7)])
    base = strips(cells, summary)[0]["base"]
    assert (base["width"], base["height"]) == shown
    assert base["small"] == small


def test_the_legend_of_the_page_names_rules_hollow_points_and_bars(page):
    text = page.read_text(encoding="utf-8")
    legend = text[text.index('<div class="legend">') : text.index('<div class="fronts">')]
    assert legend.count("<input") == len(RULES) + 1
    assert legend.count('class="swatch"') == len(RULES) + 1 + 2
    assert "hollow" in legend
    assert "95 %" in legend


def test_a_rule_s_lacking_weights_are_told(page):
    """rgg has the first three of seven."""
    words = "".join(Reader(page).words)
    assert f"rgg lacks {NAMES[1]} 0.5 · {NAMES[2]} 0.5; {NAMES[2]} 1; " in words
    assert "4 of 7" in words


def test_every_heading_of_a_table_has_its_definition(page):
    reader = Reader(page)
    heads = [attributes for attributes in reader.all("th") if "title" in attributes]
    assert len(heads) == len(reader.all("button"))
    assert len(heads) > 3 * len(REWARDS) + 10
    assert all(attributes["title"] for attributes in heads)


def test_the_fronts_are_one_picture_too(summary, tmp_path):
    """Three pairs beside each other, each 4.6 × 4 inches at 110 dots, above the legend; one objective has no front."""
    save_fronts(tmp_path / "fronts.png", summary)
    with Image.open(tmp_path / "fronts.png") as picture:
        assert picture.width == 3 * 506
        assert 440 < picture.height < 560
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    for look in styles(list(summary["rules"])).values():
        assert tuple(bytes.fromhex(look.colour[1:])) in colours  # in the legend
    save_fronts(tmp_path / "none.png", summary | {"objectives": {NAMES[0]: REWARDS[0]}})
    assert not (tmp_path / "none.png").exists()


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser() or pytest.skip("needs chromium or chrome")


ERRORS = "<script>window.errors = []; addEventListener('error', e => errors.push(e.message || 'load'), true);</script>"
PROBE = """<script>
addEventListener("load", () => {
  const table = document.querySelectorAll("table.data")[1];
  const column = [...table.rows[0].cells].findIndex(c => c.textContent === "NFE");
  const values = () => [...table.tBodies[0].rows].map(r => Number(r.cells[column].dataset.sort));
  const button = table.rows[0].cells[column].querySelector("button"), before = values();
  button.click(); const up = values(); button.click(); const down = values();
  const gain = [...table.rows[0].cells].findIndex(c => c.textContent === "clip gain");
  table.rows[0].cells[gain].querySelector("button").click();
  const last = table.tBodies[0].rows[table.tBodies[0].rows.length - 1].cells[0].textContent;
  const box = document.querySelectorAll(".legend input")[1]; box.click();
  const marks = [...document.querySelectorAll(".fronts .rule-1")];
  const seen = () => [...document.querySelectorAll(".block")].filter(b => b.getBoundingClientRect().height > 0).length;
  const choose = id => {
    const list = document.getElementById(id);
    list.value = ""; list.dispatchEvent(new Event("change"));
  };
  const first = seen();
  choose("pair"); const some = seen();
  choose("prompt");
  const root = document.documentElement, found = {
    inner: innerWidth, juts: root.scrollWidth - root.clientWidth, errors, before, up, down, last,
    hidden: marks.length > 0 && marks.every(m => getComputedStyle(m).display === "none"),
    images: [...document.images].map(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 0),
    order: [".block", ".fronts", "table.data", ".findings", ".facts"].map(
      part => document.querySelector(part).getBoundingClientRect().top),
    crisp: [...document.images].every(i => getComputedStyle(i).imageRendering === "pixelated"),
    inside: [...document.querySelectorAll("table")].every(t => t.parentNode.classList.contains("scroll")),
    svgs: [...document.querySelectorAll(".fronts svg")].map(s => [s.clientWidth, s.clientHeight]),
    sticky: getComputedStyle(table.rows[0].cells[0]).position, some, all: seen(),
    first,
    wide: [...document.querySelectorAll(".scroll")].filter(s => s.getBoundingClientRect().right > innerWidth).length,
  };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""
FRAME = """<!DOCTYPE html><body style="margin: 0"><pre id="probe"></pre><script>
addEventListener("message", event => { document.getElementById("probe").textContent = event.data; });
</script><iframe src="copy.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


def seen(browser: str, page: Path, folder: Path, *options: str) -> str:
    """The page's elements after its scripts have run."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", *options, "--dump-dom"]
    command.append(page.as_uri())
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True).stdout


DARK = """<pre id="probe"></pre><script>
const shown = getComputedStyle(document.body);
document.getElementById("probe").textContent = JSON.stringify([
  shown.backgroundColor, shown.color, getComputedStyle(document.querySelector(".fronts .rule-1 path")).stroke,
  getComputedStyle(document.querySelector(".fronts svg text")).fill]);
</script>"""


@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
def test_a_dark_page_is_dark_with_light_text_and_the_dark_colours_of_series(browser, page, tmp_path, scheme, dark):
    text = page.read_text(encoding="utf-8")
    (tmp_path / "copy.html").write_text(text.replace("</body>", f"{DARK}</body>"), encoding="utf-8")
    shown = seen(browser, tmp_path / "copy.html", tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
    ground, ink, line, label = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', shown, re.DOTALL)[1]))
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink)]
    assert (lightness[0] < 100 < 600 < lightness[1]) == dark
    assert (lightness[1] < 100 < 600 < lightness[0]) == (not dark)
    expected = (DARK_THEME if dark else LIGHT).series[0]
    assert bytes(map(int, re.findall(r"\d+", line))).hex() == expected[1:]
    assert label == ink


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_the_page_works_at_any_width(browser, page, tmp_path, width):
    """Pictures and drawings show, tables sort with unknowns last, rules can be hidden, nothing juts out, no errors."""
    text = page.read_text(encoding="utf-8")
    probed = text.replace("<head>", f"<head>{ERRORS}", 1).replace("</body>", f"{PROBE}</body>")
    (tmp_path / "copy.html").write_text(probed, encoding="utf-8")
    frame = tmp_path / "frame.html"  # a window is at least 500 pixels wide, a frame as narrow as a telephone
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    shown = seen(browser, frame, tmp_path)
    found = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', shown, re.DOTALL)[1]))
    assert found["errors"] == []
    assert found["inner"] == width
    assert found["juts"] == 0
    assert found["wide"] == 0
    assert len(found["images"]) == text.count("<img ")
    assert all(found["images"])
    assert len(found["svgs"]) == 3
    assert all(min(size) > 200 for size in found["svgs"])
    assert (found["up"], found["down"]) == (sorted(found["before"]), sorted(found["before"], reverse=True))
    assert found["before"] != found["up"] or found["before"] != found["down"]
    assert found["last"] == "base"
    assert found["hidden"]
    assert found["sticky"] == "sticky"
    assert (found["first"], found["some"], found["all"]) == (1, 4, 8)
    assert found["order"] == sorted(found["order"])
    assert found["crisp"]
    assert found["inside"]

import base64
import io
import json
import shutil
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import uvicorn
from PIL import Image

from stepfuse.fuse.rules.registry import RULES
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.serve.access import Access
from stepfuse.scripts.serve.app import Service, make_app
from tests.fixtures_serve import Running, another, running_service, settings_of

playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="the page is looked at in Chromium, which is not here"),
]
SECONDS = 60_000  # milliseconds in which a busy machine draws
PIXELS = """async () => {
    const image = document.querySelector(".view img"); await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
}"""
DROP = """(content) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0)), carried = new DataTransfer();
    carried.items.add(new File([bytes], "saved.png", { type: "image/png" }));
    document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
}"""
INJECTION = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


@contextmanager
def listening(service: Service, port: int = 0) -> Iterator[str]:
    """Another server of a service that is started already; its address."""
    config = uvicorn.Config(make_app(service), port=port, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(emoji_service: Service) -> Iterator[Running]:
    with running_service(another(emoji_service)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab, which fails for what the page reports as an error of its own."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(SECONDS)
    tab, errors = context.new_page(), []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield tab
    context.close()
    assert errors == []


def visit(page: Any, server: Running, **settings: object) -> None:
    """Open the page with settings in its address, and wait for their picture."""
    page.goto("about:blank")
    page.goto(f"{server.url}/#{urlencode({'steps': 2} | settings)}")
    exact(page)


def exact(page: Any) -> None:
    """Wait until every picture is the one that was asked for."""
    page.wait_for_selector("#figures:has(.view):not(:has(.view:not([data-kind=exact])))")


def shown(page: Any) -> np.ndarray:
    pixels = np.array(page.evaluate(PIXELS), dtype=np.uint8)
    return pixels.reshape(64, 64, 4)[..., :3]


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_a_coarse_picture_comes_first_and_then_the_servers_own(page: Any, server: Running) -> None:
    visit(page, server)
    kinds = page.evaluate(
        """() => new Promise((resolve) => {
            const seen = [], figure = document.querySelector("#figures");
            new MutationObserver(() => {
                const kind = figure.querySelector(".view")?.dataset.kind;
                if (kind !== seen.at(-1)) seen.push(kind);
                if (kind === "exact") resolve(seen);
            }).observe(figure, { subtree: true, childList: true, attributes: true });
            const prompt = document.querySelector("#prompt"), steps = document.querySelector("#steps");
            steps.value = 6;
            steps.dispatchEvent(new Event("change"));
            prompt.value = "a raccoon on a brown background";
            prompt.dispatchEvent(new Event("input"));
        })"""
    )
    assert kinds[-3:] == ["none", "nearest", "exact"]
    times = page.evaluate("() => performance.getEntriesByType('measure').map(({ name, duration }) => [name, duration])")
    first = [duration for name, duration in times if name == "stepfuse first picture"]
    print(f"\n{times}")
    assert first[-1] < 5000  # 1 s where nothing else runs
    (file,) = server.draw({"prompt": "a raccoon on a brown background", "seed": 0, "steps": 6})
    assert np.array_equal(shown(page), pixels_of(file))


def test_a_dragged_point_shows_the_nearest_picture_at_once_and_keys_move_it(page: Any, server: Running) -> None:
    visit(page, server)
    before = shown(page)
    box = page.locator("#triangle").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.6 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.75 * box["height"])
    assert page.get_attribute(".view", "data-kind") == "nearest"
    assert "nearest drawn weights" in page.inner_text(".view .text")
    page.mouse.up()
    exact(page)
    assert not np.array_equal(shown(page), before)

    page.focus("#triangle")
    page.keyboard.press("2")
    assert page.get_attribute("#triangle", "aria-valuetext") == (
        "compressibility 0 %, colourfulness 100 %, alignment 0 %"
    )
    for key in ("Shift+ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    assert page.get_attribute("#triangle", "aria-valuetext") == (
        "compressibility 1 %, colourfulness 88 %, alignment 11 %"
    )
    page.keyboard.press("0")
    assert page.input_value("#share-0") == "33.3"
    page.fill("#share-0", "50")
    page.keyboard.press("Enter")
    assert [page.input_value(f"#share-{i}") for i in range(3)] == ["50", "25", "25"]
    assert page.evaluate("() => document.activeElement.matches(':focus-visible')")


def test_the_address_and_a_dropped_picture_restore_settings(page: Any, server: Running) -> None:
    fields = {
        "prompt": "a fox on a “green” background",
        "seed": str(2**64 - 1),  # more than a number of JavaScript holds
        "rule": "switch",
        "strength": "0.75",
        "steps": "3",
    }
    visit(page, server, **fields, weights="colourfulness=0.2,alignment=0.6")
    assert {name: page.input_value(f"#{name}") for name in fields} == fields
    assert [page.input_value(f"#share-{i}") for i in range(3)] == ["0", "25", "75"]
    drawn = shown(page)
    with page.expect_download() as download:
        page.click("#save")
    content = Path(download.value.path()).read_bytes()
    assert np.array_equal(pixels_of(content), drawn)
    assert settings_of(content)["seed"] == 2**64 - 1

    visit(page, server)
    page.evaluate(DROP, base64.b64encode(content).decode())
    exact(page)
    assert {name: page.input_value(f"#{name}") for name in fields} == fields
    assert [page.input_value(f"#share-{i}") for i in range(3)] == ["0", "25", "75"]
    assert np.array_equal(shown(page), drawn)
    page.evaluate(DROP, base64.b64encode(b"no picture").decode())
    page.get_by_text("saved.png: it is not a PNG").wait_for()


FAULTY = [
    ('{"seed": ', "its settings are not JSON"),
    ("null", "its settings are null; expected a JSON object"),
    ("[]", "its settings are []; expected a JSON object"),
    ('{"seed": 1, "set": "fairy"}', "its set is fairy, which this server does not have; it has emoji"),
    ('{"seed": 1, "set": 5}', "its set is 5; expected the name of a set"),
    ({"weights": 5}, 'its weights are 5; expected weights by name, {"a": 0.7, "b": 0.3} for instance'),
    ({"weights": {}}, 'its weights are {}; expected weights by name, {"a": 0.7, "b": 0.3} for instance'),
    ({"weights": {"alignment": [1]}}, "its weights change over the steps, which this page cannot show"),
    ({"weights": {"alignment": "1"}}, 'its weight of alignment is "1"; expected a number'),
    (
        {"weights": {"alignment": -0.5, "colourfulness": 1}},
        "its weight of alignment is -0.5, below 0, which this page cannot show",
    ),
    ({"weights": {"speed": 1}}, "its weights name speed, which is no objective of the set emoji"),
    ({"seed": -5}, "its seed is -5; expected a whole number from 0 to 2^64 - 1"),
    ({"seed": "9"}, 'its seed is "9"; expected a whole number from 0 to 2^64 - 1'),
    ({"seed": 1.5}, "its seed is 1.5; expected a whole number from 0 to 2^64 - 1"),
    ('{"set": "emoji", "seed": 1e3}', "its seed is 1e3; expected a whole number from 0 to 2^64 - 1"),
    ('{"set": "emoji", "rule_options": {"seed": 3}}', "its settings have no seed"),
    ({"rule_options": "abc"}, 'its rule_options are abc; expected options of the rule, {"gate": 0.4} for instance'),
    ({"prompt": {}}, "its prompt is {}; expected a text"),
    ({"strength": []}, "its strength is []; expected a number from 0"),
    ({"steps": 2.5}, "its steps are 2.5; expected a whole number from 1"),
    ({"rule": "best"}, "its rule is best; expected one of base, product"),
    ("#set=fairy", "its set is fairy, which this server does not have; it has emoji"),
    ("#weights=alignment", "its weights are alignment; expected NAME=WEIGHT, with commas between several"),
    ("#steps=many", "its steps are many; expected a whole number from 1"),
    ("#seed=-1", "its seed is -1; expected a whole number from 0 to 2^64 - 1"),
]


def test_settings_from_elsewhere_are_checked_and_the_wrong_one_is_named(page: Any, server: Running) -> None:
    page.goto(f"{server.url}/health")
    texts = [json.dumps({"set": "emoji", "seed": 1} | text) if isinstance(text, dict) else text for text, _ in FAULTY]
    right = '{"seed": 18446744073709551615, "set": "emoji", "weights": {"alignment": 2}, "rule_options": {"seed": 3}}'
    *messages, settings = page.evaluate(
        """async (texts) => {
            const { fromAddress, fromPicture } = await import("/page/given.js");
            const { sets } = await (await fetch("v1/sets")).json();
            const read = (text) => (text.startsWith("#") ? fromAddress(text.slice(1), sets) : fromPicture(text, sets));
            return texts.map((text) => {
                try { return read(text); } catch (error) { return error.message; }
            });
        }""",
        [*texts, right],
    )
    for message, (_, expected) in zip(messages, FAULTY, strict=True):
        assert message.startswith(expected), message
    assert settings["seed"] == str(2**64 - 1)
    assert settings["weights"] == [0, 0, 1]


def test_opened_files_are_bounded(page: Any, server: Running) -> None:
    page.goto(f"{server.url}/health")
    content = b"stepfuse\0\1\0\0\0" + zlib.compress(b" " * (2**20 + 1))
    chunk = len(content).to_bytes(4) + b"iTXt" + content + bytes(4)
    read = """async (content) => {
        const { readText } = await import("/page/png.js");
        const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
        return readText(bytes).catch((error) => error.message);
    }"""
    file = b"\x89PNG\r\n\x1a\n" + chunk
    assert page.evaluate(read, base64.b64encode(file).decode()) == "its settings are longer than 1 MiB"
    visit(page, server)
    page.evaluate(DROP.replace("[bytes]", "[new Uint8Array(65e6)]"), "")
    page.get_by_text("saved.png: it has 65 MB; expected a PNG of at most 64 MB").wait_for()


def test_a_wrong_field_keeps_its_error_and_the_older_picture_is_not_saved(page: Any, server: Running) -> None:
    visit(page, server)
    page.fill("#seed", "1.5")
    assert "of the last valid settings" in page.inner_text(".view .text")
    assert page.is_disabled("#save")
    page.fill("#prompt", "a fox on a red background")
    exact(page)
    page.wait_for_function("() => document.querySelector('#live').textContent.startsWith('Exact')")
    assert "expected a whole number" in page.inner_text("#seed-error")
    assert page.is_disabled("#save")
    page.fill("#seed", "15")
    exact(page)
    assert page.is_hidden("#seed-error")
    assert page.is_enabled("#save")
    page.fill("#share-0", "")
    page.keyboard.press("Enter")
    assert page.input_value("#share-0") == "33.3"


def test_a_strip_says_what_it_shows_and_is_dimmed_when_settings_change(page: Any, server: Running) -> None:
    visit(page, server, seed=5)
    page.wait_for_function("() => location.hash.includes('set=emoji')")
    page.fill("#frames", "2")
    page.click("#strip")
    page.wait_for_selector("#made-picture[src]")
    prompt = page.input_value("#prompt")
    assert page.inner_text("#made-text").startswith(
        f"“{prompt}”, seed 5, soup, from compressibility 100 %, colourfulness 0 %, alignment 0 % to compressibility 0 %"
    )
    assert page.locator("#made.past").count() == 0
    page.press("#triangle", "1")  # the ends are not those of the hand
    assert page.locator("#made.past").count() == 0
    page.fill("#seed", "6")
    page.wait_for_selector("#made.past")


def test_html_in_a_prompt_and_in_an_error_stays_text(page: Any, server: Running) -> None:
    visit(page, server, prompt=INJECTION)
    assert INJECTION in page.inner_text("#python").replace('\\"', '"')
    page.click("#more summary")
    page.fill("#rule_options", f"{INJECTION.replace('=', '')}=1")
    page.keyboard.press("Enter")
    page.locator(".error", has_text="<img src").wait_for()
    assert page.title() == "stepfuse"
    assert page.locator("img[src=x], main script").count() == 0


def test_a_phone_has_no_sideways_scroll(browser: Any, server: Running) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True)
    tab = context.new_page()
    tab.goto(f"{server.url}/#steps=2&compare=product&prompt={'fox' * 60}")
    tab.wait_for_selector(".view img[src]", timeout=SECONDS)
    tab.click("#more summary")
    assert tab.evaluate("() => document.documentElement.scrollWidth") == 400
    context.close()


def test_gains_are_measured_at_cells_linear_between_them_and_none_elsewhere(page: Any, server: Running) -> None:
    page.goto(f"{server.url}/page/gains.js")  # an address of the page, without its pictures

    def cell(a: float, b: float, strength: float, mean: float) -> dict[str, Any]:
        gains = {"a": {"mean": mean, "low": mean - 1, "high": mean + 3}}
        return {"rule": "soup", "weights": {"a": a, "b": b}, "strength": strength, "gains": gains}

    cells = [cell(1, 0, 1, 8), cell(0.5, 0.5, 1, 2), cell(0, 1, 1, 0), cell(0.5, 0.5, 0.5, 1)]
    evaluation = {"cells": cells, "objectives": {"a": "a", "b": "b"}, "prompts": 2, "seeds": 2}

    def at(a: float, strength: float = 1.0, rule: str = "soup") -> tuple[Any, ...]:
        question = {"rule": rule, "weights": [a, 1 - a], "strength": strength}
        answer = page.evaluate(
            """async ([evaluation, question]) =>
                (await import("/page/gains.js")).gainsAt(evaluation, ["a", "b"], question)""",
            [evaluation, question],
        )
        return answer["kind"], *answer["gains"].get("a", {}).values()

    assert at(0.5) == ("measured", 2, 1, 5)
    assert at(0.75) == pytest.approx(("interpolated", 5, 4, 8))  # half of 8 and of 2
    assert at(0.1) == pytest.approx(("interpolated", 0.4, -0.6, 3.4))  # a fifth of 2, the rest of 0
    assert at(0.5, 0.75) == pytest.approx(("interpolated", 1.5, 0.5, 4.5))  # half of 1 and of 2
    assert at(0.75, 0.5) == at(0.5, 0.4) == at(0.5, 1.5) == at(0.5, rule="product") == ("none",)


def test_interpolated_gains_are_continuous_exact_at_cells_and_of_no_order(page: Any, server: Running) -> None:
    page.goto(f"{server.url}/page/gains.js")
    evaluation = next(iter(server.service.sets.values())).describe()["evaluation"]
    names = ["compressibility", "colourfulness", "alignment"]
    cells = [cell for cell in evaluation["cells"] if cell["rule"] == "soup" and cell["strength"] == 1]
    assert len(cells) == 7  # vertices, midpoints and centre, of which four lie on a circle
    # A grid of one percent, shifted off the cells; neighbours are one percent of two weights apart.
    shares = [(a, b, 99 - a - b) for a in range(100) for b in range(100 - a)]
    grid = [[(share + 1 / 3) / 100 for share in row] for row in shares]
    points = [[cell["weights"].get(name, 0) for name in names] for cell in cells] + grid

    def at(order: int) -> np.ndarray:
        answers = page.evaluate(
            """async ([evaluation, names, points]) => {
                const { gainsAt } = await import("/page/gains.js");
                const at = (weights) => gainsAt(evaluation, names, { rule: "soup", weights, strength: 1 }).gains;
                return points.map(at).map((gains) => names.map((name) => gains[name].mean));
            }""",
            [evaluation | {"cells": cells[::order]}, names, points],
        )
        return np.array(answers)

    gains, measured = at(1), np.array([[cell["gains"][name]["mean"] for name in names] for cell in cells])
    assert np.array_equal(gains[:7], measured)
    assert np.allclose(at(-1), gains, atol=1e-9)
    # No slope is above the differences of the cells over their distances to each other's edges, of at least 1/6.
    found = {(a, b): gain for (a, b, _), gain in zip(shares, gains[7:], strict=True)}
    steepest = 6 * np.ptp(measured, axis=0)
    for (a, b), gain in found.items():
        for neighbour in ((a + 1, b), (a, b + 1), (a + 1, b - 1)):
            if neighbour in found:
                assert (abs(found[neighbour] - gain) < 0.01 * np.sqrt(2) * steepest).all()


def test_a_lattice_larger_than_the_cache_is_drawn_once(page: Any, server: Running) -> None:
    page.goto(f"{server.url}/health")  # an address of the server, without the page's own drawing
    drawn = page.evaluate(
        """async () => {
            const load = (name) => import(`/page/${name}.js`);
            const [{ Background, Gallery, Pace }, { defaults }] = [await load("painter"), await load("settings")];
            const set = (await (await fetch("v1/sets")).json()).sets[0];
            const settings = { ...defaults(set), steps: 1 }, points = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0]];
            let count = 0;
            const background = new Background({
                set, gallery: new Gallery({ most: 2 }), pace: new Pace(), views: [{ settings, context: "" }],
                weights: () => settings.weights, drawn: (more) => (count += more), failed: (error) => { throw error; },
            });
            background.levels = [points];
            background.fill();
            while (background.flying) await new Promise((resolve) => setTimeout(resolve, 20));
            return count;
        }"""
    )
    assert drawn == 4


def test_labels_of_a_plot_do_not_touch_and_the_bases_stays_inside(page: Any, server: Running) -> None:
    page.goto(f"{server.url}/health")
    gains = {"a": {"mean": 1234, "low": None, "high": None}, "b": {"mean": -0.00012, "low": -0.0002, "high": 0}}
    cells = [
        {"rule": "soup", "weights": {"a": 1, "b": 1}, "strength": 1, "gains": gains},
        {"rule": "product", "weights": {"a": 1, "b": 1}, "strength": 0.5, "gains": gains},
    ]
    evaluation = {"cells": cells, "objectives": {"a": "a", "b": "b"}, "prompts": 2, "seeds": 2}
    texts, boxes = page.evaluate(
        """async (evaluation) => {
            const { showMeasured } = await import("/page/measured.js");
            const panel = Object.fromEntries(["gains", "note", "title", "fronts", "key"].map((name) => {
                const part = document.body.appendChild(document.createElement("div"));
                return [name, part];
            }));
            const style = document.body.appendChild(document.createElement("style"));
            style.textContent = "body { width: 300px; font: 11px sans-serif }";
            const set = { evaluation, objectives: [{ name: "a" }, { name: "b" }], steps: 10, guidance: "off" };
            const settings = { rule: "soup", compare: "product", weights: [0.5, 0.5], strength: 1, steps: 10,
                guidance: "off", weights_on: "exponents", rule_options: {}, negative_prompt: "" };
            showMeasured(panel, set, settings);
            const boxes = [...panel.fronts.querySelectorAll("text")].map((text) => {
                const { x, y, width, height } = text.getBBox();
                return [text.textContent, x, y, x + width, y + height];
            });
            return [Object.values(panel).map((part) => part.innerText), boxes];
        }""",
        evaluation,
    )
    assert texts[2] == "Measured gains of one mixture"
    assert "product, measured at strength 0.5" in texts[4]
    assert "product was not measured at strength 1" in texts[4]
    ticks = [box for box in boxes if box[0] not in ("base", "better") and "gain" not in box[0]]
    assert len(ticks) > 4
    for one in ticks:
        for other in ticks:
            apart = one[3] < other[1] or other[3] < one[1] or one[4] <= other[2] or other[4] <= one[2]
            assert one is other or apart, (one, other)
    (base,) = (box for box in boxes if box[0] == "base")
    assert base[1] > 40
    assert base[3] < 300


def test_a_rule_that_draws_some_mixtures_only_is_no_fault_of_the_picture(page: Any, server: Running) -> None:
    visit(page, server, compare="oracle", steps=1)
    with page.expect_response(lambda response: response.status == 400):  # the lattice, beyond the coarse one
        pass
    page.wait_for_timeout(100)
    assert page.locator(".error:visible").all_inner_texts() == []


def test_a_set_is_known_by_its_adapters_and_rules_by_plain_words(emoji_service: Service) -> None:
    served = emoji_service.sets["emoji"]
    first, *others = served.loaded.adapters
    changed = replace(served.loaded, adapters=(replace(first, sha256="0" * 64), *others))
    described, other = served.describe(), replace(served, loaded=changed).describe()
    assert described == served.describe()
    assert described["id"] != other["id"]
    summaries = {rule["name"]: rule["summary"] for rule in described["rules"]}
    assert summaries["soup"] == "One network with the weighted sum of the LoRAs; the cheapest."
    assert all(RULES[name].summary == summary and summary.endswith(".") for name, summary in summaries.items())


def test_the_copied_commands_draw_the_same_picture(
    page: Any, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = '-- it\'s a "red" $HOME `apple` \\ on a blue background'
    visit(page, server, prompt=prompt, rule="product", strength=0.8, weights="compressibility=0.4,colourfulness=0.6")
    command, program, drawn = page.inner_text("#command"), page.inner_text("#python"), shown(page).astype(int)
    page.goto("about:blank")  # nothing is drawn in the background
    monkeypatch.chdir(tmp_path)
    # A shell splits the words, and the command runs here, where torch is imported already.
    script = 'stepfuse() { printf "%s\\0" "$@"; }\n' + command
    words = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    main(words)
    assert abs(pixels_of(Path("picture.png").read_bytes()).astype(int) - drawn).max() <= 1
    Path("picture.png").unlink()
    # The pipeline is the server's own, which is loaded already and draws nothing now.
    assert program.count('FusedPipeline.from_pretrained("emoji")') == 1
    program = program.replace('FusedPipeline.from_pretrained("emoji")', "FusedPipeline(SAMPLER)")
    exec(program, {"SAMPLER": server.service.sets["emoji"].sampler})
    assert abs(pixels_of(Path("picture.png").read_bytes()).astype(int) - drawn).max() <= 1


def test_a_token_is_asked_for_and_a_lost_server_is_found_again(browser: Any, server: Running) -> None:
    guarded, context = copy(server.service), browser.new_context()
    guarded.access = Access(token="a token of length")
    context.set_default_timeout(SECONDS)
    tab = context.new_page()
    with listening(guarded) as started:
        tab.goto(f"{started}#token=wrong&steps=2")
        tab.locator("#token-error", has_text="The token is wrong.").wait_for()
        assert "token" not in tab.url
        tab.fill("#token", "a token of length")
        tab.keyboard.press("Enter")
        exact(tab)
        assert tab.is_hidden("#token-form")
    tab.click("#new-seed")
    tab.locator("#notice", has_text="The server does not answer").wait_for()
    port = int(started.rsplit(":", 1)[1].strip("/"))
    with listening(guarded, port=port):
        tab.wait_for_selector("#notice", state="hidden")
        exact(tab)
    replaced = copy(guarded)  # by a set of the same name
    (described,) = guarded._described
    replaced._described = [described | {"id": "another", "rules": described["rules"][:2]}]
    tab.click("#new-seed")
    tab.locator("#notice", has_text="The server does not answer").wait_for()
    with listening(replaced, port=port):
        tab.wait_for_selector("#notice", state="hidden")
        exact(tab)
        assert tab.locator("#rule option").count() == 2
        with tab.expect_request("**/v1/images/generations", timeout=SECONDS):
            tab.fill("#seed", "0")  # whose picture the old set has drawn
        exact(tab)
        tab.goto("about:blank")
    context.close()

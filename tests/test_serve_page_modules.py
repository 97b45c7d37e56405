"""Modules of the page of `stepfuse serve`, called in a browser: settings, measured gains, the lattice and the plot."""

import base64
import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepfuse.scripts.serve.app import Service
from tests.fixtures_page import DROP, IN_BROWSER, visit
from tests.fixtures_serve import Running, another, running_service

pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def server(emoji_service: Service) -> Iterator[Running]:
    with running_service(another(emoji_service)) as running:
        yield running


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


@pytest.mark.parametrize(("names", "other"), [(["a", "b"], [0, 1]), (["a", "b", "c"], [0, 0, 1])])
def test_the_control_of_the_weights_tells_the_fewest_steps_of_a_small_picture(
    page: Any, server: Running, names: list[str], other: list[int]
) -> None:
    page.goto(f"{server.url}/health")
    first = [1, *[0] * (len(names) - 1)]
    shown = page.evaluate(
        """async ([names, first, other]) => {
            const { weightsControl } = await import("/page/controls.js");
            const control = weightsControl(document.createElement("div"), names, () => {});
            const picture = (weights, steps) => ({ weights, steps, url: `blob:${steps}` });
            const coarse = [picture(first, 2), picture(other, 4)];
            const few = [[], coarse, [...coarse, picture(first, 6)], [picture(first, 6), ...coarse, picture(other, 6)]];
            return few.map((pictures) => String(control.mark([], pictures)));
        }""",
        [names, first, other],
    )
    assert shown == ["Infinity", "2", "4", "6"]


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

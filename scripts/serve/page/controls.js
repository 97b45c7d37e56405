// The control of the weights: a slider for two objectives, a triangle for three, linked sliders for more.

import { element, svg } from "./elements.js";
import { describe, distance, hundredths, key, lattice, linked, percent, project } from "./simplex.js";

const TILE = 34; // side of the small pictures in the triangle
const SNAP = 0.022; // a dragged point this near to a measured mixture becomes it
const CORNERS = [[150, 40], [19, 250], [281, 250]]; // of the triangle, in a drawing of 300 × 288: top, left, right
const ARROWS = { ArrowUp: [0, 1], ArrowDown: [0, -1], ArrowLeft: [1, 1], ArrowRight: [2, 1] }; // which weight, more or less

/**
 * @param root the element that is filled
 * @param names the objectives
 * @param moved called with new weights while the hand moves
 */
export function weightsControl(root, names, moved) {
  let weights = names.map(() => 1 / names.length);
  let measured = [];
  const set = (next) => moved(next);
  const parts = [];
  if (names.length === 2) parts.push(slider(names, set));
  if (names.length === 3) parts.push(triangle(names, set, () => weights, () => measured));
  parts.push(shares(names, set, () => weights, names.length > 3));
  root.replaceChildren(...parts.map((part) => part.root));
  return {
    show(next) {
      weights = next;
      parts.forEach((part) => part.show(next));
    },
    /**
     * Show the mixtures that were measured, and the generated pictures: { weights, steps, url }.
     * @returns the fewest steps of a picture that is shown; Infinity if none is
     */
    mark(cells, drawn) {
      measured = cells;
      return Math.min(...parts.map((part) => part.mark?.(cells, drawn) ?? Infinity));
    },
  };
}

function snapped(weights, measured) {
  const near = measured.find((point) => distance(point, weights) < SNAP);
  return near ?? hundredths(weights);
}

function slider(names, set) {
  const input = element("input", { type: "range", min: 0, max: 100, step: 1, id: "slider", "aria-label": `From ${names[0]} to ${names[1]}` });
  input.addEventListener("input", () => set([1 - input.value / 100, input.value / 100]));
  const ends = element("p", { class: "ends" }, names.map((name) => element("span", {}, [name])));
  const tiles = new Map(lattice(2, 8).map((weights) => [key(weights), element("img", { alt: "" })]));
  return {
    root: element("div", { class: "field slider" }, [ends, element("div", { class: "tiles" }, [...tiles.values()]), input]),
    show(weights) {
      input.value = 100 * weights[1];
      input.setAttribute("aria-valuetext", describe(names, weights));
    },
    mark(cells, drawn) {
      return fillTiles(tiles, drawn, "src");
    },
  };
}

/** Put the generated picture with the most steps into each tile of its weights; the fewest steps of these pictures. */
function fillTiles(tiles, drawn, attribute) {
  const best = new Map();
  for (const picture of drawn) {
    const name = key(picture.weights);
    if (tiles.has(name) && !(best.get(name)?.steps > picture.steps)) best.set(name, picture);
  }
  for (const [name, tile] of tiles) {
    const url = best.get(name)?.url;
    if (!url) tile.removeAttribute(attribute);
    else if (tile.getAttribute(attribute) !== url) tile.setAttribute(attribute, url);
  }
  return Math.min(...[...best.values()].map((picture) => picture.steps));
}

function triangle(names, set, current, measured) {
  const at = (weights) => [0, 1].map((axis) => CORNERS.reduce((sum, corner, i) => sum + weights[i] * corner[axis], 0));
  const rings = svg("g", { class: "rings" });
  const tiles = new Map(
    lattice(3, 6).map((weights) => {
      const [x, y] = at(weights);
      return [key(weights), svg("image", { x: x - TILE / 2, y: y - TILE / 2, width: TILE, height: TILE })];
    }),
  );
  const point = svg("circle", { class: "point", r: 10 });
  const labels = [["middle", 150, 15], ["start", 2, 284], ["end", 298, 284]].map(([anchor, x, y], i) =>
    svg("text", { x, y, "text-anchor": anchor }, [names[i]]),
  );
  const drawing = svg("svg", {
    viewBox: "0 0 300 288",
    class: "triangle",
    id: "triangle",
    tabindex: 0,
    role: "slider",
    "aria-label": `Weights of ${names.join(", ")}`,
    "aria-roledescription": "triangle",
    "aria-valuemin": 0,
    "aria-valuemax": 100,
    "aria-describedby": "triangle-keys",
  }, [svg("polygon", { points: CORNERS.map((corner) => corner.join()).join(" ") }), svg("g", { class: "tiles" }, [...tiles.values()]), rings, point, ...labels]);
  const keys = element("span", { id: "triangle-keys", class: "unseen" }, [
    `Arrow up: more ${names[0]}, down: less; left: more ${names[1]}; right: more ${names[2]}. With shift: by 10 percent. ` +
      "1, 2 and 3: one objective alone; 0: equal weights.",
  ]);

  const drag = (event) => {
    const box = drawing.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 300;
    const y = ((event.clientY - box.top) / box.height) * 288;
    const [[tx, ty], [lx, ly], [rx]] = CORNERS;
    const top = (ly - y) / (ly - ty);
    const right = (x - lx - top * (tx - lx)) / (rx - lx);
    set(snapped(project([top, 1 - top - right, right]), measured()));
  };
  drawing.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    drawing.setPointerCapture(event.pointerId);
    drawing.focus({ preventScroll: true });
    event.preventDefault();
    drag(event);
  });
  drawing.addEventListener("pointermove", (event) => {
    if (drawing.hasPointerCapture(event.pointerId)) drag(event);
  });
  drawing.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const only = ["1", "2", "3"].indexOf(event.key);
    if (only >= 0) set(names.map((_, i) => (i === only ? 1 : 0)));
    else if (event.key === "0" || event.key === "Home") set(names.map(() => 1 / 3));
    else if (ARROWS[event.key]) {
      const [which, sign] = ARROWS[event.key];
      set(hundredths(linked(current(), which, current()[which] + sign * (event.shiftKey ? 0.1 : 0.01))));
    } else return;
    event.preventDefault();
  });

  return {
    root: element("div", { class: "triangle-box" }, [drawing, keys]),
    show(weights) {
      const [x, y] = at(weights);
      point.setAttribute("cx", x);
      point.setAttribute("cy", y);
      drawing.setAttribute("aria-valuenow", Math.round(100 * weights[0]));
      drawing.setAttribute("aria-valuetext", describe(names, weights));
    },
    mark(cells, drawn) {
      rings.replaceChildren(...cells.map(at).map(([cx, cy]) => svg("circle", { cx, cy, r: 3 })));
      return fillTiles(tiles, drawn, "href");
    },
  };
}

function shareText(weight) {
  return String(Number((100 * weight).toFixed(1)));
}

/** A row an objective, with its share as a number and, for more than three, a slider. */
function shares(names, set, current, sliders) {
  const rows = names.map((name, i) => {
    const id = `share-${i}`;
    const number = element("input", { id, type: "number", min: 0, max: 100, step: 1, inputmode: "decimal", "aria-describedby": "weights-error" });
    number.addEventListener("change", () => {
      if (number.value.trim() === "") number.value = shareText(current()[i]); // emptied, or no number
      else set(linked(current(), i, Number(number.value) / 100));
    });
    const range = sliders && element("input", { type: "range", min: 0, max: 100, step: 1, "aria-label": name });
    if (range) range.addEventListener("input", () => set(linked(current(), i, range.value / 100)));
    const root = element("div", { class: "share" }, [
      element("label", { for: id }, [name]),
      ...(range ? [range] : []),
      element("span", { class: "unit" }, [number, " %"]),
    ]);
    return { root, number, range };
  });
  return {
    root: element("div", { class: "shares" }, rows.map((row) => row.root)),
    show(weights) {
      rows.forEach(({ number, range }, i) => {
        if (document.activeElement !== number || Math.abs(number.value - 100 * weights[i]) > 0.05) {
          number.value = shareText(weights[i]);
        }
        if (range) {
          range.value = 100 * weights[i];
          range.setAttribute("aria-valuetext", percent(weights[i]));
        }
      });
    },
  };
}

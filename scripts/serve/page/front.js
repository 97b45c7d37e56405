// The plot of two rewards' measured gains.

import { element, mark, svg } from "./elements.js";
import { signed } from "./gains.js";
import { describe } from "./simplex.js";

const MINUS = (text) => text.replace("-", "−");

const [TOP, BOTTOM] = [20, 188]; // of the plot, below the name of its vertical axis

/** The measured gains of two rewards against each other; `units` by name, where they are known. */
export function front(a, b, names, series, units = {}) {
  const cells = series.map((one) => one.cells.filter((cell) => cell.gains[a] && cell.gains[b]));
  const shown = cells.flat();
  const points = series.map(({ here }) => here).filter((here) => here.gains[a] && here.gains[b]);
  const values = (name) => [0, ...shown.flatMap(({ gains }) => ends(gains[name])), ...points.flatMap(({ gains }) => ends(gains[name]))];
  const horizontal = axis(values(a), 46, 288, (text) => 6.5 * text.length + 8);
  const vertical = axis(values(b), BOTTOM, TOP, () => 15);
  const marks = [
    ...horizontal.ticks.flatMap((tick) => [
      svg("line", { class: "grid", x1: horizontal.at(tick), x2: horizontal.at(tick), y1: TOP, y2: BOTTOM }),
      svg("text", { class: "tick", x: horizontal.at(tick), y: BOTTOM + 14, "text-anchor": "middle" }, [MINUS(String(tick))]),
    ]),
    ...vertical.ticks.flatMap((tick) => [
      svg("line", { class: "grid", x1: 46, x2: 288, y1: vertical.at(tick), y2: vertical.at(tick) }),
      svg("text", { class: "tick", x: 41, y: vertical.at(tick) + 4, "text-anchor": "end" }, [MINUS(String(tick))]),
    ]),
    svg("path", { class: "base", d: `M${horizontal.at(0) - 4} ${vertical.at(0)}h8m-4-4v8` }),
    baseLabel(horizontal.at(0), vertical.at(0), [...shown, ...points].map(({ gains }) => [horizontal.at(gains[a].mean), vertical.at(gains[b].mean)])),
  ];
  cells.forEach((all, i) => {
    if (names.length === 2) {
      const sorted = [...all].sort((one, other) => one.point[0] - other.point[0]);
      const line = sorted.map(({ gains }) => `${horizontal.at(gains[a].mean)},${vertical.at(gains[b].mean)}`).join(" ");
      marks.push(svg("polyline", { class: `series-${i} path`, points: line }));
    }
    all.forEach((cell) => {
      const title = `${series[i].rule}, ${describe(names, cell.point)}: ${a} ${signed(cell.gains[a].mean)}, ${b} ${signed(cell.gains[b].mean)}`;
      marks.push(cross(cell.gains, `series-${i} cell`, i, 3.5, title));
    });
  });
  series.forEach(({ here }, i) => {
    if (here.gains[a] && here.gains[b]) marks.push(cross(here.gains, `series-${i} present ${here.kind}`, i, 7, "the present weights"));
  });
  marks.push(
    svg("text", { class: "axis", x: 288, y: BOTTOM + 30, "text-anchor": "end" }, [`${gainIn(a)} →`]),
    svg("text", { class: "axis", x: 0, y: 9 }, [`↑ ${gainIn(b)}`]),
    svg("path", { class: "better", d: "M268 40 284 24m-8 0h8v8" }),
    svg("text", { class: "tick", x: 264, y: 38, "text-anchor": "end" }, ["better"]),
  );
  const label = shown.length
    ? `Measured gains in ${a} and ${b}, ${shown.length} mixtures with intervals, and the present weights`
    : "Nothing was measured";
  const drawing = svg("svg", { viewBox: "0 0 300 224", role: "img", "aria-label": label }, marks);
  return element("figure", {}, [drawing]);

  function gainIn(name) {
    return units[name] ? `gain in ${name} (${units[name]})` : `gain in ${name}`;
  }

  function cross(gains, kind, i, r, title) {
    const [x, y] = [horizontal.at(gains[a].mean), vertical.at(gains[b].mean)];
    const parts = [svg("title", {}, [title])];
    if (gains[a].low !== null) parts.push(svg("line", { x1: horizontal.at(gains[a].low), x2: horizontal.at(gains[a].high), y1: y, y2: y }));
    if (gains[b].low !== null) parts.push(svg("line", { x1: x, x2: x, y1: vertical.at(gains[b].low), y2: vertical.at(gains[b].high) }));
    parts.push(mark(i, x, y, r));
    return svg("g", { class: kind }, parts);
  }
}

/** The word beside the base, on the side where the fewest points are. */
function baseLabel(x, y, points) {
  const sides = [[6, -6, "start"], [6, 14, "start"], [-6, -6, "end"], [-6, 14, "end"]];
  const room = ([dx, dy]) => Math.min(...points.map(([px, py]) => Math.hypot(px - x - 3 * dx, py - y - dy + 4)), 60);
  const inside = ([dx, dy, end]) => {
    const left = end === "end" ? x + dx - 26 : x + dx; // the word is 26 long and 9 high
    return left >= 47 && left + 26 <= 288 && y + dy - 9 >= TOP && y + dy <= BOTTOM - 1;
  };
  const fitting = sides.filter(inside);
  const [dx, dy, anchor] = (fitting.length ? fitting : sides).reduce((best, side) => (room(side) > room(best) ? side : best));
  return svg("text", { class: "tick", x: x + dx, y: y + dy, "text-anchor": anchor }, ["base"]);
}

function ends({ mean, low, high }) {
  return [mean, low ?? mean, high ?? mean];
}

/** A linear axis over the values, with round ticks whose labels, `length` long, do not touch. */
function axis(values, from, to, length) {
  let [least, most] = [Math.min(...values), Math.max(...values)];
  const room = 0.06 * (most - least || 1);
  [least, most] = [least - room, most + room];
  const power = 10 ** Math.floor(Math.log10(most - least));
  const every = (step) => {
    const ticks = [];
    for (let i = Math.ceil(least / step); i * step <= most; i++) ticks.push(Number((i * step).toPrecision(6)));
    return ticks;
  };
  const touch = (step) => {
    const apart = (Math.abs(to - from) * step) / (most - least);
    return every(step).some((tick) => length(String(tick)) > apart);
  };
  const steps = [0.2, 0.5, 1, 2, 5, 10].map((factor) => factor * power);
  const wanted = steps.findLast((size) => (most - least) / size >= 3);
  const step = steps.find((size) => size >= wanted && !touch(size)) ?? steps.at(-1);
  return { ticks: every(step), at: (value) => from + ((to - from) * (value - least)) / (most - least) };
}

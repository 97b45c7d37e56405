// What was measured: the gains at the present weights, and the fronts with the present point.

import { element, mark, svg } from "./elements.js";
import { front } from "./front.js";
import { cellsOf, gainsAt, signed } from "./gains.js";

/** Why the evaluation says nothing about these settings, or "". */
export function unmeasured(set, settings) {
  if (settings.steps !== set.steps) return `Measured with ${set.steps} steps only.`;
  const other = ["guidance", "width", "height"].some((name) => settings[name] !== set[name]);
  if (other || (settings.guidance !== "off" && settings.guidance_scale !== set.guidance_scale)) {
    return "Measured with the guidance and size of the set only.";
  }
  if (settings.weights_on !== "exponents") return "Measured with weights on exponents only.";
  if (Object.keys(settings.rule_options).length) return "Not measured with options of the rule.";
  if (settings.negative_prompt && settings.guidance !== "off") return "Not measured with a negative prompt.";
  return "";
}

/** Fill the panel for one rule, or two that are compared. */
export function showMeasured({ gains, note, title, fronts, key }, set, settings) {
  const { evaluation } = set;
  const names = Object.keys(evaluation.objectives);
  const order = set.objectives.map((objective) => objective.name);
  const weights = names.map((name) => settings.weights[order.indexOf(name)] ?? 0);
  const reason = unmeasured(set, settings);
  const rules = [settings.rule, ...(settings.compare ? [settings.compare] : [])];
  const series = rules.map((rule) => {
    const { strength } = settings;
    const here = reason ? { kind: "none", gains: {}, note: reason } : gainsAt(evaluation, names, { rule, weights, strength });
    return { rule, here, cells: cellsOf(evaluation, names, rule) };
  });
  gains.replaceChildren(...names.map((name) => gainRow(name, evaluation.objectives[name], evaluation.units?.[name], series)));
  const agree = series.every(({ here }) => here.note === series[0].here.note);
  const remarks = agree ? [series[0].here.note] : series.map(({ rule, here }) => `${rule}: ${here.note}`);
  note.replaceChildren(
    ...remarks.map((remark) => element("span", {}, [remark])),
    element("span", {}, [
      `Mean gain over the base with 95 % intervals; ${count(evaluation.prompts, "prompt")} × ${count(evaluation.seeds, "seed")}.`,
    ]),
  );
  showFronts({ title, fronts, key }, names, series, settings.strength, evaluation.units);
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** A plot for each pair of rewards, or for the pair that is chosen where there are more than three. */
function showFronts({ title, fronts, key }, names, all, strength, units) {
  const series = all.map((one) => atNearest(one, strength));
  const mixtures = new Set(series.flatMap(({ cells }) => cells.map(({ point }) => point.join(" ")))).size;
  title.textContent = mixtures > 1 ? "Measured front" : "Measured gains of one mixture";
  const pairs = names.flatMap((a, i) => names.slice(i + 1).map((b) => [a, b]));
  const shown = names.length <= 3 ? pairs : [chooser(fronts, names).selects.map((select) => select.value)];
  const plots = shown.map(([a, b]) => front(a, b, names, series, units));
  if (names.length > 3) chooser(fronts, names).update(plots);
  else fronts.replaceChildren(...plots);
  const where = ({ near }) => (near === undefined ? "not measured" : `measured at strength ${near}`);
  const agree = series.every((one) => one.near === series[0].near);
  const elsewhere = series.filter(({ near }) => near !== undefined && Math.abs(near - strength) > 1e-6);
  const whose = elsewhere.length < series.length ? elsewhere.map(({ rule }) => rule).join(" and ") : "Nothing";
  const sentences = [
    elsewhere.length ? `${whose} was ${whose === "Nothing" ? "" : "not "}measured at strength ${strength}; the nearest strength is shown.` : "",
    agree ? `${where(series[0]).replace(/^./, (letter) => letter.toUpperCase())}, with 95 % intervals.` : "With 95 % intervals.",
    "Hollow: the present weights, dashed where interpolated.",
  ];
  const label = (one) => (agree ? one.rule : `${one.rule}, ${where(one)}`);
  key.replaceChildren(
    ...series.map((one, i) => element("span", { class: `series-${i} key` }, [label(one)])),
    series.every(({ near }) => near === undefined) ? "Not measured." : sentences.filter(Boolean).join(" "),
  );
}

/** A rule's cells at its measured strength that is nearest to the present one. */
function atNearest({ rule, here, cells }, strength) {
  const far = (cell) => Math.abs(cell.strength - strength);
  const near = cells.reduce((best, cell) => (!best || far(cell) < far(best) ? cell : best), null)?.strength;
  return { rule, here, near, cells: cells.filter((cell) => Math.abs(cell.strength - near) < 1e-6) };
}

/** One reward: its gain as text and as a point with its interval. */
function gainRow(name, reward, unit, series) {
  const all = series.flatMap(({ cells }) => cells.map((cell) => cell.gains[name]).filter(Boolean));
  const ends = all.flatMap(({ mean, low, high }) => [mean, low ?? mean, high ?? mean]);
  const [least, most] = [Math.min(0, ...ends), Math.max(0, ...ends)];
  const x = (value) => 6 + (288 * (value - least)) / (most - least || 1);
  const height = 14 * series.length;
  const marks = [svg("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: height })];
  const texts = series.map(({ rule, here }, i) => {
    const gain = here.gains[name];
    const kind = `series-${i} ${here.kind}`;
    const whose = series.length > 1 ? [element("small", {}, [rule])] : [];
    if (!gain) return element("span", { class: `${kind} value` }, [...whose, "not measured"]);
    const y = 7 + 14 * i;
    if (gain.low !== null) marks.push(svg("line", { class: `${kind} interval`, x1: x(gain.low), x2: x(gain.high), y1: y, y2: y }));
    marks.push(mark(i, x(gain.mean), y, 4.5, `${kind} dot`));
    const scale = gain.low === null ? gain.mean : (gain.high - gain.low) / 2;
    const interval = gain.low === null ? "" : ` [${signed(gain.low, scale)}, ${signed(gain.high, scale)}]`;
    return element("span", { class: `${kind} value` }, [
      ...whose,
      element("b", {}, [signed(gain.mean, scale)]),
      element("span", { class: "between" }, [interval]),
    ]);
  });
  const bar = svg("svg", { viewBox: `0 0 300 ${height}`, class: "bar", "aria-hidden": "true" }, marks);
  const details = [reward === name ? "" : reward, unit ?? ""].filter(Boolean).join(", ");
  const label = element("span", { class: "name" }, [name, ...(details ? [element("small", {}, [` ${details}`])] : [])]);
  return element("div", { class: "gain" }, [label, element("span", { class: "values" }, texts), bar]);
}

const choosers = new WeakMap();

/** For more than three objectives: which pair is shown. */
function chooser(fronts, names) {
  const known = choosers.get(fronts);
  if (known && known.names.join() === names.join() && fronts.contains(known.selects[0])) return known;
  const selects = [0, 1].map((which) => {
    const select = element("select", { "aria-label": `${which ? "Vertical" : "Horizontal"} axis` }, names.map((name) => element("option", {}, [name])));
    select.value = names[which];
    select.addEventListener("change", () => fronts.dispatchEvent(new CustomEvent("pair", { bubbles: true })));
    return select;
  });
  const box = element("div");
  fronts.replaceChildren(element("p", { class: "pair" }, selects), box);
  const made = { names, selects, update: (plots) => box.replaceChildren(...plots) };
  choosers.set(fronts, made);
  return made;
}

// The measured gains at any weights: those of a measured cell, or interpolated between cells, or none.

import { distance } from "./simplex.js";

const SAME = 2e-3; // stored weights are rounded

/** The cells of a rule as { strength, point, gains }, with weights in the order of the objectives. */
export function cellsOf(evaluation, names, rule) {
  return evaluation.cells
    .filter((cell) => cell.rule === rule)
    .map((cell) => {
      const weights = names.map((name) => cell.weights[name] ?? 0);
      const sum = weights.reduce((a, b) => a + b, 0) || 1;
      return { strength: cell.strength, gains: cell.gains, point: weights.map((weight) => weight / sum) };
    });
}

/**
 * { kind: "measured" | "interpolated" | "none", gains, note }.
 *
 * In weights the interpolation is linear in each simplex of one triangulation of the measured mixtures, so it is
 * continuous and does not depend on the order of the cells; between two measured strengths it is linear too. Nothing is
 * extrapolated. At strength 0 every rule draws the base's pictures, so the gain is 0.
 */
export function gainsAt(evaluation, names, { rule, weights, strength }) {
  if (strength === 0) return atZero(names);
  const cells = cellsOf(evaluation, names, rule);
  if (!cells.length) return none(`The rule ${rule} was not measured.`);
  const strengths = [...new Set(cells.map((cell) => cell.strength))].sort((a, b) => a - b);
  const at = (value) => between(cells.filter((cell) => cell.strength === value), weights);
  const here = strengths.find((value) => Math.abs(value - strength) < 1e-6);
  if (here !== undefined) {
    const shares = at(here);
    if (shares) return answer(shares, names, shares.length === 1 ? null : inWeights(shares));
  }
  const below = strengths.filter((value) => value < strength - 1e-6 && at(value)).pop();
  const above = strengths.find((value) => value > strength + 1e-6 && at(value));
  if (below === undefined || above === undefined) {
    if (here !== undefined) return none(`The mixtures measured at strength ${strength} do not surround these weights.`);
    return none(`Not measured at these weights and strength ${strength}; measured strengths: ${strengths.join(", ")}.`);
  }
  const share = (strength - below) / (above - below);
  const parts = [
    ...at(below).map(([cell, part]) => [cell, part * (1 - share)]),
    ...at(above).map(([cell, part]) => [cell, part * share]),
  ];
  return answer(parts, names, `linear between the measured strengths ${below} and ${above}`);
}

function none(note) {
  return { kind: "none", gains: {}, note };
}

function atZero(names) {
  const gains = Object.fromEntries(names.map((name) => [name, { mean: 0, low: null, high: null }]));
  return { kind: "measured", gains, note: "At strength 0 the picture is the base's, so the gain is 0 by definition." };
}

function inWeights(shares) {
  return `linear between ${shares.length} measured mixtures around it`;
}

function answer(shares, names, how) {
  const gains = {};
  for (const name of names) {
    if (!shares.every(([cell]) => cell.gains[name])) continue;
    const sum = (key) => {
      const values = shares.map(([cell, share]) => [cell.gains[name][key], share]);
      return values.some(([value]) => value === null || value === undefined) ? null : values.reduce((all, [value, share]) => all + value * share, 0);
    };
    gains[name] = { mean: sum("mean"), low: sum("low"), high: sum("high") };
  }
  if (how === null) return { kind: "measured", gains, note: "Measured at exactly these settings." };
  return { kind: "interpolated", gains, note: `Interpolated, ${how}; so are the ends of the intervals.` };
}

/** Shares of cells whose mixture is `point`, as [cell, share]; null where the cells do not surround it. */
function between(cells, point) {
  const same = cells.find((cell) => distance(cell.point, point) < SAME);
  if (same) return [[same, 1]];
  const shares = cheapest(cells.map((cell) => cell.point), cells.map((cell) => height(cell.point)), point);
  return shares && cells.map((cell, i) => [cell, shares[i]]).filter(([, share]) => share > 1e-6);
}

/**
 * The height of a cell above the simplex; the lower side of their convex hull is the triangulation.
 *
 * |w|² gives that of Delaunay. Vertices, midpoints and the centre lie on common circles, where it has ties: two small
 * terms decide them, the first in favour of the centre and the second by the objective, always in the same way. All
 * three are convex, so every cell is a corner, and its own gains are what is shown there.
 */
function height(point) {
  const sum = (term) => point.reduce((all, weight, i) => all + term(weight, i), 0);
  const fromCentre = Math.sqrt(sum((weight) => (weight - 1 / point.length) ** 2));
  return sum((weight) => weight ** 2) + 1e-3 * fromCentre + 1e-5 * sum((weight, i) => Math.sqrt(i + 2) * weight ** 3);
}

/** Shares ≥ 0 with Σ share · corner = point and the least Σ share · height: the simplex method; null where none are. */
function cheapest(corners, heights, point) {
  const count = corners.length;
  const large = 1e4; // the price of leaving a part of the point to no corner
  const basis = point.map((_, i) => count + i);
  const rows = point.map((value, i) => [...corners.map((corner) => corner[i]), value]);
  const prices = [...heights, 0].map((price, j) => price - large * rows.reduce((sum, row) => sum + row[j], 0));
  for (;;) {
    const entering = prices.findIndex((price, j) => j < count && price < -1e-9); // the first one: Bland's rule ends
    if (entering < 0) break;
    let pivot = -1;
    rows.forEach((row, i) => {
      if (row[entering] < 1e-9) return;
      const less = pivot < 0 ? -1 : row[count] / row[entering] - rows[pivot][count] / rows[pivot][entering];
      if (less < -1e-12 || (less < 1e-12 && basis[i] < basis[pivot])) pivot = i;
    });
    if (pivot < 0) break;
    const chosen = (rows[pivot] = rows[pivot].map((value, _, row) => value / row[entering]));
    for (const row of [...rows.filter((other) => other !== chosen), prices]) {
      const factor = row[entering];
      chosen.forEach((value, j) => (row[j] -= factor * value));
    }
    basis[pivot] = entering;
  }
  const shares = Array(count).fill(0);
  let missing = 0;
  basis.forEach((corner, i) => (corner < count ? (shares[corner] = rows[i][count]) : (missing += Math.abs(rows[i][count]))));
  return missing < 1e-6 ? shares : null;
}

/** A number with its sign; two digits of `scale`, such as half of its interval, are shown. */
export function signed(value, scale = value) {
  const size = Math.abs(scale) || 1;
  const digits = Math.min(6, Math.max(0, 1 - Math.floor(Math.log10(size))));
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return `${value < 0 ? "−" : "+"}${text}`;
}

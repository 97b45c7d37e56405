// Weights as points of a simplex: lattices, the nearest point, moves that keep the sum at 1.

/** All points of `count` weights that are multiples of 1 / `parts`. */
export function lattice(count, parts) {
  const points = [];
  const fill = (point, left) => {
    if (point.length === count - 1) return points.push([...point, left].map((share) => share / parts));
    for (let share = left; share >= 0; share--) fill([...point, share], left - share);
  };
  fill([], parts);
  return points;
}

/** The vertices, the midpoints of the edges, and the centre. */
export function coarse(count) {
  const vertex = (i) => Array.from({ length: count }, (_, j) => (i === j ? 1 : 0));
  const points = Array.from({ length: count }, (_, i) => vertex(i));
  for (let i = 0; i < count; i++) {
    for (let j = i + 1; j < count; j++) points.push(mix(vertex(i), vertex(j), 0.5));
  }
  if (count > 2) points.push(Array(count).fill(1 / count));
  return points;
}

/** The lattices of a set with `count` objectives, from coarse to fine; each holds the one before it. */
export function levels(count) {
  if (count === 1) return [[[1]]];
  if (count === 2) return [coarse(2), lattice(2, 8), lattice(2, 24)];
  if (count === 3) return [coarse(3), lattice(3, 6), lattice(3, 12)];
  return count <= 5 ? [coarse(count), [...coarse(count), ...lattice(count, 3), ...lattice(count, 4)]] : [coarse(count)];
}

export function distance(a, b) {
  return Math.hypot(...a.map((value, i) => value - b[i]));
}

export function mix(a, b, share) {
  return a.map((value, i) => (1 - share) * value + share * b[i]);
}

/** Positive weights that sum to 1; equal ones where none is positive. */
export function normalised(weights) {
  const positive = weights.map((value) => Math.max(0, value) || 0);
  const sum = positive.reduce((a, b) => a + b, 0);
  return sum > 0 ? positive.map((value) => value / sum) : positive.map(() => 1 / weights.length);
}

/** The weights with number `index` set to `value`, and the others rescaled so that the sum stays 1. */
export function linked(weights, index, value) {
  const wanted = Math.min(1, Math.max(0, value));
  const rest = weights.reduce((sum, weight, i) => sum + (i === index ? 0 : weight), 0);
  const others = weights.length - 1;
  return weights.map((weight, i) => {
    if (i === index) return others ? wanted : 1;
    return rest > 1e-9 ? (weight * (1 - wanted)) / rest : (1 - wanted) / others;
  });
}

/** The nearest point of the simplex (Euclidean): max(0, v_i - t) with t so that the sum is 1. */
export function project(values) {
  const sorted = [...values].sort((a, b) => b - a);
  let sum = 0;
  let threshold = 0;
  sorted.forEach((value, i) => {
    sum += value;
    const candidate = (sum - 1) / (i + 1);
    if (value > candidate) threshold = candidate;
  });
  return values.map((value) => Math.max(0, value - threshold));
}

/** Whole hundredths that sum to 1: the largest remainders are rounded up. */
export function hundredths(weights) {
  const scaled = weights.map((weight) => weight * 100);
  const floors = scaled.map((value) => Math.floor(value + 1e-6));
  const missing = 100 - floors.reduce((a, b) => a + b, 0);
  const order = scaled.map((value, i) => [value - floors[i], i]).sort((a, b) => b[0] - a[0]);
  order.slice(0, missing).forEach(([, i]) => floors[i]++);
  return floors.map((value) => value / 100);
}

/** A name of the weights by which pictures are found. */
export function key(weights) {
  return weights.map((weight) => Math.round(weight * 1e4)).join(" ");
}

export function percent(weight) {
  return `${Math.round(weight * 100)} %`;
}

export function describe(names, weights) {
  return names.map((name, i) => `${name} ${percent(weights[i])}`).join(", ");
}

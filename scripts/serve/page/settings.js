// The settings of a picture: what the address, a request and a PNG's own settings say about it.

import { key, normalised } from "./simplex.js";

/** Settings that only travel where they are not the set's. */
const OPTIONAL = ["steps", "guidance", "guidance_scale", "negative_prompt", "width", "height", "weights_on"];
const LARGEST_SEED = 2n ** 64n - 1n;

export function defaults(set) {
  return {
    set: set.name,
    prompt: set.prompts[0] ?? "",
    seed: "0", // text: seeds go up to 2^64 - 1, and a JavaScript number does not
    weights: weightsOf(set, set.default_weights),
    strength: 1,
    rule: set.default_rule,
    compare: "",
    rule_options: {},
    steps: set.steps,
    guidance: set.guidance,
    guidance_scale: set.guidance_scale,
    negative_prompt: "",
    width: set.width,
    height: set.height,
    weights_on: "exponents",
  };
}

export function names(set) {
  return set.objectives.map((objective) => objective.name);
}

/** Weights in the order of the objectives; those that are not named are 0. */
export function weightsOf(set, mapping) {
  return normalised(names(set).map((name) => Number(mapping[name] ?? 0)));
}

/** Weights by name, as requests and commands send them: rounded to a millionth, without zeros. */
export function mapping(set, weights) {
  const rounded = weights.map((weight) => Math.round(weight * 1e6) / 1e6);
  return Object.fromEntries(names(set).map((name, i) => [name, rounded[i]]).filter(([, weight]) => weight > 0));
}

/** The settings that are not those of the set, in the words of the API. */
export function differing(set, settings) {
  const usual = defaults(set);
  const different = Object.fromEntries(
    OPTIONAL.filter((name) => settings[name] !== usual[name]).map((name) => [name, settings[name]]),
  );
  if (settings.strength !== 1) different.strength = settings.strength;
  if (settings.rule !== usual.rule) different.rule = settings.rule;
  if (Object.keys(settings.rule_options).length) different.rule_options = settings.rule_options;
  return different;
}

/** The JSON of a request for pictures of one or several weights. */
export function request(set, settings, rows, more = {}) {
  const { width, height, ...different } = differing(set, settings);
  const size = width || height ? { size: `${settings.width}x${settings.height}` } : {};
  const weights = rows.map((row) => mapping(set, row));
  const body = {
    model: settings.set,
    prompt: settings.prompt,
    ...different,
    rule: settings.rule,
    ...size,
    weights: weights.length === 1 ? weights[0] : weights,
    ...more,
  };
  return `${JSON.stringify(body).slice(0, -1)},"seed":${settings.seed}}`;
}

/** What every picture of one lattice shares: all settings but weights and steps. */
export function context(set, settings) {
  const { weights, steps, compare, ...shared } = settings;
  return JSON.stringify({ ...shared, id: set.id }); // a server may come back with another set of the name
}

export function checkSeed(text) {
  if (!/^\d+$/.test(text) || BigInt(text) > LARGEST_SEED) throw new Error("expected a whole number from 0 to 2^64 - 1");
  return BigInt(text).toString();
}

/** `gate=0.4, n=3` → { gate: 0.4, n: 3 }. */
export function parseOptions(text) {
  const entries = text.split(",").filter((entry) => entry.trim());
  return Object.fromEntries(
    entries.map((entry) => {
      const [name, value, ...rest] = entry.split("=").map((part) => part.trim());
      if (!name || !value || rest.length) throw new Error("expected NAME=VALUE, with commas between several");
      return [name, Number.isNaN(Number(value)) ? value : Number(value)];
    }),
  );
}

export function writeOptions(options) {
  return Object.entries(options).map(([name, value]) => `${name}=${value}`).join(", ");
}

/** The part of the address after #: the set, prompt, seed and weights, and what is not the set's default. */
export function toAddress(set, settings) {
  const address = new URLSearchParams();
  address.set("set", set.name);
  address.set("prompt", settings.prompt);
  address.set("seed", settings.seed);
  const weights = Object.entries(mapping(set, settings.weights));
  address.set("weights", weights.map(([name, weight]) => `${name}=${weight}`).join(","));
  for (const [name, value] of Object.entries(differing(set, settings))) {
    address.set(name, name === "rule_options" ? writeOptions(value) : value);
  }
  if (settings.compare) address.set("compare", settings.compare);
  return address.toString();
}

export function sameWeights(a, b) {
  return key(a) === key(b);
}

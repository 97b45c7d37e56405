// Settings from elsewhere, a PNG or an address: each is checked before it is taken over, and a wrong one is named.

import { checkSeed, defaults, names, parseOptions, weightsOf } from "./settings.js";

const GUIDANCE = ["off", "shared", "full", "embedded"];
const WEIGHTS_ON = ["exponents", "rewards"];
const NUMBERS = { strength: [0, false], steps: [1, true], guidance_scale: [0, false], width: [1, true], height: [1, true] };

/** The settings in a PNG as those of the page, for the set they name; an Error for what this server cannot draw. */
export function fromPicture(text, sets) {
  let stored;
  try {
    stored = JSON.parse(text);
  } catch {
    throw new Error("its settings are not JSON");
  }
  if (!isMapping(stored)) throw wrong("settings", stored, "a JSON object");
  const seed = topLevel(text, "seed");
  if (seed === null) throw new Error("its settings have no seed");
  const row = Array.isArray(stored.weights) ? stored.weights[0] : stored.weights; // a strip's begin with the first
  return complete(setOf(stored.set, sets), { ...stored, weights: row, seed, compare: "" });
}

/** The settings in an address, after #. */
export function fromAddress(text, sets) {
  const address = Object.fromEntries(new URLSearchParams(text));
  const set = address.set === undefined ? sets[0] : setOf(address.set, sets);
  if (address.weights !== undefined) address.weights = mapping(address.weights);
  for (const name of Object.keys(NUMBERS)) {
    if (address[name]?.trim() && !Number.isNaN(Number(address[name]))) address[name] = Number(address[name]);
  }
  if (address.rule_options !== undefined) {
    try {
      address.rule_options = parseOptions(address.rule_options);
    } catch (error) {
      throw new Error(`its rule_options are ${JSON.stringify(address.rule_options)}; ${error.message}`);
    }
  }
  return complete(set, address);
}

/** `a=0.7,b=0.3` → { a: 0.7, b: 0.3 }. */
function mapping(text) {
  const entries = text.split(",").map((entry) => entry.split(/=(?=[^=]*$)/));
  if (entries.some(([name, weight]) => !name || !weight?.trim() || Number.isNaN(Number(weight)))) {
    throw wrong("weights", text, "NAME=WEIGHT, with commas between several");
  }
  return Object.fromEntries(entries.map(([name, weight]) => [name, Number(weight)]));
}

function setOf(name, sets) {
  const set = sets.find((one) => one.name === name);
  if (set) return set;
  if (typeof name !== "string") throw wrong("set", name, "the name of a set");
  throw new Error(`its set is ${shortly(name)}, which this server does not have; it has ${sets.map((one) => one.name).join(", ")}`);
}

/** Settings of any source, those that are missing being the set's. */
function complete(set, given) {
  const settings = { ...defaults(set), set: set.name };
  const take = (name, isRight, expected) => {
    if (given[name] === undefined || given[name] === null) return;
    if (!isRight(given[name])) throw wrong(name, given[name], expected);
    settings[name] = given[name];
  };
  const oneOf = (name, known) => take(name, (value) => known.includes(value), `one of ${known.filter(Boolean).join(", ")}`);
  const rules = set.rules.map((rule) => rule.name);
  const isText = (value) => typeof value === "string";
  take("prompt", (value) => isText(value) && value.trim() !== "", "a text");
  take("negative_prompt", isText, "a text");
  oneOf("rule", rules);
  oneOf("compare", ["", ...rules]);
  oneOf("guidance", GUIDANCE);
  oneOf("weights_on", WEIGHTS_ON);
  for (const [name, [least, whole]] of Object.entries(NUMBERS)) {
    const fits = (value) => Number.isFinite(value) && value >= least && (!whole || Number.isInteger(value));
    take(name, fits, `a ${whole ? "whole " : ""}number from ${least}`);
  }
  const isOption = (value) => ["number", "string", "boolean"].includes(typeof value);
  take("rule_options", (value) => isMapping(value) && Object.values(value).every(isOption), 'options of the rule, {"gate": 0.4} for instance');
  if (given.seed !== undefined) {
    try {
      settings.seed = checkSeed(given.seed);
    } catch (error) {
      throw new Error(`its seed is ${given.seed.slice(0, 60)}; ${error.message}`);
    }
  }
  if (given.weights !== undefined && given.weights !== null) settings.weights = checkWeights(set, given.weights);
  return settings;
}

function checkWeights(set, row) {
  if (!isMapping(row) || !Object.keys(row).length) throw wrong("weights", row, 'weights by name, {"a": 0.7, "b": 0.3} for instance');
  for (const [name, weight] of Object.entries(row)) {
    if (!names(set).includes(name)) throw new Error(`its weights name ${shortly(name)}, which is no objective of the set ${set.name}`);
    if (Array.isArray(weight) || isMapping(weight)) throw new Error("its weights change over the steps, which this page cannot show");
    if (!Number.isFinite(weight)) throw wrong(`weight of ${name}`, weight, "a number");
    if (weight < 0) throw new Error(`its weight of ${name} is ${weight}, below 0, which this page cannot show`);
  }
  if (!Object.values(row).some((weight) => weight > 0)) throw new Error("its weights are all 0, which this page cannot show");
  return weightsOf(set, row);
}

function isMapping(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function wrong(name, value, expected) {
  const plural = ["settings", "weights", "rule_options", "steps"].includes(name);
  return new Error(`its ${name} ${plural ? "are" : "is"} ${shortly(value)}; expected ${expected}`);
}

function shortly(value) {
  const text = typeof value === "string" && /^[a-z][\w.+-]*$/i.test(value) ? value : JSON.stringify(value);
  return text.length > 60 ? `${text.slice(0, 57)}…` : text;
}

/** The text of a value of a JSON object, which numbers of JavaScript would round; null where it is missing. */
function topLevel(text, name) {
  let depth = 0;
  let found = null;
  let before = ["", ""]; // the last two tokens
  for (const [token] of text.matchAll(/"(?:[^"\\]|\\.)*"|[{}[\]:,]|[^\s{}[\]:,"]+/g)) {
    if (depth === 1 && before[1] === ":" && JSON.parse(before[0]) === name) found = token;
    if ("{[".includes(token)) depth++;
    if ("}]".includes(token)) depth--;
    before = [before[1], token];
  }
  return found;
}

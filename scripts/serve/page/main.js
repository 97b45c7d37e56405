// The page of `stepfuse serve`: settings, pictures, measured gains, exports.

import { Lost, readSets, Refusal } from "./api.js";
import * as connection from "./connection.js";
import { weightsControl } from "./controls.js";
import { byId, choices, element, fault, say } from "./elements.js";
import * as fields from "./fields.js";
import { fromAddress, fromPicture } from "./given.js";
import { pythonProgram, shellCommand } from "./export.js";
import { cellsOf } from "./gains.js";
import { showMeasured } from "./measured.js";
import { Gallery, Pace } from "./painter.js";
import * as paths from "./paths.js";
import { checkSeed, defaults, names, parseOptions, toAddress, writeOptions } from "./settings.js";
import { describe } from "./simplex.js";
import { Stage } from "./stage.js";
import * as transfer from "./transfer.js";

const TYPING = 120; // milliseconds without a key until a text is drawn
const FIELDS = ["prompt", "seed", "weights", "strength", "rule", "compare", "steps", "guidance", "guidance_scale", "size"]
  .concat(["negative_prompt", "rule_options", "weights_on", "picture", "file", "frames"]);
const HANDS = ["", "", "Move the slider", "Drag the point in the triangle"]; // by the number of objectives
const NUMBERS = ["steps", "guidance_scale", "width", "height"];

let served = null; // the answer of /v1/sets
let set = null;
let settings = null;
let weights = null; // the control
let writing = 0; // the timer of the address
const gallery = new Gallery();
const stage = new Stage(byId("figures"), { gallery, pace: new Pace(), heard: { failed, drawn: mark, exact: drawn } });

async function start() {
  connection.takeToken();
  const before = served;
  try {
    served = await readSets();
  } catch (error) {
    return failed(error, null);
  }
  byId("token-form").hidden = true;
  const several = served.sets.length > 1;
  byId("set-choice").hidden = !several;
  say(byId("set-name"), several ? "" : served.sets[0].name);
  choices(byId("set"), served.sets.map((one) => [one.name, one.name]));
  byId("main").hidden = false;
  if (before && served.sets.some((one) => one.name === settings.set)) comeBack(before.sets);
  else restore(location.hash);
}

/** The server was lost and is there again, perhaps with other sets of the same names. */
function comeBack(before) {
  const replaced = before.some((old) => served.sets.every((one) => one.id !== old.id));
  if (replaced) gallery.clear();
  const next = served.sets.find((one) => one.name === settings.set);
  const alike = names(next).join() === names(set).join();
  take(alike ? settings : { ...defaults(next), prompt: settings.prompt, seed: settings.seed });
}

/** The settings of an address, after #. */
function restore(hash) {
  try {
    take(fromAddress(hash.slice(1), served.sets));
  } catch (error) {
    take(defaults(served.sets[0]));
    fault("file", `The address was not taken over: ${error.message}`);
  }
}

/** Take over whole settings, of another set too. */
function take(next) {
  const before = set;
  set = served.sets.find((one) => one.name === next.set);
  const other = set.name !== before?.name || set.id !== before.id;
  settings = next;
  if (other) showSet();
  FIELDS.forEach((name) => fault(name, ""));
  showFields();
  changed(0);
}

function showSet() {
  byId("set").value = set.name;
  document.title = `${set.name} – stepfuse`;
  const hand = HANDS[names(set).length] ?? "Move the sliders";
  byId("hand").textContent = hand && `${hand} to change how much each counts.`;
  weights = weightsControl(byId("weights"), names(set), moved);
  const rules = set.rules.map((rule) => [rule.name, rule.name]);
  choices(byId("rule"), rules);
  choices(byId("compare"), [["", "none"], ...rules]);
  const chips = set.prompts.slice(0, 4).map((prompt) => element("button", { type: "button" }, [prompt]));
  chips.forEach((chip) => chip.addEventListener("click", () => setField("prompt", chip.textContent)));
  byId("examples").replaceChildren(...chips);
  byId("measured").hidden = byId("front").hidden = !set.evaluation;
  document.body.classList.toggle("unmeasured", !set.evaluation);
  paths.showSet(set, served.limits);
}

function showFields() {
  fields.mended();
  for (const name of ["prompt", "seed", "strength", "rule", "compare", "guidance", "weights_on", "negative_prompt", ...NUMBERS]) {
    const field = byId(name);
    if (field !== document.activeElement || field.value !== String(settings[name] ?? "")) field.value = settings[name] ?? "";
  }
  byId("rule_options").value = writeOptions(settings.rule_options);
  weights.show(settings.weights);
  showTexts();
}

/** What follows from the settings, apart from pictures. */
function showTexts() {
  say(byId("strength-value"), String(settings.strength));
  const rule = set.rules.find(({ name }) => name === settings.rule);
  say(byId("rule-summary"), rule ? `${rule.summary} Cost of a step: ${rule.cost}.`.replaceAll("`", "") : "");
  const evaluation = set.evaluation;
  if (evaluation) {
    const panel = { gains: byId("gains"), note: byId("gains-note"), title: byId("front-title"), fronts: byId("fronts"), key: byId("fronts-note") };
    showMeasured(panel, set, settings);
  }
  say(byId("command"), shellCommand(set, settings));
  say(byId("python"), pythonProgram(set, settings));
  paths.compare(set, settings);
  showState();
}

/** Whether the picture is that of the fields. */
function showState() {
  stage.setBehind(fields.anyInvalid());
  byId("save").disabled = fields.anyInvalid() || stage.views.some((view) => view.kind !== "exact");
}

/** The address is that of the settings, once the hand rests: browsers count how often it is written. */
function writeAddress() {
  clearTimeout(writing);
  writing = setTimeout(() => {
    const address = `#${toAddress(set, settings)}`;
    if (location.hash !== address) history.replaceState(null, "", address);
  }, 200);
}

/** Settings other than weights. */
function changed(wait) {
  fault("picture", "");
  byId("again").hidden = true;
  stage.change(set, settings, served.limits, wait);
  writeAddress();
  showTexts();
  mark();
}

/** The hand moves the weights. */
function moved(next) {
  settings = { ...settings, weights: next };
  fault("weights", "");
  weights.show(next);
  stage.move(settings);
  writeAddress();
  showTexts();
}

/** The lattice in the triangle. */
function mark() {
  const cells = set.evaluation ? cellsOf(set.evaluation, names(set), settings.rule) : [];
  const here = cells.filter((cell) => Math.abs(cell.strength - settings.strength) < 1e-6).map((cell) => cell.point);
  const count = names(set).length;
  const dots = count === 3 && here.length ? "; rings: measured mixtures" : "";
  const pictures = gallery.of(stage.views[0].context).filter((picture) => picture.steps <= settings.steps);
  const fewest = weights.mark(here, pictures);
  const coarse = fewest < settings.steps ? `, so far some with ${fewest} of ${settings.steps} steps` : "";
  say(byId("legend"), count === 2 || count === 3 ? `Small pictures: generated in advance${coarse}${dots}.` : "");
}

/** An exact picture is there. */
function drawn(view) {
  fields.clear(FIELDS.filter((name) => name !== "file" && name !== "frames"));
  say(byId("notice"), "");
  showState();
  byId("live").textContent = `Exact picture, ${view.settings.rule}: ${describe(names(set), view.settings.weights)}`;
}

/** A request failed: beside its field, or as a notice where the server is lost. */
function failed(error, view) {
  if (error instanceof Lost) return lost();
  if (!(error instanceof Refusal)) throw error;
  if (error.status === 401) {
    stage.stop();
    return connection.askToken();
  }
  const second = view && view !== stage.views[0] && error.param === "rule";
  const field = second ? "compare" : FIELDS.includes(error.param) ? error.param : "picture";
  if (["steps", "guidance", "guidance_scale", "size", "negative_prompt", "rule_options", "weights_on"].includes(field)) {
    byId("more").open = true;
  }
  fault(field, error.message);
  byId("again").hidden = field !== "picture";
}

/** What was asked for is drawn when the server is back. */
async function lost() {
  stage.stop();
  if (await connection.wait()) start();
}

function setField(name, value) {
  settings = { ...settings, [name]: value };
  fault(name, "");
  showFields();
  changed(0);
}

/** A field that is a setting of its own name. */
function listen(id, event, read, wait, name = id) {
  const taken = (value) => {
    settings = { ...settings, [id]: value };
    changed(wait);
  };
  fields.listen(id, event, read, { taken, refused: showState, name });
}

const { notEmpty, number } = fields;
listen("prompt", "input", notEmpty, TYPING);
listen("seed", "input", checkSeed, TYPING);
listen("strength", "input", Number, 150);
listen("rule", "change", String, 0);
listen("compare", "change", String, 0);
listen("guidance", "change", String, 0);
listen("weights_on", "change", String, 0);
listen("negative_prompt", "input", String, TYPING);
listen("rule_options", "change", parseOptions, 0);
listen("steps", "change", number(1, true), 0);
listen("guidance_scale", "change", number(0, false), 0);
listen("width", "change", number(1, true), 0, "size");
listen("height", "change", number(1, true), 0, "size");
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  if (!byId("prompt-error").textContent) changed(0);
});
byId("set").addEventListener("change", () => {
  const next = defaults(served.sets.find((one) => one.name === byId("set").value));
  take({ ...next, seed: settings.seed, prompt: set.prompts.includes(settings.prompt) ? next.prompt : settings.prompt });
});
byId("new-seed").addEventListener("click", () => setField("seed", String(crypto.getRandomValues(new Uint32Array(1))[0])));
byId("reset").addEventListener("click", () => {
  const { steps, guidance, guidance_scale, width, height } = set;
  take({ ...settings, steps, guidance, guidance_scale, width, height, negative_prompt: "", rule_options: {}, weights_on: "exponents" });
});
byId("again").addEventListener("click", () => changed(0));
byId("fronts").addEventListener("pair", () => showTexts());
window.addEventListener("hashchange", (event) => {
  connection.takeToken();
  if (served) restore(new URL(event.newURL).hash);
});

transfer.listen({
  stage,
  link: () => toAddress(set, settings),
  opened: (text, name) => {
    if (!served) throw new Error("the server has not answered yet; open it again later");
    take(fromPicture(text, served.sets));
    byId("live").textContent = `The settings of ${name} were taken over`;
  },
});
paths.listen(() => ({ set, settings }), failed);
connection.listen(start);
start();

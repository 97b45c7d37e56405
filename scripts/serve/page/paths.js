// Strips and loops: pictures from one mixture to another, drawn by the server as one file.

import { draw, Refusal } from "./api.js";
import { byId, choices, fault, say } from "./elements.js";
import { fileName, save } from "./export.js";
import { names, request } from "./settings.js";
import { describe, mix } from "./simplex.js";

let made = null; // what is shown: { bytes, type, name, body, chosen }
let abort = new AbortController();
let limits = null;

/** The ends that can be chosen: each objective alone, the default weights and the present ones. */
export function showSet(set, served) {
  limits = served;
  const ends = [...names(set).map((name, i) => [String(i), name]), ["here", "these weights"], ["default", "the set's weights"]];
  choices(byId("from"), ends, "0");
  choices(byId("to"), ends, "1");
  byId("frames").max = limits.frames;
  abort.abort();
  byId("made").hidden = true;
  made = null;
}

/** What was drawn is dimmed where the same ends would give another file now. */
export function compare(set, settings) {
  if (made) byId("made").classList.toggle("past", made.body !== bodyOf(set, settings, made.chosen).body);
}

/** The request for the pictures between two ends, and these ends. */
function bodyOf(set, settings, { ends, count, layout, format }) {
  const [from, to] = ends.map((value) => end(set, settings, value));
  const rows = Array.from({ length: count }, (_, i) => mix(from, to, i / (count - 1)));
  return { from, to, body: request(set, settings, rows, { layout, output_format: format }) };
}

function end(set, settings, value) {
  if (value === "here") return settings.weights;
  const all = names(set);
  if (value === "default") return all.map((name) => set.default_weights[name] ?? 0);
  return all.map((_, i) => (String(i) === value ? 1 : 0));
}

/** @param present gives the set and settings; @param failed takes errors that are not of this field */
export function listen(present, failed) {
  byId("strip").addEventListener("click", () => make("strip", "png", present, failed));
  byId("loop").addEventListener("click", () => make("loop", byId("format").value, present, failed));
  byId("made-save").addEventListener("click", () => save(made.bytes, made.type, made.name));
}

async function make(layout, format, present, failed) {
  const { set, settings } = present();
  const count = Number(byId("frames").value);
  if (!Number.isInteger(count) || count < 2 || count > limits.frames) {
    return fault("frames", `pictures ${byId("frames").value}; expected a whole number from 2 to ${limits.frames}`);
  }
  fault("frames", "");
  abort.abort();
  abort = new AbortController();
  const { signal } = abort;
  const chosen = { ends: ["from", "to"].map((id) => byId(id).value), count, layout, format };
  const { from, to, body } = bodyOf(set, settings, chosen);
  const button = byId(layout);
  button.setAttribute("aria-busy", "true");
  byId("made").hidden = false;
  byId("made-save").hidden = !made;
  const progress = ({ step, steps, position }) => say(byId("made-text"), position ? `Place ${position} in the queue.` : `Step ${step} of ${steps}.`);
  try {
    const [{ bytes }] = await draw(body, { signal, progress, wait: (sentence) => say(byId("made-text"), sentence) });
    const type = `image/${format}`;
    made = { bytes, type, name: fileName(settings, format, layout), body, chosen };
    const picture = byId("made-picture");
    URL.revokeObjectURL(picture.src);
    picture.src = URL.createObjectURL(new Blob([bytes], { type }));
    picture.alt = `${layout} of ${count} pictures, from ${describe(names(set), from)} to ${describe(names(set), to)}`;
    picture.dataset.layout = layout;
    const about = `“${settings.prompt}”, seed ${settings.seed}, ${settings.rule}`;
    const path = `from ${describe(names(set), from)} to ${describe(names(set), to)}`;
    made.text = `${about}, ${path}; ${count} pictures, ${Math.ceil(bytes.length / 1024)} kB`;
    say(byId("made-text"), made.text);
    byId("made-save").hidden = false;
    compare(present().set, present().settings);
  } catch (error) {
    if (signal.aborted) return;
    byId("made").hidden = !made;
    say(byId("made-text"), made?.text ?? "");
    if (error instanceof Refusal && error.status !== 401) fault("frames", error.message);
    else failed(error, null);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

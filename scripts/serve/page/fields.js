// The fields: what is typed is read and checked, and a field that is wrong keeps its error until it is mended.

import { byId, fault } from "./elements.js";

const invalid = new Map(); // by the id of a field, the name of its error

/** Whether a field holds what cannot be drawn; the settings are then the last valid ones. */
export function anyInvalid() {
  return invalid.size > 0;
}

/**
 * A field whose text is read by `read`, which may refuse it.
 *
 * @param taken called with the value
 * @param refused called after the error is shown
 * @param name of the error, which two fields may share
 */
export function listen(id, event, read, { taken, refused, name = id }) {
  byId(id).addEventListener(event, () => {
    let value;
    try {
      value = read(byId(id).value);
    } catch (error) {
      invalid.set(id, name);
      fault(name, `${id.replace("_", " ")} ${JSON.stringify(byId(id).value)}: ${error.message}`);
      return refused();
    }
    invalid.delete(id);
    clear([name]);
    taken(value);
  });
}

/** No errors any more, apart from those of fields that are still wrong. */
export function clear(names) {
  const kept = [...invalid.values()];
  names.filter((name) => !kept.includes(name)).forEach((name) => fault(name, ""));
}

/** The fields show valid settings again. */
export function mended() {
  const names = [...invalid.values()];
  invalid.clear();
  names.forEach((name) => fault(name, ""));
}

export function number(least, whole) {
  return (text) => {
    const value = Number(text);
    if (text.trim() === "" || !(value >= least && value < Infinity) || (whole && !Number.isInteger(value))) {
      throw new Error(`expected a ${whole ? "whole " : ""}number from ${least}`);
    }
    return value;
  };
}

export function notEmpty(text) {
  if (!text.trim()) throw new Error("expected a text");
  return text;
}

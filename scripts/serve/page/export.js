// The commands that draw the same picture, and files to save.

import { differing, mapping } from "./settings.js";

/** A word as a POSIX shell reads it back. */
export function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/** The shell command. */
export function shellCommand(set, settings) {
  const option = (name, value) => {
    const word = quoted(String(value));
    return String(value).startsWith("-") ? `--${name}=${word}` : `--${name} ${word}`;
  };
  const weights = Object.entries(mapping(set, settings.weights)).map(([name, weight]) => `${name}=${weight}`).join(",");
  const { rule_options: options = {}, ...different } = differing(set, settings);
  const parts = [
    `stepfuse sample ${quoted(set.source)}`,
    option("prompt", settings.prompt),
    option("weights", weights),
    option("seed", settings.seed),
    ...Object.entries({ ...different, ...options }).map(([name, value]) => option(name, value)),
    option("output", "picture.png"),
  ];
  return parts.join(" \\\n    ");
}

/** The Python program. */
export function pythonProgram(set, settings) {
  const { rule_options: options, rule, steps, ...different } = differing(set, settings);
  const text = (value) => (typeof value === "number" ? String(value) : JSON.stringify(value));
  const given = Object.entries(options ?? {}).map(([name, value]) => `${name}=${text(value)}`).join(", ");
  const more = Object.entries({ ...different, ...(steps ? { num_inference_steps: steps } : {}) });
  const weights = Object.entries(mapping(set, settings.weights)).map(([name, weight]) => `${text(name)}: ${weight}`);
  const arguments_ = [
    text(settings.prompt),
    `weights={${weights.join(", ")}}`,
    ...(given ? [`rule=RULES[${text(settings.rule)}](${given})`] : rule ? [`rule=${text(rule)}`] : []),
    ...more.map(([name, value]) => `${name}=${text(value)}`),
    `generator=torch.Generator().manual_seed(${settings.seed})`,
  ];
  return `import torch

from stepfuse import ${given ? "RULES, " : ""}FusedPipeline

pipe = FusedPipeline.from_pretrained(${text(set.source)})
image = pipe(
${arguments_.map((line) => `    ${line},`).join("\n")}
).images[0]
image.save("picture.png")`;
}

/** Let the browser save bytes as a file. */
export function save(bytes, type, name) {
  const url = URL.createObjectURL(new Blob([bytes], { type }));
  const link = document.createElement("a");
  Object.assign(link, { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A name for a file: letters and digits of the prompt, and the seed. */
export function fileName(settings, ending, kind = "") {
  const words = settings.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  return `${[...words.slice(0, 8), kind, settings.seed].filter(Boolean).join("-").slice(0, 80)}.${ending}`;
}

/** Copy text; where the clipboard may not be used, as on an address without TLS, by a selection. */
export async function copy(text) {
  try {
    return await navigator.clipboard.writeText(text);
  } catch {
    // the old way
  }
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

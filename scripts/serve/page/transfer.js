// What goes out of the page and comes back: saved pictures, links, copied commands, and pictures that are opened.

import { byId, fault } from "./elements.js";
import { copy, fileName, save } from "./export.js";
import { readText } from "./png.js";

const LARGEST = 64e6; // bytes of a file that is read

/**
 * @param stage whose pictures are saved
 * @param link gives the part of the address after #
 * @param opened called with the settings in a picture, as JSON, and its name; it may refuse them
 */
export function listen({ stage, link, opened }) {
  byId("save").addEventListener("click", () => {
    for (const { picture, settings: drawn } of stage.views) {
      save(picture.bytes, "image/png", fileName(drawn, "png", stage.views.length > 1 ? drawn.rule : ""));
    }
  });
  byId("link").addEventListener("click", async (event) => {
    const address = new URL(location);
    address.hash = link();
    confirmCopy(event.target, address.href);
  });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => confirmCopy(button, byId(button.dataset.copy).textContent));
  }
  byId("open").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    read(byId("file").files[0], opened);
    byId("file").value = "";
  });
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    byId("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) byId("drop").hidden = true;
  });
  document.addEventListener("drop", (event) => {
    byId("drop").hidden = true;
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    read(event.dataTransfer.files[0], opened);
  });
}

async function confirmCopy(button, text) {
  await copy(text);
  const label = button.textContent;
  if (label === "Copied") return;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = label), 1500);
}

/** Take over the settings of a PNG. */
async function read(file, opened) {
  if (!file) return;
  try {
    if (file.size > LARGEST) throw new Error(`it has ${Math.ceil(file.size / 1e6)} MB; expected a PNG of at most 64 MB`);
    const text = await readText(new Uint8Array(await file.arrayBuffer()));
    if (text === null) throw new Error("it holds no settings of stepfuse; expected a PNG that was saved here");
    opened(text, file.name);
  } catch (error) {
    fault("file", `${file.name}: ${error.message}`);
  }
}

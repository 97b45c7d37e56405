// One picture with its caption, which says how far it is from what was asked for.

import { element } from "./elements.js";
import { context, names, sameWeights } from "./settings.js";
import { describe } from "./simplex.js";

const SMALL = 256; // pixels: smaller pictures are enlarged by whole factors, with crisp edges

export class View {
  constructor() {
    this.image = element("img", { alt: "", draggable: "false" });
    this.waiting = element("p", { class: "waiting" }, ["generating…"]);
    this.frame = element("div", { class: "frame" }, [this.image, this.waiting]);
    this.bar = element("progress", { max: 1, value: 0, "aria-label": "Denoising" });
    this.rule = element("b");
    this.text = element("span", { class: "text" });
    const caption = element("figcaption", {}, [this.rule, this.text]);
    this.root = element("figure", { class: "view" }, [this.frame, this.bar, caption]);
    this.image.addEventListener("load", () => this.#loaded());
    this.idle();
  }

  take(set, settings, several) {
    Object.assign(this, { set, settings, context: context(set, settings) });
    this.rule.textContent = several ? settings.rule : "";
    this.fit();
  }

  showNearest(gallery) {
    const { weights, steps } = this.settings;
    const picture = gallery.get(this.context, weights, steps) ?? gallery.nearest(this.context, weights, steps);
    this.picture = picture;
    this.kind = null;
    if (picture) this.kind = picture.steps === steps && sameWeights(picture.weights, weights) ? "exact" : "nearest";
    this.root.dataset.kind = this.kind ?? "none";
    this.#caption();
    if (!picture) {
      this.image.alt = ""; // what is dimmed is of other settings
      return;
    }
    if (this.image.src !== picture.url) this.image.src = picture.url;
    else if (this.image.complete) this.#loaded();
    const all = names(this.set);
    this.image.alt = `${this.settings.prompt}; ${describe(all, picture.weights)}`;
  }

  setBehind(behind) {
    if (this.behind === behind) return;
    this.behind = behind;
    this.#caption();
  }

  #caption() {
    const { picture, behind } = this;
    this.root.classList.toggle("behind", Boolean(behind));
    if (!picture) {
      this.text.textContent = "";
      return;
    }
    const { weights, steps } = this.settings;
    const parts = behind ? ["of the last valid settings"] : [];
    if (!sameWeights(picture.weights, weights)) parts.push("nearest generated weights");
    if (picture.steps !== steps) parts.push(`${picture.steps} of ${steps} steps`);
    this.text.textContent = parts.length ? parts.join(", ") : `exact, ${steps} steps`;
  }

  progress({ step, steps, position }) {
    this.root.classList.add("drawing");
    this.note(position > 0 ? `place ${position} in the queue` : "");
    this.bar.max = steps;
    this.bar.value = step;
  }

  idle() {
    this.root.classList.remove("drawing");
    this.bar.value = 0;
    this.note("");
  }

  note(text) {
    this.text.dataset.note = text;
  }

  #loaded() {
    this.waiting.hidden = true;
    this.fit();
    const [mark] = performance.getEntriesByName("stepfuse change");
    if (!mark || this.picture?.url !== this.image.src) return;
    if (this.measured !== mark.startTime) performance.measure("stepfuse first picture", { start: mark.startTime });
    this.measured = mark.startTime;
    if (this.kind !== "exact" || this.exact === mark.startTime) return;
    this.exact = mark.startTime;
    performance.measure("stepfuse exact picture", { start: mark.startTime });
  }

  /** The size on the screen; before the first picture, of the place where it will be. */
  fit() {
    const natural = this.image.naturalWidth || this.settings?.width;
    const room = this.root.clientWidth;
    if (!natural || !room) return;
    const small = natural < SMALL;
    this.image.classList.toggle("small", small);
    const factor = Math.max(1, Math.min(Math.floor(room / natural), Math.floor(512 / natural)));
    this.image.style.width = small ? `${Math.min(room, factor * natural)}px` : "";
    this.waiting.style.width = `${Math.min(room, small ? factor * natural : natural)}px`;
    this.waiting.style.aspectRatio = `${this.settings.width} / ${this.settings.height}`;
  }
}

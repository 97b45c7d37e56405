// The picture, or two of them: the nearest drawn one at once, and the exact one when the hand rests.

import { draw, Refusal } from "./api.js";
import { Background } from "./painter.js";
import { request } from "./settings.js";
import { View } from "./view.js";

const REST = 120; // milliseconds

export class Stage {
  /**
   * @param heard { failed(error, view), drawn(), exact(view) }: a request failed; the lattice grew; an exact picture is
   *   shown
   */
  constructor(root, { gallery, pace, heard }) {
    Object.assign(this, { root, gallery, pace, heard, views: [], abort: new AbortController() });
    document.addEventListener("visibilitychange", () => this.background?.fill());
    new ResizeObserver(() => this.views.forEach((view) => view.fit())).observe(root);
  }

  /** Other settings than the weights: what was being drawn is stopped, and drawing begins anew. */
  change(set, settings, limits, wait = REST) {
    this.background?.stop();
    this.background = null;
    Object.assign(this, { set, settings, limits });
    const rules = [settings.rule, ...(settings.compare ? [settings.compare] : [])];
    if (this.views.length !== rules.length) {
      this.views = rules.map(() => new View());
      this.root.replaceChildren(...this.views.map((view) => view.root));
      this.root.dataset.count = rules.length;
    }
    this.views.forEach((view, i) => view.take(set, { ...settings, rule: rules[i] }, rules.length > 1));
    this.#show();
    this.#later(wait);
  }

  /** Other weights: the nearest drawn picture is shown at once. */
  move(settings) {
    this.settings = settings;
    this.views.forEach((view) => (view.settings = { ...settings, rule: view.settings.rule }));
    this.#show();
    this.#later(REST);
  }

  /** Whether a field holds what cannot be drawn, so that the pictures are those of the settings before it. */
  setBehind(behind) {
    this.views.forEach((view) => view.setBehind(behind));
  }

  stop() {
    clearTimeout(this.timer);
    this.abort.abort();
    this.background?.stop();
  }

  #show() {
    performance.clearMarks("stepfuse change");
    performance.mark("stepfuse change");
    this.views.forEach((view) => view.showNearest(this.gallery));
  }

  #later(wait) {
    clearTimeout(this.timer);
    this.abort.abort();
    this.background?.pause(false);
    this.views.forEach((view) => view.idle());
    if (this.views.every((view) => view.kind === "exact")) wait = Math.max(wait, REST);
    this.timer = setTimeout(() => this.#draw(), wait);
  }

  async #draw() {
    this.abort = new AbortController();
    const { signal } = this.abort;
    this.background?.pause(true);
    const few = (view) => Math.min(this.settings.steps, this.pace.coarse(view.settings.rule, this.settings.steps));
    try {
      const coarse = this.views
        .filter((view) => !view.kind && few(view) < this.settings.steps)
        .map((view) => this.#coarse(view, few(view), signal));
      if (this.views.length > 1) await Promise.all(coarse); // one coarse picture shares its forwards with the exact one
      await Promise.all([...coarse, ...this.views.map((view) => this.#exact(view, signal))]);
    } catch (error) {
      if (signal.aborted) return;
      this.abort.abort();
      this.views.forEach((view) => view.idle());
      this.heard.failed(error, error.view);
      return;
    }
    if (!signal.aborted) this.#fill();
  }

  /** A picture with few steps, for the time until the exact one is there. */
  async #coarse(view, steps, signal) {
    view.coarse = new AbortController();
    const either = AbortSignal.any([signal, view.coarse.signal]);
    try {
      await this.#one(view, steps, either, () => {});
    } catch (error) {
      if (!view.coarse.signal.aborted) throw error;
    }
  }

  async #exact(view, signal) {
    const progress = (event) => signal.aborted || view.progress(event);
    if (view.kind !== "exact") await this.#one(view, this.settings.steps, signal, progress);
    if (signal.aborted) return;
    view.coarse?.abort();
    view.idle();
    this.heard.exact(view);
  }

  async #one(view, steps, signal, progress) {
    const { settings } = view;
    const body = request(this.set, { ...settings, steps }, [settings.weights]);
    const wait = (sentence) => view.note(sentence);
    try {
      const [picture] = await draw(body, { signal, progress: this.pace.watch(settings.rule, progress), wait });
      if (signal.aborted) return;
      this.gallery.add(view.context, settings.weights, steps, picture);
      view.showNearest(this.gallery);
      this.heard.drawn();
    } catch (error) {
      if (error instanceof Refusal) error.view = view;
      throw error;
    }
  }

  #fill() {
    const { set, limits, gallery, pace } = this;
    this.background ??= new Background({
      ...{ set, limits, gallery, pace, views: this.views.map(({ settings, context }) => ({ settings, context })) },
      weights: () => this.settings.weights,
      drawn: () => {
        this.#showBetter();
        this.heard.drawn();
      },
      failed: (error) => this.heard.failed(error, null),
    });
    this.background.pause(false);
  }

  /** A picture of the lattice may be nearer than the one that is shown. */
  #showBetter() {
    this.views.filter((view) => view.kind !== "exact").forEach((view) => view.showNearest(this.gallery));
  }
}

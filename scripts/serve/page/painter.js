// Pictures: the bounded cache of what was drawn, and the drawing of the lattice in the background.
//
// How the lattice is ordered. For two objectives its points are the ends and the middle, then eighths, then twenty-
// fourths; for three the vertices, the midpoints of the edges and the centre, then sixths, then twelfths; for more the
// coarse ones and quarters. For the present prompt and seed, and for each rule that is shown:
//   1. the present weights with few steps (as many as take 0.4 seconds, by the time measured for a step), so that
//      there is a picture within a second, and then with all steps: both with normal priority;
//   2. the coarse lattice with few steps, then the finer one with few steps;
//   3. the coarse lattice with all steps, then the finer one, then the finest one with all steps.
// Within a stage the points nearest to the present weights come first, so the hand is followed. 2 and 3 have low
// priority, two requests in flight at most, and stop when the settings change, or where a stage would take minutes.

import { draw, Lost, Refusal } from "./api.js";
import { request } from "./settings.js";
import { distance, key, levels } from "./simplex.js";

const FIRST_PICTURE = 0.4; // seconds that the steps of a coarse picture may take
const ONE_FORWARD = 0.5; // seconds that a forward of one request may take, if its rows take as long as single ones
const LONGEST_LEVEL = 180; // seconds: a lattice that takes longer is not begun
const IN_FLIGHT = 2; // so that one waits while another is drawn
const FEWER_STEPS = 0.15; // how far away, in weights, a picture with all steps is as good as one with none

/** The pictures that were drawn, by context, weights and steps; the oldest are forgotten. */
export class Gallery {
  constructor({ most = 600, mostBytes = 96e6 } = {}) {
    Object.assign(this, { most, mostBytes, bytes: 0, pictures: new Map() });
  }

  add(context, weights, steps, { bytes }) {
    const name = `${context}|${key(weights)}|${steps}`;
    this.#forget(name);
    const url = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
    const picture = { context, weights, steps, bytes, url };
    this.pictures.set(name, picture);
    this.bytes += bytes.length;
    for (const oldest of this.pictures.keys()) {
      if (this.pictures.size <= this.most && this.bytes <= this.mostBytes) break;
      this.#forget(oldest);
    }
  }

  get(context, weights, steps) {
    const name = `${context}|${key(weights)}|${steps}`;
    const picture = this.pictures.get(name);
    if (picture) {
      this.pictures.delete(name); // now the newest
      this.pictures.set(name, picture);
    }
    return picture;
  }

  #forget(name) {
    const picture = this.pictures.get(name);
    if (!picture) return;
    URL.revokeObjectURL(picture.url);
    this.bytes -= picture.bytes.length;
    this.pictures.delete(name);
  }

  /** The picture to show at these weights: the nearest one, where fewer steps count as a distance. */
  nearest(context, weights, steps) {
    let best = null;
    let least = Infinity;
    for (const picture of this.pictures.values()) {
      if (picture.context !== context) continue;
      const far = distance(picture.weights, weights) + FEWER_STEPS * Math.abs(1 - picture.steps / steps);
      if (far < least) [best, least] = [picture, far];
    }
    return best;
  }

  /** Forget everything: the pictures are those of another set of the same name. */
  clear() {
    for (const name of [...this.pictures.keys()]) this.#forget(name);
  }

  of(context) {
    return [...this.pictures.values()].filter((picture) => picture.context === context);
  }
}

/** How long a step of each rule takes, measured on every streamed picture. */
export class Pace {
  constructor() {
    this.steps = new Map();
  }

  /** Seconds of one step; a guess where the rule was not drawn yet. */
  of(rule) {
    return this.steps.get(rule) ?? Math.max(0.1, ...this.steps.values());
  }

  /** A callback of progress that measures. */
  watch(rule, progress) {
    let first = null;
    return (event) => {
      const now = performance.now();
      if (event.step > 0) {
        first ??= [event.step, now];
        const steps = event.step - first[0];
        if (event.step === event.steps && steps > 0) this.#measured(rule, (now - first[1]) / 1000 / steps);
      }
      progress(event);
    };
  }

  #measured(rule, seconds) {
    const before = this.steps.get(rule) ?? seconds;
    this.steps.set(rule, 0.5 * before + 0.5 * seconds);
  }

  /** Steps of a coarse picture: as many as fit into 0.4 s, at least 2, at most half; or all, if they fit. */
  coarse(rule, steps) {
    if (!this.steps.has(rule)) return Math.min(steps, Math.max(2, Math.round(0.2 * steps)));
    const fitting = Math.floor(FIRST_PICTURE / this.of(rule));
    if (fitting >= steps) return steps;
    return Math.min(steps, Math.max(2, Math.min(fitting, Math.round(steps / 2))));
  }
}

/** Draws the lattices of one or two contexts, with low priority, until it is stopped. */
export class Background {
  constructor({ gallery, pace, set, limits, views, weights, drawn, failed }) {
    Object.assign(this, { gallery, pace, set, limits, views, weights, drawn, failed });
    this.abort = new AbortController();
    this.pending = new Set();
    this.finished = new Set(); // what was drawn here, also where the gallery has forgotten it
    this.flying = 0;
    this.paused = false;
    this.levels = levels(set.objectives.length);
  }

  stop() {
    this.abort.abort();
  }

  /** While an exact picture is awaited nothing new is begun. */
  pause(paused) {
    this.paused = paused;
    if (!paused) this.fill();
  }

  fill() {
    while (this.flying < IN_FLIGHT && !this.paused && !this.abort.signal.aborted && !document.hidden) {
      const job = this.#next();
      if (!job) return;
      this.flying++;
      this.#draw(job).finally(() => {
        this.flying--;
        this.fill();
      });
    }
  }

  /** The stages, in their order: see the comment at the top. */
  *#stages() {
    if (!this.views.length) return;
    const all = this.views[0].settings.steps;
    const few = Math.min(...this.views.map((view) => this.pace.coarse(view.settings.rule, all)));
    const [first, second, third] = this.levels;
    if (few < all) {
      yield [first, few];
      if (second) yield [second, few];
    }
    yield [first, all];
    if (second) yield [second, all];
    if (third) yield [third, all];
  }

  #next() {
    for (const [points, steps] of this.#stages()) {
      const left = this.views.map((view) => [view, points.filter((point) => !this.#has(view, point, steps))]);
      const each = ([view]) => steps * this.pace.of(view.settings.rule);
      const seconds = left.reduce((sum, one) => sum + one[1].length * each(one), 0);
      if (seconds > LONGEST_LEVEL) return null;
      const [view, open] = left.reduce((a, b) => (b[1].length > a[1].length ? b : a));
      if (!open.length) continue;
      const here = this.weights();
      open.sort((a, b) => distance(a, here) - distance(b, here));
      const fitting = Math.floor(ONE_FORWARD / this.pace.of(view.settings.rule));
      return { view, steps, points: open.slice(0, Math.max(2, Math.min(fitting, 8))) };
    }
    return null;
  }

  #has(view, point, steps) {
    const name = `${view.context}|${key(point)}|${steps}`;
    return this.gallery.pictures.has(name) || this.pending.has(name) || this.finished.has(name);
  }

  async #draw({ view, steps, points }) {
    const keys = points.map((point) => `${view.context}|${key(point)}|${steps}`);
    keys.forEach((name) => this.pending.add(name));
    const body = request(this.set, { ...view.settings, steps }, points, { priority: "low" });
    try {
      const pictures = await draw(body, { signal: this.abort.signal });
      keys.forEach((name) => this.finished.add(name));
      pictures.forEach((picture, i) => this.gallery.add(view.context, points[i], steps, picture));
      this.drawn(points.length);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error instanceof Refusal && error.status === 400) {
        // Not every rule draws every mixture. The exact picture says so where it matters.
        this.views = this.views.filter((other) => other !== view);
        return;
      }
      this.stop();
      if (error instanceof Lost || error instanceof Refusal) this.failed(error);
      else throw error;
    } finally {
      keys.forEach((name) => this.pending.delete(name));
    }
  }
}

// The server's HTTP API. Addresses are relative, so that the page also works below a path of a proxy.

const TOKEN = "stepfuse-token";

/** A refusal of the server: one sentence, the field it is about, and how long to wait before the next try. */
export class Refusal extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }

  /** Whether the same request may succeed later; one that is too large for the memory does not. */
  get passes() {
    return this.status === 429 || (this.status === 503 && this.code !== "out_of_memory");
  }
}

/** The server does not answer. */
export class Lost extends Error {}

let kept = null; // the token, where a frame of another site may not store it

export function keepToken(token) {
  kept = token;
  try {
    sessionStorage.setItem(TOKEN, token);
  } catch {
    // until the page is left
  }
}

function readToken() {
  try {
    return sessionStorage.getItem(TOKEN);
  } catch {
    return kept;
  }
}

export function hasToken() {
  return readToken() !== null;
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  const token = readToken();
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Lost("the server does not answer");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { error = {} } = await response.json().catch(() => ({}));
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  return new Refusal(String(error.message ?? `the server answers ${response.status}`), {
    status: response.status,
    param: error.param ?? null,
    code: error.code ?? null,
    retryAfter: Number.isFinite(seconds) ? seconds : null,
  });
}

export async function readSets() {
  return (await request("v1/sets")).json();
}

export async function isThere() {
  try {
    return (await fetch("health", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/**
 * Draw pictures: a list of { bytes, settings, format }.
 *
 * With `progress` they are streamed, and it is called with { step, steps, position }. Where the queue is full or the
 * server stops, `wait` is called with a sentence that says so, and when the next try is.
 */
export async function draw(body, { signal, progress = null, wait = null }) {
  for (;;) {
    try {
      return await drawOnce(body, { signal, progress });
    } catch (error) {
      if (!(error instanceof Refusal) || !error.passes) throw error;
      const seconds = Math.ceil(Math.min(60, Math.max(1, error.retryAfter ?? 2)));
      wait?.(`The ${error.status === 429 ? "queue is full" : "server is stopping"}; trying again in ${seconds} s.`);
      await sleep(seconds * 1000, signal);
    }
  }
}

async function drawOnce(body, { signal, progress }) {
  const text = progress ? `${body.slice(0, -1)},"stream":true}` : body;
  const headers = { "Content-Type": "application/json" };
  const response = await request("v1/images/generations", { method: "POST", headers, body: text, signal });
  if (!progress) {
    const answer = await response.json();
    return answer.data.map((one) => picture(one, answer.output_format));
  }
  const pictures = [];
  for await (const { event, data } of events(response)) {
    if (event === "error") throw new Refusal(String(data.error?.message), { status: 500, param: data.error?.param });
    if (event === "image_generation.progress") progress(data);
    if (event === "image_generation.completed") pictures[data.index ?? pictures.length] = picture(data, data.output_format);
  }
  if (!pictures.length) throw new Lost("the server ended the answer before the picture");
  return pictures;
}

/** Server-sent events of an answer. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Lost("the server ended the answer before the picture");
    }
    text += part.value ?? "";
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const fields = block.split(/\r?\n/).map((line) => line.match(/^(event|data): ?(.*)$/)).filter(Boolean);
      const of = (name) => fields.filter(([, field]) => field === name).map(([, , value]) => value).join("\n");
      if (of("data") && of("data") !== "[DONE]") yield { event: of("event"), data: JSON.parse(of("data")) };
    }
    if (part.done) return;
  }
}

function picture(one, format) {
  const bytes = Uint8Array.from(atob(one.b64_json), (letter) => letter.charCodeAt(0));
  return { bytes, settings: one.settings, format };
}

export function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("aborted", "AbortError"));
    });
  });
}

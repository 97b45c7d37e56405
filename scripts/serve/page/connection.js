// The way to the server: its token, and what is said and done while it does not answer.

import { hasToken, isThere, keepToken, sleep } from "./api.js";
import { byId, say } from "./elements.js";

let waiting = false;

/** `#token=…` is kept for this tab and removed from the address. */
export function takeToken() {
  const address = new URLSearchParams(location.hash.slice(1));
  if (!address.has("token")) return;
  keepToken(address.get("token"));
  address.delete("token");
  history.replaceState(null, "", address.size ? `#${address}` : location.pathname + location.search);
}

/** Show the field for the token, and that one was given. */
export function askToken() {
  byId("token-form").hidden = false;
  say(byId("token-error"), hasToken() ? "The token is wrong." : "");
  byId("token").focus();
}

export function listen(again) {
  byId("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keepToken(byId("token").value.trim());
    byId("token").value = "";
    again();
  });
}

/** The server does not answer: it is asked again, less and less often, until it is back. */
export async function wait() {
  if (waiting) return false;
  waiting = true;
  for (let seconds = 1; ; seconds = Math.min(8, 2 * seconds)) {
    say(byId("notice"), `The server does not answer. Trying again in ${seconds} s.`);
    await sleep(1000 * seconds);
    if (await isThere()) break;
  }
  waiting = false;
  say(byId("notice"), "");
  return true;
}

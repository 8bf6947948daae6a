// Requests to this server, with the key that was entered. No other host is ever asked.

const KEY = "homestill.key";

/** The key of this tab. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** What went wrong, in the server's words. */
export class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * GET, or POST where there is a body; gives {body, headers, ms}.
 * Throws Problem, or DOMException where `signal` ended it.
 */
export async function ask(path, { body, signal } = {}) {
  const headers = { accept: "application/json" };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  const began = performance.now();
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "the server does not answer");
  }
  const text = await response.text();
  let value = null;
  try {
    value = JSON.parse(text);
  } catch {
    value = null; // said below, with the status
  }
  if (!response.ok) throw new Problem(response.status, message(value) || `the server answered ${response.status}`);
  if (value === null) throw new Problem(response.status, "the server's answer is not JSON");
  return { body: value, headers: response.headers, ms: performance.now() - began };
}

const message = (value) => value && value.error && (value.error.message || (typeof value.error === "string" && value.error));

// Polls the figures while somebody looks, asks for a key where one is needed.

import { at } from "./dom.js";
import { ask, key } from "./api.js";
import * as live from "./live.js";
import * as playground from "./playground.js";
import * as releases from "./releases.js";

const EVERY_MS = 2000;
const RELEASES_EVERY = 5; // so many polls
const FEW = 20, ALL = 200; // recent requests

let timer = null;
let turn = 0; // of two polls at once only the later one goes on
let polls = 0;
let recent = FEW;
let refused = false; // no polling until a key is entered

async function poll() {
  clearTimeout(timer);
  if (document.hidden || refused) return;
  const mine = ++turn;
  try {
    const { body } = await ask(`/api/live?recent=${recent}`);
    live.draw(body);
    at("recent-more").hidden = recent > FEW || body.recent.length < FEW;
    await shelf(body);
    pulse("live", "Live");
  } catch (error) {
    if (error.status === 401) {
      refused = true;
      pulse("failed", "Needs an API key");
      askForKey(key.get() ? "This key is not one of the endpoint's." : "");
      return;
    }
    pulse("failed", error.status === 403 ? error.message : `Not connected: ${error.message}`);
  }
  if (mine === turn) timer = setTimeout(poll, EVERY_MS);
}

let known = "";

/** Releases: now and then, and at once when another one is in use. */
async function shelf(figures) {
  const now = figures.tasks.map((task) => `${task.name} ${task.release}`).join();
  const changed = now !== known;
  polls += 1;
  if (!changed && polls % RELEASES_EVERY) return;
  const { body } = await ask("/api/releases");
  releases.draw(body);
  playground.offer(body.tasks.map((task) => task.name));
  if (changed) await describe();
  known = now;
}

/** What programs can be asked; an endpoint without them has the message box. */
async function describe() {
  try {
    playground.describe((await ask("/openapi.json")).body);
  } catch (error) {
    if (error.status !== 404) throw error;
  }
}

function pulse(kind, words) {
  at("pulse").className = `pulse ${kind}`;
  const text = at("pulse").querySelector(".words");
  if (text.textContent !== words) text.textContent = words;
}

function askForKey(problem) {
  at("key-button").hidden = false;
  at("key-problem").textContent = problem;
  at("key-problem").hidden = !problem;
  if (!at("key-dialog").open) at("key-dialog").showModal();
}

function keys() {
  at("key-button").hidden = !key.get();
  at("key-button").addEventListener("click", () => askForKey(""));
  at("key-close").addEventListener("click", () => at("key-dialog").close());
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(at("key-input").value.trim());
    at("key-input").value = "";
    at("key-dialog").close();
    refused = false;
    known = "";
    poll();
  });
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  const label = () => {
    at("theme-button").textContent = now() === "dark" ? "Light" : "Dark";
    at("theme-button").setAttribute("aria-label", `Use the ${now() === "dark" ? "light" : "dark"} theme`);
  };
  at("theme-button").addEventListener("click", () => {
    const next = now() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("homestill.theme", next);
    } catch {
      // storage is switched off: the choice holds for this page
    }
    label();
  });
  dark.addEventListener("change", label);
  label();
}

live.start(() => {
  recent = ALL;
  poll();
});
playground.start();
keys();
theme();
document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();

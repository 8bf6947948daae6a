// The playground: asks the endpoint as any client would, and shows who answered and why.

import { at, h, show } from "./dom.js";
import { ask } from "./api.js";
import { gauge } from "./charts.js";
import { badge } from "./live.js";
import { count, guarantee, reason, time, usd } from "./words.js";

let programs = {}; // task → JSON schema of its fields
let under_way = null;

/** Called once. */
export function start() {
  at("playground").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  at("playground").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      at("playground").requestSubmit();
    }
  });
  at("play-task").addEventListener("change", () => drawForm(true));
  at("play-mode").addEventListener("change", () => drawFields());
  at("play-cancel").addEventListener("click", () => under_way && under_way.abort());
}

/** The tasks that may be asked; a choice and a text that were made stay. */
export function offer(names) {
  const select = at("play-task");
  const before = select.value;
  const known = names.length ? names : [""];
  if ([...select.options].map((each) => each.value).join() === known.join()) return;
  select.replaceChildren(...known.map((name) => h("option", { value: name }, name || "no release yet: the teacher")));
  if (known.includes(before)) select.value = before;
  drawForm(before !== select.value || !at("play-fields").children.length);
}

/** Reads the programs' fields from the API's own description. */
export function describe(document) {
  programs = Object.fromEntries(Object.entries(document.paths || {}).flatMap(([path, methods]) => {
    const [, task] = /^\/v1\/predict\/([a-z0-9-]+)$/.exec(path) || [];
    const schema = task && resolve(document, methods.post?.requestBody?.content?.["application/json"]?.schema);
    const single = schema && (schema.properties ? schema : (schema.anyOf || schema.oneOf || []).map((each) => resolve(document, each)).find((each) => each?.properties && !each.properties.batch));
    return single?.properties ? [[task, { ...single, properties: mapped(single.properties, (each) => resolve(document, each)) }]] : [];
  }));
  drawForm(false);
}

function drawForm(changed) {
  const has = Boolean(programs[at("play-task").value]);
  const was = !at("play-mode").hidden;
  at("play-mode").hidden = !has;
  const begun = [...at("play-fields").querySelectorAll("textarea, input")].some((each) => each.value || each === document.activeElement);
  if (!changed && at("play-fields").children.length && (has === was || begun)) return; // what is being written stays
  for (const each of at("playground").elements.mode) each.checked = each.value === (has ? "predict" : "chat");
  drawFields();
}

const mode = () => [...at("playground").elements.mode].find((each) => each.checked).value;

function drawFields() {
  const task = at("play-task").value;
  const named = task === "" ? [h("label", {}, "Model ", h("input", { name: "model", required: true, value: "gpt-4o", autocomplete: "off" }))] : [];
  if (mode() === "chat")
    return at("play-fields").replaceChildren(...named, h("label", {}, "Message", h("textarea", { name: "message", rows: 4, required: true, placeholder: "What the user says" })));
  const { properties, required = [] } = programs[task];
  return at("play-fields").replaceChildren(...Object.entries(properties).map(([name, schema]) =>
    h("label", {}, h("span", {}, name, required.includes(name) ? null : h("small", {}, " (optional)")), input(name, schema, required.includes(name)))));
}

function input(name, schema, required) {
  const attributes = { name: `field-${name}`, "data-field": name, "data-kind": schema.type || "json", required };
  if (schema.enum)
    return h("select", { ...attributes, "data-kind": "enum" }, required ? null : h("option", { value: "" }, "–"), schema.enum.map((value) => h("option", { value: JSON.stringify(value) }, String(value))));
  if (schema.type === "boolean") return h("select", { ...attributes, "data-kind": "enum" }, ["false", "true"].map((value) => h("option", {}, value)));
  if (schema.type === "integer" || schema.type === "number") return h("input", { ...attributes, type: "number", step: schema.type === "integer" ? 1 : "any" });
  const json = schema.type !== "string";
  return h("textarea", { ...attributes, rows: json ? 2 : 3, placeholder: json ? "as JSON" : null, spellcheck: !json });
}

/** The fields' values by their types; throws SyntaxError for a field that is no JSON. */
function values() {
  const found = {};
  for (const each of at("play-fields").querySelectorAll("[data-field]")) {
    const { field, kind } = each.dataset;
    if (each.value === "" && !each.required) continue;
    if (kind === "string") found[field] = each.value;
    else if (kind === "number" || kind === "integer") found[field] = Number(each.value);
    else {
      try {
        found[field] = JSON.parse(each.value);
      } catch {
        throw new SyntaxError(`${field} is no JSON; write it as in ["a", "b"]`);
      }
    }
  }
  return found;
}

function request() {
  const form = at("playground").elements;
  if (mode() === "predict") return [`/v1/predict/${encodeURIComponent(form["play-task"].value)}`, values()];
  const model = form["play-task"].value || form.model.value;
  return ["/v1/chat/completions", { model, messages: [{ role: "user", content: form.message.value }] }];
}

async function send() {
  if (under_way) return;
  under_way = new AbortController();
  busy(true);
  try {
    const [path, body] = request();
    const { body: answer, headers, ms } = await ask(path, { body, signal: under_way.signal });
    show(at("play-answer"), drawAnswer(answer, headers, ms));
  } catch (error) {
    const text = error.name === "AbortError" ? "Cancelled; nobody works on it any more." : error.message;
    const hint = error.status === 401 ? " Enter a key with “API key” above." : "";
    show(at("play-answer"), h("p", { class: error.name === "AbortError" ? "note" : "problem" }, text + hint));
  } finally {
    under_way = null;
    busy(false);
  }
}

function busy(is) {
  at("play-send").disabled = is;
  at("play-cancel").hidden = !is;
  if (is) show(at("play-answer"), h("p", { class: "note" }, "Asking…"));
}

function drawAnswer(answer, headers, ms) {
  const decision = answer.homestill || {};
  const text = answer.outputs ? null : answer.choices?.[0]?.message?.content;
  const said = answer.outputs
    ? h("dl", { class: "outputs" }, Object.entries(answer.outputs).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "string" ? value : JSON.stringify(value)))))
    : h("pre", {}, text ?? JSON.stringify(answer.choices?.[0]?.message, null, 2));
  const calls = decision.calls || [decision];
  const request_id = headers.get("x-request-id");
  return h("div", { class: "answer" }, said, calls.map((call) => verdict(call, answer, ms, calls.length)),
    request_id ? h("p", { class: "note version" }, request_id) : null);
}

/** Who answered one call, and why. */
function verdict(call, answer, ms, of) {
  const known = typeof call.confidence === "number";
  const usage = of === 1 && answer.usage ? `${count(answer.usage.prompt_tokens)} in, ${count(answer.usage.completion_tokens)} out` : null;
  const facts = [
    ["Model", answer.model], ["Guarantee", guarantee(call.guarantee)], ["Cost", usd(call.cost_usd)],
    ["Latency", of === 1 ? time(ms) : null], ["Own overhead", typeof call.overhead_ms === "number" ? time(call.overhead_ms) : null], ["Tokens", usage], ["Release", call.release],
  ];
  return h("section", { class: "verdict", "aria-label": call.predictor ? `Call of ${call.predictor}` : "Who answered" },
    h("p", { class: "why" }, badge(call.route), h("span", { "data-reason": call.reason || "" }, reason(call.reason)),
      call.degraded ? h("span", { class: "tag" }, "degraded") : null, of > 1 && call.predictor ? h("span", { class: "note" }, call.predictor) : null),
    known ? h("div", { class: "measured" }, h("span", { class: "note" }, `confidence ${call.confidence.toFixed(3)}`), gauge(call.confidence, call.threshold, call.route === "local" ? "local" : "teacher")) : null,
    h("dl", { class: "facts" }, facts.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
}

/** A schema with its local $ref followed. */
function resolve(document, schema) {
  if (!schema?.$ref?.startsWith("#/")) return schema;
  return schema.$ref.slice(2).split("/").reduce((part, name) => part?.[name.replaceAll("~1", "/").replaceAll("~0", "~")], document);
}

const mapped = (object, change) => Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value)]));

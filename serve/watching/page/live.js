// The figures of GET /api/live.

import { bar, at, h, show } from "./dom.js";
import { histogram, traffic } from "./charts.js";
import { clock, count, guarantee, percent, reason, score, span, time, usd, who } from "./words.js";

let chosen = null; // the task whose histogram is shown
let last = null; // the last figures: drawn again when the window changes its width

/** Draw everything. */
export function draw(figures) {
  last = figures;
  drawShare(figures.total);
  drawTraffic(figures.minutes);
  drawSpending(figures);
  drawLatency(figures.latency_ms);
  drawHealth(figures);
  drawAlarms(figures);
  drawConfidence(figures.tasks);
  drawTasks(figures.tasks);
  drawRecent(figures.recent);
}

export const redraw = () => last && draw(last);

function drawShare(total) {
  at("share").textContent = total.local_share === null ? "–" : percent(total.local_share);
  if (!total.requests) return;
  const parts = [`${count(total.local)} of ${count(total.local + total.teacher)} answers`];
  if (total.failed) parts.push(`${count(total.failed)} not answered`);
  at("share-note").textContent = `${parts.join(", ")}. The teacher cost ${usd(total.cost_usd)}.`;
  show(at("share-bar"), bar(total.local_share || 0, "local", `${percent(total.local_share)} local`));
}

function drawTraffic(minutes) {
  const box = at("traffic");
  show(box, traffic(minutes, Math.max(240, box.clientWidth)));
}

function drawSpending({ spending, total }) {
  if (!spending.length)
    return show(at("spend"),
      h("p", { class: "figure" }, usd(total.cost_usd)),
      h("p", { class: "note" }, "in the last 60 minutes. No cap is set: ", h("code", {}, "daily_usd"), " in serve.yaml sets one."));
  return show(at("spend"), spending.map(({ scope, spent_usd, cap_usd }, index) => {
    const share = cap_usd ? spent_usd / cap_usd : cap_usd === 0 ? 1 : 0;
    const kind = share >= 1 ? "failed" : share >= 0.8 ? "warn" : "teacher";
    return h("div", { class: "spending" },
      h("p", {}, h("span", { class: index ? "scope" : "scope hidden" }, scope === "all" ? "everything" : scope),
        h("b", { class: index ? "" : "figure" }, usd(spent_usd)), " ",
        h("span", { class: "note" }, cap_usd === null ? "no cap" : `of ${usd(cap_usd)}`)),
      cap_usd === null ? null : bar(share, kind, `${percent(share, 0)} of the cap`));
  }));
}

function drawLatency(routes) {
  const known = ["local", "teacher"].filter((route) => routes[route] && routes[route].n);
  if (!known.length) return show(at("latency"), h("p", { class: "note" }, "Nothing answered yet."));
  const most = Math.max(...known.map((route) => routes[route].p95));
  return show(at("latency"), h("table", {},
    h("thead", {}, h("tr", {}, h("th", {}, h("span", { class: "hidden" }, "Who")), h("th", { class: "n" }, "p50"), h("th", { class: "n" }, "p95"), h("th", { class: "n" }, "first token"))),
    h("tbody", {}, known.map((route) => h("tr", {},
      h("th", { scope: "row" }, badge(route)),
      h("td", { class: "n" }, time(routes[route].p50)),
      h("td", { class: "n" }, time(routes[route].p95), bar(routes[route].p95 / most, route)),
      h("td", { class: "n" }, time(routes[route].first_token_p50)))))));
}

const BREAKERS = { closed: "well", half_open: "trying again", open: "resting after failures" };

function drawHealth({ queue, breakers, journal, tasks, started, now }) {
  const lines = [["Local model", queue.active || queue.waiting ? `${count(queue.active)} at work, ${count(queue.waiting)} waiting` : "idle", false]];
  for (const [name, state] of Object.entries(breakers)) lines.push([name, BREAKERS[state] || state, state !== "closed"]);
  for (const { name, drift } of tasks.filter((task) => task.drift)) {
    const state = drift.alarm ? "worse than certified" : drift.allowed === null ? "watched, no baseline" : `as certified (≤ ${percent(drift.allowed)} differ)`;
    lines.push([`Answers of ${name}`, state, drift.alarm]);
  }
  lines.push(["Journal", journal.lost ? `${count(journal.lost)} requests lost` : "complete", journal.lost > 0]);
  lines.push(["Up for", span(now - started)]);
  show(at("health"), lines.map(([name, value, bad]) => h("div", {}, h("dt", {}, name), h("dd", { class: bad ? "bad" : "" }, value))));
}

function drawAlarms({ tasks, journal }) {
  const alarms = tasks.filter(({ drift }) => drift && drift.alarm).map(({ name, drift }) =>
    `Drift in ${name}: ${percent(drift.disagreement)} of audited answers differ from the teacher's, ${percent(drift.allowed)} are certified. Run the task again with new traces, or set its strategy to always-teacher.`);
  alarms.push(...tasks.filter(({ problem }) => problem).map(({ name, problem }) => `${name}: the release is not used. ${problem}`));
  if (journal.lost) alarms.push(`The journal lost ${count(journal.lost)} requests; see the log.`);
  show(at("alarms"), alarms.map((text) => h("p", { class: "alarm" }, text)));
}

function drawConfidence(tasks) {
  const known = tasks.filter(({ release, confidence }) => release || confidence.bins.some(Boolean));
  const choice = at("confidence-task");
  at("confidence-choice").hidden = known.length < 2;
  show(choice, known.map(({ name }) => h("option", {}, name)));
  const task = known.find(({ name }) => name === chosen) || [...known].sort((one, other) => other.requests - one.requests)[0];
  if (!task) return show(at("confidence"), h("p", { class: "note" }, "No release yet: every request goes to the teacher and is kept as a trace for the first one."));
  choice.value = task.name;
  const { confidence, threshold } = task;
  const total = confidence.bins.reduce((sum, value) => sum + value, 0);
  const box = at("confidence");
  const caption = threshold === null
    ? `${task.name} has no certified threshold: every request goes to the teacher.`
    : `${task.name}: ${guarantee(task.guarantee)}.`;
  return show(box,
    histogram(confidence.bins, threshold, Math.max(240, box.clientWidth)),
    h("p", { class: "note axis-title" }, "probability that the local answer is as good as the teacher's"),
    h("p", { class: "note" }, total ? caption : `No local answer since the release yet. ${caption}`));
}

function drawTasks(tasks) {
  if (!tasks.length) return show(at("tasks"), h("p", { class: "note" }, "No task has a release or was asked for yet."));
  return show(at("tasks"), h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Task"), h("th", { scope: "col", class: "n" }, "Requests"), h("th", { scope: "col", class: "n" }, "Local"), h("th", { scope: "col", class: "n wide" }, "Cost"), h("th", { scope: "col", class: "n" }, "Audits that differ"))),
    h("tbody", {}, tasks.map(({ name, requests, local_share, cost_usd, drift }) => h("tr", {},
      h("th", { scope: "row", class: "task" }, name),
      h("td", { class: "n" }, count(requests)),
      h("td", { class: "n" }, percent(local_share), local_share === null ? null : bar(local_share, "local")),
      h("td", { class: "n wide" }, usd(cost_usd)),
      h("td", { class: drift && drift.alarm ? "n bad" : "n" }, drift && drift.disagreement !== null ? `${percent(drift.disagreement)} of ${count(drift.audits)}` : "–"))))));
}

// Recent requests: a row is made once and stays, so that an opened one stays open.

const opened = new Set();

function drawRecent(requests) {
  const box = at("recent");
  if (!requests.length) return show(box, h("p", { class: "note" }, "Every request appears here with who answered, and why."));
  if (!box.querySelector("tbody")) box.replaceChildren(recentTable());
  const body = box.querySelector("tbody");
  const present = new Map([...body.children].map((row) => [row.dataset.row, row]));
  const wanted = requests.flatMap((request) => {
    const known = [present.get(request.id), present.get(`${request.id} more`)];
    return known[0] ? known : rows(request);
  });
  const keep = new Set(wanted);
  for (const row of present.values()) if (!keep.has(row)) row.remove();
  wanted.forEach((row, index) => {
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] || null);
  });
  for (const id of opened) if (!requests.some((request) => request.id === id)) opened.delete(id);
  return undefined;
}

const COLUMNS = [["Time", "time"], ["Task", "task"], ["Answered by", ""], ["Why", ""], ["Confidence", "n wide"], ["Latency", "n"], ["Cost", "n wide"]];

const recentTable = () => h("table", { class: "requests" },
  h("thead", {}, h("tr", {}, COLUMNS.map(([name, kind]) => h("th", { scope: "col", class: kind }, name)))),
  h("tbody"));

function rows(request) {
  const failed = request.route === null || request.status >= 300;
  const more = h("tr", { class: "more", "data-row": `${request.id} more`, hidden: !opened.has(request.id) }, h("td", { colspan: COLUMNS.length }, details(request)));
  const button = h("button", { type: "button", class: "disclose", "aria-expanded": String(opened.has(request.id)), "aria-label": `Details of the request at ${clock(request.created)}` }, clock(request.created));
  button.addEventListener("click", () => {
    more.hidden = !more.hidden;
    button.setAttribute("aria-expanded", String(!more.hidden));
    if (more.hidden) opened.delete(request.id);
    else opened.add(request.id);
  });
  const row = h("tr", { "data-row": request.id },
    h("td", { class: "time" }, button),
    h("td", { class: "task" }, request.task || request.asked),
    h("td", {}, badge(failed ? null : request.route), request.degraded ? h("span", { class: "tag" }, "degraded") : null),
    h("td", {}, failed ? failure(request) : reason(request.reason)),
    h("td", { class: "n wide" }, request.confidence === null ? "–" : [score(request.confidence), h("span", { class: "note" }, request.threshold === null ? "" : ` / ${score(request.threshold)}`)]),
    h("td", { class: "n" }, time(request.latency_ms)),
    h("td", { class: "n wide" }, failed && request.cost_usd === null ? "–" : usd(request.cost_usd)));
  return [row, more];
}

const failure = (request) => (request.status === 499 ? "the client went away" : `error ${request.status}`);

function details(request) {
  const tokens = request.prompt_tokens === null ? null : `${count(request.prompt_tokens)} in, ${count(request.completion_tokens || 0)} out`;
  const facts = [
    ["Confidence", request.confidence === null ? null : `${score(request.confidence)}, threshold ${score(request.threshold)}`],
    ["Guarantee", guarantee(request.guarantee)], ["Cost", usd(request.cost_usd)],
    ["Model", request.model], ["Release", request.release], ["Strategy", request.strategy], ["Tokens", tokens],
    ["First token", request.first_token_ms === null ? null : time(request.first_token_ms)],
    ["Own overhead", time(request.overhead_ms)], ["Asked through", request.endpoint], ["Key", request.key],
    ["Status", request.status], ["Error", request.error], ["Request", request.id],
  ];
  return h("dl", { class: "facts" }, facts.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/** Who answered, as a mark with a word. */
export const badge = (route) => h("span", { class: `badge ${who(route)}` }, who(route));

/** Called once: what the visitor can choose. */
export function start(showMore) {
  at("confidence-task").addEventListener("change", (event) => {
    chosen = event.target.value;
    redraw();
  });
  at("recent-more").addEventListener("click", (event) => {
    event.target.hidden = true;
    showMore();
  });
  new ResizeObserver(redraw).observe(at("traffic"));
}

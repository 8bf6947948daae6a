// The releases of GET /api/releases: what each one scored, what it promises, and which one answers.

import { at, h, show } from "./dom.js";
import { scores } from "./charts.js";
import { guarantee, percent, released, score, time, usd } from "./words.js";

const SYSTEMS = [["teacher", "teacher"], ["hybrid", "local"], ["student", "student"], ["base", "base"]];
const FIRST = 3; // releases of a task that are shown whole; older ones are folded

export function draw({ tasks }) {
  if (!tasks.length)
    return show(at("releases"), h("p", { class: "note" }, "No release yet. ", h("code", {}, "homestill run"), " makes the first one; it is taken up here without a restart."));
  const folded = new Set([...at("releases").querySelectorAll("details[open]")].map((each) => each.dataset.task));
  return show(at("releases"), tasks.map((task) => drawTask(task, folded.has(task.name))));
}

function drawTask(task, open) {
  const cards = task.releases.map((release) => drawRelease(release, task));
  const older = cards.slice(FIRST);
  return h("section", { class: "task", "data-task": task.name },
    h("h3", {}, task.name),
    task.problem ? h("p", { class: "alarm" }, task.problem) : null,
    h("div", { class: "cards" }, cards.slice(0, FIRST)),
    older.length ? h("details", { "data-task": task.name, open },
      h("summary", {}, `${older.length} older`), h("div", { class: "cards" }, older)) : null,
    h("p", { class: "note" }, "Roll back on the command line: ", h("code", {}, `homestill rollback ${task.name}`), ". It is taken up here at once."));
}

function drawRelease(release, task) {
  if (release.problem) return h("article", { class: "release" }, h("h4", {}, release.version), h("p", { class: "alarm" }, release.problem));
  const used = release.version === task.in_use;
  const rows = SYSTEMS.filter(([name]) => release.scores[name]).map(([name, kind]) => ({ name, kind, ...release.scores[name] }));
  return h("article", { class: used ? "release used" : "release", "data-version": release.version },
    h("h4", {}, released(release.version), used ? h("span", { class: "badge local" }, "in use") : null),
    h("p", { class: "note version" }, release.version),
    rows.length ? scores(rows) : h("p", { class: "note" }, "No scores in its manifest."),
    h("dl", { class: "facts" }, facts(release).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    release.teacher.stand_in ? h("p", { class: "note" }, "The teacher was a stand-in, no real API model.") : null,
    release.report ? h("p", {}, h("a", { href: release.report, target: "_blank", rel: "noopener" }, "Report",
      h("span", { class: "hidden" }, ` of ${release.version}, in a new tab`))) : null);
}

function facts({ router, latency_ms, cost_per_1k_usd, teacher, base, method, quantization }) {
  const promise = router.certified ? `${score(router.threshold)}: ${guarantee(`${router.keep}@${router.confidence}`)}` : "not certified: everything goes to the teacher";
  const { teacher: before, hybrid: after } = cost_per_1k_usd;
  return [
    ["Threshold", promise],
    ["Kept locally on the test set", percent(router.local_share)],
    ["API cost of 1,000 requests", before === undefined ? "unknown" : `${usd(before)} → ${usd(after)}`],
    ["Latency p50", latency_ms.local ? `${time(latency_ms.local.p50)} local, ${latency_ms.teacher ? time(latency_ms.teacher.p50) : "–"} teacher` : "not measured"],
    ["Made of", `${base.name}, ${method}, ${quantization}`],
    ["Teacher", teacher.model],
  ];
}

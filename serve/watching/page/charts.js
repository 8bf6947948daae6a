// Charts as inline SVG. Colours come from the style sheet, so both themes hold.

import { h, s } from "./dom.js";
import { count, percent, score } from "./words.js";

/** Requests a minute as stacked bars, `width` pixels wide: local below, teacher on it, failed on top. */
export function traffic(minutes, width) {
  const height = 132, floor = 112;
  const top = nice(Math.max(1, ...minutes.map((each) => each.requests)));
  const step = width / minutes.length;
  const tall = (value) => (value / top) * (floor - 10);
  const bars = minutes.flatMap((minute, index) => {
    let y = floor;
    return ["local", "teacher", "failed"].filter((kind) => minute[kind]).map((kind) => {
      const size = tall(minute[kind]);
      y -= size;
      return s("rect", { class: kind, x: round(index * step + step / 8), y: round(y), width: round(step * 0.75), height: round(size) });
    });
  });
  const total = minutes.reduce((sum, minute) => sum + minute.requests, 0);
  const last = minutes.at(-1);
  return s(
    "svg",
    {
      width,
      height,
      class: "chart",
      role: "img",
      "aria-label": `${count(total)} requests in 60 minutes, ${count(last ? last.requests : 0)} in this minute, at most ${count(Math.max(0, ...minutes.map((each) => each.requests)))} in one`,
    },
    [0.5, 1].map((share) => s("line", { class: "grid", x1: 0, x2: width, y1: round(floor - tall(top * share)), y2: round(floor - tall(top * share)) })),
    s("text", { class: "tick halo", x: 2, y: floor - tall(top) + 12 }, count(top)),
    bars,
    s("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }),
    s("text", { class: "tick", x: 0, y: height - 4 }, "60 min ago"),
    s("text", { class: "tick", x: width / 2, y: height - 4, "text-anchor": "middle" }, "30"),
    s("text", { class: "tick", x: width, y: height - 4, "text-anchor": "end" }, "now"),
  );
}

/** Confidences in 20 bins, with the threshold as a line: what is right of it is kept. */
export function histogram(bins, threshold, width) {
  const height = 190, floor = 168, head = 26;
  const total = bins.reduce((sum, value) => sum + value, 0);
  const most = Math.max(1, ...bins);
  const step = width / bins.length;
  const x = (value) => round(value * width);
  const bars = bins.map((value, index) => {
    const size = value ? Math.max(2, (value / most) * (floor - head)) : 0;
    const left = index * step + 1, right = (index + 1) * step - 1;
    // the bar that the threshold goes through changes its colour there
    const cut = typeof threshold === "number" ? Math.min(right, Math.max(left, threshold * width)) : right;
    const part = (kind, from, to) => to > from && s("rect", { class: kind, x: round(from), y: round(floor - size), width: round(to - from), height: round(size) });
    return s(
      "g",
      {},
      s("title", {}, `${(index / bins.length).toFixed(2)}–${((index + 1) / bins.length).toFixed(2)}: ${count(value)}`),
      part("teacher", left, cut),
      part("local", cut, right),
    );
  });
  const side = threshold > 0.6 ? "end" : "start";
  const line = threshold === null || threshold === undefined ? null : s(
    "g",
    { class: "threshold", "data-threshold": threshold },
    s("line", { x1: x(threshold), x2: x(threshold), y1: 4, y2: floor }),
    s("text", { x: x(threshold) + (side === "end" ? -7 : 7), y: 15, "text-anchor": side, class: "halo" }, `kept from ${score(threshold)}`),
  );
  return s(
    "svg",
    {
      width,
      height,
      class: "chart",
      role: "img",
      "aria-label": `Histogram of ${count(total)} confidences from 0 to 1, ` + (line ? `threshold ${score(threshold)}` : "no threshold"),
    },
    bars,
    s("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }),
    [0, 0.25, 0.5, 0.75, 1].map((value) =>
      s("text", { class: "tick", x: x(value), y: floor + 18, "text-anchor": value === 0 ? "start" : value === 1 ? "end" : "middle" }, String(value))),
    line,
  );
}

/** One answer's confidence against its threshold. */
export function gauge(confidence, threshold, kind) {
  const width = 240, x = (value) => round(value * width);
  return s(
    "svg",
    { width, height: 34, class: "chart gauge", role: "img", "aria-label": `confidence ${score(confidence)}, threshold ${score(threshold)}` },
    s("rect", { class: "track", x: 0, y: 4, width, height: 10, rx: 5 }),
    s("rect", { class: kind, x: 0, y: 4, width: x(confidence), height: 10, rx: 5 }),
    threshold === null || threshold === undefined ? null : s(
      "g",
      { class: "threshold" },
      s("line", { x1: x(threshold), x2: x(threshold), y1: 0, y2: 18 }),
      s("text", { x: x(threshold), y: 31, "text-anchor": threshold > 0.85 ? "end" : threshold < 0.15 ? "start" : "middle" }, score(threshold)),
    ),
  );
}

/** Scores of several systems with their 95 % intervals, on one scale from 0 to 1. */
export function scores(rows) {
  return h("ul", { class: "scores" }, rows.map(({ name, kind, mean, low, high }) => {
    const width = 200, x = (value) => round(Math.max(0, Math.min(1, value)) * width);
    const dots = s(
      "svg",
      { viewBox: `-5 0 ${width + 10} 16`, class: "chart", "aria-hidden": "true" },
      s("line", { class: "grid", x1: 0, x2: width, y1: 8, y2: 8 }),
      s("line", { class: `range ${kind}`, x1: x(low), x2: x(high), y1: 8, y2: 8 }),
      s("circle", { class: kind, cx: x(mean), cy: 8, r: 4.2 }),
    );
    return h("li", {}, h("span", { class: "name" }, name), dots,
      h("span", { class: "value" }, percent(mean), h("span", { class: "hidden" }, `, between ${percent(low)} and ${percent(high)}`)));
  }));
}

/** The next of 1, 2, 5, 10, 20, 50, … */
function nice(value) {
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * size).find((each) => each >= value);
}

const round = (value) => Math.round(value * 100) / 100;

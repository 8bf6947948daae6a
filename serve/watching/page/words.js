// Figures and reasons as people read them.

/** What each value of x-homestill-reason means, in one line. */
export const REASONS = {
  confident: "confident enough",
  low_confidence: "not confident enough",
  unparsable: "malformed local answer",
  out_of_distribution: "unlike the training data",
  too_long: "too long for the local model",
  not_this_task: "not this task's prompt",
  unsupported: "asks for what the local model cannot do",
  tool_loop: "goes on with who began its tool calls",
  policy: "the rules decide",
  budget: "the budget is used up",
  optimistic: "kept without waiting for the decision",
  teacher_down: "the teacher is out",
  local_down: "the local model is out",
  local_busy: "the local model is busy",
  no_release: "no release yet",
  offline: "no teacher: offline",
};

export const reason = (value) => (value ? REASONS[value] || value.replaceAll("_", " ") : "not answered");

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const count = (value) => new Intl.NumberFormat("en").format(value);

/** 0.8637 → "86.4 %". */
export const percent = (value, digits = 1) =>
  value === null || value === undefined ? "–" : `${(value * 100).toFixed(digits)} %`;

/** Confidences and thresholds: three decimals, as the headers have them. */
export const score = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));

/** Milliseconds in the unit that fits. */
export function time(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1) return `${ms.toFixed(2)} ms`;
  if (ms < 1000) return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
  return ms < 60000 ? `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s` : `${plain.format(ms / 60000)} min`;
}

/** Seconds as "3 min", "5 h" or "12 days". */
export function span(seconds) {
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} days`;
}

/** US dollars; small ones with the digits that matter, never rounded to nothing. */
export function usd(value) {
  if (value === null || value === undefined) return "unknown";
  if (value === 0) return "$0";
  if (value < 0.00001) return "< $0.00001";
  if (value < 0.01) return `$${value.toPrecision(2)}`;
  return `$${value.toFixed(value < 1 ? 3 : 2)}`;
}

/** "0.95@0.9" → what is promised, as a sentence. */
export function guarantee(value) {
  const [keep, confidence] = String(value || "").split("@").map(Number);
  if (!keep || !confidence) return "no guarantee";
  return `at least ${plain.format(keep * 100)} % of the teacher's quality, with ${plain.format(confidence * 100)} % probability`;
}

/** The local time of day of an ISO date. */
export const clock = (iso) => new Date(iso).toLocaleTimeString("en-GB");

/** "20261121T011711Z-78fa6cf1" → "21 Nov 2026, 01:17". */
export function released(version) {
  const [, year, month, day, hour, minute] = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)/.exec(version) || [];
  if (!year) return version;
  const date = new Date(Date.UTC(year, month - 1, day, hour, minute));
  return date.toLocaleString("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
}

/** Who answered, as a word. */
export const who = (route) => (route === "local" || route === "teacher" || route === "mixed" ? route : "nobody");

"use strict";
// Charts of the status page, drawn in pixels of the place they have, so that text keeps its size.

const SVG = "http://www.w3.org/2000/svg";
const DASH = "\u2014";

function node(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text !== undefined) made.textContent = text;
  return made;
}

function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  if (value === 0) return "0";
  const magnitude = Math.floor(Math.log10(Math.abs(value)));
  if (magnitude >= 9 || magnitude < -5) return value.toExponential(digits - 1);
  const places = Math.max(0, digits - 1 - magnitude);
  return value.toLocaleString("en-GB", { minimumFractionDigits: Math.min(places, 8), maximumFractionDigits: Math.min(places, 8) });
}

function unit(value, steps, missing = DASH) {
  if (value === null || value === undefined || !Number.isFinite(value)) return missing;
  for (const [size, name] of steps) if (Math.abs(value) >= size) return number(value / size) + "\u00a0" + name;
  return number(value) + "\u00a0" + steps[steps.length - 1][1];
}

const BYTES = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]];
const bytes = (value) => (value === 0 ? "0\u00a0B" : value < 1000 ? value + "\u00a0B" : unit(value, BYTES));
const count = (value) => (value >= 1e6 ? unit(value, [[1e9, "G"], [1e6, "M"]]) : value.toLocaleString("en-GB"));

function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  if (value < 0.9995) return value < 0.0005 ? "0\u00a0s" : number(value * 1000, value < 0.01 ? 2 : 3) + "\u00a0ms";
  if (value < 59.95) return number(value) + "\u00a0s";
  const whole = Math.round(value), two = (part) => String(part).padStart(2, "0");
  if (whole < 3600) return Math.floor(whole / 60) + "\u00a0min\u00a0" + two(whole % 60) + "\u00a0s";
  const minutes = Math.round(value / 60);
  if (minutes < 2880) return Math.floor(minutes / 60) + "\u00a0h\u00a0" + two(minutes % 60) + "\u00a0min";
  return Math.floor(minutes / 1440) + "\u00a0d\u00a0" + Math.floor((minutes % 1440) / 60) + "\u00a0h";
}

// For axes and whole seconds: no zeros behind the point.
const brief = (value) => value.toLocaleString("en-GB", { maximumSignificantDigits: 4 });

function ticks(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999) || raw;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(Math.abs(at * step) < step * 1e-9 ? 0 : at * step);
  return found;
}

// Ticks of a time axis with their labels, in units that people count in.
const spans = [60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];

function timeTicks(span, wanted) {
  if (span <= 120) return ticks(0, span, wanted).map((at) => [at, `${brief(at)} s`]);
  const step = spans.find((size) => span / size <= wanted) || 86400 * Math.ceil(span / 86400 / wanted);
  const [size, unit] = step < 3600 ? [60, "min"] : step < 86400 ? [3600, "h"] : [86400, "d"];
  return Array.from({ length: Math.floor(span / step + 1e-9) + 1 }, (_, index) => [index * step, `${brief(index * step / size)} ${unit}`]);
}

// One frame for curves and bars: axes, scales, and a line that follows the pointer and reads the values.
function frame(place, rounds, low, high, text, label, first) {
  const width = Math.max(260, Math.floor(place.clientWidth)), height = width < 420 ? 176 : 214;
  const axis = ticks(low, high, 5), left = Math.max(...axis.map((value) => text(value).length)) * 6.6 + 12;
  const right = width - 14, top = 14, bottom = height - 24;
  const from = first, to = Math.max(rounds[rounds.length - 1], first + 1);
  const x = (at) => left + ((at - from) / (to - from)) * (right - left);
  const y = (value) => bottom - ((value - low) / (high - low || 1)) * (bottom - top);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  for (const value of axis) {
    svg.append(node("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    svg.append(node("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, text(value)));
  }
  svg.append(node("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  for (const at of ticks(from, to, width < 420 ? 4 : 8)) {
    if (Number.isInteger(at)) svg.append(node("text", { x: x(at), y: height - 7, "text-anchor": "middle" }, at));
  }
  return { svg, x, y, left, right, top, bottom, from, to, width };
}

function readout(chart, rounds, say) {
  const line = node("line", { class: "hover", y1: chart.top, y2: chart.bottom, visibility: "hidden" });
  const label = node("text", { class: "strong halo", y: chart.top + 2, visibility: "hidden" });
  chart.svg.append(line, label);
  const hide = () => [line, label].forEach((part) => part.setAttribute("visibility", "hidden"));
  chart.svg.addEventListener("pointerleave", hide);
  chart.svg.addEventListener("pointermove", (event) => {
    const box = chart.svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * chart.width;
    let best = 0;
    rounds.forEach((round, index) => { if (Math.abs(chart.x(round) - at) < Math.abs(chart.x(rounds[best]) - at)) best = index; });
    const px = chart.x(rounds[best]), beyond = px > (chart.left + chart.right) / 2;
    line.setAttribute("x1", px); line.setAttribute("x2", px);
    label.textContent = `round ${rounds[best]}: ${say(best)}`;
    label.setAttribute("x", beyond ? px - 7 : px + 7);
    label.setAttribute("text-anchor", beyond ? "end" : "start");
    [line, label].forEach((part) => part.setAttribute("visibility", "visible"));
  });
}

function empty(place, text) {
  const said = document.createElement("p");
  said.className = "empty";
  said.textContent = text;
  place.replaceChildren(said);
}

function drawCurve(place, rounds, values, css, label, none) {
  const known = rounds.map((round, index) => [round, values[index]]).filter(([, value]) => value !== null);
  if (!known.length) return empty(place, none);
  const all = known.map(([, value]) => value), least = Math.min(...all), most = Math.max(...all);
  const margin = (most - least) * 0.08 || Math.abs(most) * 0.05 || 1;
  const chart = frame(place, known.map(([round]) => round), Math.max(least - margin, least > 0 ? 0 : -Infinity), most + margin,
    brief, label, known[0][0]);
  const path = known.map(([round, value], index) => `${index ? "L" : "M"}${chart.x(round).toFixed(1)} ${chart.y(value).toFixed(1)}`);
  chart.svg.append(node("path", { class: `curve ${css}`, d: path.join("") }));
  for (const [round, value] of known.length > 60 ? known.slice(-1) : known) {
    chart.svg.append(node("circle", { class: `point ${css}`, cx: chart.x(round), cy: chart.y(value), r: known.length > 30 ? 2.6 : 3.6 }));
  }
  readout(chart, known.map(([round]) => round), (index) => number(known[index][1], 4));
  place.replaceChildren(chart.svg);
}

function drawBars(place, rounds, stacks, [text, axisText], label, none) {
  const rows = rounds.map((round, index) => [round, ...stacks.map((stack) => stack.values[index])]).filter((row) => row[1] !== null && row[1] !== undefined);
  if (!rows.length) return empty(place, none);
  const most = Math.max(...rows.map((row) => row.slice(1).reduce((sum, value) => sum + (value || 0), 0))) || 1;
  const chart = frame(place, rows.map(([round]) => round), 0, most * 1.05, axisText(most), label, rows[0][0]);
  const span = chart.right - chart.left, slot = span / (chart.to - chart.from + 1), gap = (rows[1] ? rows[1][0] - rows[0][0] : 1) * slot;
  chart.x = (at) => chart.left + (at - chart.from + 0.5) * slot;
  chart.svg.querySelectorAll('text[text-anchor="middle"]').forEach((tick) => tick.setAttribute("x", chart.x(Number(tick.textContent))));
  for (const [round, ...values] of rows) {
    let base = 0;
    values.forEach((value, index) => {
      const high = chart.y(base + (value || 0)), wide = Math.min(34, Math.max(0.8, gap * 0.72));
      chart.svg.append(node("rect", { class: `bar ${stacks[index].css}`, x: chart.x(round) - wide / 2, y: high, width: wide, height: Math.max(0, chart.y(base) - high), rx: wide > 6 ? 1.5 : 0 }));
      base += value || 0;
    });
  }
  readout(chart, rows.map(([round]) => round), (index) => stacks.map((stack, at) => `${stack.name}${text(rows[index][at + 1])}`).join(", "));
  place.replaceChildren(chart.svg);
}

// One unit for a whole axis.
function bytesAxis(most) {
  const [size, name] = BYTES.find(([least]) => most >= least) || [1, "B"];
  return (value) => (value ? `${brief(value / size)} ${name}` : "0");
}

function secondsAxis(most) {
  const [size, name] = [[7200, 3600, "h"], [180, 60, "min"], [0.5, 1, "s"], [0, 1e-3, "ms"]].find(([least]) => most >= least).slice(1);
  return (value) => (value ? `${brief(value / size)} ${name}` : "0");
}

const GROUPS = {
  front_forward: "g-client", exit: "g-client", front_backward: "g-client", whole_step: "g-client",
  uplink: "g-up", uplink_gradient: "g-up", adapters_up: "g-up", back: "g-server", back_backward: "g-server",
  downlink: "g-down", downlink_gradient: "g-down", adapters_down: "g-down", blocks_down: "g-down",
  server_wait: "wait", barrier_wait: "wait",
};

function drawTimeline(place, bars, named) {
  const seats = [...new Set(bars.map((bar) => bar[0]))].sort((one, other) => one - other).slice(0, 40);
  const width = Math.max(260, Math.floor(place.clientWidth)), lane = seats.length > 14 ? 15 : 24;
  const left = width < 560 ? 86 : 150, right = width - 16, height = seats.length * lane + 30, bottom = height - 24;
  const from = Math.min(...bars.map((bar) => bar[2])), to = Math.max(...bars.map((bar) => bar[3]), from + 1e-6);
  const x = (at) => left + ((at - from) / (to - from)) * (right - left);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Who did what when in the latest round" });
  for (const [at, label] of timeTicks(to - from, width < 560 ? 3 : 8)) {
    svg.append(node("line", { class: "grid", x1: x(at + from), x2: x(at + from), y1: 2, y2: bottom }));
    svg.append(node("text", { x: x(at + from), y: height - 7, "text-anchor": "middle" }, label));
  }
  seats.forEach((seat, row) => {
    const name = named(seat), most = width < 560 ? 11 : 20;
    const text = node("text", { x: left - 9, y: row * lane + lane / 2 + 4, "text-anchor": "end" }, name.length > most ? name.slice(0, most - 1) + "\u2026" : name);
    text.append(node("title", {}, name));
    svg.append(text);
  });
  for (const [seat, kind, begin, end] of bars) {
    const row = seats.indexOf(seat);
    if (row < 0) continue;
    const waits = GROUPS[kind] === "wait", thick = waits ? 3 : lane * 0.62;
    const bar = node("rect", { class: `bar ${GROUPS[kind] || "grey"}`, x: x(begin), y: row * lane + (lane - thick) / 2, width: Math.max(0.7, x(end) - x(begin)), height: thick });
    bar.append(node("title", {}, `${named(seat)}: ${kind.replaceAll("_", " ")}, ${seconds(end - begin)}`));
    svg.append(bar);
  }
  place.replaceChildren(svg);
}

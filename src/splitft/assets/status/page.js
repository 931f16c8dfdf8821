// The status page: asks for /status.json every two seconds while somebody looks. Text only ever goes through textContent.

const POLL_MS = 2000, SLOWEST_MS = 10000, ANSWER_MS = 8000, MOST_ROWS = 200;
const HUES = ["c0", "c1", "c2", "c3", "c4", "c5"];
const TROUBLE = ["excluded", "lost", "late"];
const STATES = ["training", "waiting", "ready", "done", "connecting", "late", "lost", "excluded", "absent"];
const at = (id) => document.getElementById(id);
let latest = null, drawn = "", misses = 0, timer = 0, asking = false;

function element(name, css, text) {
  const made = document.createElement(name);
  if (css) made.className = css;
  if (text !== undefined && text !== null) made.textContent = text;
  return made;
}

function put(id, text) {
  const place = at(id);
  if (place.textContent !== text) place.textContent = text;
}

const whole = (value) => (value < 59.5 ? `${Math.round(value)}\u00a0s` : seconds(value));
const plural = (amount, word) => `${amount.toLocaleString("en-GB")} ${word}${amount === 1 ? "" : "s"}`;

function showHead(status) {
  document.title = `${status.run} \u00b7 round ${status.round} of ${status.rounds} \u00b7 splitft`;
  put("run", status.run);
  at("phase").className = `pill ${status.phase}`;
  put("phase", status.phase);
  const started = status.started_utc.replace("T", " ").replace("+00:00", " UTC");
  put("facts", [status.model, status.version && `splitft ${status.version}`, `started ${started}`].filter(Boolean).join(" \u00b7 "));
  const inRound = status.round_elapsed_s === null ? "" : `, for ${whole(status.round_elapsed_s)}`;
  put("stage", `Round ${status.round} of ${status.rounds}: ${status.stage}${inRound}`);
  const share = Math.round(100 * status.progress);
  put("left", status.remaining_s === null ? `${share} %` : `${share} %, about ${whole(status.remaining_s)} to go`);
  at("progress").setAttribute("aria-valuenow", share);
  at("progress").firstElementChild.style.width = `${100 * status.progress}%`;
}

function showKeys(status) {
  const totals = status.totals, found = status.curves.perplexity.filter((value) => value !== null);
  const now = found.length ? number(found[found.length - 1]) : DASH;
  const before = found.length > 1 ? number(found[0]) : "";
  const trained = status.curves.loss.filter((value) => value !== null);
  const cells = [
    ["Held-out perplexity", before ? `${before} \u2192 ` : "", now, found.length > 1 ? `${change(found)} since the start` : "joined model"],
    ["Training loss", "", number(trained.length ? trained[trained.length - 1] : null), "mean of the latest round"],
    ["Clients", "", `${totals.present} of ${totals.seats}`, stateText(status.seats)],
    ["Speed", "", `${number(totals.tokens_per_s)} tok/s`, `${count(totals.tokens)} tokens in all`],
    ["Traffic", "", bytes(totals.up_bytes + totals.down_bytes), `up ${bytes(totals.up_bytes)}, down ${bytes(totals.down_bytes)}`],
    ["Running for", "", whole(status.elapsed_s), plural(status.curves.round.filter((round) => round > 0).length, "round") + " on record"],
  ];
  at("keys").replaceChildren(...cells.map(([name, from, value, sub]) => {
    const key = element("div", "key"), body = element("dd"), big = element("div", "big");
    if (from) big.append(element("span", "", from));
    big.append(value);
    body.append(big, element("div", "sub", sub));
    key.append(element("dt", "", name), body);
    return key;
  }));
}

function change(values) {
  const share = values[values.length - 1] / values[0] - 1;
  return `${share < 0 ? "\u2212" : "+"}${number(Math.abs(100 * share), 2)} %`;
}

function stateText(seats) {
  const counts = new Map();
  for (const seat of seats) counts.set(seat.state, (counts.get(seat.state) || 0) + 1);
  return STATES.filter((state) => counts.has(state)).map((state) => `${counts.get(state)} ${state}`).join(", ") || "nobody yet";
}

function cell(row, label, text, small, css) {
  const made = element("td", css || "", text);
  made.dataset.label = label;
  if (small) made.append(element("small", "", small));
  row.append(made);
  return made;
}

function track(share, hue) {
  const outer = element("div", `track ${hue}`), inner = element("i");
  inner.style.width = `${100 * Math.min(1, share)}%`;
  outer.append(inner);
  return outer;
}

function spark(values, hue) {
  const svg = node("svg", { class: "spark", viewBox: "0 0 96 26", "aria-hidden": "true" });
  if (values.length < 2) return svg;
  const least = Math.min(...values), span = Math.max(...values) - least || 1;
  const points = values.map((value, index) => [2 + (index / (values.length - 1)) * 90, 23 - ((value - least) / span) * 20]);
  svg.append(node("polyline", { class: `curve thin ${hue}`, points: points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ") }));
  svg.append(node("circle", { class: `bar ${hue}`, cx: points[points.length - 1][0], cy: points[points.length - 1][1], r: 2.4 }));
  return svg;
}

function clientRow(seat) {
  const hue = HUES[seat.seat % HUES.length], away = ["absent", "lost", "excluded"].includes(seat.state);
  const row = element("tr", away ? "away" : ""), who = element("td"), inner = element("div", "who"), words = element("div");
  const name = element("b", "", seat.name);
  name.title = seat.name;
  const again = seat.reconnects ? `, ${plural(seat.reconnects, "reconnect")}` : "";
  words.append(name, element("small", "", `seat ${seat.seat}${again}`));
  inner.append(element("span", `dot ${hue}`), words);
  who.append(inner);
  row.append(who);
  const state = element("td", "left keep");
  state.append(element("span", `chip s-${seat.state}`, seat.state));
  row.append(state);
  const steps = element("td", "left"), box = element("div", "steps");
  box.append(element("span", "", seat.steps ? `${seat.step} of ${seat.steps}` : DASH), track(seat.steps ? seat.step / seat.steps : 0, hue));
  steps.append(box);
  row.append(steps);
  cell(row, "Cut, rank", seat.cut === null ? DASH : `${seat.cut}, ${seat.rank === null ? DASH : seat.rank}`);
  cell(row, "Tokens/s", away ? DASH : number(seat.tokens_per_s), `${count(seat.tokens)} in all`);
  cell(row, "Up", bytes(seat.up_bytes), `${bytes(seat.up_total_bytes)} in all`);
  cell(row, "Down", bytes(seat.down_bytes), `${bytes(seat.down_total_bytes)} in all`);
  cell(row, "Wait", seconds(seat.wait_s));
  cell(row, "Memory", seat.memory_bytes === null ? DASH : bytes(seat.memory_bytes));
  cell(row, "Held-out loss", number(seat.held_out_loss));
  cell(row, "Loss", number(seat.loss));
  cell(row, "Latest losses", "").append(spark(seat.losses, hue));
  cell(row, "Silent for", seat.seen_s === null ? DASH : whole(seat.seen_s), "", away || TROUBLE.includes(seat.state) ? "keep" : "");
  return row;
}

function showClients(seats) {
  const urgent = (seat) => (TROUBLE.includes(seat.state) ? 0 : seat.state === "absent" ? 2 : 1);
  const many = seats.length > 12;
  const rows = many ? [...seats].sort((one, other) => urgent(one) - urgent(other) || one.seat - other.seat) : seats;
  const hidden = rows.length - MOST_ROWS;
  const order = many ? "those with trouble first" : "bytes are of this round";
  put("clients-say", !seats.length ? "Nobody has come yet." : hidden > 0 ? `${MOST_ROWS} of ${seats.length}, ${order}.` : `${stateText(seats)}; ${order}.`);
  at("clients").replaceChildren(...rows.slice(0, MOST_ROWS).map(clientRow));
}

function showCharts(status) {
  const key = JSON.stringify([status.curves, status.timeline, document.body.clientWidth]);
  if (key === drawn) return;
  drawn = key;
  const curves = status.curves, rounds = curves.round, none = "Nothing yet: no round has been finished.";
  put("perplexity-say", "Joined model on common held-out text, by round; 0 is before training.");
  drawCurve(at("perplexity"), rounds, curves.perplexity, "ink", "Held-out perplexity by round", "Not evaluated yet.");
  put("loss-say", "Mean over the participants by what they predicted, nats per token.");
  drawCurve(at("loss"), rounds, curves.loss, "c0", "Training loss by round", none);
  put("seconds-say", "On this machine's clock, evaluation included.");
  drawBars(at("seconds"), rounds, [{ name: "", css: "c5", values: curves.seconds }], [seconds, secondsAxis], "Seconds per round", none);
  put("bytes-say", "All participants together, headers included.");
  drawBars(at("bytes"), rounds, [{ name: "up ", css: "g-up", values: curves.up_bytes }, { name: "down ", css: "g-down", values: curves.down_bytes }], [bytes, bytesAxis], "Bytes per round", none);
  const names = new Map(status.seats.map((seat) => [seat.seat, seat.name]));
  at("timeline-card").hidden = !status.timeline;
  if (!status.timeline) return;
  put("timeline-h", `Time line of round ${status.timeline.round}`);
  put("timeline-say", "Seconds since the round began; of each client the first steps, the last one and its waiting are drawn.");
  drawTimeline(at("timeline"), status.timeline.bars, (seat) => names.get(seat) || `seat ${seat}`);
}

function line(when, css, who, text, times) {
  const row = element("li"), said = element("p", css);
  if (who) said.append(element("em", "", `${who}: `));
  said.append(text);
  if (times > 1) said.append(element("u", "", ` (${times.toLocaleString("en-GB")} times)`));
  row.append(element("time", "", when), said);
  return row;
}

function showLists(status) {
  const names = new Map(status.seats.map((seat) => [seat.seat, seat.name]));
  const events = status.events.map((one) => line(one.utc.slice(11, 19), one.level, one.seat === null ? "" : names.get(one.seat) || `seat ${one.seat}`, one.text, one.times)).reverse();
  at("events").replaceChildren(...(events.length ? events : [line("", "say", "", "Nothing has happened yet.", 1)]));
  const waits = status.waits.map((one) => line(seconds(one.seconds), one.seconds > 60 ? "warning" : "", one.peer, one.what, 1));
  at("waits").replaceChildren(...(waits.length ? waits : [line("", "say", "", "Nobody waits.", 1)]));
  const own = status.process;
  const memory = own.rss_bytes === null ? "" : `${bytes(own.rss_bytes)} of memory, `;
  const open = own.descriptors === null ? "" : `${own.descriptors} open descriptors, `;
  put("process", `The server holds ${memory}${open}${own.threads} threads. Figures of ${status.utc.slice(11, 19)} UTC; read-only, asked again every two seconds.`);
}

function show(status) {
  showHead(status);
  showKeys(status);
  showClients(status.seats);
  showCharts(status);
  showLists(status);
}

function showGone() {
  const gone = at("gone"), since = latest ? `; what is below is of ${latest.utc.slice(11, 19)} UTC` : "";
  gone.textContent = `The server does not answer${since}. Asking again.`;
  gone.hidden = false;
  document.body.classList.add("stale");
}

async function fetched() {
  try {
    const answer = await fetch("/status.json", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

async function ask() {
  if (asking || document.hidden) return;
  asking = true;
  clearTimeout(timer);
  const status = await fetched();
  asking = false;
  misses = status ? 0 : misses + 1;
  timer = setTimeout(ask, Math.min(SLOWEST_MS, POLL_MS * (1 + misses)));
  if (!status) return showGone();
  latest = status;
  at("gone").hidden = true;
  document.body.classList.remove("stale");
  show(status);
}

document.addEventListener("visibilitychange", ask);
window.addEventListener("resize", () => { if (latest) showCharts(latest); });
ask();

/* Draws the charts of the status page with uPlot, and fetches what changed every few seconds while somebody looks. */
"use strict";
(() => {
  const EVERY_MS = 5000;
  const plots = new Map();
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    return {
      accent: read("accent"), poison: read("poison"), alarm: read("alarm"), warn: read("warn"),
      strong: read("text"), soft: read("soft"), grid: read("line"),
    };
  };
  const shown = (value, digits) =>
    value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: value >= 100 ? 0 : digits });
  const data = () => JSON.parse(document.getElementById("chart-data").dataset.charts);

  const half = (plot) => (plot.data[0][1] - plot.data[0][0]) / 2;

  function options(chart, width, tones) {
    const font = "11px system-ui, sans-serif";
    const bars = chart.bars;
    const axis = { stroke: tones.soft, font, grid: { stroke: tones.grid, width: 1 }, ticks: { show: false } };
    return {
      width,
      height: 160,
      cursor: { y: false, sync: { key: "status" }, points: { size: 6 } },
      legend: {
        live: true,
        markers: { width: 2, dash: (_, at) => (at && chart.lines[at - 1].dashed ? "dashed" : "solid"), fill: () => "transparent" },
      },
      scales: {
        // Half an interval on both sides: the outer bars are as whole as the others.
        x: { time: true, range: (plot, low, high) => [low - half(plot), high + half(plot)] },
        y: { range: (_, low, high) => [0, high > 0 ? 1.08 * high : 1] },
      },
      axes: [
        { ...axis, space: 64, size: 26, values: (_, ticks) => ticks.map(clock) },
        { ...axis, size: 44, values: (_, ticks) => ticks.map((tick) => shown(tick, 2)) },
      ],
      series: [
        { label: "at", value: (_, at) => (at == null ? "–" : clock(at)) },
        ...chart.lines.map((line, place) => ({
          label: line.name,
          stroke: tones[line.tone],
          width: line.dashed ? 1.25 : 1.75,
          dash: line.dashed ? [5, 4] : undefined,
          spanGaps: false,
          points: { show: (_, index, first, last) => !bars && lonely(line.values, first, last) },
          ...(bars && { paths: uPlot.paths.bars({ size: [0.45, 24], align: place ? -1 : 1 }), fill: tones[line.tone] }),
          value: (_, value) => shown(value, chart.digits),
        })),
      ],
    };
  }
  // A value between two gaps would be invisible as a line.
  function lonely(values, first, last) {
    for (let at = first; at <= last; at += 1) {
      if (values[at] != null && values[at - 1] == null && values[at + 1] == null) return true;
    }
    return false;
  }
  function clock(at) {
    const time = new Date(1000 * at), two = (number) => String(number).padStart(2, "0");
    const hour = `${two(time.getHours())}:${two(time.getMinutes())}`;
    if (time.toDateString() === new Date().toDateString()) return hour;
    const day = time.toLocaleDateString("en", { weekday: "short" });
    return hour === "00:00" ? day : `${day} ${hour}`;
  }

  function draw(rebuild) {
    const { times, charts } = data(), tones = colours();
    for (const chart of charts) {
      const place = document.querySelector(`[data-chart="${chart.id}"]`);
      if (!place) continue;
      const columns = [times, ...chart.lines.map((line) => line.values)];
      place.classList.toggle("empty", chart.lines.every((line) => line.dashed || line.values.every((value) => value == null)));
      const names = chart.lines.map((line) => line.name).join();
      const known = plots.get(chart.id);
      if (known && !rebuild && known.names === names) {
        known.plot.setData(columns);
      } else {
        known?.plot.destroy();
        plots.set(chart.id, { names, plot: new uPlot(options(chart, place.clientWidth, tones), columns, place) });
      }
      tabulate(chart, times);
    }
  }

  function tabulate(chart, times) {
    const details = document.querySelector(`[data-table="${chart.id}"]`);
    if (!details.open) return;
    const cell = (tag, text, scope) => {
      const made = document.createElement(tag);
      made.textContent = text;
      if (scope) made.scope = scope; else made.className = "num";
      return made;
    };
    const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
    head.append(cell("th", "at", "col"), ...chart.lines.map((line) => cell("th", line.name, "col")));
    for (let at = times.length - 1; at >= 0; at -= 1) {
      const values = chart.lines.map((line) => cell("td", shown(line.values[at], chart.digits)));
      body.insertRow().append(cell("th", clock(times[at]), "row"), ...values);
    }
    const wrap = details.querySelector(".table-wrap"), scrolled = wrap.scrollTop;
    wrap.replaceChildren(table);
    wrap.scrollTop = scrolled;
  }

  /* live */
  let level = "";
  function tell() {
    const answer = document.querySelector("#now-answer [data-level]");
    if (level && answer.dataset.level !== level) document.getElementById("status-said").textContent = answer.textContent;
    level = answer.dataset.level;
    document.title = `${answer.querySelector("b").textContent.replace(":", "")} · Status · Guard`;
  }
  function offline(text) {
    const notice = document.getElementById("notice");
    notice.textContent = text;
    notice.classList.toggle("error", Boolean(text));
  }
  let lost = "";
  function refresh() {
    const isReading = String(getSelection()) !== "";  // a selection would be lost
    if (document.getElementById("live").checked && !document.hidden && !isReading) htmx.trigger("#status-live", "refresh");
  }
  function begin() {
    draw(true);
    tell();
    setInterval(refresh, EVERY_MS);
    document.addEventListener("visibilitychange", refresh);
    const live = document.getElementById("status-live");
    live.addEventListener("htmx:sendError", (event) => event.stopPropagation());  // it is no answer that was lost
    live.addEventListener("htmx:afterRequest", (event) => {
      if (event.detail.successful) {
        if (lost) offline("");
        lost = "";
      } else {
        lost ||= clock(Date.now() / 1000);
        offline(`The page gets no answer since ${lost}: what it shows is old.`);
      }
    });
    // After all parts are in place.
    document.addEventListener("htmx:oobAfterSwap", (event) => {
      if (event.detail.target.id === "counts") { draw(false); tell(); }
    });
    document.querySelectorAll(".chart-table").forEach((details) => details.addEventListener("toggle", () => draw(false)));
    document.getElementById("status-model")?.addEventListener("change", (event) => {
      const url = new URL(location.href);
      url.searchParams.set("model", event.target.value);
      location.href = url.href;
    });
    new MutationObserver(() => draw(true)).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(true));
    let width = innerWidth;
    addEventListener("resize", () => {
      if (innerWidth === width) return;  // a phone's bars come and go
      width = innerWidth;
      draw(true);
    });
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin); else begin();
})();

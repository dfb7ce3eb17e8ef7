"use strict";
// The page's own script: themes, sorting, filters and pictures. It asks the network for nothing, and the page reads without it.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const root = document.documentElement;
  const pressed = (button) => button.getAttribute("aria-pressed") === "true";
  const press = (button, is) => button.setAttribute("aria-pressed", String(is));
  all(".controls, #theme").forEach((part) => { part.hidden = false; });

  // ---------------------------------------------------------------- sorting
  // A row without a value stays last, whichever way the others stand.
  const order = (kind, ascending) => (first, second) => {
    if (first.value === null || second.value === null) return (first.value === null) - (second.value === null);
    const difference = kind === "number" ? first.value - second.value : first.value.localeCompare(second.value, "en", { numeric: true });
    return (ascending ? difference : -difference) || first.place - second.place;
  };
  const valueOf = (cell, kind) => {
    if (kind === "text") return cell.textContent.trim();
    return cell.dataset.sort === undefined ? null : Number(cell.dataset.sort);
  };
  const sortBy = (button) => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = [...head.parentElement.children].indexOf(head), kind = button.dataset.kind;
    const before = head.getAttribute("aria-sort");
    const ascending = before ? before === "descending" : button.dataset.first === "ascending";
    all("[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const rows = [...body.rows].map((row, place) => ({ row, place, value: valueOf(row.children[column], kind) }));
    rows.sort(order(kind, ascending)).forEach((entry) => body.append(entry.row));
  };
  all("button.sort").forEach((button) => button.addEventListener("click", () => sortBy(button)));

  // ---------------------------------------------------------------- which rows and columns of a table are shown
  const showColumns = (section) => {
    const scope = one(".scope[aria-pressed=true]", section);
    const off = (kind) => new Set(all(`.${kind}[aria-pressed=false]`, section).map((button) => button.dataset[kind]));
    const tasks = off("task"), metrics = off("metric");
    const widths = new Map();
    for (const head of all("th[data-column]", section)) {
      const { column, task, metric, primary } = head.dataset;
      const shown = !tasks.has(task) && !metrics.has(metric) && !(scope && scope.dataset.scope === "primary" && primary !== "true");
      widths.set(task, (widths.get(task) || 0) + shown);
      head.hidden = !shown;
      all(`td[data-column="${column}"]`, section).forEach((cell) => { cell.hidden = !shown; });
    }
    for (const head of all(".tasks th", section)) {
      const width = widths.get(head.dataset.task) || 0;
      head.hidden = width === 0;
      head.colSpan = Math.max(width, 1);
    }
  };
  all(".results").forEach((section) => {
    const search = one("input.rows", section);
    if (search) search.addEventListener("input", () => {
      const wanted = search.value.trim().toLowerCase();
      all("tr[data-filter]", section).forEach((row) => { row.hidden = !row.dataset.filter.includes(wanted); });
    });
    const scopes = all(".scope", section);
    const choose = (chosen) => { scopes.forEach((button) => press(button, button === chosen)); showColumns(section); };
    scopes.forEach((button) => button.addEventListener("click", () => choose(button)));
    all(".task.chip, .metric.chip", section).forEach((button) => button.addEventListener("click", () => {
      press(button, !pressed(button));
      showColumns(section);
    }));
    if (section.dataset.primary === "true" && scopes.length) choose(scopes[1]);
  });

  // ---------------------------------------------------------------- answers
  const entries = all(".entry");
  const showEntries = () => {
    const chosen = one(".which[aria-pressed=true]"), which = chosen ? chosen.dataset.which : "all";
    const wanted = one("#find-answers").value.trim().toLowerCase();
    let count = 0;
    for (const entry of entries) {
      entry.hidden = (which !== "all" && entry.dataset[which] !== "true") || !entry.textContent.toLowerCase().includes(wanted);
      count += !entry.hidden;
    }
    one("#answers-count").textContent = `${count} of ${entries.length} shown`;
  };
  if (entries.length) {
    all(".which").forEach((button) => button.addEventListener("click", () => {
      all(".which").forEach((other) => press(other, other === button));
      showEntries();
    }));
    one("#find-answers").addEventListener("input", showEntries);
    one("#unfold").addEventListener("click", (event) => {
      press(event.target, !pressed(event.target));
      event.target.textContent = pressed(event.target) ? "close all" : "open all";
      entries.forEach((entry) => { entry.open = pressed(event.target); });
    });
  }

  // ---------------------------------------------------------------- pictures
  const stored = one("#figures");
  const figures = stored && window.Plotly ? JSON.parse(stored.textContent) : [];
  const DASHES = ["solid", "dash", "dashdot", "longdash"];
  const NUM_COLOURS = 8, SMALL = 18;
  const colours = () => {
    const style = getComputedStyle(root), read = (name) => style.getPropertyValue(name).trim();
    return { ink: read("--ink"), soft: read("--soft"), grid: read("--grid"), panel: read("--panel"),
      palette: Array.from({ length: NUM_COLOURS }, (_, place) => read(`--c${place}`)) };
  };
  let theme = colours(), smoothing = 0;
  const hiddenRuns = new Set(), hiddenKinds = new Set();

  // An exponential mean without the pull of its start, as TensorBoard has it.
  const smooth = (values, weight) => {
    let mean = 0, share = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      share = weight * share + 1 - weight;
      return mean / share;
    });
  };
  const traceOf = (line, figure) => {
    const colour = theme.palette[line.colour % NUM_COLOURS], round = DASHES[Math.floor(line.colour / NUM_COLOURS) % DASHES.length];
    const beside = figure.lines.some((other) => other.kind === "validation"), training = line.kind === "training" && beside;
    const x = figure.x_kind === "category" ? line.x.map((place) => figure.categories[place] ?? "") : line.x;
    const trace = {
      x, y: smoothing && line.kind === "training" ? smooth(line.y, smoothing) : line.y, type: "scatter", mode: "lines",
      name: beside && !line.faint ? `${line.name}, ${line.kind}` : line.name, opacity: line.faint ? 0.3 : training ? 0.8 : 1,
      line: { color: colour, width: line.faint ? 1 : training ? 1.3 : 2.2, dash: training ? "dot" : round },
      showlegend: !line.faint, hoverinfo: line.faint ? "skip" : undefined,
      visible: !(figure.group === "curves" && (hiddenRuns.has(line.colour) || hiddenKinds.has(line.kind))),
    };
    const few = line.x.length <= 40 && !training && !line.faint && line.style !== "level";
    if (few) Object.assign(trace, { mode: "lines+markers", marker: { size: line.style === "points" ? 8 : 5, color: colour } });
    if (line.style === "points" && figure.x_kind === "category") trace.mode = "markers";
    if (line.style === "level") Object.assign(trace.line, { dash: "dash", width: 1.5 });
    if (line.low) trace.error_y = { type: "data", symmetric: false, array: line.high, arrayminus: line.low, color: colour, thickness: 1.3, width: 4 };
    return trace;
  };
  const tracesOf = (figure) => {
    const traces = figure.lines.map((line) => traceOf(line, figure));
    if (figure.diagonal) traces.unshift({
      x: [0, 1], y: [0, 1], type: "scatter", mode: "lines", name: "as it should be", hoverinfo: "skip",
      line: { color: theme.soft, width: 1, dash: "dot" },
    });
    return traces;
  };
  const layoutOf = (figure) => {
    const shown = figure.lines.filter((line) => !line.faint).length;
    const axis = { gridcolor: theme.grid, zerolinecolor: theme.grid, linecolor: theme.grid, tickfont: { size: 11 } };
    const legend = figure.group !== "curves" && shown > 1 && shown <= SMALL;
    return {
      template: {}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: theme.soft, family: "system-ui, sans-serif", size: 12 }, margin: { l: 64, r: 12, t: 12, b: 46 },
      xaxis: { ...axis, title: { text: figure.x_label, font: { size: 12 }, standoff: 8 }, type: figure.x_kind === "linear" ? "-" : figure.x_kind,
        automargin: figure.x_kind === "category" },
      yaxis: { ...axis, title: { text: figure.group === "curves" ? "" : figure.y_label, font: { size: 12 }, standoff: 8 } },
      showlegend: legend, legend: { orientation: "h", y: -0.2, yanchor: "top", font: { size: 11 } },
      hovermode: shown <= 8 ? "x unified" : "closest",
      hoverlabel: { bgcolor: theme.panel, bordercolor: theme.grid, font: { color: theme.ink, size: 12 } }, dragmode: "zoom",
    };
  };
  const draw = (chart) => {
    const figure = figures[Number(chart.dataset.figure)];
    return Plotly.react(chart, tracesOf(figure), layoutOf(figure), { displayModeBar: false, responsive: true });
  };
  const charts = figures.length ? all(".chart") : [];
  const redraw = (group) => charts.filter((chart) => !group || figures[Number(chart.dataset.figure)].group === group).forEach(draw);
  const paint = () => {
    theme = colours();
    all(".swatch").forEach((swatch) => { swatch.style.background = theme.palette[Number(swatch.dataset.colour) % NUM_COLOURS]; });
    redraw();
  };
  // One after the other, so that the page answers while they are drawn.
  const drawFrom = (place) => {
    if (place >= charts.length) { root.dataset.drawn = "all"; return; }
    draw(charts[place]);
    setTimeout(drawFrom, 0, place + 1);
  };
  all(".run.chip").forEach((button) => button.addEventListener("click", () => {
    press(button, !pressed(button));
    hiddenRuns[pressed(button) ? "delete" : "add"](Number(button.dataset.colour));
    redraw("curves");
  }));
  all(".kind.chip").forEach((button) => button.addEventListener("click", () => {
    press(button, !pressed(button));
    hiddenKinds[pressed(button) ? "delete" : "add"](button.dataset.kind);
    redraw("curves");
  }));
  const slider = one("#smoothing");
  if (slider) slider.addEventListener("input", () => {
    smoothing = Number(slider.value);
    one("#smoothing-shown").textContent = smoothing ? smoothing.toFixed(2) : "none";
    redraw("curves");
  });

  // ---------------------------------------------------------------- light and dark
  const THEMES = { system: "◐ as the system", light: "○ light", dark: "● dark" };
  const names = Object.keys(THEMES);
  const remembered = () => { try { return localStorage.getItem("potstill-theme"); } catch { return null; } };
  let chosen = names.includes(remembered()) ? remembered() : "system";
  const show = (name) => {
    if (name === "system") delete root.dataset.theme; else root.dataset.theme = name;
    one("#theme").textContent = THEMES[name];
  };
  one("#theme").addEventListener("click", () => {
    chosen = names[(names.indexOf(chosen) + 1) % names.length];
    try { localStorage.setItem("potstill-theme", chosen); } catch { /* a browser may keep nothing for a file */ }
    show(chosen);
    paint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  show(chosen);

  // ---------------------------------------------------------------- paper: light, pictures as wide as the page, few answers
  const PAPER_WIDTH = 660, MOST_PRINTED = 12;
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    entries.forEach((entry, place) => { entry.dataset.was = entry.open; entry.open = place < MOST_PRINTED && !entry.hidden; });
    paint();
    charts.forEach((chart) => Plotly.relayout(chart, { width: PAPER_WIDTH }));
  });
  addEventListener("afterprint", () => {
    show(chosen);
    entries.forEach((entry) => { entry.open = entry.dataset.was === "true"; });
    charts.forEach((chart) => Plotly.relayout(chart, { width: null, autosize: true }));
    paint();
  });
  all(".swatch").forEach((swatch) => { swatch.style.background = `var(--c${Number(swatch.dataset.colour) % NUM_COLOURS})`; });
  theme = colours();
  drawFrom(0);
})();

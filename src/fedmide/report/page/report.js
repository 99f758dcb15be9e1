"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawings = [...document.querySelectorAll(".drawing")];
  const boxes = [...document.querySelectorAll("#filter input")];
  const choices = new Map([...document.querySelectorAll("select[data-figure]")].map((each) => [each.dataset.figure, each]));
  const root = document.documentElement;
  // Width of a printed drawing in pixels, by its kind (see kindOf).
  const PRINTED_WIDTH = { one: 680, few: 330, small: 215 };

  // Looks up a color that is the name of a CSS variable in the current theme.
  function colored(value, css) {
    if (typeof value === "string") return value.startsWith("--") ? css.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) return value.map((each) => colored(each, css));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, colored(each, css)]));
    }
    return value;
  }

  const isShown = (client) => boxes.find((box) => box.value === client)?.checked ?? true;

  // The trace with the points of the clients shown; null if the trace itself is hidden.
  function filtered(trace, choice) {
    const meta = trace.meta || {};
    if ((meta.client && !isShown(meta.client)) || (meta.choice && choice && meta.choice !== choice)) return null;
    if (!meta.clients) return trace;
    const keep = meta.clients.map(isShown);
    // Keeps the shown clients' entries of each list with one entry per client.
    const pick = (value) => {
      if (Array.isArray(value)) return value.length === keep.length ? value.filter((_, index) => keep[index]) : value;
      if (value && typeof value === "object") {
        return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, pick(each)]));
      }
      return value;
    };
    return pick(trace);
  }

  // If the first trace of a kind is hidden, the legend shows the next one of that kind.
  function legended(traces) {
    const named = new Set();
    return traces.map((trace) => {
      if (!trace.legendgroup) return trace;
      const first = !named.has(trace.legendgroup);
      named.add(trace.legendgroup);
      return { ...trace, showlegend: first };
    });
  }

  function themed(axis, css) {
    const lines = { gridcolor: "--grid", linecolor: "--rule", zerolinecolor: "--soft", tickcolor: "--rule", zeroline: false };
    return { automargin: true, ...colored({ ...lines, ...axis }, css) };
  }

  function layoutOf(plot, css, width, isSmall) {
    const { xaxis, yaxis, ...rest } = plot.layout;
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: isSmall ? 11 : 13, color: css.getPropertyValue("--ink").trim() },
      margin: { l: 50, r: 16, t: 12, b: 44 },
      hoverlabel: { namelength: -1 },
      ...(width ? { width } : {}),
      ...colored(rest, css),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", ...rest.legend },
      xaxis: themed(xaxis || {}, css),
      yaxis: themed(yaxis || {}, css),
    };
  }

  // The kind follows from the number of drawings in the figure.
  function kindOf(drawing) {
    const grid = drawing.closest(".plots").classList;
    return grid.contains("small") ? "small" : grid.contains("few") ? "few" : "one";
  }

  function draw(drawing, printed) {
    const { figure, plot: index } = drawing.dataset;
    const plot = figures[figure][Number(index)];
    const css = getComputedStyle(root);
    const choice = choices.get(figure)?.value;
    const traces = plot.data.map((trace) => filtered(trace, choice)).filter(Boolean);
    const kind = kindOf(drawing);
    const layout = layoutOf(plot, css, printed ? PRINTED_WIDTH[kind] : 0, kind === "small");
    return Plotly.react(drawing, legended(traces).map((trace) => colored(trace, css)), layout, {
      displayModeBar: false,
      responsive: true,
    });
  }

  const visible = (drawing) => !drawing.closest("[hidden]");
  const drawAll = (printed = false) => Promise.all(drawings.filter(visible).map((drawing) => draw(drawing, printed)));

  function filter() {
    for (const each of document.querySelectorAll("[data-client]")) each.hidden = !isShown(each.dataset.client);
    const count = boxes.filter((box) => box.checked).length;
    document.getElementById("shown").textContent = count === boxes.length ? `all ${count}` : `${count} of ${boxes.length}`;
    search();
    return drawAll();
  }

  function search() {
    const field = document.getElementById("search");
    if (!field) return;
    const wanted = field.value.trim().toLowerCase();
    let found = 0;
    for (const each of document.querySelectorAll(".passage")) {
      each.hidden = !isShown(each.dataset.client) || !each.textContent.toLowerCase().includes(wanted);
      found += each.hidden ? 0 : 1;
    }
    document.getElementById("found").textContent = `${found} shown`;
  }

  // A cell's number if it begins with one ("+0.20 [0.1, 0.3]", "1,024", "40 of 48"), else its text.
  function sortKey(cell) {
    const text = cell.textContent.trim().replace("−", "-").replaceAll(",", "");
    const value = Number.parseFloat(text);
    return Number.isNaN(value) ? text : value;
  }

  function sort(table, column, header) {
    const descending = header.getAttribute("aria-sort") === "ascending";
    const body = table.tBodies[0];
    // Rows over all clients stay below, in their order.
    const own = [...body.rows].filter((row) => row.dataset.client);
    const below = own.length ? [...body.rows].filter((row) => !row.dataset.client) : [];
    const rows = (own.length ? own : [...body.rows]).map((row) => [sortKey(row.cells[column]), row]);
    rows.sort(([a], [b]) => {
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return descending ? -order : order;
    });
    body.append(...rows.map(([, row]) => row), ...below);
    for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.replaceChildren(button);
      button.addEventListener("click", () => sort(table, column, header));
    });
  }

  document.getElementById("theme").addEventListener("change", (event) => {
    if (event.target.value === "auto") delete root.dataset.theme;
    else root.dataset.theme = event.target.value;
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  for (const box of boxes) box.addEventListener("change", filter);
  for (const [id, checked] of [["all", true], ["none", false]]) {
    document.getElementById(id).addEventListener("click", () => {
      for (const box of boxes) box.checked = checked;
      filter();
    });
  }
  document.addEventListener("keydown", (event) => {
    const panel = document.getElementById("filter");
    if (event.key === "Escape" && panel.open) {
      panel.open = false;
      panel.querySelector("summary").focus();
    }
  });
  document.addEventListener("click", (event) => {
    const panel = document.getElementById("filter");
    if (panel.open && !panel.contains(event.target)) panel.open = false;
  });
  for (const [figure, select] of choices) {
    select.addEventListener("change", () => {
      for (const drawing of drawings) if (drawing.dataset.figure === figure && visible(drawing)) draw(drawing, false);
    });
  }
  document.getElementById("search")?.addEventListener("input", search);

  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    drawAll(true);
  });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    drawAll();
  });

  // Tests in a browser wait for this mark.
  drawAll().then(() => { root.dataset.drawn = "true"; });
})();

// The charts of the page, and the slider over the plans of a frontier.
"use strict";

(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const frontier = facts.frontier;
  const views = {};

  // Colours are those of the style sheet, so that they follow its light, dark and printed ones.
  const colour = (name) => `var(--${name})`;
  const quiet = { labelColor: colour("muted"), titleColor: colour("muted") };
  const config = {
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: null },
    axis: {
      ...quiet,
      domainColor: colour("line"),
      gridColor: colour("line"),
      tickColor: colour("line"),
      labelFontSize: 11,
      titleFontSize: 11,
      titleFontWeight: "normal",
      labelLimit: 130,
      labelOverlap: "greedy",
    },
    legend: { ...quiet, labelFontSize: 11, titleFontSize: 11, orient: "top", title: null },
  };

  function spec(height, values, rest) {
    return {
      width: "container",
      height,
      background: null,
      autosize: { type: "fit", contains: "padding" },
      data: { name: "rows", values: values.map((row) => ({ ...row })) }, // Vega marks its rows
      config,
      ...rest,
    };
  }

  const count = (title) => ({ title, grid: false, tickCount: { expr: "ceil(width / 90)" } });

  function layers() {
    return spec(170, facts.layers, {
      mark: { type: "rect", color: colour("accent"), stroke: colour("ground"), strokeWidth: 1 },
      encoding: {
        x: { field: "from", type: "quantitative", scale: { domain: [0, 1], nice: false },
             axis: { ...count("share of all weights, in the order of the network"), format: "%" } },
        x2: { field: "to" },
        y: { field: "bits", type: "quantitative", axis: { title: "bits a weight", tickCount: 4 },
             scale: { domain: { expr: "[0, max(8, top)]" } } },
        y2: { datum: 0 },
        tooltip: [
          { field: "name", title: "layer" },
          { field: "plan", title: "plan" },
          { field: "bits", title: "bits", format: ".2f" },
        ],
      },
      params: [{ name: "top", value: Math.max(...facts.layers.map((row) => row.bits)) }],
    });
  }

  function bytes() {
    const versions = [...new Set(facts.bytes.map((row) => row.version))];
    const colours = { "layers": "accent", "left alone": "second", "header and all else": "third", "file, whole": "muted" };
    const parts = Object.keys(colours).filter((part) => facts.bytes.some((row) => row.part === part && row.bytes));
    return spec(70 + 30 * versions.length, facts.bytes, {
      mark: { type: "bar", height: 16 },
      encoding: {
        y: { field: "version", type: "nominal", sort: versions,
             axis: { title: null, domain: false, ticks: false, grid: false } },
        x: { field: "bytes", type: "quantitative", axis: { ...count("bytes"), format: "~s" } },
        color: { field: "part", type: "nominal",
                 scale: { domain: parts, range: parts.map((part) => colour(colours[part])) },
                 legend: { columns: { expr: "width < 420 ? 2 : 4" } } },
        order: { field: "order" },
        tooltip: [
          { field: "version", title: "of" },
          { field: "part", title: "part" },
          { field: "bytes", title: "bytes", format: "," },
        ],
      },
    });
  }

  function history(of) {
    return spec(180, of.values, {
      mark: { type: "line", strokeWidth: 1.3, color: colour("accent"),
              opacity: of.lines > 1 ? 0.55 : 1 },
      encoding: {
        x: { field: "step", type: "quantitative", axis: count(of.step), scale: { nice: false } },
        y: { field: "value", type: "quantitative", axis: { title: null, tickCount: 4, format: ".3~g", grid: !of.log },
             scale: of.log ? { type: "log" } : { zero: false } },
        detail: { field: "line" },
        tooltip: [
          ...(of.lines > 1 ? [{ field: "line", title: "of" }] : []),
          { field: "step", title: of.step },
          { field: "value", title: "value", format: ".4~g" },
        ],
      },
    });
  }

  function latency() {
    return spec(170, facts.latency, {
      mark: { type: "bar", color: colour("accent") },
      encoding: {
        x: { field: "place", type: "ordinal", axis: { title: "layer, in the order of the network", labelAngle: 0, grid: false } },
        y: { field: "ms", type: "quantitative", axis: { title: "ms", tickCount: 4 } },
        tooltip: [{ field: "name", title: "layer" }, { field: "ms", title: "ms", format: ".4f" }],
      },
    });
  }

  // A curve over the plans of the frontier, with a rule at the slider.
  function curve(field, axis, scale, more) {
    // From the loosest plan to the tightest, as the slider goes.
    const x = { field: "x", type: "quantitative", scale: { zero: false, reverse: true },
                axis: { ...count(`${frontier.axis}, of float32`), format: "~%" } };
    const rows = frontier.points.map((point, k) => ({
      k, x: point.x, at: point.at, harm: point.harm, measured: point.measured,
      value: point.accuracy && point.accuracy[0],
      low: point.accuracy && point.accuracy[1],
      high: point.accuracy && point.accuracy[2],
    }));
    const y = { field, type: "quantitative", axis, scale };
    const tooltip = [{ field: "at", title: "costs" }, { field, title: axis.title, format: ".4~g" }];
    const here = (value) => ({ condition: { test: "datum.k === at", value }, value: 0 });
    return spec(200, rows.filter((row) => row[field] !== null), {
      params: [{ name: "at", value: -1 }],
      layer: [
        ...more(x, scale),
        { mark: { type: "line", color: colour("accent"), strokeWidth: 1.5 }, encoding: { x, y } },
        { mark: { type: "point", filled: true, opacity: 1, color: colour("accent") },
          encoding: { x, y, tooltip, size: { condition: { test: "datum.measured", value: 42 }, value: 12 } } },
        { mark: { type: "rule", color: colour("second"), strokeWidth: 1.5 },
          encoding: { x, opacity: here(1) } },
        { mark: { type: "point", filled: true, size: 80, color: colour("second"), tooltip: false },
          encoding: { x, y, opacity: here(1) } },
      ],
    });
  }

  const positive = frontier && frontier.points.every((point) => point.harm > 0);
  const harm = () =>
    curve("harm", { title: "expected error", tickCount: 4, format: ".2~g", grid: !positive },
          positive ? { type: "log" } : { zero: false }, () => []);
  const accuracy = () =>
    curve("value", { title: frontier.quantity, tickCount: 4 }, { zero: false }, (x, scale) => [
      { mark: { type: "area", color: colour("accent-soft"), opacity: 1 },
        encoding: { x, y: { field: "low", type: "quantitative", scale }, y2: { field: "high" } } },
    ]);

  // Measures of a sweep over a setting or over costs, a line for each choice of the rest.
  function sweep() {
    const of = facts.sweep;
    const x = of.places === null || of.share
      ? { field: "x", type: "quantitative", scale: { zero: false },
          axis: { ...count(of.axis), format: of.share ? "~%" : "~g" } }
      : { field: "x", type: "ordinal", sort: of.places, axis: { title: of.axis, labelAngle: 0, grid: false } };
    const y = { field: "y", type: "quantitative", axis: { title: "measure", tickCount: 5 }, scale: { zero: false } };
    const several = of.lines > 1;
    const colours = ["accent", "second", "third", "muted"].map(colour);
    const legend = { columns: { expr: "width < 420 ? 1 : width < 900 ? 2 : 4" }, labelLimit: 190 };
    const shades = several ? { color: { field: "line", type: "nominal", scale: { range: colours }, legend },
                               strokeDash: { field: "line", type: "nominal", legend: null } } : {};
    const tooltip = [
      { field: "x", title: of.axis, ...(of.share ? { format: ".3~%" } : {}) },
      { field: "y", title: "measure", format: ".5~g" },
      { field: "at", title: "costs" },
      ...(several ? [{ field: "line", title: "of" }] : []),
    ];
    const whole = of.whole === null ? [] : [
      { data: { values: [{ y: of.whole }] },
        mark: { type: "rule", color: colour("muted"), strokeDash: [4, 4] }, encoding: { y } },
    ];
    const drawn = several ? {} : { color: colour("accent") };
    return spec(several ? 260 + 14 * Math.min(of.lines, 20) : 260, of.rows, {
      layer: [
        ...whole,
        { mark: { type: "line", strokeWidth: 1.5, ...drawn }, encoding: { x, y, ...shades } },
        { mark: { type: "point", filled: true, opacity: 1, size: 42, ...drawn },
          encoding: { x, y, tooltip, ...(several ? { color: shades.color } : {}) } },
      ],
    });
  }

  const charts = { layers, bytes, latency, harm, accuracy, sweep };
  facts.histories.forEach((of, k) => { charts[`history-${k}`] = () => history(of); });

  async function draw(place) {
    const name = place.dataset.chart;
    const embedded = await vegaEmbed(place, charts[name](), {
      mode: "vega-lite",
      renderer: "svg",
      actions: false,
      defaultStyle: false,
      tooltip: { theme: "own", disableDefaultStyle: true },
    });
    views[name] = embedded.view;
  }

  // The cells that the slider changes, and what they are for the fitted plan.
  const rows = [...document.querySelectorAll("tr[data-layer]")];
  const costs = [...document.querySelectorAll("tr[data-metric]")];
  const rest = document.querySelector("tr.rest td.bytes");
  const cells = [...rows, ...costs].flatMap((row) => [...row.cells]).concat(rest ?? []);
  const original = cells.map((cell) => [cell.textContent, cell.getAttribute("style"), cell.className]);

  function put(row, kind, text, part) {
    const cell = row.querySelector(`td.${kind}`);
    if (cell === null) return;
    cell.textContent = text;
    if (part !== undefined) cell.style.setProperty("--part", Math.min(Math.max(part, 0), 1).toFixed(4));
  }

  function restore() {
    cells.forEach((cell, k) => {
      const [text, style, kind] = original[k];
      if (cell.textContent !== text) cell.textContent = text;
      if (style !== null) cell.setAttribute("style", style);
      cell.className = kind;
    });
  }

  function fill(point) {
    const options = point.choice.map((choice, k) => frontier.options[k][choice]);
    rows.forEach((row, k) => {
      const option = options[k];
      put(row, "plan", option.plan);
      put(row, "bits", option.bits, option.width / 8);
      put(row, "bytes", option.bytes);
      put(row, "share", `${(100 * option.size / point.bytes).toFixed(1)} %`, option.size / point.bytes);
      put(row, "macs", option.macs);
      row.querySelectorAll("td.own").forEach((cell) => {  // known of the fitted plan alone
        cell.textContent = "";
        cell.classList.add("empty");
        cell.style.setProperty("--part", "0");
      });
    });
    rest.textContent = point.rest;
    costs.forEach((row) => {
      const cost = point.costs[row.dataset.metric];
      if (cost === undefined) return;
      put(row, "found", cost.found);
      put(row, "share", cost.share, cost.part);
      put(row, "verdict", cost.verdict);
      const verdict = row.querySelector("td.verdict");
      if (verdict !== null) verdict.classList.toggle("over", cost.over);
    });
    redraw(options, point);
  }

  function redraw(options, point) {
    const shown = facts.layers.map((row, k) =>
      options ? { ...row, bits: options[k].width, plan: options[k].plan } : { ...row });
    const sizes = facts.bytes.map((row) => {
      if (!options || row.version !== "planned") return { ...row };
      const ours = options.reduce((sum, option) => sum + option.size, 0);
      const alone = facts.bytes.find((r) => r.version === "planned" && r.part === "left alone").bytes;
      const parts = { "layers": ours, "left alone": alone, "header and all else": point.bytes - ours - alone };
      return { ...row, bytes: Math.max(parts[row.part], 0) };
    });
    if (views.layers) views.layers.data("rows", shown).runAsync();
    if (views.bytes) views.bytes.data("rows", sizes).runAsync();
  }

  function slide() {
    const slider = document.getElementById("at");
    const back = document.getElementById("back");
    const words = document.getElementById("at-words");
    const say = (part, text) => {
      const place = document.getElementById(`at-${part}`);
      if (place !== null) place.textContent = text; // there is none for what no plan has
    };

    function at(k, moved) {
      const point = frontier.points[k];
      const fitted = k === frontier.fitted;
      const place = `plan ${k + 1} of ${frontier.points.length}`;
      slider.value = k;
      slider.setAttribute("aria-valuetext", `${place}: ${point.at}, expected error ${point.harmed}`);
      words.textContent = fitted ? `${place}, the one of this report` : place;
      say("cost", point.at);
      say("smaller", point.smaller);
      say("harm", point.harmed);
      say("accuracy", point.accurate);
      restore();
      if (moved && !fitted) fill(point);
      else redraw(null, null);
      back.hidden = !moved || fitted;
      for (const name of ["harm", "accuracy"]) {
        if (views[name]) views[name].signal("at", k).runAsync();
      }
    }

    const home = frontier.fitted === null ? frontier.start : frontier.fitted;
    slider.addEventListener("input", () => at(Number(slider.value), true));
    back.addEventListener("click", () => { at(home, false); slider.focus(); });
    at(home, false);
  }

  Promise.all([...document.querySelectorAll("[data-chart]")].map(draw)).then(() => {
    if (frontier !== null) slide();
    document.documentElement.dataset.ready = "true";
  });
})();

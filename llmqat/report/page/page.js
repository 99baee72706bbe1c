// Histograms of the layer chosen in the select box. Everything else on the page is drawn already.
(function () {
  "use strict";
  const layers = JSON.parse(document.getElementById("layers").textContent);
  const select = document.getElementById("layer");
  if (!select || !layers.length) return;
  const W = 320, H = 190, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 30;
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const percent = (share) => Number((100 * share).toPrecision(3)) + "%";

  function element(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Shares of `counts` as steps from `low` to `high`, in an SVG whose y axis ends at `top`.
  function steps(svg, counts, top, css, line) {
    const total = sum(counts) || 1, width = (W - LEFT - RIGHT) / counts.length;
    const y = (share) => H - BOTTOM - share / top * (H - BOTTOM - TOP);
    let path = "M" + LEFT + "," + y(0);
    counts.forEach((count, i) => {
      path += "L" + (LEFT + i * width) + "," + y(count / total) + "L" + (LEFT + (i + 1) * width) + "," + y(count / total);
    });
    const group = element("g", { class: css });
    group.append(element("path", { d: path + "L" + (W - RIGHT) + "," + y(0) + (line ? "" : "Z"), class: line ? "line" : "fill" }));
    svg.append(group);
  }

  // The step between marks of an axis from zero to `most`: 1, 2 or 5 times a power of ten, at most four of them.
  function stepOf(most) {
    const magnitude = 10 ** Math.floor(Math.log10(most / 4));
    return [1, 2, 5, 10].map((m) => m * magnitude).find((step) => most / step <= 4);
  }

  function axes(svg, top, ticks, name) {
    for (let share = 0, step = stepOf(top); share <= top * 1.001; share += step) {
      const y = H - BOTTOM - share / top * (H - BOTTOM - TOP);
      svg.append(element("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y, y2: y }));
      svg.append(element("text", { x: LEFT - 6, y: y + 3.5, "text-anchor": "end" }, percent(share)));
    }
    for (const [at, text] of ticks) {
      const x = LEFT + at * (W - LEFT - RIGHT);
      svg.append(element("text", { x: x, y: H - BOTTOM + 14, "text-anchor": "middle" }, text));
    }
    svg.append(element("text", { x: W - RIGHT, y: H - 2, "text-anchor": "end" }, name));
  }

  // End of the y axis: the greatest share, rounded up to a mark.
  function highest(...lists) {
    const most = Math.max(...lists.map((counts) => Math.max(...counts) / (sum(counts) || 1))) || 1;
    return Math.ceil(most / stepOf(most) - 1e-9) * stepOf(most);
  }

  function weights(svg, layer) {
    const top = highest(layer.float || [0], layer.grid), limit = layer.limit.toPrecision(2);
    axes(svg, top, [[0, "−" + limit], [0.5, "0"], [1, limit]], "weight");
    steps(svg, layer.grid, top, "packed", false);
    if (layer.float) steps(svg, layer.float, top, "float", true);
  }

  function codes(svg, layer) {
    const n = layer.codes.length, total = sum(layer.codes) || 1, top = highest(layer.codes);
    const every = Math.ceil(n / 8), width = (W - LEFT - RIGHT) / n, ticks = [];
    for (let i = 0; i < n; i += every) ticks.push([(i + 0.5) / n, String(layer.first_code + i).replace("-", "−")]);
    axes(svg, top, ticks, "code");
    const group = element("g", { class: "packed" });
    layer.codes.forEach((count, i) => {
      const height = count / total / top * (H - BOTTOM - TOP);
      const bar = element("rect", { class: "bin", x: LEFT + (i + 0.12) * width, y: H - BOTTOM - height, width: 0.76 * width, height: height });
      bar.append(element("title", {}, "code " + (layer.first_code + i) + ": " + percent(count / total)));
      group.append(bar);
    });
    svg.append(group);
  }

  function show() {
    const layer = layers[select.selectedIndex];
    for (const [id, draw] of [["weights", weights], ["codes", codes]]) {
      const svg = document.getElementById(id);
      svg.replaceChildren();
      draw(svg, layer);
    }
    const changed = layer.codes_changed === null ? "" : ", " + percent(layer.codes_changed) + " of codes changed by training";
    const used = layer.codes.filter((count) => count > 0).length;
    document.getElementById("about").textContent = layer.shape.join(" × ") + ", " + layer.scheme + ", " +
      used + " of " + layer.codes.length + " codes in use" + changed;
  }

  document.getElementById("one-layer").hidden = false;
  select.addEventListener("change", show);
  show();
})();

"use strict";
(() => {
  const root = document.documentElement;
  const plots = [...document.querySelectorAll(".plot")];
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  let choice = root.dataset.choice;
  let printing = false;
  const theme = () => (printing ? "light" : choice === "auto" ? (scheme.matches ? "dark" : "light") : choice);

  // Pieces of data: base64 of gzip of (length of JSON, JSON, arrays in planes of bytes); see packing.py.
  async function bytesOf(id) {
    const text = document.getElementById(id).textContent.trim();
    const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  const KINDS = { u1: Uint8Array, i2: Int16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };
  function arrayOf([code, start, count, shape], blob) {
    const kind = KINDS[code], width = kind.BYTES_PER_ELEMENT;
    const bytes = new Uint8Array(count * width);
    for (let plane = 0; plane < width; plane++)
      for (let at = 0; at < count; at++) bytes[at * width + plane] = blob[start + plane * count + at];
    return shaped(new kind(bytes.buffer), shape);
  }
  function shaped(flat, shape) {
    if (shape.length === 1) return flat;
    const each = flat.length / (shape[0] || 1);
    return Array.from({ length: shape[0] }, (_, at) => shaped(flat.subarray(at * each, (at + 1) * each), shape.slice(1)));
  }
  function filled(value, blob) {
    if (Array.isArray(value)) return value.map((item) => filled(item, blob));
    if (value === null || typeof value !== "object") return value;
    if (Array.isArray(value.$)) return arrayOf(value.$, blob);
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, filled(item, blob)]));
  }
  const unpacked = new Map();
  async function contentOf(id) {
    if (!unpacked.has(id)) {
      unpacked.set(id, bytesOf(id).then((raw) => {
        const length = new DataView(raw.buffer).getUint32(0, true);
        return { json: new TextDecoder().decode(raw.subarray(4, 4 + length)), blob: raw.subarray(4 + length) };
      }));
    }
    return unpacked.get(id);
  }
  const made = (piece) => filled(JSON.parse(piece.json), piece.blob);

  let library = null;
  function plotly() {
    library ??= bytesOf("plotly").then((raw) => {
      const script = document.createElement("script");
      script.textContent = new TextDecoder().decode(raw);
      document.head.append(script);
      if (!window.Plotly) throw new Error("the drawing library did not start");
    });
    return library;
  }

  // Figures: the light one, and where the dark one differs from it.
  let templates = null;
  function figureFor(plot, wanted) {
    const figure = made(plot.piece);
    if (wanted === "dark")
      for (const [path, value] of figure.dark) {
        const holder = path.slice(0, -1).reduce((node, key) => node[key], figure);
        holder[path[path.length - 1]] = value;
      }
    if (figure.house) figure.layout.template = made(templates)[wanted];
    return figure;
  }
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"] };
  function show(plot) {
    if (!plot.piece || !window.Plotly) return;
    const figure = figureFor(plot, theme());
    const layout = { ...figure.layout, title: undefined, autosize: true };
    const margin = { ...layout.margin, t: Math.max((layout.margin?.t ?? 60) - 34, 10) };
    layout.height = plot.height - 34;
    if (printing) layout.width = 690;
    if (printing) layout.autosize = false;
    plot.querySelector(".waiting")?.remove();
    window.Plotly.react(plot, figure.data, { ...layout, margin }, CONFIG);
    plot.drawn = theme();
  }
  async function prepare(plot) {
    const [piece, shared] = await Promise.all([contentOf(plot.dataset.piece), contentOf("templates"), plotly()]);
    plot.piece = piece;
    templates = shared;
  }
  async function draw(plot) {
    try {
      await prepare(plot);
      if (plot.drawn !== theme()) show(plot);
    } catch (error) {
      plot.textContent = `This figure cannot be drawn here: ${error.message}. Its data stand below.`;
    }
  }
  function recolour() {
    root.dataset.theme = theme();
    for (const button of document.querySelectorAll("[data-choose]"))
      button.setAttribute("aria-pressed", String(button.dataset.choose === choice));
    for (const plot of plots) if (plot.drawn && plot.near) draw(plot);
  }

  // Tables: CSV made from the columns that lie in the page.
  function cell(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "";
    if (typeof value === "number") return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(5)));
    const text = String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }
  async function csv(id) {
    const frame = made(await contentOf(id));
    const lines = [frame.names.map(cell).join(",")];
    for (let row = 0; row < frame.rows; row++) lines.push(frame.columns.map((column) => cell(column[row])).join(","));
    return lines.join("\n") + "\n";
  }
  async function drawnCsv(plot) {
    const lines = ["trace,x,y,value"];
    figureFor(plot, "light").data.forEach((trace, number) => {
      const name = trace.name ?? `trace ${number}`;
      if (trace.z) trace.z.forEach((row, y) => Array.from(row).forEach((value, x) =>
        lines.push([name, trace.x?.[x] ?? x, trace.y?.[y] ?? y, value].map(cell).join(","))));
      else Array.from(trace.x ?? trace.y ?? []).forEach((_, at) =>
        lines.push([name, trace.x?.[at] ?? at, trace.y?.[at] ?? "", trace.text?.[at] ?? ""].map(cell).join(",")));
    });
    return lines.join("\n") + "\n";
  }
  function save(text, name, type) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  async function image(plot, format, name) {
    await draw(plot);
    const figure = figureFor(plot, theme());
    const paper = theme() === "dark" ? "#10171F" : "#FFFFFF";
    const layout = { ...figure.layout, paper_bgcolor: paper, plot_bgcolor: paper };
    const size = { width: Math.max(plot.clientWidth, 700), height: plot.height, scale: format === "png" ? 2 : 1 };
    await window.Plotly.downloadImage({ data: figure.data, layout }, { format, filename: name, ...size });
  }
  async function act(button) {
    const plot = document.getElementById(button.dataset.plot), name = button.dataset.file;
    if (button.dataset.do === "csv") {
      await prepare(plot);
      save(plot.dataset.frame ? await csv(plot.dataset.frame) : await drawnCsv(plot), `${name}.csv`, "text/csv");
    } else await image(plot, button.dataset.do, name);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.choose) { choice = button.dataset.choose; recolour(); }
    if (button?.dataset.do === "print") Promise.all(plots.map(prepare)).then(() => window.print());
    else if (button?.dataset.do) act(button).catch((error) => { button.title = error.message; });
    const anchor = event.target.closest(".anchor");
    if (anchor && navigator.clipboard) {
      const address = location.href.split("#")[0] + anchor.getAttribute("href");
      navigator.clipboard.writeText(address).then(() => {
        anchor.textContent = "link copied";
        setTimeout(() => { anchor.textContent = "link"; }, 1500);
      }, () => {});
    }
  });
  scheme.addEventListener("change", recolour);

  if (window.innerWidth <= 900) document.querySelector("nav details").open = false;
  for (const plot of plots) {
    plot.height = Number(plot.dataset.height);
    plot.style.minHeight = `${plot.height - 34}px`;
  }
  if (typeof DecompressionStream === "undefined") {
    for (const plot of plots) plot.querySelector(".waiting").textContent =
      "This browser cannot unpack the figures; a current one can. The data stand below.";
    recolour();
    return;
  }
  for (const tools of document.querySelectorAll(".tools")) tools.hidden = false;
  recolour();
  const watcher = new IntersectionObserver((seen) => {
    for (const one of seen) {
      one.target.near = one.isIntersecting;
      if (one.isIntersecting) draw(one.target);
    }
  }, { rootMargin: "600px 0px" });
  for (const plot of plots) watcher.observe(plot);

  // Printing cannot wait: everything is unpacked beforehand, in the breaks.
  const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 50));
  (function next(at) {
    if (at === plots.length) { root.dataset.ready = "yes"; return; }
    idle(() => prepare(plots[at]).then(() => next(at + 1), () => next(at + 1)));
  })(0);
  window.addEventListener("beforeprint", () => {
    printing = true;
    root.dataset.theme = "light";
    for (const plot of plots) show(plot);
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    root.dataset.theme = theme();
    for (const plot of plots) if (plot.drawn) show(plot);
  });
})();

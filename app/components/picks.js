// The bridge between Plotly and the page: what was clicked in a chart goes to Python, what is picked is marked in it.
// Streamlit reports no click on a cell of a heatmap, so this listens to Plotly's own event. A figure says in
// layout.meta.pick what its axes are (app/figures/style.py, pickable).
const EVERY = 300 // ms between two looks for charts that came or changed

const source = (point, from) => {
  if (from.startsWith("=")) return from.slice(1)
  if (from === "x" || from === "y") return point[from]
  const values = point.customdata
  const index = Number(from.split(".")[1])
  return Array.isArray(values) || ArrayBuffer.isView(values) ? values[index] : index === 0 ? values : undefined
}

const picked = (point, pick) => {
  const found = {}
  for (const [name, from] of Object.entries(pick)) {
    const value = source(point, from)
    if (value !== undefined && value !== null && value !== "") found[name] = String(value)
  }
  return found
}

// Pixels of one value on an axis: its centre and half the width of its cell; null where the axis does not show it.
const place = (axis, value) => {
  const number = axis.type === "category" ? axis._categories.indexOf(value) : Number(value)
  if (number < 0 || Number.isNaN(number)) return null
  const [low, high] = [axis.c2p(number - 0.5), axis.c2p(number + 0.5)].sort((a, b) => a - b)
  if (high < 0 || low > axis._length) return null
  return { start: axis._offset + Math.max(low, 0), size: Math.min(high, axis._length) - Math.max(low, 0) }
}

const boxes = (plot, pick, focus) => {
  const layout = plot._fullLayout
  const names = layout._subplots.cartesian
  const on = (axis) => Object.entries(pick).find(([, from]) => from === axis)?.[0]
  const [across, down] = [on("x"), on("y")]
  const wanted = (name) => (name !== undefined && focus[name] !== null && focus[name] !== undefined ? focus[name] : null)
  // A constant that differs from the focus means that the chart is of another layer.
  for (const [name, from] of Object.entries(pick)) {
    if (from.startsWith("=") && wanted(name) !== null && wanted(name) !== from.slice(1)) return []
  }
  const found = []
  for (const name of names) {
    const { xaxis, yaxis } = layout._plots[name]
    const x = wanted(across) === null ? undefined : place(xaxis, wanted(across))
    const y = wanted(down) === null ? undefined : place(yaxis, wanted(down))
    if (x === null || y === null || (x === undefined && y === undefined)) continue
    const whole = (axis) => ({ start: axis._offset, size: axis._length })
    found.push({ x: x ?? whole(xaxis), y: y ?? whole(yaxis), cell: Boolean(x && y) })
  }
  return found
}

const mark = (plot, pick, focus, colours) => {
  const host = plot.querySelector(".svg-container")
  if (!host) return
  const found = boxes(plot, pick, focus)
  const text = JSON.stringify([found, colours])
  if (host.dataset.marked === text && host.querySelectorAll(":scope > .moescope-mark").length === found.length) return
  host.dataset.marked = text
  host.querySelectorAll(":scope > .moescope-mark").forEach((node) => node.remove())
  // In a map the mark is a frame around cells; behind curves it is a band.
  const map = plot.data.some((trace) => trace.type === "heatmap")
  for (const { x, y, cell } of found) {
    const node = document.createElement("div")
    node.className = "moescope-mark"
    const frame = { border: `${cell ? 2 : 1}px solid ${colours.line}`, boxShadow: `0 0 0 1px ${colours.ground}` }
    const band = { background: `color-mix(in srgb, ${colours.line} 10%, transparent)` }
    Object.assign(node.style, {
      position: "absolute", pointerEvents: "none", boxSizing: "border-box", zIndex: 2, borderRadius: "2px",
      left: `${x.start - 1}px`, top: `${y.start - 1}px`, width: `${x.size + 2}px`, height: `${y.size + 2}px`,
      ...(map ? frame : band),
    })
    host.append(node)
  }
}

export default function ({ data, parentElement, setTriggerValue }) {
  const look = () => {
    // Text on ground: the one pair of colours that stands out from every scale, in light and dark.
    const style = getComputedStyle(parentElement.host ?? parentElement)
    const colours = { line: style.getPropertyValue("--st-text-color"), ground: style.getPropertyValue("--st-background-color") }
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      const pick = plot.layout?.meta?.pick
      if (!pick || !plot.on || !plot._fullLayout?._plots) continue
      plot.__moescope = setTriggerValue
      if (!plot.__moescopeHooked) {
        plot.__moescopeHooked = true
        plot.on("plotly_click", (event) => {
          const found = picked(event.points[0], plot.layout.meta.pick)
          if (Object.keys(found).length) plot.__moescope("picked", found)
        })
      }
      mark(plot, pick, data, colours)
    }
  }
  look()
  const timer = setInterval(look, EVERY)
  return () => clearInterval(timer)
}

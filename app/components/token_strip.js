// Text with coloured tokens. Everything from data is set through textContent: nothing is ever parsed as HTML.
const make = (tag, name, text) => {
  const node = document.createElement(tag)
  if (name) node.className = name
  if (text !== undefined) node.textContent = text
  return node
}

const paint = (node, inks, index) => {
  if (index < 0 || !inks[index]) return
  ;[node.style.background, node.style.color] = inks[index]
}

// Line breaks and tabs are shown as signs too, so that no token is invisible.
const visible = (text) => text.replaceAll("\r", "␍").replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t")

const shown = (value, unit) => {
  if (unit === "%") return `${Math.round(value * 1000) / 10} %`
  const number = value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : Number(value.toPrecision(4)).toLocaleString("en-US")
  return unit ? `${number} ${unit}` : number
}

function drawLegend(legend, data) {
  const parts = [make("span", "label", data.legend.label)]
  if (data.legend.kind === "experts") {
    data.legend.experts.forEach((expert, index) => {
      const chip = make("span", "chip", String(expert))
      paint(chip, data.inks, index)
      parts.push(chip)
    })
    const others = make("span", "chip", "others")
    paint(others, data.inks, data.inks.length - 1)
    parts.push(others)
  } else {
    const bar = make("span", "ramp")
    bar.style.background = `linear-gradient(to right, ${data.inks.map((ink) => ink[0]).join(", ")})`
    const { low, high, unit, above } = data.legend
    parts.push(make("span", "", shown(low, "")), bar, make("span", "", `${above ? "≥ " : ""}${shown(high, unit)}`))
  }
  if (data.marks.length) parts.push(make("span", "marked", data.marked))
  legend.replaceChildren(...parts)
}

function drawDetail(panel, data, index, fixed, pick) {
  panel.replaceChildren()
  if (index === null) {
    panel.append(make("p", "heading", "Experts of a token"))
    panel.append(make("p", "hint", "Point at a token to see its experts in every layer; click to keep it. Arrow keys move. A click on an expert picks it."))
    return
  }
  const heading = make("p", "heading", `Position ${data.start + index} `)
  const text = data.texts[index]
  if (text !== null) heading.append(make("code", "", visible(text)))
  panel.append(heading)
  const value = data.values?.[index]
  if (value !== null && value !== undefined) {
    const line = make("p", "value", `${data.legend.label} `)
    line.append(make("b", "", shown(value, data.legend.unit)))
    panel.append(line)
  }
  const notes = [data.special[index] && "special token", fixed && "kept", data.marked_at.has(index) && data.marked]
  panel.append(make("p", "hint", [...notes.filter(Boolean), "layer → experts, with their part of the gate weights"].join(" · ")))
  const routes = window.__moescopeRoutes?.get(data.routes)
  if (!routes) return
  const token = data.start + index - routes.start
  if (token < 0 || token >= routes.count) return
  const place = new Map(data.legend.experts?.map((expert, at) => [expert, at]))
  let chosen = null
  routes.labels.forEach((label, layer) => {
    const row = make("div", label === data.layer ? "row chosen" : "row")
    if (label === data.layer) chosen = row
    row.append(make("span", "layer", `L ${label}`))
    const chips = make("span", "chips")
    for (let rank = 0; rank < routes.width; rank++) {
      const at = (layer * routes.count + token) * routes.width + rank
      const expert = routes.ids[at]
      if (expert === routes.none) continue
      const part = routes.parts[at] / 255
      const chip = make("button", "chip", String(expert))
      chip.type = "button"
      chip.title = `Layer ${label}, expert ${expert}: pick it`
      if (label === data.layer && place.has(expert)) paint(chip, data.inks, place.get(expert))
      else chip.style.background = `color-mix(in srgb, var(--st-primary-color) ${Math.round(8 + 42 * part)}%, transparent)`
      if (label === data.layer && expert === data.focus) chip.classList.add("focused")
      chip.append(make("small", "", `${Math.round(part * 100)} %`))
      chip.onclick = () => pick({ layer: label, expert })
      chips.append(chip)
    }
    row.append(chips)
    panel.append(row)
  })
  // The chosen layer stays in sight where there are many.
  if (chosen) panel.scrollTop = Math.max(0, chosen.offsetTop - panel.offsetTop - panel.clientHeight / 2)
}

export default function ({ data: given, parentElement, setTriggerValue }) {
  const data = { ...given, marked_at: new Set(given.marks.map((position) => position - given.start)) }
  const root = parentElement.querySelector(".strip")
  root.moescopeUnlink?.()
  const previous = root.querySelector(".text")
  const scrolled = previous && root.dataset.start === String(data.start) ? previous.scrollTop : null
  const head = make("div", "head")
  if (data.title) head.append(make("span", "title", data.title))
  const legend = make("span", "legend")
  head.append(legend)
  drawLegend(legend, data)
  const text = make("div", "text")
  text.tabIndex = 0
  text.setAttribute("role", "listbox")
  text.setAttribute("aria-label", `${data.title || "Tokens of the sequence"}; arrow keys move, Enter keeps a token`)
  const panel = make("div", "detail")
  const inside = (index) => index !== null && index >= 0 && index < data.texts.length
  const asked = data.selected === null || data.selected === undefined ? null : data.selected - data.start
  const kept = inside(asked) ? asked : null
  let active = null

  const nodes = data.texts.map((piece, index) => {
    const node = piece === null
      ? make("span", "token number", String(data.start + index))
      : make("span", "token", piece === "" ? "∅" : visible(piece))
    if (data.special[index]) node.classList.add("special")
    if (data.marked_at.has(index)) node.classList.add("marked")
    if (index === kept) node.classList.add("selected")
    paint(node, data.inks, data.paint[index])
    node.dataset.index = index
    node.setAttribute("role", "option")
    node.setAttribute("aria-selected", index === kept)
    return node
  })
  text.append(...nodes)

  const pick = (found) => setTriggerValue("picked", found)
  const keep = (index) => setTriggerValue("selected", data.start + index)
  const show = (index) => {
    active = index
    const first = index === null ? -1 : data.first[index]
    nodes.forEach((node, other) => {
      node.classList.toggle("active", other === index)
      node.classList.toggle("same", first >= 0 && data.first[other] === first)
    })
    drawDetail(panel, data, index, index !== null && index === kept, pick)
  }

  // Strips of one name tell each other what they show: a position, null = none, or how far they are scrolled.
  const tell = (said) => {
    if (data.linked) window.dispatchEvent(new CustomEvent("moescope-strip", { detail: { from: root, linked: data.linked, ...said } }))
  }
  const point = (index) => {
    show(index)
    tell({ position: index === null ? null : data.start + index })
  }
  let following = 0
  const hear = (event) => {
    const said = event.detail
    if (!root.isConnected) return window.removeEventListener("moescope-strip", hear)
    if (said.linked !== data.linked || said.from === root) return
    if (said.scrolled !== undefined) {
      following = performance.now()
      text.scrollTop = said.scrolled * (text.scrollHeight - text.clientHeight)
    } else {
      const index = said.position === null ? kept : said.position - data.start
      show(inside(index) ? index : kept)
    }
  }
  const arrived = (event) => {
    if (!root.isConnected) return window.removeEventListener("moescope-routes", arrived)
    if (event.detail === data.routes) show(active)
  }
  if (data.linked) window.addEventListener("moescope-strip", hear)
  window.addEventListener("moescope-routes", arrived)
  root.moescopeUnlink = () => {
    window.removeEventListener("moescope-strip", hear)
    window.removeEventListener("moescope-routes", arrived)
  }

  const indexOf = (event) => {
    const node = event.target.closest?.(".token")
    return node ? Number(node.dataset.index) : null
  }
  text.onmouseover = (event) => {
    const index = indexOf(event)
    if (index !== null && index !== active) point(index)
  }
  text.onmouseleave = () => point(kept)
  text.onscroll = () => {
    const room = text.scrollHeight - text.clientHeight
    if (room > 0 && performance.now() - following > 150) tell({ scrolled: text.scrollTop / room })
  }
  text.onclick = (event) => {
    const index = indexOf(event)
    if (index !== null) keep(index)
  }
  text.onkeydown = (event) => {
    const next = { ArrowRight: (active ?? -1) + 1, ArrowLeft: (active ?? 1) - 1, Home: 0, End: nodes.length - 1 }[event.key]
    if (next !== undefined) {
      // Beyond the part that is shown: keep the token there, which shows its part.
      if (!inside(next) && data.start + next >= 0 && data.start + next < data.total) keep(next)
      else {
        const index = Math.min(Math.max(next, 0), nodes.length - 1)
        point(index)
        nodes[index].scrollIntoView({ block: "nearest" })
      }
      event.preventDefault()
    } else if (event.key === "Enter" && active !== null) {
      keep(active)
    }
  }
  // A new search begins at its first hit.
  const hit = data.marked === "found" && root.dataset.marks !== String(data.marks) ? data.marks[0] - data.start : null
  root.dataset.marks = data.marks
  root.dataset.start = data.start
  root.replaceChildren(head, text, panel)
  show(kept)
  if (scrolled !== null) text.scrollTop = scrolled
  const sought = kept ?? hit
  if (inside(sought)) {
    const node = nodes[sought]
    const top = node.offsetTop - text.offsetTop
    if (top < text.scrollTop || top > text.scrollTop + text.clientHeight - 20) text.scrollTop = top - text.clientHeight / 3
  }
  return () => root.moescopeUnlink?.()
}

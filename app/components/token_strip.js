// Text coloured by expert. Everything from data is set through textContent: nothing is ever parsed as HTML.
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))

const make = (tag, name, text) => {
  const node = document.createElement(tag)
  if (name) node.className = name
  if (text !== undefined) node.textContent = text
  return node
}

const colour = (data, expert, strength) => {
  if (expert < 0) return "transparent"
  if (data.mode === "expert") {
    const hue = Math.round((expert * data.angle) % 360)
    return `hsl(${hue} 62% 52% / ${0.14 + 0.3 * strength})`
  }
  return `color-mix(in srgb, var(--st-primary-color) ${Math.round(4 + 66 * strength)}%, transparent)`
}

const chipColour = (data, expert, part) => `hsl(${Math.round((expert * data.angle) % 360)} 62% 52% / ${0.12 + 0.45 * part})`

// Line breaks and tabs are shown as signs too, so that no token is invisible.
const visible = (text) => text.replaceAll("\r", "␍").replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t")

function drawDetail(panel, data, index, fixed) {
  panel.replaceChildren()
  if (index === null) {
    panel.append(make("p", "heading", "Experts of a token"))
    panel.append(make("p", "hint", "Point at a token to see the experts of every layer; click to keep it. Arrow keys move."))
    return
  }
  const heading = make("p", "heading", `Position ${data.start + index} `)
  const text = data.texts[index]
  if (text !== null) heading.append(make("code", "", visible(text)))
  panel.append(heading)
  const note = (data.special[index] ? "special token · " : "") + (fixed ? "kept · " : "")
  panel.append(make("p", "hint", note + "layer → experts, with their part of the gate weights"))
  const count = data.texts.length
  data.labels.forEach((label, layer) => {
    const row = make("div", label === data.layer ? "row chosen" : "row")
    row.append(make("span", "layer", `L ${label}`))
    const chips = make("span", "chips")
    for (let rank = 0; rank < data.width; rank++) {
      const at = (layer * count + index) * data.width + rank
      const expert = data.idValues[at]
      if (expert < 0) continue
      const part = data.partValues[at] / 255
      const chip = make("span", "chip", String(expert))
      chip.style.background = chipColour(data, expert, part)
      chip.append(make("small", "", `${Math.round(part * 100)} %`))
      chips.append(chip)
    }
    row.append(chips)
    panel.append(row)
  })
}

export default function ({ data: given, parentElement, setStateValue }) {
  const data = { ...given, partValues: bytes(given.parts) }
  data.idValues = new Int16Array(bytes(given.ids).buffer)
  const root = parentElement.querySelector(".strip")
  const text = make("div", "text")
  text.tabIndex = 0
  text.setAttribute("role", "listbox")
  text.setAttribute("aria-label", "Tokens of the sequence; arrow keys move, Enter keeps a token")
  const panel = make("div", "detail")
  panel.setAttribute("aria-live", "polite")
  const kept = given.selected === null || given.selected === undefined ? null : given.selected - data.start
  let active = kept

  const nodes = data.texts.map((piece, index) => {
    const node = piece === null
      ? make("span", "token number", String(data.start + index))
      : make("span", "token", piece === "" ? "∅" : visible(piece))
    if (data.special[index]) node.classList.add("special")
    if (index === kept) node.classList.add("selected")
    node.style.background = colour(data, data.first[index], data.strength[index])
    node.dataset.index = index
    node.setAttribute("role", "option")
    return node
  })
  text.append(...nodes)

  const show = (index) => {
    active = index
    nodes.forEach((node, other) => {
      node.classList.toggle("active", other === index)
      node.classList.toggle("same", index !== null && data.first[other] === data.first[index] && data.first[index] >= 0)
    })
    drawDetail(panel, data, index, index !== null && index === kept)
  }
  const indexOf = (event) => {
    const node = event.target.closest?.(".token")
    return node ? Number(node.dataset.index) : null
  }
  text.onmouseover = (event) => {
    const index = indexOf(event)
    if (index !== null && index !== active) show(index)
  }
  text.onmouseleave = () => show(kept !== null && kept >= 0 && kept < nodes.length ? kept : null)
  text.onclick = (event) => {
    const index = indexOf(event)
    if (index !== null) setStateValue("selected", data.start + index)
  }
  text.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key]
    if (step) {
      const next = Math.min(Math.max((active ?? -1) + step, 0), nodes.length - 1)
      show(next)
      nodes[next].scrollIntoView({ block: "nearest" })
      event.preventDefault()
    } else if (event.key === "Enter" && active !== null) {
      setStateValue("selected", data.start + active)
    }
  }
  root.replaceChildren(text, panel)
  show(kept !== null && kept >= 0 && kept < nodes.length ? kept : null)
}

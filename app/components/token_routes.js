// Holds the experts of the tokens of a strip for the strip to read. It is a component of its own, because this is by far
// the largest part and stays the same while the colours and the kept token change.
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))

export default function ({ data }) {
  const all = (window.__moescopeRoutes ??= new Map())
  const raw = bytes(data.ids)
  const ids = data.wide ? new Uint16Array(raw.buffer) : raw
  const { start, count, width, labels, name } = data
  all.set(name, { start, count, width, labels, ids, none: data.wide ? 65535 : 255, parts: bytes(data.parts) })
  window.dispatchEvent(new CustomEvent("moescope-routes", { detail: name }))
}

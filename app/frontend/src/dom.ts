/** Building elements. Text goes in as text, never as markup: names come from files. */

type Child = Node | string | null

export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K, props: Partial<HTMLElementTagNameMap[K]> = {}, ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = Object.assign(document.createElement(tag), props)
  for (const child of children) if (child !== null) element.append(child)
  return element
}

const SVG = 'http://www.w3.org/2000/svg'

/** Paths on a field of 24 by 24. */
const ICONS = {
  navigate: 'M12 3v18M3 12h18M12 3l-3 3M12 3l3 3M12 21l-3-3M12 21l3-3M3 12l3-3M3 12l3 3M21 12l-3-3M21 12l-3 3',
  brush: 'M20 4c-5 2-9 6-11 9l3 3c3-2 7-6 8-12zM8 14c-3 0-3 3-5 5 3 1 7 1 8-2z',
  eraser: 'M9 20h11M5 15l9-10 6 5-9 10H8z M10 9.500l6 5',
  fill: 'M12 3c4 0 8 3 8 7s-3 5-4 7-3 4-6 3-6-5-6-9 4-8 8-8z M9 10h.01M13 8h.01M14 13h.01M10 14h.01',
  grow: 'M12 12m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0M12 3v4M12 17v4M3 12h4M17 12h4M5.600 5.600l2.800 2.800M15.600 15.600l2.800 2.800M18.400 5.600l-2.800 2.800M8.400 15.600l-2.800 2.800',
  interpolate: 'M4 6h16M4 18h16M7 10h10M7 14h10',
  undo: 'M9 6L4 11l5 5M4 11h10a5 5 0 0 1 0 10h-3',
  redo: 'M15 6l5 5-5 5M20 11H10a5 5 0 0 0 0 10h3',
  save: 'M5 3h11l4 4v14H4V3zM8 3v6h8V3M8 21v-7h8v7',
  mpr: 'M3 3h8v8H3zM13 3h8v8h-8zM3 13h8v8H3zM13 13h8v8h-8z',
  axial: 'M4 12a8 4 0 1 0 16 0a8 4 0 1 0-16 0M12 3v3M12 18v3',
  coronal: 'M6 3h12v18H6zM3 12h3M18 12h3',
  sagittal: 'M9 3c6 0 8 5 7 9s-3 4-3 9H8c0-5-2-5-3-9s0-9 4-9z',
  '3d': 'M12 2l9 5v10l-9 5-9-5V7zM3 7l9 5 9-5M12 12v10',
  compare: 'M3 4h8v16H3zM13 4h8v16h-8zM6 9h2M6 13h2M16 9h2M16 13h2',
  eye: 'M2 12s4-7 10-7 10 7 10 7-4 7-10 7S2 12 2 12zM12 12m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0',
  eyeOff: 'M2 12s4-7 10-7 10 7 10 7-4 7-10 7S2 12 2 12zM3 21L21 3',
  crosshair: 'M12 2v7M12 15v7M2 12h7M15 12h7',
  radiological: 'M4 7h16M4 7l3-3M4 7l3 3M20 17H4M20 17l-3-3M20 17l-3 3',
  reset: 'M4 12a8 8 0 1 0 3-6M4 4v4h4',
  structures: 'M4 6h2M4 12h2M4 18h2M9 6h11M9 12h11M9 18h11',
  maps: 'M12 3l9 5-9 5-9-5zM3 12l9 5 9-5M3 16l9 5 9-5',
  camera: 'M3 7h4l2-3h6l2 3h4v13H3zM12 13m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0',
  help: 'M9 9a3 3 0 1 1 4 3c-1 .500-1 1-1 2M12 18h.01M12 12m-10 0a10 10 0 1 0 20 0a10 10 0 1 0-20 0',
  lock: 'M6 11h12v10H6zM8 11V8a4 4 0 0 1 8 0v3',
  unlock: 'M6 11h12v10H6zM8 11V8a4 4 0 0 1 7.500-2',
  solo: 'M12 12m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0M12 2v3M12 19v3M2 12h3M19 12h3',
  close: 'M5 5l14 14M19 5L5 19',
} as const

export type Icon = keyof typeof ICONS

export function icon(name: Icon): SVGElement {
  const svg = document.createElementNS(SVG, 'svg')
  svg.setAttribute('viewBox', '0 0 24 24')
  svg.setAttribute('aria-hidden', 'true')
  const path = document.createElementNS(SVG, 'path')
  path.setAttribute('d', ICONS[name])
  svg.append(path)
  return svg
}

/** A button that shows an icon and says what it does. */
export function iconButton(name: Icon, title: string, onclick: () => void): HTMLButtonElement {
  const button = el('button', { type: 'button', title, onclick, className: 'icon' }, icon(name))
  button.setAttribute('aria-label', title)
  return button
}

/** Give a button another icon and title. */
export function relabel(button: HTMLButtonElement, name: Icon, title: string): void {
  if (button.title === title) return
  button.replaceChildren(icon(name))
  button.title = title
  button.setAttribute('aria-label', title)
}

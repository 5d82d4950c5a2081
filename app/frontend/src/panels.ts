/** What lies over the planes when asked for: structures, maps, the keyboard sheet, and notices. */

import { el, iconButton, relabel } from './dom'
import { SHEET } from './keys'
import type { Viewer } from './viewer'

export type PanelName = 'structures' | 'maps'

export class Panels {
  readonly element = el('aside', { className: 'panel', hidden: true })
  open: PanelName | null = null
  private filter = ''

  constructor(private readonly viewer: Viewer) {}

  toggle(name: PanelName): void {
    this.open = this.open === name ? null : name
    this.render()
    this.viewer.refresh()
  }

  /** Show the open panel anew. */
  render(): void {
    this.element.hidden = this.open === null
    if (!this.open || !this.viewer.scene) {
      this.element.replaceChildren()
      return
    }
    const title = this.open === 'structures' ? 'Structures' : 'Maps'
    const header = el('header', {}, el('b', { textContent: title }), iconButton('close', 'Close', () => this.toggle(this.open!)))
    this.element.replaceChildren(header, ...(this.open === 'structures' ? this.structures() : this.maps()))
  }

  private structures(): HTMLElement[] {
    const { viewer } = this
    const labels = viewer.scene!.labels
    const rows = el('div', { className: 'rows' })
    const fill = () => rows.replaceChildren(...labels
      .filter(label => label.name.toLowerCase().includes(this.filter))
      .map(label => this.structure(label.value)))
    const search = el('input', { type: 'search', placeholder: 'Find', ariaLabel: 'Find a structure', value: this.filter })
    search.oninput = () => {
      this.filter = search.value.toLowerCase()
      fill()
    }
    const all = (visible: boolean, text: string) => el('button', {
      type: 'button', className: 'text', textContent: text, onclick: () => viewer.setVisible(() => visible),
    })
    fill()
    return [el('div', { className: 'tools' }, all(true, 'All'), all(false, 'None'), labels.length > 8 ? search : null), rows]
  }

  private structure(value: number): HTMLElement {
    const { viewer } = this
    const label = viewer.scene!.label(value)!
    const row = el('div', { className: 'row' })
    row.classList.toggle('current', viewer.editor?.tool.label === value)
    row.classList.toggle('off', !label.visible)
    const eye = iconButton('eye', 'Hide', () => viewer.setVisible((one, now) => (one === value ? !now : now)))
    relabel(eye, label.visible ? 'eye' : 'eyeOff', label.visible ? 'Hide' : 'Show')
    const colour = el('input', { type: 'color', title: 'Colour', ariaLabel: `Colour of ${label.name}`, value: hex(label.rgb) })
    colour.oninput = () => viewer.setColour(value, rgb(colour.value))
    const name = el('button', {
      type: 'button', className: 'name', textContent: label.name, title: `${label.name}: use it to paint`,
      onclick: () => viewer.setTool({ label: value }),
    })
    const solo = iconButton('solo', 'Show only this one', () => viewer.setVisible(one => one === value))
    const lock = iconButton('lock', '', () => viewer.toggleLock(value))
    relabel(lock, label.locked ? 'lock' : 'unlock', label.locked ? 'Locked: may not be changed; unlock' : 'Lock against changes')
    lock.setAttribute('aria-pressed', String(label.locked))
    row.append(eye, colour, name, solo, lock)
    return row
  }

  private maps(): HTMLElement[] {
    const { viewer } = this
    const rows = el('div', { className: 'rows' })
    for (const overlay of viewer.scene!.overlays) {
      const shown = el('input', { type: 'checkbox', checked: overlay.visible })
      const opacity = el('input', {
        type: 'range', min: '0', max: '100', value: String(Math.round(overlay.opacity * 100)), title: 'Opacity',
      })
      shown.onchange = () => viewer.setOverlay(overlay, { visible: shown.checked })
      opacity.oninput = () => viewer.setOverlay(overlay, { opacity: Number(opacity.value) / 100 })
      const name = el('label', { className: 'check name' }, shown, overlay.spec.title || overlay.spec.id)
      rows.append(el('div', { className: 'row' }, name, opacity))
    }
    if (!viewer.scene!.overlays.length) rows.append(el('div', { className: 'row', textContent: 'Still loading' }))
    return [rows]
  }
}

/** The sheet of keys; a click beside it closes it. */
export function helpSheet(close: () => void): HTMLElement {
  const columns = el('div', { className: 'columns' })
  for (const [title, entries] of SHEET) {
    const list = el('dl')
    for (const [keys, text] of entries) list.append(el('dt', { textContent: keys }), el('dd', { textContent: text }))
    columns.append(el('section', {}, el('h3', { textContent: title }), list))
  }
  const header = el('header', {}, el('h2', { textContent: 'Keyboard and mouse' }), iconButton('close', 'Close', close))
  const sheet = el('div', { className: 'sheet' }, header, columns)
  sheet.setAttribute('role', 'dialog')
  sheet.setAttribute('aria-label', 'Keyboard and mouse')
  const cover = el('div', { className: 'help' }, sheet)
  cover.onclick = event => {
    if (event.target === cover) close()
  }
  return cover
}

/** Short messages over the planes; one of each kind at a time. */
export class Notices {
  readonly element = el('div', { className: 'notices' })
  private readonly shown = new Map<string, HTMLElement>()

  /**
   * Show a message.
   *
   * @param seconds after which it goes by itself; 0 stays until it is closed.
   */
  show(
    kind: string, level: 'info' | 'warn' | 'bad', text: string, buttons: [string, () => void][] = [], seconds = 0,
  ): void {
    this.close(kind)
    const notice = el('div', { className: `notice ${level}` }, el('span', { textContent: text }))
    notice.setAttribute('role', level === 'bad' ? 'alert' : 'status')
    notice.dataset.kind = kind
    buttons.forEach(([title, action], i) => notice.append(el('button', {
      type: 'button', className: i ? 'text' : 'text primary', textContent: title,
      onclick: () => {
        this.close(kind)
        action()
      },
    })))
    if (!buttons.length) notice.append(iconButton('close', 'Close', () => this.close(kind)))
    this.shown.set(kind, notice)
    this.element.append(notice)
    if (seconds) setTimeout(() => this.shown.get(kind) === notice && this.close(kind), seconds * 1000)
  }

  close(kind: string): void {
    this.shown.get(kind)?.remove()
    this.shown.delete(kind)
  }

  clear(): void {
    for (const kind of [...this.shown.keys()]) this.close(kind)
  }
}

function hex(colour: readonly number[]): string {
  return `#${colour.map(value => value.toString(16).padStart(2, '0')).join('')}`
}

function rgb(text: string): [number, number, number] {
  return [1, 3, 5].map(at => parseInt(text.slice(at, at + 2), 16)) as [number, number, number]
}

/** Ways off the page that are not the browser's own: a link to another view shows it without leaving the document. */

import { el } from './dom'

const FAREWELL_MS = 12_000

export class Leaving {
  private going = false

  /** @param hold asked when a link is followed; it may keep `go` for later and answer true, and nothing happens. */
  constructor(private readonly hold: (go: () => void) => boolean) {
    document.addEventListener('click', this.onClick, true)
  }

  private readonly onClick = (event: MouseEvent): void => {
    if (this.going || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return
    const link = event.composedPath().find(one => one instanceof HTMLAnchorElement)
    if (!link?.href || link.hasAttribute('download') || !['', '_self'].includes(link.target)) return
    const { origin, pathname } = new URL(link.href)
    if (origin !== location.origin || pathname === location.pathname) return // beforeunload asks about other sites
    if (!this.hold(() => this.follow(link.href))) return
    event.preventDefault()
    event.stopImmediatePropagation()
  }

  /** The page may have drawn its links anew since. */
  private follow(href: string): void {
    const link = [...document.links].find(one => one.href === href)
    this.going = true
    if (link) link.click()
    else location.assign(href)
    this.going = false
  }

  destroy(): void {
    document.removeEventListener('click', this.onClick, true)
  }
}

/** Say something on whatever page is shown now. */
export function farewell(text: string): void {
  const note = el('div', { textContent: text })
  note.setAttribute('role', 'status')
  note.setAttribute('style', 'position:fixed;left:50%;bottom:36px;transform:translateX(-50%);z-index:1000001;'
    + 'padding:8px 14px;border-radius:6px;background:#3a2f0b;color:#ffe9a8;border:1px solid #8a6d1f;'
    + 'font:14px/20px "Source Sans",sans-serif;pointer-events:none')
  document.body.append(note)
  setTimeout(() => note.remove(), FAREWELL_MS)
}

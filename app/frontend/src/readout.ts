/** The line below the planes: what lies under the crosshair, and how the drawing stands. */

import { DIFFERENCE } from './colours'
import { el } from './dom'
import type { Viewer } from './viewer'

export class Readout {
  readonly element = el('div', { className: 'status' })
  private readonly place = el('div', { className: 'readout' })
  private readonly legend = el('div', { className: 'legend', hidden: true })
  private readonly state = el('div', { className: 'state' })
  private readonly progress = el('progress', { max: 1, hidden: true })
  private readonly text = el('span')

  constructor() {
    for (const [name, colour] of Object.entries(DIFFERENCE)) {
      const swatch = el('i', { className: 'swatch' })
      swatch.style.background = `rgb(${colour.join(',')})`
      this.legend.append(el('span', {}, swatch, { first: 'left only', second: 'right only', both: 'both' }[name]!))
    }
    this.state.append(this.progress, this.text)
    this.element.append(this.place, this.legend, this.state)
  }

  /** How much of the full scan is here. */
  loading(share: number): void {
    this.progress.hidden = share >= 1
    this.progress.value = share
  }

  show(viewer: Viewer): void {
    const { scene, editor, spec } = viewer
    this.legend.hidden = !(viewer.layout === 'compare' && scene?.difference)
    this.text.textContent = state(viewer)
    this.state.classList.toggle('dirty', !!editor?.dirty)
    if (!scene || (!scene.image && !scene.preview)) {
      this.place.replaceChildren()
      return
    }
    const { grid, at } = scene
    const mm = grid.world(at).map(value => value.toFixed(1)).join(', ')
    const value = scene.value(at)
    const offset = grid.offset(at)
    const mask = viewer.layout === 'compare' ? [scene.first, scene.second] : [scene.mask]
    const names = mask.map(one => {
      const label = one?.[offset] ?? 0
      return label ? scene.label(label)?.name ?? `label ${label}` : '–'
    })
    const unit = spec.modality === 'CT' ? ' HU' : ''
    const parts: (string | HTMLElement)[] = [
      el('b', { textContent: value === null ? '–' : `${digits(value)}${unit}` }), '   ',
      el('b', { textContent: names.join(' | ') }),
      `   mm ${mm} (RAS)   voxel ${grid.toFile(at).join(', ')}`,
    ]
    for (const overlay of scene.overlays) {
      const here = overlay.visible ? scene.overlayValue(overlay, at) : null
      if (here === null) continue
      const map = overlay.spec.kind === 'uncertainty' || overlay.spec.kind === 'evidence'
      parts.push(`   ${overlay.spec.title || overlay.spec.id}: ${map ? digits(here) : scene.label(here)?.name ?? '–'}`)
    }
    const [centre, width] = scene.window
    parts.push(`   W ${digits(width)} C ${digits(centre)}`)
    this.place.replaceChildren(...parts)
    this.place.title = this.place.textContent ?? ''
  }
}

function digits(value: number): string {
  return Math.abs(value) >= 100 || Number.isInteger(value) ? String(Math.round(value)) : String(Number(value.toPrecision(3)))
}

function state(viewer: Viewer): string {
  const { spec, editor, scene } = viewer
  if (!scene?.image) return scene?.preview ? 'Reduced picture; the full scan is coming, drawing starts then' : ''
  if (viewer.saving) return 'Saving …'
  if (!spec.save) return 'Read only'
  const draft = viewer.draftState
  if (editor?.dirty) return `Unsaved changes${draft ? ` · ${draft}` : ''}`
  return viewer.versionText
}

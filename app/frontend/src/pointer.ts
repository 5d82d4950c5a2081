/** Mouse and pen on one plane. */

import { AXES } from './grid'
import type { Pane } from './pane'
import type { Vox } from './spec'
import type { Viewer } from './viewer'

const MOST_ZOOM = 40

type Drag =
  | { kind: 'crosshair' }
  | { kind: 'draw'; last: Vox }
  | { kind: 'pan'; x: number; y: number; centre: Vox }
  | { kind: 'window'; x: number; y: number; window: [number, number] }

export class Pointer {
  private drag: Drag | null = null
  private turned = 0

  constructor(private readonly viewer: Viewer, private readonly pane: Pane) {
    const { element } = pane
    element.addEventListener('pointerdown', event => this.down(event))
    element.addEventListener('pointermove', event => this.move(event))
    element.addEventListener('pointerup', event => this.up(event))
    element.addEventListener('pointercancel', event => this.up(event))
    element.addEventListener('pointerleave', () => this.leave())
    element.addEventListener('wheel', event => this.wheel(event), { passive: false })
    element.addEventListener('dblclick', () => this.single())
    element.addEventListener('contextmenu', event => event.preventDefault())
  }

  private at(event: MouseEvent): Vox {
    const box = this.pane.element.getBoundingClientRect()
    return this.pane.voxel(this.viewer.scene!, event.clientX - box.x, event.clientY - box.y)
  }

  private get painting(): boolean {
    return this.viewer.editable && this.viewer.editor?.tool.name !== 'navigate' && this.pane.role === 'drawing'
  }

  private down(event: PointerEvent): void {
    const { viewer, pane } = this
    const { scene, editor } = viewer
    if (!scene || !editor || this.drag) return
    event.preventDefault()
    pane.element.focus({ preventScroll: true })
    pane.element.setPointerCapture(event.pointerId)
    viewer.activePane = pane
    const { clientX: x, clientY: y } = event
    const at = this.at(event)
    if (event.button === 1) this.drag = { kind: 'pan', x, y, centre: [...scene.centre] }
    else if (event.button === 2) this.drag = { kind: 'window', x, y, window: [...scene.window] }
    else if (!this.painting || event.shiftKey) {
      this.drag = { kind: 'crosshair' }
      viewer.moveCrosshair(at)
    } else {
      const voxel = at.map(Math.round) as Vox
      const inside = voxel.every((value, axis) => value >= 0 && value < scene.grid.size[axis])
      if (editor.tool.name === 'grow') {
        if (inside) viewer.growAt(pane, voxel)
        return
      }
      this.drag = { kind: 'draw', last: voxel }
      editor.begin(pane.cut(scene), voxel)
      this.showCursor(at)
    }
    viewer.refresh()
  }

  private move(event: PointerEvent): void {
    const { viewer, pane, drag } = this
    const { scene, editor } = viewer
    if (!scene || !editor) return
    const { clientX: x, clientY: y } = event
    if (drag?.kind === 'crosshair') viewer.moveCrosshair(this.at(event))
    else if (drag?.kind === 'pan') {
      const { u, v } = AXES[pane.plane]
      const box = pane.element.getBoundingClientRect()
      const start = pane.voxel(scene, drag.x - box.x, drag.y - box.y)
      const now = pane.voxel(scene, x - box.x, y - box.y)
      scene.centre[u] = drag.centre[u] - (now[u] - start[u])
      scene.centre[v] = drag.centre[v] - (now[v] - start[v])
    } else if (drag?.kind === 'window') {
      const [centre, width] = drag.window
      const gain = Math.max(width, 1e-3) / 250 // a window's width for 250 pixels
      viewer.setWindow([centre + (y - drag.y) * gain, Math.max(gain, width + (x - drag.x) * gain)])
    } else if (drag?.kind === 'draw') {
      // All places that the pointer passed since the last frame: a quick stroke stays a smooth one.
      const passed = event.getCoalescedEvents?.() ?? []
      for (const one of passed.length ? passed : [event]) {
        const voxel = this.at(one).map(Math.round) as Vox
        editor.extend(drag.last, voxel)
        drag.last = voxel
      }
    }
    if (this.painting) this.showCursor(this.at(event))
    else if (!drag) return
    else pane.cursor = null
    viewer.refresh(!drag || drag.kind === 'draw' ? pane : undefined)
  }

  private up(event: PointerEvent): void {
    const { viewer, pane, drag } = this
    if (!drag) return
    this.drag = null
    if (pane.element.hasPointerCapture(event.pointerId)) pane.element.releasePointerCapture(event.pointerId)
    if (drag.kind === 'draw') {
      viewer.editor?.finish()
      if (pane.cursor) pane.cursor.outline = []
      viewer.changedDrawing()
    }
    viewer.refresh()
  }

  private leave(): void {
    if (this.drag) return
    this.pane.cursor = null
    this.viewer.refresh(this.pane)
  }

  private wheel(event: WheelEvent): void {
    event.preventDefault()
    const { viewer, pane } = this
    const { scene } = viewer
    if (!scene) return
    viewer.activePane = pane
    const turn = event.deltaY || event.deltaX // with Shift some browsers turn the wheel sideways
    if (event.ctrlKey || event.metaKey) {
      const { u, v } = AXES[pane.plane]
      const before = this.at(event)
      scene.zoom = Math.min(MOST_ZOOM, Math.max(0.25, scene.zoom * Math.exp(-turn / 500)))
      const after = this.at(event)
      scene.centre[u] += before[u] - after[u]
      scene.centre[v] += before[v] - after[v]
      viewer.refresh()
      return
    }
    // Touch pads send many small turns; a wheel's click is 100 or so.
    this.turned += Math.abs(turn) >= 50 || event.deltaMode ? Math.sign(turn) * 40 : turn
    const slices = Math.trunc(this.turned / 40)
    this.turned -= slices * 40
    if (slices) viewer.scroll(pane, -slices * (event.shiftKey ? 5 : 1))
  }

  private single(): void {
    const { viewer, pane } = this
    if (this.painting || viewer.layout === 'compare') return
    viewer.setLayout(viewer.layout === pane.plane ? 'mpr+3d' : pane.plane)
  }

  private showCursor(at: Vox): void {
    const { viewer, pane } = this
    const { scene, editor } = viewer
    if (!scene || !editor) return
    const { tool } = editor
    const { u, v } = AXES[pane.plane]
    const round = tool.name === 'brush' || tool.name === 'eraser'
    const rgb = tool.name === 'eraser' ? [255, 255, 255] : scene.label(tool.label)?.rgb ?? [255, 255, 255]
    pane.cursor = {
      at,
      diameter: round ? tool.size * Math.min(scene.grid.step[u], scene.grid.step[v]) : 0.01,
      outline: editor.outline,
      colour: `rgb(${rgb.join(',')})`,
    }
  }
}

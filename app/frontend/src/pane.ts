/** One plane on the screen: pixels of voxels, drawn by the 2-D canvas, which needs no graphics card. */

import { pack } from './colours'
import { AXES, marks, mirrored, type Plane } from './grid'
import type { Cut } from './paint'
import type { Overlay, Scene } from './scene'
import { cutLabels, drawDifference, drawImage, drawLabels, frame, levels, sample } from './slice'
import type { Vox } from './spec'

export type Role = 'drawing' | 'first' | 'second'

const FONT = '13px system-ui, "DejaVu Sans", sans-serif'
const MARGIN = 0.96 // of the pane that a plane fills at zoom 1

class Layer {
  readonly canvas = document.createElement('canvas')
  readonly context = this.canvas.getContext('2d')!
  private image = new ImageData(1, 1)
  pixels = new Uint32Array(1)
  key = ''

  size(width: number, height: number): void {
    if (this.canvas.width === width && this.canvas.height === height && this.pixels.length === width * height) return
    this.canvas.width = width
    this.canvas.height = height
    this.image = this.context.createImageData(width, height)
    this.pixels = new Uint32Array(this.image.data.buffer)
    this.key = ''
  }

  show(): void {
    this.context.putImageData(this.image, 0, 0)
  }
}

/** What a tool shows above a plane while it is used. */
export interface Cursor {
  at: Vox // under the pointer
  diameter: number // mm, 0 for none
  outline: Vox[]
  colour: string
}

export class Pane {
  readonly element = document.createElement('canvas')
  private readonly context = this.element.getContext('2d')!
  private readonly grey = new Layer()
  private readonly labels = new Layer()
  private cutBuffer = new Uint8Array(1)
  private otherBuffer = new Uint8Array(1)
  plane: Plane
  cursor: Cursor | null = null
  active = false
  title = ''

  constructor(plane: Plane, readonly role: Role) {
    this.plane = plane
    this.element.className = 'plane'
    this.element.tabIndex = -1
  }

  cut(scene: Scene): Cut {
    return { plane: this.plane, index: scene.at[AXES[this.plane].normal] }
  }

  /** CSS pixels for one mm. */
  scale(scene: Scene): number {
    const { u, v } = AXES[this.plane]
    const { size, step } = scene.grid
    const fit = Math.min(this.width / (size[u] * step[u]), this.height / (size[v] * step[v]))
    return fit * MARGIN * scene.zoom
  }

  get width(): number {
    return this.element.clientWidth || 1
  }

  get height(): number {
    return this.element.clientHeight || 1
  }

  /** Place (fractions of voxels, patient order) under a point of the canvas in CSS pixels. */
  voxel(scene: Scene, x: number, y: number): Vox {
    const { u, v } = AXES[this.plane]
    const scale = this.scale(scene)
    const way = mirrored(this.plane, scene.radiological) ? -1 : 1
    const at: Vox = [...scene.at]
    at[u] = scene.centre[u] + (way * (x - this.width / 2)) / (scale * scene.grid.step[u])
    at[v] = scene.centre[v] - (y - this.height / 2) / (scale * scene.grid.step[v])
    return at
  }

  /** Where on the canvas a voxel lies, CSS pixels. */
  point(scene: Scene, at: Vox): [number, number] {
    const { u, v } = AXES[this.plane]
    const scale = this.scale(scene)
    const way = mirrored(this.plane, scene.radiological) ? -1 : 1
    return [
      this.width / 2 + way * (at[u] - scene.centre[u]) * scene.grid.step[u] * scale,
      this.height / 2 - (at[v] - scene.centre[v]) * scene.grid.step[v] * scale,
    ]
  }

  draw(scene: Scene): void {
    const ratio = window.devicePixelRatio || 1
    const [width, height] = [Math.round(this.width * ratio), Math.round(this.height * ratio)]
    if (this.element.width !== width || this.element.height !== height) {
      this.element.width = width
      this.element.height = height
    }
    const context = this.context
    context.setTransform(1, 0, 0, 1, 0, 0)
    context.fillStyle = '#000'
    context.fillRect(0, 0, width, height)
    if (!scene.image && !scene.preview) return
    this.renderGrey(scene)
    this.renderLabels(scene)
    const { u, v } = AXES[this.plane]
    const scale = this.scale(scene) * ratio
    const a = (mirrored(this.plane, scene.radiological) ? -1 : 1) * scene.grid.step[u] * scale
    const d = -scene.grid.step[v] * scale
    context.setTransform(a, 0, 0, d, width / 2 - a * (0.5 + scene.centre[u]), height / 2 - d * (0.5 + scene.centre[v]))
    context.imageSmoothingEnabled = true
    context.drawImage(this.grey.canvas, 0, 0)
    context.imageSmoothingEnabled = false
    context.drawImage(this.labels.canvas, 0, 0)
    context.setTransform(ratio, 0, 0, ratio, 0, 0)
    if (scene.crosshair) this.drawCrosshair(scene)
    this.drawCursor(scene)
    this.drawText(scene)
  }

  private renderGrey(scene: Scene): void {
    const cut = this.cut(scene)
    const at = frame(scene.grid, cut)
    this.grey.size(at.width, at.height)
    const key = `${cut.plane} ${cut.index} ${scene.greyVersion}`
    if (this.grey.key === key) return
    this.grey.key = key
    const pixels = this.grey.pixels
    if (scene.image) drawImage(pixels, at, scene.image, scene.channel, scene.window, scene.grey)
    else if (scene.preview) {
      const { volume, matrix } = scene.preview
      const [gain, bias] = levels(scene.window, volume.slope, volume.inter)
      pixels.fill(pack(0, 0, 0))
      sample(scene.grid, cut, volume, scene.channel, matrix, (pixel, value) => {
        pixels[pixel] = scene.grey[Math.min(255, Math.max(0, Math.floor(value * gain + bias)))]
      })
    }
    for (const overlay of scene.overlays) if (overlay.visible && isMap(overlay)) blend(pixels, scene, cut, overlay)
    this.grey.show()
  }

  private renderLabels(scene: Scene): void {
    const cut = this.cut(scene)
    const at = frame(scene.grid, cut)
    this.labels.size(at.width, at.height)
    const key = `${cut.plane} ${cut.index} ${scene.labelVersion} ${scene.difference}`
    if (this.labels.key === key) return
    this.labels.key = key
    const pixels = this.labels.pixels
    if (this.cutBuffer.length !== pixels.length) {
      this.cutBuffer = new Uint8Array(pixels.length)
      this.otherBuffer = new Uint8Array(pixels.length)
    }
    const mask = this.role === 'drawing' ? scene.mask : this.role === 'first' ? scene.first : scene.second
    if (this.role !== 'drawing' && scene.difference && scene.first && scene.second) {
      cutLabels(this.cutBuffer, at, scene.first)
      cutLabels(this.otherBuffer, at, scene.second)
      drawDifference(pixels, this.cutBuffer, this.otherBuffer, scene.fill, scene.shown ? scene.opacity : 0)
    } else if (mask) {
      cutLabels(this.cutBuffer, at, mask)
      drawLabels(pixels, this.cutBuffer, at.width, at.height, scene.fill, scene.rim)
    } else pixels.fill(0)
    for (const overlay of scene.overlays) {
      if (overlay.visible && !isMap(overlay)) this.outlines(scene, cut, overlay, at.width, at.height)
    }
    this.labels.show()
  }

  /** Rims of another label map over the drawing. */
  private outlines(scene: Scene, cut: Cut, overlay: Overlay, width: number, height: number): void {
    const other = this.otherBuffer.fill(0)
    sample(scene.grid, cut, overlay.volume, 0, overlay.matrix, (pixel, value) => {
      other[pixel] = value
    })
    const alpha = Math.round(255 * overlay.opacity)
    for (let pixel = 0; pixel < other.length; pixel++) {
      const label = other[pixel]
      if (!label) continue
      const x = pixel % width
      const rim =
        x === 0 || x === width - 1 || pixel < width || pixel >= width * (height - 1) ||
        other[pixel - 1] !== label || other[pixel + 1] !== label ||
        other[pixel - width] !== label || other[pixel + width] !== label
      const known = scene.label(label)
      if (rim && known?.visible) this.labels.pixels[pixel] = pack(...known.rgb, alpha)
    }
  }

  private drawCrosshair(scene: Scene): void {
    const context = this.context
    const [x, y] = this.point(scene, scene.at).map(value => Math.round(value) + 0.5)
    const gap = 9
    context.strokeStyle = 'rgba(120, 220, 255, 0.75)'
    context.lineWidth = 1
    context.beginPath()
    for (const [x0, y0, x1, y1] of [
      [0, y, x - gap, y], [x + gap, y, this.width, y], [x, 0, x, y - gap], [x, y + gap, x, this.height],
    ]) {
      context.moveTo(x0, y0)
      context.lineTo(x1, y1)
    }
    context.stroke()
  }

  private drawCursor(scene: Scene): void {
    if (!this.cursor) return
    const context = this.context
    context.strokeStyle = this.cursor.colour
    context.lineWidth = 1.5
    if (this.cursor.diameter) {
      const [x, y] = this.point(scene, this.cursor.at)
      context.beginPath()
      context.arc(x, y, Math.max(2, (this.cursor.diameter / 2) * this.scale(scene)), 0, 2 * Math.PI)
      context.stroke()
    }
    if (this.cursor.outline.length > 1) {
      context.beginPath()
      for (const at of this.cursor.outline) context.lineTo(...this.point(scene, at))
      context.stroke()
    }
  }

  private drawText(scene: Scene): void {
    const context = this.context
    const [left, right, top, bottom] = marks(this.plane, scene.radiological)
    context.font = `bold ${FONT}`
    context.shadowColor = '#000'
    context.shadowBlur = 3
    context.fillStyle = '#ffd479'
    context.textBaseline = 'middle'
    context.textAlign = 'left'
    context.fillText(left, 6, this.height / 2)
    context.textAlign = 'right'
    context.fillText(right, this.width - 6, this.height / 2)
    context.textAlign = 'center'
    context.fillText(top, this.width / 2, 13)
    context.fillText(bottom, this.width / 2, this.height - 11)
    context.font = FONT
    context.fillStyle = this.active ? '#e8f4ff' : '#9fb4c4'
    context.textAlign = 'left'
    const { normal } = AXES[this.plane]
    const name = this.plane[0].toUpperCase() + this.plane.slice(1)
    context.fillText(this.title || name, 6, 13)
    context.textAlign = 'right'
    context.fillText(`${scene.at[normal] + 1} / ${scene.grid.size[normal]}`, this.width - 6, 13)
    this.drawScaleBar(scene)
    context.shadowBlur = 0
  }

  private drawScaleBar(scene: Scene): void {
    const context = this.context
    const scale = this.scale(scene)
    const mm = [200, 100, 50, 20, 10, 5, 2, 1].find(length => length * scale < this.width / 3) ?? 1
    const [x, y] = [8, this.height - 10]
    context.strokeStyle = '#c8d4dc'
    context.lineWidth = 1.5
    context.beginPath()
    context.moveTo(x, y - 4)
    context.lineTo(x, y)
    context.lineTo(x + mm * scale, y)
    context.lineTo(x + mm * scale, y - 4)
    context.stroke()
    context.fillStyle = '#c8d4dc'
    context.textAlign = 'left'
    context.fillText(mm >= 10 ? `${mm / 10} cm` : `${mm} mm`, x + 4, y - 11)
  }
}

/** Whether an overlay holds numbers rather than labels. */
export function isMap(overlay: Overlay): boolean {
  return overlay.spec.kind === 'uncertainty' || overlay.spec.kind === 'evidence'
}

function blend(pixels: Uint32Array, scene: Scene, cut: Cut, overlay: Overlay): void {
  const { volume, matrix, colours, opacity } = overlay
  const [low, high] = overlay.spec.range
  const gain = 255 / Math.max(high - low, 1e-12)
  sample(scene.grid, cut, volume, 0, matrix, (pixel, stored) => {
    const value = stored * volume.slope + volume.inter
    if (!(value >= low)) return
    const colour = colours[Math.min(255, Math.floor((value - low) * gain))]
    const below = pixels[pixel]
    const mix = (shift: number) => {
      const grey = (below >>> shift) & 255
      return Math.round(grey + (((colour >>> shift) & 255) - grey) * opacity)
    }
    pixels[pixel] = pack(mix(0), mix(8), mix(16))
  })
}

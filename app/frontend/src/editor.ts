/** The tools: what they may paint, and the drawing's history. */

import { AXES, type Plane } from './grid'
import { History, Stroke, type Step } from './history'
import { gaps, interpolate } from './interpolate'
import { brush, grow, outline, type Cut } from './paint'
import type { Scene } from './scene'
import { cutLabels, frame } from './slice'
import type { Protect, ToolName, ToolSpec, Vox } from './spec'

export interface Tool {
  name: ToolName
  label: number
  size: number
  threeD: boolean
  threshold: [number, number]
  limited: boolean // by the threshold
  protect: Protect
  tolerance: number // of region growing, in the scan's units
  reach: number // of region growing, mm
}

export class Editor {
  history: History
  tool: Tool
  private saved: number // state of the history that the server has
  private stroke: Stroke | null = null
  private cut: Cut | null = null
  private points: Vox[] = []

  constructor(private readonly scene: Scene, spec: ToolSpec) {
    this.history = new History(scene.mask)
    this.saved = this.history.state
    this.tool = {
      name: spec.name,
      label: spec.label ?? scene.labels[0]?.value ?? 0,
      size: spec.size,
      threeD: spec.three_d,
      threshold: spec.threshold ?? [0, 0],
      limited: spec.threshold !== null,
      protect: spec.protect,
      tolerance: 0,
      reach: 30,
    }
  }

  get dirty(): boolean {
    return this.history.state !== this.saved
  }

  get drawing(): boolean {
    return this.stroke !== null
  }

  /** The outline that is being drawn. */
  get outline(): Vox[] {
    return this.points
  }

  /** The server has the drawing as it was at a state of the history. */
  markSaved(state: number): void {
    this.saved = state
  }

  /** Another mask has been put into the scene. */
  reset(): void {
    this.history = new History(this.scene.mask)
    this.saved = this.history.state
    this.stroke = null
    this.points = []
  }

  begin(cut: Cut, at: Vox): void {
    this.stroke = new Stroke(this.scene.mask)
    this.cut = cut
    this.points = []
    this.extend(at, at)
  }

  /** Carry a stroke on. */
  extend(from: Vox, to: Vox): void {
    const { stroke, cut, tool, scene } = this
    if (!stroke || !cut) return
    if (tool.name === 'fill') {
      this.points.push(to)
      return
    }
    const label = tool.name === 'eraser' ? 0 : tool.label
    brush(scene.grid, cut, from, to, tool.size, tool.threeD, offset => this.put(stroke, offset, label))
    scene.labelVersion++
  }

  /** End a stroke; the number of voxels that it changed. */
  finish(): number {
    const { stroke, cut, tool, scene } = this
    this.stroke = null
    if (!stroke || !cut) return 0
    if (tool.name === 'fill' && this.points.length) {
      outline(scene.grid, cut, this.points, offset => this.put(stroke, offset, tool.label))
    }
    this.points = []
    return this.keep(stroke)
  }

  /** Grow a region from a place. */
  grow(cut: Cut, seed: Vox): { changed: number; full: boolean } {
    const { scene, tool } = this
    const { image, grid, channel } = scene
    if (!image) return { changed: 0, full: false }
    const first = channel * grid.count
    const [low, high] = tool.limited ? tool.threshold : this.around(cut, seed)
    const found = grow(grid, seed, tool.threeD ? null : cut, tool.reach, offset => {
      const value = image.data[first + offset] * image.slope + image.inter
      return value >= low && value <= high && (scene.mask[offset] === tool.label || this.mayPaint(offset, tool.label))
    })
    const stroke = new Stroke(scene.mask)
    for (const offset of found.offsets) this.put(stroke, offset, tool.label)
    return { changed: this.keep(stroke), full: found.full }
  }

  /** Fill the slices between painted ones of the tool's label along a plane's normal. */
  interpolate(plane: Plane): number {
    const { scene, tool } = this
    const { grid } = scene
    const { u, v, normal } = AXES[plane]
    const [width, height] = [grid.size[u], grid.size[v]]
    const shape = (index: number) => {
      const cut = new Uint8Array(width * height)
      cutLabels(cut, frame(grid, { plane, index }), scene.mask)
      return cut.map(value => (value === tool.label ? 1 : 0))
    }
    const painted = Array.from({ length: grid.size[normal] }, (_, index) => shape(index).includes(1))
    const stroke = new Stroke(scene.mask)
    for (const [low, high] of gaps(painted)) {
      const step: [number, number] = [grid.step[u], grid.step[v]]
      interpolate(shape(low), shape(high), width, height, step, high - low - 1).forEach((between, i) => {
        const at = frame(grid, { plane, index: low + 1 + i })
        between.forEach((inside, pixel) => {
          if (!inside) return
          this.put(stroke, at.base + at.v[Math.floor(pixel / width)] + at.u[pixel % width], tool.label)
        })
      })
    }
    return this.keep(stroke)
  }

  /** Take over a whole mask as one step, e.g. a draft. */
  replace(mask: Uint8Array): number {
    const stroke = new Stroke(this.scene.mask)
    for (let offset = 0; offset < mask.length; offset++) stroke.set(offset, mask[offset])
    return this.keep(stroke)
  }

  undo(): boolean {
    return this.changed(this.history.undo())
  }

  redo(): boolean {
    return this.changed(this.history.redo())
  }

  private changed(step: Step | null): boolean {
    if (step) this.scene.labelVersion++
    return step !== null
  }

  private keep(stroke: Stroke): number {
    this.history.push(stroke.finish())
    this.scene.labelVersion++
    return stroke.count
  }

  private put(stroke: Stroke, offset: number, label: number): void {
    if (this.mayPaint(offset, label)) stroke.set(offset, label)
  }

  /** Whether a voxel may become a label (0: be erased) under the tool's rules. */
  private mayPaint(offset: number, label: number): boolean {
    const { scene, tool } = this
    const old = scene.mask[offset]
    if (old === label) return false
    const known = old ? scene.label(old) : null
    if (known?.locked) return false
    // "Background only" keeps every label but the tool's own, which the eraser may still take away.
    if (tool.protect === 'background' && old && old !== tool.label) return false
    if (tool.protect === 'visible' && known && !known.visible) return false
    if (!tool.limited || label === 0) return true
    const { image, channel, grid } = scene
    if (!image) return false
    const value = image.data[channel * grid.count + offset] * image.slope + image.inter
    return value >= tool.threshold[0] && value <= tool.threshold[1]
  }

  /** Values around a seed that region growing takes: the mean of the seed and its neighbours in the plane. */
  private around(cut: Cut, seed: Vox): [number, number] {
    const { u, v } = AXES[cut.plane]
    let [sum, count] = [0, 0]
    for (let b = -1; b <= 1; b++) {
      for (let a = -1; a <= 1; a++) {
        const at: Vox = [...seed]
        at[u] += a
        at[v] += b
        const inside = at.every((value, axis) => value >= 0 && value < this.scene.grid.size[axis])
        const value = inside ? this.scene.value(at) : null
        if (value === null) continue
        sum += value
        count++
      }
    }
    return [sum / count - this.tool.tolerance, sum / count + this.tool.tolerance]
  }
}

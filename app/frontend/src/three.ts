/** The 3-D view: NiiVue over reduced copies of scan and drawing, loaded when it is first wanted. */

import type { Niivue } from '@niivue/niivue'
import type { Grid } from './grid'
import { writeNifti, type Volume } from './nifti'
import type { Scene } from './scene'
import type { LabelSpec } from './spec'

/** Most voxels of the copies: what a graphics card, and what the processor alone, turns smoothly. */
const MOST_VOXELS = { hardware: 16_000_000, software: 1_500_000 }

/** What draws WebGL here: "software" without a graphics card, null without WebGL. */
export function renderer(): 'hardware' | 'software' | null {
  const context = document.createElement('canvas').getContext('webgl2')
  if (!context) return null
  const info = context.getExtension('WEBGL_debug_renderer_info')
  const name = String(context.getParameter(info ? info.UNMASKED_RENDERER_WEBGL : context.RENDERER))
  context.getExtension('WEBGL_lose_context')?.loseContext()
  return /swiftshader|llvmpipe|softpipe|software|basic render/i.test(name) ? 'software' : 'hardware'
}

/** Part of a volume: first voxel and size, in the file's order. */
export interface Box {
  start: [number, number, number]
  size: [number, number, number]
}

/** The part that holds all labels, with a margin; null when there are none. */
export function boxOf(mask: Uint8Array, dims: [number, number, number]): Box | null {
  const low = [...dims]
  const high = [-1, -1, -1]
  const [nx, ny, nz] = dims
  let at = 0
  for (let k = 0; k < nz; k++) {
    for (let j = 0; j < ny; j++) {
      for (let i = 0; i < nx; i++, at++) {
        if (!mask[at]) continue
        if (i < low[0]) low[0] = i
        if (i > high[0]) high[0] = i
        if (j < low[1]) low[1] = j
        if (j > high[1]) high[1] = j
        low[2] = Math.min(low[2], k)
        high[2] = k
      }
    }
  }
  if (high[0] < 0) return null
  const start = low.map((n, axis) => Math.max(0, n - Math.ceil((high[axis] - n) * 0.1) - 2)) as Box['start']
  const size = high.map((n, axis) =>
    Math.min(dims[axis], n + Math.ceil((n - low[axis]) * 0.1) + 3) - start[axis]) as Box['size']
  return { start, size }
}

/** How far each axis is thinned out so that at most `most` voxels remain; long axes first. */
export function factors(dims: [number, number, number], most: number): [number, number, number] {
  const factor: [number, number, number] = [1, 1, 1]
  const size = () => dims.map((n, axis) => Math.ceil(n / factor[axis]))
  while (size().reduce((a, b) => a * b) > most) factor[size().indexOf(Math.max(...size()))]++
  return factor
}

/** Every n-th voxel of a part of one channel. */
export function thinOut(volume: Volume, channel: number, { start, size }: Box, factor: [number, number, number]): Volume {
  const [nx, ny, nz] = volume.dims
  const dims = size.map((n, axis) => Math.ceil(n / factor[axis])) as [number, number, number]
  const make = volume.data.constructor as new (length: number) => Volume['data']
  const data = new make(dims[0] * dims[1] * dims[2])
  let to = 0
  for (let k = start[2]; k < start[2] + size[2]; k += factor[2]) {
    for (let j = start[1]; j < start[1] + size[1]; j += factor[1]) {
      const row = nx * (j + ny * (k + nz * channel))
      for (let i = start[0]; i < start[0] + size[0]; i += factor[0]) data[to++] = volume.data[row + i]
    }
  }
  const affine = volume.affine.map(([x, y, z, w]) => [
    x * factor[0], y * factor[1], z * factor[2], w + x * start[0] + y * start[1] + z * start[2],
  ])
  return { ...volume, dims, channels: 1, affine, data }
}

export class Three {
  readonly element = document.createElement('div')
  private readonly canvas = document.createElement('canvas')
  private nv: Niivue | null = null
  private withScan = false
  private shown: { scene: Scene; key: string } | null = null

  constructor(readonly kind: 'hardware' | 'software') {
    this.element.className = 'three'
    this.element.append(this.canvas)
  }

  /** Show a scene, or show it again after its drawing has changed. */
  async show(scene: Scene): Promise<void> {
    if (!scene.image) return
    const { Niivue, NVImage, SLICE_TYPE } = await import('@niivue/niivue')
    if (!this.nv) {
      this.nv = new Niivue({
        logLevel: 'error',
        backColor: [0, 0, 0, 1],
        show3Dcrosshair: false,
        dragAndDropEnabled: false,
        clipPlaneHotKey: '',
        cycleClipPlaneHotKey: '',
        viewModeHotKey: '',
        isOrientCube: true,
        loadingText: '',
      })
      await this.nv.attachToCanvas(this.canvas, false)
      this.nv.setSliceType(SLICE_TYPE.RENDER)
      this.nv.setRenderAzimuthElevation(160, 12) // from the front, a little from the side and above
      this.nv.setScale(1.3)
    }
    const nv = this.nv
    const { grid } = scene
    const labels = boxOf(scene.mask, grid.dims)
    const box = labels && !this.withScan ? labels : { start: [0, 0, 0] as Box['start'], size: grid.dims }
    const factor = factors(box.size, MOST_VOXELS[this.kind])
    const key = [box.start, box.size, scene.channel].join()
    if (this.shown?.scene !== scene || this.shown.key !== key) {
      const buffer = writeNifti(thinOut(scene.image, scene.channel, box, factor))
      const image = await NVImage.loadFromUrl({ url: 'scan.nii', name: 'scan.nii', buffer })
      nv.closeDrawing()
      for (const old of [...nv.volumes]) nv.removeVolume(old)
      nv.addVolume(image)
      this.shown = { scene, key }
    }
    const drawing = thinOut(
      { dims: grid.dims, channels: 1, affine: grid.affine, data: scene.mask, slope: 1, inter: 0 }, 0, box, factor,
    )
    const image = await NVImage.loadFromUrl({ url: 'labels.nii', name: 'labels.nii', buffer: writeNifti(drawing) })
    nv.drawLut = lut(scene.labels, scene.shown)
    nv.loadDrawing(image)
    const volume = nv.volumes[0]
    volume.cal_min = scene.window[0] - scene.window[1] / 2
    volume.cal_max = scene.window[0] + scene.window[1] / 2
    volume.opacity = labels && !this.withScan ? 0 : 1
    nv.setDrawOpacity(1)
    nv.updateGLVolume()
    nv.drawScene()
  }

  /** Structures alone, or the scan with them. */
  toggleScan(): boolean {
    this.withScan = !this.withScan
    return this.withScan
  }

  /** The picture, for a screenshot. */
  picture(): HTMLCanvasElement {
    this.nv?.drawScene() // the buffer is empty after it has been shown
    return this.canvas
  }

  destroy(): void {
    this.nv?.cleanup()
    this.canvas.getContext('webgl2')?.getExtension('WEBGL_lose_context')?.loseContext()
    this.nv = null
  }
}

function lut(labels: LabelSpec[], shown: boolean): { lut: Uint8ClampedArray; labels: string[] } {
  const table = new Uint8ClampedArray(1024)
  if (shown) for (const { value, rgb, visible } of labels) if (visible) table.set([...rgb, 255], 4 * value)
  return { lut: table, labels: Array.from({ length: 256 }, (_, i) => String(i)) }
}

/** Whether a scan of this size starts in 3-D without being asked. */
export function startsIn3D(grid: Grid, kind: 'hardware' | 'software' | null): boolean {
  return kind === 'hardware' ? grid.count <= 60_000_000 : kind === 'software' && grid.count <= 4_000_000
}

/** What all planes of a case show: volumes, masks, colours, place and zoom. */

import { GREY, colourMap, labelColours } from './colours'
import { Grid } from './grid'
import type { Affine, Volume } from './nifti'
import type { LabelSpec, OverlaySpec, Vox } from './spec'

/** A further map with the way from the scan's voxels to its own. */
export interface Overlay {
  spec: OverlaySpec
  volume: Volume
  matrix: Affine
  colours: Uint32Array
  visible: boolean
  opacity: number
}

export class Scene {
  image: Volume | null = null // the full one
  preview: { volume: Volume; matrix: Affine } | null = null
  channel = 0
  window: [number, number] = [0, 1]
  mask: Uint8Array
  first: Uint8Array | null = null // of a comparison
  second: Uint8Array | null = null
  overlays: Overlay[] = []
  labels: LabelSpec[] = []
  opacity = 0.5
  shown = true // the drawing as a whole
  difference = false
  radiological = true
  crosshair = true
  at: Vox // crosshair, patient order
  centre: Vox // what lies in the middle of each plane, patient order, fractions allowed
  zoom = 1
  fill: Uint32Array = new Uint32Array(256)
  rim: Uint32Array = new Uint32Array(256)
  /** Raised by whatever changes the grey layer, and by what changes the labels. */
  greyVersion = 0
  labelVersion = 0

  constructor(readonly grid: Grid) {
    this.mask = new Uint8Array(grid.count)
    this.at = grid.size.map(n => Math.floor(n / 2)) as Vox
    this.centre = this.middle()
  }

  middle(): Vox {
    return this.grid.size.map(n => (n - 1) / 2) as Vox
  }

  get grey(): Uint32Array {
    return GREY
  }

  addOverlay(spec: OverlaySpec, volume: Volume): void {
    this.overlays = this.overlays.filter(other => other.spec.id !== spec.id)
    const matrix = this.grid.onto(volume)
    this.overlays.push({
      spec, volume, matrix, colours: colourMap(spec.colormap), visible: spec.visible, opacity: spec.opacity,
    })
    this.recolour()
  }

  /** After a change of labels, opacity or overlays. */
  recolour(): void {
    const { fill, rim } = labelColours(this.labels, this.shown ? this.opacity : 0)
    this.fill = fill
    this.rim = rim
    this.greyVersion++
    this.labelVersion++
  }

  /** The scan's value at a voxel, from the reduced copy as long as there is no other; null outside of it. */
  value(at: Vox): number | null {
    if (this.image) {
      const { data, slope, inter } = this.image
      return data[this.channel * this.grid.count + this.grid.offset(at)] * slope + inter
    }
    if (!this.preview) return null
    return valueAt(this.preview.volume, this.preview.matrix, at, this.channel)
  }

  overlayValue(overlay: Overlay, at: Vox): number | null {
    return valueAt(overlay.volume, overlay.matrix, at, 0)
  }

  label(value: number): LabelSpec | null {
    return this.labels.find(label => label.value === value) ?? null
  }
}

function valueAt(volume: Volume, matrix: Affine, at: Vox, channel: number): number | null {
  const [i, j, k] = matrix.map(row => Math.floor(row[0] * at[0] + row[1] * at[1] + row[2] * at[2] + row[3] + 0.5 + 1e-6))
  const [nx, ny, nz] = volume.dims
  if (i < 0 || j < 0 || k < 0 || i >= nx || j >= ny || k >= nz) return null
  return volume.data[i + nx * (j + ny * (k + nz * channel))] * volume.slope + volume.inter
}

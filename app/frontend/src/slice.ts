/** Planes of volumes as pixels: one pixel for each voxel of the scan's grid. */

import { DIFFERENCE, pack } from './colours'
import { AXES, type Grid } from './grid'
import type { Volume } from './nifti'
import type { Cut } from './paint'

/** Offsets in the file's order along a plane's two axes, to be added to `base`. */
export interface Frame {
  width: number
  height: number
  base: number
  u: Int32Array
  v: Int32Array
}

export function frame(grid: Grid, cut: Cut): Frame {
  const { u, v, normal } = AXES[cut.plane]
  return {
    width: grid.size[u],
    height: grid.size[v],
    base: grid.offsets[normal][cut.index],
    u: grid.offsets[u],
    v: grid.offsets[v],
  }
}

/** Grey values of a volume on the scan's own grid; the first row of pixels is the lowest v. */
export function drawImage(
  out: Uint32Array, at: Frame, volume: Volume, channel: number, window: [number, number], grey: Uint32Array,
): void {
  const { data, slope, inter } = volume
  const first = channel * volume.dims[0] * volume.dims[1] * volume.dims[2] + at.base
  const [gain, bias] = levels(window, slope, inter)
  let pixel = 0
  for (let y = 0; y < at.height; y++) {
    const row = first + at.v[y]
    for (let x = 0; x < at.width; x++) {
      const level = data[row + at.u[x]] * gain + bias
      out[pixel++] = grey[level > 255 ? 255 : level > 0 ? level | 0 : 0]
    }
  }
}

/**
 * Values of a volume on another grid, by the nearest voxel.
 *
 * @param matrix from `Grid.onto`.
 * @param put gets the pixel and the value as stored; not called outside the volume.
 */
export function sample(
  grid: Grid, cut: Cut, volume: Volume, channel: number, matrix: number[][], put: (pixel: number, value: number) => void,
): void {
  const { u, v, normal } = AXES[cut.plane]
  const [nx, ny, nz] = volume.dims
  const first = channel * nx * ny * nz
  let pixel = 0
  for (let y = 0; y < grid.size[v]; y++) {
    const at = [0, 0, 0]
    at[normal] = cut.index
    at[v] = y
    let [fx, fy, fz] = matrix.map(row => row[0] * at[0] + row[1] * at[1] + row[2] * at[2] + row[3] + 0.5)
    const [dx, dy, dz] = matrix.map(row => row[u])
    for (let x = 0; x < grid.size[u]; x++, pixel++) {
      const i = Math.floor(fx + 1e-6)
      const j = Math.floor(fy + 1e-6)
      const k = Math.floor(fz + 1e-6)
      if (i >= 0 && j >= 0 && k >= 0 && i < nx && j < ny && k < nz) put(pixel, volume.data[first + i + nx * (j + ny * k)])
      fx += dx
      fy += dy
      fz += dz
    }
  }
}

/** Factor and addend that lead from a stored value to a grey level from 0 to 255. */
export function levels([centre, width]: [number, number], slope: number, inter: number): [number, number] {
  const scale = 256 / Math.max(width, 1e-12)
  return [slope * scale, (inter - (centre - width / 2)) * scale]
}

/** The plane's labels. */
export function cutLabels(out: Uint8Array, at: Frame, mask: Uint8Array): void {
  let pixel = 0
  for (let y = 0; y < at.height; y++) {
    const row = at.base + at.v[y]
    for (let x = 0; x < at.width; x++) out[pixel++] = mask[row + at.u[x]]
  }
}

/** Labels in their colours, stronger at the rim. */
export function drawLabels(
  out: Uint32Array, labels: Uint8Array, width: number, height: number, fill: Uint32Array, rim: Uint32Array,
): void {
  let pixel = 0
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++, pixel++) {
      const label = labels[pixel]
      if (!label) {
        out[pixel] = 0
        continue
      }
      const inner =
        x > 0 && x < width - 1 && y > 0 && y < height - 1 &&
        labels[pixel - 1] === label && labels[pixel + 1] === label &&
        labels[pixel - width] === label && labels[pixel + width] === label
      out[pixel] = inner ? fill[label] : rim[label]
    }
  }
}

/** Where two masks of visible labels agree and where not; two different labels in one place count as both "only"s. */
export function drawDifference(
  out: Uint32Array, first: Uint8Array, second: Uint8Array, visible: Uint32Array, opacity: number,
): void {
  const alpha = Math.round(255 * Math.min(1, opacity * 1.4))
  const [a, b, both] = [DIFFERENCE.first, DIFFERENCE.second, DIFFERENCE.both].map(([r, g, blue]) => pack(r, g, blue, alpha))
  const clash = pack(230, 60, 200, alpha)
  for (let pixel = 0; pixel < out.length; pixel++) {
    const one = visible[first[pixel]] ? first[pixel] : 0
    const two = visible[second[pixel]] ? second[pixel] : 0
    out[pixel] = one === two ? (one ? both : 0) : !two ? a : !one ? b : clash
  }
}

/**
 * The voxel grid of a scan seen along the patient's axes.
 *
 * Voxels stay in the file's order everywhere, so that a mask is saved as it lies in memory. "Patient order" (p, q, r)
 * counts from the left, posterior, inferior corner to the right, anterior, superior one; a table of offsets for each of
 * these axes leads from there to the place in the file.
 */

import type { Affine } from './nifti'
import type { Vox } from './spec'

export type Plane = 'axial' | 'coronal' | 'sagittal'

/** Axis that a plane is cut across, and those that run to the right and up on the screen. */
export const AXES: Record<Plane, { normal: number; u: number; v: number }> = {
  axial: { normal: 2, u: 0, v: 1 },
  coronal: { normal: 1, u: 0, v: 2 },
  sagittal: { normal: 0, u: 1, v: 2 },
}

const ENDS = [['L', 'R'], ['P', 'A'], ['I', 'S']] // low and high end of each patient axis

export class Grid {
  /** Voxels in the volume. */
  readonly count: number
  /** Voxels along each patient axis. */
  readonly size: Vox
  /** mm between voxels along each patient axis. */
  readonly step: Vox
  /** Offset in the file of each index along a patient axis; an offset is the sum of three. */
  readonly offsets: [Int32Array, Int32Array, Int32Array]
  private readonly axis: Vox // of the file, for each patient axis
  private readonly flipped: [boolean, boolean, boolean]

  constructor(readonly dims: Vox, readonly affine: Affine) {
    this.count = dims[0] * dims[1] * dims[2]
    const lengths = [0, 1, 2].map(j => Math.hypot(affine[0][j], affine[1][j], affine[2][j]) || 1)
    const cosine = (patient: number, file: number) => affine[patient][file] / lengths[file]
    const orders: Vox[] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    const fit = (order: Vox) => order.reduce((sum, file, patient) => sum + cosine(patient, file) ** 2, 0)
    this.axis = orders.reduce((best, order) => (fit(order) > fit(best) + 1e-9 ? order : best))
    this.flipped = this.axis.map((file, patient) => cosine(patient, file) < 0) as [boolean, boolean, boolean]
    this.size = this.axis.map(file => dims[file]) as Vox
    this.step = this.axis.map(file => lengths[file]) as Vox
    const strides = [1, dims[0], dims[0] * dims[1]]
    this.offsets = this.axis.map((file, patient) =>
      Int32Array.from({ length: dims[file] }, (_, i) => strides[file] * (this.flipped[patient] ? dims[file] - 1 - i : i)),
    ) as [Int32Array, Int32Array, Int32Array]
  }

  /** Place in the file of a voxel in patient order. */
  offset(at: Vox): number {
    return this.offsets[0][at[0]] + this.offsets[1][at[1]] + this.offsets[2][at[2]]
  }

  /** Index (i, j, k) in the file's order of a voxel in patient order; works on fractions too. */
  toFile(at: Vox): Vox {
    const file: Vox = [0, 0, 0]
    this.axis.forEach((axis, patient) => {
      file[axis] = this.flipped[patient] ? this.size[patient] - 1 - at[patient] : at[patient]
    })
    return file
  }

  /** Patient order of an index (i, j, k) in the file's order. */
  fromFile(file: Vox): Vox {
    return this.axis.map((axis, patient) =>
      this.flipped[patient] ? this.size[patient] - 1 - file[axis] : file[axis],
    ) as Vox
  }

  /** RAS mm of a voxel in patient order. */
  world(at: Vox): Vox {
    const file = this.toFile(at)
    return this.affine.map(row => row[0] * file[0] + row[1] * file[1] + row[2] * file[2] + row[3]) as Vox
  }

  /** Nearest voxel inside the volume, in patient order. */
  inside(at: Vox): Vox {
    return at.map((value, axis) => Math.min(this.size[axis] - 1, Math.max(0, Math.round(value)))) as Vox
  }

  /** Matrix (3 rows of 4) from patient order here to the file index of another grid. */
  onto(other: { affine: Affine }): Affine {
    const inverse = invert(other.affine)
    const origin = this.world([0, 0, 0])
    const ends = [this.world([1, 0, 0]), this.world([0, 1, 0]), this.world([0, 0, 1])]
    return inverse.map(row => {
      const turn = (v: Vox) => row[0] * v[0] + row[1] * v[1] + row[2] * v[2]
      const start = turn(origin) + row[3]
      return [...ends.map(end => turn(end) - turn(origin)), start]
    })
  }

  /** The axis along which the volume is thinner than a third of its longest side, or -1. */
  thin(): number {
    const extent = this.size.map((n, axis) => n * this.step[axis])
    const least = extent.indexOf(Math.min(...extent))
    return extent[least] < Math.max(...extent) / 3 ? least : -1
  }
}

/** Letters at the left, right, top and bottom of a plane. */
export function marks(plane: Plane, radiological: boolean): [string, string, string, string] {
  const { u, v } = AXES[plane]
  const [low, high] = ENDS[u]
  const [left, right] = mirrored(plane, radiological) ? [high, low] : [low, high]
  return [left, right, ENDS[v][1], ENDS[v][0]]
}

/** Whether a plane's u axis runs to the left on the screen: the patient's right is left, and the nose is left. */
export function mirrored(plane: Plane, radiological: boolean): boolean {
  return plane === 'sagittal' || radiological
}

/** Inverse of an affine of 3 rows of 4. */
export function invert(m: Affine): Affine {
  const [[a, b, c], [d, e, f], [g, h, i]] = m
  const cofactors = [
    [e * i - f * h, c * h - b * i, b * f - c * e],
    [f * g - d * i, a * i - c * g, c * d - a * f],
    [d * h - e * g, b * g - a * h, a * e - b * d],
  ]
  const det = a * cofactors[0][0] + b * cofactors[1][0] + c * cofactors[2][0]
  return cofactors.map(row => {
    const [x, y, z] = row.map(value => value / det)
    return [x, y, z, -(x * m[0][3] + y * m[1][3] + z * m[2][3])]
  })
}

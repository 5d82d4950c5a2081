/** Which voxels a tool reaches. All of it works on voxels in patient order and knows no screen. */

import { AXES, type Grid, type Plane } from './grid'
import type { Vox } from './spec'

/** Called with the offset in the file's order. */
export type Visit = (offset: number) => void

/** A plane's own axes: two in it and the one across. */
export interface Cut {
  plane: Plane
  index: number
}

/**
 * Voxels under a round brush that is drawn from one place to another.
 *
 * @param from, to voxels in the cut's plane.
 * @param size diameter, in voxels of the plane's finer axis.
 * @param deep a ball instead of a disc.
 */
export function brush(grid: Grid, cut: Cut, from: Vox, to: Vox, size: number, deep: boolean, visit: Visit): void {
  const { u, v } = AXES[cut.plane]
  const length = Math.max(Math.abs(to[u] - from[u]), Math.abs(to[v] - from[v]), 1)
  for (let i = 0; i <= length; i++) {
    const at: Vox = [...from]
    at[u] = Math.round(from[u] + ((to[u] - from[u]) * i) / length)
    at[v] = Math.round(from[v] + ((to[v] - from[v]) * i) / length)
    stamp(grid, cut, at, size, deep, visit)
  }
}

function stamp(grid: Grid, cut: Cut, centre: Vox, size: number, deep: boolean, visit: Visit): void {
  const { u, v, normal } = AXES[cut.plane]
  const fine = Math.min(grid.step[u], grid.step[v])
  const radius = (size / 2) * fine // mm; an even size has its centre on a voxel too and reaches half a voxel less
  const limit = (radius - (size % 2 ? 0 : 0.5 * fine)) ** 2 + 1e-6
  const reach = (axis: number) => Math.floor(radius / grid.step[axis] + 1e-6)
  const layers = deep ? reach(normal) : 0
  for (let w = -layers; w <= layers; w++) {
    for (let b = -reach(v); b <= reach(v); b++) {
      for (let a = -reach(u); a <= reach(u); a++) {
        const mm2 = (w * grid.step[normal]) ** 2 + (b * grid.step[v]) ** 2 + (a * grid.step[u]) ** 2
        if (mm2 > limit) continue
        const at: Vox = [0, 0, 0]
        at[normal] = centre[normal] + w
        at[u] = centre[u] + a
        at[v] = centre[v] + b
        if (at.every((value, axis) => value >= 0 && value < grid.size[axis])) visit(grid.offset(at))
      }
    }
  }
}

/** Voxels whose centres lie in an outline (even-odd), and those on the outline itself. */
export function outline(grid: Grid, cut: Cut, points: Vox[], visit: Visit): void {
  const { u, v, normal } = AXES[cut.plane]
  const at: Vox = [0, 0, 0]
  at[normal] = cut.index
  const low = Math.max(0, Math.min(...points.map(point => point[v])))
  const high = Math.min(grid.size[v] - 1, Math.max(...points.map(point => point[v])))
  for (let row = low; row <= high; row++) {
    const crossings: number[] = []
    points.forEach((a, i) => {
      const b = points[(i + 1) % points.length]
      if (a[v] <= row !== b[v] <= row) crossings.push(a[u] + ((row - a[v]) / (b[v] - a[v])) * (b[u] - a[u]))
    })
    crossings.sort((a, b) => a - b)
    at[v] = row
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const first = Math.max(0, Math.ceil(crossings[i]))
      const last = Math.min(grid.size[u] - 1, Math.floor(crossings[i + 1]))
      for (at[u] = first; at[u] <= last; at[u]++) visit(grid.offset(at))
    }
  }
  points.forEach((point, i) => brush(grid, cut, point, points[(i + 1) % points.length], 1, false, visit))
}

/** Most voxels that region growing may take; more is a leak. */
export const MOST_GROWN = 4_000_000

/**
 * Voxels connected to a seed (by faces) that satisfy a condition.
 *
 * @param cut grow within this plane only; null for all three axes.
 * @param reach greatest distance from the seed, mm.
 * @returns offsets, and whether growing was stopped because there were too many.
 */
export function grow(
  grid: Grid, seed: Vox, cut: Cut | null, reach: number, accepts: (offset: number) => boolean,
): { offsets: number[]; full: boolean } {
  const normal = cut ? AXES[cut.plane].normal : -1
  const far = grid.step.map(step => Math.floor(reach / step))
  const low = seed.map((value, axis) => (axis === normal ? value : Math.max(0, value - far[axis])))
  const high = seed.map((value, axis) => (axis === normal ? value : Math.min(grid.size[axis] - 1, value + far[axis])))
  const width = high.map((value, axis) => value - low[axis] + 1)
  const seen = new Uint8Array(width[0] * width[1] * width[2])
  const offsets: number[] = []
  const queue: Vox[] = []
  const offer = (at: Vox) => {
    for (let axis = 0; axis < 3; axis++) if (at[axis] < low[axis] || at[axis] > high[axis]) return
    const place = at[0] - low[0] + width[0] * (at[1] - low[1] + width[1] * (at[2] - low[2]))
    if (seen[place]) return
    seen[place] = 1
    const mm2 = at.reduce((sum, value, axis) => sum + ((value - seed[axis]) * grid.step[axis]) ** 2, 0)
    const offset = grid.offset(at)
    if (mm2 > reach * reach || !accepts(offset)) return
    offsets.push(offset)
    queue.push([...at])
  }
  offer(seed)
  while (queue.length && offsets.length < MOST_GROWN) {
    const at = queue.pop()!
    for (let axis = 0; axis < 3; axis++) {
      for (const way of [-1, 1]) {
        at[axis] += way
        offer(at)
        at[axis] -= way
      }
    }
  }
  return { offsets, full: offsets.length >= MOST_GROWN }
}

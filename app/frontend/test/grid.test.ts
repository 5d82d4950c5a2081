import { describe, expect, it } from 'vitest'
import { Grid, invert, marks } from '../src/grid'
import { readHeader, volumeOf, writeNifti } from '../src/nifti'
import type { Vox } from '../src/spec'

// Axes of the file run to the posterior, inferior and right: "PIR" with spacing 2, 3, 1.5.
const PIR = [[0, 0, 1.5, -10], [-2, 0, 0, 20], [0, -3, 0, 30]]

describe('Grid', () => {
  const grid = new Grid([4, 5, 6], PIR)

  it('knows the patient axes of a file', () => {
    expect(grid.size).toEqual([6, 4, 5])
    expect(grid.step).toEqual([1.5, 2, 3])
    // the corner that is most left, posterior, inferior: last along the first two axes, first along the third
    expect(grid.toFile([0, 0, 0])).toEqual([3, 4, 0])
    expect(grid.fromFile([3, 4, 0])).toEqual([0, 0, 0])
  })

  it('puts each voxel at its own place in the file', () => {
    const seen = new Set<number>()
    for (let p = 0; p < 6; p++) {
      for (let q = 0; q < 4; q++) {
        for (let r = 0; r < 5; r++) {
          const [i, j, k] = grid.toFile([p, q, r])
          expect(grid.offset([p, q, r])).toBe(i + 4 * (j + 5 * k))
          seen.add(grid.offset([p, q, r]))
        }
      }
    }
    expect(seen.size).toBe(grid.count)
  })

  it('goes up in mm along each patient axis', () => {
    const [x, y, z] = grid.world([2, 1, 3])
    expect([x, y, z]).toEqual([-10 + 1.5 * 2, 20 - 2 * 2, 30 - 3 * 1])
    expect(grid.world([3, 1, 3])[0]).toBeGreaterThan(x)
    expect(grid.world([2, 2, 3])[1]).toBeGreaterThan(y)
    expect(grid.world([2, 1, 4])[2]).toBeGreaterThan(z)
  })

  it('leads to the voxels of another grid', () => {
    const half = { affine: [[0, 0, 3, -9.25], [-4, 0, 0, 19], [0, -6, 0, 28.5]] } // averaged by 2
    const matrix = grid.onto(half)
    const at = grid.fromFile([2, 2, 4])
    const found = matrix.map(row => row[0] * at[0] + row[1] * at[1] + row[2] * at[2] + row[3])
    ;[0.75, 0.75, 1.75].forEach((value, i) => expect(found[i]).toBeCloseTo(value, 9))
  })

  it('sees thin volumes', () => {
    expect(new Grid([100, 100, 10], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0]]).thin()).toBe(2)
    expect(new Grid([100, 100, 40], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0]]).thin()).toBe(-1)
  })

  it('shows the right of the patient on the left, and the nose on the left', () => {
    expect(marks('axial', true)).toEqual(['R', 'L', 'A', 'P'])
    expect(marks('axial', false)).toEqual(['L', 'R', 'A', 'P'])
    expect(marks('coronal', true)).toEqual(['R', 'L', 'S', 'I'])
    expect(marks('sagittal', true)).toEqual(['A', 'P', 'S', 'I'])
    expect(marks('sagittal', false)).toEqual(['A', 'P', 'S', 'I'])
  })

  it('inverts an affine', () => {
    const m = [[0.9, 0.1, 0.3, 4], [-0.1, 1.2, 0.2, -7], [-0.3, -0.1, 2.8, 3]]
    const back = invert(m)
    const point: Vox = [3, -5, 7]
    const there = m.map(row => row[0] * point[0] + row[1] * point[1] + row[2] * point[2] + row[3])
    back.map(row => row[0] * there[0] + row[1] * there[1] + row[2] * there[2] + row[3])
      .forEach((value, i) => expect(value).toBeCloseTo(point[i], 9))
  })
})

describe('NIfTI', () => {
  it('reads what it writes', () => {
    const data = Int16Array.from([1, -2, 3, 4, 5, -600])
    const file = writeNifti({ dims: [3, 2, 1], channels: 1, affine: PIR, data, slope: 2, inter: 1 })
    const head = readHeader(new Uint8Array(file))
    expect(head).toMatchObject({ dims: [3, 2, 1], channels: 1, affine: PIR, offset: 352, slope: 2, inter: 1 })
    expect(volumeOf(head, file.slice(352)).data).toEqual(data)
  })

  it('takes the qform where there is no sform, and turns big-endian voxels', () => {
    const file = new ArrayBuffer(348)
    const view = new DataView(file)
    view.setInt32(0, 348)
    ;[3, 2, 1, 1].forEach((n, i) => view.setInt16(40 + 2 * i, n))
    view.setInt16(70, 4)
    ;[-1, 2, 3, 4].forEach((n, i) => view.setFloat32(76 + 4 * i, n))
    view.setInt16(252, 1)
    view.setFloat32(264, 1) // half a turn around z
    ;[5, 6, 7].forEach((n, i) => view.setFloat32(268 + 4 * i, n))
    const head = readHeader(new Uint8Array(file))
    const affine = head.affine.map(row => row.map(n => n + 0)) // no negative zeros
    expect(affine).toEqual([[-2, 0, 0, 5], [0, -3, 0, 6], [0, 0, -4, 7]])
    expect(volumeOf(head, Uint8Array.from([1, 2, 255, 254]).buffer).data).toEqual(Int16Array.from([258, -2]))
  })

  it('refuses what is none', () => {
    expect(() => readHeader(new Uint8Array(600))).toThrow('not a NIfTI file')
  })
})

import { describe, expect, it } from 'vitest'
import { labelColours, pack } from '../src/colours'
import { Grid } from '../src/grid'
import { actionOf } from '../src/keys'
import { cutLabels, drawDifference, drawImage, frame, sample } from '../src/slice'
import { boxOf, factors, thinOut } from '../src/three'
import { PRESETS, windowOf } from '../src/window'

// Axes of the file run to the left, posterior, superior.
const LPS = [[-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0]]
const grid = new Grid([2, 3, 2], LPS)
const volume = {
  dims: [2, 3, 2] as [number, number, number], channels: 1, affine: LPS, slope: 1, inter: 0,
  data: Int16Array.from({ length: 12 }, (_, i) => i * 10),
}
const LEVELS = Uint32Array.from({ length: 256 }, (_, i) => i)

describe('planes', () => {
  it('start left and posterior, the lowest row first', () => {
    const out = new Uint32Array(6)
    drawImage(out, frame(grid, { plane: 'axial', index: 1 }), volume, 0, [128, 256], LEVELS)
    expect([...out]).toEqual([110, 100, 90, 80, 70, 60])
  })

  it('clip outside the window', () => {
    const out = new Uint32Array(6)
    drawImage(out, frame(grid, { plane: 'axial', index: 1 }), volume, 0, [85, 20], LEVELS)
    expect([...out]).toEqual([255, 255, 192, 64, 0, 0])
  })

  it('cut labels as they cut the scan, and other grids at the same places', () => {
    const mask = Uint8Array.from({ length: 12 }, (_, i) => i)
    const cut = { plane: 'coronal', index: 2 } as const
    const labels = new Uint8Array(4)
    cutLabels(labels, frame(grid, cut), mask)
    expect([...labels]).toEqual([1, 0, 7, 6])
    const same = new Array<number>(4)
    const other = { ...volume, data: mask }
    sample(grid, cut, other, 0, grid.onto(other), (pixel, value) => {
      same[pixel] = value
    })
    expect(same).toEqual([1, 0, 7, 6])
  })

  it('tell the difference of two masks, for visible labels', () => {
    const labels = [1, 2].map(value => ({ value, name: '', rgb: [9, 9, 9] as [number, number, number], visible: value === 1, locked: false }))
    const out = new Uint32Array(5)
    drawDifference(out, Uint8Array.of(1, 0, 1, 0, 2), Uint8Array.of(1, 1, 0, 0, 0), labelColours(labels, 1).fill, 1)
    expect([...out]).toEqual([pack(90, 220, 110), pack(70, 150, 255), pack(255, 140, 40), 0, 0])
  })
})

describe('windows', () => {
  it('leave out the ends of the values, or nothing', () => {
    const data = Int16Array.from({ length: 1000 }, (_, i) => (i === 999 ? 30000 : i))
    const scan = { ...volume, dims: [1000, 1, 1] as [number, number, number], data }
    const [centre, width] = windowOf(scan, 0, 'auto')
    expect([Math.round(centre - width / 2), Math.round(centre + width / 2)]).toEqual([10, 990])
    expect(windowOf(scan, 0, 'full')).toEqual([15000, 30000])
  })

  it('have the presets that radiologists know', () => {
    expect(PRESETS.CT.map(({ window }) => window)).toEqual([[40, 400], [-600, 1500], [90, 150], [480, 2500], [40, 80], [60, 250]])
  })
})

describe('3-D copies', () => {
  it('are thinned out along the long axes until they fit', () => {
    expect(factors([512, 512, 300], 1e9)).toEqual([1, 1, 1])
    const factor = factors([512, 512, 300], 1_500_000)
    expect([512, 512, 300].reduce((n, size, axis) => n * Math.ceil(size / factor[axis]), 1)).toBeLessThanOrEqual(1_500_000)
    expect(factor).toEqual([5, 4, 3])
  })

  it('keep voxels where they are in mm', () => {
    const thin = thinOut(volume, 0, { start: [1, 1, 0], size: [1, 2, 2] }, [1, 2, 1])
    expect(thin.dims).toEqual([1, 1, 2])
    expect([...thin.data]).toEqual([30, 90])
    expect(thin.affine.map(row => row[3])).toEqual([-1, -1, 0])
  })

  it('hold all labels with a margin', () => {
    const mask = new Uint8Array(20 * 20 * 20)
    mask[10 + 20 * (10 + 20 * 10)] = 1
    expect(boxOf(mask, [20, 20, 20])).toEqual({ start: [8, 8, 8], size: [5, 5, 5] })
    expect(boxOf(new Uint8Array(8), [2, 2, 2])).toBeNull()
  })
})

describe('keys', () => {
  const press = (key: string, more = {}) =>
    actionOf({ key, code: '', ctrlKey: false, metaKey: false, shiftKey: false, altKey: false, ...more })

  it('do what the sheet says', () => {
    expect(press('s')).toBe('sagittal')
    expect(press('s', { ctrlKey: true })).toBe('save')
    expect(press('Z', { ctrlKey: true, shiftKey: true })).toBe('redo')
    expect(press('3')).toBe('preset3')
    expect(press('3', { code: 'Numpad3' })).toBe('3d')
    expect(press('?', { shiftKey: true })).toBe('help')
    expect(press('ArrowUp', { shiftKey: true })).toBe('slicesUp')
  })

  it('leave other keys to the browser', () => {
    expect(press('t', { ctrlKey: true })).toBeNull()
    expect(press('c', { ctrlKey: true })).toBeNull()
    expect(press('s', { altKey: true })).toBeNull()
  })
})

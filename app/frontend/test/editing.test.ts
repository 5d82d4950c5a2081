import { describe, expect, it } from 'vitest'
import { Editor } from '../src/editor'
import { Grid } from '../src/grid'
import { History, Stroke } from '../src/history'
import { gaps, interpolate, signedDistance } from '../src/interpolate'
import { Scene } from '../src/scene'
import type { ToolSpec, Vox } from '../src/spec'

const TOOL: ToolSpec = { name: 'brush', label: 1, size: 3, three_d: false, threshold: null, protect: 'all' }

/** A scene of 9 x 9 x 9 voxels whose value is its x, with an editor; file order is patient order. */
function desk(tool: Partial<ToolSpec> = {}): { scene: Scene; editor: Editor } {
  const grid = new Grid([9, 9, 9], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
  const scene = new Scene(grid)
  const data = Int16Array.from({ length: 729 }, (_, i) => i % 9)
  scene.image = { dims: [9, 9, 9], channels: 1, affine: grid.affine, data, slope: 1, inter: 0 }
  scene.labels = [1, 2, 3].map(value => ({ value, name: `${value}`, rgb: [0, 0, 0], visible: true, locked: false }))
  return { scene, editor: new Editor(scene, { ...TOOL, ...tool }) }
}

const count = (mask: Uint8Array, label: number) => mask.filter(value => value === label).length
const CUT = { plane: 'axial', index: 4 } as const

function stroke(editor: Editor, from: Vox, to: Vox): number {
  editor.begin(CUT, from)
  editor.extend(from, to)
  return editor.finish()
}

describe('brush', () => {
  it('is round: 9 voxels for size 3, 21 for size 5, a ball when deep', () => {
    for (const [size, deep, voxels] of [[1, false, 1], [3, false, 9], [5, false, 21], [3, true, 19]] as const) {
      const { scene, editor } = desk({ size, three_d: deep })
      expect(stroke(editor, [4, 4, 4], [4, 4, 4])).toBe(voxels)
      expect(count(scene.mask, 1)).toBe(voxels)
    }
  })

  it('leaves no holes in a quick stroke and stays inside the volume', () => {
    const { scene, editor } = desk({ size: 1 })
    stroke(editor, [-3, 2, 4], [12, 2, 4])
    expect(count(scene.mask, 1)).toBe(9)
  })

  it('keeps to its rules', () => {
    const { scene, editor } = desk({ size: 1 })
    for (let x = 0; x < 9; x++) scene.mask[scene.grid.offset([x, 2, 4])] = x < 3 ? 2 : x < 6 ? 3 : 0
    const across = (change: Partial<Editor['tool']>) => {
      Object.assign(editor.tool, { name: 'brush', protect: 'all', limited: false, ...change })
      const changed = stroke(editor, [0, 2, 4], [8, 2, 4])
      editor.undo()
      return changed
    }
    expect(across({})).toBe(9)
    expect(across({ protect: 'background' })).toBe(3)
    scene.labels[1].visible = false
    expect(across({ protect: 'visible' })).toBe(6)
    scene.labels[2].locked = true
    expect(across({})).toBe(6)
    expect(across({ limited: true, threshold: [1, 7] })).toBe(4)
    expect(across({ name: 'eraser', limited: true, threshold: [100, 200] })).toBe(3)
  })
})

describe('outline', () => {
  it('fills a concave shape with its border', () => {
    const { scene, editor } = desk({ name: 'fill' })
    editor.begin(CUT, [1, 1, 4])
    const corners: Vox[] = [[7, 1, 4], [7, 7, 4], [5, 7, 4], [5, 3, 4], [3, 3, 4], [3, 7, 4], [1, 7, 4]]
    for (const corner of corners) editor.extend(corner, corner)
    expect(editor.finish()).toBe(7 * 3 + 2 * 3 * 4)
    expect(scene.mask[scene.grid.offset([4, 5, 4])]).toBe(0)
  })
})

describe('region growing', () => {
  it('takes connected voxels of like value, in one plane or in three', () => {
    const { scene, editor } = desk({ name: 'grow' })
    editor.tool.tolerance = 1
    expect(editor.grow(CUT, [4, 4, 4])).toEqual({ changed: 3 * 9, full: false }) // values 3, 4, 5
    editor.undo()
    editor.tool.threeD = true
    expect(editor.grow(CUT, [4, 4, 4]).changed).toBe(3 * 81)
    editor.undo()
    editor.tool.reach = 2
    expect(editor.grow(CUT, [4, 4, 4]).changed).toBe(31) // a ball of radius 2, cut at x = 3 and 5
    expect(count(scene.mask, 1)).toBe(31)
  })
})

describe('interpolation', () => {
  const square = (low: number, high: number) =>
    Uint8Array.from({ length: 81 }, (_, i) => Number([i % 9, Math.floor(i / 9)].every(n => n >= low && n <= high)))

  it('knows the distance to the border in mm', () => {
    const distance = signedDistance(square(2, 6), 9, 9, [2, 1])
    expect(distance[4 * 9 + 4]).toBe(3) // down 3 rows of 1 mm rather than 3 columns of 2 mm
    expect(distance[4 * 9 + 0]).toBe(-4)
    expect(distance[0]).toBeCloseTo(-Math.hypot(4, 2), 5)
  })

  it('passes from one shape to the next in even steps', () => {
    const between = interpolate(square(1, 7), square(3, 5), 9, 9, [1, 1], 1)
    expect(between).toEqual([square(2, 6)])
  })

  it('finds gaps between painted slices only', () => {
    expect(gaps([false, true, true, false, false, true, false])).toEqual([[2, 5]])
    expect(gaps([false, true, false])).toEqual([])
  })

  it('fills the slices between, and is one step to undo', () => {
    const { scene, editor } = desk()
    for (const z of [2, 6]) scene.mask[scene.grid.offset([4, 4, z])] = 1
    expect(editor.interpolate('axial')).toBe(3)
    expect([3, 4, 5].map(z => scene.mask[scene.grid.offset([4, 4, z])])).toEqual([1, 1, 1])
    editor.undo()
    expect(count(scene.mask, 1)).toBe(2)
  })
})

describe('history', () => {
  const draw = (history: History, mask: Uint8Array, offset: number, label: number) => {
    const one = new Stroke(mask)
    one.set(offset, label)
    history.push(one.finish())
  }

  it('goes back and forth, and forgets what was undone when something new is drawn', () => {
    const mask = new Uint8Array(4)
    const history = new History(mask)
    draw(history, mask, 0, 1)
    draw(history, mask, 0, 2)
    const state = history.state
    history.undo()
    expect(mask[0]).toBe(1)
    history.redo()
    expect([mask[0], history.state]).toEqual([2, state])
    history.undo()
    draw(history, mask, 1, 5)
    expect([history.canRedo, [...mask]]).toEqual([false, [1, 5, 0, 0]])
    expect(history.state).not.toBe(state) // as many steps, another drawing
  })

  it('gives up the oldest steps when the memory is used up', () => {
    const mask = new Uint8Array(10)
    const history = new History(mask, 20) // three steps of one voxel
    for (let i = 0; i < 6; i++) draw(history, mask, i, 1)
    while (history.undo());
    expect([...mask]).toEqual([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
  })

  it('tells saved from unsaved', () => {
    const { editor } = desk()
    stroke(editor, [4, 4, 4], [4, 4, 4])
    expect(editor.dirty).toBe(true)
    editor.markSaved(editor.history.state)
    expect(editor.dirty).toBe(false)
    editor.undo()
    expect(editor.dirty).toBe(true)
  })
})

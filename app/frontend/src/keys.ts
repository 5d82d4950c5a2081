/** The keyboard: one table for what keys do and for the sheet that explains them. */

export type Action =
  | 'preset1' | 'preset2' | 'preset3' | 'preset4' | 'preset5' | 'preset6'
  | 'sliceUp' | 'sliceDown' | 'slicesUp' | 'slicesDown'
  | 'navigate' | 'brush' | 'eraser' | 'fill' | 'grow'
  | 'smaller' | 'larger' | 'previousLabel' | 'nextLabel' | 'interpolate'
  | 'undo' | 'redo' | 'save'
  | 'axial' | 'coronal' | 'sagittal' | 'mpr' | '3d'
  | 'overlay' | 'crosshair' | 'lessOpaque' | 'moreOpaque'
  | 'previousLesion' | 'nextLesion' | 'nextCase' | 'previousCase' | 'reset' | 'help' | 'close'

interface Binding {
  keys: string[] // as KeyboardEvent.key in lower case, or its code when that starts with "Numpad"
  ctrl?: boolean
  shift?: boolean
  action: Action
}

const BINDINGS: Binding[] = [
  ...([1, 2, 3, 4, 5, 6] as const).map(n => ({ keys: [String(n)], action: `preset${n}` as Action })),
  { keys: ['Numpad3'], action: '3d' },
  { keys: ['arrowup'], action: 'sliceUp' },
  { keys: ['arrowdown'], action: 'sliceDown' },
  { keys: ['arrowup'], shift: true, action: 'slicesUp' },
  { keys: ['arrowdown'], shift: true, action: 'slicesDown' },
  { keys: ['v'], action: 'navigate' },
  { keys: ['b'], action: 'brush' },
  { keys: ['e'], action: 'eraser' },
  { keys: ['f'], action: 'fill' },
  { keys: ['g'], action: 'grow' },
  { keys: ['i'], action: 'interpolate' },
  { keys: ['['], action: 'smaller' },
  { keys: [']'], action: 'larger' },
  { keys: [','], action: 'previousLabel' },
  { keys: ['.'], action: 'nextLabel' },
  { keys: ['z'], ctrl: true, action: 'undo' },
  { keys: ['z'], ctrl: true, shift: true, action: 'redo' },
  { keys: ['y'], ctrl: true, action: 'redo' },
  { keys: ['s'], ctrl: true, action: 'save' },
  { keys: ['a'], action: 'axial' },
  { keys: ['c'], action: 'coronal' },
  { keys: ['s'], action: 'sagittal' },
  { keys: ['m'], action: 'mpr' },
  { keys: ['o'], action: 'overlay' },
  { keys: ['x'], action: 'crosshair' },
  { keys: ['q'], action: 'lessOpaque' },
  { keys: ['w'], action: 'moreOpaque' },
  { keys: ['j'], action: 'previousLesion' },
  { keys: ['k'], action: 'nextLesion' },
  { keys: ['n'], action: 'nextCase' },
  { keys: ['p'], action: 'previousCase' },
  { keys: ['r'], action: 'reset' },
  { keys: ['?', 'f1'], action: 'help' },
  { keys: ['escape'], action: 'close' },
]

/** The action of a key press, null for keys that are not the viewer's. */
export function actionOf(event: {
  key: string; code: string; ctrlKey: boolean; metaKey: boolean; shiftKey: boolean; altKey: boolean
}): Action | null {
  if (event.altKey) return null
  const key = event.key.toLowerCase()
  const ctrl = event.ctrlKey || event.metaKey
  const numpad = event.code.startsWith('Numpad')
  const found = BINDINGS.find(binding => {
    if (!!binding.ctrl !== ctrl) return false
    if (numpad) return binding.keys.includes(event.code)
    if (!binding.keys.includes(key)) return false
    // Signs such as "?" or "[" may need Shift on some keyboards; letters and arrows mean something else with it.
    return /^([a-z]|arrow.*)$/.test(key) ? !!binding.shift === event.shiftKey : true
  })
  return found?.action ?? null
}

/** The sheet: what to press or turn, and what happens. */
export const SHEET: [string, [string, string][]][] = [
  ['Look', [
    ['Wheel, ↑ ↓', 'slice'], ['Shift + wheel, Shift + ↑ ↓', '5 slices'], ['Ctrl + wheel', 'zoom'],
    ['Left drag', 'crosshair'], ['Middle drag', 'pan'], ['Right drag', 'window: ↔ width, ↕ centre'],
    ['1 … 6', 'window presets'], ['R', 'reset zoom, pan and window'], ['X', 'crosshair on, off'],
    ['Double click', 'one plane, all planes'],
  ]],
  ['Planes', [
    ['A, C, S', 'axial, coronal, sagittal'], ['M', 'all planes'], ['3 on the number pad', '3D'],
  ]],
  ['Structures', [
    ['O', 'drawing on, off (hold: peek)'], ['Q, W', 'less, more opaque'], [', .', 'previous, next structure'],
    ['J, K', 'previous, next lesion'], ['N, P', 'next, previous case'],
  ]],
  ['Correct', [
    ['V', 'navigate'], ['B, E', 'brush, eraser'], ['F', 'filled outline'], ['G', 'grow a region'],
    ['I', 'fill between painted slices'], ['[ ]', 'smaller, larger brush'], ['Shift + left drag', 'crosshair while drawing'],
    ['Ctrl + Z', 'undo'], ['Ctrl + Shift + Z, Ctrl + Y', 'redo'], ['Ctrl + S', 'save'],
    ['?', 'this sheet'],
  ]],
]

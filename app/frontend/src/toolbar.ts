/** The buttons above the planes: everything that the keyboard does, and the options of the tool in use. */

import { el, iconButton, relabel, type Icon } from './dom'
import type { Action } from './keys'
import type { Protect, ToolName } from './spec'
import type { Viewer } from './viewer'
import { PRESETS } from './window'

const TOOLS: [ToolName, string][] = [
  ['navigate', 'Navigate (V)'],
  ['brush', 'Brush (B)'],
  ['eraser', 'Eraser (E)'],
  ['fill', 'Filled outline: draw around an area (F)'],
  ['grow', 'Grow a region of similar values from a click (G)'],
]

const PROTECT: [Protect, string][] = [
  ['all', 'over everything'],
  ['background', 'over background only'],
  ['visible', 'over visible only'],
]

export class Toolbar {
  readonly element = el('div', { className: 'bar' })
  readonly options = el('div', { className: 'bar options' })
  private readonly tools = new Map<ToolName, HTMLButtonElement>()
  private readonly layouts = new Map<Action | 'compare', HTMLButtonElement>()
  private readonly undo: HTMLButtonElement
  private readonly redo: HTMLButtonElement
  private readonly save: HTMLButtonElement
  private readonly fillBetween: HTMLButtonElement
  private readonly shown: HTMLButtonElement
  private readonly crosshair: HTMLButtonElement
  private readonly radiological: HTMLButtonElement
  private readonly structures: HTMLButtonElement
  private readonly maps: HTMLButtonElement
  private readonly screenshot: HTMLButtonElement
  private readonly difference: HTMLButtonElement
  private readonly preset = el('select', { title: 'Window preset (1 to 6)', ariaLabel: 'Window preset' })
  private readonly opacity = range('Opacity of the drawing (Q, W)', 0, 100)
  private readonly channel = el('select', { title: 'Channel of the scan', ariaLabel: 'Channel' })
  private readonly label = el('select', { title: 'Structure to paint (, and .)', ariaLabel: 'Structure to paint' })
  private readonly swatch = el('span', { className: 'swatch' })
  private readonly size = range('Brush size in voxels ([ and ])', 1, 60)
  private readonly sizeText = el('span')
  private readonly threeD = checkbox('3D', 'Brush and region growing reach into neighbouring slices')
  private readonly limited = checkbox('Only values', 'Paint only where the value of the scan lies in this range')
  private readonly low = number('Lowest value to paint')
  private readonly high = number('Highest value to paint')
  private readonly protect = el('select', { title: 'What may be painted over', ariaLabel: 'Paint over' })
  private readonly tolerance = number('How far values may differ from where you click')
  private readonly reach = number('How far the region may reach from where you click, mm')
  private readonly hint = el('span', {
    className: 'hint',
    textContent: 'Left drag: crosshair · right drag: window · middle drag: pan · wheel: slices · Ctrl + wheel: zoom · ? keys',
  })
  private readonly fields: Record<'size' | 'grow' | 'threshold' | 'label', HTMLElement>

  constructor(private readonly viewer: Viewer) {
    const act = (action: Action) => () => viewer.perform(action)
    for (const [name, title] of TOOLS) this.tools.set(name, iconButton(name as Icon, title, act(name)))
    this.undo = iconButton('undo', 'Undo (Ctrl+Z)', act('undo'))
    this.redo = iconButton('redo', 'Redo (Ctrl+Shift+Z)', act('redo'))
    this.fillBetween = iconButton('interpolate', 'Fill between painted slices of the active plane (I)', act('interpolate'))
    this.save = el('button', { type: 'button', className: 'text', title: 'Save as a new version (Ctrl+S)', onclick: act('save') })
    this.save.append('Save')
    for (const [action, title] of [
      ['mpr', 'All planes (M)'], ['axial', 'Axial (A)'], ['coronal', 'Coronal (C)'], ['sagittal', 'Sagittal (S)'],
      ['3d', '3D (3 on the number pad)'],
    ] as [Action, string][]) this.layouts.set(action, iconButton(action as Icon, title, act(action)))
    this.layouts.set('compare', iconButton('compare', 'Compare side by side', () => viewer.setLayout('compare')))
    this.difference = el('button', {
      type: 'button', className: 'text', textContent: 'Difference', title: 'Show where the two differ',
      onclick: () => viewer.toggleDifference(),
    })
    this.shown = iconButton('eye', 'Drawing on or off (O)', act('overlay'))
    this.crosshair = iconButton('crosshair', 'Crosshair on or off (X)', act('crosshair'))
    this.radiological = iconButton('radiological', 'Left and right', () => viewer.toggleRadiological())
    this.structures = iconButton('structures', 'Structures: colours, visibility', () => viewer.panels.toggle('structures'))
    this.maps = iconButton('maps', 'Maps: uncertainty and other overlays', () => viewer.panels.toggle('maps'))
    this.screenshot = iconButton('camera', 'Keep a picture of this view', () => void viewer.screenshot(0))
    this.preset.onchange = () => viewer.setPreset(Number(this.preset.value))
    this.opacity.oninput = () => viewer.setOpacity(Number(this.opacity.value) / 100)
    this.channel.onchange = () => viewer.setChannel(Number(this.channel.value))
    this.element.append(
      group(...this.tools.values()),
      group(this.undo, this.redo, this.fillBetween, this.save),
      group(...this.layouts.values(), this.difference),
      group(this.preset, this.channel),
      group(this.shown, this.opacity),
      group(
        this.crosshair, this.radiological, iconButton('reset', 'Reset zoom, pan and window (R)', act('reset')),
        this.structures, this.maps, this.screenshot, iconButton('help', 'Keyboard and mouse (?)', act('help')),
      ),
    )
    for (const [value, text] of PROTECT) this.protect.append(el('option', { value, textContent: text }))
    this.fields = {
      label: el('label', {}, this.swatch, this.label),
      size: el('label', {}, 'Size', this.size, this.sizeText),
      grow: el('label', {}, '±', this.tolerance, 'within', this.reach, 'mm'),
      threshold: el('label', {}, this.low, 'to', this.high),
    }
    this.options.append(
      this.hint, this.fields.label, this.fields.size, this.threeD.parentElement!, this.fields.grow, this.limited.parentElement!,
      this.fields.threshold, this.protect,
    )
    this.label.onchange = () => viewer.setTool({ label: Number(this.label.value) })
    this.size.oninput = () => viewer.setTool({ size: Number(this.size.value) })
    this.threeD.onchange = () => viewer.setTool({ threeD: this.threeD.checked })
    this.protect.onchange = () => viewer.setTool({ protect: this.protect.value as Protect })
    this.limited.onchange = () => viewer.limitPaint(this.limited.checked)
    this.low.onchange = this.high.onchange = () =>
      viewer.setTool({ threshold: [Number(this.low.value), Number(this.high.value)] })
    this.tolerance.onchange = () => viewer.setTool({ tolerance: Math.max(0, Number(this.tolerance.value)) })
    this.reach.onchange = () => viewer.setTool({ reach: Math.max(0, Number(this.reach.value)) })
  }

  /** After another case has been opened. */
  newCase(): void {
    const { spec, scene } = this.viewer
    const presets = PRESETS[spec.modality]
    this.preset.replaceChildren(
      el('option', { value: '-1', textContent: 'Window', hidden: true }),
      ...presets.map((preset, i) => el('option', {
        value: String(i),
        textContent: preset.window ? `${i + 1}  ${preset.name} ${preset.window.join('/')}` : `${i + 1}  ${preset.name}`,
      })),
    )
    const channels = scene?.image?.channels ?? 1
    this.channel.hidden = channels < 2
    this.channel.replaceChildren(...Array.from({ length: channels }, (_, i) =>
      el('option', { value: String(i), textContent: `Channel ${i + 1}` })))
    this.newLabels()
  }

  newLabels(): void {
    this.label.replaceChildren(...(this.viewer.scene?.labels ?? []).map(label =>
      el('option', { value: String(label.value), textContent: label.name })))
  }

  /** Show the viewer's state. */
  update(): void {
    const { viewer } = this
    const { scene, editor, editable, layout, spec } = viewer
    const tool = editor?.tool
    for (const [name, button] of this.tools) {
      press(button, tool?.name === name)
      button.disabled = name !== 'navigate' && !editable
    }
    this.undo.disabled = !editor?.history.canUndo || !editable
    this.redo.disabled = !editor?.history.canRedo || !editable
    this.fillBetween.disabled = !editable
    this.save.disabled = !editable || viewer.saving
    this.save.hidden = !spec.save
    this.save.classList.toggle('primary', !!editor?.dirty)
    for (const [name, button] of this.layouts) {
      const now = layout === name || (name === 'mpr' && layout === 'mpr+3d')
      press(button, now)
    }
    this.layouts.get('compare')!.hidden = !spec.compare
    this.layouts.get('3d')!.hidden = viewer.renderer === null
    this.difference.hidden = layout !== 'compare'
    press(this.difference, !!scene?.difference)
    this.preset.value = String(viewer.presetIndex())
    relabel(this.shown, scene?.shown === false ? 'eyeOff' : 'eye', 'Drawing on or off (O)')
    press(this.shown, !!scene?.shown)
    this.opacity.value = String(Math.round((scene?.opacity ?? spec.opacity) * 100))
    press(this.crosshair, !!scene?.crosshair)
    press(this.radiological, !scene?.radiological)
    this.radiological.title = scene?.radiological
      ? "Patient's right is on the left (radiological); switch" : "Patient's right is on the right (neurological); switch"
    press(this.structures, viewer.panels.open === 'structures')
    press(this.maps, viewer.panels.open === 'maps')
    this.maps.hidden = !spec.overlays.length
    this.screenshot.hidden = !spec.screenshot
    if (scene) this.channel.value = String(scene.channel)
    // The row keeps its place, so that the planes do not jump when a tool is chosen.
    const draws = !!tool && tool.name !== 'navigate' && editable
    const show = (element: HTMLElement, when: boolean) => {
      element.hidden = !draws || !when
    }
    this.hint.hidden = draws
    show(this.fields.label, tool?.name !== 'eraser')
    show(this.fields.size, tool?.name === 'brush' || tool?.name === 'eraser')
    show(this.threeD.parentElement!, tool?.name !== 'fill')
    show(this.fields.grow, tool?.name === 'grow' && !tool.limited)
    show(this.limited.parentElement!, tool?.name !== 'eraser')
    show(this.fields.threshold, tool?.name !== 'eraser' && !!tool?.limited)
    show(this.protect, true)
    if (!tool) return
    this.label.value = String(tool.label)
    this.swatch.style.background = `rgb(${(scene?.label(tool.label)?.rgb ?? [0, 0, 0]).join(',')})`
    this.size.value = String(tool.size)
    this.sizeText.textContent = String(tool.size)
    this.threeD.checked = tool.threeD
    this.limited.checked = tool.limited
    this.protect.value = tool.protect
    setNumber(this.low, tool.threshold[0])
    setNumber(this.high, tool.threshold[1])
    setNumber(this.tolerance, tool.tolerance)
    setNumber(this.reach, tool.reach)
  }
}

function group(...children: HTMLElement[]): HTMLElement {
  return el('div', { className: 'group' }, ...children)
}

function press(button: HTMLButtonElement, on: boolean): void {
  button.setAttribute('aria-pressed', String(on))
}

function range(title: string, min: number, max: number): HTMLInputElement {
  return el('input', { type: 'range', title, ariaLabel: title, min: String(min), max: String(max) })
}

function number(title: string): HTMLInputElement {
  return el('input', { type: 'number', title, ariaLabel: title, step: 'any' })
}

function checkbox(text: string, title: string): HTMLInputElement {
  const input = el('input', { type: 'checkbox', ariaLabel: title })
  el('label', { className: 'check', title }, input, text)
  return input
}

/** A field keeps what is being typed into it. */
function setNumber(input: HTMLInputElement, value: number): void {
  const text = String(Math.round(value * 1000) / 1000)
  if (input.value !== text && input !== (input.getRootNode() as ShadowRoot).activeElement) input.value = text
}


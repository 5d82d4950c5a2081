/** The viewer of one page: a case from the page's spec on the screen, and what the reviewer does with it. */

import { el } from './dom'
import { draftKey, dropDraft, findDraft, keepDraft, type Draft } from './drafts'
import { Editor, type Tool } from './editor'
import { AXES, Grid, type Plane } from './grid'
import { actionOf, type Action } from './keys'
import { farewell, Leaving } from './leaving'
import { gunzip, gzip, open } from './load'
import type { Volume } from './nifti'
import { Pane } from './pane'
import { helpSheet, Notices, Panels } from './panels'
import { Readout } from './readout'
import { post } from './saving'
import { Scene, type Overlay } from './scene'
import type { Command, Layout, MaskSpec, OverlaySpec, Phase, States, Triggers, ViewerSpec, Vox } from './spec'
import css from './style.css'
import { renderer, startsIn3D, Three } from './three'
import { Toolbar } from './toolbar'
import { Pointer } from './pointer'
import { PRESETS, windowOf } from './window'

/** What Streamlit hands to a component. */
export interface Component {
  data: ViewerSpec
  parentElement: HTMLElement | ShadowRoot
  setStateValue(name: string, value: unknown): void
  setTriggerValue(name: string, value: unknown): void
}

const DRAFT_MS = 30_000
const PLANES: Plane[] = ['axial', 'coronal', 'sagittal']

export class Viewer {
  scene: Scene | null = null
  editor: Editor | null = null
  layout: Layout = 'mpr+3d'
  saving = false
  readonly renderer = renderer()
  readonly panels = new Panels(this)
  readonly notices = new Notices()
  readonly panes: Pane[]
  activePane: Pane

  private readonly toolbar = new Toolbar(this)
  private readonly stage = el('div', { className: 'stage' })
  private readonly poster = el('div', { className: 'poster' })
  private readonly progress = el('progress', { max: 1 })
  private readonly posterText = el('div')
  private readonly readout = new Readout()
  private readonly three: Three | null
  private readonly threeTile = el('div', { className: 'tile' })
  private help: HTMLElement | null = null
  private wants3D = false
  private threeTimer = 0
  private tiles = new Map<Pane, HTMLElement>()
  private comparePlane: Plane = 'axial'
  private phase: Phase = 'loading'
  private started = 0
  private aborting = new AbortController()
  private chain: Promise<void> = Promise.resolve()
  private base = 0 // revision that a save builds on
  private maskKey = ''
  private imageSource = ''
  private compareKey = ''
  private lastCommand = 0
  private lesion = -1
  private sent = new Map<string, string>()
  private windowTimer = 0
  private frame = 0
  private everything = false
  private readonly waiting = new Set<Pane>()
  private peekSince = 0
  private drafted = 0 // state of the history that the draft holds
  private draftText = ''
  private found: 'none' | 'offered' | '' = '' // whether a draft was found when the case was opened
  private readonly draftTimer: number
  private readonly leaving: Leaving
  private readonly resize: ResizeObserver
  private baseline: Uint8Array | null = null // tests only: the mask as loaded

  constructor(readonly root: HTMLElement, private component: Component) {
    this.panes = [
      new Pane('axial', 'drawing'), new Pane('sagittal', 'drawing'), new Pane('coronal', 'drawing'),
      new Pane('axial', 'first'), new Pane('axial', 'second'),
    ]
    this.activePane = this.panes[0]
    this.three = this.renderer ? new Three(this.renderer) : null
    const style = el('style', { textContent: css })
    this.poster.append(this.posterText, this.progress)
    // A page that is shown again still holds its last command: jumping twice does no harm, saving twice does.
    const { cmd } = this.spec
    this.lastCommand = cmd && cmd.type !== 'goto' ? cmd.id : 0
    this.root.replaceChildren(
      style, this.toolbar.element, this.toolbar.options,
      el('div', { className: 'body' }, this.stage, this.poster, this.panels.element, this.notices.element),
      this.readout.element,
    )
    for (const pane of this.panes) {
      const tile = el('div', { className: 'tile' }, pane.element)
      this.tiles.set(pane, tile)
      new Pointer(this, pane)
    }
    window.addEventListener('keydown', this.onKeyDown, true)
    window.addEventListener('keyup', this.onKeyUp, true)
    window.addEventListener('beforeunload', this.onLeave)
    this.leaving = new Leaving(go => this.askToLeave(go))
    document.addEventListener('visibilitychange', this.onHide)
    this.resize = new ResizeObserver(() => this.refresh())
    this.resize.observe(this.stage)
    this.draftTimer = window.setInterval(() => void this.keepDraft(), DRAFT_MS)
    this.openCase()
  }

  get spec(): ViewerSpec {
    return this.component.data
  }

  /** Drawing is possible: there is somewhere to save to, and all voxels are here. */
  get editable(): boolean {
    return this.phase === 'ready' && this.spec.save !== null && this.layout !== 'compare'
  }

  // ---------------------------------------------------------------- what the page says

  /** Streamlit calls again after each run of the page; only differences count. */
  update(component: Component): void {
    const before = this.spec
    this.component = component
    const now = this.spec
    this.root.style.height = now.height
    if (now.case_id !== before.case_id) {
      void this.keepDraft(before)
      this.openCase()
      return
    }
    const { scene } = this
    const differs = (name: keyof ViewerSpec) => JSON.stringify(now[name]) !== JSON.stringify(before[name])
    if (scene) {
      if (differs('labels')) {
        scene.labels = now.labels.map(label => ({ ...label }))
        scene.recolour()
        this.toolbar.newLabels()
      }
      if (now.opacity !== before.opacity) this.setOpacity(now.opacity)
      if (now.radiological !== before.radiological) scene.radiological = now.radiological
      if (differs('window') && now.window) this.setWindow(now.window)
      if (keyOf(now.mask) !== keyOf(before.mask) && keyOf(now.mask) !== this.maskKey) this.otherMask()
      if (now.image.source !== this.imageSource) void this.enqueue(signal => this.otherImage(signal))
      if (differs('overlays')) void this.enqueue(() => this.loadOverlays())
      if (keyOf(now.compare?.first) + keyOf(now.compare?.second) !== this.compareKey) void this.enqueue(() => this.loadCompare())
    }
    if (now.layout !== before.layout) this.setLayout(now.layout)
    void this.enqueue(async () => this.carryOut(this.spec.cmd))
    this.panels.render()
    this.refresh()
  }

  /** Loading steps follow each other; one that belongs to a case that has been left does nothing. */
  private enqueue(work: (signal: AbortSignal) => Promise<void>): Promise<void> {
    const { signal } = this.aborting
    this.chain = this.chain.then(async () => {
      if (signal.aborted) return
      try {
        await work(signal)
      } catch (error) {
        if (!signal.aborted) this.fail('overlay', error)
      }
    })
    return this.chain
  }

  private carryOut(cmd: Command | null): void {
    const { scene, editor } = this
    if (!cmd || cmd.id === this.lastCommand || !scene || !editor || this.phase === 'loading') return
    this.lastCommand = cmd.id
    if (cmd.type === 'goto' && cmd.vox) this.goTo(scene.grid.fromFile(cmd.vox))
    else if (cmd.type === 'save') void this.save()
    else if (cmd.type === 'reset') this.resetView()
    else if (cmd.type === 'screenshot') void this.screenshot(cmd.id)
    else if (cmd.type === 'save_over' && cmd.revision !== null) void this.save(cmd.revision, cmd.draft_id)
    else if (cmd.type === 'discard') this.discard()
  }

  // ---------------------------------------------------------------- loading

  private openCase(): void {
    this.aborting.abort()
    this.aborting = new AbortController()
    const { signal } = this.aborting
    const { spec } = this
    this.scene = null
    this.editor = null
    this.maskKey = this.compareKey = ''
    this.lesion = -1
    this.draftText = this.found = ''
    this.started = performance.now()
    this.notices.clear()
    this.root.dataset.case = spec.case_id
    this.setPhase('loading')
    this.send('dirty', false)
    this.posterText.textContent = 'Loading the scan'
    this.progress.removeAttribute('value')
    this.poster.querySelector('img')?.remove()
    if (spec.image.poster_url) {
      const picture = el('img', { src: spec.image.poster_url, alt: '' })
      picture.onerror = () => picture.remove()
      this.poster.prepend(picture)
    }
    this.chain = (async () => {
      try {
        await this.load(spec, signal)
      } catch (error) {
        if (!signal.aborted) this.fail('image', error)
      }
    })()
    this.setLayout(spec.layout)
  }

  private async load(spec: ViewerSpec, signal: AbortSignal): Promise<void> {
    this.imageSource = spec.image.source
    const full = await open(spec.image.url, signal)
    const grid = new Grid(full.head.dims, full.head.affine)
    const scene = new Scene(grid)
    scene.labels = spec.labels.map(label => ({ ...label }))
    scene.opacity = spec.opacity
    scene.radiological = spec.radiological
    if (spec.image.preview_url) {
      // The full file waits in the network's buffers while the small one comes.
      const volume = await (await open(spec.image.preview_url, signal)).volume()
      scene.preview = { volume, matrix: grid.onto(volume) }
      scene.window = this.firstWindow(spec, volume)
    }
    if (spec.mask) scene.mask = await this.maskOf(spec.mask, grid, signal)
    if (signal.aborted) return
    if (spec.test) this.baseline = scene.mask.slice()
    this.maskKey = keyOf(spec.mask)
    this.base = spec.save?.revision ?? spec.mask?.revision ?? 0
    this.scene = scene
    this.editor = new Editor(scene, spec.tool)
    this.drafted = this.editor.history.state
    scene.recolour()
    this.setLayout(this.layout)
    if (scene.preview) this.setPhase('preview')
    this.toolbar.newCase()
    this.panels.render()
    const volume = await full.volume(share => {
      this.progress.value = share
      this.readout.loading(share)
    })
    if (signal.aborted) return
    scene.image = volume
    if (!scene.preview) scene.window = this.firstWindow(spec, volume)
    scene.preview = null
    scene.recolour()
    this.editor.tool.tolerance = Math.round(scene.window[1] / 8)
    this.wants3D = startsIn3D(grid, this.renderer)
    this.readout.loading(1)
    this.toolbar.newCase()
    this.setPhase('ready')
    this.sendTool()
    this.setLayout(this.layout)
    await this.otherImage(signal) // the page may have asked for another one meanwhile
    await this.loadOverlays()
    await this.loadCompare()
    await this.offerDraft()
    this.carryOut(this.spec.cmd)
    this.refresh()
  }

  /** Another image on the same grid, such as a phase: window, place and drawing stay. */
  private async otherImage(signal: AbortSignal): Promise<void> {
    const { scene, spec } = this
    if (!scene || this.phase !== 'ready' || spec.image.source === this.imageSource) return
    this.imageSource = spec.image.source
    const volume = await (await open(spec.image.url, signal)).volume(share => this.readout.loading(share))
    if (signal.aborted) return
    if (volume.dims.join() !== scene.grid.dims.join()) throw new Error('the image has another grid')
    scene.image = volume
    scene.channel = 0
    scene.recolour()
    this.readout.loading(1)
    this.refresh()
  }

  private firstWindow(spec: ViewerSpec, volume: Volume): [number, number] {
    if (spec.window) return spec.window
    const [centre, width] = windowOf(volume, 0, 'full')
    // Air at -1000: these are Hounsfield units, and the presets mean something.
    if (spec.modality === 'CT' && centre - width / 2 <= -500) return PRESETS.CT[0].window!
    return windowOf(volume, 0, 'auto')
  }

  private async maskOf(mask: MaskSpec, grid: Grid, signal: AbortSignal): Promise<Uint8Array> {
    const { dims, channels, data } = await (await open(mask.url, signal)).volume()
    if (dims.join() !== grid.dims.join() || channels !== 1) {
      throw new Error(`the mask has ${dims.join(' x ')} voxels, the scan ${grid.dims.join(' x ')}`)
    }
    if (data instanceof Uint8Array) return data
    if (data.some(value => value < 0 || value > 255)) throw new Error('the mask has labels above 255')
    return Uint8Array.from(data)
  }

  private async loadOverlays(): Promise<void> {
    const { scene, aborting, spec } = this
    if (!scene || this.phase !== 'ready') return
    const wanted = new Map(spec.overlays.map(overlay => [overlay.id, overlay]))
    scene.overlays = scene.overlays.filter(overlay => wanted.has(overlay.spec.id))
    for (const overlay of scene.overlays) this.retune(overlay, wanted.get(overlay.spec.id)!)
    for (const overlay of spec.overlays) {
      if (scene.overlays.some(known => known.spec.id === overlay.id)) continue
      try {
        scene.addOverlay(overlay, await (await open(overlay.url, aborting.signal)).volume())
      } catch (error) {
        if (aborting.signal.aborted) return
        this.fail('overlay', error)
      }
    }
    scene.recolour()
    this.panels.render()
    this.refresh()
  }

  /** The page has changed an overlay's visibility or opacity: that takes effect, the reviewer's choice otherwise stays. */
  private retune(overlay: Overlay, now: OverlaySpec): void {
    if (now.visible !== overlay.spec.visible) overlay.visible = now.visible
    if (now.opacity !== overlay.spec.opacity) overlay.opacity = now.opacity
    overlay.spec = now
  }

  private async loadCompare(): Promise<void> {
    const { scene, aborting, spec } = this
    const key = keyOf(spec.compare?.first) + keyOf(spec.compare?.second)
    if (!scene || this.phase !== 'ready' || key === this.compareKey) return
    this.compareKey = key
    scene.first = scene.second = null
    if (spec.compare) {
      scene.first = await this.maskOf(spec.compare.first, scene.grid, aborting.signal)
      scene.second = await this.maskOf(spec.compare.second, scene.grid, aborting.signal)
      this.panes[3].title = spec.compare.first.title || 'A'
      this.panes[4].title = spec.compare.second.title || 'B'
    } else if (this.layout === 'compare') this.setLayout('mpr+3d')
    scene.labelVersion++
    this.refresh()
  }

  /** The page wants another version of the mask. */
  private otherMask(): void {
    const load = () => void this.enqueue(signal => this.loadMask(signal))
    if (!this.editor?.dirty) {
      load()
      return
    }
    const title = this.spec.mask?.title || `version ${this.spec.mask?.revision ?? 0}`
    this.notices.show('mask', 'warn', `${title} is there, but this drawing has unsaved changes.`, [
      ['Keep drawing', () => {}],
      [`Show ${title} and keep mine as a draft`, () => void this.keepDraft().then(load)],
    ])
  }

  private async loadMask(signal: AbortSignal): Promise<void> {
    const { scene, editor, spec } = this
    if (!scene || !editor || this.phase !== 'ready') return
    try {
      const mask = spec.mask ? await this.maskOf(spec.mask, scene.grid, signal) : new Uint8Array(scene.grid.count)
      if (signal.aborted) return
      scene.mask = mask
    } catch (error) {
      if (!signal.aborted) this.fail('mask', error)
      return
    }
    if (spec.test) this.baseline = scene.mask.slice()
    this.maskKey = keyOf(spec.mask)
    this.base = spec.save?.revision ?? spec.mask?.revision ?? 0
    editor.reset()
    this.drafted = editor.history.state
    this.changedDrawing()
  }

  private fail(code: string, error: unknown): void {
    const message = error instanceof Error ? error.message : String(error)
    if (code === 'image') {
      this.posterText.textContent = `The case cannot be shown: ${message}`
      this.progress.hidden = true
      this.setPhase('error', message)
    } else this.notices.show(code, 'bad', `A part of the case cannot be shown: ${message}`)
    this.trigger('failed', { case_id: this.spec.case_id, code, message })
  }

  private setPhase(phase: Phase, message = ''): void {
    this.phase = phase
    this.root.dataset.phase = phase
    this.poster.hidden = phase === 'ready' || phase === 'preview'
    this.progress.hidden = phase === 'error'
    this.send('status', {
      case_id: this.spec.case_id, phase, message, ms: Math.round(performance.now() - this.started),
    })
    this.refresh()
  }

  // ---------------------------------------------------------------- what the page hears

  private send<K extends keyof States>(name: K, value: States[K]): void {
    const text = JSON.stringify(value)
    if (this.sent.get(name) === text) return
    this.sent.set(name, text)
    this.component.setStateValue(name, value)
  }

  private trigger<K extends keyof Triggers>(name: K, value: Triggers[K]): void {
    this.component.setTriggerValue(name, value)
  }

  private sendTool(): void {
    const tool = this.editor?.tool
    if (tool) this.send('tool', { name: tool.name, label: tool.label, size: tool.size })
  }

  // ---------------------------------------------------------------- looking

  /**
   * Draw with the next frame.
   *
   * @param only one plane, while nothing but its cursor and stroke changes: on a large scan that is felt.
   */
  refresh(only?: Pane): void {
    if (only) this.waiting.add(only)
    else this.everything = true
    if (this.frame) return
    this.frame = requestAnimationFrame(() => {
      const panes = this.everything ? null : [...this.waiting]
      this.frame = 0
      this.everything = false
      this.waiting.clear()
      if (!panes) this.paint()
      else if (this.scene) for (const pane of panes) pane.draw(this.scene)
    })
  }

  private paint(): void {
    const { scene, editor } = this
    this.toolbar.update()
    this.readout.show(this)
    if (!scene || !editor) return
    for (const [pane, tile] of this.tiles) {
      pane.active = pane === this.activePane
      tile.classList.toggle('active', pane.active && this.layout !== 'compare')
      pane.element.classList.toggle('paint', this.editable && editor.tool.name !== 'navigate')
      if (tile.isConnected) pane.draw(scene)
    }
  }

  setLayout(layout: Layout): void {
    if (layout === 'compare' && !this.spec.compare) layout = 'mpr+3d'
    this.layout = layout
    const [axial, sagittal, coronal, first, second] = this.panes
    const thin = this.scene?.grid.thin() ?? -1
    const large = PLANES.find(plane => AXES[plane].normal === thin)
    const planes = [axial, sagittal, coronal]
    if (large) planes.sort((a, b) => Number(b.plane === large) - Number(a.plane === large))
    let shown: HTMLElement[]
    let kind: string
    if (layout === 'compare') {
      first.plane = second.plane = this.comparePlane
      shown = [first, second].map(pane => this.tiles.get(pane)!)
      kind = 'pair'
    } else if (layout === '3d') {
      shown = [this.threeTile]
      kind = 'one'
    } else if (layout === 'mpr+3d' && this.three) {
      shown = [...planes.map(pane => this.tiles.get(pane)!), this.threeTile]
      kind = large ? 'hero3' : 'quad'
    } else if (layout === 'mpr' || layout === 'mpr+3d') {
      shown = planes.map(pane => this.tiles.get(pane)!)
      kind = 'hero2'
    } else {
      const pane = planes.find(one => one.plane === layout)!
      this.activePane = pane
      shown = [this.tiles.get(pane)!]
      kind = 'one'
    }
    if ((this.activePane.role === 'drawing') === (layout === 'compare')) this.activePane = layout === 'compare' ? first : axial
    this.stage.className = `stage ${kind}`
    const same = shown.length === this.stage.children.length && shown.every((tile, i) => this.stage.children[i] === tile)
    if (!same) this.stage.replaceChildren(...shown)
    if (layout === '3d') this.wants3D = true
    if (shown.includes(this.threeTile)) this.fill3D()
    this.refresh()
  }

  private fill3D(): void {
    const { three, scene } = this
    if (!three) {
      this.threeTile.replaceChildren(el('div', { className: 'ask', textContent: '3D needs WebGL, which this browser does not offer.' }))
      return
    }
    if (!scene?.image) {
      this.threeTile.replaceChildren(el('div', { className: 'ask', textContent: scene ? '3D comes with the full scan.' : '' }))
      return
    }
    if (!this.wants3D) {
      const slow = three.kind === 'software' ? 'Without a graphics card 3D is slow.' : 'This scan is large.'
      this.threeTile.replaceChildren(el('div', { className: 'ask' }, slow, el('button', {
        type: 'button', className: 'text', textContent: 'Show 3D',
        onclick: () => {
          this.wants3D = true
          this.fill3D()
        },
      })))
      return
    }
    if (!this.threeTile.contains(three.element)) {
      const scan = el('button', { type: 'button', className: 'text corner', textContent: 'Scan', title: 'Structures alone, or the scan with them' })
      scan.onclick = () => {
        scan.setAttribute('aria-pressed', String(three.toggleScan()))
        this.update3D(0)
      }
      this.threeTile.replaceChildren(three.element, scan)
    }
    this.update3D(0)
  }

  private update3D(delay = 700): void {
    clearTimeout(this.threeTimer)
    this.threeTimer = window.setTimeout(() => {
      const { scene, three } = this
      if (!scene || !three || !this.wants3D || !this.threeTile.isConnected || this.editor?.drawing) return
      three.show(scene).catch(error => {
        this.threeTile.replaceChildren(el('div', { className: 'ask', textContent: `3D does not work here: ${String(error)}` }))
      })
    }, delay)
  }

  /** Move the crosshair to a voxel (patient order), into view. */
  goTo(at: Vox): void {
    const { scene } = this
    if (!scene) return
    scene.at = scene.grid.inside(at)
    if (scene.zoom > 1) scene.centre = [...scene.at]
    this.refresh()
  }

  /** Move the crosshair to where a pane was clicked. */
  moveCrosshair(at: Vox): void {
    if (!this.scene) return
    this.scene.at = this.scene.grid.inside(at)
    this.refresh()
  }

  scroll(pane: Pane, slices: number): void {
    const { scene } = this
    if (!scene) return
    const { normal } = AXES[pane.plane]
    const at: Vox = [...scene.at]
    at[normal] += slices
    scene.at = scene.grid.inside(at)
    this.refresh()
  }

  setWindow([centre, width]: [number, number]): void {
    const { scene } = this
    if (!scene) return
    scene.window = [centre, Math.max(width, 1e-6)]
    scene.greyVersion++
    clearTimeout(this.windowTimer)
    this.windowTimer = window.setTimeout(() => this.send('window', scene.window), 300)
    this.update3D()
    this.refresh()
  }

  setPreset(index: number): void {
    const { scene } = this
    const preset = PRESETS[this.spec.modality][index]
    const volume = scene?.image ?? scene?.preview?.volume
    if (!scene || !preset || !volume) return
    this.setWindow(preset.window ?? windowOf(volume, scene.channel, preset.range!))
  }

  presetIndex(): number {
    const now = this.scene?.window
    return PRESETS[this.spec.modality].findIndex(({ window }) => window && now && window[0] === now[0] && window[1] === now[1])
  }

  setChannel(channel: number): void {
    const { scene } = this
    if (!scene?.image) return
    scene.channel = channel
    this.setWindow(windowOf(scene.image, channel, 'auto'))
  }

  setOpacity(opacity: number): void {
    if (!this.scene) return
    this.scene.opacity = Math.min(1, Math.max(0, opacity))
    this.recolour()
  }

  setOverlay(overlay: Overlay, change: { visible?: boolean; opacity?: number }): void {
    Object.assign(overlay, change)
    this.recolour()
  }

  setVisible(rule: (value: number, now: boolean) => boolean): void {
    for (const label of this.scene?.labels ?? []) label.visible = rule(label.value, label.visible)
    this.recolour()
    this.panels.render()
  }

  setColour(value: number, colour: [number, number, number]): void {
    const label = this.scene?.label(value)
    if (label) label.rgb = colour
    this.recolour()
  }

  toggleLock(value: number): void {
    const label = this.scene?.label(value)
    if (label) label.locked = !label.locked
    this.panels.render()
  }

  toggleRadiological(): void {
    if (this.scene) this.scene.radiological = !this.scene.radiological
    this.refresh()
  }

  toggleDifference(): void {
    if (this.scene) this.scene.difference = !this.scene.difference
    this.refresh()
  }

  private recolour(): void {
    this.scene?.recolour()
    this.update3D()
    this.refresh()
  }

  private resetView(): void {
    const { scene } = this
    const volume = scene?.image ?? scene?.preview?.volume
    if (!scene || !volume) return
    scene.zoom = 1
    scene.centre = scene.middle()
    this.setWindow(this.firstWindow(this.spec, volume))
  }

  // ---------------------------------------------------------------- drawing

  setTool(change: Partial<Tool>): void {
    const { editor } = this
    if (!editor) return
    if (change.name && change.name !== 'navigate' && !this.editable) {
      this.sayWhyNot()
      return
    }
    Object.assign(editor.tool, change)
    editor.tool.size = Math.min(60, Math.max(1, editor.tool.size))
    this.sendTool()
    if (change.label !== undefined) this.panels.render()
    this.refresh()
  }

  /** Switch painting within a range of values on or off; the range starts as the window. */
  limitPaint(limited: boolean): void {
    const { editor, scene } = this
    if (!editor || !scene) return
    const [low, high] = editor.tool.threshold
    const [centre, width] = scene.window
    const threshold: [number, number] = low === 0 && high === 0 ? [centre - width / 2, centre + width / 2] : [low, high]
    this.setTool({ limited, threshold })
  }

  private sayWhyNot(): void {
    const why = !this.spec.save ? 'This is read only.'
      : this.layout === 'compare' ? 'Leave the comparison to draw (M).'
      : 'The full scan is still coming; drawing starts when it is here.'
    this.notices.show('why', 'info', why, [], 4)
  }

  /** After any change of the drawing. */
  changedDrawing(): void {
    if (!this.scene || !this.editor) return
    this.scene.labelVersion++
    this.send('dirty', this.editor.dirty)
    this.update3D()
    this.refresh()
  }

  /** A click with the tool for region growing. */
  growAt(pane: Pane, at: Vox): void {
    const { editor, scene } = this
    if (!editor || !scene) return
    const seed = scene.grid.inside(at)
    const { changed, full } = editor.grow(pane.cut(scene), seed)
    if (full) this.notices.show('grow', 'warn', 'The region ran out of bounds; undo it and use a smaller range.', [], 8)
    else if (!changed) this.notices.show('grow', 'info', 'Nothing to add there.', [], 4)
    this.changedDrawing()
  }

  private interpolate(): void {
    const { editor, scene } = this
    if (!editor || !scene) return
    const { plane } = this.activePane
    const added = editor.interpolate(plane)
    const name = scene.label(editor.tool.label)?.name ?? 'the structure'
    const text = added ? `${added} voxels of ${name} filled in between ${plane} slices.`
      : `No gap between ${plane} slices of ${name}: paint it on two slices that are not neighbours.`
    this.notices.show('interpolate', 'info', text, [], 5)
    this.changedDrawing()
  }

  // ---------------------------------------------------------------- saving

  /**
   * Save; after a conflict over `revision`, settling the draft that the server kept.
   *
   * @param leaving the page is about to show another view: telling it of the save would call it back to this one.
   */
  async save(revision?: number, draftId: string | null = null, leaving = false): Promise<boolean> {
    const { editor, scene, spec } = this
    if (!editor || !scene || !spec.save || this.saving) return false
    if (!this.editable) {
      this.sayWhyNot()
      return false
    }
    if (!editor.dirty && revision === undefined) {
      this.notices.show('save', 'info', 'There are no unsaved changes.', [], 4)
      return true
    }
    this.saving = true
    this.refresh()
    const state = editor.history.state
    const mask = scene.mask.slice()
    const outcome = await post(spec.save, mask, revision ?? this.base, draftId)
    this.saving = false
    const here = this.scene === scene
    if (outcome.kind === 'saved') {
      const { revision: saved, changed_voxels, sha256 } = outcome
      editor.markSaved(state)
      if (here) {
        this.base = saved
        this.maskKey = `${saved}|`
        for (const kind of ['conflict', 'save', 'mask']) this.notices.close(kind)
        if (!leaving) this.send('dirty', editor.dirty)
        this.draftText = ''
        if (this.baseline) this.baseline = mask
      }
      if (!editor.dirty) void dropDraft(draftKey(spec.save.owner, spec.case_id)).catch(() => {})
      if (leaving) farewell(`Saved as version ${saved}: ${changed_voxels} voxels changed.`)
      else this.trigger('saved', { case_id: spec.case_id, revision: saved, changed_voxels, sha256 })
    } else {
      if (here) void this.keepDraft()
      if (outcome.kind === 'conflict') this.conflict({ case_id: spec.case_id, ...outcome.conflict }, here)
      else {
        if (here) this.notices.show('save', 'bad', `Not saved: ${outcome.message}. The drawing is kept.`)
        this.trigger('failed', { case_id: spec.case_id, code: outcome.code, message: outcome.message })
      }
    }
    this.refresh()
    return outcome.kind === 'saved'
  }

  private conflict(conflict: Triggers['conflict'], here: boolean): void {
    const { yours, theirs, by, draft_id } = conflict
    if (here) {
      const text = `${by} has saved version ${theirs} since you opened version ${yours}. `
        + 'Your drawing is still here and kept on the server.'
      this.notices.show('conflict', 'warn', text, [
        [`Save mine as version ${theirs + 1}`, () => void this.save(theirs, draft_id)],
        ['Decide later', () => {}],
      ])
    }
    this.trigger('conflict', conflict)
  }

  private discard(): void {
    if (!this.spec.save) return
    void dropDraft(draftKey(this.spec.save.owner, this.spec.case_id)).catch(() => {})
    this.draftText = ''
    void this.enqueue(signal => this.loadMask(signal))
  }

  private async step(by: 1 | -1): Promise<void> {
    const go = () => this.trigger('step', { case_id: this.spec.case_id, by })
    if (!this.editor?.dirty) {
      go()
      return
    }
    this.notices.show('step', 'warn', 'This drawing has unsaved changes.', [
      ['Save and go on', () => void this.save().then(saved => saved && go())],
      ['Discard them', () => {
        this.discard()
        void this.chain.then(go)
      }],
      ['Stay', () => {}],
    ])
  }

  /** A link to another view was clicked; whether it has to wait for an answer. */
  private askToLeave(go: () => void): boolean {
    if (!this.editor?.dirty || !this.spec.save) return false
    const saveFirst = async () => {
      if (await this.save(undefined, null, true)) go()
    }
    const save: [string, () => void] = ['Save and leave', () => void saveFirst()]
    const stay: [string, () => void] = ['Stay', () => {}]
    const keep = async () => {
      if (await this.keepDraft()) return go()
      this.notices.show('leave', 'bad', 'This browser keeps no data: without saving, the changes are lost.', [
        save, ['Leave and lose them', go], stay,
      ])
    }
    this.notices.show('leave', 'warn', 'This drawing has unsaved changes.', [
      save, ['Leave and keep them as a draft', () => void keep()], stay,
    ])
    return true
  }

  // ---------------------------------------------------------------- drafts

  /** Keep what is unsaved; false when the browser would not. */
  private async keepDraft(spec = this.spec): Promise<boolean> {
    const { editor, scene, base } = this
    if (!editor?.dirty || !scene || !spec.save || editor.drawing || editor.history.state === this.drafted) return true
    const state = editor.history.state
    this.drafted = state
    const at = Date.now()
    try {
      const mask = await gzip(scene.mask)
      const key = draftKey(spec.save.owner, spec.case_id)
      await keepDraft({ key, case_id: spec.case_id, base, at, voxels: scene.grid.count, mask })
      if (this.scene === scene) this.draftText = `draft kept ${clock(at)}`
    } catch {
      if (this.drafted === state) this.drafted = -1
      if (this.scene === scene) this.draftText = 'no draft: the browser does not keep data'
      return false
    } finally {
      this.refresh()
    }
    return true
  }

  get draftState(): string {
    return this.draftText
  }

  get versionText(): string {
    return this.base ? `Version ${this.base}, no unsaved changes` : 'No unsaved changes'
  }

  private async offerDraft(): Promise<void> {
    const { scene, editor, spec } = this
    if (!spec.save || !scene || !editor) return
    const key = draftKey(spec.save.owner, spec.case_id)
    const draft = await findDraft(key).catch(() => null)
    this.found = draft ? 'offered' : 'none'
    if (!draft || draft.voxels !== scene.grid.count || this.scene !== scene) return
    const older = draft.base === this.base ? '' : ` It was drawn on version ${draft.base}; the case is at version ${this.base} now.`
    this.notices.show('draft', 'warn', `Unsaved changes of ${clock(draft.at, true)} were kept.${older}`, [
      ['Restore them', () => void this.restore(draft)],
      ['Discard them', () => void dropDraft(key).catch(() => {})],
    ])
  }

  private async restore(draft: Draft): Promise<void> {
    const { editor, scene } = this
    const mask = await gunzip(draft.mask)
    if (!editor || this.scene !== scene || mask.length !== scene?.grid.count) return
    this.base = draft.base // so that a version saved meanwhile is not overwritten unseen
    editor.replace(mask)
    this.drafted = editor.history.state
    this.changedDrawing()
  }

  // ---------------------------------------------------------------- pictures

  async screenshot(id: number): Promise<void> {
    const { spec } = this
    if (!spec.screenshot) return
    const ratio = window.devicePixelRatio || 1
    const frame = this.stage.getBoundingClientRect()
    const picture = el('canvas', { width: Math.round(frame.width * ratio), height: Math.round(frame.height * ratio) })
    const context = picture.getContext('2d')!
    for (const tile of this.stage.children) {
      const box = tile.getBoundingClientRect()
      const source = this.threeTile === tile ? this.three?.picture() : tile.querySelector('canvas')
      if (!source?.width) continue
      context.drawImage(source, (box.x - frame.x) * ratio, (box.y - frame.y) * ratio, box.width * ratio, box.height * ratio)
    }
    try {
      const body = await new Promise<Blob | null>(resolve => picture.toBlob(resolve, 'image/png'))
      const headers = { 'Content-Type': 'image/png', 'X-Medseg-Token': spec.screenshot.token }
      const answer = await fetch(spec.screenshot.url, { method: 'POST', credentials: 'same-origin', headers, body })
      if (!answer.ok) throw new Error(`the server answered ${answer.status}`)
      this.notices.show('screenshot', 'info', 'The picture is kept with the case.', [], 4)
      this.trigger('screenshot', { id })
    } catch (error) {
      const message = error instanceof Error ? error.message : String(error)
      this.notices.show('screenshot', 'bad', `The picture was not kept: ${message}`)
      this.trigger('failed', { case_id: spec.case_id, code: 'screenshot', message })
    }
  }

  // ---------------------------------------------------------------- keyboard

  private readonly onKeyDown = (event: KeyboardEvent): void => {
    const path = event.composedPath()
    // A dialog of the page comes first; the viewer's own sheet lies in the shadow root and is not found here.
    if (!this.root.isConnected || typing(path[0]) || document.querySelector('[role="dialog"]')) return
    const action = actionOf(event)
    // Arrow keys also move through tables and choices of the page.
    if (action?.startsWith('slice') && !path.includes(this.root) && path[0] !== document.body) return
    if (!action || (action === 'close' && !this.help && !this.panels.open)) return
    event.preventDefault()
    event.stopImmediatePropagation()
    if (action === 'overlay') {
      if (event.repeat) return
      this.peekSince = performance.now()
    }
    if (event.repeat && !/slice|less|more|smaller|larger|undo|redo/i.test(action)) return
    this.perform(action)
  }

  private readonly onKeyUp = (event: KeyboardEvent): void => {
    if (event.key.toLowerCase() !== 'o' || !this.peekSince) return
    const held = performance.now() - this.peekSince > 350
    this.peekSince = 0
    if (held) this.perform('overlay')
  }

  private readonly onLeave = (event: BeforeUnloadEvent): void => {
    if (!this.editor?.dirty) return
    void this.keepDraft()
    event.preventDefault()
  }

  private readonly onHide = (): void => {
    if (document.visibilityState === 'hidden') void this.keepDraft()
  }

  perform(action: Action): void {
    const { scene, editor } = this
    if (action === 'help' || action === 'close') {
      if (action === 'close' && !this.help && this.panels.open) this.panels.toggle(this.panels.open)
      else this.toggleHelp(action === 'help' && !this.help)
      return
    }
    if (action === 'nextCase' || action === 'previousCase') {
      void this.step(action === 'nextCase' ? 1 : -1)
      return
    }
    if (!scene || !editor) return
    const pane = this.activePane
    switch (action) {
      case 'sliceUp': return this.scroll(pane, 1)
      case 'sliceDown': return this.scroll(pane, -1)
      case 'slicesUp': return this.scroll(pane, 5)
      case 'slicesDown': return this.scroll(pane, -5)
      case 'navigate': case 'brush': case 'eraser': case 'fill': case 'grow': return this.setTool({ name: action })
      case 'smaller': return this.setTool({ size: editor.tool.size - 1 })
      case 'larger': return this.setTool({ size: editor.tool.size + 1 })
      case 'previousLabel': return this.stepLabel(-1)
      case 'nextLabel': return this.stepLabel(1)
      case 'undo': case 'redo':
        if (this.editable && !editor.drawing && editor[action]()) this.changedDrawing()
        return
      case 'interpolate': return this.editable ? this.interpolate() : this.sayWhyNot()
      case 'save': return void this.save()
      case 'axial': case 'coronal': case 'sagittal':
        if (this.layout === 'compare') this.comparePlane = action
        return this.setLayout(this.layout === 'compare' ? 'compare' : action)
      case 'mpr': return this.setLayout(this.layout === 'mpr+3d' ? 'mpr' : 'mpr+3d')
      case '3d': return this.setLayout('3d')
      case 'overlay':
        scene.shown = !scene.shown
        return this.recolour()
      case 'crosshair':
        scene.crosshair = !scene.crosshair
        return this.refresh()
      case 'lessOpaque': return this.setOpacity(scene.opacity - 0.1)
      case 'moreOpaque': return this.setOpacity(scene.opacity + 0.1)
      case 'previousLesion': return this.stepLesion(-1)
      case 'nextLesion': return this.stepLesion(1)
      case 'reset': return this.resetView()
      default: return this.setPreset(Number(action.slice(-1)) - 1)
    }
  }

  private toggleHelp(show: boolean): void {
    this.help?.remove()
    this.help = show ? helpSheet(() => this.toggleHelp(false)) : null
    if (this.help) this.stage.parentElement!.append(this.help)
  }

  private stepLabel(by: number): void {
    const { scene, editor } = this
    if (!scene?.labels.length || !editor) return
    const index = scene.labels.findIndex(label => label.value === editor.tool.label)
    const next = scene.labels[(index + by + scene.labels.length) % scene.labels.length]
    this.setTool({ label: next.value })
  }

  private stepLesion(by: number): void {
    const { lesions } = this.spec
    if (!this.scene || !lesions.length) return
    this.lesion = this.lesion < 0 ? (by > 0 ? 0 : lesions.length - 1) : (this.lesion + by + lesions.length) % lesions.length
    const lesion = lesions[this.lesion]
    this.goTo(this.scene.grid.fromFile(lesion.vox))
    this.send('lesion', lesion.id)
  }

  // ---------------------------------------------------------------- tests

  /** What browser tests ask for; voxels are (i, j, k) in the file's order. */
  probe(): Record<string, unknown> {
    return {
      phase: () => this.phase,
      vox: () => this.scene!.grid.toFile(this.scene!.at),
      window: () => this.scene!.window,
      layout: () => this.layout,
      tool: () => ({ ...this.editor!.tool }),
      dirty: () => !!this.editor?.dirty,
      overlays: () => this.scene!.overlays.length,
      base: () => this.base,
      changed: () => {
        const { mask } = this.scene!
        return mask.reduce((sum, value, i) => sum + Number(value !== this.baseline![i]), 0)
      },
      label: (vox: Vox) => this.scene!.mask[this.scene!.grid.offset(this.scene!.grid.fromFile(vox))],
      count: (label: number) => this.scene!.mask.reduce((sum, value) => sum + Number(value === label), 0),
      value: (vox: Vox) => this.scene!.value(this.scene!.grid.fromFile(vox)),
      goto: (vox: Vox) => this.goTo(this.scene!.grid.fromFile(vox)),
      point: (plane: Plane, vox: Vox) => {
        const pane = this.panes.find(one => one.plane === plane && this.tiles.get(one)!.isConnected)!
        const [x, y] = pane.point(this.scene!, this.scene!.grid.fromFile(vox))
        const box = pane.element.getBoundingClientRect()
        return [box.x + x, box.y + y]
      },
      draft: () => this.keepDraft(),
      drafts: () => this.found,
    }
  }

  destroy(): void {
    if (this.editor?.dirty && this.spec.save) {
      void this.keepDraft().then(kept => farewell(kept
        ? 'Your unsaved changes are kept as a draft in this browser. Open the case again to restore them.'
        : 'This browser keeps no data: the unsaved changes are lost.'))
    }
    this.leaving.destroy()
    this.aborting.abort()
    clearInterval(this.draftTimer)
    clearTimeout(this.threeTimer)
    clearTimeout(this.windowTimer)
    cancelAnimationFrame(this.frame)
    window.removeEventListener('keydown', this.onKeyDown, true)
    window.removeEventListener('keyup', this.onKeyUp, true)
    window.removeEventListener('beforeunload', this.onLeave)
    document.removeEventListener('visibilitychange', this.onHide)
    this.resize.disconnect()
    this.three?.destroy()
  }
}

/** Tells masks apart: after a save the stored version has no source. */
function keyOf(mask: MaskSpec | null | undefined): string {
  return mask ? `${mask.revision}|${mask.source}` : ''
}

function typing(target: EventTarget | undefined): boolean {
  if (!(target instanceof HTMLElement)) return false
  if (target.isContentEditable || target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement) return true
  return target instanceof HTMLInputElement && !['checkbox', 'radio', 'range', 'button', 'color'].includes(target.type)
}

function clock(at: number, day = false): string {
  const date = new Date(at)
  const time = date.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' })
  return day && date.toDateString() !== new Date().toDateString() ? `${date.toLocaleDateString()} ${time}` : time
}

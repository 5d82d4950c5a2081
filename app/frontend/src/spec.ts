/** What the page sends and what the viewer answers; mirrors `app/streamlit/viewer/__init__.py`. */

export type Vox = [number, number, number]
export type Layout = 'mpr+3d' | 'mpr' | 'axial' | 'coronal' | 'sagittal' | '3d' | 'compare'
export type ToolName = 'navigate' | 'brush' | 'eraser' | 'fill' | 'grow'
export type Protect = 'all' | 'background' | 'visible'
export type Phase = 'loading' | 'preview' | 'ready' | 'error'

export interface ImageSpec {
  url: string
  name: string
  source: string
  preview_url: string | null
  poster_url: string | null
}

export interface MaskSpec {
  url: string
  name: string
  revision: number
  source: string
  title: string
}

export interface OverlaySpec {
  id: string
  url: string
  name: string
  kind: 'compare' | 'uncertainty' | 'ground_truth' | 'evidence'
  title: string
  colormap: string
  opacity: number
  range: [number, number]
  visible: boolean
}

export interface LabelSpec {
  value: number
  name: string
  rgb: [number, number, number]
  visible: boolean
  locked: boolean
}

export interface LesionSpec {
  id: number
  label: number
  vox: Vox
}

export interface ToolSpec {
  name: ToolName
  label: number | null
  size: number
  three_d: boolean
  threshold: [number, number] | null
  protect: Protect
}

export interface SaveSpec {
  url: string
  token: string
  revision: number | null
  owner: string
}

export interface Command {
  id: number
  type: 'goto' | 'save' | 'reset' | 'screenshot' | 'save_over' | 'discard'
  vox: Vox | null
  revision: number | null
  draft_id: string | null
}

export interface ViewerSpec {
  case_id: string
  image: ImageSpec
  mask: MaskSpec | null
  overlays: OverlaySpec[]
  compare: { first: MaskSpec; second: MaskSpec } | null
  window: [number, number] | null
  modality: 'CT' | 'MR'
  labels: LabelSpec[]
  lesions: LesionSpec[]
  opacity: number
  layout: Layout
  radiological: boolean
  tool: ToolSpec
  cmd: Command | null
  save: SaveSpec | null
  screenshot: { url: string; token: string } | null
  height: string
  test: boolean
  bundle: string
}

/** Events that Streamlit keeps between runs. */
export interface States {
  status: { case_id: string; phase: Phase; message: string; ms: number }
  dirty: boolean
  window: [number, number]
  tool: { name: ToolName; label: number; size: number }
  lesion: number
}

/** Events that are there for one run. */
export interface Triggers {
  saved: { case_id: string; revision: number; changed_voxels: number; sha256: string }
  conflict: { case_id: string; yours: number; theirs: number; by: string; at: string; draft_id: string }
  failed: { case_id: string; code: string; message: string }
  screenshot: { id: number }
  step: { case_id: string; by: 1 | -1 }
}

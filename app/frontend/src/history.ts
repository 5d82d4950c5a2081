/** Undo and redo: each step holds the voxels that it changed, and old steps go when the memory for them is used up. */

const BYTES_PER_VOXEL = 6

export interface Step {
  id: number // unique, never 0
  at: Uint32Array // offsets in the file's order
  before: Uint8Array
  after: Uint8Array
}

let lastId = 0

/** Collects what one stroke changes. */
export class Stroke {
  private at: number[] = []
  private before: number[] = []
  private after: number[] = []

  constructor(private readonly mask: Uint8Array) {}

  get count(): number {
    return this.at.length
  }

  /** Give a voxel a label. */
  set(offset: number, label: number): void {
    const old = this.mask[offset]
    if (old === label) return
    this.mask[offset] = label
    this.at.push(offset)
    this.before.push(old)
    this.after.push(label)
  }

  finish(): Step {
    return { id: ++lastId, at: Uint32Array.from(this.at), before: Uint8Array.from(this.before), after: Uint8Array.from(this.after) }
  }
}

export class History {
  private done: Step[] = []
  private undone: Step[] = []
  private bytes = 0
  private floor = 0 // id of the last step that cannot be undone any more

  constructor(private readonly mask: Uint8Array, private readonly mostBytes = 256 * 2 ** 20) {}

  /** Names the state of the mask: equal numbers, equal masks. */
  get state(): number {
    return this.done.at(-1)?.id ?? this.floor
  }

  get canUndo(): boolean {
    return this.done.length > 0
  }

  get canRedo(): boolean {
    return this.undone.length > 0
  }

  /** Keep a step that has been carried out. */
  push(step: Step): void {
    if (!step.at.length) return
    for (const lost of this.undone) this.bytes -= cost(lost)
    this.undone = []
    this.done.push(step)
    this.bytes += cost(step)
    while (this.bytes > this.mostBytes && this.done.length > 1) {
      const lost = this.done.shift()!
      this.bytes -= cost(lost)
      this.floor = lost.id
    }
  }

  /** Take the last step back; null when there is none. */
  undo(): Step | null {
    const step = this.done.pop()
    if (!step) return null
    for (let i = step.at.length - 1; i >= 0; i--) this.mask[step.at[i]] = step.before[i]
    this.undone.push(step)
    return step
  }

  /** Do the last step again that was taken back; null when there is none. */
  redo(): Step | null {
    const step = this.undone.pop()
    if (!step) return null
    for (let i = 0; i < step.at.length; i++) this.mask[step.at[i]] = step.after[i]
    this.done.push(step)
    return step
  }
}

function cost(step: Step): number {
  return step.at.length * BYTES_PER_VOXEL
}

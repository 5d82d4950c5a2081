/** Windows: centre and width, in the scan's units. */

import type { Volume } from './nifti'

export interface Preset {
  name: string
  /** null: worked out from the scan. */
  window: [number, number] | null
  range?: 'auto' | 'full'
}

/** Presets of keys 1, 2, 3, ... */
export const PRESETS: Record<'CT' | 'MR', Preset[]> = {
  CT: [
    { name: 'Soft tissue', window: [40, 400] },
    { name: 'Lung', window: [-600, 1500] },
    { name: 'Liver', window: [90, 150] },
    { name: 'Bone', window: [480, 2500] },
    { name: 'Brain', window: [40, 80] },
    { name: 'Pancreas', window: [60, 250] },
  ],
  MR: [
    { name: 'Auto (1-99 %)', window: null, range: 'auto' },
    { name: 'Full range', window: null, range: 'full' },
  ],
}

const SAMPLES = 200_000

/**
 * A window over a share of a channel's values.
 *
 * @param range "auto" from the 1st to the 99th percentile of the values that are not the smallest, "full" all of them.
 */
export function windowOf(volume: Volume, channel: number, range: 'auto' | 'full'): [number, number] {
  const count = volume.dims[0] * volume.dims[1] * volume.dims[2]
  const stride = range === 'full' ? 1 : Math.max(1, Math.floor(count / SAMPLES))
  const first = channel * count
  let [low, high] = [Infinity, -Infinity]
  const values: number[] = []
  for (let i = 0; i < count; i += stride) {
    const value = volume.data[first + i]
    if (!Number.isFinite(value)) continue
    if (value < low) low = value
    if (value > high) high = value
    if (range === 'auto') values.push(value)
  }
  if (range === 'auto') {
    const kept = Float64Array.from(values.filter(value => value > low)).sort()
    if (kept.length > 10) [low, high] = [kept[Math.floor(kept.length * 0.01)], kept[Math.ceil(kept.length * 0.99) - 1]]
  }
  if (!(high > low)) high = low + 1
  const [a, b] = [low, high].map(value => value * volume.slope + volume.inter)
  return [(a + b) / 2, Math.abs(b - a)]
}

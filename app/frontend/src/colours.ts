/** Colour tables as packed RGBA, one 32-bit number a colour. */

import type { LabelSpec } from './spec'

/** Packed colour: red in the lowest byte. */
export function pack(r: number, g: number, b: number, a = 255): number {
  return ((a << 24) | (b << 16) | (g << 8) | r) >>> 0
}

export const GREY = Uint32Array.from({ length: 256 }, (_, i) => pack(i, i, i))

// Samples of each map from dark to bright; matplotlib's maps of these names, which are in the public domain (CC0).
const MAPS: Record<string, string> = {
  inferno: '000004 1b0c41 4a0c6b 781c6d a52c60 cf4446 ed6925 fb9b06 fcffa4',
  viridis: '440154 482475 414487 355f8d 2a788e 21918c 22a884 7ad151 fde725',
  magma: '000004 180f3d 440f76 721f81 9e2f7f cd4071 f1605d fd9668 fcfdbf',
  hot: '0b0000 540000 9e0000 e80000 ff3300 ff7c00 ffc600 ffff1c ffffff',
}

/** 256 colours of a map; an unknown name gives inferno. */
export function colourMap(name: string): Uint32Array {
  const stops = (MAPS[name] ?? MAPS.inferno).split(' ').map(hex => [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16)))
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (stops.length - 1)
    const low = Math.min(stops.length - 2, Math.floor(place))
    const [r, g, b] = stops[low].map((value, c) => Math.round(value + (stops[low + 1][c] - value) * (place - low)))
    return pack(r, g, b)
  })
}

/** Colours of labels 0 to 255 for filled areas and their rims; hidden labels and the background are transparent. */
export function labelColours(labels: LabelSpec[], opacity: number): { fill: Uint32Array; rim: Uint32Array } {
  const fill = new Uint32Array(256)
  const rim = new Uint32Array(256)
  for (const { value, rgb: [r, g, b], visible } of labels) {
    if (!visible) continue
    fill[value] = pack(r, g, b, Math.round(255 * opacity))
    rim[value] = pack(r, g, b, Math.round(255 * Math.min(1, opacity * 1.7)))
  }
  return { fill, rim }
}

/** Colours of a comparison: where only the first mask has a label, only the second, or both. */
export const DIFFERENCE = { first: [255, 140, 40], second: [70, 150, 255], both: [90, 220, 110] } as const

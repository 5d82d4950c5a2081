/** NIfTI-1 and NIfTI-2 headers, and volumes in the file's own voxel order. */

export type Affine = number[][] // 3 rows of 4: voxel index to RAS mm
export type Voxels =
  | Uint8Array | Int8Array | Uint16Array | Int16Array | Uint32Array | Int32Array | Float32Array | Float64Array

export interface Header {
  dims: [number, number, number]
  channels: number
  affine: Affine
  bytes: number // of one voxel
  offset: number // of the first voxel in the file
  little: boolean
  slope: number
  inter: number
  make: (buffer: ArrayBuffer) => Voxels
}

export interface Volume {
  dims: [number, number, number]
  channels: number
  affine: Affine
  data: Voxels // x fastest, then y, z, channel
  slope: number
  inter: number
}

/** Bytes that are enough to read any header. */
export const HEADER_BYTES = 544

const KINDS: Record<number, [number, (buffer: ArrayBuffer) => Voxels]> = {
  2: [1, b => new Uint8Array(b)],
  4: [2, b => new Int16Array(b)],
  8: [4, b => new Int32Array(b)],
  16: [4, b => new Float32Array(b)],
  64: [8, b => new Float64Array(b)],
  256: [1, b => new Int8Array(b)],
  512: [2, b => new Uint16Array(b)],
  768: [4, b => new Uint32Array(b)],
}

/**
 * Read a header.
 *
 * @param bytes start of the uncompressed file.
 * @throws Error in words for the reviewer.
 */
export function readHeader(bytes: Uint8Array): Header {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (bytes.byteLength < 348) throw new Error('not a NIfTI file')
  for (const little of [true, false]) {
    const size = view.getInt32(0, little)
    if (size === 348) return first(view, little)
    if (size === 540 && bytes.byteLength >= 540) return second(view, little)
  }
  throw new Error('not a NIfTI file')
}

function first(view: DataView, little: boolean): Header {
  const short = (at: number) => view.getInt16(at, little)
  const float = (at: number) => view.getFloat32(at, little)
  const dim = Array.from({ length: 8 }, (_, i) => short(40 + 2 * i))
  const pixdim = Array.from({ length: 4 }, (_, i) => float(76 + 4 * i))
  return header(dim, short(70), float(108), float(112), float(116), little, {
    qform: short(252), sform: short(254), pixdim,
    quaternion: [float(256), float(260), float(264)], shift: [float(268), float(272), float(276)],
    rows: [280, 296, 312].map(row => [0, 4, 8, 12].map(at => float(row + at))),
  })
}

function second(view: DataView, little: boolean): Header {
  const double = (at: number) => view.getFloat64(at, little)
  const long = (at: number) => Number(view.getBigInt64(at, little))
  const dim = Array.from({ length: 8 }, (_, i) => long(16 + 8 * i))
  const pixdim = Array.from({ length: 4 }, (_, i) => double(104 + 8 * i))
  return header(dim, view.getInt16(12, little), long(168), double(176), double(184), little, {
    qform: view.getInt32(344, little), sform: view.getInt32(348, little), pixdim,
    quaternion: [double(352), double(360), double(368)], shift: [double(376), double(384), double(392)],
    rows: [400, 432, 464].map(row => [0, 8, 16, 24].map(at => double(row + at))),
  })
}

interface Placement {
  qform: number
  sform: number
  pixdim: number[]
  quaternion: number[]
  shift: number[]
  rows: number[][]
}

function header(
  dim: number[], kind: number, offset: number, slope: number, inter: number, little: boolean, place: Placement,
): Header {
  const known = KINDS[kind]
  if (!known) throw new Error(`NIfTI data type ${kind} cannot be shown`)
  const size = (axis: number) => (axis <= dim[0] ? Math.max(1, dim[axis]) : 1)
  const dims: [number, number, number] = [size(1), size(2), size(3)]
  const scaled = Number.isFinite(slope) && slope !== 0
  return {
    dims,
    channels: size(4) * size(5),
    affine: affineOf(place, dims),
    bytes: known[0],
    offset,
    little,
    slope: scaled ? slope : 1,
    inter: scaled && Number.isFinite(inter) ? inter : 0,
    make: known[1],
  }
}

/** The affine that nibabel takes: sform, else qform, else spacing with the centre as origin. */
function affineOf({ qform, sform, pixdim, quaternion, shift, rows }: Placement, dims: number[]): Affine {
  if (sform > 0) return rows
  const step = [1, 2, 3].map(axis => Math.abs(pixdim[axis]) || 1)
  if (qform > 0) {
    const [b, c, d] = quaternion
    const a = Math.sqrt(Math.max(0, 1 - (b * b + c * c + d * d)))
    const sign = pixdim[0] < 0 ? -1 : 1
    const rotation = [
      [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
      [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
      [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
    ]
    return rotation.map((r, i) => [r[0] * step[0], r[1] * step[1], r[2] * step[2] * sign, shift[i]])
  }
  // nibabel's fallback has the first axis pointing left.
  return [0, 1, 2].map(i => {
    const signed = i === 0 ? -step[i] : step[i]
    return [0, 1, 2].map(j => (i === j ? signed : 0)).concat((-signed * (dims[i] - 1)) / 2)
  })
}

/** How many bytes of voxels a file of this header holds. */
export function voxelBytes(head: Header): number {
  return head.dims[0] * head.dims[1] * head.dims[2] * head.channels * head.bytes
}

/** The volume of a header and its voxels' bytes, turned to this machine's byte order in place. */
export function volumeOf(head: Header, voxels: ArrayBuffer): Volume {
  if (!head.little && head.bytes > 1) swap(new Uint8Array(voxels), head.bytes)
  const { dims, channels, affine, slope, inter } = head
  return { dims, channels, affine, slope, inter, data: head.make(voxels) }
}

function swap(bytes: Uint8Array, width: number): void {
  for (let at = 0; at + width <= bytes.length; at += width) bytes.subarray(at, at + width).reverse()
}

/** A NIfTI-1 file of one channel, for a reader that takes files only. */
export function writeNifti(volume: Volume): ArrayBuffer {
  const data = volume.data
  const code = Object.entries(KINDS).find(([, [, make]]) => make(new ArrayBuffer(0)).constructor === data.constructor)
  const buffer = new ArrayBuffer(352 + data.byteLength)
  const view = new DataView(buffer)
  view.setInt32(0, 348, true)
  ;[3, ...volume.dims, 1, 1, 1, 1].forEach((n, i) => view.setInt16(40 + 2 * i, n, true))
  view.setInt16(70, Number(code![0]), true)
  view.setInt16(72, data.BYTES_PER_ELEMENT * 8, true)
  const step = [0, 1, 2].map(j => Math.hypot(...volume.affine.map(row => row[j])))
  ;[1, ...step, 1, 1, 1, 1].forEach((n, i) => view.setFloat32(76 + 4 * i, n, true))
  view.setFloat32(108, 352, true)
  view.setFloat32(112, volume.slope, true)
  view.setFloat32(116, volume.inter, true)
  view.setInt16(254, 1, true)
  volume.affine.forEach((row, i) => row.forEach((n, j) => view.setFloat32(280 + 16 * i + 4 * j, n, true)))
  ;[0x6e, 0x2b, 0x31].forEach((byte, i) => view.setUint8(344 + i, byte))
  new Uint8Array(buffer, 352).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength))
  return buffer
}

/** NIfTI over HTTP: the header first, voxels as they come. */

import { HEADER_BYTES, readHeader, volumeOf, voxelBytes, type Header, type Volume } from './nifti'

/** A file that is being read: its header is known, its voxels follow. */
export interface Download {
  head: Header
  /** Read the rest; `progress` gets a share from 0 to 1. */
  volume(progress?: (share: number) => void): Promise<Volume>
}

/** Largest number of voxels' bytes that one buffer may take: beyond it browsers refuse. */
const MOST_BYTES = 3.5 * 2 ** 30

/**
 * Start to read a NIfTI file.
 *
 * @throws Error in words for the reviewer, AbortError when `signal` fires.
 */
export async function open(url: string, signal: AbortSignal): Promise<Download> {
  const answer = await fetch(url, { signal, credentials: 'same-origin' })
  if (!answer.ok || !answer.body) throw new Error(await problem(answer))
  const reader = await unpacked(answer.body)
  const start = await atLeast(reader, HEADER_BYTES)
  const head = readHeader(start)
  const total = voxelBytes(head)
  if (total > MOST_BYTES) throw new Error(`the volume takes ${(total / 2 ** 30).toFixed(1)} GB, more than a browser holds`)
  return { head, volume: progress => rest(reader, start, head, total, progress) }
}

/** What a refused request says, in the server's words where it has some. */
export async function problem(answer: Response): Promise<string> {
  try {
    const { error } = (await answer.json()) as { error?: unknown }
    if (typeof error === 'string') return error
  } catch {
    // no JSON: the status has to do
  }
  return `the server answered ${answer.status}`
}

async function rest(
  reader: ReadableStreamDefaultReader<Uint8Array>, start: Uint8Array, head: Header, total: number,
  progress?: (share: number) => void,
): Promise<Volume> {
  const voxels = new Uint8Array(total)
  let filled = 0
  let skip = head.offset
  let told = 0
  const take = (chunk: Uint8Array) => {
    const dropped = Math.min(skip, chunk.length)
    skip -= dropped
    const part = chunk.subarray(dropped, dropped + total - filled)
    voxels.set(part, filled)
    filled += part.length
  }
  take(start)
  while (filled < total) {
    const { done, value } = await reader.read()
    if (done) throw new Error(`the file ends after ${filled} of ${total} bytes`)
    take(value)
    const now = performance.now()
    if (progress && now - told > 200) {
      told = now
      progress(filled / total)
    }
  }
  void reader.cancel()
  return volumeOf(head, voxels.buffer)
}

/** Uncompressed bytes of a body: gzip is known by its first two bytes, whatever the file is called. */
async function unpacked(body: ReadableStream<Uint8Array>): Promise<ReadableStreamDefaultReader<Uint8Array>> {
  const reader = body.getReader()
  const start = await atLeast(reader, 2)
  const whole = new ReadableStream<Uint8Array<ArrayBuffer>>({
    start: controller => controller.enqueue(start),
    pull: async controller => {
      const { done, value } = await reader.read()
      if (done) controller.close()
      else controller.enqueue(value as Uint8Array<ArrayBuffer>)
    },
    cancel: reason => reader.cancel(reason),
  })
  const packed = start[0] === 0x1f && start[1] === 0x8b
  return (packed ? whole.pipeThrough(new DecompressionStream('gzip')) : whole).getReader()
}

async function atLeast(reader: ReadableStreamDefaultReader<Uint8Array>, bytes: number): Promise<Uint8Array<ArrayBuffer>> {
  const parts: Uint8Array[] = []
  let have = 0
  while (have < bytes) {
    const { done, value } = await reader.read()
    if (done) break
    parts.push(value)
    have += value.length
  }
  const joined = new Uint8Array(have)
  let at = 0
  for (const part of parts) {
    joined.set(part, at)
    at += part.length
  }
  return joined
}

/** Gzip of bytes, off the main thread. */
export async function gzip(bytes: Uint8Array): Promise<Uint8Array<ArrayBuffer>> {
  const stream = new Blob([bytes as Uint8Array<ArrayBuffer>]).stream().pipeThrough(new CompressionStream('gzip'))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

/** Bytes of a gzip. */
export async function gunzip(bytes: Uint8Array): Promise<Uint8Array<ArrayBuffer>> {
  const stream = new Blob([bytes as Uint8Array<ArrayBuffer>]).stream().pipeThrough(new DecompressionStream('gzip'))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

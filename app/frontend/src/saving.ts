/** A mask to the server, and what it answers. */

import { gzip, problem } from './load'
import type { SaveSpec, Triggers } from './spec'

export type Outcome =
  | { kind: 'saved'; revision: number; changed_voxels: number; sha256: string }
  | { kind: 'conflict'; conflict: Omit<Triggers['conflict'], 'case_id'> }
  | { kind: 'failed'; code: string; message: string }

/**
 * Send a mask.
 *
 * @param mask one byte a voxel in the file's order; copied before this returns control.
 * @param base revision that was edited.
 * @param draftId draft on the server that this settles.
 */
export async function post(save: SaveSpec, mask: Uint8Array, base: number, draftId: string | null): Promise<Outcome> {
  try {
    const body = await gzip(mask)
    const headers: Record<string, string> = {
      'Content-Type': 'application/gzip', 'If-Match': `"${base}"`, 'X-Medseg-Token': save.token,
    }
    if (draftId) headers['X-Medseg-Draft'] = draftId
    const answer = await fetch(save.url, { method: 'POST', credentials: 'same-origin', headers, body })
    if (answer.status === 409) return { kind: 'conflict', conflict: await answer.json() }
    if (!answer.ok) return { kind: 'failed', code: String(answer.status), message: await problem(answer) }
    return { kind: 'saved', ...(await answer.json()) }
  } catch (error) {
    return { kind: 'failed', code: 'network', message: `the server cannot be reached (${String(error)})` }
  }
}

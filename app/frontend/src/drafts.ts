/** Drawings that were not saved, kept in the browser until they are. */

export interface Draft {
  key: string
  case_id: string
  base: number // revision that was edited
  at: number // ms since 1970
  voxels: number
  mask: Uint8Array // gzip
}

const KEPT_MS = 14 * 24 * 3600 * 1000

function database(): Promise<IDBDatabase> {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open('medseg-drafts', 1)
    opening.onupgradeneeded = () => opening.result.createObjectStore('drafts', { keyPath: 'key' })
    opening.onsuccess = () => resolve(opening.result)
    opening.onerror = () => reject(opening.error)
  })
}

async function run<T>(mode: IDBTransactionMode, work: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const base = await database()
  try {
    return await new Promise((resolve, reject) => {
      const transaction = base.transaction('drafts', mode)
      const request = work(transaction.objectStore('drafts'))
      transaction.oncomplete = () => resolve(request.result)
      transaction.onerror = transaction.onabort = () => reject(transaction.error)
    })
  } finally {
    base.close()
  }
}

/** One draft for each reviewer and case: the last one. */
export function draftKey(owner: string, caseId: string): string {
  return `${owner}|${caseId}`
}

export async function keepDraft(draft: Draft): Promise<void> {
  await run('readwrite', store => store.put(draft))
}

export async function findDraft(key: string): Promise<Draft | null> {
  const all = await run<Draft[]>('readonly', store => store.getAll())
  for (const old of all) if (Date.now() - old.at > KEPT_MS) await dropDraft(old.key)
  const draft = all.find(one => one.key === key)
  return draft && Date.now() - draft.at <= KEPT_MS ? draft : null
}

export async function dropDraft(key: string): Promise<void> {
  await run('readwrite', store => store.delete(key))
}

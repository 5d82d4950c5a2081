/**
 * Builds the viewer into app/streamlit/viewer/static: scripts named after their content, a manifest of what may be
 * served, and the licences of the packages that are inside. The same sources give the same bytes.
 */

import { build } from 'esbuild'
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const here = dirname(fileURLToPath(import.meta.url))
const target = join(here, '..', 'streamlit', 'viewer')
const out = join(target, 'static')

for (const name of existsSync(out) ? readdirSync(out) : []) rmSync(join(out, name))
const { metafile } = await build({
  absWorkingDir: here,
  entryPoints: { viewer: 'src/main.ts' },
  outdir: out,
  bundle: true,
  splitting: true, // the 3-D part is fetched when it is first shown
  minify: true,
  format: 'esm',
  target: 'es2022',
  entryNames: '[name].[hash]',
  chunkNames: 'part.[hash]',
  loader: { '.css': 'text' },
  legalComments: 'none', // THIRD_PARTY.txt has them
  metafile: true,
  logLevel: 'info',
})

const names = Object.keys(metafile.outputs).map(path => path.split('/').pop()).sort()
const entry = names.find(name => name.startsWith('viewer.'))
writeFileSync(join(out, 'manifest.json'), `${JSON.stringify({ entry, files: names }, null, 2)}\n`)

const packages = new Set()
for (const input of Object.values(metafile.outputs).flatMap(output => Object.keys(output.inputs))) {
  const found = input.match(/^.*node_modules\/(@[^/]+\/[^/]+|[^/]+)\//)
  if (found) packages.add(found[0].slice(0, -1))
}
writeFileSync(join(target, 'THIRD_PARTY.txt'), [
  'The scripts in static/ contain the following packages.\n',
  ...[...packages].sort().map(licence),
].join('\n'))

/** Name, version and licence text of a package. */
function licence(path) {
  const folder = join(here, path)
  const { name, version, license } = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'))
  const file = readdirSync(folder).sort().find(one => /^(licen[cs]e|copying)(\.|$)/i.test(one))
  const own = join(here, 'licences', `${name.replace('/', '_')}.txt`)
  if (!file && !existsSync(own)) throw new Error(`${name} ships no licence: add its text as ${own}`)
  const text = readFileSync(file ? join(folder, file) : own, 'utf8').trim()
  return `${'='.repeat(80)}\n${name} ${version} (${license})\n${'='.repeat(80)}\n\n${text}\n`
}

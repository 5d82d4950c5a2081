/**
 * Shape-based interpolation between painted slices.
 *
 * Raya and Udupa (1990): each shape becomes its signed distance to the border, the distances of two slices are mixed by
 * the position between them, and what is positive is inside.
 */

const FAR = 1e20

/**
 * Signed distance of a shape's pixels to its border, positive inside; pixels may be oblong.
 *
 * @param shape 1 inside, 0 outside, `width * height`, rows one after the other.
 * @param step mm between pixels in a row and between rows.
 */
export function signedDistance(shape: Uint8Array, width: number, height: number, step: [number, number]): Float32Array {
  const inside = squaredDistance(shape, width, height, step, 0) // to the nearest pixel outside
  const outside = squaredDistance(shape, width, height, step, 1)
  return inside.map((value, i) => Math.sqrt(value) - Math.sqrt(outside[i]))
}

/** Squared mm to the nearest pixel of `value`, exact (Felzenszwalb and Huttenlocher 2012). */
function squaredDistance(
  shape: Uint8Array, width: number, height: number, step: [number, number], value: number,
): Float32Array {
  const result = new Float32Array(width * height)
  for (let i = 0; i < result.length; i++) result[i] = shape[i] === value ? 0 : FAR
  const longest = Math.max(width, height)
  const line = new Float64Array(longest)
  const place = new Int32Array(longest)
  const edge = new Float64Array(longest + 1)
  const pass = (start: number, stride: number, n: number, mm: number) => {
    for (let i = 0; i < n; i++) line[i] = result[start + i * stride]
    let k = 0
    place[0] = 0
    edge[0] = -Infinity
    edge[1] = Infinity
    const meet = (a: number, b: number) => (line[b] - line[a] + mm * mm * (b * b - a * a)) / (2 * mm * mm * (b - a))
    for (let q = 1; q < n; q++) {
      let s = meet(place[k], q)
      while (s <= edge[k]) {
        k--
        s = meet(place[k], q)
      }
      k++
      place[k] = q
      edge[k] = s
      edge[k + 1] = Infinity
    }
    k = 0
    for (let q = 0; q < n; q++) {
      while (edge[k + 1] < q) k++
      result[start + q * stride] = Math.min(FAR, (mm * (q - place[k])) ** 2 + line[place[k]])
    }
  }
  for (let x = 0; x < width; x++) pass(x, width, height, step[1])
  for (let y = 0; y < height; y++) pass(y * width, 1, width, step[0])
  return result
}

/** The gaps between painted slices: pairs of painted ones with unpainted ones between them. */
export function gaps(painted: boolean[]): [number, number][] {
  const found: [number, number][] = []
  let last = -1
  painted.forEach((here, index) => {
    if (!here) return
    if (last >= 0 && index - last > 1) found.push([last, index])
    last = index
  })
  return found
}

/**
 * The shapes between two shapes.
 *
 * @param between how many slices lie between them.
 * @returns one shape for each of these, in order.
 */
export function interpolate(
  first: Uint8Array, second: Uint8Array, width: number, height: number, step: [number, number], between: number,
): Uint8Array[] {
  const a = signedDistance(first, width, height, step)
  const b = signedDistance(second, width, height, step)
  return Array.from({ length: between }, (_, i) => {
    const share = (i + 1) / (between + 1)
    const shape = new Uint8Array(width * height)
    for (let p = 0; p < shape.length; p++) shape[p] = (1 - share) * a[p] + share * b[p] > 0 ? 1 : 0
    return shape
  })
}

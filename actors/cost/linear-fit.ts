/**
 * A time as a sum of features, each times a coefficient that is learnt: least squares around a prior, in which newer
 * measurements weigh more and all of them fade with time, so that what is not used any more comes to be believed as little as
 * before the first. Pure values: a fit is replaced by the next, and may be kept, sent or replayed on a virtual clock.
 */

/** What is believed of a coefficient before anything was measured, and how far off that may be (a standard deviation). */
export interface Belief {
  readonly value: number
  readonly deviation: number
}

export interface Fading {
  /** After so many newer ones a measurement weighs half … */
  readonly halfLifeSamples: number
  /** … and after this long. */
  readonly halfLifeMs: number
}

export interface LinearFit {
  /** Sums of w x x' and of w x y, weights w as of `atMs`. */
  readonly gram: ReadonlyArray<ReadonlyArray<number>>
  readonly moment: ReadonlyArray<number>
  readonly atMs: number
}

/** Measurements differ by about this share of themselves, whatever they measure. */
const noise = 0.2
/** A clock does not tell less apart. */
const leastMs = 0.1

export const emptyFit = (features: number, atMs: number): LinearFit => ({
  gram: Array.from({ length: features }, () => Array.from({ length: features }, () => 0)),
  moment: Array.from({ length: features }, () => 0),
  atMs,
})

const faded = ({ gram, moment, atMs }: LinearFit, factor: number, nowMs: number): LinearFit => ({
  gram: gram.map((row) => row.map((sum) => sum * factor)),
  moment: moment.map((sum) => sum * factor),
  atMs: Math.max(atMs, nowMs),
})

const agedTo = (fit: LinearFit, { halfLifeMs }: Fading, nowMs: number): LinearFit => faded(fit, 2 ** (-Math.max(0, nowMs - fit.atMs) / halfLifeMs), nowMs)

/** The fit with one more measurement: `ms` for these features. */
export const withSample = (fit: LinearFit, features: ReadonlyArray<number>, ms: number, fading: Fading, nowMs: number): LinearFit => {
  const { gram, moment, atMs } = faded(agedTo(fit, fading, nowMs), 2 ** (-1 / fading.halfLifeSamples), nowMs)
  const weight = 1 / (noise * Math.max(ms, leastMs)) ** 2
  return {
    gram: gram.map((row, i) => row.map((sum, j) => sum + weight * features[i]! * features[j]!)),
    moment: moment.map((sum, i) => sum + weight * features[i]! * ms),
    atMs,
  }
}

/** The coefficients as of now, none of them negative. */
export const coefficientsOf = (fit: LinearFit, prior: ReadonlyArray<Belief>, fading: Fading, nowMs: number): ReadonlyArray<number> => {
  const { gram, moment } = agedTo(fit, fading, nowMs)
  const matrix = gram.map((row, i) => row.map((sum, j) => sum + (i === j ? prior[i]!.deviation ** -2 : 0)))
  const right = moment.map((sum, i) => sum + prior[i]!.value * prior[i]!.deviation ** -2)
  const found = prior.map(() => 0)
  // What would be negative is 0, and the others are found again without it.
  for (let free = prior.map((_, i) => i); free.length > 0; ) {
    const solved = solve(free.map((i) => free.map((j) => matrix[i]![j]!)), free.map((i) => right[i]!))
    if (solved.every((value) => value >= 0)) {
      free.forEach((i, place) => (found[i] = solved[place]!))
      break
    }
    free = free.filter((_, place) => solved[place]! > Math.min(...solved))
  }
  return found
}

/** Gauss's elimination; the matrix is symmetric and positive definite, so that no pivot is 0. */
const solve = (matrix: ReadonlyArray<ReadonlyArray<number>>, right: ReadonlyArray<number>): ReadonlyArray<number> => {
  const rows = matrix.map((row, i) => [...row, right[i]!])
  const size = rows.length
  for (let i = 0; i < size; i++) {
    for (let below = i + 1; below < size; below++) {
      const factor = rows[below]![i]! / rows[i]![i]!
      for (let j = i; j <= size; j++) rows[below]![j]! -= factor * rows[i]![j]!
    }
  }
  const found = Array.from({ length: size }, () => 0)
  for (let i = size - 1; i >= 0; i--) {
    const known = found.reduce((sum, value, j) => (j > i ? sum + rows[i]![j]! * value : sum), 0)
    found[i] = (rows[i]![size]! - known) / rows[i]![i]!
  }
  return found
}

/**
 * What a bench without options may take, handed out piece by piece. Who needs less than his share leaves more to those after him,
 * and what costs more than its share on a slow machine is measured once and leaves less.
 */

/** Less than the 45 seconds that are promised, for the program's start and what goes on when time is up. */
const benchMs = 36_000

export class TimeBudget {
  readonly #endsAtMs: number

  constructor(totalMs: number = benchMs) {
    this.#endsAtMs = performance.now() + totalMs
  }

  get leftMs(): number {
    return Math.max(0, this.#endsAtMs - performance.now())
  }

  /** So much of what is left, and at most so long. */
  share(part: number, mostMs: number = Number.POSITIVE_INFINITY): number {
    return Math.min(this.leftMs * part, mostMs)
  }
}

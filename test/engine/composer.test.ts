/** What goes into a step. */
import { describe, expect, it } from "vitest"
import { compose, type Budget } from "../../actors/engine/composer.ts"
import { Group, type GenerationSpec, type Sequence } from "../../actors/engine/sequence.ts"
import { specOf } from "../support/generation.ts"

const upTo = (count: number): Array<number> => Array.from({ length: count }, (_, i) => i)
const budget: Budget = { tokens: 20, mixedTokens: 12, outputs: 10 }

interface State {
  readonly prompt: number
  readonly computed?: number
  /** Tokens drawn; more than none: the prompt is done. */
  readonly drawn?: number
  readonly paused?: boolean
  readonly begun?: boolean
  readonly spec?: Partial<GenerationSpec>
}

let arrivals = 0
const running = (state: State): Sequence => {
  const sink = { reserved: () => {}, token: () => {}, ended: () => {}, failed: () => {}, writable: () => state.paused !== true }
  const group = new Group(specOf(`g${arrivals}`, upTo(state.prompt), state.spec), arrivals++, sink)
  if (state.begun ?? true) group.prefill = { scores: () => {}, token: () => {}, done: () => {}, failed: () => {} }
  const sequence = group.sequences[0]!
  for (let i = 0; i < (state.drawn ?? 0); i++) sequence.append(7)
  group.prefillDone = (state.drawn ?? 0) > 0
  sequence.computed = state.computed ?? (group.prefillDone ? sequence.length - 1 : 0)
  sequence.running = true
  return sequence
}
const decoding = (more: Partial<State> = {}) => running({ prompt: 5, drawn: 3, ...more })
const composed = (sequences: ReadonlyArray<Sequence>, limits: Partial<Budget> = {}) => compose(sequences, { ...budget, ...limits }).map(({ sequence, tokens }) => [sequences.indexOf(sequence), tokens])

describe("a step", () => {
  it("takes every decode row first, then prefill in order of arrival up to the smaller budget", () => {
    expect(composed([running({ prompt: 8 }), decoding(), running({ prompt: 30 }), decoding()])).toEqual([[1, 1], [3, 1], [0, 8], [2, 2]])
  })

  it("gives prefill the whole budget where nobody decodes", () => {
    expect(composed([running({ prompt: 8 }), running({ prompt: 30 })])).toEqual([[0, 8], [1, 12]])
    expect(composed([running({ prompt: 100, computed: 60 })])).toEqual([[0, 20]])
  })

  it("leaves out reservations that have not begun and sequences whose reader is behind, and nobody else", () => {
    expect(composed([running({ prompt: 8, begun: false }), decoding({ paused: true }), decoding(), running({ prompt: 4, paused: true })])).toEqual([[2, 1], [3, 4]])
    expect(composed([decoding({ paused: true, computed: 2 })])).toEqual([])
  })

  it("recomputes a preempted sequence like a prompt", () => {
    expect(composed([decoding({ computed: 0 }), decoding()])).toEqual([[1, 1], [0, 8]])
  })

  it("stays within the rows that may be sampled or scored", () => {
    const scored = (prompt: number) => running({ prompt, spec: { promptLogprobs: true } })
    expect(composed([decoding(), decoding(), scored(30)])).toEqual([[0, 1], [1, 1], [2, 7]]) // 2 + 7 + its draw
    expect(composed([running({ prompt: 3, spec: { choices: 9 } }), running({ prompt: 3, spec: { choices: 2 } })])).toEqual([[0, 3]])
    expect(composed(upTo(14).map(() => decoding()))).toEqual(upTo(10).map((i) => [i, 1]))
  })

  it("never lets more decode rows than the budget keep a later prompt out for ever: it comes when there is room", () => {
    const crowd = [...upTo(9).map(() => decoding()), running({ prompt: 6 })]
    expect(composed(crowd)).toEqual([...upTo(9).map((i) => [i, 1]), [9, 3]])
  })

  it("computes a prompt without draws where no tokens are asked for", () => {
    expect(composed([running({ prompt: 9, spec: { maxTokens: 0, choices: 5 } })], { outputs: 0 })).toEqual([[0, 9]])
  })

  it("is empty when nothing runs", () => {
    expect(composed([])).toEqual([])
  })
})

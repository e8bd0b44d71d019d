/**
 * Same bits, as a property: whatever a model's shapes and types, a crowd of sequences in batches and chunks of random size, in
 * scattered blocks of any size, on any number of threads and any instruction set, some of them after a prefix that another one
 * computes meanwhile, gets the logits that the reference gives each of them alone.
 */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import fc from "fast-check"
import { afterAll, beforeAll, expect, it } from "vitest"
import { bestInstructionSet, Engine, instructionSets, kvDtypes } from "../../kernels/index.ts"
import { firstDifference, sequenceLogits, shuffled, stepLogits, upTo, type Run } from "../support/engine-runs.ts"
import { matrixNames, randomNumbers, writeTinyModel } from "../support/tiny-model.ts"

const available = instructionSets.slice(0, instructionSets.indexOf(bestInstructionSet()) + 1)
const plain = ["F32", "F16", "BF16"] as const
const blocks32 = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"] as const
const blocks256 = ["Q4_K", "Q5_K", "Q6_K"] as const
const mostRows = 640
const mostChunk = 512
const vocabulary = 275

/** Sizes of everything, and a seed for what is drawn of them. */
const scenario = fc.record({
  seed: fc.nat(1 << 30),
  // In units that the types of the matrices ask for: 2 inputs, 32 or 256.
  unit: fc.constantFrom(2, 32, 32, 32, 256),
  hidden: fc.integer({ min: 1, max: 4 }),
  ffn: fc.integer({ min: 1, max: 4 }),
  kvHeads: fc.integer({ min: 1, max: 3 }),
  group: fc.integer({ min: 1, max: 5 }),
  // Of any size where nothing is quantised that reads them.
  headDim: fc.constantFrom(8, 16, 24, 32, 64, 80),
  kvDtype: fc.constantFrom(...kvDtypes),
  isa: fc.constantFrom(...available),
  threads: fc.integer({ min: 1, max: 4 }),
  blockTokens: fc.integer({ min: 1, max: 40 }),
  sequences: fc.integer({ min: 1, max: 32 }),
  longest: fc.constantFrom(20, 140, 300, 600),
})
type Scenario = typeof scenario extends fc.Arbitrary<infer A> ? A : never

interface Sequence {
  readonly tokens: ReadonlyArray<number>
  readonly table: ReadonlyArray<number>
  /** Tokens whose blocks are the first sequence's. */
  readonly shared: number
  done: number
  readonly found: Array<Buffer>
}

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-shapes-"))
})
afterAll(() => rm(folder, { recursive: true, force: true }))

const write = async (path: string, { seed, unit, kvHeads, group, headDim, ...of }: Scenario): Promise<void> => {
  const random = randomNumbers(seed)
  const heads = kvHeads * group
  const fits = (inputs: number) => [...plain, ...(inputs % 32 === 0 ? blocks32 : []), ...(inputs % 256 === 0 ? blocks256 : [])]
  const [hidden, ffn] = [of.hidden * unit * (unit === 2 ? 21 : 1), of.ffn * unit * (unit === 2 ? 25 : 1)]
  const types = Object.fromEntries(matrixNames.map((name) => {
    const allowed = fits(name === "attn_output" ? heads * headDim : name === "ffn_down" ? ffn : hidden)
    return [name, allowed[Math.floor(random() * allowed.length)]!]
  }))
  await writeTinyModel(path, { layers: 1, hidden, ffn, heads, kvHeads, headDim, vocabulary, context: 1024, types, tied: random() < 0.5, seed })
}

const crowd = ({ seed, blockTokens, sequences, longest }: Scenario): { readonly all: ReadonlyArray<Sequence>; readonly blocks: number } => {
  const random = randomNumbers(seed + 1)
  const tokens = (count: number) => upTo(count).map(() => Math.floor(random() * vocabulary))
  const first = tokens(longest)
  const plans = upTo(sequences).map((i) => {
    // Some begin like the first; the last token of a prompt is always computed. The others are short: a few long ones are enough.
    const shared = i > 0 && random() < 0.3 ? Math.floor(random() * (longest / blockTokens)) * blockTokens : 0
    return { shared, tokens: i === 0 ? first : [...first.slice(0, shared), ...tokens(1 + Math.floor(random() * 40))] }
  })
  const size = (count: number) => Math.ceil(count / blockTokens)
  const blocks = plans.reduce((sum, plan) => sum + size(plan.tokens.length), 0)
  const free = shuffled(upTo(blocks), random)
  const own = (count: number) => free.splice(0, count)
  const tables: Array<Array<number>> = []
  for (const plan of plans) tables.push([...(tables[0] ?? []).slice(0, plan.shared / blockTokens), ...own(size(plan.tokens.length) - plan.shared / blockTokens)])
  return { all: plans.map((plan, i) => ({ ...plan, table: tables[i]!, done: plan.shared, found: [] })), blocks }
}

/** Steps of some sequences and some rows of each, until all are done. */
const runAll = async (engine: Engine, all: ReadonlyArray<Sequence>, random: () => number): Promise<void> => {
  while (all.some(({ done, tokens }) => done < tokens.length)) {
    const whole = random() < 0.5 // a step of decode: one row of everybody
    let room = mostRows
    const chosen: Array<Run & { readonly sequence: Sequence }> = []
    for (const sequence of shuffled(all, random)) {
      const left = sequence.tokens.length - sequence.done
      if (left === 0 || sequence.shared > all[0]!.done || room === 0 || (!whole && random() < 0.3)) continue
      const rows = Math.min(left, room, whole ? 1 : 1 + Math.floor(random() ** 3 * mostChunk))
      room -= rows
      chosen.push({ tokens: sequence.tokens, from: sequence.done, to: sequence.done + rows, table: sequence.table, sequence })
    }
    if (chosen.length === 0) continue
    const logits = await stepLogits(engine, chosen)
    for (const [i, { sequence, to }] of chosen.entries()) {
      sequence.found.push(...logits[i]!)
      sequence.done = to
    }
  }
}

it("a crowd in batches of 1 to 32 and chunks of 1 to 512 gets the bits that each gets alone", async () => {
  let run = 0
  await fc.assert(
    fc.asyncProperty(scenario, async (chosen) => {
      const path = join(folder, `${run++}.gguf`)
      await write(path, chosen)
      const { kvDtype, isa, threads, blockTokens } = chosen
      const { all, blocks } = crowd(chosen)
      const engine = await Engine.load({ path, blocks, blockTokens, kvDtype, isa, threads, maxRows: mostRows, maxOutputs: mostRows })
      await runAll(engine, all, randomNumbers(chosen.seed + 2)).finally(() => engine.close())
      // Another one of its own for each: nothing of the others is left there.
      const alone = await Engine.load({ path, blocks: 40, blockTokens: 16, kvDtype, isa: "reference", threads: 2, maxRows: mostRows, maxOutputs: mostRows })
      try {
        for (const [i, { tokens, shared, found }] of all.entries()) {
          if (shared > 0 && tokens.length > 150) continue // the reference takes its time, and these have the first one's beginning
          const expected = await sequenceLogits(alone, tokens, upTo(40))
          expect(firstDifference(found, expected.slice(shared)), `sequence ${i}`).toBe(-1)
        }
      } finally {
        await alone.close()
        await rm(path)
      }
    }),
    { numRuns: 16, seed: 5, endOnFailure: true },
  )
})

/** Blocks over a long life of an engine: whatever is done with them, and in whatever order, none is lost or counted twice. */
import { expect, it } from "vitest"
import { Engine } from "../../actors/engine/engine.ts"
import type { HeldBlocks } from "../../actors/engine/block-holds.ts"
import type { ReturningKv } from "../../actors/engine/missing-kv.ts"
import type { BlockHash } from "../../actors/messages/hashes.ts"
import { crc32c } from "../../kernels/index.ts"
import { FakeKernels, fakeToken } from "../support/fake-kernels.ts"
import { Generation, specOf, turn } from "../support/generation.ts"
import { randomNumbers } from "../support/tiny-model.ts"

const operations = 100_000
const blockTokens = 4
const oneBlock = (place: number) => ({ firstLayer: 0, layers: 1, firstBlock: place, blocks: 1 })

it(`no block and no sampler is lost over ${operations} random operations`, async () => {
  const random = randomNumbers(77)
  const below = (bound: number) => Math.floor(random() * bound)
  const pick = <A>(list: ReadonlyArray<A>): A | undefined => list[below(list.length)]
  const kernels = new FakeKernels({ blocks: 11, blockTokens, context: 28 })
  const returning: Array<ReturningKv> = []
  const stored = new Map<BlockHash, Uint8Array>()
  const engine = new Engine(kernels, {
    name: "worker w0",
    maxBatch: 8,
    budget: { tokens: 12, mixedTokens: 8, outputs: 12 },
    onReturn: (missing) => void returning.push(missing),
  })
  const reserved: Array<Generation> = []
  const begun: Array<Generation> = []
  const held: Array<HeldBlocks> = []
  const done = { reserve: 0, prefill: 0, import: 0, adopt: 0, cancel: 0, finish: 0, pause: 0, resume: 0, hold: 0, release: 0, bring: 0 }
  let number = 0

  const take = <A>(list: Array<A>): A | undefined => list.splice(below(list.length), 1)[0]
  const settle = (missing: ReturningKv) => {
    let blocks = 0
    try {
      for (const hash of random() < 0.7 ? missing.hashes : []) {
        const bytes = stored.get(hash)
        if (bytes === undefined) break
        missing.blocks.take(oneBlock(missing.from + blocks), bytes, 0, crc32c(bytes, 0))
        blocks++
      }
      missing.accept(blocks)
    } catch {
      // It has given its blocks away once more, or was cancelled.
    }
    missing.settle()
  }
  /** Its whole KV comes from elsewhere, with the first token of each choice. */
  const adopt = (generation: Generation) => {
    const { id, prompt, choices, sampling } = generation.spec
    const { from } = engine.missingBlocks(id)
    for (let place = from; place < engine.neededBlocks(id); place++) {
      const tokens = new Int32Array(blockTokens).fill(-1)
      tokens.set(prompt.subarray(place * blockTokens, (place + 1) * blockTokens))
      const bytes = new Uint8Array(tokens.buffer)
      engine.reserved(id).take(oneBlock(place), bytes, 0, crc32c(bytes, 0))
    }
    generation.prefillDone = true
    generation.tokens.forEach((tokens, choice) => tokens.push(fakeToken(prompt, { seed: sampling.seed, choice })))
    engine.adopt(id, generation.tokens.map(([token], choice) => ({ choice, index: 0, token: token!, logprob: 0, topTokens: [], topLogprobs: [], finish: "" })))
    expect(choices).toBe(generation.tokens.length)
  }
  /** One operation of this kind; false where there is nothing to do it with. */
  const act: Record<keyof typeof done, () => boolean> = {
    reserve: () => {
      if (reserved.length + begun.length >= 8) return false
      const choices = random() < 0.2 ? 3 : 1
      const prompt = Array.from({ length: 1 + below(20) }, (_, i) => 100 * (i < 8 ? 0 : below(2)) + 10 + i)
      reserved.push(new Generation(engine, specOf(`g${number++}`, prompt, { choices, maxTokens: 2 + below(6), sampling: { ...specOf("", []).sampling, seed: below(4) } })))
      return true
    },
    prefill: () => {
      const generation = pick(reserved.filter(({ over, isReserved }) => !over && isReserved))
      if (generation === undefined) return false
      reserved.splice(reserved.indexOf(generation), 1)
      begun.push(generation)
      generation.prefill()
      return true
    },
    adopt: () => {
      const generation = pick(reserved.filter(({ over, isReserved }) => !over && isReserved))
      if (generation === undefined) return false
      reserved.splice(reserved.indexOf(generation), 1)
      begun.push(generation)
      adopt(generation)
      return true
    },
    import: () => {
      const id = pick(reserved.filter(({ over, isReserved }) => !over && isReserved))?.spec.id
      if (id === undefined) return false
      const { from, hashes } = engine.missingBlocks(id)
      const bytes = hashes[0] === undefined ? undefined : stored.get(hashes[0])
      if (bytes === undefined) return false
      engine.reserved(id).take(oneBlock(from), bytes, 0, crc32c(bytes, 0))
      return engine.acceptPrefix(id, from, 1)
    },
    cancel: () => {
      const generation = random() < 0.03 ? pick([...reserved, ...begun]) : undefined
      if (generation === undefined) return false
      engine.cancel(generation.spec.id)
      return true
    },
    finish: () => {
      const generation = random() < 0.1 ? pick(begun) : undefined
      if (generation === undefined) return false
      engine.finish(generation.spec.id, below(generation.spec.choices))
      return true
    },
    pause: () => {
      const generation = random() < 0.2 ? pick(begun) : undefined
      if (generation === undefined) return false
      generation.writable = false
      return true
    },
    resume: () => {
      const paused = begun.filter(({ writable }) => !writable)
      for (const generation of paused) generation.writable = true
      engine.resume()
      return paused.length > 0
    },
    hold: () => {
      if (held.length >= 2) return false
      const found = engine.hold(engine.blocks.knownHashes().filter(() => random() < 0.3))
      found.hashes.forEach((hash, place) => {
        const bytes = new Uint8Array(kernels.info.blockBytes)
        found.at([place]).write(oneBlock(0), bytes, 0, 0)
        stored.set(hash, bytes)
      })
      held.push(found)
      return true
    },
    release: () => {
      const found = take(held)
      found?.release()
      return found !== undefined
    },
    bring: () => {
      const missing = take(returning)
      if (missing !== undefined) settle(missing)
      return missing !== undefined
    },
  }
  const kinds = Object.keys(act) as Array<keyof typeof done>
  for (let count = 0; count < operations; ) {
    const kind = pick(kinds)!
    if (act[kind]()) {
      done[kind]++
      count++
    }
    if (random() < 0.04) {
      await turn()
      for (const list of [reserved, begun]) list.splice(0, list.length, ...list.filter(({ over }) => !over))
    }
    if (random() < 0.003) engine.checkInvariants()
  }
  expect(Math.min(...Object.values(done))).toBeGreaterThan(50)
  expect(engine.load.preemptions).toBeGreaterThan(100)

  for (const { spec } of [...reserved, ...begun]) engine.cancel(spec.id)
  for (const found of held) found.release()
  for (const missing of returning) missing.settle()
  while (engine.requestIds.length > 0) await turn()
  engine.checkInvariants()
  expect(engine.blocks.available).toBe(engine.blocks.total)
  expect(kernels.samplers.size).toBe(0)
  await engine.close()
}, 120_000)

/**
 * What a move costs a stream: a decode worker is drained in the middle of some, again and again, and the longest pause of each
 * stream stands beside its usual time between tokens. `node --import tsx test/bench/moving.ts [STREAMS] [ROUNDS]`, with the model that
 * `npm start` has fetched.
 */
import { Effect } from "effect"
import { subject } from "../../actors/messages/subjects.ts"
import { Configure, Drain } from "../../actors/messages/worker.ts"
import { Cluster } from "../support/cluster.ts"
import { realModelPath } from "../support/model.ts"

const path = realModelPath()
if (path === undefined) throw new Error("there is no model yet; start Penstock once")
const streams = Number(process.argv[2] ?? 8)
const rounds = Number(process.argv[3] ?? 3)
const story = "The water comes down the penstock and turns the wheel, and the wheel turns the stones that grind the corn. ".repeat(12)

const cluster = await Cluster.start({
  model: { path, name: "smollm2-135m", sha256: "b".repeat(64) },
  change: (topology) => ({
    ...topology,
    workers: (["p0", "d0", "d1"] as const).map((name) => ({ ...topology.workers[0]!, name, roles: [name === "p0" ? ("prefill" as const) : ("decode" as const)], kv: { ...topology.workers[0]!.kv, blocks: 1024 } })),
  }),
})
const ask = (worker: string) => ({
  roles: (roles: ReadonlyArray<"decode">) => Effect.runPromise(cluster.link.ask(Configure, subject(cluster.node.namespace, "worker", worker, Configure.verb), { roles }, { hop: worker })),
  drain: () => Effect.runPromise(cluster.link.ask(Drain, subject(cluster.node.namespace, "worker", worker, Drain.verb), { deadlineMs: 10_000 }, { hop: worker, deadlineMs: 15_000 })),
})
const quantile = (values: ReadonlyArray<number>, share: number) => [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(share * values.length))]!

/** Times between the tokens of each stream. */
const run = async (round: string, disturb: () => Promise<unknown>): Promise<ReadonlyArray<ReadonlyArray<number>>> => {
  let begun = 0
  const gaps = Array.from({ length: streams }, (): Array<number> => [])
  let disturbing: Promise<unknown> | undefined
  await Promise.all(
    gaps.map(async (of, i) => {
      let last: number | undefined
      await cluster.generate({ prompt: `${round} ${i} ${story}`, maxTokens: 120, sampling: { temperature: i % 2, seed: i } }, (tokens) => {
        const nowMs = performance.now()
        if (last !== undefined) of.push(nowMs - last)
        last = nowMs
        if (tokens === 40 && ++begun === streams) disturbing = disturb()
      })
    }),
  )
  await disturbing
  return gaps
}

const both = { still: [] as Array<number>, moved: [] as Array<number>, usual: [] as Array<number> }
let moved = 0
for (let i = 0; i < rounds; i++) {
  await ask("d0").roles(["decode"])
  await ask("d1").roles([])
  const still = await run(`still ${i}`, async () => {})
  both.still.push(...still.map((gaps) => Math.max(...gaps.slice(40))))
  const disturbed = await run(`moved ${i}`, async () => {
    await ask("d1").roles(["decode"])
    moved += (await ask("d0").drain()).moved
  })
  both.moved.push(...disturbed.map((gaps) => Math.max(...gaps.slice(39))))
  both.usual.push(...still.flatMap((gaps) => gaps.slice(40)))
}
const ms = (value: number) => `${value.toFixed(0)} ms`
console.log(`${streams} streams, ${rounds} rounds, ${moved} moves; usual time between tokens ${ms(quantile(both.usual, 0.5))}`)
console.log(`longest pause of a stream, undisturbed: p50 ${ms(quantile(both.still, 0.5))}, p99 ${ms(quantile(both.still, 0.99))}`)
console.log(`longest pause of a stream, moved:       p50 ${ms(quantile(both.moved, 0.5))}, p99 ${ms(quantile(both.moved, 0.99))}`)
await cluster.stop()

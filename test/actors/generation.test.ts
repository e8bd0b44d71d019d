/** Generations: what makes one, and that two of them on one bus are strangers. */
import { Effect } from "effect"
import { expect, test } from "vitest"
import { generationOf, namespaceIn } from "../../actors/node/generation.ts"
import { Tokenize } from "../../actors/messages/request.ts"
import { anyId, namespaceOf, subject } from "../../actors/messages/subjects.ts"
import { announce } from "../../actors/presence/announce.ts"
import { Members } from "../../actors/presence/members.ts"
import { actor, onAsk } from "../../actors/runtime/actor.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { packTokens, unpackTokens } from "../../actors/messages/tokens.ts"
import { loadTopology } from "../../config/load-topology.ts"
import { testScope } from "../support/scoped.ts"

test("model, type of KV and block size make a generation, and nothing else does", () => {
  const parts = { modelDigest: "a".repeat(64), dtype: "f16", blockTokens: 16 } as const
  const generations = [parts, { ...parts, modelDigest: "b".repeat(64) }, { ...parts, dtype: "int8" as const }, { ...parts, blockTokens: 32 }].map(generationOf)
  expect(new Set(generations).size).toBe(4)
  for (const generation of generations) expect(generation).toMatch(/^[0-9a-f]{8}$/)
  const { topology } = loadTopology("config/topologies/single.yaml")
  const model = { name: "m", aliases: [], path: "/m.gguf", sha256: parts.modelDigest }
  const namespace = namespaceIn({ topology, model })
  expect(namespace).toBe(namespaceOf("main", generations[0]!))
  const changed = { ...topology, workers: topology.workers.map((worker) => ({ ...worker, maxBatch: 1, threads: 1, roles: [...worker.roles].reverse() })), bus: { nats: { spawn: true as const } } }
  expect(namespaceIn({ topology: changed, model: { ...model, name: "another", path: "/n.gguf" } })).toBe(namespace)
})

test("actors of two generations on one bus neither serve nor see each other", async () => {
  const bus = new MemoryBus()
  const scope = testScope()
  const [older, newer] = [namespaceOf("main", "0000000a"), namespaceOf("main", "0000000b")]
  const members = await scope.start(Effect.all([Members.listen(bus, older), Members.listen(bus, newer)]))
  const serve = (namespace: string, id: string, token: number) =>
    Effect.gen(function* () {
      const link = new Link(bus, `request ${id}`, 1)
      yield* actor(link, [onAsk(Tokenize, [{ subject: subject(namespace, "request", anyId, Tokenize.verb), queue: "request" }], () => Effect.succeed({ tokens: packTokens([token]) }))])
      yield* announce({ link, namespace, kind: "request", id })
    })
  await scope.start(serve(older, "r0", 1))
  const ask = (namespace: string) => Effect.runPromise(new Link(bus, "gateway", 1).ask(Tokenize, subject(namespace, "request", anyId, Tokenize.verb), { content: "" }, { hop: "request" }).pipe(Effect.map(({ tokens }) => [...unpackTokens(tokens, "tokens")])))
  await expect(ask(newer)).rejects.toMatchObject({ code: "unavailable" })
  await scope.start(serve(newer, "r1", 2))
  for (let i = 0; i < 4; i++) {
    expect(await ask(older)).toEqual([1])
    expect(await ask(newer)).toEqual([2])
  }
  expect(members.map(({ all }) => all.map(({ id }) => id))).toEqual([["r0"], ["r1"]])
  await scope.close()
  await bus.close()
})

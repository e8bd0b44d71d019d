/** The presets that no other test starts, as they stand in config/topologies, but for a tiny model and a free port. */
import { expect, it } from "vitest"
import { startNode, streamCompletion } from "../support/start-node.ts"

const request = { prompt: "Once upon a time there was a lighthouse, and in it", max_tokens: 24, ignore_eos: true, temperature: 1, seed: 11 }

interface Workers {
  readonly workers: ReadonlyArray<{ readonly name: string; readonly roles: ReadonlyArray<string>; readonly pid: number }>
}

it("each preset of this machine starts its workers with their roles, and gives the tokens of single", async () => {
  const answers = []
  for (const [preset, workers] of [
    ["single", ["w0 prefill decode"]],
    ["two-prefill-one-decode", ["d0 decode", "p0 prefill", "p1 prefill"]],
    ["one-prefill-two-decode", ["d0 decode", "d1 decode", "p0 prefill"]],
    ["hybrid", ["p0 prefill", "w0 prefill decode"]],
  ] as const) {
    const node = await startNode({ preset })
    try {
      const found = ((await (await fetch(`${node.url}/actors`)).json()) as Workers).workers
      expect(found.map(({ name, roles }) => [name, ...roles].join(" ")).sort(), preset).toEqual(workers)
      answers.push(await streamCompletion(node, request))
    } finally {
      await node.stop()
    }
  }
  expect(answers[0]!.tokens).toHaveLength(24)
  for (const answer of answers) expect(answer).toEqual(answers[0])
})

import { expect, it } from "vitest"
import { startNode, streamCompletion } from "../support/start-node.ts"

it("the only request actor killed mid-stream: the gateway goes on with what it has delivered, and the client sees the same text", async () => {
  const node = await startNode({ preset: "disaggregated" })
  try {
    const request = { prompt: "A long story about a lighthouse keeper and the sea:", max_tokens: 400, ignore_eos: true, temperature: 1, seed: 7 }
    const undisturbed = await streamCompletion(node, request)
    const { actors } = (await (await fetch(`${node.url}/actors`)).json()) as { actors: ReadonlyArray<{ kind: string; pid: number }> }
    const { pid } = actors.find(({ kind }) => kind === "request")!
    expect(await streamCompletion(node, request, () => process.kill(pid, "SIGKILL"))).toEqual(undisturbed)
  } finally {
    await node.stop()
  }
}, 120_000)

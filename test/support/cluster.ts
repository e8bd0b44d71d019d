/** The actors of a topology on a memory bus, spoken to over the bus as a gateway does; without HTTP. */
import { Effect } from "effect"
import { packHashes } from "../../actors/messages/hashes.ts"
import { Have } from "../../actors/messages/kv-store.ts"
import { decodeGenerateEvent, Generate, type FinishReason, type GenerateMessage, type TokenLogprob, type Usage } from "../../actors/messages/request.ts"
import { defaultSampling } from "../../actors/messages/sampling.ts"
import { anyId, subject } from "../../actors/messages/subjects.ts"
import { packTokens, unpackTokens } from "../../actors/messages/tokens.ts"
import { Link } from "../../actors/runtime/link.ts"
import type { StreamReader } from "../../actors/runtime/stream-reader.ts"
import { startNode, type StartedNode, type StartNodeOptions } from "./start-node.ts"
import { until } from "./scoped.ts"

export interface Answer {
  readonly tokens: Array<Array<number>> // [choices]
  readonly texts: Array<string>
  readonly finishes: Array<FinishReason | undefined>
  readonly logprobs: Array<Array<TokenLogprob>>
  readonly promptScores: Array<TokenLogprob>
  readonly promptTokens: ReadonlyArray<number>
  readonly usage: Usage
}

export type Asked = Partial<Omit<GenerateMessage, "prompt" | "sampling" | "delivered">> & {
  readonly prompt: string | ReadonlyArray<number>
  readonly sampling?: Partial<GenerateMessage["sampling"]>
  readonly delivered?: ReadonlyArray<ReadonlyArray<number>>
}

let requests = 0

export const messageOf = ({ prompt, sampling, delivered, ...more }: Asked): GenerateMessage => ({
  requestId: `request-${requests++}`,
  attempt: 0,
  tenant: "tests",
  choices: 1,
  maxTokens: 12,
  stop: [],
  stopTokenIds: [],
  ignoreEos: true,
  promptLogprobs: false,
  ...more,
  prompt: typeof prompt === "string" ? { kind: "text", text: prompt } : { kind: "tokens", tokens: packTokens(prompt) },
  sampling: { ...defaultSampling, temperature: 0, seed: 1, ...sampling },
  delivered: (delivered ?? []).map(packTokens),
})

/** What a test needs of a topology that runs in this process. */
export type ClusterNode = Pick<StartedNode, "bus" | "namespace" | "workers" | "stop">

export class Cluster {
  readonly node: ClusterNode
  readonly link: Link

  constructor(node: ClusterNode) {
    this.node = node
    this.link = new Link(node.bus, "test", 1)
  }

  static async start(options: StartNodeOptions = {}): Promise<Cluster> {
    return new Cluster(await startNode(options))
  }

  stop(): Promise<void> {
    return this.node.stop()
  }

  /** Workers that serve now fetch every prefix that they can: they measure no steps, which a model this small has too quick ones of. */
  fetchAlways(): this {
    for (const { worker } of this.node.workers.values()) worker.costs.prefilled = () => {}
    return this
  }

  /** Workers that serve now compute every prefix that their pools lack: to them it takes no time. */
  computeAlways(): this {
    for (const { worker } of this.node.workers.values()) Object.defineProperty(worker.costs, "prefill", { value: { stepMs: 0, tokenMs: 0, pairMs: 0 } })
    return this
  }

  open(asked: Asked, windowFrames?: number): Promise<StreamReader> {
    const to = subject(this.node.namespace, "request", anyId, Generate.verb)
    return Effect.runPromise(this.link.open(Generate, to, messageOf(asked), { hop: "request", windowFrames }))
  }

  /** The whole answer, with what was delivered before in front. Rejects with a Fault. */
  async generate(asked: Asked, each: (tokensSoFar: number) => void = () => {}): Promise<Answer> {
    const choices = asked.choices ?? 1
    const lists = <A>(): Array<Array<A>> => Array.from({ length: choices }, () => [])
    const tokens = Array.from({ length: choices }, (_, choice) => [...(asked.delivered?.[choice] ?? [])])
    const [texts, finishes, logprobs] = [tokens.map(() => ""), tokens.map((): FinishReason | undefined => undefined), lists<TokenLogprob>()]
    const promptScores: Array<TokenLogprob> = []
    let promptTokens: ReadonlyArray<number> = []
    let usage: Usage | undefined
    let count = 0
    for await (const frame of await this.open(asked)) {
      const event = decodeGenerateEvent(frame)
      if (event.type === "prompt") promptTokens = [...unpackTokens(event.tokens, "prompt")]
      else if (event.type === "scores") promptScores.push(...event.logprobs)
      else if (event.type === "done") usage = event.usage
      else {
        if (finishes[event.choice] !== undefined) throw new Error(`choice ${event.choice} goes on after its end`)
        tokens[event.choice]!.push(...event.tokens)
        texts[event.choice] += event.text
        logprobs[event.choice]!.push(...(event.logprobs ?? []))
        finishes[event.choice] = event.finish
        each((count += event.tokens.length))
      }
    }
    if (usage === undefined) throw new Error("the generation ended before it was done")
    return { tokens, texts, finishes, logprobs, promptScores, promptTokens, usage }
  }

  /** Waits until the KV store has every block that a pool knows. */
  async untilStored(): Promise<void> {
    for (const { worker } of this.node.workers.values()) {
      const message = { formatId: worker.formatId, hashes: packHashes(worker.engine.blocks.knownHashes()) }
      const ask = this.link.ask(Have, subject(this.node.namespace, "kv-store", anyId, Have.verb), message, { hop: "kv-store" })
      while (!(await Effect.runPromise(ask)).present.every((here) => here)) await new Promise((resolve) => setTimeout(resolve, 2))
    }
  }

  /** Waits until every worker is idle, and checks that nothing was lost. */
  async untilIdle(): Promise<void> {
    for (const { worker, kernels } of this.node.workers.values()) {
      const { engine } = worker
      await until(() => engine.requestIds.length === 0 && engine.load.sequences === 0 && engine.load.waiting === 0)
      await until(() => engine.blocks.available === engine.blocks.limit) // the KV store may still be reading some
      engine.checkInvariants()
      if (kernels.samplers !== 0) throw new Error(`${worker.id} has ${kernels.samplers} samplers left`)
    }
  }
}

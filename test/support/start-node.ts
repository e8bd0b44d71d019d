/** A whole topology in this process, on a free port, for as long as a test runs. */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Effect, Exit, Scope } from "effect"
import { loadTopology } from "../../config/load-topology.ts"
import type { Topology } from "../../config/topology.ts"
import type { Bus } from "../../actors/runtime/bus.ts"
import type { RunningWorker } from "../../actors/node/worker.ts"
import type { Reconciler } from "../../actors/node/reconciler.ts"
import { serve } from "../../gateway/serve.ts"
import { writeTinyModel, type TinyModelOptions } from "./tiny-model.ts"

export interface StartedNode {
  readonly url: string
  readonly port: number
  readonly modelName: string
  readonly topology: Topology
  readonly bus: Bus
  /** Where the actors speak that new requests go to. */
  readonly namespace: string
  /** Of those, the workers in this process, by name; one that is being restarted is the last one that ran. */
  readonly workers: ReadonlyMap<string, RunningWorker>
  readonly reconciler: Reconciler
  stop(): Promise<void>
}

export interface StartNodeOptions {
  /** A model file; absent: a tiny model is written. */
  readonly model?: { readonly path: string; readonly name: string; readonly sha256: string }
  readonly tiny?: TinyModelOptions
  /** A preset of config/topologies; single where absent. */
  readonly preset?: string
  /** Changes to the preset. */
  readonly change?: (topology: Topology) => Topology
}

/** Brings up a preset, changed as asked, on a free port of loopback. */
export const startNode = async (options: StartNodeOptions = {}): Promise<StartedNode> => {
  const folder = mkdtempSync(join(tmpdir(), "penstock-node-"))
  const preset = loadTopology(`config/topologies/${options.preset ?? "single"}.yaml`, { host: "127.0.0.1", port: 0 }).topology
  // Nothing that an earlier run has stored is found again.
  const topology: Topology = { ...preset, kvStore: { ...preset.kvStore, disk: { ...preset.kvStore.disk, path: join(folder, "kv") } } }
  const path = join(folder, "tiny.gguf")
  if (options.model === undefined) await writeTinyModel(path, options.tiny)
  const model = { aliases: [], ...(options.model ?? { name: "tiny", path, sha256: "0".repeat(64) }) }
  const scope = Effect.runSync(Scope.make())
  const stop = async () => {
    await Effect.runPromise(Scope.close(scope, Exit.void))
    rmSync(folder, { recursive: true, force: true })
  }
  try {
    const served = options.change?.(topology) ?? topology
    const running = await Effect.runPromise(Scope.provide(serve({ topology: served, model }), scope))
    const { bus, reconciler, hosting, generations } = running
    const generation = () => reconciler.actual.generation!.id
    return {
      bus,
      reconciler,
      topology: served,
      modelName: model.name,
      get url() {
        return running.url
      },
      get port() {
        return running.port
      },
      get namespace() {
        return generations.get(generation())!.namespace
      },
      get workers() {
        return hosting.workers(generation())
      },
      stop,
    }
  } catch (error) {
    await stop()
    throw error
  }
}

export interface Answer {
  readonly tokens: ReadonlyArray<number>
  readonly text: string
  readonly finish: string | null
}

/** One streamed completion, read to its end; `onFirst` is called when it has begun. */
export const streamCompletion = async (started: { readonly url: string; readonly modelName: string }, body: Readonly<Record<string, unknown>>, onFirst?: () => void): Promise<Answer> => {
  const response = await fetch(`${started.url}/v1/completions`, {
    method: "POST",
    body: JSON.stringify({ model: started.modelName, stream: true, return_token_ids: true, ...body }),
  })
  if (!response.ok) throw new Error(`${response.status} ${await response.text()}`)
  const tokens: Array<number> = []
  let text = ""
  let finish: string | null = null
  let ended = false
  const whole = async (): Promise<string> => {
    let read = ""
    for await (const piece of response.body!.pipeThrough(new TextDecoderStream())) {
      if (read === "") onFirst?.()
      read += piece
    }
    return read
  }
  for (const event of (await whole()).split("\n\n")) {
    if (!event.startsWith("data: ")) continue
    if (event === "data: [DONE]") {
      ended = true
      continue
    }
    const chunk = JSON.parse(event.slice(6)) as { error?: unknown; choices: Array<{ text: string; token_ids?: Array<number> | null; finish_reason: string | null }> }
    if (chunk.error !== undefined) throw new Error(JSON.stringify(chunk.error))
    for (const choice of chunk.choices) {
      tokens.push(...(choice.token_ids ?? []))
      text += choice.text
      finish = choice.finish_reason ?? finish
    }
  }
  if (!ended) throw new Error("the stream ended without [DONE]")
  return { tokens, text, finish }
}

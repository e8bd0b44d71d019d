/** A gateway on a free port over a memory bus, with a fake request actor behind it. */
import { Effect, Exit, Scope } from "effect"
import OpenAI from "openai"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { gateway, type GatewayOptions } from "../../gateway/gateway.ts"
import { FakeRequestActor } from "./fake-request-actor.ts"

export interface StartedGateway {
  readonly url: string
  readonly port: number
  readonly bus: MemoryBus
  readonly actor: FakeRequestActor
  /** An official client without retries. */
  readonly client: OpenAI
  post(path: string, body: unknown, headers?: Record<string, string>): Promise<Response>
  close(): Promise<void>
}

export const servedModel = { id: "tiny", created: 1_700_000_000, ownedBy: "penstock", contextLength: 2048 }

export const startGateway = async (options: Partial<GatewayOptions> = {}, apiKey = "none"): Promise<StartedGateway> => {
  const bus = new MemoryBus()
  const actor = new FakeRequestActor(bus, "test")
  const scope = Effect.runSync(Scope.make())
  const started = await Effect.runPromise(
    Scope.provide(gateway({ bus, namespace: "test", host: "127.0.0.1", port: 0, model: servedModel, ready: () => ({ ready: true }), ...options }), scope),
  )
  let closing: Promise<void> | undefined
  return {
    ...started,
    bus,
    actor,
    client: new OpenAI({ baseURL: `${started.url}/v1`, apiKey, maxRetries: 0 }),
    post: (path, body, headers = {}) =>
      fetch(started.url + path, { method: "POST", headers: { "content-type": "application/json", ...headers }, body: typeof body === "string" ? body : JSON.stringify(body) }),
    close: () => (closing ??= Effect.runPromise(Scope.close(scope, Exit.void))),
  }
}

/** The data of each event of a server-sent stream, parsed; `[DONE]` stays a string. */
export const sseEvents = (text: string): ReadonlyArray<unknown> =>
  text
    .split("\n\n")
    .flatMap((event) => event.split("\n").filter((line) => line.startsWith("data: ")))
    .map((line) => (line === "data: [DONE]" ? "[DONE]" : JSON.parse(line.slice(6))))

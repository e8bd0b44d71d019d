/** A gateway on a free port over a memory bus, with a fake request actor behind it. */
import { Effect, Exit, Scope } from "effect"
import OpenAI from "openai"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { Gateway, type GatewayOptions, type ListenOptions } from "../../gateway/gateway.ts"
import { FakeRequestActor } from "./fake-request-actor.ts"

export interface StartedGateway {
  readonly url: string
  readonly port: number
  readonly bus: MemoryBus
  readonly actor: FakeRequestActor
  readonly gateway: Gateway
  /** An official client without retries. */
  readonly client: OpenAI
  post(path: string, body: unknown, headers?: Record<string, string>): Promise<Response>
  close(): Promise<void>
}

export const servedModel = { id: "tiny", created: 1_700_000_000, ownedBy: "penstock", contextLength: 2048, digest: "0".repeat(64) }

export const startGateway = async (options: Partial<GatewayOptions & ListenOptions & { readonly namespace: string }> = {}, apiKey = "none"): Promise<StartedGateway> => {
  const bus = new MemoryBus()
  const actor = new FakeRequestActor(bus, "test")
  const scope = Effect.runSync(Scope.make())
  const started = Effect.gen(function* () {
    const gateway = yield* Gateway.make({ bus, members: () => [], ready: () => ({ ready: true }), ...options })
    yield* Effect.addFinalizer(() => gateway.close())
    gateway.switchTo({ id: "test", namespace: options.namespace ?? "test", model: servedModel })
    yield* gateway.listen({ host: "127.0.0.1", port: 0, ...options })
    return gateway
  })
  const gateway = await Effect.runPromise(Scope.provide(started, scope))
  let closing: Promise<void> | undefined
  return {
    ...gateway.address!,
    gateway,
    bus,
    actor,
    client: new OpenAI({ baseURL: `${gateway.address!.url}/v1`, apiKey, maxRetries: 0 }),
    post: (path, body, headers = {}) =>
      fetch(gateway.address!.url + path, { method: "POST", headers: { "content-type": "application/json", ...headers }, body: typeof body === "string" ? body : JSON.stringify(body) }),
    close: () => (closing ??= Effect.runPromise(Scope.close(scope, Exit.void))),
  }
}

/** The data of each event of a server-sent stream, parsed; `[DONE]` stays a string. */
export const sseEvents = (text: string): ReadonlyArray<unknown> =>
  text
    .split("\n\n")
    .flatMap((event) => event.split("\n").filter((line) => line.startsWith("data: ")))
    .map((line) => (line === "data: [DONE]" ? "[DONE]" : JSON.parse(line.slice(6))))

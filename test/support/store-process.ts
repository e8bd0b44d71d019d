/**
 * KV stores that are put into without end, as a process for a test to kill: it is told their folders, and reports the blocks
 * that each has on disk.
 */
import { Effect, Scope } from "effect"
import { kvStoreActor } from "../../actors/kv-store/kv-store.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { until } from "./scoped.ts"
import { StoreClient } from "./store-client.ts"

export interface StoreOrder {
  readonly folder: string
  readonly blockBytes: number
  readonly memoryBytes: number
  readonly diskBytes: number
  readonly firstBlock: number
}

export interface StoreReport {
  /** Which of the stores. */
  readonly store: number
  readonly onDisk: ReadonlyArray<number>
  /** No block from here on was put before this was said. */
  readonly next: number
}

const blocksOfPut = 8
const putsOfReport = 4

const run = async (store: number, { folder, blockBytes, memoryBytes, diskBytes, firstBlock }: StoreOrder): Promise<void> => {
  const bus = new MemoryBus()
  const buses = { control: bus, bulk: bus }
  const scope = Effect.runSync(Scope.make())
  const running = await Effect.runPromise(
    Scope.provide(kvStoreActor({ link: new Link(bus, "kv-store k0", 1), buses, namespace: "test", id: "k0", memoryBytes, disk: { folder, bytes: diskBytes } }), scope),
  )
  const client = new StoreClient(buses, blockBytes)
  for (let next = firstBlock; ; ) {
    const put: Array<number> = []
    for (let i = 0; i < putsOfReport; i++, next += blocksOfPut) {
      const numbers = Array.from({ length: blocksOfPut }, (_, i) => next + i)
      const wanted = await client.put(numbers)
      put.push(...numbers.filter((_, i) => wanted[i] === true))
      await new Promise((resolve) => setImmediate(resolve)) // what is refused for want of room takes no turn of the event loop
    }
    // When nothing waits to be written, everything is.
    await until(() => !running.isWriting())
    process.send?.({ store, onDisk: put, next } satisfies StoreReport)
  }
}

process.once("message", (orders: ReadonlyArray<StoreOrder>) => orders.forEach((order, store) => void run(store, order)))
process.on("disconnect", () => process.exit(0))

/**
 * A KV store that is put into without end, as a process for a test to kill: it is told its folder, and reports the blocks
 * that it has on disk.
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
  readonly onDisk: ReadonlyArray<number>
  /** No block from here on was put before this was said. */
  readonly next: number
}

const blocksOfPut = 8
const putsOfReport = 4

const run = async ({ folder, blockBytes, memoryBytes, diskBytes, firstBlock }: StoreOrder): Promise<void> => {
  const bus = new MemoryBus()
  const buses = { control: bus, bulk: bus }
  const scope = Effect.runSync(Scope.make())
  const store = await Effect.runPromise(
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
    await until(() => !store.isWriting())
    process.send?.({ onDisk: put, next } satisfies StoreReport)
  }
}

process.once("message", (order: StoreOrder) => void run(order))
process.on("disconnect", () => process.exit(0))

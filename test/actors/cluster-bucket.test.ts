/** The suite that every bucket passes: in memory, and in the JetStream of a real nats-server. */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest"
import { inboxPrefix } from "../../actors/messages/subjects.ts"
import type { BucketEntry, ClusterBucket } from "../../actors/runtime/cluster-bucket.ts"
import { NatsBucket } from "../../actors/runtime/nats-bucket.ts"
import { MemoryBucket, MemoryKeys } from "../support/memory-bucket.ts"
import { natsStartTimeoutMs, startConfiguredNats, type ConfiguredNats } from "../support/start-nats.ts"

const bytes = (text: string) => new TextEncoder().encode(text)
const text = (entry: BucketEntry | undefined) => (entry === undefined ? undefined : new TextDecoder().decode(entry.value))

interface Opened {
  /** Another handle on the same keys. */
  readonly open: () => Promise<ClusterBucket>
}

const suite = (name: string, fresh: () => Promise<Opened>) =>
  describe(`a bucket in ${name}`, () => {
    const open: Array<ClusterBucket> = []
    afterEach(async () => {
      for (const bucket of open.splice(0)) await bucket.close()
    })
    const two = async (): Promise<readonly [ClusterBucket, ClusterBucket]> => {
      const { open: make } = await fresh()
      const [a, b] = [await make(), await make()]
      open.push(a, b)
      return [a, b]
    }

    it("has nothing at first, and then what was written last", async () => {
      const [a, b] = await two()
      expect(await a.get("wanted")).toBeUndefined()
      const first = await a.put("wanted", bytes("one"), 0)
      const second = await b.put("wanted", bytes("two"), first!)
      expect(second).toBeGreaterThan(first!)
      expect([text(await a.get("wanted")), (await a.get("wanted"))?.revision]).toEqual(["two", second])
      expect(await a.get("leader")).toBeUndefined()
    })

    it("of two who write over the same revision one is told, and the other's value stays", async () => {
      const [a, b] = await two()
      const both = await Promise.all([a.put("wanted", bytes("a"), 0), b.put("wanted", bytes("b"), 0)])
      expect(both.filter((revision) => revision !== undefined)).toHaveLength(1)
      const won = both[0] === undefined ? "b" : "a"
      expect(text(await a.get("wanted"))).toBe(won)
      const again = await Promise.all([a.put("wanted", bytes("x"), both[0] ?? both[1]!), b.put("wanted", bytes("y"), 0)])
      expect(again).toEqual([expect.any(Number), undefined])
    })

    it("tells a watcher of what there is, and of what is written later, in order", async () => {
      const [a, b] = await two()
      await a.put("other", bytes("nothing of his"), 0)
      const first = await a.put("wanted", bytes("1"), 0)
      const seen: Array<string | undefined> = []
      const watching = b.watch("wanted", (entry) => seen.push(text(entry)))
      const until = async (last: string) => {
        while (seen.at(-1) !== last) await new Promise((resolve) => setTimeout(resolve, 5))
      }
      await until("1")
      const second = await a.put("wanted", bytes("2"), first!)
      await until("2")
      const third = await a.put("wanted", bytes("3"), second!)
      await until("3")
      expect(seen).toEqual(["1", "2", "3"])
      watching.unsubscribe()
      await a.put("wanted", bytes("4"), third!)
      await b.get("wanted")
      expect(seen).toHaveLength(3)
    })

    it("refuses once it is closed", async () => {
      const [a] = await two()
      await a.close()
      await expect(a.get("wanted")).rejects.toMatchObject({ code: "unavailable" })
    })
  })

suite("memory", async () => {
  const keys = new MemoryKeys()
  return { open: async () => new MemoryBucket(keys) }
})

describe("with a nats-server", () => {
  let nats: ConfiguredNats
  let folder: string
  let buckets = 0
  const connect = (bucket: string, url = nats.url) => NatsBucket.connect({ url, name: "test", bucket, inboxPrefix: inboxPrefix("test.all", "node", "t0") })
  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), "penstock-test-js-"))
    nats = await startConfiguredNats([`jetstream: { store_dir: ${JSON.stringify(folder)} }`])
  }, natsStartTimeoutMs)
  afterAll(async () => {
    await nats.stop()
    rmSync(folder, { recursive: true, force: true })
  })

  suite("JetStream", async () => {
    const bucket = `penstock-test-${buckets++}`
    return { open: () => connect(bucket) }
  })

  it("keeps what was written, also while nobody has it open", async () => {
    const first = await connect("penstock-kept")
    await first.put("wanted", bytes("kept"), 0)
    await first.close()
    const second = await connect("penstock-kept")
    expect(text(await second.get("wanted"))).toBe("kept")
    await second.close()
  })

  it("a server without JetStream is named, with what to do", async () => {
    const plain = await startConfiguredNats([])
    await expect(connect("penstock-none", plain.url)).rejects.toThrow(/start nats-server with -js/)
    await plain.stop()
  })
})

/**
 * The KV-store actor: keeps blocks by format and hash, so that a prefix that has left every pool is fetched, not computed.
 */
import { Effect, type Scope } from "effect"
import { attributes, spans } from "../../config/telemetry.ts"
import { actor, onAsk, onStream } from "../runtime/actor.ts"
import type { Link } from "../runtime/link.ts"
import type { StreamWriter } from "../runtime/stream.ts"
import { messageAttributes } from "../runtime/trace-context.ts"
import { unpackHashes } from "../messages/hashes.ts"
import { Get, Have, Put, type BlocksMessage } from "../messages/kv-store.ts"
import { anyId, subject } from "../messages/subjects.ts"
import { BlockCache } from "./block-cache.ts"

export interface KvStoreOptions {
  readonly link: Link
  readonly cluster: string
  readonly id: string
  readonly memoryBytes: number
}

/** Runs a KV store until the Scope closes. */
export const kvStoreActor = ({ link, cluster, id, memoryBytes }: KvStoreOptions): Effect.Effect<void, never, Scope.Scope> => {
  const cache = new BlockCache(memoryBytes)
  const places = (verb: string) => [
    { subject: subject(cluster, "kv-store", id, verb) },
    { subject: subject(cluster, "kv-store", anyId, verb), queue: "kv-store" },
  ]
  const keys = ({ formatId, hashes }: BlocksMessage) => unpackHashes(hashes).map((hash) => `${formatId}/${hash}`)

  const get = (message: BlocksMessage, writer: StreamWriter) =>
    Effect.promise(async () => {
      let moved = 0
      for (const key of keys(message)) {
        const bytes = cache.get(key)
        if (bytes === undefined || writer.closed) break
        if (!writer.writable) await writer.untilWritable()
        writer.write(bytes)
        moved++
      }
      return moved
    }).pipe(
      Effect.flatMap((moved) => Effect.annotateCurrentSpan(attributes.movedBlocks, moved)),
      Effect.withSpan(spans.kvStoreGet, { kind: "server", attributes: messageAttributes(link, subject(cluster, "kv-store", anyId, Get.verb)) }),
    )

  return actor(link, [
    onAsk(Have, places(Have.verb), (message) => Effect.sync(() => ({ present: keys(message).map((key) => cache.has(key)) }))),
    onStream(Get, places(Get.verb), get),
    onAsk(Put, places(Put.verb), ({ formatId, hash, bytes }) =>
      // The message's bytes are a copy of its own, so they may be kept.
      Effect.sync(() => ({ stored: cache.put(keys({ formatId, hashes: hash })[0] ?? formatId, bytes) })),
    ),
  ])
}

/** Has the KV store keep a conversation's blocks for a while, in place of those of its earlier turns. */
import { Effect } from "effect"
import { limits } from "../../config/limits.ts"
import type { Link } from "../runtime/link.ts"
import { packHashes, type BlockHash } from "../messages/hashes.ts"
import { Pin } from "../messages/kv-store.ts"
import { anyId, subject } from "../messages/subjects.ts"
import type { ServedModel } from "./prepare.ts"

export interface PinnedConversation {
  readonly tenant: string
  readonly conversation: string
  readonly hashes: ReadonlyArray<BlockHash>
  /** 0: it is over. */
  readonly leaseMs: number
}

/** Nobody waits for it: where there is no store, or it does not answer, the blocks are kept like all others. */
export const pinConversation = (
  { link, namespace, model }: { readonly link: Link; readonly namespace: string; readonly model: Pick<ServedModel, "formatId"> },
  { tenant, conversation, hashes, leaseMs }: PinnedConversation,
): Effect.Effect<void> =>
  Effect.ignore(
    link.ask(
      Pin,
      subject(namespace, "kv-store", anyId, Pin.verb),
      { formatId: model.formatId, hashes: packHashes(hashes), owner: conversation, tenant, leaseMs },
      { hop: "kv-store", deadlineMs: limits.storeDeadlineMs },
    ),
  )

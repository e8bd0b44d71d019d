/** Tells that nobody goes on with conversations, so that their KV is kept no longer than any other. */
import { Effect } from "effect"
import { EndConversation } from "../actors/messages/request.ts"
import { anyId, subject } from "../actors/messages/subjects.ts"
import type { GatewayContext } from "./call.ts"

export const endConversations = ({ link, namespace }: Pick<GatewayContext, "link" | "namespace">, tenant: string, conversations: Iterable<string>): void => {
  for (const conversation of conversations) Effect.runFork(Effect.ignore(link.tell(EndConversation, subject(namespace, "request", anyId, EndConversation.verb), { tenant, conversation })))
}

/** Which generations other workers have room for, by what these last said of themselves. */
import type { PresenceMessage } from "../messages/presence.ts"

/** What a generation takes where it decodes. */
export interface Need {
  readonly choices: number
  readonly blocks: number
}

/** Those of `generations`, in order, that fit beside each other on workers other than `id` that decode KV of this format. */
export const withRoomElsewhere = <N extends Need>(generations: ReadonlyArray<N>, members: ReadonlyArray<PresenceMessage>, { id, formatId }: { readonly id: string; readonly formatId: string }): Array<N> => {
  const rooms = members.flatMap((member) => {
    const { worker } = member
    if (worker === undefined || member.id === id || !worker.roles.includes("decode") || worker.kv.format !== formatId) return []
    const { maxBatch, sequences, waiting } = worker.load
    return [{ slots: maxBatch - sequences - waiting, blocks: worker.kv.freeBlocks }]
  })
  return generations.filter(({ choices, blocks }) => {
    const room = rooms.filter((other) => other.slots >= choices && other.blocks >= blocks).sort((a, b) => b.slots - a.slots)[0]
    if (room === undefined) return false
    room.slots -= choices
    room.blocks -= blocks
    return true
  })
}

import { Effect } from "effect"

const pollMs = 20

/** Returns once something holds that nobody tells of. */
export const until = (holds: () => boolean): Effect.Effect<void> => Effect.suspend(() => (holds() ? Effect.void : Effect.andThen(Effect.sleep(pollMs), until(holds))))

/** Gives a store its disk tier: at the start, or as soon as the disk can be had. Without it the store goes on in memory. */
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import type { BlockTiers } from "./block-tiers.ts"
import { DiskTier, type DiskTierOptions } from "./disk-tier.ts"

/** Until the Scope closes, which writes what waits. */
export const attachDisk = (tiers: BlockTiers, options: DiskTierOptions): Effect.Effect<void, never, Scope.Scope> => {
  const attach = Effect.acquireRelease(
    Effect.map(Effect.tryPromise({ try: () => DiskTier.open(options), catch: (error) => error as Error }), (disk) => (tiers.disk = disk)),
    (disk) =>
      Effect.promise(() => {
        tiers.disk = undefined
        return disk.close()
      }),
  )
  const again: Effect.Effect<unknown, never, Scope.Scope> = Effect.suspend(() => attach.pipe(Effect.delay(limits.storeDiskRetryMs), Effect.catch(() => again)))
  return Effect.asVoid(
    Effect.catch(attach, (error) => {
      options.warn(`blocks are kept in memory only, until their folder can be used: ${error.message}`)
      return Effect.forkScoped(again)
    }),
  )
}

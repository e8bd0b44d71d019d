/**
 * Generations: actors that agree on a model, a type of KV and a block size. Two of them never speak to each other, so one
 * can take over from another while both run.
 */
import { createHash } from "node:crypto"
import type { Topology } from "../../config/topology.ts"
import type { KvDtype } from "../../kernels/index.ts"
import { namespaceOf } from "../messages/subjects.ts"
import type { ResolvedModel } from "./fetch-model.ts"

/** Eight hex digits that name a generation. The device is not part of it: workers of one generation may have different ones. */
export const generationOf = ({ modelDigest, dtype, blockTokens }: { readonly modelDigest: string; readonly dtype: KvDtype; readonly blockTokens: number }): string =>
  createHash("sha256").update(JSON.stringify([modelDigest, dtype, blockTokens])).digest("hex").slice(0, 8)

/** Where the actors of a topology speak to each other: its cluster, and the generation that its model and workers make. */
export const namespaceIn = ({ topology, model }: { readonly topology: Topology; readonly model: ResolvedModel }): string => {
  const { dtype, blockTokens } = topology.workers[0]!.kv
  return namespaceOf(topology.cluster, generationOf({ modelDigest: model.sha256, dtype, blockTokens }))
}

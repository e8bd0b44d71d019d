/**
 * Chained block hashes: SHA-256, cut to 128 bits, over the parent's hash and the block's token ids, so that a hash names
 * a whole prefix.
 */
import { createHash } from "node:crypto"
import { hashBytes, type BlockHash } from "../messages/hashes.ts"

const cut = (digest: Buffer): BlockHash => digest.toString("latin1", 0, hashBytes)

/** The root of a chain: what KV depends on besides the tokens, and whose it is; without a tenant it is everybody's. */
export const hashRoot = (parts: { readonly modelDigest: string; readonly tenant: string | undefined; readonly cacheSalt: string | undefined }): BlockHash =>
  cut(createHash("sha256").update(JSON.stringify([parts.modelDigest, parts.tenant ?? null, parts.cacheSalt ?? null])).digest())

/** Hash of one full block after `parent`. */
export const blockHash = (parent: BlockHash, tokens: Int32Array): BlockHash =>
  cut(
    createHash("sha256")
      .update(parent, "latin1")
      .update(new Uint8Array(tokens.buffer, tokens.byteOffset, tokens.byteLength))
      .digest(),
  )

/** Hashes of the full blocks of `tokens`, first block first. */
export const chainHashes = (root: BlockHash, tokens: Int32Array, blockTokens: number): Array<BlockHash> => {
  const hashes: Array<BlockHash> = []
  for (let end = blockTokens; end <= tokens.length; end += blockTokens) {
    hashes.push(blockHash(hashes.at(-1) ?? root, tokens.subarray(end - blockTokens, end)))
  }
  return hashes
}

/**
 * Block hashes as they travel: 16 bytes each, one after the other. In memory a hash is a latin1 string of 16 characters,
 * which compares by value as the key of a Map.
 */
export const hashBytes = 16
export type BlockHash = string

export const packHashes = (hashes: ReadonlyArray<BlockHash>): Uint8Array => Buffer.from(hashes.join(""), "latin1")

/** The inverse of `packHashes`; bytes beyond the last whole hash are ignored. */
export const unpackHashes = (bytes: Uint8Array): Array<BlockHash> => {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("latin1")
  const hashes: Array<BlockHash> = []
  for (let end = hashBytes; end <= text.length; end += hashBytes) hashes.push(text.slice(end - hashBytes, end))
  return hashes
}

/**
 * The nkey of a NATS user: a seed in a file, which only its process reads, and a public key for the server's configuration.
 */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs"
import { dirname } from "node:path"
import { nkeys } from "@nats-io/transport-node"
import { ConfigError } from "../../config/config-error.ts"

/**
 * Public key of the seed in a file. Where there is no such file, it is made, for this user's eyes only.
 * @throws ConfigError with one sentence where the file holds something else, or cannot be read or made
 */
export const userKey = (path: string): string => {
  try {
    mkdirSync(dirname(path), { recursive: true, mode: 0o700 })
    writeFileSync(path, nkeys.createUser().getSeed(), { mode: 0o600, flag: "wx" })
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code !== "EEXIST") throw new ConfigError([`${path}: cannot be made (${code}): name a folder that can be written to`])
  }
  try {
    return nkeys.fromSeed(Buffer.from(readFileSync(path, "utf8").trim())).getPublicKey()
  } catch {
    throw new ConfigError([`${path}: is no seed of an nkey; take it away, and it is made`])
  }
}

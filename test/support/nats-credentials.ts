/** Users whose rights stand in a JWT, as `nsc` makes them: an operator, an account of his, and the user's `.creds` file. */
import { nkeys } from "@nats-io/transport-node"

type Key = ReturnType<typeof nkeys.createUser>

const base64url = (data: string | Uint8Array): string => Buffer.from(data).toString("base64url")

/** A JWT (ADR-14 of NATS) about one key, signed by another. */
const token = (about: Key, by: Key, nats: Readonly<Record<string, unknown>>): string => {
  const claims = { jti: about.getPublicKey(), iat: Math.floor(Date.now() / 1000), iss: by.getPublicKey(), sub: about.getPublicKey(), name: "test", nats: { version: 2, ...nats } }
  const signed = `${base64url(JSON.stringify({ typ: "JWT", alg: "ed25519-nkey" }))}.${base64url(JSON.stringify(claims))}`
  return `${signed}.${base64url(by.sign(Buffer.from(signed)))}`
}

export interface NatsAccount {
  /** Lines of a server's configuration that trusts the account. */
  readonly configuration: ReadonlyArray<string>
  /** The text of a new user's `.creds` file. */
  credentials(permissions: { readonly publish: ReadonlyArray<string>; readonly subscribe: ReadonlyArray<string> }): string
}

export const natsAccount = (): NatsAccount => {
  const [operator, account] = [nkeys.createOperator(), nkeys.createAccount()]
  const boundless = { subs: -1, data: -1, payload: -1 }
  const limits = { ...boundless, imports: -1, exports: -1, wildcards: true, conn: -1, leaf: -1 }
  return {
    configuration: [
      `operator: ${token(operator, operator, { type: "operator" })}`,
      "resolver: MEMORY",
      `resolver_preload: { ${account.getPublicKey()}: ${token(account, operator, { type: "account", limits })} }`,
    ],
    credentials: ({ publish, subscribe }) => {
      const user = nkeys.createUser()
      const part = (name: string, text: string) => [`-----BEGIN ${name}-----`, text, `------END ${name}------`, ""]
      const jwt = token(user, account, { type: "user", ...boundless, pub: { allow: publish }, sub: { allow: subscribe } })
      return [...part("NATS USER JWT", jwt), ...part("USER NKEY SEED", Buffer.from(user.getSeed()).toString())].join("\n")
    },
  }
}

import { expect, test } from "vitest"
import { processKinds } from "../../actors/messages/subjects.ts"
import { ConfigError } from "../../config/config-error.ts"
import { natsOfRole, type NatsAddress } from "../../config/topology.ts"
import { parseTopology } from "../../config/load-topology.ts"

const bus = (line: string) => parseTopology(`penstock: 1\nbus: ${line}\n`, { path: "/somewhere/x.yaml" }).topology.bus

test("the paths of a bus's files start from the topology's folder", () => {
  expect(bus("{ nats: { url: nats://broker:4222, credentials: keys/p.creds, tls: { ca: ca.pem, cert: /etc/c.pem, key: ../k.pem } } }")).toEqual({
    nats: { url: "nats://broker:4222", credentials: "/somewhere/keys/p.creds", tls: { ca: "/somewhere/ca.pem", cert: "/etc/c.pem", key: "/k.pem" } },
  })
  expect(bus("{ nats: { url: tls://broker, nkey: p.nk } }")).toEqual({ nats: { url: "tls://broker", nkey: "/somewhere/p.nk" } })
  expect(bus("{ nats: { url: nats://broker:4222, token: t } }")).toEqual({ nats: { url: "nats://broker:4222", token: "/somewhere/t" } })
  expect(bus("{ nats: { spawn: true } }")).toEqual({ nats: { spawn: true } })
})

test("{role} in the path of a file is the kind of process", () => {
  const written = bus("{ nats: { url: tls://broker, nkey: 'keys/{role}.nk', tls: { ca: ca.pem, cert: 'tls/{role}/{role}.pem', key: k.pem } } }")
  expect(written).toMatchObject({ nats: { nkey: "/somewhere/keys/{role}.nk" } })
  expect(natsOfRole((written as { nats: NatsAddress }).nats, "kv-store")).toEqual({
    url: "tls://broker",
    nkey: "/somewhere/keys/kv-store.nk",
    tls: { ca: "/somewhere/ca.pem", cert: "/somewhere/tls/kv-store/kv-store.pem", key: "/somewhere/k.pem" },
  })
  for (const kind of processKinds) expect(roleFile).toContain(kind)
})

const forms = "memory, { nats: { spawn: true } } or { nats: { url: nats://HOST:PORT } }"
const roleFile = "the path of a file; {role} in it is gateway, request, scheduler, worker, kv-store or node"
const address = "nats://HOST:PORT or tls://HOST:PORT, without user or password"

test.each([
  ["nats", `bus: expected ${forms}, found "nats"`],
  ["{ nat: { spawn: true } }", "bus.nat: unknown key, did you mean nats?; allowed: nats\nx.yaml:2: bus.nats: missing"],
  ["{ nats: true }", "bus.nats: expected { spawn: true } or { url: nats://HOST:PORT }, found true"],
  ["{ nats: {} }", `bus.nats.url: expected ${address}, found nothing`],
  ["{ nats: { spawn: false } }", "bus.nats.spawn: expected true, found false"],
  ["{ nats: { spawn: true, url: nats://broker } }", "bus.nats.spawn: unknown key; allowed: url, credentials, nkey, token, tls"],
  ["{ nats: { url: broker:4222 } }", `bus.nats.url: expected ${address}, found "broker:4222"`],
  ["{ nats: { url: http://broker } }", `bus.nats.url: expected ${address}, found "http://broker"`],
  ["{ nats: { url: nats://user:password@broker } }", `bus.nats.url: expected ${address}, found "nats://…@broker"`],
  ["{ nats: { url: nats://broker, token: a, nkey: b } }", "bus.nats.token: one of credentials, nkey, token is enough, found nkey and token"],
  ["{ nats: { url: nats://broker, tls: { cert: a } } }", "bus.nats.tls.cert: needs key beside it"],
  ["{ nats: { url: nats://broker, tls: { verify: false } } }", "bus.nats.tls.verify: unknown key; allowed: ca, cert, key"],
  ["{ nats: { url: nats://broker, user: a } }", "bus.nats.user: unknown key; allowed: url, credentials, nkey, token, tls"],
  ["{ nats: { url: nats://broker, token: 1 } }", `bus.nats.token: expected ${roleFile}, found 1`],
  ["{ nats: { url: nats://broker, nkey: '{kind}.nk' } }", `bus.nats.nkey: expected ${roleFile}, found "{kind}.nk"`],
  ["{ nats: { url: nats://broker, tls: { ca: 1 } } }", "bus.nats.tls.ca: expected the path of a file, found 1"],
])("%s is refused at its key, with what is allowed", (line, message) => {
  expect(() => bus(line)).toThrow(new ConfigError(`x.yaml:2: ${message}`.split("\n")))
})

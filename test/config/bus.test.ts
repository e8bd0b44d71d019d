import { expect, test } from "vitest"
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

test.each([
  "nats",
  "{ nats: {} }",
  "{ nats: { spawn: false } }",
  "{ nats: { spawn: true, url: nats://broker } }",
  "{ nats: { url: broker:4222 } }",
  "{ nats: { url: http://broker } }",
  "{ nats: { url: nats://user:password@broker } }",
  "{ nats: { url: nats://broker, token: a, nkey: b } }",
  "{ nats: { url: nats://broker, tls: { cert: a } } }",
  "{ nats: { url: nats://broker, tls: { verify: false } } }",
  "{ nats: { url: nats://broker, user: a } }",
])("%s is refused, with what is allowed", (line) => {
  expect(() => bus(line)).toThrow(/x\.yaml:2: bus: expected memory, \{ nats: \{ spawn: true \} \} or \{ nats: \{ url: nats:\/\/HOST:PORT \} \}/)
})

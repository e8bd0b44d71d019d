/** What is made from the schema of topology files, and whether loader, reference and JSON Schema say the same. */
import { readFileSync } from "node:fs"
import { Ajv } from "ajv"
import fc from "fast-check"
import { describe, expect, test } from "vitest"
import { parse } from "yaml"
import { ConfigError } from "../../config/config-error.ts"
import { parseTopology } from "../../config/load-topology.ts"
import { topologyJsonSchema } from "../../config/topology-json-schema.ts"
import { presetNames, topologyReference } from "../../config/topology-reference.ts"

const preset = (name: string) => readFileSync(`config/topologies/${name}.yaml`, "utf8")
const validate = new Ajv({ allErrors: true, allowUnionTypes: true }).compile(JSON.parse(readFileSync("config/topology.schema.json", "utf8")) as object)

/** The loader's problems, without those of values that are allowed and not built yet. */
const refusals = (text: string): ReadonlyArray<string> => {
  try {
    parseTopology(text, { path: "/somewhere/x.yaml" })
    return []
  } catch (error) {
    if (error instanceof ConfigError) return error.problems.filter((problem) => !problem.includes("is not available yet: use"))
    throw error
  }
}

test.each([
  ["config/README.md", topologyReference],
  ["config/topology.schema.json", topologyJsonSchema],
])("%s is what the schema says; npm run docs:config writes it", (path, written) => {
  expect(readFileSync(path, "utf8")).toBe(written())
})

test("the reference has every key of every preset, with a meaning", () => {
  const keysOf = (value: unknown, path: string): ReadonlyArray<string> =>
    Array.isArray(value)
      ? value.flatMap((item) => keysOf(item, `${path}[]`))
      : typeof value === "object" && value !== null && !path.endsWith("labels")
        ? Object.entries(value).flatMap(([key, inner]) => [`${path}${path === "" ? "" : "."}${key}`, ...keysOf(inner, `${path}${path === "" ? "" : "."}${key}`)])
        : []
  const rows = topologyReference().split("\n").filter((line) => line.startsWith("| `")).map((line) => line.slice(2, -2).split(" | "))
  for (const [key, meaning = ""] of rows) expect(meaning, key).toMatch(/\w.*\.$/)
  const keys = new Set(presetNames().flatMap((name) => keysOf(parse(preset(name)), "")))
  expect(keys.size).toBeGreaterThan(25)
  expect(rows.map(([key]) => key)).toEqual(expect.arrayContaining([...keys].map((key) => `\`${key}\``)))
})

test("the topology in the README is one", () => {
  const [, text = ""] = /```yaml\n(.*?)```/s.exec(readFileSync("README.md", "utf8")) ?? []
  expect(refusals(text)).toEqual([])
  expect(parseTopology(text, { path: "/somewhere/x.yaml" }).topology.workers).toHaveLength(2)
})

describe.each(presetNames())("the preset %s", (name) => {
  const text = preset(name)

  test("says what it is for and where its JSON Schema is, and both let it through", () => {
    expect(text).toMatch(/^# \w[^\n]*\n(# [^\n]*\n)*# yaml-language-server: \$schema=\.\.\/topology\.schema\.json\npenstock: 1\n/)
    expect(refusals(text)).toEqual([])
    expect(validate(parse(text)), JSON.stringify(validate.errors)).toBe(true)
  })
})

const full = parse(preset("single")) as Readonly<Record<string, unknown>>

/** Written as JSON, which is YAML. */
const agree = (file: unknown) => ({ loader: refusals(JSON.stringify(file)).length === 0, schema: validate(file) })

describe("loader and JSON Schema", () => {
  test.each([
    ["penstock", 2],
    ["cluster", "a b"],
    ["model", "smolm2-135m"],
    ["model", ""],
    ["bus", "nats"],
    ["bus", { nats: {} }],
    ["bus", { nats: { spawn: false } }],
    ["bus", { nats: { spawn: true, url: "nats://a" } }],
    ["bus", { nats: { url: "http://a" } }],
    ["bus", { nats: { url: "nats://user:password@a" } }],
    ["bus", { nats: { url: "nats://a", token: "t", nkey: "n" } }],
    ["bus", { nats: { url: "nats://a", tls: { cert: "c" } } }],
    ["gateway", null],
    ["gateway", { port: 65536 }],
    ["gateway", { port: "8080" }],
    ["gateway", { host: "a b" }],
    ["gateway", { keys: "" }],
    ["request", { replicas: 0 }],
    ["scheduler", { policy: "best" }],
    ["scheduler", { admission: "early-rejection" }],
    ["scheduler", { objectives: { ttft: "2s" } }],
    ["scheduler", { objectives: { ttft: "2 sec", tbt: "1ms" } }],
    ["scheduler", { objectives: { ttft: 2000, tbt: "1ms" } }],
    ["workers", []],
    ["workers", [{}]],
    ["workers", [{ name: "a", rolls: ["decode"] }]],
    ["workers", [{ name: "a", roles: [] }]],
    ["workers", [{ name: "a", roles: ["decode", "decode"] }]],
    ["workers", [{ name: "a", labels: { gpu: 100 } }]],
    ["workers", [{ name: "a", labels: { "a b": "c" } }]],
    ["workers", [{ name: "a", device: "gpu" }]],
    ["workers", [{ name: "a", threads: "all" }]],
    ["workers", [{ name: "a", kv: { dtype: "int2" } }]],
    ["workers", [{ name: "a", maxBatch: 1.5 }]],
    ["kvStore", { memory: "512mb" }],
    ["kvStore", { memory: -1 }],
    ["kvStore", { disk: { path: "" } }],
    ["telemetry", { otlp: "collector:4318" }],
    ["wrkers", []],
  ])("both refuse %s: %j", (key, value) => {
    expect(agree({ ...full, [key]: value })).toEqual({ loader: false, schema: false })
  })

  test.each([
    ["model", "hf:owner/repo/m.gguf"],
    ["bus", { nats: { url: "TLS://a:4222/", nkey: "n", tls: { ca: "c", cert: "c", key: "k" } } }],
    ["gateway", { host: "::1", port: 0, keys: "keys" }],
    ["scheduler", { policy: "kv-centric", admission: "early-rejection", objectives: { ttft: " 1.5 m ", tbt: "200ms" } }],
    ["workers", [{ name: "a", roles: ["decode", "prefill"], labels: { gpu: "h100", "zone.1": "1" }, device: "cuda:12", threads: 8, kv: { blocks: 1, dtype: "int4", blockTokens: 1 }, maxBatch: 256 }]],
    ["kvStore", { memory: 0, disk: { path: "../kv", size: "1.5 TiB" }, eviction: "length-aware" }],
    ["telemetry", { otlp: "https://collector/v1" }],
  ])("both take %s: %j", (key, value) => {
    expect(agree({ ...full, [key]: value })).toEqual({ loader: true, schema: true })
  })

  test("say the same of whatever stands at a key, and the schema never refuses what the loader takes", () => {
    const size = fc.oneof(fc.nat(), fc.tuple(fc.nat(9999), fc.constantFrom("", ".5", "."), fc.constantFrom("", " ", "  "), fc.constantFrom("B", "KiB", "MB", "GiB", "mb", "k", "")).map((parts) => parts.join("")))
    const time = fc.tuple(fc.nat(9999), fc.constantFrom("", ".25"), fc.constantFrom("", " "), fc.constantFrom("ms", "s", "m", "h", "sec", "")).map((parts) => parts.join(""))
    const word = fc.oneof(fc.constantFrom("auto", "cpu", "cuda", "cuda:0", "f16", "int8", "lru", "none", "prefill", "decode", "memory", "cache-aware", "kv-centric", "http://a:1", "::1", "a.b", "nats://a", "tls://a:1/"), fc.string({ maxLength: 8 }), fc.stringMatching(/^[a-z0-9_.:-]{0,70}$/))
    const leaf = fc.oneof(size, time, word, fc.integer({ min: -2, max: 70_000 }), fc.double(), fc.boolean(), fc.constant(null))
    const value = fc.oneof(leaf, fc.uniqueArray(word, { maxLength: 3 }), fc.array(leaf, { maxLength: 2 }), fc.dictionary(fc.constantFrom("gpu", "zone", "nats", "url", "spawn", "ttft", "tbt", "path", "size", "key one"), leaf, { maxKeys: 2 }))
    const paths = ["penstock", "cluster", "bus", "bus.nats.url", "bus.nats.spawn", "gateway", "gateway.host", "gateway.port", "gateway.keys", "request.replicas", "scheduler.policy", "scheduler.queue", "scheduler.objectives", "workers", "workers.0.name", "workers.0.roles", "workers.0.labels", "workers.0.device", "workers.0.threads", "workers.0.kv", "workers.0.kv.blocks", "workers.0.kv.dtype", "workers.0.kv.blockTokens", "workers.0.maxBatch", "kvStore.memory", "kvStore.disk", "kvStore.disk.size", "kvStore.eviction", "telemetry.otlp"]
    const set = (target: unknown, [key = "", ...rest]: ReadonlyArray<string>, leaf: unknown): unknown =>
      key === "" ? leaf : Array.isArray(target) ? target.map((item, index) => (String(index) === key ? set(item, rest, leaf) : item)) : { ...(typeof target === "object" ? target : {}), [key]: set((target as Record<string, unknown>)?.[key], rest, leaf) }
    fc.assert(
      fc.property(fc.constantFrom(...paths), value, (path, found) => {
        const text = JSON.stringify(set(full, path.split("."), found))
        const problems = refusals(text)
        const schema = validate(JSON.parse(text))
        expect(schema || problems.length > 0, `only the JSON Schema refuses ${path}: ${JSON.stringify(found)}: ${JSON.stringify(validate.errors)}`).toBe(true)
        // What only the loader can know: how two keys go together, whether a number is too large, and what an address is made of.
        const beyondSchema = problems.every((problem) => /no worker has the role|expected a size|expected a duration|http\(s\) address|nats:\/\/HOST/.test(problem))
        expect(!schema || problems.length === 0 || beyondSchema, `only the loader refuses ${path}: ${JSON.stringify(found)}: ${problems.join("; ")}`).toBe(true)
      }),
      { numRuns: 200 },
    )
  })
})

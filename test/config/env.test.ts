import { homedir } from "node:os"
import { describe, expect, test } from "vitest"
import { ConfigError } from "../../config/config-error.ts"
import { readEnv } from "../../config/env.ts"
import { quantity } from "../../config/quantity.ts"

describe("the environment", () => {
  test("empty variables count as unset", () => {
    const env = readEnv({ PENSTOCK_PORT: "", PENSTOCK_ISA: " " })
    expect(env).toMatchObject({ port: undefined, isa: undefined, threads: undefined, natsServer: undefined, otlpEndpoint: undefined })
    expect(env.home.startsWith(homedir())).toBe(true)
  })

  test("the cache folder follows PENSTOCK_HOME, then XDG_CACHE_HOME", () => {
    expect(readEnv({ XDG_CACHE_HOME: "/xdg" }).home).toBe("/xdg/penstock")
    expect(readEnv({ XDG_CACHE_HOME: "/xdg", PENSTOCK_HOME: "/mine" }).home).toBe("/mine")
    expect(readEnv({ XDG_CACHE_HOME: "relative" }).home).not.toContain("relative")
  })

  test("every wrong variable is named, with what is allowed", () => {
    const wrong = { PENSTOCK_HOME: "here", PENSTOCK_PORT: "70000", PENSTOCK_ISA: "sse", PENSTOCK_THREADS: "0", OTEL_EXPORTER_OTLP_ENDPOINT: "localhost" }
    try {
      readEnv(wrong)
      expect.unreachable()
    } catch (error) {
      expect(error).toBeInstanceOf(ConfigError)
      expect(new Set((error as ConfigError).problems)).toEqual(new Set([
        'PENSTOCK_HOME: expected an absolute path, found "here"',
        'PENSTOCK_PORT: expected a whole number in 0 … 65535, found "70000"',
        'PENSTOCK_ISA: expected one of reference, avx2, avx512, found "sse"',
        'PENSTOCK_THREADS: expected a whole number in 1 … 1024, found "0"',
        'OTEL_EXPORTER_OTLP_ENDPOINT: expected an http or https address, found "localhost"'
      ]))
    }
  })

  test("sizes and durations say their unit", () => {
    expect(quantity.bytes("256MiB")).toBe(268_435_456)
    expect(quantity.bytes("1.5 GB")).toBe(1_500_000_000)
    expect(quantity.bytes(4096)).toBe(4096)
    expect(quantity.milliseconds("2s")).toBe(2000)
    expect(quantity.milliseconds("200ms")).toBe(200)
    for (const wrong of ["", "MiB", "-1MiB", "1 potato", "1e9GiB", null, Number.NaN, -1]) expect(quantity.bytes(wrong)).toBeUndefined()
    expect(quantity.milliseconds(5)).toBeUndefined()
  })
})

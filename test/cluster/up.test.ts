import { createServer, type AddressInfo } from "node:net"
import { execFileSync } from "node:child_process"
import { existsSync, rmSync } from "node:fs"
import { expect, it } from "vitest"
import { runStart, startProcess, writeTopology } from "../support/start-process.ts"
import { streamCompletion } from "../support/start-node.ts"

const descendantsOf = (root: number): ReadonlyArray<{ readonly pid: number; readonly command: string }> => {
  const all = execFileSync("ps", ["-eo", "pid=,ppid=,args="]).toString().split("\n").map((line) => line.trim().split(/\s+/))
  const below = (parent: number): ReadonlyArray<{ readonly pid: number; readonly command: string }> =>
    all.filter(([, ppid]) => Number(ppid) === parent).flatMap(([pid, , ...command]) => [{ pid: Number(pid), command: command.join(" ") }, ...below(Number(pid))])
  return below(root)
}

it("prints its address and a ready line, answers, and ends with code 0 on Ctrl-C", async () => {
  const started = await startProcess()
  const { tokens } = await streamCompletion(started, { prompt: "Hello", max_tokens: 5, ignore_eos: true })
  expect(tokens).toHaveLength(5)
  expect(await started.signal("SIGINT")).toBe(0)
  expect(started.output()).toMatch(/serves tiny at http:\/\/127\.0\.0\.1:\d+/)
  expect(started.output()).toMatch(/^ready/m)
})

it("brings up the real model by one command, which answers a question", { timeout: 120_000 }, async () => {
  const started = await startProcess({ real: true })
  const body = { model: "smollm2-135m", messages: [{ role: "user", content: "What is 2 + 2?" }], temperature: 0, max_tokens: 30 }
  const answer = (await (await fetch(`${started.url}/v1/chat/completions`, { method: "POST", body: JSON.stringify(body) })).json()) as { choices: ReadonlyArray<{ message: { content: string } }> }
  expect(answer.choices[0]!.message.content).toContain("4")
  expect(await started.signal("SIGINT")).toBe(0)
  expect(started.output()).toMatch(/^Penstock serves smollm2-135m at /m)
})

it.each(["SIGINT", "SIGTERM"] as const)("on %s while it still starts it ends with code 0 and leaves no process behind", async (signal) => {
  const { folder, path } = await writeTopology(["bus: { nats: { spawn: true } }", "workers:", "  - { name: w0, roles: [prefill, decode] }", "  - { name: w1, roles: [prefill, decode] }"])
  const { child, ended, output } = runStart(["--topology", path, "--port", "0"])
  const processes = () => descendantsOf(child.pid!)
  // Some of its actors' processes are there, and it does not serve yet.
  while (child.exitCode === null && !processes().some(({ command }) => command.includes("actors/node/child"))) await new Promise((resolve) => setTimeout(resolve, 5))
  const started = processes()
  process.kill(-child.pid!, signal)
  expect(await ended).toBe(0)
  rmSync(folder, { recursive: true })
  expect(output()).toContain(`${signal}: stopping`)
  expect(output()).not.toMatch(/ready after|\n\s+at /)
  expect(started.filter(({ pid, command }) => existsSync(`/proc/${pid}`) && !command.includes("nats-server"))).toEqual([])
  // What watches over the nats-server reads that it is not needed any more, and ends a moment later.
  while (started.some(({ pid }) => existsSync(`/proc/${pid}`))) await new Promise((resolve) => setTimeout(resolve, 5))
})

it.each(["SIGINT", "SIGTERM"] as const)("on %s open streams are told why before their sockets close", async (signal) => {
  const started = await startProcess()
  const response = await fetch(`${started.url}/v1/completions`, {
    method: "POST",
    body: JSON.stringify({ model: "tiny", prompt: "A very long story:", max_tokens: 480, ignore_eos: true, stream: true }),
  })
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader()
  let text = (await reader.read()).value ?? ""
  const ended = started.signal(signal)
  for (let next = await reader.read(); !next.done; next = await reader.read()) text += next.value
  expect(await ended).toBe(0)
  // Either the answer was complete within the grace, or the stream says that the server stops.
  const last = text.trimEnd().split("\n\n").at(-1)!
  if (last !== "data: [DONE]") expect(JSON.parse(last.slice("data: ".length))).toMatchObject({ error: { code: "shutting_down" } })
})

it("a port in use is one clear line that names it and a remedy, and exit code 1", async () => {
  const blocker = createServer().listen(0, "127.0.0.1")
  await new Promise((resolve) => blocker.once("listening", resolve))
  const { port } = blocker.address() as AddressInfo
  const { folder, path } = await writeTopology()
  const { ended, output } = runStart(["--topology", path, "--port", String(port)])
  expect(await ended).toBe(1)
  blocker.close()
  rmSync(folder, { recursive: true })
  expect(output()).toContain(`127.0.0.1:${port}`)
  expect(output()).toMatch(/in use/)
  expect(output()).not.toMatch(/\n\s+at /)
})

it("a typo in the topology names file, line, key and what is allowed, and nothing starts", async () => {
  const { folder, path } = await writeTopology(["workers:", "  - { name: w0, rolls: [prefill, decode] }"])
  const { ended, output } = runStart(["--topology", path])
  expect(await ended).toBe(1)
  rmSync(folder, { recursive: true })
  expect(output()).toMatch(/tiny\.yaml:4: workers\[0\]\.rolls: .*roles/)
})

it("a host that others can reach is refused without keys", async () => {
  const { folder, path } = await writeTopology(["gateway: { host: 0.0.0.0, port: 0 }"])
  const { ended, output } = runStart(["--topology", path])
  expect(await ended).toBe(1)
  rmSync(folder, { recursive: true })
  expect(output()).toMatch(/key file/)
})

it("a model file that is cut short is refused with its name", async () => {
  const { folder, path } = await writeTopology()
  const { truncateSync } = await import("node:fs")
  truncateSync(`${folder}/tiny.gguf`, 5_000)
  const { ended, output } = runStart(["--topology", path, "--port", "0"])
  expect(await ended).toBe(1)
  rmSync(folder, { recursive: true })
  expect(output()).toContain("tiny.gguf")
})

// Plain JavaScript, because bootstrap.mjs needs it before node_modules exists; folder-lock.d.mts has the types.
import { linkSync, mkdirSync, readFileSync, renameSync, statSync, unlinkSync, utimesSync, writeFileSync } from "node:fs"
import { hostname } from "node:os"
import { dirname } from "node:path"
import { setTimeout as sleep } from "node:timers/promises"

const pollMs = 100
const touchMs = 2_000
// A process that is alive but blocked (a debugger, a suspended laptop) may be late; a dead one never comes back.
const silentMs = 60_000
// Between creating a lock and writing its holder into it.
const emptyMs = 5_000

/** Tokens of the locks that this process holds. */
const held = new Set()

const tryTake = (path, holder) => {
  try {
    writeFileSync(path, holder, { flag: "wx" })
    return true
  } catch (error) {
    if (error.code === "EEXIST") return false
    throw error
  }
}

const remove = (path) => {
  try {
    unlinkSync(path)
  } catch (error) {
    if (error.code !== "ENOENT") throw error
  }
}

const alive = (pid) => {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return error.code === "EPERM"
  }
}

const isStale = (path, holder) => {
  let age
  try {
    age = Date.now() - statSync(path).mtimeMs
  } catch {
    return false
  }
  const [host, pid, token] = holder.split(" ")
  if (pid === undefined) return age > emptyMs
  // In a container every start has the same process id.
  if (host === hostname() && Number(pid) === process.pid && !held.has(token)) return true
  if (host === hostname() && !alive(Number(pid))) return true
  return age > silentMs
}

/** Takes a stale lock away, unless somebody else did so first and holds it by now. */
const breakLock = (path, stale, token) => {
  const aside = `${path}.${token}`
  try {
    renameSync(path, aside)
  } catch (error) {
    if (error.code === "ENOENT") return
    throw error
  }
  if (readFileSync(aside, "utf8") !== stale) {
    try {
      linkSync(aside, path)
    } catch (error) {
      if (error.code !== "EEXIST") throw error
    }
  }
  remove(aside)
}

export const takeLock = async (path, { deadlineMs, onWait }) => {
  mkdirSync(dirname(path), { recursive: true })
  const token = `${process.pid}.${Math.random().toString(36).slice(2)}`
  const holder = `${hostname()} ${process.pid} ${token}`
  const end = Date.now() + deadlineMs
  let told = false
  while (!tryTake(path, holder)) {
    let current
    try {
      current = readFileSync(path, "utf8")
    } catch (error) {
      if (error.code === "ENOENT") continue
      throw error
    }
    if (isStale(path, current)) {
      breakLock(path, current, token)
      continue
    }
    const pid = current.split(" ")[1] ?? "unknown"
    if (!told) onWait?.(`process ${pid}`)
    told = true
    if (Date.now() >= end) throw new Error(`${path}: held by process ${pid} for more than ${Math.round(deadlineMs / 1000)} s; end that process, or delete the file if it is gone`)
    await sleep(pollMs)
  }
  held.add(token)
  const touch = setInterval(() => {
    try {
      utimesSync(path, new Date(), new Date())
    } catch {
      // It is gone; release() will find that out.
    }
  }, touchMs)
  touch.unref()
  return () => {
    clearInterval(touch)
    held.delete(token)
    try {
      if (readFileSync(path, "utf8") === holder) unlinkSync(path)
    } catch (error) {
      if (error.code !== "ENOENT") throw error
    }
  }
}

/**
 * The socket on which the process of a component waits for a supervisor once its own is gone: who connects first is told what
 * it is, and then that it lives, until the connection ends. Without one it goes on for a while, and then ends by itself.
 */
import { createServer, type Server, type Socket } from "node:net"
import { limits } from "../../config/limits.ts"
import type { ChildReport, Hello } from "./supervised-child.ts"

export class ChildControl {
  readonly #server: Server
  readonly #hello: () => Hello
  readonly #onExpired: () => void
  #supervised = true
  #adopter: Socket | undefined
  #lease: NodeJS.Timeout | undefined

  /** @param onExpired called once nobody has supervised it for limits.orphanLeaseMs */
  constructor(path: string, hello: () => Hello, onExpired: () => void) {
    this.#hello = hello
    this.#onExpired = onExpired
    this.#server = createServer((socket) => this.#connected(socket))
    this.#server.on("error", (error) => console.error(`${path}: nobody can take over this process: ${error.message}`))
    this.#server.listen(path)
    this.#server.unref()
  }

  /** Its first supervisor is gone. */
  orphaned(): void {
    this.#supervised = false
    // Whoever read what this process says may be gone as well.
    for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {})
    this.#wait()
  }

  /** Says something to the supervisor that has taken over; nothing where there is none. */
  report(message: ChildReport | Hello): void {
    this.#adopter?.write(`${JSON.stringify(message)}\n`)
  }

  close(): void {
    clearTimeout(this.#lease)
    this.#server.close()
    this.#adopter?.destroy()
  }

  #connected(socket: Socket): void {
    socket.on("error", () => {})
    if (this.#supervised) return void socket.destroy()
    // One that comes later has taken the place of an earlier one.
    this.#adopter?.destroy()
    this.#adopter = socket
    clearTimeout(this.#lease)
    socket.resume()
    socket.once("close", () => {
      if (this.#adopter !== socket) return
      this.#adopter = undefined
      this.#wait()
    })
    this.report(this.#hello())
  }

  #wait(): void {
    clearTimeout(this.#lease)
    this.#lease = setTimeout(this.#onExpired, limits.orphanLeaseMs)
  }
}

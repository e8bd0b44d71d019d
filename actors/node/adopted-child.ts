/**
 * A process that another agent of this node has started, and that goes on under this one: heard over its socket, whose end is
 * its own, and ended by its process id.
 */
import { EventEmitter } from "node:events"
import { createConnection, type Socket } from "node:net"
import { createInterface } from "node:readline"
import { limits } from "../../config/limits.ts"
import type { ChildRecord } from "./child-records.ts"
import type { ChildReport, Hello, SupervisedChild } from "./supervised-child.ts"

interface Events {
  readonly message: [ChildReport]
  readonly exit: [number | null, NodeJS.Signals | null]
  readonly error: [Error]
}

export class AdoptedChild extends EventEmitter<Events> implements SupervisedChild {
  readonly pid: number
  readonly hello: Hello
  /** The path of its socket. */
  readonly control: string
  exitCode: number | null = null
  readonly signalCode = null
  readonly #socket: Socket

  private constructor(socket: Socket, hello: Hello, control: string) {
    super()
    this.control = control
    this.pid = hello.pid
    this.hello = hello
    this.#socket = socket
    socket.once("close", () => {
      this.exitCode = 0 // nobody but its parent learns the true one
      this.emit("exit", null, null)
    })
  }

  /** Resolves to the process that a record names, or to undefined where it does not answer, or is not that. */
  static adopt({ control, pid, planned }: ChildRecord): Promise<AdoptedChild | undefined> {
    return new Promise((resolve) => {
      const socket = createConnection(control)
      const give = (child: AdoptedChild | undefined) => {
        clearTimeout(late)
        if (child === undefined) socket.destroy()
        resolve(child)
      }
      const late = setTimeout(() => give(undefined), limits.askDeadlineMs)
      let child: AdoptedChild | undefined
      socket.once("error", () => give(undefined))
      socket.once("close", () => give(undefined))
      createInterface(socket)
        .on("error", () => {})
        .on("line", (line) => {
          let said: Hello | ChildReport
          try {
            said = JSON.parse(line) as Hello | ChildReport
          } catch {
            return
          }
          if (said.type !== "hello") return void child?.emit("message", said)
          const { component } = said
          child = said.pid === pid && component.kind === planned.kind && component.id === planned.id ? new AdoptedChild(socket, said, control) : undefined
          give(child)
        })
    })
  }

  /** False where it has ended. */
  kill(signal: NodeJS.Signals): boolean {
    if (this.exitCode !== null) return false
    try {
      return process.kill(this.pid, signal)
    } catch {
      this.#socket.destroy()
      return false
    }
  }
}

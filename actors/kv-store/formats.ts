/** How the blocks of each format are laid out, which its first put says; the one that was put longest ago is forgotten. */
import { Effect } from "effect"
import { limits } from "../../config/limits.ts"
import type { KvLayout } from "../engine/worker.ts"
import { Fault } from "../runtime/fault.ts"

export interface StoredFormat {
  readonly formatId: string
  readonly layout: KvLayout
}

export const sameLayout = (a: KvLayout, b: KvLayout): boolean => textOf(a) === textOf(b)

const textOf = ({ layers, layerBlockBytes, dtype, blockTokens }: KvLayout): string => `${layers} layers of ${layerBlockBytes} bytes (${dtype}, ${blockTokens} tokens)`

export class Formats {
  readonly #sender: string
  readonly #layouts = new Map<string, KvLayout>() // the one that was put longest ago first

  constructor(sender: string) {
    this.#sender = sender
  }

  /** Fails with both layouts where this is not the format's. */
  check({ formatId, layout }: StoredFormat): Effect.Effect<void, Fault> {
    const known = this.#layouts.get(formatId)
    if (known === undefined || sameLayout(known, layout)) return Effect.void
    return Effect.fail(new Fault({ code: "invalid_request", message: `${this.#sender}: format ${formatId} has blocks of ${textOf(known)}, not of ${textOf(layout)}`, hop: this.#sender }))
  }

  remember({ formatId, layout }: StoredFormat): void {
    this.#layouts.delete(formatId)
    this.#layouts.set(formatId, layout)
    if (this.#layouts.size > limits.storeFormats) this.#layouts.delete(this.#layouts.keys().next().value!)
  }
}

/** What a worker has measured of its own: its steps, and what came to it from each source. */
import { limits } from "../../config/limits.ts"
import type { LinearFit } from "./linear-fit.ts"
import { prefillCostOf, withStep, type PrefillCost, type PrefillFit, type PrefillSample } from "./prefill-cost.ts"
import { noTransfers, transferCostOf, withTransfer, type TransferCost, type TransferSample } from "./transfer-cost.ts"

export class MeasuredCosts {
  readonly #now: () => number
  #prefill: PrefillFit | undefined
  readonly #sources = new Map<string, LinearFit>() // the one that was used longest ago first

  constructor(now: () => number = () => performance.now()) {
    this.#now = now
  }

  /** A step's prompts were computed. */
  prefilled(sample: PrefillSample): void {
    this.#prefill = withStep(this.#prefill, sample, this.#now())
  }

  /** Undefined before the first step. */
  get prefill(): PrefillCost | undefined {
    return this.#prefill === undefined ? undefined : prefillCostOf(this.#prefill, this.#now())
  }

  /** KV came from a source, or would not come for so long. */
  moved(source: string, sample: TransferSample): void {
    const fit = this.#sources.get(source) ?? noTransfers(this.#now())
    this.#sources.delete(source)
    this.#sources.set(source, withTransfer(fit, sample, this.#now()))
    if (this.#sources.size > limits.costSources) this.#sources.delete(this.#sources.keys().next().value!)
  }

  transfer(source: string): TransferCost {
    return transferCostOf(this.#sources.get(source) ?? noTransfers(this.#now()), this.#now())
  }
}

/** A model could not be had. The message is for people and says what to do; no stack. */
export class FetchError extends Error {
  readonly _tag = "FetchError"
  /** Another source cannot help either (a full disk), so none is tried. */
  readonly final: boolean

  constructor(message: string, options: { readonly final?: boolean } = {}) {
    super(message)
    this.name = "FetchError"
    this.final = options.final ?? false
  }
}

/** The same message for a disk found full before and one found full while writing. */
export const diskFull = (folder: string, neededBytes: number | undefined): FetchError =>
  new FetchError(
    `${folder}: the disk is full${neededBytes === undefined ? "" : `; the model needs ${Math.ceil(neededBytes / 2 ** 20)} MiB`}: free some space, or set PENSTOCK_HOME to a folder on another disk`,
    { final: true }
  )

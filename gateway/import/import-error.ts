/** A folder cannot be imported. The message names the file, the key in it, what was expected and what was found; no stack. */
export class ImportError extends Error {
  readonly _tag = "ImportError"

  constructor(message: string) {
    super(message)
    this.name = "ImportError"
  }
}

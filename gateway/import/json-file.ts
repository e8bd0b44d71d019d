import { readFile, stat } from "node:fs/promises"
import { join } from "node:path"
import { showFound, valueAt } from "../../config/problem.ts"
import { ImportError } from "./import-error.ts"

const mostOfAnything = 2 ** 24

/** Throws ImportError where a path is something else than a file, which could be read for ever, and the system's error where there is nothing. */
export const expectFile = async (path: string): Promise<void> => {
  if (!(await stat(path)).isFile()) throw new ImportError(`${path}: expected a file`)
}

/** A JSON file of a Hugging Face folder, whose values are checked as they are read. A key is a path: `quantization_config.bits`. */
export class JsonFile {
  readonly name: string
  readonly value: Readonly<Record<string, unknown>>

  private constructor(name: string, value: Readonly<Record<string, unknown>>) {
    this.name = name
    this.value = value
  }

  /** `undefined` where there is no such file. Throws ImportError where it is not an object in JSON. */
  static async find(folder: string, name: string): Promise<JsonFile | undefined> {
    let text: string
    try {
      await expectFile(join(folder, name))
      text = await readFile(join(folder, name), "utf8")
    } catch (error) {
      if (error instanceof ImportError) throw error
      const { code } = error as NodeJS.ErrnoException
      if (code === "ENOENT") return undefined
      throw new ImportError(`${join(folder, name)}: cannot be read (${code})`)
    }
    let value: unknown
    try {
      value = JSON.parse(text)
    } catch (error) {
      throw new ImportError(`${name}: expected JSON: ${(error as Error).message}`)
    }
    if (typeof value !== "object" || value === null || Array.isArray(value)) throw new ImportError(`${name}: expected an object, found ${showFound(value)}`)
    return new JsonFile(name, value as Readonly<Record<string, unknown>>)
  }

  /** As `find`, but throws where there is none. */
  static async read(folder: string, name: string): Promise<JsonFile> {
    const found = await JsonFile.find(folder, name)
    if (found === undefined) throw new ImportError(`${join(folder, name)}: expected a file, found none`)
    return found
  }

  /** `undefined` for what is absent or null. */
  get(key: string): unknown {
    return valueAt(this.value, key.split(".")) ?? undefined
  }

  refuse(key: string, expected: string): never {
    throw new ImportError(`${this.name}: ${key}: expected ${expected}, found ${showFound(this.get(key))}`)
  }

  /** Refuses anything but these; `undefined` is what is absent or null. */
  oneOf(key: string, ...allowed: ReadonlyArray<string | number | boolean | undefined>): void {
    const found = this.get(key)
    if (!allowed.includes(found as string)) this.refuse(key, allowed.map((value) => (value === undefined ? "nothing" : JSON.stringify(value))).join(" or "))
  }

  /** A whole number from 1 to 2^24; what the kernels take of each is checked when the model is loaded. */
  count(key: string, fallback?: number): number {
    const found = this.get(key) ?? fallback
    const isCount = Number.isInteger(found) && (found as number) > 0 && (found as number) <= mostOfAnything
    return isCount ? (found as number) : this.refuse(key, `a whole number in 1 … ${mostOfAnything}`)
  }

  positive(key: string, fallback?: number): number {
    const found = this.get(key) ?? fallback
    return typeof found === "number" && found > 0 && Number.isFinite(found) ? found : this.refuse(key, "a positive number")
  }
}

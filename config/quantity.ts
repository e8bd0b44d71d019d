const byteUnits: Readonly<Record<string, number>> = {
  B: 1,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
  KiB: 2 ** 10,
  MiB: 2 ** 20,
  GiB: 2 ** 30,
  TiB: 2 ** 40
}

const millisecondUnits: Readonly<Record<string, number>> = { ms: 1, s: 1e3, m: 60e3, h: 3600e3 }

/** What people write instead. */
const unitWords: ReadonlyArray<readonly [words: RegExp, unit: string]> = [
  [/^(msecs?|millis|milliseconds?)$/i, "ms"],
  [/^(secs?|seconds?)$/i, "s"],
  [/^(mins?|minutes?)$/i, "m"],
  [/^(hrs?|hours?)$/i, "h"],
  [/^bytes?$/i, "B"],
  [/^ki?$/i, "KiB"],
  [/^mi?$/i, "MiB"],
  [/^gi?$/i, "GiB"],
  [/^ti?$/i, "TiB"]
]

const parse = (found: unknown, units: Readonly<Record<string, number>>): number | undefined => {
  if (typeof found !== "string") return undefined
  const match = new RegExp(patternOf(units)).exec(found)
  const unit = units[match?.[2] ?? ""]
  if (match === null || unit === undefined) return undefined
  const value = Math.round(Number(match[1]) * unit)
  return Number.isSafeInteger(value) ? value : undefined
}

const patternOf = (units: Readonly<Record<string, number>>): string => `^\\s*(\\d+(?:\\.\\d+)?)\\s*(${Object.keys(units).join("|")})\\s*$`

/** The right spelling of a number with a unit that is nearly one. A bare number has none. */
const meant = (found: unknown, units: Readonly<Record<string, number>>): string | undefined => {
  const match = typeof found === "string" ? /^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*$/.exec(found) : null
  const word = match?.[2] ?? ""
  const unit = Object.keys(units).find((known) => known.toLowerCase() === word.toLowerCase()) ?? unitWords.find(([words, known]) => words.test(word) && known in units)?.[1]
  return match === null || unit === undefined ? undefined : `${match[1]}${unit}`
}

const isBytes = (found: unknown): found is number => typeof found === "number" && Number.isSafeInteger(found) && found >= 0

/** Units written in a file, turned into the one unit the code uses. `undefined` where the text is no such quantity. */
export const quantity = {
  /** `256MiB`, `2GB`, `0B` or a plain number of bytes. */
  bytes: (found: unknown): number | undefined => (isBytes(found) ? found : parse(found, byteUnits)),
  /** `200ms`, `2s`, `1.5m`, `1h`, in milliseconds. A bare number is refused: it would not say its unit. */
  milliseconds: (found: unknown): number | undefined => parse(found, millisecondUnits),
  /** The regular expressions of their texts. */
  bytesPattern: patternOf(byteUnits),
  millisecondsPattern: patternOf(millisecondUnits),
  byteUnits: Object.keys(byteUnits),
  millisecondUnits: Object.keys(millisecondUnits),
  /** `512mb` is 512MB, `2 sec` is 2s. */
  meantBytes: (found: unknown): string | undefined => meant(found, byteUnits),
  meantDuration: (found: unknown): string | undefined => meant(found, millisecondUnits)
}

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

const parse = (found: unknown, units: Readonly<Record<string, number>>): number | undefined => {
  if (typeof found !== "string") return undefined
  const match = /^(\d+(?:\.\d+)?)\s*([A-Za-z]+)$/.exec(found.trim())
  const unit = match === null ? undefined : units[match[2] ?? ""]
  if (match === null || unit === undefined) return undefined
  const value = Math.round(Number(match[1]) * unit)
  return Number.isSafeInteger(value) ? value : undefined
}

/** Units written in a file, turned into the one unit the code uses. `undefined` where the text is no such quantity. */
export const quantity = {
  /** `256MiB`, `2GB`, `0B` or a plain number of bytes. */
  bytes: (found: unknown): number | undefined =>
    typeof found === "number" ? (Number.isSafeInteger(found) && found >= 0 ? found : undefined) : parse(found, byteUnits),
  /** `200ms`, `2s`, `1.5m`, `1h`, in milliseconds. A bare number is refused: it would not say its unit. */
  milliseconds: (found: unknown): number | undefined => parse(found, millisecondUnits)
}

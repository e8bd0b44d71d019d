/**
 * GPT-2's printable alphabet for bytes: a byte that prints stands for itself, the others follow from U+0100 on.
 * Source: bytes_to_unicode of the GPT-2 encoder.
 */
const toChar: ReadonlyArray<string> = (() => {
  let spare = 256
  return Array.from({ length: 256 }, (_, byte) => {
    const prints = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174
    return String.fromCharCode(prints ? byte : spare++)
  })
})()

const toByte: ReadonlyMap<string, number> = new Map(toChar.map((char, byte) => [char, byte]))

const ascii = /^[!-~]*$/

/** The alphabet that byte-level BPE vocabularies are written in. */
export const byteLevel = {
  /** UTF-8 of the text in the printable alphabet. A lone surrogate becomes U+FFFD. */
  write: (text: string): string => {
    if (ascii.test(text)) return text
    let written = ""
    for (const byte of Buffer.from(text, "utf8")) written += toChar[byte]
    return written
  },
  /** The bytes of a vocabulary entry; `undefined` where it has a character outside the alphabet. */
  read: (entry: string): Uint8Array | undefined => {
    const bytes = new Uint8Array(entry.length)
    for (let i = 0; i < entry.length; i++) {
      const byte = toByte.get(entry[i] ?? "")
      if (byte === undefined) return undefined
      bytes[i] = byte
    }
    return bytes
  }
}

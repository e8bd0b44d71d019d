import { readdirSync, readFileSync } from "node:fs"
import { describeTopology, type Description } from "./describe-topology.ts"

const presetsFolder = new URL("./topologies/", import.meta.url)

/** Those people look for first. */
const presetOrder = ["single", "disaggregated", "two-prefill-one-decode", "one-prefill-two-decode", "hybrid", "cluster", "gpu"]

/** Names of the files of config/topologies. */
export const presetNames = (): ReadonlyArray<string> => {
  const place = (name: string) => (presetOrder.includes(name) ? presetOrder.indexOf(name) : presetOrder.length)
  return readdirSync(presetsFolder).map((file) => file.replace(/\.yaml$/, "")).sort((a, b) => place(a) - place(b) || (a < b ? -1 : 1))
}

/** What a preset is for: the comment that it begins with. */
const purposeOf = (preset: string): string => {
  const lines = readFileSync(new URL(`${preset}.yaml`, presetsFolder), "utf8").split("\n")
  const end = lines.findIndex((line) => !line.startsWith("# ") || line.startsWith("# yaml-language-server"))
  return lines.slice(0, end).map((line) => line.slice(2)).join(" ")
}

/** As it would be written in a file. */
const written = (value: unknown): string => {
  if (Array.isArray(value)) return `[${value.map(written).join(", ")}]`
  if (typeof value === "object" && value !== null) return Object.keys(value).length === 0 ? "{}" : `{ ${Object.entries(value).map(([key, inner]) => `${key}: ${written(inner)}`).join(", ")} }`
  return String(value)
}

const defaultOf = ({ isRequired, fallback, parts }: Description): string =>
  isRequired ? "must be given" : fallback === undefined ? "not there" : parts.kind === "mapping" ? "" : `\`${written(fallback)}\``

const allowedOf = ({ expected, parts, usable }: Description): string => {
  const all = expected ?? (parts.kind === "list" ? "a list" : "a mapping")
  return usable === undefined ? all : `${all}; **for now ${usable}**`
}

const row = (path: string, part: Description): string => `| \`${path}\` | ${part.description} | ${allowedOf(part)} | ${defaultOf(part)} |`

/** A row for each key, those inside it behind it. */
const rowsOf = (path: string, part: Description): ReadonlyArray<string> => {
  switch (part.parts.kind) {
    case "mapping":
      return part.parts.keys.flatMap(([name, inner]) => {
        const at = path === "" ? name : `${path}.${name}`
        return [row(at, inner), ...rowsOf(at, inner)]
      })
    case "list":
      return rowsOf(`${path}[]`, part.parts.item)
    case "choice":
      return part.parts.forms.flatMap((form) => rowsOf(path, form))
    case "value":
      return []
  }
}

/** config/README.md: how a topology file is written, and every key of it. */
export const topologyReference = (): string => `<!-- Written by \`npm run docs:config\` from topology.ts and the presets; edit there. -->

# Topology files

A topology file says what runs, in YAML 1.2 (JSON is a part of that). Every key but \`penstock\` may be left out.

- **Units** stand in the values: sizes are \`512MiB\` or \`2GB\`, or a plain number of bytes; durations are \`200ms\`, \`2s\`, \`1.5m\` or \`1h\`.
- **Paths** start from the file's folder.
- **\`--host\`, \`--port\` and \`PENSTOCK_PORT\`** win over the file, whenever it is read; \`--port\` wins over \`PENSTOCK_PORT\`.
- **A mistake** is one line with its place, what was found and what is allowed; all of them are told at once, and the file as a whole is
  refused: \`my.yaml:7: workers[0].rolls: unknown key, did you mean roles?; allowed: …\`. So is what the format describes and Penstock does
  not do yet (**for now** in the tables); nothing is ignored.
- **Editors** complete and check a file that says where [topology.schema.json](topology.schema.json) is. In VS Code (extension YAML), Neovim and
  others a line of the file does that, with the path from its folder: \`# yaml-language-server: $schema=../topology.schema.json\`.

## Presets

\`npm start -- --topology config/topologies/NAME.yaml\`

| file | for |
|---|---|
${presetNames().map((name) => `| [${name}](topologies/${name}.yaml) | ${purposeOf(name)} |`).join("\n")}

## Keys

\`workers[].name\` is the key \`name\` of each entry of the list \`workers\`. Beyond what the table says: workers' names differ, their
\`kv.dtype\` and \`kv.blockTokens\` do not, each role is some worker's, of \`credentials\`, \`nkey\` and \`token\` at most one is given, and
\`admission\` other than \`none\` needs \`objectives\`.

| key | meaning | allowed | default |
|---|---|---|---|
${rowsOf("", describeTopology()).join("\n")}
`

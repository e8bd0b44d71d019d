/** `npm run docs:config`: writes what is made from the schema of topology files. */
import { writeFileSync } from "node:fs"
import { topologyJsonSchema } from "./topology-json-schema.ts"
import { topologyReference } from "./topology-reference.ts"

writeFileSync(new URL("./README.md", import.meta.url), topologyReference())
writeFileSync(new URL("./topology.schema.json", import.meta.url), topologyJsonSchema())

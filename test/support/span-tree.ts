/** A trace as nested lines: names and where they ran, so that a test says what the tree is. */
export interface TreeSpan {
  readonly spanId: string
  readonly parentId: string
  readonly name: string
  readonly service: string
  readonly startMs: number
  readonly endMs: number
}

const childrenOf = (spans: ReadonlyArray<TreeSpan>, parentId: string) => spans.filter((span) => span.parentId === parentId).sort((a, b) => (a.name === b.name ? a.startMs - b.startMs : a.name < b.name ? -1 : 1))

/** "name @ service" of every span, two spaces deeper than its parent, siblings by name. Equal siblings once. */
export const treeOf = (spans: ReadonlyArray<TreeSpan>, parentId = "", depth = 0): ReadonlyArray<string> => {
  const subtrees = childrenOf(spans, parentId).map((span) => [`${"  ".repeat(depth)}${span.name} @ ${span.service}`, ...treeOf(spans, span.spanId, depth + 1)])
  return subtrees.filter((subtree, i) => i === 0 || subtree.join() !== subtrees[i - 1]!.join()).flat()
}

/** The trace as a picture: each span with when it began and how long it took, siblings in the order of beginning. */
export const drawTrace = (spans: ReadonlyArray<TreeSpan & { readonly component: string }>): ReadonlyArray<string> => {
  const firstMs = Math.min(...spans.map(({ startMs }) => startMs))
  const lines = (parentId: string, depth: number): ReadonlyArray<string> =>
    spans
      .filter((span) => span.parentId === parentId)
      .sort((a, b) => a.startMs - b.startMs)
      .flatMap(({ spanId, name, component, startMs, endMs }) => {
        const label = `${"  ".repeat(depth)}${name}`
        return [`${label.padEnd(28)}${component.padEnd(14)}${`+${(startMs - firstMs).toFixed(1)}`.padStart(8)} ms${(endMs - startMs).toFixed(1).padStart(9)} ms`, ...lines(spanId, depth + 1)]
      })
  return lines("", 0)
}

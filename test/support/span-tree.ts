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

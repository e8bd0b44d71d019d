/** Node's arguments for a program, given the path of its source: its bundle in build/programs where that is up to date. */
export function programArguments(source: string): ReadonlyArray<string>

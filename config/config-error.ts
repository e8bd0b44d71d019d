/** Something the operator wrote is wrong. The message alone is for people: place, what was found, remedy; no stack. */
export class ConfigError extends Error {
  readonly _tag = "ConfigError"
  /** One line each, most useful first. */
  readonly problems: ReadonlyArray<string>

  constructor(problems: ReadonlyArray<string>) {
    super(problems.join("\n"))
    this.name = "ConfigError"
    this.problems = problems
  }
}

// Steps: calls of functions whose results are recorded, so that a later run gets the result instead of calling again.

import type { Client } from "./client.js";
import { Deadline } from "./deadline.js";
import { InvalidArgument, RunEnded, StepFailed, StepMismatch } from "./errors.js";
import { escaped, functionName, idempotencyKey, stepId } from "./step-names.js";
import { Policy } from "./step-policy.js";
import type { StepOptions } from "./step-policy.js";
import { encoded, shown } from "./values.js";
import { bodyWith } from "./wire.js";
import type { StepAnswer, StepBody } from "./wire.js";

/** Longest text of an error in a record, characters. */
const ERROR_TEXT_CHARACTERS = 2000;
const ERROR_TYPE_CHARACTERS = 255;

/** The function of a step. It is given the step's context; its result must be JSON. */
export type StepFunction<T> = (step: StepContext) => T | PromiseLike<T>;

/** One attempt of one step, as its function sees it. */
export interface StepContext {
  readonly agentId: string;
  /** As the caller gave it. */
  readonly name: string;
  /** The name with its place, as it stands in the history: `outer/ask#2`. */
  readonly id: string;
  /** From 1 on. */
  readonly attempt: number;
  /**
   * 32 hex digits that belong to this agent's step for ever: the same in every attempt, run and process. Pass it on to whoever
   * does the work, so that an attempt that is made again does it once. It is not the one that Python computes.
   */
  readonly idempotencyKey: string;
  /** The `signal` of the step's options. */
  readonly signal: AbortSignal | undefined;
  /** A step inside of this one, recorded as `outer/name` and counted within it. See `SkialithAgent.step`. */
  step<T>(name: string, fn: StepFunction<T>, options?: StepOptions): Promise<T>;
}

/** One run of a program. `over`: why it ended, if it did. `owned`: the taking over that the first step began. */
interface Run {
  over?: { readonly cause: unknown };
  owned?: Promise<unknown>;
}

/** Where steps are counted: the run itself, or one attempt of an outer step, whose id it is. */
interface Scope {
  readonly run: Run;
  readonly id: string;
  readonly counts: Map<string, number>;
}

/** One call of a step, which has its place. */
interface Called<T> {
  readonly run: Run;
  readonly id: string;
  readonly name: string;
  readonly fn: StepFunction<T>;
  readonly policy: Policy;
  readonly options: StepOptions;
  readonly rest: Omit<StepBody, "result" | "error">;
}

/** What is to be recorded: the body, and the error that the function threw, if it did. */
interface Outcome {
  readonly body: string;
  readonly cause?: unknown;
}

/** The steps of one agent, in runs that begin with the first step behind each `resume`. */
export class Steps {
  readonly #agentId: string;
  readonly #client: Client;
  readonly #stepIndex: () => number;
  /** Of functions that have run and whose record failed, in earlier runs of this object too. */
  readonly #kept = new Map<string, Outcome>();
  #root: Scope | undefined;

  constructor(agentId: string, client: Client, stepIndex: () => number) {
    this.#agentId = agentId;
    this.#client = client;
    this.#stepIndex = stepIndex;
  }

  /** The next step begins a run. */
  beginAnew(): void {
    this.#root = undefined;
  }

  /** The value of the next step of this name. Up to its first await, the call gets its place. */
  async call<T>(name: string, fn: StepFunction<T>, options: StepOptions, within?: Scope): Promise<T> {
    const known = escaped(name);
    const policy = new Policy(options);
    if (typeof fn !== "function") {
      throw new InvalidArgument(`step ${shown(name)}: fn must be a function, not ${typeof fn}: pass the function, not its result`, { path: "fn" });
    }
    const given = functionName(fn, options.functionName);
    this.#client.begin(this.#client.said(`step ${shown(name)}`), options);
    const scope: Scope = within ?? (this.#root ??= { run: {}, id: "", counts: new Map() });
    if (scope.run.over !== undefined) throw this.#ended(name, scope.run.over.cause);
    const n = (scope.counts.get(known) ?? 0) + 1;
    scope.counts.set(known, n);
    const step_index = this.#stepIndex();
    await this.#own(scope.run, options);
    const id = await stepId(scope.id, known, n);
    const rest = { step_id: id, name, n, function: given, step_index };
    return this.#value({ run: scope.run, id, name, fn, policy, options, rest });
  }

  async #value<T>(called: Called<T>): Promise<T> {
    const { id, run, options } = called;
    let recorded: StepAnswer | undefined;
    try {
      recorded = await this.#client.findStep(id, options);
    } catch (error) {
      run.over ??= { cause: error };
      throw error;
    }
    if (recorded !== undefined) {
      this.#kept.delete(id);
      return this.#replay(called, recorded);
    }
    const outcome = this.#kept.get(id) ?? (await this.#attempts(called));
    const mine = JSON.parse(outcome.body) as StepAnswer;
    let there: StepAnswer | undefined;
    try {
      there = await this.#client.recordStep(id, outcome.body, options);
    } catch (error) {
      if (!(error instanceof InvalidArgument)) {
        run.over ??= { cause: error };
        this.#kept.set(id, outcome);
      }
      throw error;
    }
    this.#kept.delete(id);
    const same = there === undefined || there.error?.message === mine.error?.message;
    return this.#replay(called, there ?? mine, same ? outcome.cause : undefined);
  }

  /** The first step of a run without `resume` takes the agent over. If that fails, there is no run. */
  async #own(run: Run, options: StepOptions): Promise<void> {
    if (this.#client.owns) return;
    const said = this.#client.said("step: taking over");
    run.owned ??= this.#client.claim(said, this.#client.begin(said, options));
    try {
      await run.owned;
    } catch (error) {
      if (this.#root?.run === run) this.#root = undefined;
      throw error;
    }
  }

  async #attempts<T>({ run, id, name, fn, policy, options, rest }: Called<T>): Promise<Outcome> {
    const key = await idempotencyKey(this.#agentId, id);
    const { signal } = options;
    for (let attempt = 1; ; attempt += 1) {
      const scope: Scope = { run, id, counts: new Map() };
      const step = <V>(inner: string, f: StepFunction<V>, o: StepOptions = {}): Promise<V> => this.call(inner, f, o, scope);
      let result: T;
      try {
        result = await fn({ agentId: this.#agentId, name, id, attempt, idempotencyKey: key, signal, step });
      } catch (cause) {
        if (signal?.aborted === true) throw cause;
        if (run.over === undefined && policy.triesAgain(cause, attempt)) {
          await this.#pause(id, policy.pause(attempt, Math.random()), signal);
          continue;
        }
        if (!policy.records(cause)) throw cause;
        return { body: bodyWith(rest, "error", JSON.stringify(described(cause))), cause };
      }
      const fate = "the function has run; its result is not recorded, so a later run calls it again";
      return { body: bodyWith(rest, "result", encoded(result === undefined ? null : result, "result", fate)) };
    }
  }

  async #pause(id: string, milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
    const forever = new Deadline(Number.POSITIVE_INFINITY, signal);
    try {
      await forever.pause(milliseconds);
    } catch {
      throw forever.ended(this.#client.said(`step ${shown(id)}`), "not_written");
    }
  }

  #replay<T>({ id, rest }: Called<T>, recorded: StepAnswer, cause?: unknown): T {
    const given = rest.function;
    const said = this.#client.said(`step ${shown(id)}`);
    // A function without a name says nothing.
    if (recorded.function !== given && recorded.function !== "" && given !== "") {
      const text =
        `${said} is recorded for ${recorded.function}, and this run calls it with ${given}; that was not called. Did the order of ` +
        "the steps change, or is it one name for two steps? Then give them names of their own. If the function was renamed, or a " +
        "minifier renames it, give its name as functionName";
      throw new StepMismatch(text, { step: id, recorded: recorded.function, given });
    }
    const { error } = recorded;
    if (error == null) return recorded.result as T;
    const text = `${said} failed, and that is recorded: ${error.type}: ${error.message}`;
    const facts = { step: id, errorType: error.type, errorMessage: error.message };
    throw new StepFailed(text, cause === undefined ? facts : { ...facts, cause });
  }

  #ended(name: string, cause: unknown): RunEnded {
    const why = cause instanceof Error ? cause.message : String(cause);
    const text =
      `${this.#client.said(`step ${shown(name)}`)} was not called, because the run ended when an earlier step could not be recorded or ` +
      `read (${why}): call resume() and begin the program again; what is recorded is not called again`;
    return new RunEnded(text, { cause, retryable: true });
  }
}

function described(error: unknown): { type: string; message: string } {
  const type = error instanceof Error ? error.name : typeof error;
  const message = error instanceof Error ? error.message : String(error);
  return { type: cut(type, ERROR_TYPE_CHARACTERS), message: cut(message, ERROR_TEXT_CHARACTERS) };
}

/** The beginning of a text, as Unicode. */
function cut(text: string, characters: number): string {
  return [...text.slice(0, 2 * characters)]
    .slice(0, characters)
    .join("")
    .replace(/\p{Surrogate}/gu, "\ufffd");
}

// How often a step's function is tried, after what pauses, and which of its errors are recorded.

import { InvalidArgument, SkialithError, StepFailed } from "./errors.js";
import type { CallOptions } from "./options.js";
import { checkedCount, checkedNumber } from "./values.js";

const MAX_RETRIES = 100;
const MAX_BACKOFF_MS = 3_600_000;

/** Which errors: of one of these classes, or those for which a function says yes. */
export type ErrorFilter = readonly (abstract new (...args: never[]) => unknown)[] | ((error: unknown) => boolean);

/** What `step` may be given. `timeout` counts for each request, not for the function; `signal` ends requests and pauses. */
export interface StepOptions extends CallOptions {
  /** How often the function is called again after it threw, 0 to 100. Default 0. */
  readonly retries?: number | undefined;
  /** Milliseconds before the first of these, up to an hour: half to all of it, by chance. Default 500. */
  readonly backoff?: number | undefined;
  /** Each pause is so many times the one before, 1 to 100. Default 2. */
  readonly backoffFactor?: number | undefined;
  /** Longest pause, milliseconds, up to an hour. Default 60,000. */
  readonly backoffMax?: number | undefined;
  /** After which errors it is called again. Default: all; those of this package only if they are `retryable`. */
  readonly retryOn?: ErrorFilter | undefined;
  /** Which errors are recorded in the end, so that every run rejects with `StepFailed`. Default: none, a later run tries again. */
  readonly recordErrors?: ErrorFilter | undefined;
  /** What the function is called in the record, at most 1000 characters. Default: its `name`, which minifiers change. */
  readonly functionName?: string | undefined;
}

/** The checked policy of one step. */
export class Policy {
  readonly #retries: number;
  readonly #first: number;
  readonly #factor: number;
  readonly #longest: number;
  readonly #retryOn: (error: unknown) => boolean;
  readonly #recordErrors: (error: unknown) => boolean;

  /** Throws `InvalidArgument`. */
  constructor(options: StepOptions) {
    this.#retries = checkedCount("retries", options.retries ?? 0, 0, MAX_RETRIES);
    this.#first = checkedNumber("backoff", options.backoff ?? 500, 0, MAX_BACKOFF_MS);
    this.#factor = checkedNumber("backoffFactor", options.backoffFactor ?? 2, 1, MAX_RETRIES);
    this.#longest = checkedNumber("backoffMax", options.backoffMax ?? 60_000, 0, MAX_BACKOFF_MS);
    this.#retryOn = filter("retryOn", options.retryOn, true);
    this.#recordErrors = filter("recordErrors", options.recordErrors, false);
  }

  /**
   * Milliseconds before the next attempt after so many failed ones; `share`: a random number from 0 to 1. Not full jitter:
   * retries of a step are few, and a service that asked for time would get them all at once when the dice fall badly.
   */
  pause(failures: number, share: number): number {
    return Math.min(this.#longest, this.#first * this.#factor ** (failures - 1)) * (0.5 + share / 2);
  }

  /** Whether the function is called again. */
  triesAgain(error: unknown, failures: number): boolean {
    if (failures > this.#retries || !this.#retryOn(error)) return false;
    return error instanceof SkialithError ? error.retryable : true;
  }

  /** Whether the error is recorded. Errors of this package say nothing of the step, except that an inner one failed. */
  records(error: unknown): boolean {
    const own = error instanceof SkialithError && !(error instanceof StepFailed);
    return !own && this.#recordErrors(error);
  }
}

function filter(path: string, given: ErrorFilter | undefined, otherwise: boolean): (error: unknown) => boolean {
  if (given === undefined) return () => otherwise;
  if (typeof given === "function") return given;
  if (!Array.isArray(given) || given.some((kind) => typeof kind !== "function")) {
    throw new InvalidArgument(`${path} must be an array of error classes, or a function of the error`, { path });
  }
  return (error) => given.some((kind) => error instanceof kind);
}

// Every error of this package, in one hierarchy named as Python's; this module imports nothing.

/**
 * What became of the record that a failed call was about.
 *
 * `not_written`: it is certain that nothing was written. `unknown`: it may or may not be in the log; the same call with the same
 * id settles it. `durable`: it is in the log; what failed came after that.
 */
export type Outcome = "not_written" | "unknown" | "durable";

/** What an error knows besides its text. */
export interface ErrorFacts {
  readonly outcome?: Outcome | undefined;
  readonly retryable?: boolean | undefined;
  readonly cause?: unknown;
  readonly status?: number | undefined;
  readonly retryAfter?: number | undefined;
}

/** The log's confirmation of one record. */
export interface Ack {
  /** The record's sequence in the log. */
  readonly seq: number;
  /** Whether the log held this id already, within half a minute (best effort). */
  readonly duplicate: boolean;
}

/** Base of all errors. The error beneath it, if there is one, is `cause`. */
export class SkialithError extends Error {
  static {
    named(this, "SkialithError");
  }
  /** What became of the record. */
  readonly outcome: Outcome;
  /** Whether the same call may succeed later. This package has retried it already, up to the call's timeout. */
  readonly retryable: boolean;
  /** The HTTP status, if the sidecar answered. */
  declare readonly status?: number;
  /** Milliseconds that the sidecar asked to wait, if it did. */
  declare readonly retryAfter?: number;

  constructor(message: string, facts: ErrorFacts = {}) {
    super(message, "cause" in facts ? { cause: facts.cause } : undefined);
    this.outcome = facts.outcome ?? "not_written";
    this.retryable = facts.retryable ?? false;
    if (facts.status !== undefined) this.status = facts.status;
    if (facts.retryAfter !== undefined) this.retryAfter = facts.retryAfter;
  }
}

/** An argument was refused, here or by the sidecar; nothing was written. */
export class InvalidArgument extends SkialithError {
  static {
    named(this, "InvalidArgument");
  }
  /** Where the bad value stands: `agentId`, `data.messages[3].content`. */
  readonly path: string;

  constructor(message: string, facts: ErrorFacts & { readonly path?: string | undefined } = {}) {
    super(message, facts);
    this.path = facts.path ?? "";
  }
}

/** A payload holds a value that JSON cannot carry; nothing was sent. `path` leads to it. */
export class InvalidPayload extends InvalidArgument {
  static {
    named(this, "InvalidPayload");
  }
}

/** A record or a request is over the sidecar's limit. */
export class RecordTooLarge extends InvalidArgument {
  static {
    named(this, "RecordTooLarge");
  }
  /** Bytes; 0 where the sidecar did not count them. */
  readonly size: number;
  /** Bytes; 0 where it is not known. */
  readonly limit: number;

  constructor(
    message: string,
    facts: ErrorFacts & { readonly path?: string | undefined; readonly size?: number | undefined; readonly limit?: number | undefined } = {},
  ) {
    super(message, facts);
    this.size = facts.size ?? 0;
    this.limit = facts.limit ?? 0;
  }
}

/** A setting does not allow this package, or the sidecar, to run; the message names the fix. */
export class ConfigurationError extends SkialithError {
  static {
    named(this, "ConfigurationError");
  }
}

/** The sidecar wants another token than it was given (401). */
export class Unauthorized extends SkialithError {
  static {
    named(this, "Unauthorized");
  }
}

/** The sidecar refuses this host or origin (403). */
export class Forbidden extends SkialithError {
  static {
    named(this, "Forbidden");
  }
}

/** The sidecar has nothing of this name (404). */
export class NotFound extends SkialithError {
  static {
    named(this, "NotFound");
  }
}

/** No confirmation by the deadline. Calling again with the same id is safe. */
export class WalUnavailable extends SkialithError {
  static {
    named(this, "WalUnavailable");
  }
}

/** The sidecar itself could not be reached, did not answer in time, is stopping, or has too much to do. */
export class SidecarUnavailable extends WalUnavailable {
  static {
    named(this, "SidecarUnavailable");
  }
}

/** The log is at its size limit. Retry once the writer caught up. */
export class WalFull extends SkialithError {
  static {
    named(this, "WalFull");
  }
}

/** The database cannot be used now; records in the log are safe. */
export class StoreUnavailable extends SkialithError {
  static {
    named(this, "StoreUnavailable");
  }
}

/** Something went wrong inside the sidecar (500); its log says what. */
export class InternalError extends SkialithError {
  static {
    named(this, "InternalError");
  }
}

/** Another owner took the agent over, or the lease expired. Call `resume()` to own it again. */
export class AgentFenced extends SkialithError {
  static {
    named(this, "AgentFenced");
  }
  /** Names the new owner; empty if the lease merely expired. */
  readonly owner: string;

  constructor(message: string, facts: ErrorFacts & { readonly owner?: string | undefined } = {}) {
    super(message, facts);
    this.owner = facts.owner ?? "";
  }
}

/**
 * `saveEvents` failed part way; `cause` is the error of the event at `failed`, and `outcome` speaks of that event and of all
 * behind it. Saving all again is safe.
 */
export class BatchFailed extends SkialithError {
  static {
    named(this, "BatchFailed");
  }
  /** Index of the first event that is not known to be durable. */
  readonly failed: number;
  /** One for each event before that. */
  readonly acks: readonly Ack[];

  constructor(message: string, facts: ErrorFacts & { readonly failed: number; readonly acks: readonly Ack[] }) {
    super(message, facts);
    this.failed = facts.failed;
    this.acks = facts.acks;
  }
}

/** A step was recorded for another function than the one that is given now; that was not called. */
export class StepMismatch extends InvalidArgument {
  static {
    named(this, "StepMismatch");
  }
  /** The step's id. */
  readonly step: string;
  /** Name of the function it was recorded for. */
  readonly recorded: string;
  /** Name of the function that is given. */
  readonly given: string;

  constructor(message: string, facts: ErrorFacts & { readonly step: string; readonly recorded: string; readonly given: string }) {
    super(message, { ...facts, path: "fn" });
    this.step = facts.step;
    this.recorded = facts.recorded;
    this.given = facts.given;
  }
}

/** The function of a step threw an error that was recorded; in the run that called it, `cause` is that error. */
export class StepFailed extends SkialithError {
  static {
    named(this, "StepFailed");
  }
  /** The step's id. */
  readonly step: string;
  /** `name` of the error that was thrown. */
  readonly errorType: string;
  /** Its `message`. */
  readonly errorMessage: string;

  constructor(message: string, facts: ErrorFacts & { readonly step: string; readonly errorType: string; readonly errorMessage: string }) {
    super(message, { outcome: "durable", ...facts });
    this.step = facts.step;
    this.errorType = facts.errorType;
    this.errorMessage = facts.errorMessage;
  }
}

/** A step was called after an earlier one of the run could not be recorded or read (`cause`). `resume()` begins a new run. */
export class RunEnded extends SkialithError {
  static {
    named(this, "RunEnded");
  }
}

/** The agent was closed before the call; nothing was sent. */
export class Closed extends SkialithError {
  static {
    named(this, "Closed");
  }
}

/** Too many calls of this agent wait for their turn; nothing was sent. Await them. */
export class QueueFull extends SkialithError {
  static {
    named(this, "QueueFull");
  }
}

/** The call's `signal` was aborted; its reason is `cause`, and `name` is `AbortError`, as of every aborted call. */
export class Aborted extends SkialithError {
  static {
    named(this, "AbortError");
  }
}

/** Names survive minifiers, and do not stand among the facts of each error. */
function named(kind: { readonly prototype: SkialithError }, name: string): void {
  Object.defineProperty(kind.prototype, "name", { value: name, configurable: true, writable: true });
}

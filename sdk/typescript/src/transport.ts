// One call over HTTP: requests with the same ids until one is answered, or until the call's time is over.

import { Deadline, EXPIRED } from "./deadline.js";
import { SidecarUnavailable, SkialithError } from "./errors.js";
import type { Ack, Outcome } from "./errors.js";
import type { Settings } from "./options.js";
import { refusalOf } from "./problems.js";
import type { Refusal } from "./problems.js";

/** How long one request waits for its answer before another one is made; the sidecar itself gives up after 10 s by default. */
const ATTEMPT_MS = 12_000;
/** With less time than this no other request is made: it would rather leave its record in doubt than be answered. */
const ATTEMPT_LEAST_MS = 100;
/** Longest first pause between two requests; doubled each time, with full jitter. */
const RETRY_FIRST_MS = 50;
/** Longest pause, unless the sidecar asks for more. */
const RETRY_LONGEST_MS = 2_000;

/** What is asked of the sidecar, and how its answer is read. */
export interface Call<T> {
  /** What errors say it is: `saveEvent: event "step-1" of agent "my-agent"`. */
  readonly said: string;
  readonly method: "GET" | "POST" | "DELETE";
  /** Below the sidecar's URL, percent-encoded. */
  readonly path: string;
  readonly body?: string;
  readonly headers?: Readonly<Record<string, string>>;
  /** Whether something is written, so that a lost answer leaves it in doubt. */
  readonly writes: boolean;
  /** Told of the events of a batch that are durable, whenever a request fails part way. */
  readonly partly?: (acks: readonly Ack[]) => void;
  /** The answer's value; null stands for an empty body. What it throws, unless a SkialithError, means a broken answer. */
  read(answer: unknown): T;
}

interface Answer {
  readonly status: number;
  readonly text: string;
  readonly retryAfter: number | undefined;
}

/** The way to one sidecar. */
export class Transport {
  readonly #settings: Settings;

  constructor(settings: Settings) {
    this.#settings = settings;
  }

  /** Make the call. Throws a `SkialithError`; its `outcome` speaks of all requests that were made. */
  async send<T>(call: Call<T>, deadline: Deadline): Promise<T> {
    const attempts = new Attempts(call, deadline);
    for (;;) {
      attempts.begin();
      const made = await this.#attempt(call, deadline);
      if ("value" in made) return made.value;
      await attempts.next(made);
    }
  }

  async #attempt<T>(call: Call<T>, deadline: Deadline): Promise<{ readonly value: T } | Failure> {
    try {
      const { status, text, retryAfter } = await deadline.guard(ATTEMPT_MS, (signal) => this.#fetch(call, signal));
      if (status < 200 || status > 299) return { ...refusalOf(status, text, retryAfter), retryAfter };
      return { value: call.read(text === "" ? null : JSON.parse(text)) };
    } catch (error) {
      if (error instanceof SkialithError) throw error;
      return unanswered(error, this.#settings.url);
    }
  }

  async #fetch(call: Call<unknown>, signal: AbortSignal): Promise<Answer> {
    const { url, token, fetch } = this.#settings;
    const headers: Record<string, string> = { Accept: "application/json", ...call.headers };
    if (call.body !== undefined) headers["Content-Type"] = "application/json";
    if (token !== undefined) headers["Authorization"] = `Bearer ${token}`;
    const request: RequestInit = { method: call.method, headers, signal, redirect: "manual" };
    if (call.body !== undefined) request.body = call.body;
    const response = await fetch(url + call.path, request);
    return { status: response.status, text: await response.text(), retryAfter: asked(response.headers.get("Retry-After")) };
  }
}

/** What one attempt came to, if not to a value. */
interface Failure extends Refusal {
  /** Milliseconds that the sidecar asked to wait. */
  readonly retryAfter?: number | undefined;
  /** Whether time was over before anything was heard. */
  readonly silent?: boolean;
}

/** An attempt without an answer that can be read. */
function unanswered(cause: unknown, url: string): Failure {
  const silent = cause === EXPIRED;
  const detail = `the sidecar at ${url} did not answer ${silent ? "in time" : `(${reason(cause)})`}; is \`skialith serve\` running there?`;
  const facts = silent ? {} : { cause };
  return {
    outcome: neverSent(cause) ? "not_written" : "unknown",
    retryable: true,
    detail,
    silent,
    error: (message, outcome) => new SidecarUnavailable(message, { ...facts, outcome, retryable: true }),
  };
}

/** The attempts of one call: how many there were, and what they came to together. */
class Attempts {
  readonly #call: Call<unknown>;
  readonly #deadline: Deadline;
  #made = 0;
  #doubt = false;
  #told: Failure | undefined;

  constructor(call: Call<unknown>, deadline: Deadline) {
    this.#call = call;
    this.#deadline = deadline;
  }

  /** Throws if there is to be no further attempt. */
  begin(): void {
    if (this.#deadline.over) throw this.#deadline.ended(this.#call.said, this.#joined("not_written"));
    this.#made += 1;
  }

  /** Wait until the next attempt is due. Throws the error if there is none. */
  async next(failure: Failure): Promise<void> {
    this.#doubt ||= this.#call.writes && failure.outcome === "unknown";
    if (failure.acks !== undefined) this.#call.partly?.(failure.acks);
    if (this.#deadline.signal?.aborted === true) throw this.#deadline.ended(this.#call.said, this.#joined("not_written"));
    // An answer says more than the silence that the call's end cut off.
    if (failure.silent !== true || this.#told === undefined) this.#told = failure;
    if (!failure.retryable) throw this.#error(failure, "");
    const pause = (failure.retryAfter ?? 0) + Math.random() * Math.min(RETRY_LONGEST_MS, RETRY_FIRST_MS * 2 ** (this.#made - 1));
    if (pause + ATTEMPT_LEAST_MS > this.#deadline.left) throw this.#error(this.#told, this.#ending());
    try {
      await this.#deadline.pause(pause);
    } catch {
      throw this.#deadline.ended(this.#call.said, this.#joined("not_written"));
    }
  }

  /** What all attempts came to, when the last one came to this. Reads leave nothing behind. */
  #joined(outcome: Outcome): Outcome {
    if (!this.#call.writes) return "not_written";
    return this.#doubt && outcome === "not_written" ? "unknown" : outcome;
  }

  #error(failure: Failure, ending: string): SkialithError {
    const outcome = this.#joined(failure.outcome);
    const text = `${this.#call.said}: ${failure.detail}`;
    const fate = this.#call.writes ? ` ${FATES[outcome]}` : "";
    return failure.error(ending === "" ? text : `${text}${/[.?!]$/.test(text) ? "" : "."}${fate} ${ending}`, outcome);
  }

  #ending(): string {
    const count = this.#made === 1 ? "one attempt" : `${this.#made} attempts`;
    return `Gave up after ${count} in ${(this.#deadline.spent / 1000).toFixed(1)} s`;
  }
}

const FATES: Readonly<Record<Outcome, string>> = {
  not_written: "Nothing was written.",
  unknown: "It may or may not be written, and the same call with the same id settles it.",
  durable: "It is written.",
};

/** Milliseconds that a `Retry-After` asks for: whole seconds, or a date. */
function asked(header: string | null): number | undefined {
  if (header === null) return undefined;
  const milliseconds = /^\d+$/.test(header.trim()) ? Number(header) * 1000 : Date.parse(header) - Date.now();
  return Number.isFinite(milliseconds) ? Math.max(0, milliseconds) : undefined;
}

/** Whether the connection was never made; only Node says so. */
function neverSent(error: unknown): boolean {
  const cause = (error as { cause?: { code?: unknown; syscall?: unknown; errors?: unknown } } | undefined)?.cause;
  if (typeof cause !== "object" || cause === null) return false;
  if (Array.isArray(cause.errors)) return cause.errors.length > 0 && cause.errors.every((one) => neverSent({ cause: one }));
  return cause.code === "UND_ERR_CONNECT_TIMEOUT" || cause.syscall === "connect" || cause.syscall === "getaddrinfo";
}

/** The reason beneath fetch's "fetch failed", where there is one. */
function reason(error: unknown): string {
  const { cause } = error as { cause?: { message?: unknown; code?: unknown } };
  const text = cause?.message || cause?.code || (error instanceof Error ? error.message : error);
  return String(text);
}

// One call over HTTP: requests with the same ids until one is answered, or until the call's time is over.

import { Deadline, EXPIRED } from "./deadline.js";
import { SidecarUnavailable, SkialithError } from "./errors.js";
import type { Ack, Outcome } from "./errors.js";
import type { Settings } from "./options.js";
import { refusalOf } from "./problems.js";

/** How long one request waits for its answer before another one is made; the sidecar itself gives up after 10 s by default. */
const ATTEMPT_MS = 12_000;
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
      const made = await this.#attempt(call, deadline, attempts);
      if ("value" in made) return made.value;
      await attempts.next(made);
    }
  }

  async #attempt<T>(call: Call<T>, deadline: Deadline, attempts: Attempts): Promise<{ value: T } | Refused> {
    let answer: Answer;
    try {
      answer = await deadline.guard(ATTEMPT_MS, (signal) => this.#fetch(call, signal));
    } catch (error) {
      return attempts.unanswered(error, this.#settings.url);
    }
    if (answer.status < 200 || answer.status > 299) return attempts.refused(answer);
    try {
      return { value: call.read(answer.text === "" ? null : JSON.parse(answer.text)) };
    } catch (error) {
      if (error instanceof SkialithError) throw error;
      return attempts.unanswered(error, this.#settings.url);
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

interface Refused {
  /** The error; `tail` ends its text. */
  readonly error: (tail: string) => SkialithError;
  /** Milliseconds that the sidecar asked to wait. */
  readonly retryAfter: number | undefined;
}

/** What became of one call so far: how often it was tried, and whether it may be written. */
class Attempts {
  readonly #call: Call<unknown>;
  readonly #deadline: Deadline;
  #made = 0;
  #doubt = false;

  constructor(call: Call<unknown>, deadline: Deadline) {
    this.#call = call;
    this.#deadline = deadline;
  }

  /** Throws if there is to be no further attempt. */
  begin(): void {
    if (this.#deadline.over) throw this.#deadline.ended(this.#call.said, this.#outcome);
    this.#made += 1;
  }

  /** An attempt that brought no answer that can be read. Throws if the caller's signal was aborted. */
  unanswered(cause: unknown, url: string): Refused {
    this.#doubt ||= this.#call.writes && !neverSent(cause);
    if (this.#deadline.signal?.aborted === true) throw this.#deadline.ended(this.#call.said, this.#outcome);
    const why = cause === EXPIRED ? "did not answer in time" : `did not answer (${reason(cause)})`;
    const text = `${this.#call.said}: the sidecar at ${url} ${why}; is \`skialith serve\` running there?`;
    const facts = { outcome: this.#outcome, retryable: true, ...(cause === EXPIRED ? {} : { cause }) };
    return { error: (tail) => new SidecarUnavailable(told(text, tail), facts), retryAfter: undefined };
  }

  /** An attempt that was answered with an error. */
  refused({ status, text, retryAfter }: Answer): Refused {
    const refusal = refusalOf(status, text, retryAfter, this.#doubt);
    this.#doubt ||= this.#call.writes && refusal.outcome === "unknown";
    if (refusal.acks !== undefined) this.#call.partly?.(refusal.acks);
    const said = `${this.#call.said}: ${refusal.detail}`;
    return { error: (tail) => refusal.error(told(said, tail)), retryAfter };
  }

  /** Wait until the next attempt is due. Throws the error if there is none. */
  async next({ error, retryAfter }: Refused): Promise<void> {
    const { retryable, outcome } = error("");
    if (!retryable) throw error("");
    const ceiling = Math.min(RETRY_LONGEST_MS, RETRY_FIRST_MS * 2 ** (this.#made - 1));
    const pause = (retryAfter ?? 0) + Math.random() * ceiling;
    if (pause >= this.#deadline.left) {
      const tail = `Gave up after ${times(this.#made)} in ${(this.#deadline.spent / 1000).toFixed(1)} s`;
      throw error(this.#call.writes ? `${FATES[outcome]} ${tail}` : tail);
    }
    try {
      await this.#deadline.pause(pause);
    } catch {
      throw this.#deadline.ended(this.#call.said, this.#outcome);
    }
  }

  get #outcome(): Outcome {
    return this.#doubt ? "unknown" : "not_written";
  }
}

const FATES: Readonly<Record<Outcome, string>> = {
  not_written: "Nothing was written.",
  unknown: "It may or may not be written, and the same call with the same id settles it.",
  durable: "It is written.",
};

function told(text: string, tail: string): string {
  return tail === "" ? text : `${text}${/[.?!]$/.test(text) ? "" : "."} ${tail}`;
}

function times(count: number): string {
  return count === 1 ? "one attempt" : `${count} attempts`;
}

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

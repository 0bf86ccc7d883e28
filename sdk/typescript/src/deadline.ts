// The end of a call: its time, and its caller's AbortSignal.

import { Aborted, SidecarUnavailable } from "./errors.js";
import type { Outcome, SkialithError } from "./errors.js";

/** Thrown inside this package when a call's time is over; whoever knows what the call did turns it into an error. */
export const EXPIRED: unique symbol = Symbol("expired");

/** When one call gives up. */
export class Deadline {
  readonly #end: number;

  constructor(
    /** Milliseconds, from now on. */
    readonly timeout: number,
    readonly signal: AbortSignal | undefined,
  ) {
    this.#end = performance.now() + timeout;
  }

  /** Milliseconds that are left, 0 at least. */
  get left(): number {
    return Math.max(0, this.#end - performance.now());
  }

  /** Milliseconds since the call began. */
  get spent(): number {
    return this.timeout - (this.#end - performance.now());
  }

  /** The same call's next request: its own time, the same signal. */
  again(): Deadline {
    return new Deadline(this.timeout, this.signal);
  }

  /** Whether there is no time left, or the signal was aborted. */
  get over(): boolean {
    return this.left === 0 || this.signal?.aborted === true;
  }

  /** The error of a call that ended by its signal, or whose time was over before it was sent. */
  ended(said: string, outcome: Outcome): SkialithError {
    const fate = { not_written: "nothing was written", unknown: "it may or may not be written", durable: "it is written" }[outcome];
    if (this.signal?.aborted === true) return new Aborted(`${said}: aborted; ${fate}`, { outcome, cause: this.signal.reason });
    const text = `${said}: its time of ${this.timeout} ms was over while it waited behind earlier calls; ${fate}`;
    return new SidecarUnavailable(text, { outcome, retryable: true });
  }

  /** Wait for `promise`. Throws `EXPIRED` when the time is over first, and when the signal is aborted. */
  async until<T>(promise: Promise<T>): Promise<T> {
    const left = Number.isFinite(this.timeout) ? this.left : undefined;
    return this.#within(left, (resolve, reject) => void promise.then(resolve, reject));
  }

  /** Pause for so many milliseconds. Throws `EXPIRED` when the signal is aborted. */
  async pause(milliseconds: number): Promise<void> {
    let timer: ReturnType<typeof setTimeout> | undefined;
    try {
      await this.#within(undefined, (resolve: (value: void) => void) => (timer = setTimeout(resolve, milliseconds)));
    } finally {
      clearTimeout(timer);
    }
  }

  /** Run `work` with a signal that is aborted after `most` milliseconds, at the end, or by the caller's signal. */
  async guard<T>(most: number, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
    const controller = new AbortController();
    return this.#within(Math.min(most, this.left), (resolve, reject) => void work(controller.signal).then(resolve, reject), () =>
      controller.abort(),
    );
  }

  #within<T>(
    milliseconds: number | undefined,
    begin: (resolve: (value: T) => void, reject: (reason: unknown) => void) => void,
    stop: () => void = () => undefined,
  ): Promise<T> {
    const { signal } = this;
    let timer: ReturnType<typeof setTimeout> | undefined;
    let end: () => void = () => undefined;
    const promise = new Promise<T>((resolve, reject) => {
      end = () => {
        stop();
        reject(EXPIRED);
      };
      if (signal?.aborted === true) return end();
      if (signal !== undefined) listen(signal, end);
      if (milliseconds !== undefined) timer = setTimeout(end, milliseconds);
      begin(resolve, reject);
    });
    return promise.finally(() => {
      clearTimeout(timer);
      if (signal !== undefined) unlisten(signal, end);
    });
  }
}

/** What each signal ends. One listener for all calls that share a signal: Node warns of a leak when there are more than ten. */
const ends = new WeakMap<AbortSignal, Set<() => void>>();

function listen(signal: AbortSignal, end: () => void): void {
  let calls = ends.get(signal);
  if (calls === undefined) ends.set(signal, (calls = new Set()));
  if (calls.size === 0) signal.addEventListener("abort", endAll);
  calls.add(end);
}

function unlisten(signal: AbortSignal, end: () => void): void {
  const calls = ends.get(signal);
  if (calls?.delete(end) === true && calls.size === 0) signal.removeEventListener("abort", endAll);
}

function endAll(this: AbortSignal): void {
  for (const end of [...(ends.get(this) ?? [])]) end();
}

// The queue of one agent's calls: one at a time, in the order in which they were made.

import type { Deadline } from "./deadline.js";
import { QueueFull } from "./errors.js";

/** Most calls of one agent that wait for their turn. */
const MAX_CALLS = 10_000;
/** Most characters (UTF-16 units) that their bodies hold together. */
const MAX_CHARACTERS = 128 * 1024 * 1024;

/** Calls that are made one after the other. */
export class Lane {
  #last: Promise<void> = Promise.resolve();
  #calls = 0;
  #characters = 0;

  /**
   * Run `work` behind all that was queued before. Throws `EXPIRED` if its turn does not come by the deadline, and `QueueFull`;
   * then it is never run.
   */
  async run<T>(said: string, characters: number, deadline: Deadline, work: () => Promise<T>): Promise<T> {
    if (this.#calls >= MAX_CALLS || (this.#calls > 0 && this.#characters + characters > MAX_CHARACTERS)) {
      const held = `${this.#calls} calls with ${this.#characters} characters wait for their turn`;
      throw new QueueFull(`${said}: ${held}, which is the limit; nothing was sent. Await earlier calls`, { retryable: true });
    }
    const before = this.#last;
    let done: () => void = () => undefined;
    this.#last = new Promise((resolve) => (done = resolve));
    this.#calls += 1;
    this.#characters += characters;
    try {
      await deadline.until(before);
      return await work();
    } finally {
      this.#calls -= 1;
      this.#characters -= characters;
      void before.then(done); // a call that gave up keeps its place until those before it are through
    }
  }
}

// An agent's events, read page by page while they are iterated.

import { pageOf, stepOf } from "./answers.js";
import type { CallOptions } from "./options.js";
import type { EventAnswer, HistoryAnswer } from "./wire.js";

/** Most events of one page. */
const PAGE_EVENTS = 250;

/** One saved event. */
export interface HistoryEvent<Data = any> {
  readonly eventId: string;
  readonly stepIndex: number;
  /** The payload's `kind`, or `event`; `step` for a recorded step. */
  readonly type: string;
  /** When it was made, by the clock of the agent or of its sidecar, RFC 3339. */
  readonly createdAt: string;
  /** Give it (or the event) as `after` to continue behind this event. */
  readonly cursor: string;
  /** Whether the database has it already. */
  readonly stored: boolean;
  /** Whether it is a dead letter: the database refused it for its data. */
  readonly dead: boolean;
  /** What was saved. */
  readonly data: Data;
}

/** What `history` may be given. `timeout` counts for each page. */
export interface HistoryOptions extends CallOptions {
  /** Continue behind this event, or behind its cursor. */
  readonly after?: { readonly cursor: string } | string | undefined;
  /** At most so many events. */
  readonly limit?: number | undefined;
  /** Events of this type only. */
  readonly type?: string | undefined;
}

/** The events that these options ask for, oldest first; `ask` reads one page. */
export async function* events<Data>(
  ask: (query: string, read: (answer: unknown) => HistoryAnswer) => Promise<HistoryAnswer>,
  said: string,
  options: HistoryOptions,
): AsyncGenerator<HistoryEvent<Data>, void, undefined> {
  let left = options.limit ?? Number.POSITIVE_INFINITY;
  let after: string | null | undefined = typeof options.after === "object" ? options.after.cursor : options.after;
  while (left > 0 && after !== null) {
    const query = new URLSearchParams({ limit: String(Math.min(left, PAGE_EVENTS)) });
    if (after !== undefined) query.set("after", after);
    if (options.type !== undefined) query.set("type", options.type);
    const page = await ask(query.toString(), pageOf);
    for (const found of page.events) yield eventOf<Data>(said, found);
    left -= page.events.length;
    after = page.next;
  }
}

function eventOf<Data>(said: string, found: EventAnswer): HistoryEvent<Data> {
  return {
    eventId: found.event_id,
    stepIndex: stepOf(`${said}: event ${JSON.stringify(found.event_id)}`, found.step_index),
    type: found.type,
    createdAt: found.created_at,
    cursor: found.cursor,
    stored: found.stored,
    dead: found.dead,
    data: found.payload as Data,
  };
}

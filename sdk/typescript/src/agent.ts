/// <reference lib="esnext.disposable" preserve="true" />
// SkialithAgent: the verbs of one agent, through one sidecar.

import { ackOf, acksOf, stateOf } from "./answers.js";
import type { AgentState } from "./answers.js";
import { batchFailed, batches } from "./batches.js";
import { Client } from "./client.js";
import { SkialithError } from "./errors.js";
import type { Ack } from "./errors.js";
import { events } from "./history.js";
import type { HistoryEvent, HistoryOptions } from "./history.js";
import { settings } from "./options.js";
import type { AgentOptions, CallOptions } from "./options.js";
import { Steps } from "./steps.js";
import type { StepOptions } from "./step-policy.js";
import type { StepFunction } from "./steps.js";
import { checkedCount, checkedId, encoded, shown } from "./values.js";
import { bodyWith } from "./wire.js";
import type { CheckpointBody, EventBody } from "./wire.js";

/** What `saveEvent` and `saveEvents` may be given. */
export interface EventOptions extends CallOptions {
  /** The step that the event belongs to, 0 to 2**53-1. Default: the last one resumed or checkpointed. */
  readonly stepIndex?: number | undefined;
}

/**
 * One agent's write-ahead log, through a sidecar (`skialith serve`).
 *
 * Writes of one object reach the sidecar one after the other, in the order of the calls, awaited or not. What fails for a reason
 * that passes is tried again with the same id until the call's timeout; then the call rejects with a `SkialithError`, whose
 * `outcome` says what became of the record. Nothing is opened before the first call.
 */
export class SkialithAgent implements AsyncDisposable {
  /** The agent's id. */
  readonly agentId: string;
  readonly #client: Client;
  readonly #steps: Steps;
  #stepIndex = 0;
  #closing: Promise<void> | undefined;

  /** Throws `InvalidArgument` or `ConfigurationError`; sends nothing. */
  constructor(options: AgentOptions) {
    const checked = settings(options);
    this.agentId = checked.agentId;
    this.#client = new Client(checked);
    this.#steps = new Steps(this.agentId, this.#client, () => this.#stepIndex);
  }

  // ---- writing

  /**
   * Append one event; resolves when it is durable.
   *
   * `eventId`: 1 to 255 characters; the first event saved under it wins for ever, so calling again with the same id is always
   * safe. `data`: any JSON value; the text under `kind` of an object is the event's type. It is read at once: what is changed in it
   * later is not saved. Rejects with `InvalidArgument` (nothing was sent), `WalUnavailable`, `WalFull`, `AgentFenced`, `Aborted`.
   */
  async saveEvent(eventId: string, data: unknown, options: EventOptions = {}): Promise<Ack> {
    const said = this.#client.said(`saveEvent: event ${shown(eventId)}`);
    const deadline = this.#client.begin(said, options);
    const body = this.#event("", eventId, data, options);
    return this.#client.write(said, deadline, { method: "POST", path: "/events", body, read: ackOf });
  }

  /**
   * Append `[eventId, data]` pairs in order; resolves with one `Ack` each when all are durable.
   *
   * They travel in requests of at most 1000 events and 4 MiB; `timeout` counts for each request. Everything is checked before
   * anything is sent (`InvalidArgument`). What fails after that is a `BatchFailed`, whose `cause` is the error as `saveEvent` has it.
   */
  async saveEvents(pairs: Iterable<readonly [eventId: string, data: unknown]>, options: EventOptions = {}): Promise<Ack[]> {
    const said = this.#client.said("saveEvents");
    const first = this.#client.begin(said, options);
    const ids: string[] = [];
    const bodies = Array.from(pairs, ([eventId, data], n) => {
      ids.push(eventId);
      return this.#event(`events[${n}].`, eventId, data, options);
    });
    const characters = bodies.reduce((sum, body) => sum + body.length, 0);
    const acks: Ack[] = [];
    let partly: readonly Ack[] = [];
    try {
      await this.#client.turn(said, characters, first, async () => {
        let deadline = first;
        for (const batch of batches(bodies)) {
          const sent = await this.#client.send(said, deadline, {
            method: "POST",
            path: "/events/batch",
            body: `{"events":[${batch.join(",")}]}`,
            partly: (known) => (partly = known.length > partly.length ? known : partly),
            read: (answer) => acksOf(answer, batch.length),
          });
          acks.push(...sent);
          partly = [];
          deadline = deadline.again();
        }
      });
    } catch (error) {
      if (!(error instanceof SkialithError)) throw error;
      throw batchFailed(said, ids, [...acks, ...partly], error);
    }
    return acks;
  }

  /**
   * Append the agent's state; resolves when it is durable. `resume` gives back the last one.
   *
   * `stepIndex`: 0 to 2**53-1. `data`: as for `saveEvent`. Every call is a record of its own: writing an earlier state again makes
   * that state current. Rejects as `saveEvent`; after `outcome` `"unknown"` the checkpoint may or may not be current, and calling
   * again settles it.
   */
  async checkpoint(stepIndex: number, data: unknown, options: CallOptions = {}): Promise<Ack> {
    const said = this.#client.said(`checkpoint: step ${shown(stepIndex)}`);
    const deadline = this.#client.begin(said, options);
    const rest: Omit<CheckpointBody, "state"> = { step_index: checkedCount("stepIndex", stepIndex, 0) };
    const body = bodyWith(rest, "state", encoded(data, "data"));
    const headers = { "Idempotency-Key": uuid() };
    const ack = await this.#client.write(said, deadline, { method: "POST", path: "/checkpoint", body, headers, read: ackOf });
    this.#stepIndex = stepIndex;
    return ack;
  }

  /**
   * Call `fn` and record what it returns; if an earlier run recorded it, return that and call nothing.
   *
   * `name`: 1 to 255 characters. A step is known by its name and by how often the name was called before in this run, which begins
   * with `resume`: `ask`, `ask#2`. So the program has to call its steps in the same order in every run. A step inside of a step goes
   * through what `fn` is given, `(step) => step.step("inner", ...)`, and is recorded as `outer/inner`. The value is what JSON gives
   * back, in the first run too; undefined becomes null. Without `resume` the first step takes the agent over.
   *
   * Rejects with what `fn` threw in the end, `StepFailed` (see `recordErrors`), `StepMismatch`, `RunEnded`, `InvalidPayload` for a
   * result that is not JSON, or as `saveEvent` when the result cannot be recorded; then the run is over until `resume`.
   */
  async step<T>(name: string, fn: StepFunction<T>, options: StepOptions = {}): Promise<T> {
    return this.#steps.call(name, fn, options);
  }

  // ---- reading

  /**
   * Own the agent and return its last checkpoint; a run of steps begins.
   *
   * From here on the writes of this object carry its lease, and whoever owned the agent before gets `AgentFenced` at the next
   * write. Rejects with `WalUnavailable`, or with `StoreUnavailable` when the log alone cannot tell the state.
   */
  async resume<Data = any>(options: CallOptions = {}): Promise<AgentState<Data>> {
    const said = this.#client.said("resume");
    const state = await this.#client.claim(said, this.#client.begin(said, options));
    this.#steps.beginAnew();
    this.#stepIndex = state.stepIndex;
    return state;
  }

  /** The last checkpoint, read only: nothing is claimed. It does not wait for writes that are under way. */
  async peek<Data = any>(options: CallOptions = {}): Promise<AgentState<Data>> {
    const said = this.#client.said("peek");
    return this.#client.read(said, this.#client.begin(said, options), "/state", stateOf);
  }

  /**
   * The agent's events, oldest first, from database and log together, read page by page while they are iterated.
   *
   * It does not wait for writes that are under way, and may be left (`break`) at any time. Throws `InvalidArgument` or `Closed`;
   * iterating rejects with `WalUnavailable` or `StoreUnavailable`.
   */
  history<Data = any>(options: HistoryOptions = {}): AsyncIterableIterator<HistoryEvent<Data>> {
    const said = this.#client.said("history");
    const begin = () => this.#client.begin(said, options);
    begin();
    if (options.limit !== undefined) checkedCount("limit", options.limit, 0);
    return events<Data>((query, read) => this.#client.read(said, begin(), `/history?${query}`, read), said, options);
  }

  // ---- life

  /**
   * Give the agent up, behind the calls that were made before; later ones are refused (`Closed`). May be called twice.
   *
   * Rejects if the sidecar cannot be told within five seconds; then the lease ages out by itself.
   */
  close(): Promise<void> {
    this.#closing ??= this.#client.close();
    return this.#closing;
  }

  /** `await using agent = new SkialithAgent(...)` closes it. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #event(within: string, eventId: unknown, data: unknown, options: EventOptions): string {
    const rest: Omit<EventBody, "payload"> = {
      event_id: checkedId(`${within}eventId`, eventId),
      step_index: options.stepIndex === undefined ? this.#stepIndex : checkedCount("stepIndex", options.stepIndex, 0),
    };
    return bodyWith(rest, "payload", encoded(data, `${within}data`));
  }
}

/** A new random id; `crypto.randomUUID` is missing where a page was not loaded over https. */
function uuid(): string {
  if (typeof crypto.randomUUID === "function") return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

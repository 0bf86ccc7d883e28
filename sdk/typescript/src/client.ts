// The calls of one agent: their queue, their deadlines, and the lease that they carry.

import { leaseOf, recordedOf, replacedOf, stateOf } from "./answers.js";
import type { AgentState } from "./answers.js";
import { Deadline, EXPIRED } from "./deadline.js";
import { Closed, NotFound } from "./errors.js";
import { Lane } from "./lane.js";
import { checkedTimeout } from "./options.js";
import type { CallOptions, Settings } from "./options.js";
import { Transport } from "./transport.js";
import type { Call } from "./transport.js";
import type { ResumeBody, StepAnswer } from "./wire.js";

/** How long `close` tries to release the lease, milliseconds. */
const CLOSE_MS = 5_000;

/** A request of an agent; `path` is below the agent's own. */
export type Request<T> = Omit<Call<T>, "said" | "writes">;

/** What one agent asks of its sidecar. */
export class Client {
  readonly #settings: Settings;
  readonly #transport: Transport;
  readonly #lane = new Lane();
  readonly #path: string;
  #lease: string | undefined;
  #closed = false;

  constructor(settings: Settings) {
    this.#settings = settings;
    this.#transport = new Transport(settings);
    this.#path = `/agents/${encodeURIComponent(settings.agentId)}`;
  }

  /** Whether this client took the agent over. */
  get owns(): boolean {
    return this.#lease !== undefined;
  }

  /** What errors say first of all. */
  said(what: string): string {
    return `${what} of agent ${JSON.stringify(this.#settings.agentId)}`;
  }

  /** When a call that begins now gives up. Throws `Closed`, and `InvalidArgument` for a timeout that is none. */
  begin(said: string, options: CallOptions): Deadline {
    if (this.#closed) throw new Closed(`${said}: the agent is closed; nothing was sent. Make a new SkialithAgent`);
    return new Deadline(checkedTimeout(options.timeout ?? this.#settings.timeout), options.signal);
  }

  /** Ask for something that changes nothing, at once. */
  async read<T>(said: string, deadline: Deadline, path: string, read: (answer: unknown) => T): Promise<T> {
    return this.#transport.send({ said, method: "GET", path: this.#path + path, writes: false, read }, deadline);
  }

  /** Write behind the calls that were made before, as the owner, if this is one. */
  async write<T>(said: string, deadline: Deadline, request: Request<T>): Promise<T> {
    return this.turn(said, request.body?.length ?? 0, deadline, () => this.send(said, deadline, request));
  }

  /** Run `work` when its turn comes. Throws what `work` throws, `Aborted` or `SidecarUnavailable`. */
  async turn<T>(said: string, characters: number, deadline: Deadline, work: () => Promise<T>): Promise<T> {
    try {
      return await this.#lane.run(said, characters, deadline, work);
    } catch (error) {
      throw error === EXPIRED ? deadline.ended(said, "not_written") : error;
    }
  }

  /** Write now; for whoever has the turn. */
  async send<T>(said: string, deadline: Deadline, request: Request<T>): Promise<T> {
    const headers = this.#lease === undefined ? request.headers : { ...request.headers, "Skialith-Lease": this.#lease };
    const call: Call<T> = { ...request, said, path: this.#path + request.path, writes: true };
    return this.#transport.send(headers === undefined ? call : { ...call, headers }, deadline);
  }

  /** Take the agent over; from here on writes carry the lease. */
  async claim(said: string, deadline: Deadline): Promise<AgentState> {
    const owner: ResumeBody = { owner: this.#settings.owner };
    const body = JSON.stringify(owner);
    const read = (answer: unknown): [AgentState, string] => [stateOf(answer), leaseOf(answer)];
    return this.turn(said, body.length, deadline, async () => {
      const call: Call<[AgentState, string]> = { said, method: "POST", path: `${this.#path}/resume`, body, writes: true, read };
      const [state, lease] = await this.#transport.send(call, deadline);
      this.#lease = lease;
      return state;
    });
  }

  /** Refuse later calls, and give the agent up behind earlier ones. */
  async close(): Promise<void> {
    this.#closed = true;
    const said = this.said("close");
    await this.turn(said, 0, new Deadline(Number.POSITIVE_INFINITY, undefined), async () => {
      if (this.#lease === undefined) return;
      const headers = { "Skialith-Lease": this.#lease };
      const call: Call<void> = { said, method: "DELETE", path: `${this.#path}/lease`, headers, writes: false, read: () => undefined };
      await this.#transport.send(call, new Deadline(Math.min(CLOSE_MS, this.#settings.timeout), undefined));
      this.#lease = undefined;
    });
  }

  /** The step that is recorded under this id. */
  async findStep(stepId: string, options: CallOptions): Promise<StepAnswer | undefined> {
    const said = `${this.said(`step ${JSON.stringify(stepId)}`)}: reading whether it is recorded`;
    try {
      return await this.read(said, this.begin(said, options), `/steps/${encodeURIComponent(stepId)}`, recordedOf);
    } catch (error) {
      if (error instanceof NotFound) return undefined;
      throw error;
    }
  }

  /** Record a step; the value is what stood there before. */
  async recordStep(stepId: string, body: string, options: CallOptions): Promise<StepAnswer | undefined> {
    const said = `${this.said(`step ${JSON.stringify(stepId)}`)}: its function has run, but recording the result`;
    return this.write(said, this.begin(said, options), { method: "POST", path: "/steps", body, read: replacedOf });
  }
}

// A sidecar in memory for the tests of steps: it keeps what is recorded, and fails when it is told to.

import type { ServerResponse } from "node:http";

import { Scripted, problem, resumed, send } from "./scripted.js";
import type { Asked } from "./scripted.js";

/** What happens to the next request that records a step. */
export type Mishap = "lost-before" | "lost-behind" | "fenced" | "full" | "too-large";

/** Steps by agent and id, and requests that tests look at. */
export class Memory {
  readonly steps = new Map<string, any>();
  readonly mishaps: Mishap[] = [];
  /** Makes reading of steps fail with 503. */
  blind = false;
  #server: Scripted | undefined;

  async start(): Promise<string> {
    this.#server = await Scripted.start((asked, response) => this.#answer(asked, response));
    return this.#server.url;
  }

  get asked(): readonly Asked[] {
    return this.#server?.asked ?? [];
  }

  /** Ids of what was recorded, in order. */
  get ids(): string[] {
    return [...this.steps.keys()].map((key) => JSON.parse(key)[1]);
  }

  stop(): Promise<void> {
    return this.#server?.stop() ?? Promise.resolve();
  }

  #answer({ method, path, body }: Asked, response: ServerResponse): unknown {
    const [agent = "", verb, id = ""] = path.split("/").slice(2).map(decodeURIComponent);
    if (verb === "resume") return resumed(agent);
    if (verb !== "steps") return { seq: 1, duplicate: false };
    if (method === "GET") return this.#find(response, JSON.stringify([agent, id]));
    return this.#record(response, JSON.stringify([agent, body.step_id]), body);
  }

  #find(response: ServerResponse, key: string): unknown {
    if (this.blind) return void send(response, 503, problem("database-unavailable", 503, "not_written", true), { "Retry-After": "60" });
    return this.steps.get(key) ?? void send(response, 404, problem("not-found", 404, "not_written", false));
  }

  #record(response: ServerResponse, key: string, body: any): unknown {
    const mishap = this.mishaps.shift();
    if (mishap === "lost-before") return void response.destroy();
    if (mishap === "fenced") return void send(response, 409, problem("fenced", 409, "not_written", false, { owner: "b" }));
    if (mishap === "full") return void send(response, 507, problem("log-full", 507, "not_written", true), { "Retry-After": "60" });
    if (mishap === "too-large") return void send(response, 413, problem("too-large", 413, "not_written", false, { limit: 10 }));
    const recorded = this.steps.get(key);
    if (recorded === undefined) {
      const { step_id, function: name, result = null, error = null } = body;
      this.steps.set(key, { step_id, function: name, result, error });
    }
    if (mishap === "lost-behind") return void response.destroy();
    return { seq: this.steps.size, duplicate: recorded !== undefined, recorded: recorded ?? null };
  }
}

// An HTTP server that answers as a test tells it, and keeps what it was asked.

import { once } from "node:events";
import { createServer } from "node:http";
import type { IncomingHttpHeaders, Server, ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

/** A request as it arrived. */
export interface Asked {
  readonly method: string;
  /** As it stood in the request line. */
  readonly path: string;
  readonly headers: IncomingHttpHeaders;
  readonly text: string;
  /** The body read as JSON; undefined for an empty one. */
  readonly body: any;
}

/** What is answered: a JSON body with status 200, or anything by hand. */
export type Reply = ((asked: Asked, response: ServerResponse, number: number) => unknown) | { readonly json: unknown; readonly status?: number };

/** A running server. */
export class Scripted {
  readonly asked: Asked[] = [];
  readonly #server: Server;
  #reply: Reply;

  private constructor(server: Server, reply: Reply) {
    this.#server = server;
    this.#reply = reply;
  }

  /** Listen on a free port of the loopback. What `reply` returns, unless it answered by hand, is sent as JSON. */
  static async start(reply: Reply): Promise<Scripted> {
    const server = createServer();
    const scripted = new Scripted(server, reply);
    server.on("request", (request, response) => {
      const chunks: Buffer[] = [];
      request.on("data", (chunk: Buffer) => chunks.push(chunk));
      request.on("end", () => {
        const text = Buffer.concat(chunks).toString("utf8");
        const { method = "", url = "", headers } = request;
        void scripted.#answer({ method, path: url, headers, text, body: text === "" ? undefined : JSON.parse(text) }, response);
      });
    });
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    return scripted;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  /** Answer like this from now on. */
  set reply(reply: Reply) {
    this.#reply = reply;
  }

  async #answer(asked: Asked, response: ServerResponse): Promise<void> {
    this.asked.push(asked);
    const reply = this.#reply;
    const value = typeof reply === "function" ? await reply(asked, response, this.asked.length) : reply;
    if (value === undefined || response.headersSent || response.destroyed) return;
    const { json, status = 200 } = typeof reply === "function" ? { json: value } : (value as { json: unknown; status?: number });
    send(response, status, json);
  }

  async stop(): Promise<void> {
    this.#server.closeAllConnections();
    this.#server.close();
    await once(this.#server, "close");
  }
}

/** Answer with this. */
export function send(response: ServerResponse, status: number, json: unknown, headers: Record<string, string> = {}): void {
  const type = status < 400 ? "application/json" : "application/problem+json";
  response.writeHead(status, { "Content-Type": type, ...headers });
  response.end(status === 204 ? undefined : JSON.stringify(json));
}

/** A problem document. */
export function problem(kind: string, status: number, outcome: string, retryable: boolean, facts: object = {}): object {
  return { type: `urn:skialith:problem:${kind}`, title: kind, status, detail: `detail of ${kind}`, outcome, retryable, ...facts };
}

export const ACK = { seq: 7, duplicate: false };
export const LEASE = "0123456789abcdef0123456789abcdef";

/** What `resume` answers for an agent. */
export function resumed(agentId: string, facts: object = {}): object {
  const state = { agent_id: agentId, step_index: 0, state: {}, is_new: true, source: "none", database_ok: true };
  return { ...state, lease: { token: LEASE, seconds: 3600 }, ...facts };
}

// Settings of an agent and of single calls, and where their defaults come from.

import { ConfigurationError, InvalidArgument } from "./errors.js";
import { checkedSegment } from "./values.js";

/** How long a call may take by default, retries included, milliseconds. */
export const DEFAULT_TIMEOUT_MS = 20_000;
/** Longest timeout: retries with the same id must end inside the log's duplicate window of 30 s. */
export const MAX_TIMEOUT_MS = 25_000;
const DEFAULT_URL = "http://127.0.0.1:7420";
const MAX_OWNER_CHARACTERS = 255;

/** What a call may be given. */
export interface CallOptions {
  /** Ends the call: it rejects with `Aborted`, whose `outcome` says whether the record may be written. */
  readonly signal?: AbortSignal | undefined;
  /** Milliseconds that the call may take, its turn in the queue and retries included; default the agent's, at most 25,000. */
  readonly timeout?: number | undefined;
}

/** What an agent is made of. */
export interface AgentOptions {
  /** 1 to 255 characters of any Unicode text, except `.` and `..`. */
  readonly agentId: string;
  /** Where the sidecar is. Default: `SKIALITH_URL` where there is an environment, else `http://127.0.0.1:7420`. */
  readonly url?: string | undefined;
  /** The sidecar's token. Default: `SKIALITH_TOKEN` where there is an environment. */
  readonly token?: string | undefined;
  /** Names this owner to whoever is fenced by it, at most 255 characters. Default: `node pid 123` in Node, else nothing. */
  readonly owner?: string | undefined;
  /** Milliseconds that a call may take, at most 25,000. Default 20,000. */
  readonly timeout?: number | undefined;
  /** What makes the requests. Default: the global `fetch`. */
  readonly fetch?: typeof globalThis.fetch | undefined;
}

/** Settings that were checked. */
export interface Settings {
  readonly agentId: string;
  readonly url: string;
  readonly token: string | undefined;
  readonly owner: string;
  readonly timeout: number;
  readonly fetch: typeof globalThis.fetch;
}

/** The settings that these options give. Throws `InvalidArgument` or `ConfigurationError`. */
export function settings(options: AgentOptions): Settings {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined>; pid?: number } };
  const environment = process?.env ?? {};
  const fetch = options.fetch ?? globalThis.fetch;
  if (typeof fetch !== "function") {
    throw new ConfigurationError("there is no global fetch here: use Node 20 or newer, or give the option fetch");
  }
  return {
    agentId: checkedSegment("agentId", options.agentId),
    url: checkedUrl(options.url ?? environment["SKIALITH_URL"] ?? DEFAULT_URL),
    token: checkedToken(options.token ?? environment["SKIALITH_TOKEN"]),
    owner: checkedOwner(options.owner ?? (process?.pid === undefined ? "" : `node pid ${process.pid}`)),
    timeout: checkedTimeout(options.timeout ?? DEFAULT_TIMEOUT_MS),
    // Called as a plain function: a browser's fetch refuses to be a method of something else.
    fetch: (input, init) => fetch(input, init),
  };
}

/** `value` if it is a timeout. Throws `InvalidArgument`. */
export function checkedTimeout(value: unknown): number {
  if (typeof value === "number" && value > 0 && value <= MAX_TIMEOUT_MS) return value;
  throw new InvalidArgument(`timeout ${String(value)}: use more than 0 and at most ${MAX_TIMEOUT_MS} milliseconds`, { path: "timeout" });
}

function checkedUrl(text: string): string {
  let url: URL;
  try {
    url = new URL(text);
  } catch (cause) {
    throw new ConfigurationError(`url ${JSON.stringify(text)} is not a URL: write http://127.0.0.1:7420`, { cause });
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") {
    throw new ConfigurationError(`url ${JSON.stringify(text)}: use http:// or https://`);
  }
  if (url.username !== "" || url.password !== "") throw new ConfigurationError("url holds a password, which fetch refuses: use token");
  if (url.search !== "" || url.hash !== "") throw new ConfigurationError(`url ${JSON.stringify(text)} must end before ? and #`);
  return url.href.replace(/\/+$/, "");
}

function checkedToken(token: string | undefined): string | undefined {
  if (token === undefined || token === "") return undefined;
  if (!/^[\x21-\x7e]+$/.test(token)) throw new ConfigurationError("token must be printable ASCII without spaces");
  return token;
}

function checkedOwner(owner: string): string {
  if ([...owner].length > MAX_OWNER_CHARACTERS) {
    throw new InvalidArgument(`owner must have at most ${MAX_OWNER_CHARACTERS} characters`, { path: "owner" });
  }
  return owner;
}

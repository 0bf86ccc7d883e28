// Which error an answer of the sidecar becomes, by its problem document (RFC 9457) or by its status alone.

import {
  AgentFenced,
  ConfigurationError,
  Forbidden,
  InternalError,
  InvalidArgument,
  NotFound,
  RecordTooLarge,
  SidecarUnavailable,
  SkialithError,
  StoreUnavailable,
  Unauthorized,
  WalFull,
  WalUnavailable,
} from "./errors.js";
import type { Ack, ErrorFacts, Outcome } from "./errors.js";
import type { Problem } from "./wire.js";

const URN = "urn:skialith:problem:";

type Kind = new (message: string, facts: ErrorFacts & Facts) => SkialithError;

interface Facts {
  readonly path?: string | undefined;
  readonly limit?: number | undefined;
  readonly size?: number | undefined;
  readonly owner?: string | undefined;
}

const KINDS: Readonly<Record<string, Kind>> = {
  invalid: InvalidArgument,
  "not-json": InvalidArgument,
  "method-not-allowed": InvalidArgument,
  "head-too-large": InvalidArgument,
  "too-large": RecordTooLarge,
  unauthorized: Unauthorized,
  forbidden: Forbidden,
  "not-found": NotFound,
  fenced: AgentFenced,
  "log-full": WalFull,
  "log-unavailable": WalUnavailable,
  "database-unavailable": StoreUnavailable,
  stopping: SidecarUnavailable,
  overloaded: SidecarUnavailable,
  "body-timeout": SidecarUnavailable,
  misconfigured: ConfigurationError,
  internal: InternalError,
};

/** Answers that are nobody's problem document: whatever stands between here and the sidecar gave them. */
const RETRIED_STATUS: ReadonlySet<number> = new Set([408, 425, 429, 502, 503, 504]);

/** What an answer that is no success tells, of its own attempt. */
export interface Refusal {
  readonly outcome: Outcome;
  readonly retryable: boolean;
  /** What happened, in words. */
  readonly detail: string;
  /** Of a batch that failed part way: its events that are durable. */
  readonly acks?: readonly Ack[] | undefined;
  /** The error that tells of it, when all attempts together came to this outcome. */
  error(message: string, outcome: Outcome): SkialithError;
}

/** What an answer tells. `retryAfter` in milliseconds. */
export function refusalOf(status: number, body: string, retryAfter: number | undefined): Refusal {
  const problem = parsed(body);
  if (problem === undefined) return foreign(status, body, retryAfter);
  const { detail, outcome, retryable } = problem;
  const kind = KINDS[problem.type.slice(URN.length)] ?? SkialithError;
  const facts = {
    status,
    retryAfter,
    retryable,
    path: problem.path ?? undefined,
    limit: problem.limit ?? undefined,
    size: problem.size ?? undefined,
    owner: problem.owner ?? undefined,
  };
  return { outcome, retryable, detail, acks: problem.acks ?? undefined, error: (message, all) => new kind(message, { ...facts, outcome: all }) };
}

function parsed(body: string): Problem | undefined {
  let document: Partial<Problem> | null;
  try {
    document = JSON.parse(body);
  } catch {
    return undefined;
  }
  const ours = typeof document === "object" && document !== null && typeof document.type === "string" && document.type.startsWith(URN);
  return ours ? (document as Problem) : undefined;
}

/** An answer of whatever stands between here and the sidecar. */
function foreign(status: number, body: string, retryAfter: number | undefined): Refusal {
  const [kind, advice] = STRANGERS[status] ?? (status >= 300 && status < 400 ? REDIRECT : [SkialithError, body.trim().slice(0, 200)]);
  const retryable = RETRIED_STATUS.has(status);
  const made = retryable ? SidecarUnavailable : kind;
  // It may have passed the request on before it gave up.
  const outcome: Outcome = retryable || status >= 500 ? "unknown" : "not_written";
  const detail = `status ${status}, which is not an answer of a Skialith sidecar; ${advice}`;
  const facts = { status, retryAfter, retryable };
  return { outcome, retryable, detail, error: (message, all) => new made(message, { ...facts, outcome: all }) };
}

const REDIRECT: [Kind, string] = [ConfigurationError, "it redirects, which is not followed: set url to where it leads"];

const STRANGERS: Readonly<Record<number, [Kind, string]>> = {
  0: REDIRECT,
  401: [Unauthorized, "something in front of it wants credentials"],
  403: [Forbidden, "something in front of it refuses"],
  404: [ConfigurationError, "is the url right?"],
  413: [RecordTooLarge, "something in front of it has a limit"],
};

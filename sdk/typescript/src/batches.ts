// Many events of one call: how they are cut into requests, and what is said when only some are durable.

import { BatchFailed } from "./errors.js";
import type { Ack, SkialithError } from "./errors.js";

/** Most events of one request, the sidecar's own limit. */
const BATCH_EVENTS = 1000;
/** A request's size, bytes; an event that is larger goes alone. */
const BATCH_BYTES = 4 * 1024 * 1024;

/** The events' bodies in runs that are requests, in order. */
export function* batches(bodies: readonly string[]): Generator<string[], void, undefined> {
  const encoder = new TextEncoder();
  let batch: string[] = [];
  let bytes = 0;
  for (const body of bodies) {
    const size = encoder.encode(body).length;
    if (batch.length === BATCH_EVENTS || (batch.length > 0 && bytes + size > BATCH_BYTES)) {
      yield batch;
      batch = [];
      bytes = 0;
    }
    batch.push(body);
    bytes += size;
  }
  if (batch.length > 0) yield batch;
}

/** The error of a call with so many events, of which the first `acks` are durable. */
export function batchFailed(said: string, ids: readonly string[], acks: readonly Ack[], cause: SkialithError): BatchFailed {
  const failed = Math.min(acks.length, ids.length - 1);
  const { outcome, retryable, status, retryAfter } = cause;
  const which = `event ${JSON.stringify(ids[failed])} (events[${failed}])`;
  const text = `${said}: ${acks.length} of ${ids.length} events are durable; ${which} failed: ${cause.message.replace(`${said}: `, "")}`;
  return new BatchFailed(text, { outcome, retryable, status, retryAfter, cause, failed, acks });
}

// What the sidecar's answers mean, by this package's names; what is no such answer is a TypeError.

import { SkialithError } from "./errors.js";
import type { Ack } from "./errors.js";
import type { AckAnswer, BatchAnswer, HistoryAnswer, ResumeAnswer, StateAnswer, StepAckAnswer, StepAnswer } from "./wire.js";

/** The last checkpoint of an agent. */
export interface AgentState<Data = any> {
  readonly agentId: string;
  /** 0 for a new agent. */
  readonly stepIndex: number;
  /** What was given to `checkpoint`; `{}` for a new agent. */
  readonly data: Data;
  /** Whether there is no checkpoint yet. */
  readonly isNew: boolean;
  /** Where it was read. */
  readonly source: "wal" | "database" | "none";
  /** False if the database did not answer and the log alone was read. */
  readonly databaseOk: boolean;
}

/** Of a record that is durable. */
export function ackOf(answer: unknown): Ack {
  const { seq, duplicate } = answer as AckAnswer;
  if (!Number.isSafeInteger(seq) || typeof duplicate !== "boolean") throw malformed("acknowledgement");
  return { seq, duplicate };
}

/** Of so many events. */
export function acksOf(answer: unknown, count: number): Ack[] {
  const { acks } = answer as BatchAnswer;
  if (!Array.isArray(acks) || acks.length !== count) throw malformed(`acknowledgement of ${count} events`);
  return acks.map(ackOf);
}

/** Of `GET state`, and of `resume`. */
export function stateOf(answer: unknown): AgentState {
  const { agent_id, step_index, state, is_new, source, database_ok } = answer as StateAnswer;
  if (typeof agent_id !== "string" || typeof is_new !== "boolean") throw malformed("state");
  const stepIndex = stepOf(`the checkpoint of agent ${JSON.stringify(agent_id)}`, step_index);
  return { agentId: agent_id, stepIndex, data: state, isNew: is_new, source, databaseOk: database_ok };
}

/** The token of the lease that `resume` gave. */
export function leaseOf(answer: unknown): string {
  const { lease } = answer as ResumeAnswer;
  if (typeof lease.token !== "string") throw malformed("lease");
  return lease.token;
}

/** A page of the history. */
export function pageOf(answer: unknown): HistoryAnswer {
  const page = answer as HistoryAnswer;
  if (!Array.isArray(page.events) || !(page.next === null || typeof page.next === "string")) throw malformed("page of a history");
  return page;
}

/** A recorded step. */
export function recordedOf(answer: unknown): StepAnswer {
  const step = answer as StepAnswer;
  if (typeof step.function !== "string") throw malformed("step");
  return step;
}

/** What stood in place of a step that was to be recorded, if anything did. */
export function replacedOf(answer: unknown): StepAnswer | undefined {
  ackOf(answer);
  const { recorded } = answer as StepAckAnswer;
  return recorded == null ? undefined : recordedOf(recorded);
}

/** A step's number. Throws a `SkialithError` if it was counted beyond what JavaScript counts exactly. */
export function stepOf(said: string, step: number): number {
  if (Number.isSafeInteger(step)) return step;
  throw new SkialithError(`${said} has the step ${step}, which is over 2**53-1, where JavaScript stops to count exactly`);
}

function malformed(what: string): TypeError {
  return new TypeError(`the answer is no ${what}`);
}

// The public names, nothing else.

export { SkialithAgent } from "./agent.js";
export type { EventOptions } from "./agent.js";
export type { AgentState } from "./answers.js";
export {
  Aborted,
  AgentFenced,
  BatchFailed,
  Closed,
  ConfigurationError,
  Forbidden,
  InternalError,
  InvalidArgument,
  InvalidPayload,
  NotFound,
  QueueFull,
  RecordTooLarge,
  RunEnded,
  SidecarUnavailable,
  SkialithError,
  StepFailed,
  StepMismatch,
  StoreUnavailable,
  Unauthorized,
  WalFull,
  WalUnavailable,
} from "./errors.js";
export type { Ack, Outcome } from "./errors.js";
export type { HistoryEvent, HistoryOptions } from "./history.js";
export type { AgentOptions, CallOptions } from "./options.js";
export type { ErrorFilter, StepOptions } from "./step-policy.js";
export type { StepContext, StepFunction } from "./steps.js";

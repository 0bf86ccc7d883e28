// The bodies of requests and answers, by the names that the OpenAPI document gives them.

import type { components } from "./openapi.js";

type Schemas = components["schemas"];

export type AckAnswer = Schemas["AckAnswer"];
export type BatchAnswer = Schemas["BatchAnswer"];
export type CheckpointBody = Schemas["CheckpointBody"];
export type EventAnswer = Schemas["EventAnswer"];
export type EventBody = Schemas["EventBody"];
export type HistoryAnswer = Schemas["HistoryAnswer"];
export type Problem = Schemas["Problem"];
export type ResumeAnswer = Schemas["ResumeAnswer"];
export type ResumeBody = Schemas["ResumeBody"];
export type StateAnswer = Schemas["StateAnswer"];
export type StepAckAnswer = Schemas["StepAckAnswer"];
export type StepAnswer = Schemas["StepAnswer"];
export type StepBody = Schemas["StepBody"];

/** A body as JSON text; the value of `field` is JSON text already. */
export function bodyWith<Field extends string, Rest extends object>(rest: Rest, field: Field, json: string): string {
  const text = JSON.stringify(rest);
  const comma = text === "{}" ? "" : ",";
  return `${text.slice(0, -1)}${comma}${JSON.stringify(field)}:${json}}`;
}

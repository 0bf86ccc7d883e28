// What steps and their functions are called in records.

import { ConfigurationError, InvalidArgument } from "./errors.js";
import { checkedSegment } from "./values.js";

const MAX_ID_CHARACTERS = 255;
const MAX_FUNCTION_CHARACTERS = 1000;
/** What ids of steps are made with; in a name each of them becomes `%XX`. */
const RESERVED = /[%#/~]/g;

/** A name as it stands in an id. Throws `InvalidArgument` for what cannot be one. */
export function escaped(name: unknown): string {
  return checkedSegment("name", name).replace(RESERVED, (found) => `%${found.charCodeAt(0).toString(16).toUpperCase()}`);
}

/** The id of the `n`-th step `name` within `scope`, the id of the outer step or empty: `name`, `name#2`, `outer/name`. */
export async function stepId(scope: string, name: string, n: number): Promise<string> {
  const text = (scope === "" ? name : `${scope}/${name}`) + (n > 1 ? `#${n}` : "");
  const characters = [...text];
  if (characters.length <= MAX_ID_CHARACTERS) return text;
  const digest = await hash(text);
  return `${characters.slice(0, MAX_ID_CHARACTERS - 1 - digest.length).join("")}~${digest}`;
}

/** What belongs to a step for ever: 32 hex digits. */
export async function idempotencyKey(agentId: string, id: string): Promise<string> {
  return hash(JSON.stringify([agentId, id]));
}

/** What a function is called; empty for one without a name, which is nobody's. */
export function functionName(fn: { readonly name: string }, given: unknown): string {
  if (given !== undefined && typeof given !== "string") throw new InvalidArgument("functionName must be a string", { path: "functionName" });
  const name = given ?? fn.name.replace(/^(?:bound )+/, "");
  return [...name].slice(0, MAX_FUNCTION_CHARACTERS).join("");
}

async function hash(text: string): Promise<string> {
  const { subtle } = globalThis.crypto;
  if (subtle === undefined) throw new ConfigurationError("step() needs WebCrypto, which pages have that were loaded over https");
  const bytes = new Uint8Array(await subtle.digest("SHA-256", new TextEncoder().encode(text)));
  return Array.from(bytes.subarray(0, 16), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

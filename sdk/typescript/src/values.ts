// What is checked before anything is sent: ids, steps, and payloads, whose fault is named by its path.

import { InvalidArgument, InvalidPayload } from "./errors.js";

/** Longest id, in Unicode characters (code points). */
const MAX_ID_CHARACTERS = 255;
/** Deepest nesting of arrays and objects in a payload: with a batch around it, as deep as the sidecar reads JSON. */
const MAX_DEPTH = 198;
const LONE_SURROGATE = /\p{Surrogate}/u;
const IDENTIFIER = /^[\p{ID_Start}_$][\p{ID_Continue}$]*$/u;

/** `value` if it may name an agent, an event or a step. Throws `InvalidArgument`. */
export function checkedId(path: string, value: unknown): string {
  if (typeof value !== "string") throw new InvalidArgument(`${path} must be a string, not ${kindOf(value)}`, { path });
  if (value === "") throw new InvalidArgument(`${path} must not be empty`, { path });
  // A character has at most two units, so that only ids of a doubtful length are counted.
  const length = value.length > MAX_ID_CHARACTERS ? [...value].length : value.length;
  if (length > MAX_ID_CHARACTERS) {
    throw new InvalidArgument(`${path} has ${length} characters; at most ${MAX_ID_CHARACTERS} are allowed`, { path });
  }
  const at = value.search(LONE_SURROGATE);
  if (at >= 0) throw new InvalidArgument(`${path} holds a lone surrogate at index ${at}, which is not Unicode text`, { path });
  return value;
}

/** `value` if it may stand in a URL as an id. Throws `InvalidArgument`. */
export function checkedSegment(path: string, value: unknown): string {
  const id = checkedId(path, value);
  if (id === "." || id === "..") {
    throw new InvalidArgument(`${path} ${JSON.stringify(id)} cannot be addressed over HTTP: URLs drop such a segment. Use another name`, {
      path,
    });
  }
  return id;
}

/** `value` if it is a whole number of the range that JavaScript counts exactly. Throws `InvalidArgument`. */
export function checkedCount(path: string, value: unknown, least: number, most = Number.MAX_SAFE_INTEGER): number {
  if (typeof value === "number" && Number.isSafeInteger(value) && value >= least && value <= most) return value;
  const range = most === Number.MAX_SAFE_INTEGER ? "2**53-1" : `${most}`;
  throw new InvalidArgument(`${path} must be a whole number from ${least} to ${range}, not ${shown(value)}`, { path });
}

/** `value` if it is a number of this range. Throws `InvalidArgument`. */
export function checkedNumber(path: string, value: unknown, least: number, most: number): number {
  if (typeof value === "number" && value >= least && value <= most) return value;
  throw new InvalidArgument(`${path} must be a number from ${least} to ${most}, not ${shown(value)}`, { path });
}

/**
 * A payload as JSON text. `path`: what errors call it. Properties that are undefined are left out and `toJSON` is asked, as
 * `JSON.stringify` does; whatever that would change without a word is an `InvalidPayload`, which ends with `fate`.
 */
export function encoded(value: unknown, path: string, fate = "nothing was sent"): string {
  const holders: object[] = [];
  const keys: string[] = [];
  const text: string | undefined = JSON.stringify(value, function (this: object, key: string, found: unknown): unknown {
    while (holders.length > 0 && holders[holders.length - 1] !== this) {
      holders.pop();
      keys.pop();
    }
    const was = (this as Readonly<Record<string, unknown>>)[key];
    const fault = found === null && was instanceof Date ? "an invalid Date is not JSON" : faultOf(found, this, key, holders);
    if (fault !== undefined) throw faulty(pathOf(path, holders, keys, key), `${fault}; ${fate}`);
    if (typeof found === "object" && found !== null) {
      holders.push(found);
      keys.push(key);
    }
    return found;
  });
  return text;
}

function faultOf(value: unknown, holder: object, key: string, holders: readonly object[]): string | undefined {
  if (LONE_SURROGATE.test(key)) return "a key holds a lone surrogate";
  switch (typeof value) {
    case "string":
      return LONE_SURROGATE.test(value) ? `text holds a lone surrogate at index ${value.search(LONE_SURROGATE)}` : undefined;
    case "number":
      return numberFault(value);
    case "boolean":
      return undefined;
    case "undefined":
      return holders.length > 0 && !Array.isArray(holder) ? undefined : "undefined is not JSON";
    case "object":
      return value === null ? undefined : objectFault(value, holders);
    default:
      return `${typeof value} is not JSON`;
  }
}

function numberFault(value: number): string | undefined {
  if (!Number.isFinite(value)) return `${value} is not JSON`;
  // From 1e21 on JavaScript writes an exponent, and that is a float for whoever reads it.
  const wide = value >= 2 ** 64 || value < -(2 ** 63);
  return wide && Math.abs(value) < 1e21 ? "number would be written as an integer over 64 bits" : undefined;
}

function objectFault(value: object, holders: readonly object[]): string | undefined {
  if (holders.includes(value)) return "holds itself";
  if (holders.length >= MAX_DEPTH) return `nested deeper than ${MAX_DEPTH} levels`;
  if (Array.isArray(value)) return undefined;
  const tag = Object.prototype.toString.call(value).slice(8, -1);
  return tag === "Object" ? undefined : `${tag} is not JSON`;
}

function faulty(path: string, fault: string): InvalidPayload {
  return new InvalidPayload(`${path}: ${fault}`, { path });
}

function pathOf(root: string, holders: readonly object[], keys: readonly string[], key: string): string {
  let path = root;
  // The first key is the empty one under which JSON.stringify holds the whole value.
  [...keys, key].slice(1).forEach((step, depth) => {
    path += Array.isArray(holders[depth]) ? `[${step}]` : IDENTIFIER.test(step) ? `.${step}` : `[${shown(step)}]`;
  });
  return path.length > 500 ? `${path.slice(0, 250)}...${path.slice(-250)}` : path;
}

function kindOf(value: unknown): string {
  return value === null ? "null" : typeof value === "object" ? Object.prototype.toString.call(value).slice(8, -1) : typeof value;
}

/** A value as errors show it. */
export function shown(value: unknown): string {
  const text = typeof value === "string" ? JSON.stringify(value) : typeof value === "object" ? kindOf(value) : String(value);
  return text.length > 80 ? `${text.slice(0, 76)}...${text.slice(-1)}` : text;
}

// What is refused before anything is sent: options, ids, and values that only JavaScript has.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { ConfigurationError, InvalidArgument, InvalidPayload, SkialithAgent } from "@skialith/agent-core";

import { ACK, Scripted } from "./scripted.js";

let server: Scripted;
let agent: SkialithAgent;
before(async () => {
  server = await Scripted.start({ json: ACK });
  agent = new SkialithAgent({ agentId: "a", url: server.url });
});
after(() => server.stop());

const looped: Record<string, unknown> = { list: [1] };
looped["list"] = [1, { again: looped }];

const REFUSED: readonly (readonly [unknown, string, RegExp])[] = [
  [undefined, "data", /undefined is not JSON/],
  [() => 1, "data", /function is not JSON/],
  [Symbol("x"), "data", /symbol is not JSON/],
  [1n, "data", /bigint is not JSON/],
  [NaN, "data", /NaN is not JSON/],
  [{ a: -Infinity }, "data.a", /-Infinity is not JSON/],
  [{ messages: [0, 1, 2, { content: new Map() }] }, "data.messages[3].content", /Map is not JSON/],
  [[new Set([1])], "data[0]", /Set is not JSON/],
  [[1, undefined], "data[1]", /undefined is not JSON/],
  [new Array(2), "data[0]", /undefined is not JSON/],
  [{ run: () => 1 }, "data.run", /function is not JSON/],
  [{ "a b": { "": Symbol.iterator } }, 'data["a b"][""]', /symbol is not JSON/],
  [new Uint8Array(2), "data", /Uint8Array is not JSON/],
  [{ e: new Error("x") }, "data.e", /Error is not JSON/],
  [{ r: /x/ }, "data.r", /RegExp is not JSON/],
  [Promise.resolve(1), "data", /Promise is not JSON/],
  [new Number(1), "data", /Number is not JSON/],
  [{ at: [new Date(NaN)] }, "data.at[0]", /an invalid Date is not JSON/],
  [looped, "data.list[1].again", /holds itself/],
  [{ t: "a\ud800b" }, "data.t", /lone surrogate at index 1/],
  [{ "\udc00": 1 }, 'data["\\udc00"]', /a key holds a lone surrogate/],
  [{ n: 1e20 }, "data.n", /over 64 bits/],
];

test("values that JSON would lose are refused with their path", async () => {
  for (const [value, path, text] of REFUSED) {
    await assert.rejects(agent.saveEvent("e", value), (error) => {
      assert.ok(error instanceof InvalidPayload, String(error));
      assert.equal(error.path, path);
      assert.match(error.message, text);
      return error.message.startsWith(`${path}: `) && error.message.endsWith("nothing was sent");
    });
  }
  const batch = agent.saveEvents([["a", 1], ["b", { x: [NaN] }]]);
  await assert.rejects(batch, (error) => error instanceof InvalidPayload && error.path === "events[1].data.x[0]");
  await assert.rejects(agent.saveEvents([["a", 1], ["", 1]]), (error) => error instanceof InvalidArgument && error.path === "events[1].eventId");
  assert.equal(server.asked.length, 0);
});

test("what JSON.stringify carries is carried as it does", async () => {
  class Note {
    text = "hi";
    #hidden = 1;
    get length(): number {
      return this.#hidden;
    }
  }
  const shared = { n: 1 };
  const cases: readonly (readonly [unknown, unknown])[] = [
    [{ a: undefined, b: 1 }, { b: 1 }],
    [new Date(0), "1970-01-01T00:00:00.000Z"],
    [{ at: new URL("http://127.0.0.1/") }, { at: "http://127.0.0.1/" }],
    [new Note(), { text: "hi" }],
    [Object.create(null, { a: { value: 1, enumerable: true } }), { a: 1 }],
    [[shared, shared, { shared }], [{ n: 1 }, { n: 1 }, { shared: { n: 1 } }]],
    [{ toJSON: () => ({ replaced: [1] }) }, { replaced: [1] }],
    [-0, 0],
    [2 ** 60, 2 ** 60],
    [1e21, 1e21],
    [Object.defineProperty({ a: 1 }, Symbol("s"), { value: 1, enumerable: true }), { a: 1 }],
  ];
  for (const [given, sent] of cases) {
    await agent.saveEvent("e", given);
    assert.deepEqual(server.asked.at(-1)?.body.payload, sent);
  }
});

test("ids", async () => {
  for (const agentId of ["", ".", "..", "x".repeat(256), "🙂".repeat(256), "a\udc00", 5 as never, null as never]) {
    assert.throws(() => new SkialithAgent({ agentId }), (error) => error instanceof InvalidArgument && error.path === "agentId", String(agentId));
  }
  assert.equal(new SkialithAgent({ agentId: "🙂".repeat(255) }).agentId.length, 510);
  for (const eventId of ["", "x".repeat(256), "\ud800", undefined as never, 5n as never]) await assert.rejects(agent.saveEvent(eventId, 1), InvalidArgument);
  for (const step of [-1, 0.5, NaN, 2 ** 53, "1" as never, null as never]) await assert.rejects(agent.checkpoint(step, {}), InvalidArgument);
});

test("options", async () => {
  for (const url of ["nonsense", "ftp://127.0.0.1", "http://user:password@127.0.0.1", "http://127.0.0.1/?a=1"]) {
    assert.throws(() => new SkialithAgent({ agentId: "a", url }), ConfigurationError, url);
  }
  assert.throws(() => new SkialithAgent({ agentId: "a", token: "two words" }), ConfigurationError);
  assert.throws(() => new SkialithAgent({ agentId: "a", owner: "x".repeat(256) }), InvalidArgument);
  for (const timeout of [0, -1, 25_001, NaN, Infinity, "5" as never]) {
    assert.throws(() => new SkialithAgent({ agentId: "a", timeout }), InvalidArgument);
    await assert.rejects(agent.peek({ timeout }), InvalidArgument);
  }
});

test("url and token come from the environment, and options win", async () => {
  const asked = () => server.asked.at(-1);
  process.env["SKIALITH_URL"] = `${server.url}/prefix/`;
  process.env["SKIALITH_TOKEN"] = "secret";
  try {
    await new SkialithAgent({ agentId: "a" }).saveEvent("e", 1);
    assert.deepEqual([asked()?.path, asked()?.headers.authorization], ["/prefix/agents/a/events", "Bearer secret"]);
    await new SkialithAgent({ agentId: "a", url: server.url, token: "other" }).saveEvent("e", 1);
    assert.deepEqual([asked()?.path, asked()?.headers.authorization], ["/agents/a/events", "Bearer other"]);
  } finally {
    delete process.env["SKIALITH_URL"];
    delete process.env["SKIALITH_TOKEN"];
  }
});

test("a fetch of one's own makes the requests, as a plain function", async () => {
  const urls: string[] = [];
  const own = new SkialithAgent({
    agentId: "a",
    url: "http://sidecar.invalid",
    fetch: async function (this: unknown, input, init) {
      assert.equal(this, undefined);
      urls.push(`${init?.method} ${String(input)}`);
      return new Response(JSON.stringify(ACK));
    },
  });
  assert.deepEqual(await own.saveEvent("e", 1), ACK);
  assert.deepEqual(urls, ["POST http://sidecar.invalid/agents/a/events"]);
});

test("it does without process, and without crypto.randomUUID", async () => {
  const { process: kept } = globalThis;
  const { randomUUID } = crypto;
  try {
    Object.defineProperty(globalThis, "process", { value: undefined, configurable: true, writable: true });
    Object.defineProperty(crypto, "randomUUID", { value: undefined, configurable: true, writable: true });
    let key: string | null = null;
    const own = new SkialithAgent({
      agentId: "a",
      fetch: async (input, init) => {
        assert.match(String(input), /^http:\/\/127\.0\.0\.1:7420\//);
        key = new Headers(init?.headers).get("Idempotency-Key");
        return new Response(JSON.stringify(ACK));
      },
    });
    await own.checkpoint(1, {});
    assert.match(String(key), /^[0-9a-f]{32}$/);
  } finally {
    Object.defineProperty(globalThis, "process", { value: kept, configurable: true, writable: true });
    Object.defineProperty(crypto, "randomUUID", { value: randomUUID, configurable: true, writable: true });
  }
});

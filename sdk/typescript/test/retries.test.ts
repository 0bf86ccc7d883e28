// Retries, deadlines, aborts and lost answers, against a server that does what the test says.

import assert from "node:assert/strict";
import { createServer } from "node:net";
import type { AddressInfo } from "node:net";
import { afterEach, beforeEach, test } from "node:test";

import { Aborted, AgentFenced, ConfigurationError, InternalError, SidecarUnavailable, SkialithAgent, SkialithError, WalFull, WalUnavailable } from "@skialith/agent-core";

import { ACK, Scripted, problem, resumed, send } from "./scripted.js";
import type { Asked } from "./scripted.js";

let server: Scripted;
let agent: SkialithAgent;

beforeEach(async () => {
  server = await Scripted.start({ json: ACK });
  agent = new SkialithAgent({ agentId: "a", url: server.url });
});
afterEach(() => server.stop());

/** The error of a promise that must reject. */
async function errorOf(promise: Promise<unknown>): Promise<SkialithError> {
  const error: unknown = await promise.then(
    (value) => assert.fail(`it resolved: ${JSON.stringify(value)}`),
    (reason: unknown) => reason,
  );
  assert.ok(error instanceof SkialithError, String(error));
  return error;
}

/** Destroy the connection of the first requests, after they were read. */
function lost(count: number, then: unknown = ACK) {
  return (_: Asked, response: { destroy(): void }, number: number): unknown => (number <= count ? void response.destroy() : then);
}

test("a lost answer is asked for again, with the same ids", async () => {
  server.reply = lost(2);
  assert.deepEqual(await agent.saveEvent("e", { n: 1 }), ACK);
  assert.equal(server.asked.length, 3);
  assert.equal(new Set(server.asked.map((one) => one.path + one.text)).size, 1);
});

test("a checkpoint's retries carry one key, and each call has its own", async () => {
  server.reply = lost(1);
  await agent.checkpoint(1, {});
  await agent.checkpoint(1, {});
  const [first, again, other] = server.asked.map((one) => one.headers["idempotency-key"]);
  assert.equal(first, again);
  assert.notEqual(first, other);
  assert.match(String(first), /^[0-9a-f-]{36}$/);
});

test("problems that are retryable are retried, whatever their status", async () => {
  const kinds: [string, number, string][] = [
    ["log-unavailable", 503, "not_written"],
    ["body-timeout", 408, "not_written"],
    ["log-full", 507, "not_written"],
    ["internal", 500, "unknown"],
  ];
  server.reply = (_, response, number) => {
    const [kind, status, outcome] = kinds[number - 1] ?? [];
    return kind === undefined ? ACK : void send(response, status as number, problem(kind, status as number, outcome as string, true));
  };
  assert.deepEqual(await agent.saveEvent("e", 1), ACK);
  assert.equal(server.asked.length, kinds.length + 1);
});

test("problems that are not retryable are not retried", async () => {
  server.reply = { status: 409, json: problem("fenced", 409, "not_written", false, { owner: "worker-7" }) };
  const error = await errorOf(agent.saveEvent("e", 1));
  assert.ok(error instanceof AgentFenced);
  assert.deepEqual([error.owner, error.outcome, error.retryable, error.status], ["worker-7", "not_written", false, 409]);
  assert.equal(error.name, "AgentFenced");
  assert.equal(server.asked.length, 1);
});

test("after a lost answer the outcome is unknown, and no later answer makes it not_written", async () => {
  server.reply = (_, response, number) =>
    number === 1 ? void response.destroy() : void send(response, 409, problem("fenced", 409, "not_written", false, { owner: "" }));
  const error = await errorOf(agent.saveEvent("e", 1));
  assert.ok(error instanceof AgentFenced);
  assert.equal(error.outcome, "unknown");
});

/** Fail with this problem; the third answer asks for more time than there is, which ends the call. */
function failing(kind: string, status: number, outcome: string) {
  return (_: Asked, response: Parameters<typeof send>[0], number: number): void =>
    send(response, status, problem(kind, status, outcome, true), number % 3 === 0 ? { "Retry-After": "60" } : {});
}

test("what was never in doubt stays not_written", async () => {
  server.reply = failing("log-full", 507, "not_written");
  const error = await errorOf(agent.saveEvent("e", 1));
  assert.ok(error instanceof WalFull);
  assert.deepEqual([error.outcome, error.retryable, error.status, error.retryAfter], ["not_written", true, 507, 60_000]);
  assert.match(error.message, /: detail of log-full\. Nothing was written\. Gave up after 3 attempts in \d+\.\d s$/);
});

test("an answer says more than the silence at the end", async () => {
  server.reply = (_, response, number) => (number === 1 ? void send(response, 507, problem("log-full", 507, "not_written", true)) : undefined);
  const error = await errorOf(agent.saveEvent("e", 1, { timeout: 1000 }));
  assert.ok(error instanceof WalFull);
  assert.equal(error.outcome, "unknown");
  assert.equal(server.asked.length, 2);
});

test("a server that never answers: the deadline holds, and the outcome is unknown", async () => {
  server.reply = () => undefined;
  const began = performance.now();
  const error = await errorOf(agent.checkpoint(1, {}, { timeout: 250 }));
  assert.ok(error instanceof SidecarUnavailable && error instanceof WalUnavailable);
  assert.deepEqual([error.outcome, error.retryable], ["unknown", true]);
  assert.match(error.message, /did not answer in time/);
  assert.ok(performance.now() - began < 1500);
  assert.equal(server.asked.length, 1);
});

test("an answer that ends in the middle is a lost answer", async () => {
  server.reply = (_, response, number) => {
    if (number > 1) return ACK;
    response.writeHead(200, { "Content-Length": "100" });
    response.write('{"seq":');
    setTimeout(() => response.destroy(), 20);
    return undefined;
  };
  assert.deepEqual(await agent.saveEvent("e", 1), ACK);
  assert.equal(server.asked.length, 2);
});

test("an answer that is none is a lost answer", async () => {
  server.reply = (_, response, number) => (number > 1 ? ACK : void response.writeHead(200).end("<html>hello</html>"));
  assert.deepEqual(await agent.saveEvent("e", 1), ACK);
  server.reply = { json: { status: "ok" } };
  const error = await errorOf(agent.saveEvent("e", 1, { timeout: 1000 }));
  assert.equal(error.outcome, "unknown");
  assert.match(error.message, /no acknowledgement/);
});

test("nobody listens: not_written, and retried until somebody does", async () => {
  const listener = createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => listener.once("listening", resolve));
  const { port } = listener.address() as AddressInfo;
  await new Promise((resolve) => listener.close(resolve));
  const alone = new SkialithAgent({ agentId: "a", url: `http://127.0.0.1:${port}` });
  const error = await errorOf(alone.saveEvent("e", 1, { timeout: 1000 }));
  assert.ok(error instanceof SidecarUnavailable);
  assert.deepEqual([error.outcome, error.retryable], ["not_written", true]);
  assert.match(error.message, /ECONNREFUSED.*skialith serve.*Nothing was written\. Gave up after \d+ attempts/);
  assert.ok(error.cause instanceof TypeError);
});

test("a proxy's answers: 502 is retried and in doubt, 404 and redirects are a wrong url", async () => {
  server.reply = (_, response, number) => (number > 1 ? ACK : void response.writeHead(502).end("bad gateway"));
  assert.deepEqual(await agent.saveEvent("e", 1), ACK);
  server.reply = (_, response) => void response.writeHead(502).end("bad gateway");
  const away = await errorOf(agent.saveEvent("e", 1, { timeout: 1000 }));
  assert.ok(away instanceof SidecarUnavailable);
  assert.equal(away.outcome, "unknown");
  const asked = server.asked.length;
  for (const [status, headers] of [[404, {}], [308, { Location: "/elsewhere" }]] as const) {
    server.reply = (_, response) => void response.writeHead(status, headers).end("nothing here");
    const error = await errorOf(agent.saveEvent("e", 1));
    assert.ok(error instanceof ConfigurationError, String(error));
    assert.equal(error.outcome, "not_written");
  }
  assert.equal(server.asked.length, asked + 2);
  server.reply = (_, response) => void response.writeHead(500).end("oops");
  const broken = await errorOf(agent.saveEvent("e", 1));
  assert.deepEqual([broken.constructor, broken.outcome, broken.retryable], [SkialithError, "unknown", false]);
});

test("Retry-After is honoured, in seconds and as a date", async () => {
  const times: number[] = [];
  server.reply = (_, response, number) => {
    times.push(performance.now());
    const header = number === 1 ? "1" : new Date(Date.now() + 2000).toUTCString(); // dates have whole seconds
    return number > 2 ? ACK : void send(response, 503, problem("overloaded", 503, "not_written", true), { "Retry-After": header });
  };
  assert.deepEqual(await agent.saveEvent("e", 1), ACK);
  const [first = 0, second = 0, third = 0] = times;
  assert.ok(second - first >= 995, `${second - first} ms`);
  assert.ok(third - second >= 900, `${third - second} ms`);
});

test("a Retry-After behind the deadline is not waited for", async () => {
  server.reply = (_, response) => void send(response, 503, problem("overloaded", 503, "not_written", true), { "Retry-After": "60" });
  const began = performance.now();
  const error = await errorOf(agent.saveEvent("e", 1));
  assert.ok(error instanceof SidecarUnavailable);
  assert.equal(error.retryAfter, 60_000);
  assert.ok(performance.now() - began < 1000);
});

test("a signal ends a request under way: unknown, its reason is the cause", async () => {
  const controller = new AbortController();
  server.reply = () => void controller.abort(new Error("enough"));
  const error = await errorOf(agent.saveEvent("e", 1, { signal: controller.signal }));
  assert.ok(error instanceof Aborted);
  assert.deepEqual([error.name, error.outcome, (error.cause as Error).message], ["AbortError", "unknown", "enough"]);
});

test("a signal ends a pause between attempts", async () => {
  const controller = new AbortController();
  server.reply = (_, response) => {
    setTimeout(() => controller.abort(), 30);
    send(response, 503, problem("overloaded", 503, "not_written", true), { "Retry-After": "5" });
  };
  const error = await errorOf(agent.saveEvent("e", 1, { signal: controller.signal }));
  assert.ok(error instanceof Aborted);
  assert.equal(error.outcome, "not_written");
});

test("an aborted signal sends nothing, and leaves no listener behind", async () => {
  const error = await errorOf(agent.saveEvent("e", 1, { signal: AbortSignal.abort() }));
  assert.ok(error instanceof Aborted);
  assert.deepEqual([error.outcome, server.asked.length], ["not_written", 0]);

  let listeners = 0;
  const { signal } = new AbortController();
  const { addEventListener, removeEventListener } = signal;
  signal.addEventListener = (...given: Parameters<typeof addEventListener>) => void ((listeners += 1), addEventListener.apply(signal, given));
  signal.removeEventListener = (...given: Parameters<typeof removeEventListener>) => void ((listeners -= 1), removeEventListener.apply(signal, given));
  await Promise.all(Array.from({ length: 20 }, (_, n) => agent.saveEvent(`e${n}`, 1, { signal })));
  assert.equal(listeners, 0);
});

test("reads are in no doubt", async () => {
  server.reply = (_, response, number) => (number < 4 ? void response.destroy() : failing("internal", 500, "unknown")(_, response, 3));
  assert.equal((await errorOf(agent.peek())).outcome, "not_written");
  server.reply = (_, response) => void response.destroy();
  const error = await errorOf(agent.peek({ timeout: 300 }));
  assert.deepEqual([error.constructor, error.outcome], [SidecarUnavailable, "not_written"]);
});

test("a lease is carried by writes and released by close", async () => {
  server.reply = (asked, response) => {
    if (asked.method === "DELETE") return void send(response, 204, null);
    if (asked.path.endsWith("/batch")) return { acks: [ACK] };
    return asked.path.endsWith("/resume") ? resumed("a") : ACK;
  };
  await agent.saveEvent("before", 1);
  await agent.resume();
  await agent.saveEvent("e", 1);
  await agent.saveEvents([["f", 1]]);
  await agent.checkpoint(0, 1);
  await agent.close();
  await agent.close();
  const carried = server.asked.map(({ method, path, headers }) => [method, path.split("/").pop(), headers["skialith-lease"] !== undefined]);
  assert.deepEqual(carried, [
    ["POST", "events", false],
    ["POST", "resume", false],
    ["POST", "events", true],
    ["POST", "batch", true],
    ["POST", "checkpoint", true],
    ["DELETE", "lease", true],
  ]);
});

test("a fenced agent stays fenced: the old lease is still carried", async () => {
  server.reply = (asked, response) =>
    asked.path.endsWith("/resume") ? resumed("a") : void send(response, 409, problem("fenced", 409, "not_written", false, { owner: "b" }));
  await agent.resume();
  for (let n = 0; n < 2; n += 1) assert.ok((await errorOf(agent.saveEvent("e", n))) instanceof AgentFenced);
  assert.equal(server.asked.filter((one) => one.headers["skialith-lease"] !== undefined).length, 2);
});

test("internal errors are told as such when they stay", async () => {
  server.reply = failing("internal", 500, "unknown");
  const error = await errorOf(agent.saveEvent("e", 1));
  assert.ok(error instanceof InternalError);
  assert.equal(error.outcome, "unknown");
});

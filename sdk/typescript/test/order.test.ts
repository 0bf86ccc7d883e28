// The order of calls, batches and the bounds of the queue, against a server that does what the test says.

import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";

import { Aborted, BatchFailed, Closed, InvalidArgument, QueueFull, SidecarUnavailable, SkialithAgent, WalUnavailable } from "@skialith/agent-core";

import { ACK, Scripted, problem, resumed, send } from "./scripted.js";
import type { Asked } from "./scripted.js";

let server: Scripted;
let agent: SkialithAgent;

beforeEach(async () => {
  server = await Scripted.start({ json: ACK });
  agent = new SkialithAgent({ agentId: "a", url: server.url });
});
afterEach(() => server.stop());

/** Acknowledge whatever is asked. */
function acknowledged({ path, body }: Asked): unknown {
  if (path.endsWith("/resume")) return resumed("a");
  return path.endsWith("/batch") ? { acks: body.events.map((_: unknown, seq: number) => ({ seq, duplicate: false })) } : ACK;
}

test("writes arrive one at a time, in the order of the calls, awaited or not", async () => {
  let underWay = 0;
  let most = 0;
  server.reply = async (asked) => {
    most = Math.max(most, (underWay += 1));
    await new Promise((resolve) => setTimeout(resolve, Math.random() * 5));
    underWay -= 1;
    return acknowledged(asked);
  };
  const calls: Promise<unknown>[] = [agent.resume()];
  for (let n = 0; n < 20; n += 1) {
    calls.push(n % 5 === 4 ? agent.checkpoint(n, { n }) : agent.saveEvent(`e${n}`, { n }));
    if (n === 10) calls.push(agent.saveEvents([["x", { n: "x" }], ["y", { n: "y" }]]));
  }
  await Promise.all(calls);
  const order = server.asked.map(({ body }) => (body.events ?? [body]).map((one: any) => (one.payload ?? one.state ?? { n: "resume" }).n).join());
  assert.deepEqual(order, ["resume", ...Array.from({ length: 11 }, (_, n) => `${n}`), "x,y", ...Array.from({ length: 9 }, (_, n) => `${n + 11}`)]);
  assert.equal(most, 1);
});

test("a retried write is not overtaken", async () => {
  server.reply = (_, response, number) => (number < 3 ? void response.destroy() : ACK);
  await Promise.all(["e1", "e2", "e3"].map((id) => agent.saveEvent(id, 1)));
  assert.deepEqual(server.asked.map((one) => one.body.event_id), ["e1", "e1", "e1", "e2", "e3"]);
});

test("what is saved is what it was at the call", async () => {
  const data = { text: "before" };
  const first = agent.saveEvent("e1", 1);
  const second = agent.saveEvent("e2", data);
  data.text = "after";
  await Promise.all([first, second]);
  assert.deepEqual(server.asked[1]?.body.payload, { text: "before" });
});

test("a call whose turn does not come in time is not sent, and those behind it keep their order", async () => {
  let release: () => void = () => undefined;
  const released = new Promise<void>((resolve) => (release = resolve));
  server.reply = async (asked) => {
    if (asked.body.event_id === "slow") await released;
    return ACK;
  };
  const controller = new AbortController();
  const slow = agent.saveEvent("slow", 1);
  const late = agent.saveEvent("late", 1, { timeout: 30 });
  const aborted = agent.saveEvent("aborted", 1, { signal: controller.signal });
  const last = agent.saveEvent("last", 1);
  await assert.rejects(late, (error) => error instanceof SidecarUnavailable && error.outcome === "not_written");
  controller.abort();
  await assert.rejects(aborted, (error) => error instanceof Aborted && error.outcome === "not_written");
  release();
  await Promise.all([slow, last]);
  assert.deepEqual(server.asked.map((one) => one.body.event_id), ["slow", "last"]);
});

test("the queue is bounded, by calls and by bytes", async () => {
  const waiting = new AbortController();
  const { signal } = waiting;
  server.reply = () => undefined;
  const calls = Array.from({ length: 10_000 }, (_, n) => agent.saveEvent(`e${n}`, n, { signal }));
  calls.forEach((call) => call.catch(() => undefined));
  await assert.rejects(agent.saveEvent("over", 1), (error) => error instanceof QueueFull && error.retryable && error.outcome === "not_written");
  waiting.abort();
  await Promise.allSettled(calls);

  const large = "x".repeat(33 * 1024 * 1024);
  const again = new AbortController();
  const big = Array.from({ length: 3 }, (_, n) => agent.saveEvent(`big${n}`, large, { signal: again.signal }));
  big.forEach((call) => call.catch(() => undefined));
  await assert.rejects(agent.saveEvent("over", large), QueueFull);
  again.abort();
  await Promise.allSettled(big);
  server.reply = { json: ACK };
  assert.deepEqual(await agent.saveEvent("e", 1), ACK);
});

test("a batch is cut into requests of at most 1000 events, and nothing comes between them", async () => {
  server.reply = acknowledged;
  const [acks] = await Promise.all([
    agent.saveEvents(Array.from({ length: 2500 }, (_, n) => [`e${n}`, n] as const), { stepIndex: 3 }),
    agent.saveEvent("behind", 1),
  ]);
  assert.equal(acks.length, 2500);
  assert.deepEqual(server.asked.map((one) => one.body.events?.length), [1000, 1000, 500, undefined]);
  const sent = server.asked.flatMap((one) => one.body.events ?? []);
  assert.deepEqual(sent.map((one) => one.event_id), Array.from({ length: 2500 }, (_, n) => `e${n}`));
  assert.ok(sent.every((one) => one.step_index === 3));
});

test("a batch is cut by bytes", async () => {
  server.reply = acknowledged;
  const text = "é".repeat(700_000); // 1.4 MB
  await agent.saveEvents(["a", "b", "c", "d", "e"].map((id) => [id, id === "d" ? text.repeat(4) : text] as const));
  assert.deepEqual(server.asked.map((one) => one.body.events.map((event: any) => event.event_id).join("")), ["ab", "c", "d", "e"]);
});

test("each request of a batch has the whole timeout", async () => {
  server.reply = async (asked) => {
    await new Promise((resolve) => setTimeout(resolve, 400));
    return acknowledged(asked);
  };
  const acks = await agent.saveEvents(Array.from({ length: 2001 }, (_, n) => [`e${n}`, n] as const), { timeout: 1000 });
  assert.equal(acks.length, 2001);
});

test("no events are no request", async () => {
  assert.deepEqual(await agent.saveEvents([]), []);
  assert.equal(server.asked.length, 0);
});

test("a batch that fails part way says how far it came", async () => {
  const acks = Array.from({ length: 5 }, (_, seq) => ({ seq, duplicate: false }));
  server.reply = (asked, response) => {
    if (asked.body.events.length === 1000) return acknowledged(asked);
    return void send(response, 503, problem("log-unavailable", 503, "unknown", true, { failed: 5, acks }), { "Retry-After": "60" });
  };
  const events = Array.from({ length: 1100 }, (_, n) => [`e${n}`, n] as const);
  await assert.rejects(agent.saveEvents(events), (error) => {
    assert.ok(error instanceof BatchFailed);
    assert.ok(error.cause instanceof WalUnavailable);
    assert.deepEqual([error.failed, error.acks.length, error.outcome, error.retryable], [1005, 1005, "unknown", true]);
    assert.match(error.message, /1005 of 1100 events are durable; event "e1005" \(events\[1005\]\) failed: detail of log-unavailable/);
    return true;
  });
});

test("what one attempt of a batch made durable is not forgotten by the next", async () => {
  server.reply = (_, response, number) => {
    if (number === 1) return void send(response, 503, problem("log-unavailable", 503, "unknown", true, { failed: 1, acks: [ACK] }));
    return void send(response, 409, problem("fenced", 409, "not_written", false, { owner: "b", failed: 0, acks: [] }));
  };
  await assert.rejects(agent.saveEvents([["e0", 0], ["e1", 1]]), (error) => {
    assert.ok(error instanceof BatchFailed);
    assert.deepEqual([error.failed, error.acks, error.outcome], [1, [ACK], "unknown"]);
    return true;
  });
});

test("close comes behind the calls that were made before, and refuses later ones", async () => {
  server.reply = (asked, response) => (asked.method === "DELETE" ? void send(response, 204, null) : acknowledged(asked));
  await agent.resume();
  const saved = agent.saveEvent("e", 1);
  const closed = agent.close();
  await assert.rejects(agent.saveEvent("later", 1), Closed);
  await assert.rejects(agent.resume(), Closed);
  await assert.rejects(agent.step("s", () => 1), Closed);
  assert.throws(() => agent.history(), Closed);
  await Promise.all([saved, closed]);
  assert.deepEqual(server.asked.map((one) => one.method), ["POST", "POST", "DELETE"]);
});

test("close of an agent that owns nothing asks nothing", async () => {
  await agent.close();
  await agent[Symbol.asyncDispose]();
  assert.equal(server.asked.length, 0);
});

test("pages of the history follow each other", async () => {
  const event = (n: number) => ({ event_id: `e${n}`, step_index: 0, type: "event", created_at: "", cursor: `c${n}`, stored: true, dead: false, payload: n });
  server.reply = ({ path }) => {
    const query = new URL(path, "http://localhost").searchParams;
    const from = Number(query.get("after")?.slice(1) ?? 0);
    if (from === 3) return { events: [], next: "c4" }; // an empty page may have a next one
    const events = [from + 1, from + 2, from + 3].filter((n) => n <= 7).slice(0, Number(query.get("limit"))).map(event);
    return { events, next: from + 3 >= 7 ? null : `c${from + 3}` };
  };
  const read = async (options: object) => {
    const found: string[] = [];
    for await (const { eventId, data } of agent.history(options)) found.push(`${eventId}=${data}`);
    return found.join(" ");
  };
  assert.equal(await read({}), "e1=1 e2=2 e3=3 e5=5 e6=6 e7=7");
  assert.equal(await read({ limit: 2 }), "e1=1 e2=2");
  assert.equal(await read({ limit: 0 }), "");
  assert.equal(await read({ after: { cursor: "c4" }, type: "a&b" }), "e5=5 e6=6 e7=7");
  assert.match(server.asked.at(-1)?.path ?? "", /^\/agents\/a\/history\?limit=250&after=c4&type=a%26b$/);
  assert.throws(() => agent.history({ limit: -1 }), InvalidArgument);
  const asked = server.asked.length;
  for await (const _ of agent.history()) break;
  assert.equal(server.asked.length, asked + 1);
});

test("a step beyond what JavaScript counts exactly is refused, both ways", async () => {
  await assert.rejects(agent.checkpoint(2 ** 53, {}), InvalidArgument);
  await assert.rejects(agent.saveEvent("e", {}, { stepIndex: 1.5 }), InvalidArgument);
  server.reply = (_, response) => void response.end(JSON.stringify(resumed("a")).replace('"step_index":0', '"step_index":9223372036854775807'));
  await assert.rejects(agent.peek(), /over 2\*\*53-1/);
});

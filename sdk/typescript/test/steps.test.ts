// Steps: names, replays, nesting, retries, recorded errors, and runs that end, over a sidecar in memory.

import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";

import { Aborted, AgentFenced, InvalidArgument, InvalidPayload, RecordTooLarge, RunEnded, SkialithAgent, StepFailed, StepMismatch, StoreUnavailable, WalFull } from "@skialith/agent-core";
import type { StepContext } from "@skialith/agent-core";

import { Memory } from "./memory.js";

let memory: Memory;
let url: string;
let agent: SkialithAgent;

beforeEach(async () => {
  memory = new Memory();
  url = await memory.start();
  agent = await begun();
});
afterEach(() => memory.stop());

/** An agent as a new process has it, resumed. */
async function begun(): Promise<SkialithAgent> {
  const made = new SkialithAgent({ agentId: "a/1", url });
  await made.resume();
  return made;
}

/** A function that counts its calls. */
function counted<T>(value: (call: number, step: StepContext) => T) {
  const ask = Object.assign((step: StepContext): T => value((ask.calls += 1), step), { calls: 0 });
  return ask;
}

test("a later run gets what is recorded, and calls nothing", async () => {
  const ask = counted((call) => ({ call, at: new Date(0), gone: undefined }));
  const first = await agent.step("ask", ask);
  assert.deepEqual(first, { call: 1, at: "1970-01-01T00:00:00.000Z" });
  assert.deepEqual(await agent.step("ask", ask), { ...first, call: 2 });
  const later = await begun();
  assert.deepEqual(await later.step("ask", ask), first);
  assert.deepEqual(await later.step("ask", ask), { ...first, call: 2 });
  assert.equal(ask.calls, 2);
  assert.deepEqual(memory.ids, ["ask", "ask#2"]);
});

test("places are given in the order of the calls, whenever they end", async () => {
  const slow = (ms: number) => () => new Promise<number>((resolve) => setTimeout(resolve, ms, ms));
  const values = await Promise.all([agent.step("s", slow(30)), agent.step("s", slow(1)), agent.step("s", slow(10))]);
  const later = await begun();
  const never = () => assert.fail("called again");
  assert.deepEqual(await Promise.all([1, 2, 3].map(() => later.step<number>("s", never))), values);
});

test("a result that is undefined is null, in every run", async () => {
  assert.equal(await agent.step("void", () => undefined), null);
  assert.equal(await (await begun()).step("void", () => undefined), null);
});

test("names are escaped as Python escapes them", async () => {
  await agent.step("a/b#c%d~e é🙂", () => 1);
  assert.deepEqual(memory.ids, ["a%2Fb%23c%25d%7Ee é🙂"]);
  assert.match(memory.asked.at(-1)?.body.name, /^a\/b#c%d~e/);
  for (const name of ["", ".", "..", "x".repeat(256), "\ud800"]) await assert.rejects(agent.step(name, () => 1), InvalidArgument);
  await assert.rejects(agent.step("x", 5 as never), InvalidArgument);
});

test("an id that is too long is cut, and stays different", async () => {
  const long = "🙂".repeat(200);
  await agent.step(long, (step) => step.step(long + "1", () => step.step(long + "2", () => 1)));
  const [one = "", two = "", outer = ""] = memory.ids;
  assert.equal(outer, long);
  assert.deepEqual([[...one].length, [...two].length], [255, 255]);
  assert.match(one, /~[0-9a-f]{32}$/);
  assert.notEqual(one, two);
});

test("inner steps are counted within the outer one, and not called when that is replayed", async () => {
  const inner = counted((call) => call);
  const outer = async (step: StepContext) => [await step.step("in", inner), await step.step("in", inner), step.id];
  assert.deepEqual(await agent.step("out", outer), [1, 2, "out"]);
  assert.deepEqual(await agent.step("out", outer), [3, 4, "out#2"]);
  assert.deepEqual(memory.ids, ["out/in", "out/in#2", "out", "out#2/in", "out#2/in#2", "out#2"]);
  const later = await begun();
  assert.deepEqual(await later.step("out", outer), [1, 2, "out"]);
  assert.equal(inner.calls, 4);
});

test("a crash between the inner step and the outer one calls only the outer one again", async () => {
  const inner = counted(() => "inner");
  await assert.rejects(agent.step("out", async (step) => (await step.step("in", inner), assert.fail("crash"))), /crash/);
  assert.equal(await (await begun()).step("out", (step) => step.step("in", inner)), "inner");
  assert.equal(inner.calls, 1);
});

test("an attempt that is made again counts inner steps from the beginning", async () => {
  const inner = counted((call) => call);
  const outer = counted(async (call, step) => {
    const value = await step.step("in", inner);
    if (call < 3) throw new Error("once more");
    return [value, step.attempt];
  });
  assert.deepEqual(await agent.step("out", outer, { retries: 2, backoff: 1 }), [1, 3]);
  assert.equal(inner.calls, 1);
});

test("the idempotency key belongs to the agent and the step's id", async () => {
  const keys: string[] = [];
  const keep = (step: StepContext) => void keys.push(step.idempotencyKey);
  await agent.step("s", keep);
  await agent.step("s", keep);
  memory.steps.clear();
  await (await begun()).step("s", keep);
  await new SkialithAgent({ agentId: "b", url }).step("s", keep);
  const [first = "", second, again, other] = keys;
  assert.match(first, /^[0-9a-f]{32}$/);
  assert.equal(first, again);
  assert.equal(new Set([first, second, other]).size, 3);
});

test("retries: how often, of which errors", async () => {
  const fails = counted(() => assert.fail("no"));
  await assert.rejects(agent.step("s", fails, { retries: 2, backoff: 1 }), /no/);
  assert.equal(fails.calls, 3);
  const typed = counted(() => {
    throw new TypeError("typed");
  });
  await assert.rejects(agent.step("t", typed, { retries: 5, backoff: 1, retryOn: [RangeError] }), TypeError);
  assert.equal(typed.calls, 1);
  await assert.rejects(agent.step("t", typed, { retries: 1, backoff: 1, retryOn: (error) => error instanceof TypeError }), TypeError);
  assert.equal(typed.calls, 3);
  assert.deepEqual(memory.ids, []); // what is not recorded is tried by a later run
  for (const options of [{ retries: -1 }, { retries: 101 }, { backoff: -1 }, { backoffFactor: 0.5 }, { retryOn: [1] as never }]) {
    await assert.rejects(agent.step("t", typed, options), InvalidArgument);
  }
});

test("a signal ends the pauses of a step", async () => {
  const controller = new AbortController();
  const fails = counted(() => {
    setTimeout(() => controller.abort(), 20);
    throw new Error("no");
  });
  await assert.rejects(agent.step("s", fails, { retries: 5, backoff: 60_000, signal: controller.signal }), Aborted);
  assert.equal(fails.calls, 1);
});

test("errors that are recorded are thrown by every run", async () => {
  const fails = counted(() => {
    throw new RangeError("no such city\ud800" + "!".repeat(5000));
  });
  const failed = (cause: boolean) => (error: unknown) => {
    assert.ok(error instanceof StepFailed);
    assert.deepEqual([error.step, error.errorType, error.outcome, error.cause instanceof RangeError], ["s", "RangeError", "durable", cause]);
    assert.match(error.errorMessage, /^no such city\ufffd!+$/);
    assert.equal(error.errorMessage.length, 2000);
    return true;
  };
  await assert.rejects(agent.step("s", fails, { recordErrors: [RangeError] }), failed(true));
  await assert.rejects((await begun()).step("s", fails, { recordErrors: [RangeError] }), failed(false));
  assert.equal(fails.calls, 1);
});

test("errors of this package are not recorded, except that an inner step failed", async () => {
  const all = { recordErrors: () => true };
  await assert.rejects(agent.step("s", () => Promise.reject(new AgentFenced("x")), all), AgentFenced);
  assert.deepEqual(memory.ids, []);
  const outer = (step: StepContext) => step.step("in", () => Promise.reject(new Error("no")), all);
  await assert.rejects(agent.step("out", outer, all), (error) => error instanceof StepFailed && error.errorType === "StepFailed");
  assert.deepEqual(memory.ids, ["out/in", "out"]);
});

test("a step of another function is refused, and that is not called", async () => {
  function ask() {
    return 1;
  }
  function tell() {
    return assert.fail("called");
  }
  await agent.step("s", ask);
  await assert.rejects((await begun()).step("s", tell), (error) => {
    assert.ok(error instanceof StepMismatch);
    assert.deepEqual([error.step, error.recorded, error.given], ["s", "ask", "tell"]);
    return true;
  });
  assert.equal(await (await begun()).step("s", tell, { functionName: "ask" }), 1);
  assert.equal(await (await begun()).step("s", ask.bind(null)), 1);
  assert.equal(await (await begun()).step("s", () => 2), 1); // nobody's name says nothing
});

test("a record whose answer is lost is written once", async () => {
  for (const mishap of ["lost-before", "lost-behind"] as const) {
    memory.mishaps.push(mishap);
    const ask = counted((call) => call);
    assert.equal(await agent.step(mishap, ask), 1);
    assert.equal(ask.calls, 1);
  }
  assert.deepEqual(memory.ids, ["lost-before", "lost-behind"]);
});

test("of two records of one step the first counts", async () => {
  const slow = await begun();
  const answer = agent.step("s", async () => {
    assert.equal(await slow.step("s", () => "first"), "first");
    return "second";
  });
  assert.equal(await answer, "first");
});

test("a run ends when a record fails; the next one of the process does not call again", async () => {
  const ask = counted((call) => call);
  memory.mishaps.push("full");
  await assert.rejects(agent.step("s", ask), WalFull);
  await assert.rejects(agent.step("t", ask), (error) => error instanceof RunEnded && error.retryable && error.cause instanceof WalFull);
  assert.equal(ask.calls, 1);
  await agent.resume();
  assert.equal(await agent.step("s", ask), 1);
  assert.equal(ask.calls, 1);
  memory.mishaps.push("fenced");
  await assert.rejects(agent.step("t", ask), AgentFenced);
  assert.equal(await (await begun()).step("t", ask), 3); // another process calls again
});

test("a run ends when a step cannot be read", async () => {
  memory.blind = true;
  const ask = counted((call) => call);
  await assert.rejects(agent.step("s", ask), StoreUnavailable);
  memory.blind = false;
  await assert.rejects(agent.step("s", ask), RunEnded);
  assert.equal(ask.calls, 0);
  await agent.resume();
  assert.equal(await agent.step("s", ask), 1);
});

test("a result that cannot be recorded is refused with its path, and the run goes on", async () => {
  await assert.rejects(agent.step("s", () => ({ a: [new Map()] })), (error) => {
    assert.ok(error instanceof InvalidPayload);
    assert.equal(error.path, "result.a[0]");
    assert.match(error.message, /result\.a\[0\]: Map is not JSON; the function has run/);
    return true;
  });
  memory.mishaps.push("too-large");
  await assert.rejects(agent.step("s", () => 1), RecordTooLarge);
  assert.equal(await agent.step("s", () => 1), 1);
});

test("without resume the first step takes the agent over, once", async () => {
  const alone = new SkialithAgent({ agentId: "alone", url });
  await Promise.all([alone.step("s", () => 1), alone.step("t", () => 2)]);
  const verbs = memory.asked.filter((one) => one.path.includes("alone")).map((one) => `${one.method} ${one.path.split("/")[3]}`);
  assert.equal(verbs.filter((verb) => verb === "POST resume").length, 1);
  assert.ok(memory.asked.filter((one) => one.body?.step_id !== undefined).every((one) => one.headers["skialith-lease"] !== undefined));
});

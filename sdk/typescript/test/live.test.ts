// The package, installed from its tarball, against a real sidecar.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { AgentFenced, InvalidPayload, SidecarUnavailable, SkialithAgent, Unauthorized } from "@skialith/agent-core";

import { Installed, ran } from "./installed.js";
import { PACKAGE, Sidecar, environment } from "./sidecar.js";

let sidecar: Sidecar;
let installed: Installed;
before(async () => {
  [sidecar, installed] = await Promise.all([Sidecar.start(), Installed.make()]);
});
after(async () => {
  installed.remove();
  await sidecar.dispose();
});

/** A new object of an agent, as another process would have it. */
function opened(agentId: string): SkialithAgent {
  return new SkialithAgent({ agentId, url: sidecar.url });
}

/** All of an agent's events, or as many as the options say. */
async function read(agent: SkialithAgent, options = {}) {
  const found = [];
  for await (const event of agent.history(options)) found.push(event);
  return found;
}

/** The lines of the issue, word for word. */
const SNIPPET = `\
const agent = new SkialithAgent({ agentId: "my-agent" });
const state = await agent.resume();                       // { agentId, stepIndex, data, isNew }
await agent.checkpoint(state.stepIndex, { messages });
await agent.saveEvent("step-1", { kind: "thought", text: "..." });
`;
const SHOW = `console.log(JSON.stringify([state.agentId, state.stepIndex, state.data, state.isNew]));
const end = performance.now();
process.on("exit", () => console.log(performance.now() - end < 2000));
`;

test("the issue's snippet, as a module and as CommonJS; neither keeps the process alive", async () => {
  const settings = { SKIALITH_URL: sidecar.url };
  const imported = `import { SkialithAgent } from "@skialith/agent-core";\n${SNIPPET}`;
  const first = await installed.program("snippet.mjs", `const messages = ["hi"];\n${imported}${SHOW}`, settings);
  assert.deepEqual(first, { lines: ['["my-agent",0,{},true]', "true"], code: 0, stderr: "" });
  const required = `const { SkialithAgent } = require("@skialith/agent-core");\n(async () => {\nconst messages = [];\n${SNIPPET}${SHOW}})();`;
  const second = await installed.program("snippet.cjs", required, settings);
  assert.deepEqual(second, { lines: ['["my-agent",0,{"messages":["hi"]},false]', "true"], code: 0, stderr: "" });
  const [event, ...more] = await read(opened("my-agent"));
  assert.deepEqual([event?.eventId, event?.type, event?.data, more.length], ["step-1", "thought", { kind: "thought", text: "..." }, 0]);
});

for (const [name, path] of [["the project's README", "../../README.md"], ["the package's README", "README.md"]] as const) {
  test(`the example of ${name} runs twice`, async () => {
    const text = readFileSync(join(PACKAGE, path), "utf8");
    const example = /<!-- typescript:.*?-->\n```js\n(.*?)```/s.exec(text)?.[1];
    assert.ok(example, "no example");
    const settings = { SKIALITH_URL: sidecar.url };
    const [first, second] = [await installed.program("readme.mjs", example, settings), await installed.program("readme.mjs", example, settings)];
    assert.deepEqual([first.code, first.stderr, second.code, second.stderr], [0, "", 0, ""]);
    assert.match(first.lines.join("\n"), /asked/);
    assert.doesNotMatch(second.lines.join("\n"), /asked/);
  });
}

test("the example program goes on where it was killed", async () => {
  const settings = { SKIALITH_URL: sidecar.url };
  const program = join(PACKAGE, "examples/agent.mjs");
  const child = spawn(process.execPath, [program], { env: environment(settings) as NodeJS.ProcessEnv, stdio: ["ignore", "pipe", "inherit"] });
  const exit = once(child, "exit");
  let printed = "";
  for await (const chunk of child.stdout) {
    printed += String(chunk);
    if (printed.includes("asking (ask-1)")) child.kill("SIGKILL");
  }
  assert.deepEqual(await exit, [null, "SIGKILL"]);
  const { lines, code } = await ran(program, settings);
  assert.equal(code, 0);
  assert.equal(lines[0], "begins at step 1 of 3");
  assert.deepEqual(lines.filter((line) => line.startsWith("asking")).length, 2);
  assert.deepEqual(lines.slice(-3).map((line) => line.split(" ")[0]), ["answer-0", "answer-1", "answer-2"]);
});

test("whoever resumes fences the one before, and is named", async () => {
  const [first, second] = ["worker-1", "worker-2"].map((owner) => new SkialithAgent({ agentId: "fenced", url: sidecar.url, owner }));
  assert.ok(first && second);
  await first.resume();
  await first.saveEvent("e1", 1);
  assert.deepEqual((await second.resume()).isNew, true);
  for (const call of [first.saveEvent("e2", 2), first.checkpoint(1, {})]) {
    await assert.rejects(call, (error) => {
      assert.ok(error instanceof AgentFenced, String(error));
      assert.match(error.owner, /worker-2/);
      return error.outcome === "not_written" && !error.retryable && error.status === 409;
    });
  }
  await assert.rejects(first.saveEvents([["e3", 3]]), (error: any) => error.name === "BatchFailed" && error.cause instanceof AgentFenced);
  await second.saveEvent("e4", 4);
  assert.deepEqual((await read(second)).map((event) => event.eventId), ["e1", "e4"]);
  await first.close(); // says goodbye for a lease that is not its own any more
  await second.saveEvent("e5", 5);
  await second.close();
  await first.peek().then(() => assert.fail("closed"), () => undefined);
});

test("a repeated event is a duplicate, and its first data stays", async () => {
  const agent = opened("twice");
  const first = await agent.saveEvent("e", { n: 1 });
  const again = await agent.saveEvent("e", { n: 2 });
  assert.deepEqual([first.duplicate, again.duplicate, again.seq], [false, true, first.seq]);
  assert.deepEqual((await read(agent)).map((event) => event.data), [{ n: 1 }]);
});

test("resume gives back the last checkpoint; later events carry its step", async () => {
  const agent = opened("stated");
  assert.deepEqual(await agent.resume(), { agentId: "stated", stepIndex: 0, data: {}, isNew: true, source: "none", databaseOk: true });
  await agent.checkpoint(3, { a: [1.5, null, "é🙂"] });
  await agent.checkpoint(2, { b: true });
  await agent.saveEvent("e", null);
  const state = await opened("stated").peek();
  assert.deepEqual([state.stepIndex, state.data, state.isNew], [2, { b: true }, false]);
  assert.deepEqual((await read(agent)).map((event) => [event.stepIndex, event.type, event.data]), [[2, "event", null]]);
});

test("the history comes in pages, behind a cursor, and by type", async () => {
  const agent = opened("long");
  const pairs = Array.from({ length: 1200 }, (_, n) => [`e${n}`, { kind: n % 100 === 0 ? "rare" : "usual", n }] as const);
  const acks = await agent.saveEvents(pairs);
  assert.equal(new Set(acks.map((ack) => ack.seq)).size, 1200);
  const all = await read(agent);
  assert.deepEqual(all.map((event) => event.data.n), pairs.map((_, n) => n));
  const rest = await read(agent, { after: all[599], limit: 300 });
  assert.deepEqual(rest.map((event) => event.data.n), Array.from({ length: 300 }, (_, n) => n + 600));
  const rare = await read(agent, { type: "rare" });
  assert.deepEqual(rare.map((event) => event.data.n), Array.from({ length: 12 }, (_, n) => n * 100));
});

test("a large payload", async () => {
  const agent = opened("large");
  const text = "é🙂x".repeat(700_000); // 4.9 MB
  await agent.checkpoint(1, { text });
  await agent.saveEvent("e", text);
  assert.equal((await agent.peek()).data.text, text);
  assert.equal((await read(agent))[0]?.data, text);
});

test("a deep payload is carried by every verb, or refused here", async () => {
  const agent = opened("deep");
  const nested = (levels: number) => JSON.parse("[".repeat(levels) + "]".repeat(levels));
  await agent.saveEvents([["e", nested(198)]]);
  await agent.checkpoint(1, nested(198));
  assert.deepEqual(await agent.step("deep", () => nested(198)), nested(198));
  assert.deepEqual((await read(agent))[0]?.data, nested(198));
  await assert.rejects(agent.saveEvent("f", nested(199)), InvalidPayload);
});

test("ids of any text", async () => {
  for (const id of ["a/b", "100%?#&+ ", "é日🙂", "../x", "%2F", "'\"\\\n"]) {
    const agent = opened(`agent ${id}`);
    const state = await agent.resume();
    assert.equal(state.agentId, `agent ${id}`);
    await agent.saveEvent(id, { id });
    assert.equal(await agent.step(id, () => 1), 1);
    assert.equal(await opened(`agent ${id}`).step(id, () => assert.fail("called again")), 1);
    assert.deepEqual((await read(agent)).map((event) => event.eventId)[0], id);
  }
});

/** Steps of a program that ends in between: the answer to `record` never leaves the process. */
const STEPPING = `
import { SkialithAgent } from "@skialith/agent-core";
const die = process.argv[2] ?? process.env.DIE;
const agent = new SkialithAgent({
  agentId: "stepping",
  fetch: (url, init) => {
    if (die && init.method === "POST" && String(init.body).includes('"step_id":"' + die + '"')) process.exit(9);
    return fetch(url, init);
  },
});
function work(step) { console.log("called", step.id, step.idempotencyKey); return { id: step.id }; }
async function outer(step) { return [await step.step("in", work), await step.step("in", work)]; }
await agent.resume();
console.log(JSON.stringify([await agent.step("one", work), await agent.step("one", work), await agent.step("out", outer)]));
await agent.close();
`;

test("steps across processes that die between a function and its record", async () => {
  const called = async (die: string) => {
    const { lines, code } = await installed.program("stepping.mjs", STEPPING, { SKIALITH_URL: sidecar.url, DIE: die });
    assert.equal(code, die === "" ? 0 : 9, die);
    return lines;
  };
  const names = (lines: readonly string[]) => lines.filter((line) => line.startsWith("called")).map((line) => line.split(" ")[1]);
  const first = await called("one");
  assert.deepEqual(names(first), ["one"]);
  const second = await called("out/in#2");
  assert.deepEqual(names(second), ["one", "one#2", "out/in", "out/in#2"]);
  assert.equal(first[0], second[0]); // the same idempotency key
  assert.deepEqual(names(await called("out")), ["out/in#2"]);
  const last = await called("");
  assert.deepEqual(names(last), []);
  assert.equal(last[0], '[{"id":"one"},{"id":"one#2"},[{"id":"out/in"},{"id":"out/in#2"}]]');
});

test("a killed sidecar that comes back: calls wait for it, and the lease is still good", async () => {
  const own = await Sidecar.start({ SKIALITH_TOKEN: "a-long-secret" });
  try {
    const stranger = new SkialithAgent({ agentId: "killed", url: own.url });
    await assert.rejects(stranger.saveEvent("e", 1), (error) => error instanceof Unauthorized && error.outcome === "not_written");
    const agent = new SkialithAgent({ agentId: "killed", url: own.url, token: "a-long-secret" });
    await agent.resume();
    await agent.saveEvent("before", 1);
    await own.end("SIGKILL");
    await assert.rejects(agent.saveEvent("short", 1, { timeout: 100 }), (error) => error instanceof SidecarUnavailable && error.outcome === "not_written");
    const saved = agent.saveEvent("meanwhile", 2);
    const checkpoint = agent.checkpoint(1, { after: "meanwhile" });
    await own.run();
    await Promise.all([saved, checkpoint]);
    assert.deepEqual((await read(agent)).map((event) => event.eventId), ["before", "meanwhile"]);
    assert.deepEqual((await agent.peek()).data, { after: "meanwhile" });
    const other = new SkialithAgent({ agentId: "killed", url: own.url, token: "a-long-secret" });
    await other.resume();
    await assert.rejects(agent.saveEvent("fenced", 1), AgentFenced);
    await other.close();
    await agent.close();
  } finally {
    await own.dispose();
  }
});

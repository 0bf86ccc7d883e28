// The wire test vectors that this package shares with Python: requests, problems and payloads.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";

import * as core from "@skialith/agent-core";
import { InvalidArgument, InvalidPayload, SkialithAgent, SkialithError } from "@skialith/agent-core";

import { ACK, LEASE, Scripted, problem, resumed, send } from "./scripted.js";
import type { Asked } from "./scripted.js";

function vectors(name: string): any {
  return JSON.parse(readFileSync(new URL(`../../../tests/conformance/vectors/${name}.json`, import.meta.url), "utf8"));
}

let server: Scripted;
before(async () => {
  server = await Scripted.start({ json: ACK });
});
after(() => server.stop());

/** What a well-disposed sidecar says. */
function welcome({ method, path, body }: Asked, response: Parameters<typeof send>[0]): unknown {
  const [agentId = "", verb = ""] = path.split("?")[0]?.split("/").slice(2).map(decodeURIComponent) ?? [];
  if (verb === "resume" || verb === "state") return resumed(agentId);
  if (verb === "history") return { events: [], next: null };
  if (verb === "lease") return void send(response, 204, null);
  if (method === "GET") return void send(response, 404, problem("not-found", 404, "not_written", false));
  return path.endsWith("/batch") ? { acks: body.events.map(() => ACK) } : ACK;
}

/** Make the call that a vector names. */
async function make(agent: SkialithAgent, verb: string, given: any): Promise<unknown> {
  const options = { stepIndex: given.step_index };
  switch (verb) {
    case "save_event":
      return agent.saveEvent(given.event_id, given.data, options);
    case "save_events":
      return agent.saveEvents(given.events, options);
    case "checkpoint":
      return agent.checkpoint(given.step_index, given.data);
    case "peek":
      return agent.peek();
    case "resume":
      return agent.resume();
    case "close":
      return agent.close();
    case "history":
      for await (const event of agent.history(given)) assert.fail(event.eventId);
      return undefined;
    case "step":
    case "find_step":
      return agent.step(given.name, () => given.result, { functionName: "ask" });
    default:
      return assert.fail(verb);
  }
}

for (const vector of vectors("requests").requests) {
  test(`request: ${vector.name}`, async () => {
    server.reply = welcome;
    const agent = new SkialithAgent({ agentId: vector.agent_id, url: server.url, owner: vector.arguments.owner });
    if (vector.owned) await agent.resume();
    server.reply = vector.verb === "find_step" ? (asked, response) => (asked.method === "GET" ? vector.answer : welcome(asked, response)) : welcome;
    await make(agent, vector.verb, vector.arguments);
    const asked = server.asked.at(-1);
    assert.ok(asked);
    assert.deepEqual([asked.method, asked.path], [vector.method, vector.path]);
    assert.deepEqual(asked.body, vector.body);
    for (const name of ["content-type", "skialith-lease", "idempotency-key", "authorization"]) {
      const wanted = vector.headers[name]?.replace("{lease}", LEASE);
      if (wanted === "{random}") assert.match(String(asked.headers[name]), /^[0-9a-f-]{36}$/);
      else assert.equal(asked.headers[name], wanted, name);
    }
  });
}

test("calls that are not made", async () => {
  const asked = server.asked.length;
  for (const { agent_id, verb, arguments: given, path } of vectors("requests").refused) {
    const agent = new SkialithAgent({ agentId: agent_id, url: server.url });
    await assert.rejects(make(agent, verb, given), (error) => error instanceof InvalidArgument && error.path === path && error.outcome === "not_written");
  }
  assert.equal(server.asked.length, asked);
});

for (const vector of vectors("problems").problems) {
  test(`problem: ${vector.name}`, async () => {
    const { document } = vector;
    server.reply = (_, response) => send(response, document.status, document, { "Retry-After": "60" }); // so that it is not retried
    const agent = new SkialithAgent({ agentId: "a", url: server.url });
    const error: any = await agent.saveEvent("e", 1).catch((reason: unknown) => reason);
    assert.ok(error instanceof SkialithError);
    assert.equal(error.constructor, (core as any)[vector.error]);
    const { outcome, retryable, status, detail } = document;
    assert.deepEqual([error.outcome, error.retryable, error.status], [outcome, retryable, status]);
    assert.ok(error.message.includes(detail));
    for (const [name, value] of Object.entries(vector.facts)) assert.equal((error as any)[name], value, name);
  });
}

test("payloads that are carried", async () => {
  server.reply = { json: ACK };
  const agent = new SkialithAgent({ agentId: "a", url: server.url });
  for (const json of vectors("payloads").accepted) {
    await agent.saveEvent("e", JSON.parse(json));
    assert.deepEqual(server.asked.at(-1)?.body.payload, JSON.parse(json), json);
  }
});

test("payloads that are refused, with the path", async () => {
  const agent = new SkialithAgent({ agentId: "a", url: server.url });
  const asked = server.asked.length;
  for (const { json, at } of vectors("payloads").refused) {
    for (const call of [agent.saveEvent("e", JSON.parse(json)), agent.checkpoint(1, JSON.parse(json))]) {
      await assert.rejects(call, (error) => {
        assert.ok(error instanceof InvalidPayload, String(error));
        const whole = `data${at}`;
        assert.equal(error.path, whole.length > 500 ? `${whole.slice(0, 250)}...${whole.slice(-250)}` : whole);
        return error.outcome === "not_written" && !error.retryable;
      });
    }
  }
  assert.equal(server.asked.length, asked);
});

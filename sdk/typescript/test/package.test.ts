// What is packed, what it depends on, and that types and modules resolve for those who install it.

import assert from "node:assert/strict";
import { execFileSync, spawnSync } from "node:child_process";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { Installed } from "./installed.js";
import { PACKAGE } from "./sidecar.js";

const TSC = join(PACKAGE, "node_modules/typescript/bin/tsc");
const MODULES = [
  "agent",
  "answers",
  "batches",
  "client",
  "deadline",
  "errors",
  "history",
  "index",
  "lane",
  "options",
  "problems",
  "step-names",
  "step-policy",
  "steps",
  "transport",
  "values",
  "wire",
];

let installed: Installed;
before(async () => {
  installed = await Installed.make();
});
after(() => installed.remove());

test("npm pack holds the builds, their types, README and LICENSE, and nothing else", () => {
  const stdout = execFileSync("npm", ["pack", "--dry-run", "--ignore-scripts", "--json"], { cwd: PACKAGE, encoding: "utf8" });
  const [{ files }] = JSON.parse(stdout);
  const built = ["cjs", "esm"].flatMap((kind) => [
    ...MODULES.flatMap((name) => [`dist/${kind}/${name}.d.ts`, `dist/${kind}/${name}.js`]),
    `dist/${kind}/openapi.d.ts`,
  ]);
  const wanted = ["LICENSE", "README.md", "package.json", "dist/cjs/package.json", ...built];
  assert.deepEqual(files.map((file: { path: string }) => file.path).sort(), wanted.sort());
});

test("there are no dependencies, and nothing of Node's is imported", () => {
  const { dependencies, peerDependencies, optionalDependencies } = JSON.parse(readFileSync(join(PACKAGE, "package.json"), "utf8"));
  assert.deepEqual([dependencies, peerDependencies, optionalDependencies], [undefined, undefined, undefined]);
  for (const kind of ["esm", "cjs"]) {
    const folder = join(PACKAGE, "dist", kind);
    for (const name of readdirSync(folder).filter((file) => file.endsWith(".js"))) {
      const text = readFileSync(join(folder, name), "utf8");
      const imported = [...text.matchAll(/(?:from |import\(|require\(|import )"([^"]+)"/g)].map((found) => found[1] ?? "");
      assert.deepEqual(imported.filter((path) => !path.startsWith("./")), [], `${kind}/${name}`);
    }
  }
});

test("the lock file names no registry", () => {
  const lock = readFileSync(join(PACKAGE, "package-lock.json"), "utf8");
  assert.ok(!lock.includes('"resolved"'));
});

test("the types of the wire are those of the OpenAPI document", () => {
  const tool = join(PACKAGE, "node_modules/openapi-typescript/bin/cli.js");
  const done = spawnSync(process.execPath, [tool, "openapi.json", "--output", "src/openapi.d.ts", "--check"], { cwd: PACKAGE, encoding: "utf8" });
  assert.equal(done.status, 0, `run \`npm run types\` in sdk/typescript:\n${done.stderr}${done.stdout}`);
});

const CONSUMER = `
import { AgentFenced, SkialithAgent, SkialithError } from "@skialith/agent-core";
import type { Ack, AgentState, HistoryEvent, Outcome, StepContext } from "@skialith/agent-core";

interface State { messages: string[] }

export async function main(signal: AbortSignal): Promise<Outcome | undefined> {
  const agent = new SkialithAgent({ agentId: "my-agent", fetch });
  const state: AgentState<State> = await agent.resume<State>({ signal });
  const messages: string[] = state.isNew ? [] : state.data.messages;
  const ack: Ack = await agent.checkpoint(state.stepIndex, { messages });
  const acks: Ack[] = await agent.saveEvents([["a", 1], ["b", { at: ack.seq }]], { timeout: 100 });
  const answer: number = await agent.step("ask", async (step: StepContext) => step.step("inner", () => acks.length), { retries: 1 });
  for await (const event of agent.history<{ kind: string }>({ limit: answer })) {
    const one: HistoryEvent<{ kind: string }> = event;
    if (one.data.kind === "x") break;
  }
  // @ts-expect-error: an agent has an id
  new SkialithAgent({});
  try {
    await agent.close();
  } catch (error) {
    if (error instanceof AgentFenced) throw new Error(error.owner);
    if (error instanceof SkialithError) return error.outcome;
  }
  return undefined;
}
`;

for (const [names, options] of [
  [["consumer.mts", "consumer.cts"], ["--module", "NodeNext"]],
  [["bundled.ts"], ["--module", "ESNext", "--moduleResolution", "Bundler"]],
  [["old.ts"], ["--module", "CommonJS", "--moduleResolution", "Node10"]],
] as const) {
  test(`types resolve: ${names.join()}`, () => {
    for (const name of names) writeFileSync(join(installed.folder, name), CONSUMER);
    const strict = ["--strict", "--exactOptionalPropertyTypes", "--noEmit", "--skipDefaultLibCheck", "--target", "ES2022", "--lib", "ES2022,DOM"];
    const done = spawnSync(process.execPath, [TSC, ...names, ...options, ...strict], { cwd: installed.folder, encoding: "utf8" });
    assert.equal(done.status, 0, done.stdout);
  });
}

test("modules resolve both ways", async () => {
  const names = "Object.keys(core).sort().join()";
  const esm = await installed.program("names.mjs", `import * as core from "@skialith/agent-core"; console.log(${names});`);
  const cjs = await installed.program("names.cjs", `const core = require("@skialith/agent-core"); console.log(${names});`);
  assert.match(esm.lines[0] ?? "", /AgentFenced.*SkialithAgent.*WalUnavailable/);
  assert.deepEqual(cjs.lines, esm.lines);
});

// A real sidecar, started by the tests: `skialith serve` on the embedded default, in a directory of its own.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { once } from "node:events";
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

/** The package's own directory. */
export const PACKAGE = fileURLToPath(new URL("..", import.meta.url));
const PYTHON = process.env["SKIALITH_PYTHON"] ?? join(PACKAGE, "../../.venv/bin/python");
const START_MS = 60_000;

/** The environment without anything of Skialith's. */
export function environment(more: Record<string, string> = {}): Record<string, string | undefined> {
  const kept = Object.entries(process.env).filter(([name]) => !name.startsWith("SKIALITH_") && !name.startsWith("NODE_TEST"));
  return { ...Object.fromEntries(kept), ...more };
}

/** One sidecar's port, directory and process; the process may be killed and started again. */
export class Sidecar {
  readonly directory = mkdtempSync(join(tmpdir(), "skialith-ts-"));
  readonly url: string;
  readonly #port: number;
  readonly #environment: Record<string, string>;
  #process: ChildProcess | undefined;

  private constructor(port: number, more: Record<string, string>) {
    this.#port = port;
    this.#environment = more;
    this.url = `http://127.0.0.1:${port}`;
  }

  /** Start one on a free port and wait until it is ready. */
  static async start(more: Record<string, string> = {}): Promise<Sidecar> {
    const sidecar = new Sidecar(await freePort(), more);
    await sidecar.run();
    return sidecar;
  }

  /** Start the process and wait until it is ready. */
  async run(): Promise<void> {
    const log = openSync(join(this.directory, "log"), "a");
    const command = [join(dirname(PYTHON), "skialith"), "serve", "--port", String(this.#port)];
    const child = spawn(PYTHON, command, { cwd: this.directory, env: environment(this.#environment), stdio: ["ignore", log, log] });
    closeSync(log);
    this.#process = child;
    const end = performance.now() + START_MS;
    while (!(await this.#ready())) {
      const text = () => readFileSync(join(this.directory, "log"), "utf8");
      assert.ok(child.exitCode === null && performance.now() < end, `the sidecar did not start:\n${text()}`);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  /** End the process with this signal and wait for its end. */
  async end(signal: "SIGTERM" | "SIGKILL" = "SIGTERM"): Promise<void> {
    const child = this.#process;
    this.#process = undefined;
    if (child === undefined || child.exitCode !== null) return;
    const ended = once(child, "exit");
    child.kill(signal);
    await ended;
  }

  /** End the process, wait until its embedded server is gone too, and remove the directory. */
  async dispose(): Promise<void> {
    await this.end();
    const end = performance.now() + START_MS;
    while (this.#serverIsThere() && performance.now() < end) await new Promise((resolve) => setTimeout(resolve, 50));
    rmSync(this.directory, { recursive: true, force: true, maxRetries: 5 });
  }

  /** Whether a nats-server works in the directory, as /proc tells where there is one. */
  #serverIsThere(): boolean {
    const processes = existsSync("/proc/self/cmdline") ? readdirSync("/proc").filter((name) => /^\d+$/.test(name)) : [];
    return processes.some((pid) => {
      try {
        return readFileSync(`/proc/${pid}/cmdline`, "utf8").includes(this.directory);
      } catch {
        return false; // it has ended
      }
    });
  }

  async #ready(): Promise<boolean> {
    return fetch(`${this.url}/ready`).then(
      (response) => response.ok,
      () => false,
    );
  }
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}

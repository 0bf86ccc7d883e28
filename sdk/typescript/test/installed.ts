// The package as its users get it: packed, and installed from the tarball into an empty folder.

import { execFile } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";

import { PACKAGE, environment } from "./sidecar.js";

const run = promisify(execFile);

/** What a program printed, line by line; it must end by itself. */
export interface Ran {
  readonly lines: readonly string[];
  readonly code: number;
  readonly stderr: string;
}

/** A folder in which the package is installed. */
export class Installed {
  readonly folder = mkdtempSync(join(tmpdir(), "skialith-npm-"));

  /** Pack what was built, and install it without asking any registry. */
  static async make(): Promise<Installed> {
    const made = new Installed();
    const { stdout } = await run("npm", ["pack", "--ignore-scripts", "--json", "--pack-destination", made.folder], { cwd: PACKAGE });
    const [{ filename }] = JSON.parse(stdout);
    writeFileSync(join(made.folder, "package.json"), JSON.stringify({ name: "user", private: true }));
    await run("npm", ["install", "--offline", "--no-audit", "--no-fund", `./${filename}`], { cwd: made.folder });
    return made;
  }

  remove(): void {
    rmSync(this.folder, { recursive: true, force: true });
  }

  /** Write a program into the folder and run it with Node. */
  async program(name: string, text: string, more: Record<string, string> = {}): Promise<Ran> {
    writeFileSync(join(this.folder, name), text);
    return ran(join(this.folder, name), more);
  }
}

/** Run a program with Node; it has 60 seconds. */
export async function ran(path: string, more: Record<string, string>): Promise<Ran> {
  try {
    const { stdout, stderr } = await run(process.execPath, [path], { env: environment(more) as NodeJS.ProcessEnv, timeout: 60_000 });
    return { lines: stdout.trimEnd().split("\n"), code: 0, stderr };
  } catch (error) {
    const { code, stdout = "", stderr = "" } = error as { code?: number; stdout?: string; stderr?: string };
    return { lines: stdout.trimEnd().split("\n"), code: typeof code === "number" ? code : -1, stderr };
  }
}

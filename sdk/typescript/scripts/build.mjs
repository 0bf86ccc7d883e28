// Builds dist/esm and dist/cjs from nothing; what is left of earlier builds would be packed too.

import { execFileSync } from "node:child_process";
import { copyFileSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

process.chdir(fileURLToPath(new URL("..", import.meta.url)));
rmSync("dist", { recursive: true, force: true });
const tsc = "node_modules/typescript/bin/tsc";
for (const [kind, project] of [
  ["esm", "tsconfig.json"],
  ["cjs", "tsconfig.cjs.json"],
]) {
  execFileSync(process.execPath, [tsc, "--project", project], { stdio: "inherit" });
  copyFileSync("src/openapi.d.ts", `dist/${kind}/openapi.d.ts`); // tsc writes no declarations of declarations
}
writeFileSync("dist/cjs/package.json", `${JSON.stringify({ type: "commonjs" })}\n`);

// Builds dist/ from src/ and writes the hash of the sources beside it; a test compares the two.
import { createHash } from "node:crypto";
import { copyFileSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

await build({
  entryPoints: { page: "src/main.tsx" },
  outdir: "dist",
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "eof",
});
copyFileSync("src/index.html", "dist/index.html");
const hash = createHash("sha256");
for (const name of [...readdirSync("src").sort().map((file) => `src/${file}`), "build.mjs", "package-lock.json"]) {
  hash.update(`${name}\n`).update(readFileSync(name));
}
writeFileSync("dist/sources.sha256", `${hash.digest("hex")}\n`);

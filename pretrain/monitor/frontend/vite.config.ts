// Builds `../static`: one script, one style sheet, nothing that the browser would fetch from elsewhere.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type Plugin } from "vite";

// A test compares this with the sources, so that a bundle that was not built again is noticed.
function fingerprint(): Plugin {
  return {
    name: "fingerprint",
    closeBundle() {
      const hash = createHash("sha256");
      const files = readdirSync("src", { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
      const paths = files.map((entry) => join(entry.parentPath, entry.name).replaceAll("\\", "/"));
      for (const path of [...paths, "index.html", "package-lock.json"].sort()) {
        hash.update(path + "\0").update(readFileSync(path)).update("\0");
      }
      writeFileSync("../static/sources.sha256", hash.digest("hex") + "\n");
    },
  };
}

export default defineConfig({
  base: "/",
  esbuild: { jsx: "automatic", jsxImportSource: "preact", legalComments: "none" },
  build: {
    outDir: "../static",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    rollupOptions: { output: { entryFileNames: "app.js", assetFileNames: "app[extname]", inlineDynamicImports: true } },
  },
  plugins: [fingerprint()],
});

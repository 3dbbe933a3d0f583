// The unmodified official JavaScript client: concurrent `fal.subscribe`.
//
//   MODULES=folder-with-node_modules node fal_js.mjs URL JOBS AT_ONCE
import { createRequire } from "node:module";
import { join } from "node:path";

const { createFalClient } = createRequire(join(process.env.MODULES, "here.js"))("@fal-ai/client");
const APP = "fal-ai/flux/dev/image-to-image";
const [origin, jobs, atOnce] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const fal = createFalClient({
  credentials: "benchmark:none",
  requestMiddleware: async (request) => ({ ...request, url: request.url.replace("https://queue.fal.run", origin) }),
});

let next = 0;
async function work() {
  while (next < jobs) {
    const number = next++;
    const input = { image_url: "https://images.example/a.jpg", prompt: `p ${number}`, seed: number };
    await fal.subscribe(APP, { input });
  }
}
await Promise.all(Array.from({ length: atOnce }, work));

// Runs one action with the unmodified @fal-ai/client and prints the outcome as JSON.
//
//   node client.mjs RECIPE ACTION ARGUMENTS-AS-JSON
//
// RECIPE is how the client reaches our server: "middleware" rewrites URLs, "proxy" sends everything to one URL.
// Environment: ENDPOINT (origin of the server), CREDENTIALS (key), MODULES (folder with node_modules).
import { createRequire } from "node:module";
import { openAsBlob } from "node:fs";
import { join } from "node:path";

const { createFalClient, ApiError, ValidationError } = createRequire(join(process.env.MODULES, "here.js"))(
  "@fal-ai/client",
);
const APP = "fal-ai/flux/dev/image-to-image";
const [recipe, action, given] = process.argv.slice(2);
const options = JSON.parse(given ?? "{}");
const origin = process.env.ENDPOINT;

const recipes = {
  middleware: {
    requestMiddleware: async (request) => ({
      ...request,
      url: request.url.replace(/^https:\/\/(queue\.fal\.run|rest\.fal\.ai)/, origin)
        .replace(/^https:\/\/fal\.run/, `${origin}/run`),
    }),
  },
  proxy: { proxyUrl: { url: `${origin}/api/fal/proxy`, when: "always" } },
};
const fal = createFalClient({ credentials: process.env.CREDENTIALS, ...recipes[recipe] });

const actions = {
  async subscribe({ input, mode }) {
    const updates = [];
    const { data, requestId } = await fal.subscribe(APP, {
      input,
      mode: mode ?? "polling",
      pollInterval: 50,
      logs: true,
      onQueueUpdate: (update) => updates.push(update),
    });
    return { data, requestId, updates };
  },

  async queue({ input }) {
    const ticket = await fal.queue.submit(APP, { input, priority: "low" });
    const requestId = ticket.request_id;
    let status = await fal.queue.status(APP, { requestId, logs: true });
    while (status.status !== "COMPLETED") status = await fal.queue.status(APP, { requestId, logs: true });
    return { ticket, status, result: await fal.queue.result(APP, { requestId }) };
  },

  async cancel({ input }) {
    const { request_id: requestId } = await fal.queue.submit(APP, { input });
    await fal.queue.cancel(APP, { requestId });
    const status = await fal.queue.subscribeToStatus(APP, { requestId, pollInterval: 50 });
    return { status, error: await failure(fal.queue.result(APP, { requestId })) };
  },

  async upload({ path, type }) {
    return { url: await fal.storage.upload(await openAsBlob(path, { type })) };
  },

  async blob({ path, type, input }) {
    const image_url = await openAsBlob(path, { type });
    return await fal.subscribe(APP, { input: { ...input, image_url }, pollInterval: 50 });
  },

  async run({ input }) {
    return await fal.run(APP, { input });
  },

  async webhook({ input, webhookUrl }) {
    return await fal.queue.submit(APP, { input, webhookUrl });
  },

  async fail({ input, startTimeout }) {
    return { error: await failure(fal.subscribe(APP, { input, startTimeout, pollInterval: 50 })) };
  },
};

async function failure(promise) {
  try {
    return { none: await promise };
  } catch (error) {
    const { name, message, status, body, requestId, timeoutType } = error;
    const fieldErrors = error instanceof ValidationError ? error.fieldErrors : null;
    return { isApiError: error instanceof ApiError, name, message, status, body, requestId, timeoutType, fieldErrors };
  }
}

console.log(JSON.stringify(await actions[action](options)));

// Client of the endpoint's public API. Independent of the page's elements.

const KEY = "restyle-key";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An error response: its HTTP status and the server's message. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Call the server. Throws `Refused` for an error response, TypeError without a response. */
export async function call(path, { headers = {}, ...options } = {}) {
  const mine = key.get() === null ? {} : { authorization: `Key ${key.get()}` };
  const response = await fetch(path, { ...options, headers: { ...mine, ...headers }, redirect: "error" });
  if (!response.ok) throw new Refused(response.status, described(await response.text(), response.status));
  return response;
}

/** Upload a file as fal's JavaScript client does: announce it, then send the bytes. Returns its URL. */
export async function upload(file) {
  const announced = await call("/storage/upload/initiate?storage_type=fal-cdn-v3", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ content_type: file.type || "application/octet-stream", file_name: file.name }),
  });
  const { upload_url: target, file_url: url } = await announced.json();
  await call(own(target), { method: "PUT", body: file, headers: { "content-type": file.type } });
  return url;
}

/** Submit a request. `seed` is a string of digits: JavaScript numbers cannot hold 64-bit integers. */
export async function submit(app, input, seed) {
  const body = JSON.stringify(input);
  const response = await call(`/${app}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: seed === "" ? body : `${body.slice(0, -1)},"seed":${seed}}`,
  });
  return response.json();
}

/** Yield each status until COMPLETED; reopen a stream that breaks off. */
export async function* statuses(ticket, attempts = 10) {
  for (let failures = 0; failures < attempts; failures += 1) {
    try {
      const response = await call(`${own(ticket.status_url)}/stream?logs=1`);
      for await (const status of events(response.body)) {
        failures = 0;
        yield status;
        if (status.status === "COMPLETED") return;
      }
    } catch (error) {
      if (error instanceof Refused && error.status < 500) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  throw new Error("The server does not respond. The request is stored: check the recent requests later.");
}

/** Get the output, with the seed as a string of digits. */
export async function result(ticket) {
  const text = await (await call(own(ticket.response_url))).text();
  // Quotes inside JSON strings are escaped, so that only the member itself matches.
  return { ...JSON.parse(text), seed: /"seed":(\d+)/.exec(text)?.[1] ?? "" };
}

export const cancel = (ticket) => call(own(ticket.cancel_url), { method: "PUT" });

/** The path of a URL from this server: behind a proxy, its scheme and host may differ from the page's. */
export const own = (url) => new URL(url, location.origin).pathname;

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

function described(text, status) {
  let detail;
  try {
    ({ detail } = JSON.parse(text));
  } catch {
    detail = undefined;
  }
  if (typeof detail === "string") return detail;
  if (!Array.isArray(detail)) return `The server returned status ${status}`;
  const place = (one) => (one.loc ?? []).filter((part) => part !== "body").join(".");
  return detail.map((one) => (place(one) ? `${place(one)}: ${one.msg}` : one.msg)).join("; ");
}

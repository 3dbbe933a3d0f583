// The list of recent requests. Untrusted values become text, or the URL of an image on this server.

const WORDS = { waiting: "waiting", running: "running", done: "done", failed: "failed", cancelled: "cancelled" };
const relative = new Intl.RelativeTimeFormat("en", { style: "narrow" });
const shown = new Map();

/** Create an element with properties and children; strings become text nodes. */
function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Update the list; cards of unchanged requests stay as they are. */
export function show(list, requests, now, again) {
  const ids = new Set(requests.map((request) => request.id));
  for (const [id, { card }] of shown) {
    if (ids.has(id)) continue;
    card.remove();
    shown.delete(id);
  }
  requests.forEach((request, place) => {
    const mark = JSON.stringify(request);
    const old = shown.get(request.id);
    if (old?.mark !== mark) {
      const card = made(request, again);
      old?.card.replaceWith(card);
      shown.set(request.id, { card, mark });
    }
    const { card } = shown.get(request.id);
    if (list.children[place] !== card) list.insertBefore(card, list.children[place] ?? null);
    const time = card.querySelector("time");
    time.textContent = ago(now - request.accepted_at);
  });
}

function made(request, again) {
  const accepted = new Date(request.accepted_at * 1000);
  const state = el("span", { className: `state ${request.state}` }, stateText(request));
  const button = el("button", { type: "button", className: "again", title: "Fill the form with these settings" }, "Reuse");
  button.setAttribute("aria-label", `Reuse: ${request.prompt || "no prompt"}`);
  button.addEventListener("click", () => again(request));
  const prompt = el("p", { className: "prompt", title: request.prompt }, request.prompt || "no prompt");
  return el(
    "li",
    { className: "card" },
    el("div", { className: "images" }, source(request), outcome(request)),
    prompt,
    request.error === null ? null : el("p", { className: "error" }, request.error),
    el(
      "div",
      { className: "meta" },
      state,
      el("time", { dateTime: accepted.toISOString(), title: accepted.toLocaleString() }),
      el("span", {}, facts(request)),
      button,
    ),
  );
}

function facts({ seed, seconds }) {
  return [seed && `seed ${seed}`, seconds === null ? null : `${seconds.toFixed(2)} s`].filter(Boolean).join(" · ");
}

function stateText(request) {
  const before = request.position;
  return request.state === "waiting" && before > 0 ? `${before} ahead` : WORDS[request.state];
}

function source(request) {
  if (request.source.image === null) return el("div", { className: "frame" }, el("p", {}, request.source.name));
  return frame(request.source.image, `Input of: ${request.prompt}`);
}

function outcome(request) {
  const [first, ...others] = request.images;
  if (first === undefined) return el("div", { className: `frame ${request.state}` }, el("p", {}, WORDS[request.state]));
  const result = frame(first.image, `Result of: ${request.prompt}`, first);
  if (others.length > 0) result.append(el("span", { className: "more" }, `+${others.length}`));
  return result;
}

function frame(path, alt, size = {}) {
  const image = el("img", { alt, loading: "lazy", decoding: "async" });
  if (size.width) [image.width, image.height] = [size.width, size.height];
  const missing = () => image.replaceWith(el("p", {}, "image cannot be displayed"));
  image.addEventListener("error", missing, { once: true });
  image.src = path;
  return el("a", { className: "frame", href: path, target: "_blank", rel: "noopener" }, image);
}

function ago(seconds) {
  if (seconds < 5) return "now";
  if (seconds < 60) return relative.format(-Math.round(seconds), "second");
  if (seconds < 3600) return relative.format(-Math.round(seconds / 60), "minute");
  if (seconds < 86400) return relative.format(-Math.round(seconds / 3600), "hour");
  return relative.format(-Math.round(seconds / 86400), "day");
}

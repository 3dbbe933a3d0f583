// The form: sends one image through the public API and shows the result.

import { cancel, own, result, statuses, submit, upload } from "./api.js";

const $ = (id) => document.getElementById(id);
const form = $("playground");
const SLIDERS = ["strength", "num_inference_steps", "guidance_scale"];
const uploads = new WeakMap();

let file = null;
let ticket = null;
let busy = false;

/** Connect the form. `changed` is called when a request is sent or ends. */
export function start(changed) {
  for (const name of SLIDERS) $(name).addEventListener("input", () => ($(`${name}-value`).textContent = $(name).value));
  $("file").addEventListener("change", () => choose($("file").files[0] ?? null));
  $("image_url").addEventListener("input", () => {
    if ($("image_url").value !== "") choose(null);
    showSource($("image_url").value.trim());
  });
  $("cancel").addEventListener("click", () => ticket && cancel(ticket).catch((error) => say(error.message, true)));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!busy) work(changed);
  });
  for (const kind of ["dragover", "dragleave", "drop"]) $("drop").addEventListener(kind, dragged);
}

/** Fill the form with the settings of an earlier request. */
export function fill(request) {
  choose(null);
  const { image } = request.source;
  $("image_url").value = image === null ? "" : location.origin + image;
  showSource($("image_url").value);
  $("prompt").value = request.prompt;
  $("seed").value = request.seed ?? "";
  for (const name of SLIDERS) {
    if (!(name in request.settings)) continue;
    $(name).value = request.settings[name];
    $(`${name}-value`).textContent = $(name).value;
  }
  const format = form.querySelector(`[name=output_format][value="${CSS.escape(request.settings.output_format ?? "jpeg")}"]`);
  if (format !== null) format.checked = true;
  $("try-heading").scrollIntoView({ behavior: "smooth" });
  $("prompt").focus({ preventScroll: true });
}

async function work(changed) {
  const problem = missing();
  if (problem !== null) {
    say(problem.text, true);
    problem.element.focus();
    return;
  }
  const prompt = $("prompt").value.trim();
  begin();
  try {
    ticket = await submit(document.body.dataset.app, { ...(await input()), prompt }, $("seed").value.trim());
    $("cancel").hidden = false;
    changed();
    for await (const status of statuses(ticket)) progress(status);
    showResult(await result(ticket), prompt);
  } catch (error) {
    say(error.message, true);
    $("result-note").textContent = "No result";
  }
  end();
  changed();
}

function missing() {
  if (file === null && $("image_url").value.trim() === "") return { element: $("file"), text: "Choose an image or enter its URL." };
  if ($("prompt").value.trim() === "") return { element: $("prompt"), text: "Enter a prompt." };
  if (!/^\d{0,19}$/.test($("seed").value.trim())) return { element: $("seed"), text: "The seed must be an integer of up to 19 digits." };
  return null;
}

async function input() {
  if (file !== null && !uploads.has(file)) {
    say("Uploading the image…");
    uploads.set(file, await upload(file));
  }
  const numbers = Object.fromEntries(SLIDERS.map((name) => [name, Number($(name).value)]));
  const format = form.querySelector("[name=output_format]:checked").value;
  return { image_url: file === null ? $("image_url").value.trim() : uploads.get(file), ...numbers, output_format: format };
}

function begin() {
  busy = true;
  $("submit").disabled = true;
  $("progress").removeAttribute("value");
  $("progress").hidden = false;
  $("result-image").hidden = $("made").hidden = true;
  $("result-note").hidden = false;
  $("result-note").textContent = "In progress";
  say("Sending…");
}

function end() {
  busy = false;
  ticket = null;
  $("submit").disabled = false;
  $("cancel").hidden = $("progress").hidden = true;
}

function progress(status) {
  if (status.status === "IN_QUEUE") {
    const before = status.queue_position;
    say(before === 0 ? "Queued, next to run" : `Queued, ${before} ahead`);
  } else if (status.status === "IN_PROGRESS") {
    const steps = (status.logs ?? []).map((line) => /^step (\d+) of (\d+)/.exec(line.message)).findLast(Boolean);
    if (steps) $("progress").value = steps[1] / steps[2];
    say(steps ? `Running, step ${steps[1]} of ${steps[2]}` : "Running");
  } else {
    $("progress").value = 1;
  }
}

function showResult(output, prompt) {
  const [image] = output.images;
  $("result-image").src = own(image.url);
  $("result-image").alt = `Result of: ${prompt}`;
  $("result-image").hidden = false;
  $("result-note").hidden = true;
  const seconds = output.timings?.inference;
  const facts = [`${image.width} × ${image.height}`, `seed ${output.seed}`];
  if (seconds !== undefined) facts.push(`${seconds.toFixed(2)} s engine time`);
  $("made-text").textContent = facts.join(" · ");
  $("made-link").href = own(image.url);
  $("made-link").download = image.file_name ?? "";
  $("made").hidden = false;
  say(output.has_nsfw_concepts?.some(Boolean) ? "Done. The safety checker flagged this image." : "Done");
}

function choose(chosen) {
  file = chosen;
  if (chosen === null) $("file").value = "";
  else $("image_url").value = "";
  $("file-name").textContent = chosen?.name ?? "Choose a file";
  showSource(chosen === null ? "" : URL.createObjectURL(chosen), chosen?.name);
}

/** Show the input image. One on another server is not loaded: the page only contacts its own server. */
function showSource(url, name = "Input image") {
  const image = $("input-image");
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  const here = url.startsWith("blob:") || url.startsWith(`${location.origin}/files/`);
  image.hidden = !here;
  $("input-note").hidden = here;
  $("input-note").textContent = url === "" ? "No image selected" : "Image on another server, no preview";
  image.alt = name;
  if (here) image.src = url;
  else image.removeAttribute("src");
}

function dragged(event) {
  event.preventDefault();
  $("drop").classList.toggle("over", event.type === "dragover");
  const dropped = [...(event.dataTransfer?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (event.type === "drop" && dropped) choose(dropped);
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

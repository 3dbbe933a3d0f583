// The live numbers: polls the page's state every 1.5 s while the tab is visible.

import { Refused, call, key } from "./api.js";

const PAUSE = 1500;
const $ = (id) => document.getElementById(id);
const format = new Intl.NumberFormat("en");

let timer = 0;

/** Poll the state; `show` gets the newest requests and the server's time. */
export function beat(show) {
  const tick = async () => {
    clearTimeout(timer);
    if (document.hidden) return;
    const used = key.get();
    try {
      const state = await (await call("/page/state")).json();
      numbers(state);
      show(state.requests, state.now);
      $("key-form").hidden = true;
      $("unreachable").hidden = true;
    } catch (error) {
      const locked = error instanceof Refused && (error.status === 401 || error.status === 403);
      $("unreachable").hidden = locked;
      if (locked) {
        show([], 0);
        ask(used, error.message);
        return; // until a key is entered
      }
    }
    clearTimeout(timer);
    timer = setTimeout(tick, PAUSE);
  };
  document.addEventListener("visibilitychange", tick);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    $("key").value = "";
    tick();
  });
  tick();
  return tick;
}

/** Show the key form; if a key was sent, say why it was rejected. */
function ask(used, why) {
  if (used !== null && used === key.get()) {
    key.forget();
    $("key-hint").textContent = `Key rejected: ${why}`;
    $("key-hint").classList.add("wrong");
  }
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

function numbers(state) {
  const minute = state.per_second.reduce((sum, count) => sum + count, 0);
  const shown = { ...state, "per-minute": minute };
  for (const id of ["waiting", "running", "per-minute", "finished", "failed"]) $(id).textContent = format.format(shown[id]);
  const top = Math.max(1, ...state.per_second);
  const points = state.per_second.map((count, second) => `${second},${(19 - (18 * count) / top).toFixed(2)}`).join(" ");
  const [area, line] = $("line").children;
  line.setAttribute("points", points);
  area.setAttribute("points", `0,20 ${points} 59,20`);
}

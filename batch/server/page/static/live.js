// The numbers that move, and the heartbeat that brings them: one small answer every 1.5 s while the tab is looked at.

import { Refused, call, key } from "./api.js";

const PAUSE = 1500;
const $ = (id) => document.getElementById(id);
const format = new Intl.NumberFormat("en");

let timer = 0;
let askedWith = null;

/** Keep the page alive; `show` gets the newest requests and the server's time. */
export function beat(show) {
  const tick = async () => {
    clearTimeout(timer);
    if (document.hidden) return;
    try {
      const state = await (await call("/page/state")).json();
      numbers(state);
      show(state.requests, state.now);
      $("key-form").hidden = true;
      $("unreachable").hidden = true;
    } catch (error) {
      await trouble(error, show);
    }
    clearTimeout(timer);
    timer = setTimeout(tick, PAUSE);
  };
  document.addEventListener("visibilitychange", tick);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = $("key").value.trim();
    if (given === "") return;
    key.set(given);
    askedWith = null;
    $("key").value = "";
    tick();
  });
  tick();
  return tick;
}

/** A key is asked for where the server wants one; anything else passes. */
async function trouble(error, show) {
  const locked = error instanceof Refused && (error.status === 401 || error.status === 403);
  $("unreachable").hidden = locked;
  if (!locked) return;
  show([], 0);
  const form = $("key-form");
  const used = key.get();
  if (used !== null && used !== askedWith) $("key-hint").textContent = `This key was refused: ${error.message}`;
  askedWith = used;
  key.forget();
  if (form.hidden) {
    form.hidden = false;
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

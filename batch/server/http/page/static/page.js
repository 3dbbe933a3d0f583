// Connects the parts of the page.

import { beat } from "./live.js";
import { fill, start } from "./playground.js";
import { show } from "./recent.js";

const list = document.getElementById("recent");
const empty = document.getElementById("empty");

const tick = beat((requests, now) => {
  show(list, requests, now, fill);
  empty.hidden = requests.length > 0;
});
start(tick);

// The page: controls in, pictures out. The networks are in worker.js.
import { BACKGROUNDS, COLORS, SHAPES, draw_scene, read_scene, write_scene } from "./shapes.js";

const $ = id => document.getElementById(id);
const el = (tag, props = {}, ...kids) => { const e = Object.assign(document.createElement(tag), props); e.append(...kids); return e; };
const TRIES = ["a purple heart on a navy background", "a large yellow star above a small cyan circle", "a green triangle to the right of a white cross", "a small orange diamond on a brown background"];
const THETAS = [0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5], ETAS = [0, 0.25, 0.5, 0.75, 1], KS = [1, 2, 5, 10, 20, 40];
const STATE = { caption: "caption", prior: "prior-kind", guidance: "guidance", pguidance: "prior-guidance", steps: "steps", seed: "seed", trace: "trace",
                eta: "eta", blend: "blend-at", noise: "blend-noise", from: "diff-from", to: "diff-to", theta: "diff-at", k: "parts-at" };
let facts = null;

// Status line

function say(text, share) {
  const s = $("status");
  s.className = "status" + (share === undefined ? " idle" : "");
  s.querySelector("i").style.width = `${100 * (share ?? 0)}%`;
  s.querySelector("span").textContent = text;
}
function complain(text) {
  say(text);
  $("status").className = "status bad";
}

// The worker: call(method, args, see) -> a promise; see(event) hears of everything on the way

let worker = null, ids = 0, current = null;
const waiting = new Map();
function call(method, args = {}, see = () => {}) {
  return new Promise((done, fail) => { waiting.set(++ids, { done, fail, see }); current = ids; worker.postMessage({ id: ids, method, args }); });
}
function hear({ data }) {
  const { done, fail, see } = waiting.get(data.id) ?? {};
  if (!done) return;
  if (data.event === "done") { waiting.delete(data.id); done(data.value); }
  else if (data.event === "error") { waiting.delete(data.id); fail(new Error(data.text)); }
  else if (data.event === "cancelled") { waiting.delete(data.id); fail(null); }
  else see(data);
}

/** Run a task with progress, cancel and errors in words; one at a time. */
async function work(task, title) {
  if (!facts || document.body.classList.contains("busy")) return;
  document.body.classList.add("busy");
  buttons();
  $("cancel").hidden = false;
  const began = performance.now();
  try {
    say(title, 0);
    await task();
    say(`Done in ${((performance.now() - began) / 1000).toFixed(1)} s, on this machine.`);
    document.body.dataset.took = Math.round(performance.now() - began);
  } catch (e) {
    if (e) complain(e.message); else say("Cancelled. What was finished stays.");
  } finally {
    document.body.classList.remove("busy");
    $("cancel").hidden = true;
    buttons();
  }
}
function buttons() {
  const busy = document.body.classList.contains("busy") || !facts;
  for (const b of document.querySelectorAll(".main, [id$=-go]")) b.disabled = busy;
}

// Pictures: CHW in [-1, 1] <-> canvas

function show(canvas, image, side) {
  canvas.width = canvas.height = side;
  canvas.classList.toggle("coarse", side <= 32);
  const n = side * side, pixels = new ImageData(side, side);
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = Math.round((Math.min(1, Math.max(-1, image[c * n + i])) + 1) * 127.5);
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}
/** The square middle of a picture at the model's side, by averaging. */
function take(source, w, h) {
  const side = facts?.side ?? 32, k = 8, big = side * k, s = Math.min(w, h);
  const canvas = el("canvas", { width: big, height: big }), c = canvas.getContext("2d", { willReadFrequently: true });
  c.fillStyle = "white"; c.fillRect(0, 0, big, big);
  c.imageSmoothingQuality = "high";
  c.drawImage(source, (w - s) / 2, (h - s) / 2, s, s, 0, 0, big, big);
  const from = c.getImageData(0, 0, big, big).data, out = new Float32Array(3 * side * side);
  for (let y = 0; y < big; y++) for (let x = 0; x < big; x++) for (let ch = 0; ch < 3; ch++)
    out[ch * side * side + Math.floor(y / k) * side + Math.floor(x / k)] += from[4 * (y * big + x) + ch] / (k * k);
  return out.map(v => v / 127.5 - 1);
}
function figures(box, labels) {
  box.replaceChildren(...labels.map(text => {
    const canvas = el("canvas", { width: 32, height: 32 });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", text);
    return el("figure", {}, canvas, el("figcaption", { textContent: text }));
  }));
  return [...box.querySelectorAll("canvas")];
}
/** What a strip does with events: pictures into canvases, progress into the status line. */
function into(canvases, title, more = () => {}) {
  return e => {
    if (e.event === "step") say(e.text ? `${title}: ${e.text}` : `${title}: ${Math.floor(e.done)} of ${e.of}`, e.done / e.of);
    if (e.event === "forming" || e.event === "frame") show(canvases[e.frame], e.image, e.side);
    more(e);
  };
}

// Panel 1: caption -> picture

async function draw() {
  const caption = $("caption").value.trim();
  if (!caption) return complain("The caption is empty: say what to draw, for example “a red star”.");
  const seed = Math.floor(Number($("seed").value));
  if (!(seed >= 0)) return complain("The seed must be a whole number from 0 up.");
  if (!facts.priors[$("prior-kind").value]) return complain("These weights do not have that prior: choose the other one.");
  remember();
  await work(async () => {
    const canvases = figures($("draw-out"), [0, 1, 2, 3].map(i => `draw ${i + 1}`)), trace = $("trace").checked;
    $("trace-out").hidden = !trace;
    $("trace-out").replaceChildren();
    canvases.forEach((c, i) => c.setAttribute("aria-label", `draw ${i + 1} of ${caption}`));
    const args = { caption, prior: $("prior-kind").value, n: 4, guidance: +$("guidance").value, prior_guidance: +$("prior-guidance").value, steps: +$("steps").value, seed, trace };
    await call("generate", args, into(canvases, "Drawing", e => {
      if (e.event === "forming" && trace && e.frame === 0) {
        const c = el("canvas");
        c.setAttribute("role", "img");
        c.setAttribute("aria-label", `the decoder's guess after step ${e.step}`);
        show(c, e.image, e.side);
        $("trace-out").append(c);
      }
      if (e.event === "frame") {
        const figure = canvases[e.frame].parentNode;
        figure.lastChild.textContent = `draw ${e.frame + 1} · z_i·z_t ${e.agreement.toFixed(2)}`;
        figure.append(el("div", { className: "use" }, ...["A", "B"].map((name, i) => el("button", { type: "button", textContent: `→ ${name}`, ariaLabel: `use draw ${e.frame + 1} as picture ${name}`, onclick: () => slots[i].set(canvases[e.frame], `draw ${e.frame + 1}`) }))));
      }
    }));
  }, "Drawing");
}

// Panel 2: two pictures

class Slot {
  constructor(box, name, scene) {
    this.name = name;
    this.canvas = el("canvas", { width: 128, height: 128, tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    const options = (label, list, value) => {
      const s = el("select", { ariaLabel: `${label} for picture ${name}` }, ...list.map(v => el("option", { textContent: v, value: v })));
      s.value = value;
      return s;
    };
    this.color = options("colour", Object.keys(COLORS), "red");
    this.shape = options("shape", SHAPES, "star");
    this.scale = options("size", ["small", "large"], "large");
    this.back = options("background", Object.keys(BACKGROUNDS), scene.background);
    this.said = el("p", { className: "said" });
    this.said.setAttribute("aria-live", "polite");
    const file = el("input", { type: "file", accept: "image/*", ariaLabel: `open a file as picture ${name}` });
    file.onchange = () => { if (file.files[0]) this.open(file.files[0]); file.value = ""; };
    const tools = el("div", { className: "tools" }, this.size_row(), el("button", { type: "button", textContent: "Place shape", onclick: () => this.place(0.5, 0.5) }),
      el("button", { type: "button", textContent: "Clear", onclick: () => this.compose({ background: this.back.value, objects: [] }) }),
      el("label", { className: "file" }, "Open …", file), el("button", { type: "button", textContent: "Invert", id: `invert-${name}-go`, disabled: true, onclick: () => work(() => this.check(), `Inverting ${name}`) }));
    box.append(this.canvas, el("div", {}, el("h3", { textContent: `Picture ${name}` }), tools, this.said));
    this.canvas.onclick = e => { const r = this.canvas.getBoundingClientRect(); this.place((e.clientX - r.x) / r.width, (e.clientY - r.y) / r.height); };
    this.canvas.onkeydown = e => { if (e.key === "Enter") this.place(0.5, 0.5); };
    this.back.onchange = () => this.compose({ ...(this.scene ?? { objects: [] }), background: this.back.value });
    box.ondragover = e => { e.preventDefault(); box.classList.add("over"); };
    box.ondragleave = () => box.classList.remove("over");
    box.ondrop = e => { e.preventDefault(); box.classList.remove("over"); if (e.dataTransfer.files[0]) this.open(e.dataTransfer.files[0]); };
    this.compose(scene);
  }
  size_row() { return el("span", { className: "tools" }, this.scale, this.color, this.shape, this.back); }

  /** Draw with shapes: tap the picture to place one; at most three. */
  place(x, y) {
    const kept = (this.scene?.objects ?? []).slice(-1);
    this.compose({ background: this.back.value, objects: [...kept, { shape: this.shape.value, color: this.color.value, size: this.scale.value, x, y }] });
  }
  compose(scene) {
    this.canvas.width = this.canvas.height = 128;
    this.canvas.classList.remove("coarse");
    draw_scene(this.canvas, scene);
    this.ready(`${scene.objects.length ? scene.objects.map(o => `${o.color} ${o.shape}`).join(", ") : "nothing"} on ${scene.background}. Tap the picture to place a shape.`);
    this.scene = scene;
    remember();
  }
  set(canvas, name) {
    this.canvas.width = this.canvas.height = canvas.width;
    this.canvas.getContext("2d").drawImage(canvas, 0, 0);
    this.ready(`${name}.`);
  }
  async open(file) {
    if (file.size > 5e7) return this.refuse(`“${file.name}” has ${(file.size / 1e6).toFixed(0)} MB: give a picture of at most 50 MB.`);
    let bitmap;
    try { bitmap = await createImageBitmap(file); }
    catch { return this.refuse(`“${file.name}” cannot be read as a picture: give a PNG, JPEG or WebP file.`); }
    const s = Math.min(bitmap.width, bitmap.height), c = this.canvas.getContext("2d");
    this.canvas.width = this.canvas.height = 256;
    c.fillStyle = "white";
    c.fillRect(0, 0, 256, 256);
    c.imageSmoothingQuality = "high";
    c.drawImage(bitmap, (bitmap.width - s) / 2, (bitmap.height - s) / 2, s, s, 0, 0, 256, 256);
    this.ready(`${file.name}. The system knows flat shapes on plain ground: other pictures come back as such.`);
  }
  ready(text) {
    this.scene = null;
    this.latent = null;
    this.said.classList.remove("bad");
    this.said.textContent = text;
    this.canvas.setAttribute("aria-label", `picture ${this.name}: ${text}`);
  }
  refuse(text) { this.said.textContent = text; complain(text); }

  /** The latent (z_i, x_T), found once for each picture. */
  async invert() {
    if (!this.latent) {
      const see = e => { if (e.event === "step") say(`Inverting picture ${this.name}: step ${e.done} of ${e.of}`, e.done / e.of); };
      this.latent = await call("invert", { image: take(this.canvas, this.canvas.width, this.canvas.height), steps: 50 }, see);
    }
    return this.latent;
  }
  /** Invert, decode again and show the result beside the noise. */
  async check() {
    const latent = await this.invert();
    const [again, noise] = figures($("swap-out"), [`${this.name} decoded again`, `x_T of ${this.name}`]);
    show(noise, latent.x_T.map(v => v / 3), facts.side);
    await call("variations", { latent, etas: [0], seed: 0 }, into([again], `Decoding ${this.name}`));
  }
}
let slots = [];

async function swap() {
  const latents = [await slots[0].invert(), await slots[1].invert()];
  await call("swap", { latents, seed: 0 }, into(figures($("swap-out"), ["z_i of A, x_T of B", "z_i of B, x_T of A"]), "Swapping"));
}

// The strips with a slider

/** A strip whose slider chooses the frame shown large. */
function chooser(name, labels, told) {
  const slider = $(`${name}-at`), view = $(`${name}-view`), box = $(`${name}-out`);
  slider.max = labels.length - 1;
  const choose = () => {
    const i = +slider.value, canvases = box.querySelectorAll("canvas");
    slider.parentNode.querySelector("output").textContent = labels[i];
    slider.setAttribute("aria-valuetext", labels[i]);
    canvases.forEach((c, k) => c.parentNode.classList.toggle("now", k === i));
    if (!canvases[i]) return;
    view.width = view.height = canvases[i].width;
    view.classList.toggle("coarse", view.width <= 32);
    view.getContext("2d").drawImage(canvases[i], 0, 0);
    view.setAttribute("aria-label", `${told}, ${labels[i]}`);
  };
  slider.addEventListener("input", choose);
  choose();
  return async (method, args) => {
    const canvases = figures(box, labels);
    canvases.forEach((c, i) => { c.onclick = () => { slider.value = i; slider.dispatchEvent(new Event("input", { bubbles: true })); }; });
    await call(method, args, into(canvases, told, e => { if (e.frame === +slider.value) choose(); }));
    choose();
  };
}

function priors_map(list) {
  const low = Math.min(...list.map(f => f.agreement)) - 0.05, x = v => 14 + 292 * (v - low) / (1 - low);
  const rows = { "z_t itself": 20, "diffusion prior": 42, "AR prior": 64 }, paint = { "z_t itself": "var(--ink)", "diffusion prior": "var(--mark)", "AR prior": "#4a7fd4" };
  $("prior-map").innerHTML = Object.entries(rows).map(([k, y]) => `<line x1="14" x2="306" y1="${y}" y2="${y}"/><text x="14" y="${y - 6}">${k}</text>`).join("")
    + list.map(f => `<circle cx="${x(f.agreement)}" cy="${rows[f.name]}" r="4" fill="${paint[f.name]}"/>`).join("")
    + `<text x="14" y="84">cosine to z_t: ${low.toFixed(2)}</text><text x="306" y="84" text-anchor="end">1</text>`;
}
async function explore() {
  const caption = $("caption").value.trim(), n = 3, seed = Math.floor(Number($("seed").value)) || 0;
  if (!caption) throw new Error("The caption is empty: say what to draw, for example “a red star”.");
  let canvases = [], list = [], scores = [];
  const caption_of = i => `${list[i].name}` + (list[i].name === "z_t itself" ? "" : ` · ${list[i].agreement.toFixed(2)}`) + (scores[i] ? ` · CLIP of its picture ${scores[i][$("which-clip").value].toFixed(2)}` : "");
  const label = () => canvases.forEach((c, i) => { c.nextSibling.textContent = caption_of(i); });
  $("which-clip").onchange = label;
  await call("explore", { caption, n, seed }, e => {
    if (e.event === "embeddings") { list = e.list; priors_map(list); canvases = figures($("prior-out"), list.map(f => f.name)); }
    if (e.event === "frame") scores[e.frame] = e.scores;
    into(canvases, "Exploring")(e);
    label();
  });
}

// Links keep the state

const value_of = e => (e.type === "checkbox" ? String(+e.checked) : e.value);
let defaults = {};
function remember() {
  if (!slots.length) return;
  const state = new URLSearchParams();
  for (const [key, id] of Object.entries(STATE)) if (value_of($(id)) !== defaults[key]) state.set(key, value_of($(id)));
  if (!state.has("caption")) state.set("caption", $("caption").value);
  slots.forEach((s, i) => { if (s.scene) state.set("ab"[i], write_scene(s.scene)); });
  history.replaceState(null, "", `#${state}`);
}
function recall() {
  const hash = location.hash.slice(1);
  if (!hash.includes("=")) return;
  const state = new URLSearchParams(hash);
  for (const [key, id] of Object.entries(STATE)) if (state.has(key)) {
    const e = $(id), old = e.value;
    if (e.type === "checkbox") e.checked = state.get(key) === "1";
    else e.value = state.get(key);
    if (e.tagName === "SELECT" && e.selectedIndex < 0) e.value = old;
    e.dispatchEvent(new Event("input"));
  }
  slots.forEach((s, i) => { const scene = read_scene(state.get("ab"[i])); if (scene) { s.back.value = scene.background; s.compose(scene); } });
}

// Start

/** Does this browser have WebAssembly with SIMD? The eight-word module holds one SIMD instruction. */
function has_simd() {
  try { return WebAssembly.validate(new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11])); } catch { return false; }
}

function wire() {
  for (const [key, id] of Object.entries(STATE)) defaults[key] = value_of($(id));
  for (const a of document.querySelectorAll("[data-nb]")) a.href = `../${a.dataset.nb}.html`;
  for (const id of ["guidance", "prior-guidance", "steps"]) {
    const out = () => { $(id).parentNode.querySelector("output").textContent = $(id).value; };
    $(id).addEventListener("input", out);
    out();
  }
  const eta = () => { $("eta").parentNode.querySelector("output").textContent = `up to ${ETAS[$("eta").value]}`; };
  $("eta").addEventListener("input", eta);
  eta();
  const start = [{ background: "black", objects: [{ shape: "star", color: "red", size: "large", x: 0.34, y: 0.4 }] },
                 { background: "navy", objects: [{ shape: "ring", color: "yellow", size: "large", x: 0.6, y: 0.56 }] }];
  slots = [...document.querySelectorAll(".slot")].map((box, i) => new Slot(box, "AB"[i], start[i]));
  $("diff-to").oninput = $("diff-from").oninput = remember;
  document.addEventListener("input", remember);
  document.addEventListener("change", remember);
  document.querySelector(".tries").append(...TRIES.map(t => el("button", { type: "button", textContent: t, onclick: () => { $("caption").value = t; draw(); } })));
  $("draw-form").onsubmit = e => { e.preventDefault(); draw(); };
  $("cancel").onclick = () => worker.postMessage({ method: "cancel", args: { id: current } });
  $("swap-go").onclick = () => work(swap, "Swapping");
  $("vary-go").onclick = () => work(async () => {
    const etas = ETAS.slice(0, +$("eta").value + 1);
    await call("variations", { latent: await slots[0].invert(), etas, seed: 0 }, into(figures($("vary-out"), etas.map(e => `η = ${e}`)), "Varying"));
  }, "Varying");
  const blend = chooser("blend", Array.from({ length: 9 }, (_, i) => (i / 8).toFixed(2)), "Blending");
  const diff = chooser("diff", THETAS.map(String), "Editing");
  $("blend-go").onclick = () => work(async () => blend("interpolate", { latents: [await slots[0].invert(), await slots[1].invert()], n: 9, noise: $("blend-noise").value, seed: 0 }), "Blending");
  $("diff-go").onclick = () => work(async () => {
    if (!$("diff-to").value.trim()) throw new Error("The new caption is empty: say what the picture should become.");
    await diff("text_diff", { latent: await slots[0].invert(), base: $("diff-from").value, next: $("diff-to").value, thetas: THETAS, seed: 0 });
  }, "Editing");
  $("prior-go").onclick = () => work(explore, "Exploring");
  $("share").onclick = async () => {
    remember();
    try { await navigator.clipboard.writeText(location.href); say("The link is in the clipboard."); } catch { say("Copy the address of this page: it holds the state."); }
  };
  window.addEventListener("hashchange", () => { if (location.hash.includes("=")) { recall(); draw(); } });
  figures($("draw-out"), [1, 2, 3, 4].map(i => `draw ${i}`));
}

async function main() {
  wire();
  const linked = location.hash.includes("=");
  recall();
  if (typeof WebAssembly === "undefined" || !has_simd()) return complain("This browser lacks WebAssembly with SIMD, which the networks need: use Firefox 89, Chrome 91, Safari 16.4 or newer.");
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onmessage = hear;
  worker.onerror = () => complain("The part of the page that computes did not start: reload the page, or build it again with “make play”.");
  const backend = new URLSearchParams(location.search).get("backend") ?? "auto";
  try { facts = await call("load", { backend }, e => { if (e.event === "progress") say(`Loading the networks: ${e.text}`, e.share); }); }
  catch (e) { return complain(e?.message ?? "Loading was cancelled: reload the page."); }
  const ks = [...KS.filter(k => k < facts.dim), facts.dim];
  const parts = chooser("parts", ks.map(String), "Drawing from components");
  $("parts-go").onclick = () => work(async () => parts("pca", { latent: await slots[0].invert(), ks, seed: 0 }), "Drawing from components");
  $("clip-toggle").hidden = !facts.second;
  for (const o of $("prior-kind").options) o.disabled = !facts.priors[o.value];
  say(`Ready: ${facts.used}${facts.threads > 1 ? `, ${facts.threads} threads` : ""}.`);
  document.body.dataset.ready = facts.used;
  buttons();
  if (linked) draw();
}
main();

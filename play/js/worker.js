// The networks live here, so that the page never freezes. A call is {id, method, args}; answers are {id, event, ...}.
import { Cancelled, slerp, text_direction, truncate, normalize } from "./samplers.js";
import { Told, UnCLIP, fetch_file, unpack } from "./unclip.js";

const here = new URL("..", self.location.href).href;
const stopped = new Set();
let model = null, busy = Promise.resolve();

/** Let messages (such as Cancel) in. */
const breathe = () => new Promise(done => { const c = new MessageChannel(); c.port1.onmessage = () => done(); c.port2.postMessage(0); });

async function load({ backend }, tell) {
  const file = async name => {
    const a = await fetch(here + name).catch(() => null);
    if (!a) throw new Told(`The file ${name} did not arrive: check the connection and reload the page.`);
    if (!a.ok) throw new Told(`The file ${name} is missing on this server (${a.status}): build the page again with “make play”.`);
    return a.json();
  };
  const build = await file("build.json"), facts = await file("files/unclip.json");
  if (facts.format !== 1) throw new Told(`These weights have format ${facts.format}, and the page reads format 1: build the page again with “make play”.`);
  const gpu = backend !== "wasm" && build.webgpu && self.navigator.gpu ? await self.navigator.gpu.requestAdapter().catch(() => null) : null;
  const runtime = gpu ? build.webgpu : build.wasm;
  const sizes = Object.entries(facts.graphs).map(([k, g]) => [k, g.bytes]);
  const total = runtime.bytes + sizes.reduce((s, [, b]) => s + b, 0);
  let got = 0;
  const seen = n => { got += n; tell({ event: "progress", share: Math.min(1, got / total), text: `${(got / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB` }); };
  const ort = await import(here + runtime.module).catch(() => { throw new Told("The file that runs the networks (onnxruntime-web) is missing: build the page again with “make play”."); });
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, self.navigator.hardwareConcurrency || 1) : 1;
  ort.env.wasm.wasmPaths = here + "ort/";
  ort.env.wasm.wasmBinary = await unpack(await fetch_file(here + runtime.wasm, runtime.bytes, seen));
  const raw = await fetch_file(here + "files/tables.bin", 0, () => {});
  const tables = Object.fromEntries(Object.entries(facts.tables).map(([k, t]) =>
    [k, new Float32Array(raw.buffer, 4 * t.offset, t.shape.reduce((a, b) => a * b, 1))]));
  const sessions = {};
  const open = async providers => {
    for (const [name, bytes] of sizes) {
      const data = await fetch_file(`${here}files/${name}.onnx`, bytes, seen);
      sessions[name] = await ort.InferenceSession.create(data, { executionProviders: providers, graphOptimizationLevel: "all" });
    }
    return new UnCLIP(ort, facts, tables, sessions);
  };
  /** Does this machine say what PyTorch said? */
  const agrees = async m => { const { zt } = await m.encode_text(facts.check.caption); return zt.every((v, i) => Math.abs(v - facts.check.zt[i]) < 1e-2); };
  let used = gpu ? "WebGPU" : "WebAssembly";
  try {
    model = await open(gpu ? ["webgpu", "wasm"] : ["wasm"]);
    if (!await agrees(model)) throw new Error("other numbers than PyTorch's");
  } catch (e) {
    if (!gpu || e instanceof Told) throw e;
    used = "WebAssembly";
    got = 0;
    model = await open(["wasm"]);
    if (!await agrees(model)) throw new Told("The networks answer with other numbers than PyTorch here: try another browser.");
  }
  return { used, threads: ort.env.wasm.numThreads, side: model.side, size: model.size, priors: { diffusion: !!sessions.prior_step, ar: !!sessions.ar_step },
           second: !!facts.second, dim: model.dim, clip: model.config.clip.image_size };
}

const split = (x, n) => { const one = x.length / n; return Array.from({ length: n }, (_, i) => x.slice(i * one, (i + 1) * one)); };

/** Draw frames one by one: {zi, x_T} each; every finished one is told at once. */
async function frames(list, how, step, tell) {
  const out = [];
  for (let i = 0; i < list.length; i++) {
    const { zi, x_T, row = 0 } = list[i];
    const watch = async s => { await step(); if (s.step % 5 === 0) tell({ event: "forming", frame: i, image: s.x0, side: model.side }); tell({ event: "step", done: i + s.step / s.of, of: list.length }); };
    const small = await model.decode([zi], { ...how, x_T, rows: [row], watch });
    const big = await model.upsample(small, { watch: step, seed: how.seed });
    tell({ event: "frame", frame: i, image: big, side: model.size });
    out.push(big);
  }
  return { frames: out.length };
}

const methods = {
  load,
  async generate({ caption, prior, n, guidance, prior_guidance, steps, seed, trace }, tell, step) {
    const { zt, draws } = await model.sample_zi(caption, { prior, n, guidance: prior_guidance, seed, watch: async s => { await step(); tell({ event: "step", done: 0.15 * s.step / s.of, of: 1, text: "the prior draws z_i" }); } });
    const agreement = draws.map(d => d.agreement);
    for (let i = 0; i < n; i++) {
      const watch = async s => {
        await step();
        tell({ event: "forming", frame: i, image: s.x0, x_t: trace ? s.x_t : null, side: model.side, step: s.step, of: s.of });
        tell({ event: "step", done: 0.15 + 0.85 * (i + 0.9 * s.step / s.of) / n, of: 1, text: `picture ${i + 1}: step ${s.step} of ${s.of}` });
      };
      const small = await model.decode([draws[i].zi], { caption, guidance, steps, sampler: "dpm", seed, rows: [i], watch });
      const big = await model.upsample(small, { seed: `${seed}/${i}`, watch: step });
      tell({ event: "frame", frame: i, image: big, side: model.size, agreement: agreement[i] });
    }
    return { agreement, zt };
  },
  async invert({ image, steps }, tell, step) {
    return model.invert(image, { steps, watch: async s => { await step(); tell({ event: "step", done: s.step, of: s.of, text: "inverting" }); } });
  },
  async variations({ latent, etas, seed }, tell, step) {
    const how = { steps: latent.steps, seed };
    const out = [];
    for (let i = 0; i < etas.length; i++) out.push(...(await frames_one(latent, { ...how, eta: etas[i] }, i, etas.length, step, tell)));
    return { frames: out.length };
  },
  swap({ latents, seed }, tell, step) {
    const [a, b] = latents;
    return frames([{ zi: a.zi, x_T: b.x_T }, { zi: b.zi, x_T: a.x_T }], { steps: a.steps, seed }, step, tell);
  },
  interpolate({ latents, n, noise, seed }, tell, step) {
    const [a, b] = latents, fixed = model.noise(seed, [0]);
    const path = Array.from({ length: n }, (_, i) => i / (n - 1)).map(theta =>
      ({ zi: slerp(a.zi, b.zi, theta), x_T: noise === "fixed" ? fixed : slerp(a.x_T, b.x_T, theta) }));
    return frames(path, { steps: a.steps, seed }, step, tell);
  },
  async text_diff({ latent, base, next, thetas, seed }, tell, step) {
    const zero = base.trim() ? base : "", [t0, t1] = [await model.encode_text(zero), await model.encode_text(next)];
    let direction;
    try { direction = text_direction(t0.zt, t1.zt); } catch (e) { throw new Told(`“${base}” and “${next}” are the same to CLIP: say something else in the new caption.`); }
    return frames(thetas.map(theta => ({ zi: slerp(latent.zi, direction, theta), x_T: latent.x_T })), { steps: latent.steps, seed }, step, tell);
  },
  pca({ latent, ks, seed }, tell, step) {
    const { pca_mean: mean, pca_components: components } = model.tables;
    if (!mean) throw new Told("These weights have no AR prior, whose principal components this panel needs.");
    const fixed = model.noise(seed, [0]);
    return frames(ks.map(k => ({ zi: normalize(truncate(latent.zi, k, mean, components)), x_T: fixed })), { steps: 25, seed }, step, tell);
  },
  async explore({ caption, n, seed }, tell, step) {
    const found = [], watch = async s => { await step(); tell({ event: "step", done: 0.3 * s.step / s.of, of: 1, text: "drawing embeddings" }); };
    const { zt } = await model.encode_text(caption);
    for (const prior of ["diffusion", "ar"]) {
      if (!model.sessions[prior === "ar" ? "ar_step" : "prior_step"]) continue;
      const { draws } = await model.sample_zi(caption, { prior, n, seed, watch });
      found.push(...draws.map((d, row) => ({ ...d, row, name: prior === "ar" ? "AR prior" : "diffusion prior" })));
    }
    found.unshift({ zi: zt, agreement: 1, row: 0, name: "z_t itself" });
    tell({ event: "embeddings", list: found.map(f => ({ name: f.name, agreement: f.agreement, zi: f.zi })) });
    for (let i = 0; i < found.length; i++) {
      const small = await model.decode([found[i].zi], { caption, guidance: 2, steps: 15, sampler: "dpm", seed, rows: [found[i].row], watch: async s => { await step(); tell({ event: "step", done: 0.3 + 0.7 * (i + s.step / s.of) / found.length, of: 1, text: `${found[i].name}` }); } });
      const clips = model.facts.second ? ["clip", "second"] : ["clip"], scores = {};
      for (const c of clips) {
        const z = await model.encode_image(small, c), { zt: own } = await model.encode_text(caption, c);
        scores[c] = z.reduce((s, v, k) => s + v * own[k], 0);
      }
      tell({ event: "frame", frame: i, image: await model.upsample(small, { seed }), side: model.size, scores });
    }
    return { n: found.length };
  },
};

/** One frame of a strip at place i of n. */
async function frames_one(latent, how, i, n, step, tell) {
  await frames([{ zi: latent.zi, x_T: latent.x_T, row: i }], how, step, e => {
    if (e.event === "step") tell({ ...e, done: i + e.done, of: n });
    else tell({ ...e, frame: i });
  });
  return [i];
}

self.onmessage = ({ data: { id, method, args } }) => {
  if (method === "cancel") { stopped.add(args.id); return; }
  const tell = e => self.postMessage({ id, ...e });
  const step = async () => { await breathe(); if (stopped.has(id)) throw new Cancelled(); };
  busy = busy.then(async () => {
    try {
      if (stopped.has(id)) throw new Cancelled();
      tell({ event: "done", value: await methods[method](args, tell, step) });
    } catch (e) {
      const text = e instanceof Told || e instanceof RangeError ? e.message : `Something failed here (${e.message ?? e}): reload the page, or try another browser.`;
      tell({ event: e instanceof Cancelled ? "cancelled" : "error", text });
    }
  });
};

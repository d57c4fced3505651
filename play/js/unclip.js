// 15_pipeline in the browser: a caption in, a picture out. Every network is an ONNX file that `unclip export` wrote.
import { ddim_invert, ddim_sample, dpm_sample, from_components, generator, guided, narrow, normalize, pick, predict, randn, spaced, spaced_snr } from "./samplers.js";
import { Tokenizer } from "./tokenizer.js";

const CACHE = "unclip-play-1";

/** A mistake that the visitor can mend, in one sentence. */
export class Told extends Error {}

/** Fetch a file and report its bytes as they come; kept in the browser's cache under its length. */
export async function fetch_file(url, bytes, seen) {
  const store = "caches" in self ? await caches.open(CACHE).catch(() => null) : null;
  const key = `${url}?bytes=${bytes}`, kept = store && await store.match(key);
  if (kept) { const data = new Uint8Array(await kept.arrayBuffer()); seen(data.length); return data; }
  let answer;
  try { answer = await fetch(url); } catch { throw new Told(`The file ${url.split("/").pop()} did not arrive: check the connection and reload the page.`); }
  if (!answer.ok) throw new Told(`The file ${url.split("/").pop()} is missing on this server (${answer.status}): build the page again with “make play”.`);
  const reader = answer.body.getReader(), parts = [];
  let n = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value); n += value.length; seen(value.length);
  }
  if (bytes && n !== bytes) throw new Told(`The file ${url.split("/").pop()} is not complete (${n} of ${bytes} bytes): reload the page.`);
  const data = new Uint8Array(await new Blob(parts).arrayBuffer());
  if (store) await store.put(key, new Response(data)).catch(() => {});
  return data;
}

/** The bytes of a file that was packed with gzip. */
export async function unpack(data) {
  return new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

const floats = x => x.data;
/** Rows `index` of a tensor whose first dimension is rows. */
function rows_of(ort, x, index) {
  const n = x.data.length / x.dims[0], data = new x.data.constructor(n * index.length);
  index.forEach((r, i) => data.set(x.data.subarray(r * n, (r + 1) * n), i * n));
  return new ort.Tensor(x.type, data, [index.length, ...x.dims.slice(1)]);
}
const range = n => Array.from({ length: n }, (_, i) => i);
const join = list => { const out = new Float32Array(list.reduce((s, x) => s + x.length, 0)); let at = 0; for (const x of list) { out.set(x, at); at += x.length; } return out; };
const clamp = x => x.map(v => Math.min(1, Math.max(-1, v)));

export class UnCLIP {
  constructor(ort, facts, tables, sessions) {
    Object.assign(this, { ort, facts, tables, sessions });
    this.tokenizer = new Tokenizer(facts.tokenizer);
    this.config = facts.config;
    this.abar = facts.abar;
    this.dim = facts.config.clip.embed_dim;
    this.side = facts.config.decoder.image_size;
    this.size = this.side * (facts.config.upsampler1?.factor ?? 1);
  }

  async run(name, feeds) { return this.sessions[name].run(feeds); }
  f32(data, ...dims) { return new this.ort.Tensor("float32", data, dims); }
  i64(list, ...dims) { return new this.ort.Tensor("int64", BigInt64Array.from(list, BigInt), dims.length ? dims : [list.length]); }

  // 05_clip

  /** z_t (d) and the text tower's outputs for one caption. */
  async encode_text(caption, clip = "clip") {
    const tokenizer = clip === "clip" ? this.tokenizer : new Tokenizer(this.facts.second.tokenizer);
    const ids = tokenizer.encode(caption);
    const { zt, text } = await this.run(`${clip}_text`, { tokens: this.i64(ids, 1, ids.length) });
    return { zt: floats(zt), text: floats(text) };
  }
  /** z_i (d) of one picture at CLIP's side. */
  async encode_image(image, clip = "clip") {
    const s = this.config.clip.image_size;
    const { zi } = await this.run(`${clip}_image`, { images: this.f32(image, 1, 3, s, s) });
    return floats(zi);
  }

  // 09_diffusion_prior and 07_ar_prior

  /** n draws of z_i for a caption: {zi, agreement}. `watch` sees every step. */
  async sample_zi(caption, { prior = "diffusion", n = 1, guidance = 1, seed = 0, watch } = {}) {
    const known = await this.encode_text(caption);
    const draws = prior === "ar" ? await this.sample_ar(known, n, guidance, seed, watch) : await this.sample_diffusion(known, n, guidance, seed, watch);
    return { zt: known.zt, draws: draws.map(zi => ({ zi, agreement: zi.reduce((s, v, i) => s + v * known.zt[i], 0) })) };
  }

  async sample_diffusion({ zt, text }, n, guidance, seed, watch, steps = 64, candidates = 2) {
    const d = this.dim, c = this.config.prior, rows = n * candidates, both = guidance !== 1;
    const captions = both ? 2 : 1;                                       // row 1, of zeros, is the empty caption
    const feeds = { text: this.f32(join([text, new Float32Array((captions - 1) * text.length)]), captions, c.context_length, c.text_width),
                    zt: this.f32(join([zt, new Float32Array((captions - 1) * d)]), captions, d) };
    const { cache } = await this.run("prior_prefix", feeds);
    const index = [...new Array(rows).fill(0), ...(both ? new Array(rows).fill(1) : [])];
    const held = rows_of(this.ort, cache, index);
    const abar = this.abar.prior;
    const denoise = async (x, t) => {
      const zi_t = this.f32(both ? join([x, x]) : x, index.length, d);
      const { x0 } = await this.run("prior_step", { cache: held, zi_t, t: this.i64(new Array(index.length).fill(t)) });
      const out = floats(x0), p = predict("x0", out.subarray(0, x.length), x, abar[t]);
      return both ? guided(p, predict("x0", out.subarray(x.length), x, abar[t]), guidance) : p;
    };
    const x_T = join(range(rows).map(r => randn(d, generator(seed, "prior", r))));
    const x = await ddim_sample(denoise, x_T, abar, spaced(steps, abar.length), { clip: false, watch });
    const { prior_mean: mean, prior_back: back } = this.tables;
    const draws = range(rows).map(r => {
      const z = Float32Array.from(mean);
      for (let i = 0; i < d; i++) for (let j = 0; j < d; j++) z[j] += x[r * d + i] * back[i * d + j];
      return normalize(z);
    });
    const score = z => z.reduce((s, v, i) => s + v * zt[i], 0);
    return range(n).map(i => draws.slice(i * candidates, (i + 1) * candidates).sort((a, b) => score(b) - score(a))[0]);
  }

  async sample_ar({ zt, text }, n, guidance, seed, watch) {
    const c = this.config.ar_prior, d = this.dim, both = guidance !== 1, rows = both ? 2 * n : n;
    const gens = range(n).map(r => generator(seed, "prior", r));
    const first = gens.map(g => Math.min(c.dot_buckets - 1, Math.floor((0.5 + 0.5 * g()) * c.dot_buckets)));
    const texts = range(rows).map(r => r < n ? text : new Float32Array(text.length));
    const zts = range(rows).map(r => r < n ? zt : new Float32Array(d));
    const dots = range(rows).map(r => r < n ? first[r] : c.dot_buckets);
    let { cache, logits } = await this.run("ar_prefix", { text: this.f32(join(texts), rows, c.context_length, c.text_width), zt: this.f32(join(zts), rows, d), dot: this.i64(dots) });
    const codes = range(n).map(() => []);
    for (let p = 0; p < c.k; p++) {
      const b = c.buckets, out = floats(logits);
      range(n).forEach(r => {
        let own = out.subarray(r * b, (r + 1) * b);
        if (both) { const none = out.subarray((n + r) * b, (n + r + 1) * b); own = own.map((v, i) => none[i] + guidance * (v - none[i])); }
        codes[r].push(pick(narrow(own), gens[r]()));
      });
      if (watch) await watch({ step: p + 1, of: c.k });
      if (p + 1 === c.k) break;
      const last = range(rows).map(r => codes[r % n][p]);
      const next = await this.run("ar_step", { cache, code: this.i64(last), place: this.i64([p + 1]) });
      cache = next.longer; logits = next.logits;
    }
    const { pca_mean: mean, pca_components: components, centres } = this.tables;
    return codes.map(row => normalize(from_components(row.map((v, p) => centres[p * c.buckets + v]), mean, components)));
  }

  // 11_decoder

  /** A denoiser for rows of z_i under one caption ("" for none), with guidance inside; conditions are encoded once. */
  async decoder_denoiser(zis, caption = "", guidance = 1) {
    const n = zis.length, both = guidance !== 1, c = this.config.decoder, rows = both ? 2 * n : n;
    const ids = caption ? this.tokenizer.encode(caption) : new Array(c.context_length).fill(0);
    const tokens = range(rows).flatMap(r => r < n ? ids : new Array(ids.length).fill(0));
    const heard = await this.run("decoder_condition", {
      zi: this.f32(join(range(rows).map(r => zis[r % n])), rows, this.dim),
      keep: new this.ort.Tensor("bool", Uint8Array.from(range(rows), r => r < n), [rows]), tokens: this.i64(tokens, rows, ids.length) });
    return async (x, t) => {
      const x_t = this.f32(both ? join([x, x]) : x, rows, 3, this.side, this.side);
      const { answer } = await this.run("decoder_step", { x_t, t: this.i64(new Array(rows).fill(t)), ...heard });
      const out = floats(answer), p = predict(c.target, out.subarray(0, x.length), x, this.abar.decoder[t]);
      return both ? guided(p, predict(c.target, out.subarray(x.length), x, this.abar.decoder[t]), guidance) : p;
    };
  }

  noise(seed, rows) { return join(rows.map(r => randn(3 * this.side * this.side, generator(seed, "decoder", r)))); }

  /** Small pictures in [-1, 1] for rows of z_i. Without x_T the noise of row r depends on (seed, r) only. */
  async decode(zis, { caption = "", guidance = 1, steps = 50, sampler = "ddim", eta = 0, x_T, seed = 0, rows = range(zis.length), watch } = {}) {
    const denoise = await this.decoder_denoiser(zis, caption, guidance);
    const start = x_T ?? this.noise(seed, rows), fresh = rows.map(r => generator(seed, "fresh", r)), one = 3 * this.side ** 2;
    const noise = () => join(fresh.map(g => randn(one, g)));
    const abar = this.abar.decoder, dpm = sampler === "dpm", draw = dpm ? dpm_sample : ddim_sample;
    const timesteps = dpm ? spaced_snr(steps, abar) : spaced(steps, abar.length);
    return clamp(await draw(denoise, start, abar, timesteps, { eta, noise, watch }));
  }

  // 13_upsampler

  /** Large pictures for small ones; the noise is the same for every row, so that neighbouring frames do not flicker. */
  async upsample(small, { steps = 4, seed = 0, watch } = {}) {
    if (!this.sessions.upsampler1_step) return small;
    const one = 3 * this.side ** 2, n = small.length / one, big = 3 * this.size ** 2, c = this.config.upsampler1;
    const low_res = this.f32(small, n, 3, this.side, this.side), abar = this.abar.upsampler1, z = randn(big, generator(seed, "upsampler1"));
    const denoise = async (x, t) => {
      const { answer } = await this.run("upsampler1_step", { x_t: this.f32(x, n, 3, this.size, this.size), t: this.i64(new Array(n).fill(t)), low_res });
      return predict(c.target, floats(answer), x, abar[t]);
    };
    return clamp(await ddim_sample(denoise, join(range(n).map(() => z)), abar, spaced(steps, abar.length), { watch }));
  }

  // 14_inversion

  /** The bipartite latent (z_i, x_T) of one small picture. */
  async invert(image, { steps = 50, watch } = {}) {
    const zi = await this.encode_image(image);
    const denoise = await this.decoder_denoiser([zi]);
    const abar = this.abar.decoder, timesteps = spaced(steps, abar.length);
    return { zi, x_T: await ddim_invert(denoise, image, abar, timesteps, { watch }), steps };
  }
}

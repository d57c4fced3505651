// Noise schedules, samplers, inversion and slerp: 08_diffusion, 08b_solvers, 14_inversion and 16_edits in JavaScript, with their names and equation numbers.
// A batch is a Float32Array of `rows` rows; a denoiser is an async function (x_t, t) -> {x0, eps}.

/** Thrown in the middle of a sampler when the visitor presses Cancel. */
export class Cancelled extends Error {}

// 08_diffusion, section 9, and 08b_solvers, section 3: lists of timesteps, from large to small

/** To the nearest whole number, halves to the even one, as Python's `round` does. */
const round = v => (v % 1 === 0.5 ? 2 * Math.round(v / 2) : Math.round(v));

/** n timesteps evenly spread over 0 .. T-1, from large to small; both ends included, a single one is T-1. */
export function spaced(n, T) {
  if (!(n >= 1 && n <= T)) throw new RangeError(`cannot take ${n} of ${T} diffusion steps: use a number from 1 to ${T}`);
  if (n === 1) return [T - 1];
  return Array.from({ length: n }, (_, k) => round(k * ((T - 1) / (n - 1)))).reverse();
}

/** Timesteps spread evenly over the logarithm of the SNR, from large to small: T-1, then from `start` to t = 0. */
export function spaced_snr(n, abar, start = -3.5) {
  const T = abar.length;
  if (!(n >= 1 && n <= T)) throw new RangeError(`cannot take ${n} of ${T} diffusion steps: use a number from 1 to ${T}`);
  const clock = Array.from(abar, a => Math.log(a / (1 - a)) / 2);
  const end = Math.max(clock[T - 1], start);
  const kept = [];
  for (let k = 0; k < n - 1; k++) {
    const goal = n === 2 ? clock[0] : clock[0] + (end - clock[0]) * k / (n - 2);
    let near = 0;
    for (let t = 1; t < T; t++) if (Math.abs(clock[t] - goal) < Math.abs(clock[near] - goal)) near = t;
    const least = kept.length ? kept[kept.length - 1] + 1 : 0;
    kept.push(Math.min(Math.max(near, least), T - n + k));
  }
  return [T - 1, ...kept.reverse()];
}

/** Each timestep with abar there and at the next one down (1 after the last). */
function pairs(abar, ts) {
  return ts.map((t, i) => [t, abar[t], i + 1 < ts.length ? abar[ts[i + 1]] : 1]);
}

// 08_diffusion, sections 4 and 11

/** The network's answer as clean data and noise, whichever it was trained to give. */
export function predict(kind, out, x_t, abar) {
  const a = Math.sqrt(abar), s = Math.sqrt(1 - abar), n = x_t.length;
  const x0 = new Float32Array(n), eps = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    if (kind === "eps") { eps[i] = out[i]; x0[i] = (x_t[i] - s * out[i]) / a; }      // eq. 5
    else if (kind === "x0") { x0[i] = out[i]; eps[i] = (x_t[i] - a * out[i]) / s; }
    else { x0[i] = a * x_t[i] - s * out[i]; eps[i] = s * x_t[i] + a * out[i]; }
  }
  return { x0, eps };
}

/** Classifier-free guidance: away from the unconditional answer, through the conditional one. */
export function guided(cond, nothing, scale) {
  const mix = (a, b) => a.map((v, i) => v + scale * (b[i] - v));
  return { x0: mix(nothing.x0, cond.x0), eps: mix(nothing.eps, cond.eps) };          // eq. 14
}

/** The denoiser's answer at `t`; with `clip`, x0 is held in [-1, 1] and eps made to agree with it. */
async function ask(denoise, x_t, t, abar, clip) {
  const p = await denoise(x_t, t);
  if (!clip) return p;
  const x0 = p.x0.map(v => Math.min(1, Math.max(-1, v)));
  const a = Math.sqrt(abar), s = Math.sqrt(1 - abar);
  return { x0, eps: x0.map((v, i) => (x_t[i] - a * v) / s) };
}

/** DDIM sampling: equation 12 of DDIM. `noise()` gives fresh noise for eta > 0; `watch` sees every step. */
export async function ddim_sample(denoise, x_T, abar, timesteps, { eta = 0, noise, clip = true, watch = async () => {} } = {}) {
  let x = x_T, i = 0;
  for (const [t, now, prev] of pairs(abar, timesteps)) {
    const { x0, eps } = await ask(denoise, x, t, now, clip);
    const sigma = eta * Math.sqrt((1 - prev) / (1 - now) * (1 - now / prev));        // eq. 12
    const a = Math.sqrt(prev), b = Math.sqrt(Math.max(1 - prev - sigma * sigma, 0));
    x = x0.map((v, k) => a * v + b * eps[k]);
    if (sigma > 0) { const z = noise(x.length); x = x.map((v, k) => v + sigma * z[k]); }
    await watch({ step: ++i, of: timesteps.length, t, x0, x_t: x });
  }
  return x;
}

/** DPM-Solver++(2M): like DDIM a function of x_T, but right to the second order. */
export async function dpm_sample(denoise, x_T, abar, timesteps, { clip = true, watch = async () => {} } = {}) {
  let x = x_T, last = null, i = 0;
  for (const [t, now, prev] of pairs(abar, timesteps)) {
    const { x0 } = await ask(denoise, x, t, now, clip);
    const here = Math.log(now / (1 - now)) / 2;
    let guess = x0;
    if (last && prev < 1) {
      const [before, was] = last;
      const c = (Math.log(prev / (1 - prev)) / 2 - here) / (2 * (here - before));
      guess = x0.map((v, k) => v + c * (v - was[k]));                                // 08b, eq. 2
    }
    const keep = Math.sqrt((1 - prev) / (1 - now)), more = Math.sqrt(prev) - keep * Math.sqrt(now);
    x = x.map((v, k) => keep * v + more * guess[k]);                                 // 08b, eq. 1
    last = [here, x0];
    await watch({ step: ++i, of: timesteps.length, t, x0, x_t: x });
  }
  return x;
}

// 14_inversion

/** The noise from which DDIM draws x0. The picture is taken for the state at the last kept timestep up to `start`. */
export async function ddim_invert(denoise, x0, abar, timesteps, { start = 50, watch = async () => {} } = {}) {
  const ts = [...timesteps].reverse();
  const below = ts.filter(t => t <= start).length;
  if (below === ts.length) throw new RangeError(`inversion starts at ${start}: take more than ${ts.length} steps`);
  let x = x0, i = 0;
  let prev = below ? abar[ts[below - 1]] : abar[ts[0]];
  const walk = ts.slice(Math.max(below, 1));
  for (const t of walk) {
    const to = abar[t];
    const { eps } = await denoise(x, t);
    const a = Math.sqrt(to / prev), s = Math.sqrt(1 - prev), z = Math.sqrt(1 - to);
    x = x.map((v, k) => a * (v - s * eps[k]) + z * eps[k]);                          // eq. 3
    prev = to;
    await watch({ step: ++i, of: walk.length, t, x_t: x });
  }
  return x;
}

// 16_edits

const dot = (a, b) => a.reduce((s, v, i) => s + v * b[i], 0);
export const norm = a => Math.sqrt(dot(a, a));
export const normalize = a => { const n = norm(a) || 1; return a.map(v => v / n); };

/** The angle between two rows, 0 to pi: exact for nearly parallel ones too (Kahan's formula). */
export function angle(a, b) {
  const p = normalize(Float64Array.from(a)), q = normalize(Float64Array.from(b));
  return 2 * Math.atan2(norm(p.map((v, i) => v - q[i])), norm(p.map((v, i) => v + q[i])));   // eq. 2
}

/** Spherical interpolation: at constant angular speed along the great circle, ends exact. Parallel rows: the straight line. */
export function slerp(a, b, theta) {
  const omega = angle(a, b);
  const part = t => omega < 1e-7 ? t : Math.sin(t * omega) / Math.sin(omega);
  const p = part(1 - theta), q = part(theta);
  if (Math.PI - omega < 1e-3) return aside(a, b, theta);
  return Float32Array.from(a, (v, i) => p * v + q * b[i]);                           // eq. 1
}

/** Opposite rows have no shortest circle: take the one through the axis on which they differ least. */
function aside(a, b, theta) {
  const along = normalize(Float64Array.from(a, (v, i) => v - b[i]));
  let least = 0;
  for (let i = 1; i < along.length; i++) if (Math.abs(along[i]) < Math.abs(along[least])) least = i;
  const side = normalize(along.map((v, i) => (i === least ? 1 : 0) - along[least] * v));
  const long = (1 - theta) * norm(a) + theta * norm(b), turn = Math.PI * Math.min(theta, 1 - theta);
  const end = theta < 0.5 ? a : b;
  return Float32Array.from(end, (v, i) => v * Math.cos(turn) + long * Math.sin(turn) * side[i]);
}

/** z_d = norm(z_t - z_t0): the direction in which a text diff turns z_i. */
export function text_direction(base, next) {
  const step = next.map((v, i) => v - base[i]);
  if (norm(step) < 1e-5) throw new RangeError("these two captions are the same to CLIP: the new caption must say something else");
  return normalize(step);
}

// 06_pca: rows of `components` are directions, the most telling first

/** z with only its first k components. */
export function truncate(z, k, mean, components) {
  const d = mean.length, out = Float32Array.from(mean);
  for (let c = 0; c < k; c++) {
    let y = 0;
    for (let i = 0; i < d; i++) y += (z[i] - mean[i]) * components[c * d + i];
    for (let i = 0; i < d; i++) out[i] += y * components[c * d + i];
  }
  return out;
}

/** The embedding whose first components have the values y. */
export function from_components(y, mean, components) {
  const d = mean.length, out = Float32Array.from(mean);
  y.forEach((v, c) => { for (let i = 0; i < d; i++) out[i] += v * components[c * d + i]; });
  return out;
}

// 07_ar_prior: one code out of its probabilities

/** Probabilities with the unlikely tail cut off: the fewest outcomes that together have at least top_p. */
export function narrow(logits, top_p = 0.9) {
  const top = Math.max(...logits), e = Array.from(logits, v => Math.exp(v - top));
  const sum = e.reduce((a, b) => a + b), probs = e.map(v => v / sum);
  const order = probs.map((_, i) => i).sort((i, j) => probs[j] - probs[i]);
  let before = 0;
  const kept = new Array(probs.length).fill(0);
  for (const i of order) { if (before < top_p) kept[i] = probs[i]; before += probs[i]; }
  const whole = kept.reduce((a, b) => a + b);
  return kept.map(v => v / whole);
}

/** The outcome at which the running sum of probabilities passes u. */
export function pick(probs, u) {
  let sum = 0;
  for (let i = 0; i < probs.length; i++) { sum += probs[i]; if (sum > u) return i; }
  return probs.length - 1;
}

// 00_core: randomness is a function of (seed, stage, row). The numbers are not PyTorch's: the same seed draws another picture here than in Python.

/** A stream of uniform numbers in [0, 1) for a name such as "7/decoder/0" (FNV-1a, then sfc32). */
export function generator(...keys) {
  let h = 2166136261;
  for (const c of keys.join("/")) h = Math.imul(h ^ c.codePointAt(0), 16777619);
  let a = h | 0, b = h ^ 0x9e3779b9, c = Math.imul(h, 0x85ebca6b), d = 1;
  const next = () => {
    const t = (a + b | 0) + d | 0;
    d = d + 1 | 0; a = b ^ b >>> 9; b = c + (c << 3) | 0; c = (c << 21 | c >>> 11) + t | 0;
    return (t >>> 0) / 4294967296;
  };
  for (let i = 0; i < 12; i++) next();
  return next;
}

/** n standard normal numbers (Box and Muller). */
export function randn(n, next) {
  const out = new Float32Array(n);
  for (let i = 0; i < n; i += 2) {
    const r = Math.sqrt(-2 * Math.log(1 - next())), turn = 2 * Math.PI * next();
    out[i] = r * Math.cos(turn);
    if (i + 1 < n) out[i + 1] = r * Math.sin(turn);
  }
  return out;
}

"""What the decoder's two ears are good for, and how many steps it needs. `python benchmarks/decoder_study.py [WEIGHTS] [N] [OUT.json]`

Guidance, the paper's figure 8 and binding: 20 steps of DPM-Solver++, N captions a kind. Steps: every sampler at guidance 2, N / 2 captions of one object.
Every picture is drawn at the decoder's own size and judged by `read_scene`; caption i's noise depends on (seed, i) alone."""
import hashlib, json, sys, time
from pathlib import Path
import torch
from torch import nn
from tqdm import tqdm
from unclip_nb.core import generator
from unclip_nb.evaluation import ATTRIBUTES, exam, judge
from unclip_nb.pipeline import UnCLIP
from unclip_nb.shapes import render
from unclip_nb.solvers import in_sections

SEEDS = 3     # draws of one z_i, for the diversity
COUNTS = {
    "250": 250, "64": 64, "50": 50, "27": 27, "fast27": 27, "20": 20, "15": 15, "10": 10
}
LISTS = {"fast27": in_sections((10, 10, 3, 2, 2))}      # measured with T-1 where the authors' list has T-3
PLAN = {"ddim": COUNTS, "dpm": COUNTS, "ddpm": {n: COUNTS[n] for n in ("250", "27", "15")}}      # sampler: how many steps, by name

def fingerprint(module:nn.Module) -> str:
    "Twelve hex digits of the weights, rounded to half precision: the same before and after saving (as CLIP's own)."
    h = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        h.update(f"{name}{tuple(x.shape)}".encode())
        h.update(x.detach().half().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:12]

@torch.no_grad()
def draw(model, zi, captions, guidance, seed=0, steps=20, sampler="dpm", chunk=32, timesteps=None):
    "Pictures (n, 3, s, s) for z_i (or None) and captions (or None). A list `timesteps` goes before `steps`."
    tokens = None if captions is None else model.clip.tokenizer.encode(captions).to(model.device)
    n = len(tokens if zi is None else zi)
    part = lambda x, k: None if x is None else x[k:k + chunk]
    return torch.cat([
        model.decoder.sample(
            part(zi, k),
            part(tokens, k),
            guidance=guidance,
            steps=steps,
            timesteps=timesteps,
            sampler=sampler,
            generator=[generator(seed, "study", i) for i in range(k, min(n, k + chunk))]).cpu()
        for k in range(0, n, chunk)
    ])

def row(images, captions) -> dict:
    "How many were right of those asked, attribute by attribute."
    marks = judge(images, captions)
    return {a: [marks.right[a], marks.asked[a]] for a in ATTRIBUTES if marks.asked[a]}

def spread(draws) -> float:
    "Root mean square difference between two draws of the same z_i, in the units of [-1, 1]."
    x = torch.stack(draws).flatten(2)
    return (2 * x.var(0).mean(1)).mean().sqrt().item()

def conditions(model, kind:str, n:int) -> dict:
    "Guidance, figure 8 and binding for one kind of caption."
    scenes, captions = exam(kind, n)
    prior = model.sample_zi(captions,
                            "diffusion",
                            generators=[generator(0, "prior", i) for i in range(n)])
    zis = {
        "caption only": None, "z_t as z_i": model.encode_text(captions), "diffusion prior": prior,
        "true z_i": model.encode_image(render(scenes, model.clip.config.image_size))
    }
    few, drawn, bar = max(8, n // 4), {}, tqdm(desc=kind, total=10)
    def pictures(source, told, s):                       # each kind of picture is drawn once, wherever it is shown
        if (source, told, s) not in drawn:
            drawn[source, told, s] = draw(model, zis[source], captions if told else None, s)
            bar.update()
        return drawn[source, told, s]
    part = {"guidance": {}, "sources": {}, "binding": {}}
    for s in (1.0, 2.0, 3.0, 4.0):
        first = pictures("true z_i", True, s)
        more = [
            draw(model, zis["true z_i"][:few], captions[:few], s, seed) for seed in range(1, SEEDS)
        ]
        part["guidance"][f"{s:g}"] = row(
            first, captions) | {"spread": round(spread([first[:few], *more]), 4)}
    for name in zis:
        part["sources"][name] = row(pictures(name, True, 2.0), captions)
    for name, source, told in (("z_i and caption", "true z_i", True),
                               ("z_i only", "true z_i", False), ("caption only", "caption only",
                                                                 True)):
        for s in (1.0, 2.0):
            part["binding"][f"{name}, guidance {s:g}"] = row(pictures(source, told, s), captions)
    return part

def steps_and_samplers(model, n:int) -> dict:
    "What is right, and how far (root mean square: mean and median over pictures) it is from the 250 steps of DDIM, by sampler and steps; true z_i and caption, guidance 2."
    scenes, captions = exam("one object", n)
    zi, found, bar = model.encode_image(render(scenes, model.clip.config.image_size)), {}, tqdm(
        desc="steps", total=sum(map(len, PLAN.values())))
    for sampler, counts in PLAN.items():
        for name, steps in counts.items():
            x = draw(model, zi, captions, 2.0, steps=steps, sampler=sampler,
                     timesteps=LISTS.get(name))
            bar.update()
            if not found:
                end = x
            off = (x - end).flatten(1).square().mean(1).sqrt()
            found.setdefault(sampler, {})[name] = row(x, captions) | ({} if sampler == "ddpm" else {
                "off": [round(off.mean().item(), 4),
                        round(off.median().item(), 4)]
            })
    return found

def study(model, n:int) -> dict:
    "Everything, one kind of caption after the other."
    found = {kind: conditions(model, kind, n) for kind in ("one object", "two objects")}
    found["one object"]["steps"] = steps_and_samplers(model, max(8, n // 2))
    return found

if __name__ == "__main__":
    weights, n, out = (sys.argv[1:] +
                       ["tiny", "64", "data/tiny/study.json"][len(sys.argv) - 1:])[:3]
    began, model = time.time(), UnCLIP.from_pretrained(weights)
    found = {
        "weights": weights, "n": int(n), "steps": 20, "seed": 0,
        "decoder": model.decoder.config.clip_fingerprint,
        "decoder_weights": fingerprint(model.decoder), **study(model, int(n))
    }
    Path(out).write_text(json.dumps(found, indent=1))
    for kind in ("one object", "two objects"):
        for part, rows in found[kind].items():
            if part == "steps":
                rows = {
                    f"{sampler} {n}": r
                    for sampler, counts in rows.items()
                    for n, r in counts.items()
                }
            for name, r in rows.items():
                print(f"{kind:12} {part:9} {name:28}" + "  ".join(f"{a} {r[a][0] / r[a][1]:.0%}"
                                                                  for a in ATTRIBUTES if a in r) +
                      (f"  spread {r['spread']:.3f}" if "spread" in r else "") +
                      (f"  off {r['off'][0]:.3f} {r['off'][1]:.3f}" if "off" in r else ""))
    print(f"{time.time() - began:.0f} s: {out}")

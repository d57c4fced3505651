"""What the decoder's two ears are good for: guidance, the paper's figure 8, binding. `python benchmarks/decoder_study.py [WEIGHTS] [N] [OUT.json]`

Every picture is drawn at the decoder's own size (20 steps of DPM-Solver++) and judged by `read_scene`; caption i's noise depends on (seed, i) alone."""
import json, sys, time
from pathlib import Path
import torch
from tqdm import tqdm
from unclip_nb.core import generator
from unclip_nb.evaluation import ATTRIBUTES, exam, judge
from unclip_nb.pipeline import UnCLIP
from unclip_nb.shapes import render

SEEDS = 4     # draws of one z_i, for the diversity

@torch.no_grad()
def draw(model, zi, captions, guidance, seed, chunk=32):
    "Pictures (n, 3, s, s) for z_i (or None) and captions (or None)."
    tokens = None if captions is None else model.clip.tokenizer.encode(captions).to(model.device)
    n = len(tokens if zi is None else zi)
    part = lambda x, k: None if x is None else x[k:k + chunk]
    return torch.cat([model.decoder.sample(part(zi, k), part(tokens, k), guidance=guidance, steps=20, sampler="dpm",
                                           generator=[generator(seed, "study", i) for i in range(k, min(n, k + chunk))]).cpu() for k in range(0, n, chunk)])

def row(images, captions) -> dict:
    "How many were right of those asked, attribute by attribute."
    marks = judge(images, captions)
    return {a: [marks.right[a], marks.asked[a]] for a in ATTRIBUTES if marks.asked[a]}

def spread(draws) -> float:
    "Root mean square difference between two draws of the same z_i, in the units of [-1, 1]."
    x = torch.stack(draws).flatten(2)
    return (2 * x.var(0).mean(1)).mean().sqrt().item()

def study(model, n:int) -> dict:
    "Everything, one kind of caption after the other."
    found = {}
    for kind in ("one object", "two objects"):
        scenes, captions = exam(kind, n)
        side = model.clip.config.image_size
        true = model.encode_image(render(scenes, side))
        prior = model.sample_zi(captions, "diffusion", generators=[generator(0, "prior", i) for i in range(n)])
        few, bar = max(8, n // 4), tqdm(desc=kind, total=13)
        part = found[kind] = {"guidance": {}, "sources": {}, "binding": {}}
        for s in (1.0, 2.0, 3.0, 4.0):
            draws = [draw(model, true[:few], captions[:few], s, seed) for seed in range(1, SEEDS)]
            first = draw(model, true, captions, s, 0); bar.update()
            part["guidance"][f"{s:g}"] = row(first, captions) | {"spread": round(spread([first[:few], *draws]), 4)}
        for name, zi in (("caption only", None), ("z_t as z_i", model.encode_text(captions)), ("diffusion prior", prior), ("true z_i", true)):
            part["sources"][name] = row(draw(model, zi, captions, 2.0, 0), captions); bar.update()
        for name, zi, texts in (("z_i and caption", true, captions), ("z_i only", true, None), ("caption only", None, captions)):
            for s in (1.0, 2.0):
                part["binding"][f"{name}, guidance {s:g}"] = row(draw(model, zi, texts, s, 0), captions)
            bar.update()
    return found

if __name__ == "__main__":
    weights, n, out = (sys.argv[1:] + ["tiny", "64", "data/tiny/study.json"][len(sys.argv) - 1:])[:3]
    began, model = time.time(), UnCLIP.from_pretrained(weights)
    found = {"weights": weights, "n": int(n), "steps": 20, "seed": 0, "decoder": model.decoder.config.clip_fingerprint, **study(model, int(n))}
    Path(out).write_text(json.dumps(found, indent=1))
    for kind in ("one object", "two objects"):
        for part, rows in found[kind].items():
            for name, r in rows.items():
                print(f"{kind:12} {part:9} {name:28}" + "  ".join(f"{a} {r[a][0] / r[a][1]:.0%}" for a in ATTRIBUTES if a in r) + (f"  spread {r['spread']:.3f}" if "spread" in r else ""))
    print(f"{time.time() - began:.0f} s: {out}")

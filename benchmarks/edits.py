"""How often do words change what they name, and nothing else? Text diffs of one-object scenes, judged by the reader without learned weights.

    python benchmarks/edits.py                           the shipped weights, 64 edits of each kind: about an hour on two CPU cores, minutes on a GPU
    python benchmarks/edits.py --n 8 --thetas 0 0.5      a quick look

Every scene is inverted once (unguided, no caption); then each attribute in turn is renamed in its full caption, and z_i turned by theta from the
described or the empty base caption. Read at the decoder's own size. Table and settings go to data/tiny/edits.json, rewritten after each theta."""
import argparse, json, time
from dataclasses import replace
from pathlib import Path
import torch
from unclip_nb.core import generator
from unclip_nb.edits import frames, text_diff_path, text_direction
from unclip_nb.evaluation import exam, wilson
from unclip_nb.pipeline import UnCLIP
from unclip_nb.shapes import BACKGROUNDS, COLORS, SHAPES, SIZES, UNSEEN, Scene, caption, matches, parse_caption, read_scene, render

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES, "background": tuple(BACKGROUNDS)}
BASES = ("described", "empty")

def changed(scene:Scene, kind:str, g:torch.Generator) -> Scene:
    "The scene with another value of one attribute, drawn at random; never a pair of shape and colour that training left out."
    o = scene.objects[0]
    def to(v): return replace(scene, background=v) if kind == "background" else replace(scene, objects=(replace(o, **{kind: v}),))
    options = [to(v) for v in KINDS[kind]]
    options = [s for s in options if s != scene and (s.objects[0].color, s.objects[0].shape) not in UNSEEN]
    return options[int(torch.randint(len(options), (1,), generator=g))]

def judged(images, wanted:list[Scene], kind:str) -> dict[str, int]:
    "How many pictures show the new value (changed), all of the rest as before (stayed), both, and both with the object where it was (place)."
    marks = dict.fromkeys(("changed", "stayed", "both", "place"), 0)
    for image, scene in zip(images, wanted, strict=True):
        seen = read_scene(image, strict=False)
        verdict = matches(parse_caption(caption(scene, full=True)), seen)
        done, stayed = bool(verdict[kind]), all(verdict[k] for k in (*KINDS, "count") if k != kind)
        o = scene.objects[0]
        near = stayed and min((p.x - o.x) ** 2 + (p.y - o.y) ** 2 for p in seen.objects) < 0.1 ** 2
        for k, v in dict(changed=done, stayed=stayed, both=done and stayed, place=done and near).items(): marks[k] += v
    return marks

@torch.no_grad()
def run(weights:str, n:int, thetas:list[float], steps:int, seed:int, batch_size:int, device:str, save):
    began, model = time.time(), UnCLIP.from_pretrained(weights, device=device)
    model.decoder.to(memory_format=torch.channels_last)
    scenes, captions = exam("one object", n)
    latent = model.invert(render(scenes, model.decoder.config.image_size), steps, progress="inverting")
    new = {k: [changed(s, k, generator(seed, "edit", k, i)) for i, s in enumerate(scenes)] for k in KINDS}
    turned = {(k, b): text_direction(model, captions if b == "described" else [""] * n, [caption(s, full=True) for s in new[k]]) for k in KINDS for b in BASES}
    def draw(path, label): return torch.cat(list(frames(model, path, upsample=False, batch_size=batch_size, progress=label))).cpu()
    rows, same = [], None
    for theta in thetas:
        for (kind, base), direction in turned.items():
            if theta or same is None: x = draw(text_diff_path(latent, direction, [theta]), f"{kind}, {base}, {theta}")
            if not theta: same = x
            x = x if theta else same
            rows.append(dict(kind=kind, base=base, theta=theta, n=n) | judged(x, new[kind], kind))
            print(f"{kind:11}{base:10} theta {theta:4}  " + "  ".join(f"{k} {rows[-1][k] / n:4.0%}" for k in ("changed", "stayed", "both", "place"))
                  + "  (both: {:.0%} to {:.0%})".format(*wilson(rows[-1]["both"], n)), flush=True)
        save(dict(n=n, steps=steps, seed=seed, size=model.decoder.config.image_size, clip=model.clip.fingerprint, rows=rows), time.time() - began)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="tiny"); p.add_argument("--n", type=int, default=64); p.add_argument("--steps", type=int, default=50); p.add_argument("--seed", type=int, default=0)
    p.add_argument("--thetas", type=float, nargs="+", default=[0, 0.1, 0.25, 0.35, 0.5, 0.65]); p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--device", default="auto"); p.add_argument("--out", default=str(ROOT/"data"/"tiny"/"edits.json"))
    a = p.parse_args()
    def save(found, seconds):
        found["rows"].sort(key=lambda r: (list(KINDS).index(r["kind"]), r["base"], r["theta"]))
        Path(a.out).write_text(json.dumps({k: v for k, v in found.items() if k != "rows"})[:-1] + ', "rows": [\n' + ",\n".join(json.dumps(r) for r in found["rows"]) + "\n]}\n")
        print(f"saved {a.out} after {seconds / 60:.1f} minutes", flush=True)
    run(a.weights, a.n, a.thetas, a.steps, a.seed, a.batch_size, a.device, save)

if __name__ == "__main__": main()

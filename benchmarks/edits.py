"""How often do words change what they name, and nothing else? Text diffs of one-object scenes, judged by the reader without learned weights.

    python benchmarks/edits.py                           the shipped weights, 64 edits of each kind: about ten minutes on one CPU core
    python benchmarks/edits.py --n 8 --thetas 0 0.5      a quick look

Every scene is inverted once (unguided, no caption); then each attribute in turn is renamed in its full caption, and z_i turned by theta from the
described or the empty base caption (that one at every second theta: it is the control). Read at the decoder's own size. Table, settings and the fingerprints of
CLIP and decoder go to data/tiny/edits.json after each row; run again, rows of the same settings and weights that are there already are not drawn again."""
import argparse, json, os, time
from dataclasses import replace
from pathlib import Path
import torch
from decoder_study import fingerprint
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

    def to(v):
        return replace(scene, background=v) if kind == "background" else replace(
            scene, objects=(replace(o, **{kind: v}), ))
    options = [to(v) for v in KINDS[kind]]
    options = [
        s for s in options if s != scene and (s.objects[0].color, s.objects[0].shape) not in UNSEEN
    ]
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
        for k, v in dict(changed=done, stayed=stayed, both=done and stayed, place=done
                         and near).items():
            marks[k] += v
    return marks

def settings(model:UnCLIP, n:int, steps:int, seed:int) -> dict:
    "What rows depend on: rows of other settings or weights are not these rows."
    return dict(n=n,
                steps=steps,
                seed=seed,
                size=model.decoder.config.image_size,
                clip=model.clip.fingerprint,
                decoder=fingerprint(model.decoder))

def kept(out:Path, made:dict) -> list[dict]:
    "Rows of an earlier run with the same settings and weights."
    old = json.loads(out.read_text()) if out.exists() else {}
    return old.pop("rows") if old and {k: v for k, v in old.items() if k != "rows"} == made else []

def save(out:Path, made:dict, rows:list[dict]):
    rows = sorted(rows, key=lambda r: (list(KINDS).index(r["kind"]), r["base"], r["theta"]))
    part = out.with_name(out.name + ".part")
    part.write_text(
        json.dumps(made)[:-1] + ', "rows": [\n' + ",\n".join(json.dumps(r)
                                                             for r in rows) + "\n]}\n")
    os.replace(part, out)

@torch.no_grad()
def run(weights: str, n: int, thetas: list[float], steps: int, seed: int, batch_size: int,
        device: str, out: Path):
    model = UnCLIP.from_pretrained(weights, device=device)
    model.decoder.to(memory_format=torch.channels_last)
    made = settings(model, n, steps, seed)
    rows = kept(out, made)
    wanted = [(t, k, b) for t in thetas for k in KINDS for b in BASES
              if b == "described" or t in thetas[::2]]
    have = {(r["theta"], r["kind"], r["base"]) for r in rows}
    todo = [w for w in wanted if w not in have]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} rows are there", flush=True)
    if not todo:
        return
    began, scenes, captions = time.time(), *exam("one object", n)
    latent = model.invert(render(scenes, model.decoder.config.image_size),
                          steps,
                          batch_size=batch_size,
                          progress="inverting")

    def draw(path):
        return torch.cat(
            list(frames(model, path, upsample=False, batch_size=batch_size, progress=True))).cpu()
    still = None                                                          # theta 0 is one and the same for all kinds and bases
    for done, (theta, kind, base) in enumerate(todo, 1):
        new = [changed(s, kind, generator(seed, "edit", kind, i)) for i, s in enumerate(scenes)]
        direction = text_direction(model, captions if base == "described" else [""] * n,
                                   [caption(s, full=True) for s in new])
        if theta == 0:
            x = still = draw(latent) if still is None else still
        else:
            x = draw(text_diff_path(latent, direction, [theta]))
        rows.append(dict(kind=kind, base=base, theta=theta, n=n) | judged(x, new, kind))
        save(out, made, rows)
        print(f"{done:3}/{len(todo)} {kind:11}{base:10} theta {theta:4}  " +
              "  ".join(f"{k} {rows[-1][k] / n:4.0%}"
                        for k in ("changed", "stayed", "both", "place")) +
              "  (both: {:.0%} to {:.0%})".format(*wilson(rows[-1]["both"], n)) +
              f"  {(time.time() - began) / 60:.1f} min",
              flush=True)
    print(f"saved {out}", flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="tiny")
    p.add_argument("--n", type=int, default=64)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--thetas", type=float, nargs="+", default=[0, 0.2, 0.35, 0.5, 0.65])
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--device", default="auto")
    p.add_argument("--out", default=str(ROOT/"data"/"tiny"/"edits.json"))
    a = p.parse_args()
    run(a.weights, a.n, a.thetas, a.steps, a.seed, a.batch_size, a.device, Path(a.out))

if __name__ == "__main__":
    main()

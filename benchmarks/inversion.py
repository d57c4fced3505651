"""Invert pictures of unseen pairs of shape and colour and decode them again (no caption, no guidance, base size): PSNR of what comes back.

    python benchmarks/inversion.py                                                   what 14_inversion shows, with the shipped weights: eight minutes of one core
    python benchmarks/inversion.py --steps 50 250 --start 0 50 --refine 0 1 --n 64   all combinations of what is named; the rest as shipped (50 steps, start 50, target)

Rows go to inversion.json beside the weights after each is measured. One that is there already, for the same weights and at least as many pictures, is not measured again:
after an interruption, run the same command. Pictures are always the first n of split "unseen", so that rows can be compared picture by picture (`each`, in dB)."""
import argparse, hashlib, itertools, json, os, sys
from pathlib import Path
import torch
from unclip_nb.diffusion import spaced
from unclip_nb.inversion import CONVENTIONS, ddim_invert
from unclip_nb.pipeline import UnCLIP, find_system
from unclip_nb.shapes import render, scene_at

SHIPPED = dict(steps=50, start=50, convention="target", refine=0, skip_last=False)      # what `UnCLIP.invert` does
PLAN = [
    SHIPPED | row
    for row in (*(dict(steps=s) for s in (10, 20, 50, 100, 250, 500)), dict(start=0),
                dict(steps=250, start=0), dict(skip_last=True), dict(steps=250, skip_last=True),
                dict(convention="current"), dict(steps=10, refine=1), dict(refine=1))
]

def fingerprint(module) -> str:
    "As `CLIP.fingerprint`, of any module: twelve hex digits of its weights, rounded to half precision."
    h = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        h.update(f"{name}{tuple(x.shape)}".encode() + x.detach().half().cpu().numpy().tobytes())
    return h.hexdigest()[:12]

def decibels(a, b): return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1))
def key(row): return tuple(row[k] for k in SHIPPED)

@torch.no_grad()
def trip(model, x0, label:str="", batch_size:int=32, *, steps:int, **how):
    "Decibels of each picture that went up and down, and the size of its x_T (root of the mean square)."
    marks, sizes = [], []
    for x in x0.split(batch_size):
        x, zi = x.to(model.device), model.encode_image(x)
        x_T = ddim_invert(model.decoder.denoiser(zi),
                          x,
                          model.decoder.schedule,
                          spaced(steps),
                          progress=f"{label} up" if label else False,
                          **how)
        marks.append(
            decibels(model.decode(zi, x_T=x_T, steps=steps, upsample=False, progress=bool(label)),
                     x).cpu())
        sizes.append(x_T.square().flatten(1).mean(1).sqrt().cpu())
    return torch.cat(marks), torch.cat(sizes)

def row(how:dict, db, sizes) -> dict:
    "One line of the table: `pm` is half of the mean's 95 % interval, `size` the mean size of x_T."
    stats = dict(mean=db.mean(),
                 pm=1.96 * db.std(correction=int(len(db) > 1)) / len(db)**0.5,
                 median=db.quantile(0.5),
                 min=db.min(),
                 below_25=(db < 25).float().mean(),
                 from_30=(db >= 30).float().mean(),
                 size=sizes.mean())
    return how | dict(n=len(db)) | {k: round(v.item(), 3)
                                    for k, v in stats.items()
                                    } | dict(each=[round(v, 2) for v in db.tolist()])

def line(r:dict) -> str:
    how = f"{r['steps']:4} steps  start {r['start']:3}  {r['convention']:8} refine {r['refine']}  {'all but the last' if r['skip_last'] else 'all steps':16}"
    return how + f"  n {r['n']:3}  {r['mean']:6.2f} +- {r['pm']:.2f} dB  median {r['median']:6.2f}  min {r['min']:6.2f}  below 25 dB {r['below_25']:4.0%}  from 30 dB {r['from_30']:4.0%}  size of x_T {r['size']:.2f}"

@torch.no_grad()
def ceiling(model, x0) -> dict:
    "What the decoder sees of the pictures themselves at t = 0: no sampler returns more."
    x0, zi = x0.to(model.device), model.encode_image(x0)
    seen = model.decoder.denoiser(zi)(x0, torch.zeros(len(x0),
                                                      dtype=torch.long,
                                                      device=model.device)).x0
    db = decibels(seen, x0)
    return dict(n=len(x0),
                mean=round(db.mean().item(), 3),
                miss=round((seen - x0).square().mean().sqrt().item(), 5),
                each=[round(v, 2) for v in db.tolist()])

def run(model, wanted:list[dict], out:Path, n:int, n_long:int):
    "Measure the rows that `out` lacks; it is rewritten after each."
    x0 = render([scene_at(i, "unseen") for i in range(max(n, n_long))],
                model.decoder.config.image_size)
    head = dict(size=model.decoder.config.image_size,
                clip=fingerprint(model.clip),
                decoder=fingerprint(model.decoder))
    old = json.loads(out.read_text()) if out.exists() else {}
    if any(old.get(k) != v for k, v in head.items()):
        old = {}                        # of other weights
    rows, top = {key(r): r for r in old.get("rows", [])}, old.get("ceiling")
    head["ceiling"] = top if top and top["n"] >= n else ceiling(model, x0[:n])
    print(
        f"the picture itself, as the decoder sees it at t = 0: {head['ceiling']['mean']:.1f} dB, {head['ceiling']['n']} pictures",
        flush=True)
    for i, how in enumerate(wanted, 1):
        m = n_long if how["steps"] >= 250 else n
        if key(how) not in rows or rows[key(how)]["n"] < m:
            rows[key(how)] = row(
                how, *trip(model, x0[:m], f"{i}/{len(wanted)}" if sys.stderr.isatty() else "",
                           **how))
            part = out.with_suffix(".part")
            part.write_text(
                json.dumps(head)[:-1] + ', "rows": [\n' +
                ",\n".join(json.dumps(rows[k]) for k in sorted(rows)) + "\n]}\n")
            os.replace(part, out)
        print(line(rows[key(how)]), flush=True)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, nargs="+")
    p.add_argument("--start", type=int, nargs="+")
    p.add_argument("--convention", nargs="+", choices=CONVENTIONS)
    p.add_argument("--refine", type=int, nargs="+")
    p.add_argument("--skip-last",
                   type=int,
                   nargs="+",
                   choices=(0, 1),
                   help="1: leave out the step into the noisiest timestep")
    p.add_argument("--n", type=int, default=32, help="pictures")
    p.add_argument("--n-long", type=int, help="pictures from 250 steps on; half of n by default")
    p.add_argument("--weights", default="tiny")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", help="inversion.json beside the weights by default")
    a = p.parse_args(argv)
    named = {k: getattr(a, k) for k in SHIPPED if getattr(a, k) is not None}
    wanted = [SHIPPED | dict(zip(named, values))
              for values in itertools.product(*named.values())] if named else PLAN
    wanted = [how | dict(skip_last=bool(how["skip_last"])) for how in wanted]
    run(UnCLIP.from_pretrained(a.weights, device=a.device), wanted,
        Path(a.out or find_system(a.weights) / "inversion.json"), a.n, a.n_long or max(1, a.n // 2))

if __name__ == "__main__":
    main()

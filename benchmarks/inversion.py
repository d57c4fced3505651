"""Invert pictures of unseen pairs of shape and colour and decode them again (no caption, no guidance, base size): PSNR of what comes back.

    python benchmarks/inversion.py --n 64 --steps 50 250 --start 0 50 --refine 0        the shipped weights; minutes on a GPU, an hour on two CPU cores"""
import argparse, itertools
import torch
from unclip_nb.inversion import ddim_invert
from unclip_nb.pipeline import UnCLIP
from unclip_nb.shapes import render, scene_at

def decibels(a, b): return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1))

@torch.no_grad()
def trip(model, x0, steps:int, batch_size:int=32, **how):
    "Decibels of each picture that went up and down."
    out = []
    for x in x0.split(batch_size):
        x, zi = x.to(model.device), model.encode_image(x)
        x_T = ddim_invert(model.decoder.denoiser(zi), x, model.decoder.schedule, steps, progress=f"{steps} steps", **how)
        out.append(decibels(model.decode(zi, x_T=x_T, steps=steps, upsample=False), x).cpu())
    return torch.cat(out)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="tiny"); p.add_argument("--n", type=int, default=64); p.add_argument("--device", default="auto")
    p.add_argument("--steps", type=int, nargs="+", default=[50, 250]); p.add_argument("--start", type=int, nargs="+", default=[0, 50]); p.add_argument("--refine", type=int, nargs="+", default=[0])
    a = p.parse_args()
    model = UnCLIP.from_pretrained(a.weights, device=a.device)
    x0 = render([scene_at(i, "unseen") for i in range(a.n)], model.decoder.config.image_size)
    with torch.no_grad():
        zi = model.encode_image(x0)
        best = decibels(model.decoder.denoiser(zi)(x0.to(model.device), torch.zeros(a.n, dtype=torch.long, device=model.device)).x0, x0.to(model.device))
    print(f"{a.n} pictures; what the decoder sees of the picture itself at t = 0: mean {best.mean():.1f} dB", flush=True)
    for steps, start, refine in itertools.product(a.steps, a.start, a.refine):
        d = trip(model, x0, steps, start=start, refine=refine)
        print(f"{steps:4} steps, start {start:3}, refine {refine}: mean {d.mean():.2f} +- {1.96 * d.std() / len(d) ** 0.5:.2f}  median {d.median():.2f}  min {d.min():.2f} dB   30 dB or more: {(d >= 30).float().mean():.0%}", flush=True)

if __name__ == "__main__": main()

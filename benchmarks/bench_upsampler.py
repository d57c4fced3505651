"""What the upsamplers cost and what they win: `python benchmarks/bench_upsampler.py [--quality] [--steps] [--twins STEPS [--sheet FILE]]`.

Alone: seconds from a caption to 512 px, and the peak memory of a process that draws one picture of 512 and of 1024 px.
--quality: both shipped stages beside bicubic on unseen scenes, and on two photographs, clean and spoilt.
--steps: both shipped stages with fewer steps than the paper's.
--twins: for each stage two models, trained alike but for the degradation, on clean and on spoilt pictures; --sheet: their pictures."""
import argparse, subprocess, sys, time
from dataclasses import replace
import torch
import torch.nn.functional as F
from unclip_nb.core import data_path, generator, image_grid, resize
from unclip_nb.degradations import bsr_degrade, gaussian_blur
from unclip_nb.shapes import EIGHT_CAPTIONS, render, scene_at
from unclip_nb.upsampler import Upsampler, Upsampler2, Upsampler2Config, UpsamplerConfig, enlarge, psnr, sharpness, ssim

CHILD = r"""
import re, sys, torch
from pathlib import Path
from unclip_nb.core import data_path, generator
from unclip_nb.upsampler import Upsampler2
model, side = Upsampler2.from_pretrained(data_path("tiny")/"upsampler2"), int(sys.argv[1])
if side: model.sample(torch.zeros(1, 3, side // 4, side // 4), generator=generator(0))
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)     # Linux's; ru_maxrss would count the parent's before the fork
"""

def peak_memory(side:int) -> float:
    "Peak resident memory, in MB, of a fresh process that draws one picture of that side; 0: that only loads the model."
    return float(
        subprocess.run([sys.executable, "-c", CHILD, str(side)],
                       capture_output=True,
                       text=True,
                       check=True).stdout)

def gens(n): return [generator("bench", i) for i in range(n)]

def run() -> list[tuple[str, float, str]]:
    "Rows of (name, value, unit)."
    from run import median_time
    from unclip_nb.pipeline import UnCLIP
    model = UnCLIP.from_pretrained("tiny", device="cpu")
    rows = [(f"caption to {size} px, all told",
             median_time(lambda: model.generate(EIGHT_CAPTIONS[0], size=size)), "s")
            for size in model.sizes]
    return rows + [(f"peak memory, {f'one picture of {s} px' if s else 'second upsampler loaded'}",
                    peak_memory(s), "MB") for s in (0, 512, 1024)]

def spoilt(images, variant):
    "Small pictures: averaged down, then blurred as in the first stage's training; or BSR, as in the second's."
    if variant in ("full", "light"):
        return bsr_degrade(images, gens(len(images)), variant=variant)
    small = resize(images, images.shape[-1] // 4)
    return gaussian_blur(small) if variant == "blur" else small

def scenes(n:int, side:int): return render([scene_at(i, "valid") for i in range(n)], side)


def shipped():
    return Upsampler.from_pretrained(data_path("tiny") / "upsampler1"), Upsampler2.from_pretrained(
        data_path("tiny") / "upsampler2")

def photographs(side:int=256):
    "Four pieces of scikit-learn's two photographs."
    from sklearn.datasets import load_sample_image
    from unclip_nb.core import to_tensor
    from PIL import Image
    both = [
        to_tensor(Image.fromarray(load_sample_image(name))) for name in ("china.jpg", "flower.jpg")
    ]
    return torch.stack([x[:, 90:90 + side, left:left + side] for x in both for left in (40, 340)])

def marks(drawn, truth) -> str:
    return f"{psnr(drawn, truth).mean():8.2f} dB{ssim(drawn, truth).mean():8.3f}{100 * (sharpness(drawn) / sharpness(truth)).mean():8.0f} %"

def compare(models:dict, truth, steps:int, variants) -> dict[str, dict]:
    "PSNR, SSIM and sharpness (percent of the truth's) of each way, on clean and spoilt small pictures; and the pictures."
    drawn = {}
    for variant in variants:
        low = spoilt(truth, variant)
        ways = drawn[variant] = {
            f"given ({variant})": enlarge(low, 4, "nearest"), "bicubic": enlarge(low, 4, "bicubic")
        }
        print(f"  {variant:6}{'bicubic':24}{marks(ways['bicubic'], truth)}")
        for name, m in models.items():
            ways[name] = m.sample(low, steps, gens(len(low)))
            print(f"        {name:24}{marks(ways[name], truth)}", flush=True)
    return drawn

def quality():
    one, two = shipped()
    both, bsr = {"upsampler1 (blur)": one, "upsampler2 (BSR)": two}, ("clean", "light", "full")
    for name, truth, models, variants in (("16 unseen scenes, 32 -> 128 px", scenes(16, 128),
                                           {"upsampler1 (blur)": one}, ("clean", "blur")),
                                          ("16 unseen scenes, 128 -> 512 px", scenes(16, 512), both,
                                           bsr), ("4 pieces of photographs, 64 -> 256 px",
                                                  photographs(), both, bsr)):
        print(name, flush=True)
        compare(models, truth, 9, variants)

def few_steps():
    one, two = shipped()
    for name, model, truth, counts in (("upsampler1, 16 unseen scenes, 32 -> 128 px", one,
                                        scenes(16, 128), (4, 9, 27)),
                                       ("upsampler2, 4 unseen scenes, 128 -> 512 px", two,
                                        scenes(4, 512), (4, 9, 15))):
        low = spoilt(truth, "clean")
        print(name)
        for n in counts:
            print(f"  {f'{n} steps':30}{marks(model.sample(low, n, gens(len(low))), truth)}",
                  flush=True)

def blur_twin(p:float) -> Upsampler:
    "A first stage from random weights, of whose small pictures in training a share `p` is blurred."
    torch.manual_seed(0)
    return Upsampler(replace(UpsamplerConfig.tiny(), blur_p=p))

def bsr_twin(p:float) -> Upsampler2:
    "A second stage for 64 -> 256 px that goes on from the shipped first one; a share `p` of its small pictures goes through BSR."
    model = Upsampler2(replace(Upsampler2Config.tiny(), low_size=64, crops=2, bsr_p=p))
    model.load_state_dict(shipped()[0].state_dict())
    return model

def trained(model:Upsampler, steps:int, batch:int, lr:float) -> Upsampler:
    "`steps` steps; crops, t and noise are the same for twins, since every degradation draws its random numbers whether it strikes or not."
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for k in range(steps):
        loss = model.loss(
            {"image": render([scene_at(k * batch + i) for i in range(batch)], model.config.size)},
            generator("twin", k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()

def median_row(ways:dict, truth, side:int=128):
    "Pictures and titles of the scene whose gain (the last way's on the one before) is the median: the window where most goes on."
    *_, without, with_ = ways.values()
    i = (psnr(with_, truth) - psnr(without, truth)).argsort()[len(truth) // 2].item()
    half = range(0, truth.shape[-1] // 2 + 1, truth.shape[-1] // 8)
    part = lambda x, y, z: x[i:i + 1, :, y:y + truth.shape[-1] // 2, z:z + truth.shape[-1] // 2]
    y, z = max(((y, z) for y in half for z in half), key=lambda at: part(truth, *at).std())
    pictures = torch.cat(
        [F.interpolate(part(x, y, z), (side, side)) for x in (*ways.values(), truth)])
    return pictures, [
        f"{k} {psnr(x[i:i + 1], truth[i:i + 1]).item():.1f} dB" for k, x in ways.items()
    ] + ["truth"]

def twins(steps:int, sheet:str|None=None):
    "Both pairs, marked on 16 unseen scenes; and a sheet with one of them for each injury, close up."
    rows = []
    for stage, make, batch, lr, variants in (
        ("first stage, 32 -> 128 px, from random weights", blur_twin, 8, 2e-3,
         ("clean", "blur")), ("second stage, 64 -> 256 px, from upsampler1's weights", bsr_twin, 4,
                              1e-3, ("clean", "light", "full"))):
        began = time.process_time()
        pair = {
            name: trained(make(p), steps, batch, lr)
            for name, p in (("trained without", 0.), ("trained with", .5))
        }
        c = pair["trained with"].config
        truth = scenes(16, c.size)
        print(
            f"{stage}: twins, {steps} steps of {batch * c.crops} crops each, {time.process_time() - began:.0f} s of processor time\n16 unseen scenes",
            flush=True)
        drawn = compare(pair, truth, 9, variants)
        rows += [median_row(drawn[v], truth) for v in variants[1:]]
    pictures, titles = zip(*rows)
    if sheet:
        image_grid(torch.cat(pictures), sum(titles, []), 5, 128).save(sheet,
                                                                      "JPEG",
                                                                      quality=60,
                                                                      optimize=True)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quality", action="store_true")
    p.add_argument("--steps", action="store_true")
    p.add_argument("--twins", type=int, metavar="STEPS")
    p.add_argument("--sheet", metavar="FILE")
    asked = p.parse_args()
    if asked.twins:
        twins(asked.twins, asked.sheet)
    if asked.quality:
        quality()
    if asked.steps:
        few_steps()
    if not (asked.twins or asked.quality or asked.steps):
        for name, value, unit in run():
            print(f"{name:58}{value:12.2f} {unit}", flush=True)

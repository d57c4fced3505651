"""What the upsamplers cost and what they win: `python benchmarks/bench_upsampler.py [--quality] [--twins STEPS]`.

Alone: seconds from a caption to 512 px, and the peak memory of a process that draws one picture of 512 and of 1024 px.
--quality: the shipped second stage beside bicubic on unseen scenes and on two photographs, clean and spoilt.
--twins: two second stages, trained alike but for the degradation, on clean and on spoilt pictures."""
import argparse, subprocess, sys, time
from dataclasses import replace
import torch
from unclip_nb.core import data_path, generator, resize
from unclip_nb.degradations import bsr_degrade
from unclip_nb.shapes import EIGHT_CAPTIONS, render, scene_at
from unclip_nb.upsampler import Upsampler, Upsampler2, Upsampler2Config, enlarge, psnr, sharpness, ssim

CHILD = """
import resource, sys, torch
from unclip_nb.core import data_path, generator
from unclip_nb.upsampler import Upsampler2
model, side = Upsampler2.from_pretrained(data_path("tiny")/"upsampler2"), int(sys.argv[1])
if side: model.sample(torch.zeros(1, 3, side // 4, side // 4), generator=generator(0))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

def peak_memory(side:int) -> float:
    "Peak resident memory, in MB, of a fresh process that draws one picture of that side; 0: that only loads the model."
    return float(subprocess.run([sys.executable, "-c", CHILD, str(side)], capture_output=True, text=True, check=True).stdout)

def gens(n): return [generator("bench", i) for i in range(n)]

def run() -> list[tuple[str, float, str]]:
    "Rows of (name, value, unit)."
    from run import median_time
    from unclip_nb.pipeline import UnCLIP
    model = UnCLIP.from_pretrained("tiny", device="cpu")
    rows = [(f"caption to {size} px, all told", median_time(lambda: model.generate(EIGHT_CAPTIONS[0], size=size)), "s") for size in model.sizes]
    return rows + [(f"peak memory, {f'one picture of {s} px' if s else 'second upsampler loaded'}", peak_memory(s), "MB") for s in (0, 512, 1024)]

def spoilt(images, variant): return resize(images, images.shape[-1] // 4) if variant == "clean" else bsr_degrade(images, gens(len(images)), variant=variant)

def photographs(side:int=256):
    "Four pieces of scikit-learn's two photographs."
    from sklearn.datasets import load_sample_image
    from unclip_nb.core import to_tensor
    from PIL import Image
    both = [to_tensor(Image.fromarray(load_sample_image(name))) for name in ("china.jpg", "flower.jpg")]
    return torch.stack([x[:, 90:90 + side, left:left + side] for x in both for left in (40, 340)])

def marks(drawn, truth) -> str:
    return f"{psnr(drawn, truth).mean():8.2f} dB{ssim(drawn, truth).mean():8.3f}{100 * (sharpness(drawn) / sharpness(truth)).mean():8.0f} %"

def compare(models:dict, truth, steps:int):
    "PSNR, SSIM and sharpness (percent of the truth's) of each way, on clean and spoilt small pictures."
    for variant in ("clean", "light", "full"):
        low = spoilt(truth, variant)
        print(f"  {variant:6}{'bicubic':24}{marks(enlarge(low, 4, 'bicubic'), truth)}")
        for name, m in models.items(): print(f"        {name:24}{marks(m.sample(low, steps, gens(len(low))), truth)}", flush=True)

def quality():
    both = {"upsampler1 (blur)": Upsampler.from_pretrained(data_path("tiny")/"upsampler1"), "upsampler2 (BSR)": Upsampler2.from_pretrained(data_path("tiny")/"upsampler2")}
    for name, truth in (("16 unseen scenes, 128 -> 512 px", render([scene_at(i, "valid") for i in range(16)], 512)), ("4 pieces of photographs, 64 -> 256 px", photographs())):
        print(name, flush=True); compare(both, truth, 9)

def twin(degradation:str, steps:int, batch:int=4) -> Upsampler2:
    "A second stage for 64 -> 256 px that goes on from the shipped first one; everything but the degradation is the same for all."
    g, first = generator("twin"), Upsampler.from_pretrained(data_path("tiny")/"upsampler1")
    model = Upsampler2(replace(Upsampler2Config.tiny(), low_size=64, crops=2, degradation=degradation))
    model.load_state_dict(first.state_dict()); model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for k in range(steps):
        loss = model.loss({"image": render([scene_at(k * batch + i) for i in range(batch)], model.config.size)}, g)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    return model.eval()

def twins(steps:int):
    began = time.process_time()
    pair = {name: twin(d, steps) for name, d in (("without", "none"), ("half of them BSR", "bsr"))}
    print(f"twins, {steps} steps of 8 crops of 64 px each: {time.process_time() - began:.0f} s of processor time\n16 unseen scenes, 64 -> 256 px", flush=True)
    compare(pair, render([scene_at(i, "valid") for i in range(16)], 256), 9)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quality", action="store_true"); p.add_argument("--twins", type=int, metavar="STEPS")
    asked = p.parse_args()
    if asked.twins: twins(asked.twins)
    if asked.quality: quality()
    if not asked.twins and not asked.quality:
        for name, value, unit in run(): print(f"{name:58}{value:12.2f} {unit}", flush=True)

"The tiny diffusion prior's sampling, with and without its cache: seconds for 8 captions, two draws each, 64 steps, guidance 2 (medians of 3)."
import statistics, time
import torch
import torch.nn.functional as F
from unclip_nb.core import generator, randn
from unclip_nb.diffusion_prior import DiffusionPrior, PriorConfig

def run(captions:int=8, steps:int=64, repeats:int=3):
    "Rows (name, value, unit)."
    torch.manual_seed(0)
    prior, c, g = DiffusionPrior(PriorConfig.tiny()).eval(), PriorConfig.tiny(), generator("bench prior")
    text, zt = randn((captions, c.context_length, c.text_width), g), F.normalize(randn((captions, c.clip_dim), g), dim=1)
    text[:, 14:] = 0                                                     # captions of 14 tokens
    def seconds(cache):
        start = time.perf_counter()
        prior.sample(text, zt, steps=steps, guidance=2., generator=generator(0), cache=cache)
        return time.perf_counter() - start
    seconds(True)                                                        # warm up
    pairs = [(seconds(True), seconds(False)) for _ in range(repeats)]    # alternating, so that both meet the same machine
    fast, slow = (statistics.median(p) for p in zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    what = f"{captions} captions, {steps} steps"
    return [(f"prior sampling with cache ({what})", fast, "s"), (f"prior sampling without cache ({what})", slow, "s"),
            ("prior cache speed-up", ratio, "x"), ("prior samples with cache", captions / fast, "captions/s")]

if __name__ == "__main__":
    for name, value, unit in run(): print(f"{name:60} {value:10.3f} {unit}")

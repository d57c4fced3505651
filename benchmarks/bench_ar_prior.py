"The AR prior's sampling, with and without its cache: seconds for 8 and for 32 captions, 64 codes, guidance 2, at the tiny width (medians of 3)."
import statistics, time
import torch
import torch.nn.functional as F
from unclip_nb.ar_prior import ARPrior, ARPriorConfig
from unclip_nb.core import generator, randn

def run():
    "Rows (name, value, unit)."
    return [row for n in (8, 32) for row in speed(n)]

def speed(captions:int, codes:int=64, repeats:int=3):
    "Rows for one size of batch."
    torch.manual_seed(0)
    c, g = ARPriorConfig.tiny(k=codes), generator("bench ar prior")
    prior = ARPrior(c).eval()
    prior.measure(*(F.normalize(randn((1000, c.clip_dim), g), dim=1) for _ in range(2)))
    text, zt = randn((captions, c.context_length, c.text_width), g), F.normalize(randn(
        (captions, c.clip_dim), g),
                                                                                 dim=1)
    text[:, 14:] = 0                                                     # captions of 14 tokens
    def seconds(cache):
        start = time.perf_counter()
        prior.sample(text, zt, guidance=2., generator=generator(0), cache=cache)
        return time.perf_counter() - start
    seconds(True)                                                        # warm up
    pairs = [(seconds(True), seconds(False)) for _ in range(repeats)]    # alternating, so that both meet the same machine
    fast, slow = (statistics.median(p) for p in zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    what = f"{captions} captions, {codes} codes"
    return [(f"AR prior sampling with cache ({what})", fast, "s"),
            (f"AR prior sampling without cache ({what})", slow, "s"),
            (f"AR prior cache speed-up, {captions} captions", ratio, "x"),
            (f"AR prior samples with cache, {captions} at a time", captions / fast, "captions/s")]

if __name__ == "__main__":
    for name, value, unit in run():
        print(f"{name:60} {value:10.3f} {unit}")

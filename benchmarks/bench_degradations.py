"How fast pictures are spoilt: `python benchmarks/bench_degradations.py`. Counted in the processor's time, one core's, whatever else runs."
import time
import torch
from unclip_nb.core import generator
from unclip_nb.degradations import bsr_degrade, gaussian_blur
from unclip_nb.shapes import render, scene_at

def rate(f, n:int, repeats:int=3) -> float:
    "How many of `n` a second of one core, in the best of several runs."
    def once():
        start = time.process_time()
        f()
        return time.process_time() - start
    f()
    return n / min(once() for _ in range(repeats))

def run() -> list[tuple[str, float, str]]:
    "Rows of (name, value, unit)."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)          # waiting threads would count as work
    try:
        rows = []
        for size, n in ((64, 100), (256, 30)):
            images = render([scene_at(i) for i in range(n)], size)
            for variant in ("full", "light"):
                rows.append((f"BSR {variant}, {size} -> {size // 4} px",
                             rate(lambda: bsr_degrade(images, generator("bench"), variant=variant),
                                  n), "pictures/s a core"))
            rows.append(
                (f"Gaussian blur, kernel 3, {size} px", rate(lambda: gaussian_blur(images),
                                                             n), "pictures/s a core"))
    finally:
        torch.set_num_threads(threads)
    return rows

if __name__ == "__main__":
    for name, value, unit in run():
        print(f"{name:<40}{value:>12,.0f} {unit}")

"How fast the shapes world is drawn and read: `python benchmarks/bench_shapes.py`."
import time
import torch
from unclip_nb.shapes import caption, read_scene, render, scene_at

def best(f, repeats=5):
    "Seconds of the fastest of several runs."
    def once():
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    f()
    return min(once() for _ in range(repeats))

def run() -> list[tuple[str, float, str]]:
    "Rows of (name, value, unit)."
    scenes = [scene_at(i) for i in range(1024)]
    batches = [scenes[i:i + 256] for i in range(0, 1024, 256)]
    rows = [(f"render {size} px, {torch.get_num_threads()} threads",
             1024 / best(lambda: [render(b, size) for b in batches]), "images/s")
            for size in (32, 64)]
    rows.append(("scene_at + caption",
                 1024 / best(lambda: [caption(scene_at(i)) for i in range(1024)]), "scenes/s"))
    images = render(scenes[:64], 64)
    return rows + [
        ("read_scene at 64 px", best(lambda: [read_scene(x)
                                              for x in images], 3) / 64 * 1e3, "ms/image")
    ]

if __name__ == "__main__":
    for name, value, unit in run():
        print(f"{name:<28}{value:>12,.1f} {unit}")

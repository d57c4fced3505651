"""What a CUDA card makes of a stage's training: examples a second, peak memory and utilisation, without and with torch.compile.

    python benchmarks/bench_gpu.py --stage decoder --preset small --steps 300

The steps are those of `unclip train` (accelerate, AdamW, the average), the model and the batch those of the preset. Pictures are shapes, rendered once and shown
again and again; embeddings, captions and token outputs are made up, in the sizes of the CLIP that belongs to the preset. So neither a data loader nor a CLIP is part
of the times. Utilisation: the FLOPs an example that `unclip info` counts, times examples a second, over the card's peak (989 TFLOP/s: H100 and H200, dense bf16)."""
import argparse, gc, itertools, sys, tempfile, time
from dataclasses import replace
import torch
import torch.nn.functional as F
from unclip_nb.cli import PRESETS, STAGES, Info, model_config, short, stage_class, stage_facts, train_config
from unclip_nb.core import UnclipError
from unclip_nb.shapes import render, scene_at
from unclip_nb.train import start_run, to_device, train_step

class Batches:
    "A few batches on the device, again and again; z_i and z_t come from a longer table, since some stages measure them before they start."
    def __init__(self, config, batch_size:int, device:str, few:int=4, table:int=8192):
        g, self.batch_size = torch.Generator().manual_seed(0), batch_size
        def has(*names): return all(hasattr(config, k) for k in names)
        def batch(k):
            out, n = {}, batch_size
            if has("low_size") or has("image_size"):
                out["image"] = render([scene_at(k * n + i) for i in range(n)], config.low_size *
                                      config.factor if has("low_size") else config.image_size)
            if has("vocab_size"):
                out["tokens"] = torch.randint(1,
                                              config.vocab_size, (n, config.context_length),
                                              generator=g)
            if has("clip_dim", "text_width"):
                out["text"] = torch.randn(n, config.context_length, config.text_width, generator=g)
            return out
        self.few = [to_device(batch(k), torch.device(device)) for k in range(few)]
        self.z = F.normalize(torch.randn(2, table, config.clip_dim, generator=g),
                             dim=-1).to(device) if has("clip_dim") else None

    def at(self, step:int, rank:int=0, world:int=1) -> dict:
        out = dict(self.few[step % len(self.few)])
        if self.z is not None:
            out["zi"], out["zt"] = self.z[:,
                                          torch.arange(step * self.batch_size,
                                                       (step + 1) * self.batch_size) %
                                          self.z.shape[1]]
        return out


def measure(stage: str,
            preset: str,
            steps: int,
            compile: bool,
            device: str = "cuda",
            batch_size: int | None = None,
            precision: str = "bf16",
            peak_tflops: float = 989.,
            warm: int = 20) -> dict:
    "Train a new model for `warm` steps, then for `steps` by the clock. Memory is the allocator's peak, weights and optimiser included; None off the GPU."
    facts = stage_facts(stage, Info(preset))
    if facts["training"] is None:
        raise UnclipError(f"the {preset} {stage} is pretrained, not trained: choose another stage")
    recipe, config, on_gpu = train_config(stage, preset), model_config(
        stage, preset), torch.device(device).type == "cuda"
    cfg = replace(recipe,
                  steps=warm + steps,
                  batch_size=batch_size or recipe.batch_size,
                  precision=precision,
                  compile=compile)
    torch.manual_seed(0)
    model, batches = stage_class(stage)[0](config), Batches(config, cfg.batch_size, device)
    with tempfile.TemporaryDirectory() as out:
        run = start_run(model, batches, cfg, out, device=device)
    model.train()
    feed = map(batches.at, itertools.count())
    def go(n):
        began = time.perf_counter()
        for _ in range(n):
            loss = train_step(run, feed)[0]
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, loss
    start = go(warm)[0]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = go(steps)
    speed = steps * cfg.batch_size * cfg.accumulate / seconds
    return dict(speed=speed,
                memory=torch.cuda.max_memory_allocated() if on_gpu else None,
                utilisation=facts["flops"] * speed / (peak_tflops * 1e12),
                batch=cfg.batch_size,
                accumulate=cfg.accumulate,
                start=start,
                loss=loss)

def main(argv:list[str]|None=None) -> int:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", choices=STAGES, default="decoder")
    p.add_argument("--preset", choices=PRESETS, default="small")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--batch-size", type=int, help="examples at once; the preset's by default")
    p.add_argument("--peak-tflops", type=float, default=989., help="of the card, dense bf16")
    c = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_gpu: no CUDA here, and this measures a card; benchmarks/run.py measures a CPU",
              file=sys.stderr)
        return 2
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {c.preset} {c.stage}, bf16, {c.steps} steps after 20 to warm up; utilisation of {c.peak_tflops:g} TFLOP/s"
    )
    print(
        f"{'':10}{'batch':>10}{'examples/s':>12}{'peak memory':>13}{'utilisation':>13}{'first steps':>13}{'loss':>9}"
    )
    for name, compiled in (("eager", False), ("compiled", True)):
        try:
            m = measure(c.stage,
                        c.preset,
                        c.steps,
                        compiled,
                        batch_size=c.batch_size,
                        peak_tflops=c.peak_tflops)
        except UnclipError as e:
            print(f"bench_gpu: {e}", file=sys.stderr)
            return 2
        print(
            f"{name:10}{m['batch']:>6} x {m['accumulate']}{m['speed']:>12.1f}{short(m['memory'], 'B'):>13}{m['utilisation']:>12.1%} {m['start']:>11.0f} s{m['loss']:>9.4f}",
            flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    return 0

if __name__ == "__main__":
    sys.exit(main())

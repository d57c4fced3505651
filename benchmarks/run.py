"""Every benchmark in one table: `make bench`, or `python benchmarks/run.py`. Medians; run it on an idle machine."""
import platform, statistics, sys, time
from pathlib import Path
import torch

sys.path.insert(0, str(Path(__file__).parent))

def median_time(fn, budget:float=6.0, least:int=3) -> float:
    "Median seconds of a call, after one to warm up, within about `budget` seconds."
    fn()
    times, began = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - began < budget:
        t = time.perf_counter()
        fn()
        times.append(time.perf_counter() - t)
    return statistics.median(times)

def training() -> list[tuple[str, float, str]]:
    "Steps a second of every stage at its preset's batch size, data included."
    from dataclasses import replace
    from unclip_nb.cli import ON_CLIP, STAGES, fit_to_clip, model_config, stage_class, train_config
    from unclip_nb.clip import CLIP
    from unclip_nb.core import data_path, generator
    from unclip_nb.data import Batches, ShapesData
    from unclip_nb.train import make_optimizer
    rows, clip = [], CLIP.from_pretrained(data_path("tiny")/"clip")
    for stage in STAGES:
        cfg, train = model_config(stage, "tiny"), train_config(stage, "tiny")
        if stage in ON_CLIP:
            cfg = fit_to_clip(cfg, clip)
        model = stage_class(stage)[0](
            cfg, tokenizer=clip.tokenizer) if stage == "clip" else stage_class(stage)[0](cfg)
        if train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        size = cfg.low_size * cfg.factor if stage.startswith("upsampler") else 32
        data = Batches(ShapesData(size=size),
                       train.batch_size,
                       tokenizer=clip.tokenizer,
                       distinct=stage == "clip",
                       prepare=clip.embed_batch if stage in ON_CLIP else None)
        model.start(data)
        optimizer, count = make_optimizer(model, train), iter(range(10 ** 9))
        def step():
            i = next(count)
            model.loss(data.at(i), generator(0, i)).backward()
            optimizer.step()
            optimizer.zero_grad()

        rows.append(
            (f"train {stage} (tiny, batch {train.batch_size})", 1 / median_time(step), "steps/s"))
    return rows

def drawing() -> list[tuple[str, float, str]]:
    "Captions to pictures of every size with the shipped weights and the defaults of `generate`; one at a time: `bench_upsampler`, in seconds."
    from unclip_nb.pipeline import UnCLIP
    from unclip_nb.shapes import EIGHT_CAPTIONS
    model = UnCLIP.from_pretrained("tiny")
    return [(f"captions to {size} px, 8 at a time",
             8 / median_time(lambda: model.generate(list(EIGHT_CAPTIONS), size=size),
                             least=1 if size > 128 else 3), "pictures/s") for size in model.sizes]

def main():
    import bench_ar_prior, bench_degradations, bench_prior, bench_shapes, bench_upsampler
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, device {'cuda' if torch.cuda.is_available() else 'cpu'}"
    )
    for rows in (bench_shapes.run, bench_degradations.run, training, drawing, bench_upsampler.run,
                 bench_prior.run, bench_ar_prior.run):
        for name, value, unit in rows():
            print(f"{name:58}{value:12.2f} {unit}", flush=True)

if __name__ == "__main__":
    main()

"""The tiny decoder's training step and sampling, and with --peer against DALLE2-pytorch's decoder and diffusers' U-Net at equal parameters (within 10 %).

    python benchmarks/bench_decoder.py                                     the tiny decoder, seconds, with patch=2 and patch=1
    python benchmarks/bench_decoder.py --peer [FOLDER] [--channels-last]   also the peers; DALLE2-pytorch in an environment of its own (.peer_env, made on first use)

All draw 32 px in float32 on one thread, learn with AdamW, and sample with DDIM and guidance 2. Times are the CPU's, not the clock's, and they take turns, so
that other work on the machine disturbs the ratios little. Three things are not equal. The peers are given caption encodings for nothing, ours encodes its captions
itself. Ours folds 2 x 2 pixels into one place (patch=2); it is also shown without (patch=1). And ours runs in PyTorch's channels_last memory format, a flag of its
training; the peers run in the default one, unless --channels-last gives it to them as well. --batch 4 --steps 2 --repeats 1 shows only whether it works."""
import argparse, statistics, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIP_DIM, TEXT, TOKENS, SIDE = 96, 128, 24, 32

def clock(fn) -> float:
    start = time.process_time()
    fn()
    return time.process_time() - start

# All under one face: `train(n)` is a training step of n pictures, `sample(n, steps)` draws n.

class Ours:
    name, last = "ours", True                                            # last: weights and pictures in channels_last
    def __init__(self, patch:int=2):
        import torch
        from dataclasses import replace
        from unclip_nb.decoder import Decoder, DecoderConfig
        torch.manual_seed(0)
        c = replace(DecoderConfig.tiny(),
                    whiten=False,
                    **{} if patch == 2 else dict(
                        patch=1, attention=(16, )))  # both attend at 16 pixels a side
        self.torch, self.model = torch, Decoder(c)
        self.ready()

    def ready(self):
        if self.last:
            self.model = self.model.to(memory_format=self.torch.channels_last)
        self.optimizer, self.parameters = self.torch.optim.AdamW(
            self.model.parameters(), 1e-4), sum(p.numel() for p in self.model.parameters())

    def batch(self, n):
        g = self.torch.Generator().manual_seed(0)
        def randn(*shape): return self.torch.randn(shape, generator=g)

        return dict(image=self.laid(randn(n, 3, SIDE, SIDE).clamp(-1, 1)),
                    zi=randn(n, CLIP_DIM) / CLIP_DIM**0.5,
                    text=randn(n, TOKENS, TEXT),
                    tokens=self.torch.randint(1, 500, (n, TOKENS), generator=g))

    def laid(self, x): return x.to(memory_format=self.torch.channels_last) if self.last else x
    def loss(self, b): return self.model.loss(b, self.torch.Generator().manual_seed(0))
    def train(self, n):
        self.model.train()
        self.loss(self.batch(n)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sample(self, n, steps):
        b = self.batch(n)
        self.model.eval().sample(b["zi"],
                                 b["tokens"],
                                 guidance=2.,
                                 steps=steps,
                                 generator=self.torch.Generator().manual_seed(0))

class Diffusers(Ours):
    "Its U-Net, its DDIM; z_i's four tokens stand behind the caption's."
    name = "diffusers"
    def __init__(self, last:bool=False):
        import torch
        self.last = last
        from unclip_nb.data import import_open_clip
        import_open_clip()                                               # diffusers imports torchvision: also where its compiled part cannot load
        from diffusers import DDIMScheduler, UNet2DConditionModel
        torch.manual_seed(0)
        self.torch, self.scheduler = torch, DDIMScheduler(beta_schedule="squaredcos_cap_v2")
        self.model = UNet2DConditionModel(sample_size=SIDE,
                                          in_channels=3,
                                          out_channels=3,
                                          block_out_channels=(48, 96),
                                          layers_per_block=2,
                                          down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                          mid_block_type="UNetMidBlock2DCrossAttn",
                                          up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                                          cross_attention_dim=TEXT,
                                          attention_head_dim=4,
                                          norm_num_groups=8)
        self.ready()

    def context(self, b):
        return self.torch.cat([b["text"], b["zi"].new_zeros(len(b["zi"]), 4, TEXT)], 1)
    def loss(self, b):
        g, noise = self.torch.Generator().manual_seed(0), self.torch.randn_like(b["image"])
        t = self.torch.randint(0, 1000, (len(noise),), generator=g)
        return (
            self.model(self.scheduler.add_noise(b["image"], noise, t), t, self.context(b)).sample -
            noise).square().mean()

    def sample(self, n, steps):
        b = self.batch(n)
        x, context = self.torch.randn_like(b["image"]), self.context(b)
        self.model.eval()
        self.scheduler.set_timesteps(steps)
        with self.torch.no_grad():
            for t in self.scheduler.timesteps:
                null, cond = self.model(self.torch.cat([x, x]), t,
                                        self.torch.cat([context * 0, context])).sample.chunk(2)
                x = self.scheduler.step(null + 2 * (cond - null), t, x).prev_sample

class Theirs(Ours):
    "DALLE2-pytorch's, in its own environment."
    name = "DALLE2-pytorch"
    def __init__(self, steps:int, last:bool=False):
        import torch
        self.last = last
        try:
            import torchvision
        except RuntimeError:                                             # its CUDA build beside a CPU-only torch
            self.lib = torch.library.Library("torchvision", "DEF")
            for op in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                       "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
                self.lib.define(op)
        from dalle2_pytorch import Decoder, Unet
        torch.manual_seed(0)
        unet = Unet(dim=48,
                    dim_mults=(1, 2),
                    image_embed_dim=CLIP_DIM,
                    text_embed_dim=TEXT,
                    cond_dim=TEXT,
                    cond_on_text_encodings=True,
                    max_text_len=TOKENS,
                    attn_heads=4,
                    attn_dim_head=32,
                    num_resnet_blocks=2)
        self.torch, self.model = torch, Decoder(unet,
                                                image_size=SIDE,
                                                timesteps=1000,
                                                sample_timesteps=steps)
        self.ready()

    def loss(self, b):
        return self.model(b["image"] / 2 + 0.5, image_embed=b["zi"], text_encodings=b["text"])
    def sample(self, n, steps):
        b = self.batch(n)
        with self.torch.no_grad():
            self.model.eval().sample(image_embed=b["zi"], text_encodings=b["text"], cond_scale=2.)

def run(batch:int=32, steps:int=20, repeats:int=3):
    "Rows (name, value, unit): the tiny decoder alone."
    for patch in (2, 1):
        ours = Ours(patch)
        ours.train(batch)
        ours.sample(2, 2)
        yield f"decoder, patch={patch}: training step, batch {batch}", statistics.median(
            clock(lambda: ours.train(batch)) for _ in range(repeats)), "CPU s"
        yield f"decoder, patch={patch}: {batch} pictures, guidance, {steps} steps", statistics.median(
            clock(lambda: ours.sample(batch, steps)) for _ in range(repeats)), "CPU s"

def serve(threads:int, steps:int, last:bool):
    "The peer's side: a line `sample 2 64` or `train 32` in, seconds out."
    import torch
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr                         # whatever it prints is no answer
    theirs = Theirs(steps, last)
    print(theirs.parameters, file=answers, flush=True)
    for line in sys.stdin:
        task, *sizes = line.split()
        print(clock(lambda: getattr(theirs, task)(*map(int, sizes))), file=answers, flush=True)


def against_peers(folder: Path,
                  batch: int = 64,
                  steps: int = 20,
                  repeats: int = 3,
                  tasks=("train", "sample"),
                  last: bool = False):
    "Rows (name, value, unit): parameters, then each task of everyone, and how many times as fast ours is."
    import torch
    from bench_prior import make_env
    torch.set_num_threads(1)
    worker = subprocess.Popen([
        make_env(folder), __file__, "--serve", "1", "--steps",
        str(steps), *["--channels-last"] * last
    ],
                              stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL,
                              text=True)
    first = worker.stdout.readline()
    if not first:
        raise SystemExit(
            f"the peer does not start: try {folder}/bin/python {__file__} --serve 1; or delete {folder}"
        )
    def theirs(*task):
        worker.stdin.write(" ".join(map(str, task)) + "\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())
    models = {"ours": Ours(), "ours, patch=1": Ours(patch=1), "diffusers": Diffusers(last)}
    who = {
        k: lambda *task, m=m: clock(lambda: getattr(m, task[0])(*task[1:]))
        for k, m in models.items()
    } | {"DALLE2-pytorch": theirs}
    for k, m in models.items():
        yield f"parameters: {k}", m.parameters / 1e6, "M"
    yield "parameters: DALLE2-pytorch", int(first) / 1e6, "M"
    for task in (("train", batch), ("sample", batch, steps)):
        if task[0] not in tasks:
            continue
        what = f"training step, batch {batch}" if task[
            0] == "train" else f"{batch} pictures, guidance, {steps} steps"
        if task[0] == "train":
            [f(*task) for f in who.values()]          # warm up
        rounds = [{k: f(*task) for k, f in who.items()} for _ in range(repeats)]
        for k in who:
            yield f"{k}: {what}", statistics.median(r[k] for r in rounds), "CPU s"
            if k != "ours":
                yield "  ours is so many times as fast", statistics.median(r[k] / r["ours"]
                                                                           for r in rounds), "x"
    worker.stdin.close()
    worker.wait()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer",
                        nargs="?",
                        type=Path,
                        const=ROOT / ".peer_env",
                        metavar="FOLDER",
                        help="compare with the peers; DALLE2-pytorch's environment lies here")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=["train", "sample"], help="train, sample")
    parser.add_argument("--channels-last",
                        action="store_true",
                        help="the peers in channels_last, too; ours always is")
    parser.add_argument("--serve", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve(a.serve, a.steps, a.channels_last)
        sys.exit()
    rows = against_peers(a.peer, a.batch, a.steps, a.repeats, a.tasks,
                         a.channels_last) if a.peer else run(a.batch, a.steps, a.repeats)
    for name, value, unit in rows:
        print(f"{name:62} {value:10.3f} {unit}", flush=True)

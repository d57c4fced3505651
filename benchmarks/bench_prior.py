"""The diffusion prior's sampling with and without its cache, and with --peer against DALLE2-pytorch's at equal size.

    python benchmarks/bench_prior.py                     the tiny prior, seconds
    python benchmarks/bench_prior.py --peer [FOLDER]     also the peer, in an environment of its own that is made on first use (.peer_env)

Both are given the same sizes, threads, number of steps, guidance and draws, take turns on the same machine, and are timed without
their CLIPs. Run it on an idle machine; --steps 2 --repeats 1 shows only whether it works."""
import argparse, os, statistics, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, DEPTH, HEADS, TOKENS = 512, 6, 8, 77                              # embeddings and token outputs have the same width
PEER = ["torch==2.13.0", "torchvision==0.28.0", "dalle2-pytorch", "setuptools<80"]

def clock(fn) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start

def run(captions:int=8, steps:int=64, repeats:int=3):
    "Rows (name, value, unit): the tiny prior, two draws a caption, guidance 2, with and without its cache."
    import torch, torch.nn.functional as F
    from unclip_nb.core import generator, randn
    from unclip_nb.diffusion_prior import DiffusionPrior, PriorConfig
    torch.manual_seed(0)
    prior, c, g = DiffusionPrior(
        PriorConfig.tiny()).eval(), PriorConfig.tiny(), generator("bench prior")
    text, zt = randn((captions, c.context_length, c.text_width), g), F.normalize(randn(
        (captions, c.clip_dim), g),
                                                                                 dim=1)
    text[:, 14:] = 0                                                     # captions of 14 tokens

    def seconds(cache):
        return clock(lambda: prior.sample(
            text, zt, steps=steps, guidance=2., generator=generator(0), cache=cache))
    seconds(True)                                                        # warm up
    pairs = [(seconds(True), seconds(False)) for _ in range(repeats)]    # alternating, so that both meet the same machine
    fast, slow = (statistics.median(p) for p in zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    what = f"{captions} captions, {steps} steps"
    return [(f"prior sampling with cache ({what})", fast, "s"),
            (f"prior sampling without cache ({what})", slow, "s"),
            ("prior cache speed-up", ratio, "x"),
            ("prior samples with cache", captions / fast, "captions/s")]

# Both priors under one face: `sample(batch, steps)` and `train(batch)` do it once.

class Ours:
    def __init__(self):
        import torch
        from unclip_nb.diffusion_prior import DiffusionPrior, PriorConfig
        torch.manual_seed(0)
        self.torch, self.prior = torch, DiffusionPrior(
            PriorConfig(clip_dim=WIDTH,
                        text_width=WIDTH,
                        context_length=TOKENS,
                        width=WIDTH,
                        layers=DEPTH,
                        heads=HEADS))
        self.optimizer, self.parameters = torch.optim.AdamW(self.prior.parameters(), 1e-4), sum(
            p.numel() for p in self.prior.parameters())

    def batch(self, n):
        g, F = self.torch.Generator().manual_seed(0), self.torch.nn.functional
        zi, zt = (F.normalize(self.torch.randn(n, WIDTH, generator=g), dim=1) for _ in range(2))
        return dict(zi=zi, zt=zt, text=self.torch.randn(n, TOKENS, WIDTH, generator=g))

    def sample(self, n, steps):
        b = self.batch(n)
        self.prior.eval().sample(b["text"],
                                 b["zt"],
                                 steps=steps,
                                 guidance=2.,
                                 candidates=2,
                                 sampler="ddpm",
                                 generator=self.torch.Generator().manual_seed(0))

    def train(self, n):
        self.prior.train().loss(self.batch(n), self.torch.Generator().manual_seed(0)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

class Theirs(Ours):
    "DALLE2-pytorch's, in its own environment."
    def __init__(self):
        import torch
        try:
            import torchvision
        except RuntimeError:                                             # its CUDA build beside a CPU-only torch
            self.lib = torch.library.Library("torchvision", "DEF")
            for op in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                       "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
                self.lib.define(op)
        from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork
        torch.manual_seed(0)
        net = DiffusionPriorNetwork(dim=WIDTH,
                                    depth=DEPTH,
                                    heads=HEADS,
                                    dim_head=WIDTH // HEADS,
                                    max_text_len=TOKENS)
        self.torch, self.prior = torch, DiffusionPrior(net,
                                                       image_embed_dim=WIDTH,
                                                       timesteps=1000,
                                                       cond_drop_prob=0.1)
        self.optimizer, self.parameters = torch.optim.AdamW(self.prior.parameters(), 1e-4), sum(
            p.numel() for p in self.prior.parameters())

    def sample(self, n, steps):
        b = {k: v.repeat_interleave(2, 0) for k, v in self.batch(n).items()}     # its `sample` draws two and needs a CLIP; this is what lies inside
        self.prior.eval().p_sample_loop((2 * n, WIDTH),
                                        text_cond=dict(text_embed=b["zt"],
                                                       text_encodings=b["text"]),
                                        cond_scale=2.,
                                        timesteps=steps + 1)  # its n+1 points are n steps

    def train(self, n):
        b = self.batch(n)
        self.prior.train()(text_embed=b["zt"], text_encodings=b["text"],
                           image_embed=b["zi"]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

def serve(threads:int):
    "The peer's side: a line `sample 2 64` or `train 32` in, seconds out."
    import torch
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr                         # whatever it prints is no answer
    theirs = Theirs()
    print(theirs.parameters, file=answers, flush=True)
    for line in sys.stdin:
        task, *sizes = line.split()
        print(clock(lambda: getattr(theirs, task)(*map(int, sizes))), file=answers, flush=True)

def make_env(folder:Path) -> Path:
    "The peer's environment, made where it is missing; its Python."
    python = folder/("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder/".ready").exists():
        print(f"making {folder} with {' '.join(PEER)} ...", flush=True)
        env = os.environ | {
            "UV_FIND_LINKS": os.environ.get("UV_FIND_LINKS", ",".join(
                os.environ.get("PIP_FIND_LINKS", "").split()))
        }
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        uv = Path(sys.executable).with_name("uv")
        if not (uv.exists() and subprocess.run(
            [uv, "pip", "install", "-q", "--python", python, *PEER], env=env).returncode == 0):
            subprocess.run([python, "-m", "pip", "install", "-q", *PEER], check=True)
        (folder/".ready").touch()
    return python

def against_peer(folder:Path, batches=(2, 32), steps:int=64, train:int=32, repeats:int=3):
    "Rows (name, value, unit): ours, theirs and their ratio for sampling and for a training step."
    import torch
    worker = subprocess.Popen([make_env(folder), __file__, "--serve",
                               str(torch.get_num_threads())],
                              stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL,
                              text=True)
    def theirs(*task):
        worker.stdin.write(" ".join(map(str, task)) + "\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())
    first = worker.stdout.readline()
    if not first:
        raise SystemExit(
            f"the peer does not start: try {folder}/bin/python {__file__} --serve 1; or delete {folder}"
        )
    ours = Ours()
    yield "parameters: ours", ours.parameters / 1e6, "M"
    yield "parameters: DALLE2-pytorch", int(first) / 1e6, "M"
    for task, n, *rest in [("sample", b, steps) for b in batches] + [("train", train)]:
        what = f"{n} captions, two draws, guidance, {steps} steps" if task == "sample" else f"training step, batch {n}"
        def mine(*a): return clock(lambda: getattr(ours, task)(*a))
        for warm in (mine, lambda *a: theirs(task, *a)): warm(n, *[min(r, 2) for r in rest])
        pairs = [(mine(n, *rest), theirs(task, n, *rest)) for _ in range(repeats)]
        yield f"ours: {what}", statistics.median(a for a, _ in pairs), "s"
        yield f"DALLE2-pytorch: {what}", statistics.median(b for _, b in pairs), "s"
        yield "  times as fast", statistics.median(b / a for a, b in pairs), "x"
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
                        help="compare with DALLE2-pytorch; its environment lies here")
    parser.add_argument("--batch",
                        nargs="+",
                        type=int,
                        default=[2, 32],
                        help="captions at a time, against the peer")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve(a.serve)
        sys.exit()
    rows = against_peer(a.peer, a.batch, a.steps, repeats=a.repeats) if a.peer else run(
        steps=a.steps, repeats=a.repeats)
    for name, value, unit in rows:
        print(f"{name:70} {value:10.3f} {unit}", flush=True)

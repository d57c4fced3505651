"`accelerate launch` with two processes (gloo, on the CPU) in front of `unclip train all`: the losses of one process that sees both shares."
import json, math, os, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from conftest import ROOT
from unclip_nb import cli, core, data

STEPS, BATCH = 3, dict(clip=16, prior=16, ar_prior=16, decoder=4, upsampler1=2, upsampler2=1)
SIZES = dict(clip=dict(vision_width=8, text_width=32, text_layers=1),
             prior=dict(width=32, layers=1, heads=2),
             ar_prior=dict(width=32, layers=1, heads=2),
             decoder=dict(channels=16,
                          res_blocks=1,
                          head_channels=16,
                          text_layers=1,
                          text_width=32,
                          text_heads=2,
                          whiten=False,
                          learned_variance=True),
             upsampler1=dict(channels=16),
             upsampler2=dict(channels=16))
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]                 # `accelerate-launch`, which is `accelerate launch`
COMMAND = "import unclip_nb.cli as cli\ncli.stage_preview = lambda *a: None   # pictures of untrained networks: slow, and no part of this\ncli.main()\n"
Batches = data.Batches

def flags(out, stages=cli.STAGES):
    "The command's words: a few steps of tiny networks, every loss logged, one recipe for all."
    words = ["--preset", "nano", "--out", out, "--device", "cpu"]
    for s in stages:
        for k, v in SIZES[s].items():
            words += [f"--{s}.model.{'no-' if v is False else ''}{k}"
                      ] + [v] * (not isinstance(v, bool))
        for k, v in dict(steps=STEPS,
                         batch_size=BATCH[s],
                         log_every=1,
                         lr=1e-3,
                         warmup=1,
                         schedule="constant",
                         preview_every=9).items():
            words += [f"--{s}.train.{k}", v]
    return [str(w).replace("_", "-") if str(w).startswith("--") else str(w) for w in words]

def log(folder): return [json.loads(l) for l in (folder/"log.jsonl").read_text().splitlines()]

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Every stage, trained by two processes that the launcher starts."
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = tmp_path_factory.mktemp("pair")
    (script := out/"unclip.py").write_text(COMMAND)
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run([
        *LAUNCH, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
        "no", "--dynamo_backend", "no", "--main_process_port",
        str(port), script, "train", "all", *flags(out / "system")
    ],
                          capture_output=True,
                          text=True,
                          timeout=900,
                          env=env,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained clip") == 1                       # one of the two speaks
    return out/"system"

def test_all_stages_and_one_system(pair):
    assert json.loads((pair/"unclip.json").read_text())["stages"] == list(cli.STAGES)
    assert json.loads((pair/"decoder"/"config.json").read_text())["learned_variance"]        # its loss is the hybrid one
    for s in cli.STAGES:
        state = json.loads((sorted((pair/s/"checkpoints").iterdir())[-1]/"state.json").read_text())
        assert state["processes"] == 2 and len(log(
            pair / s)) == STEPS and (pair / s / "run.json").exists()

KEYS = {}
def remember(*key):
    "A generator of `fit`'s, and what it is called, but for the number of the process."
    g = core.generator(*key)
    KEYS[g.initial_seed()] = key[:-1]
    return g

def whole(cls):
    "The same stage for one process with both shares in its batch: each share keeps the randomness it had in its own process."
    if cls.name == "clip":
        return cls                                   # draws nothing; its contrast is over the whole batch
    class Whole(cls):
        def start(self, batches): super().start(batches.share)
        def finish(self, batches, step): pass
        def loss(self, batch, generator):
            n, key = len(batch["image"]) // 2, KEYS[generator.initial_seed()]
            def part(r): return {k: v[r * n:(r + 1) * n] for k, v in batch.items()}

            return sum(super(Whole, self).loss(part(r), core.generator(*key, r))
                       for r in range(2)) / 2
    Whole.name, Whole.__name__ = cls.name, cls.__name__
    return Whole

class Both(Batches):
    "Batches of both shares together."
    def __init__(self, *a, **kw):
        super().__init__(*a, **kw)
        self.share = Batches(*a, **kw)
    def at(self, step, rank=0, world=1):
        a, b = (self.share.at(step, r, 2) for r in range(2))
        return {k: torch.cat([a[k], b[k]]) if torch.is_tensor(a[k]) else [*a[k], *b[k]] for k in a}

@pytest.mark.parametrize("stage", cli.STAGES)
def test_two_processes_lose_what_one_loses(pair, stage, tmp_path, monkeypatch):
    stages = cli.stage_class
    monkeypatch.setattr(cli, "stage_class", lambda s: (whole(stages(s)[0]), stages(s)[1]))
    monkeypatch.setattr(data, "Batches", Both)
    monkeypatch.setattr("unclip_nb.train.generator", remember)
    monkeypatch.setattr(cli, "stage_preview", lambda *a: None)
    clip = ["--clip", str(pair/"clip")] if stage in cli.ON_CLIP else []
    if stage == "upsampler2":
        shutil.copytree(pair/"upsampler1", tmp_path/"upsampler1")      # it starts from the system's first
    torch.manual_seed(1)
    cli.main(["train", stage, *flags(tmp_path, [stage]), *clip])
    one, two = log(tmp_path/stage), log(pair/stage)
    assert len(one) == len(two) == STEPS and one[0]["loss"] != one[1]["loss"]
    for a, b in zip(one, two):
        assert math.isclose(a["loss"], b["loss"], rel_tol=2e-5) and math.isclose(
            a["grad_norm"], b["grad_norm"], rel_tol=1e-3), (a, b)
    ours, theirs = (torch.cat(
        [v.flatten().float() for v in load_file(f / stage / "model.safetensors").values()])
                    for f in (tmp_path, pair))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()

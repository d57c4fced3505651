"`accelerate launch` in front of `unclip train all` (gloo, on the CPU): the losses of one process that sees the same rows, sharded or not."
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from unclip_nb import cli

STEPS = 3
BATCH = dict(clip=16, prior=16, ar_prior=16, decoder=4, upsampler1=2, upsampler2=1)
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
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]     # `accelerate-launch`
# pictures of untrained networks are slow, and no part of this
COMMAND = """import unclip_nb.cli as cli
cli.stage_preview = lambda *a: None
cli.main()
"""
LONG = pytest.mark.skipif(not os.environ.get("UNCLIP_LONG"),
                          reason="a minute or more each: set UNCLIP_LONG=1")
WAYS = ["2 sharded", pytest.param("2 whole", marks=LONG), pytest.param("4 sharded", marks=LONG)]

def flags(out, stages=cli.STAGES, processes=1, **more):
    "The command's words: a few steps of tiny networks, every loss logged, one recipe for all."
    words = ["--preset", "nano", "--out", out, "--device", "cpu"]
    for s in stages:
        recipe = dict(steps=STEPS, batch_size=BATCH[s], log_every=1, lr=1e-3, warmup=1,
                      schedule="constant", preview_every=9) | more
        if s == "clip":                                # its contrast is over all rows of a step
            recipe["batch_size"] *= processes
        else:
            recipe["accumulate"] = processes
        for part, values in (("model", SIZES[s]), ("train", recipe)):
            for k, v in values.items():
                words.append(f"--{s}.{part}.{'no-' if v is False else ''}{k}")
                words += [] if isinstance(v, bool) else [v]
    return [str(w).replace("_", "-") if str(w).startswith("--") else str(w) for w in words]

def log(folder):
    return [json.loads(line) for line in (folder/"log.jsonl").read_text().splitlines()]

@pytest.fixture(scope="module", params=WAYS)
def several(request, tmp_path_factory):
    "Every stage, trained by the processes that the launcher starts: how many, and the system."
    n, way = request.param.split()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = tmp_path_factory.mktemp("several")
    script = out/"unclip.py"
    script.write_text(COMMAND)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                        "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    launch = ["--multi_gpu", "--num_processes", n, "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", str(port), script]
    words = flags(out/"system", shard=way == "sharded")
    done = subprocess.run([*LAUNCH, *launch, "train", "all", *words], capture_output=True, text=True,
                          timeout=900, env=env, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained clip") == 1                       # one of them speaks
    return int(n), way, out/"system"

def test_all_stages_and_one_system(several):
    n, way, system = several
    assert json.loads((system/"unclip.json").read_text())["stages"] == list(cli.STAGES)
    assert json.loads((system/"decoder"/"config.json").read_text())["learned_variance"]  # hybrid loss
    for s in cli.STAGES:
        last = sorted((system/s/"checkpoints").iterdir())[-1]
        state = json.loads((last/"state.json").read_text())
        assert state["processes"] == n and len(log(system/s)) == STEPS
        assert len(list(last.glob("shard-*.safetensors"))) == (n if way == "sharded" else 0)
        assert (system/s/"run.json").exists() and not list(system.rglob("*.distcp"))

@pytest.mark.parametrize("stage", cli.STAGES)
def test_several_processes_lose_what_one_loses(several, stage, tmp_path, monkeypatch):
    n, _, system = several
    monkeypatch.setattr(cli, "stage_preview", lambda *a: None)
    clip = ["--clip", str(system/"clip")] if stage in cli.ON_CLIP else []
    if stage == "upsampler2":
        shutil.copytree(system/"upsampler1", tmp_path/"upsampler1")      # it starts from the system's first
    torch.manual_seed(1)
    cli.main(["train", stage, *flags(tmp_path, [stage], n), *clip])
    one, many = log(tmp_path/stage), log(system/stage)
    assert len(one) == len(many) == STEPS and one[0]["loss"] != one[1]["loss"]
    for a, b in zip(one, many):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5), (a, b)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-3), (a, b)
    ours, theirs = (load_file(f/stage/"model.safetensors") for f in (tmp_path, system))
    assert ours.keys() == theirs.keys()
    far = sum((ours[k].float() - theirs[k].float()).square().sum() for k in ours)
    assert far < 1e-6 * sum(v.float().square().sum() for v in theirs.values())

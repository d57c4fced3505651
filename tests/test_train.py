"The training loop against hand-written loops and closed forms, and against everything that goes wrong: kills, NaNs, full disks, damaged files."
import errno, json, math, os, resource, shutil, signal, subprocess, sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import pytest, torch
from PIL import Image
from torch import nn
import unclip_nb.train as train
from unclip_nb.core import UnclipError
from unclip_nb.train import Interrupt, Stage, TrainConfig, ahead, checkpoints, config_from, ema_update, fit, lr_at, make_optimizer, read_log

@dataclass
class ToyConfig:
    width:int = 8
    dropout:float = 0.1
    noise:float = 0.5
    sizes:tuple[int, ...] = (1, 2)

class Toy(Stage):
    name = "toy"
    def __init__(self, config:ToyConfig):
        super().__init__(config)
        if config.width % 2:
            raise ValueError("width must be even")
        w, self.started = config.width, 0
        self.net = nn.Sequential(nn.Linear(3, w), nn.LayerNorm(w), nn.GELU(),
                                 nn.Dropout(config.dropout), nn.Linear(w, 3))
        self.register_buffer("mean", torch.zeros(3))
    def start(self, batches): self.started += 1; self.mean.copy_(batches.at(0)["x"].mean(0))
    def loss(self, batch, generator):
        x = batch["x"] - self.mean
        return (self.net(x + self.config.noise * torch.randn(x.shape, generator=generator).to(x)) -
                x).square().mean()

class Points:
    batch_size = 6
    def at(self, step, rank=0, world=1):
        x = torch.randn(self.batch_size * world, 3, generator=torch.Generator().manual_seed(step))
        return {
            "x": x[rank * self.batch_size:(rank + 1) * self.batch_size],
            "caption": ["a point"] * self.batch_size
        }

def toy(**kw): torch.manual_seed(0); return Toy(ToyConfig(**kw))
def run(out, model=None, batches=None, resume=False, preview=None, **kw):
    return fit(model or toy(),
               batches or Points(),
               replace(CFG, **kw),
               out,
               preview,
               resume,
               device="cpu",
               progress=False)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
def names(out): return [c.name for c in checkpoints(out)]
def junk(out): return [p for p in Path(out).parent.rglob(".tmp*")]
CFG = TrainConfig(steps=30, batch_size=6, lr=1e-2, warmup=5, save_every=10, log_every=7)

# ---------------------------------------------------------------- closed forms

def test_cosine_and_constant():
    c = TrainConfig(steps=100, warmup=10, lr=3.0)
    for s in range(100):
        want = 3 * (s + 1) / 10 if s < 10 else 1.5 * (1 + math.cos(math.pi * (s - 10) / 90))
        assert lr_at(s, c) == pytest.approx(want)
        assert lr_at(s,
                     replace(c,
                             schedule="constant")) == pytest.approx(min(want, 3) if s < 10 else 3)

@pytest.mark.parametrize("steps", [10, 37, 400])
def test_onecycle_equals_torch(steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for s in range(steps):
        assert lr_at(s, TrainConfig(steps=steps, lr=2e-3,
                                    schedule="onecycle")) == pytest.approx(theirs.get_last_lr()[0],
                                                                           rel=1e-9,
                                                                           abs=1e-12)
        optimizer.step()
        s + 1 < steps and theirs.step()

@pytest.mark.parametrize("schedule", ["cosine", "constant", "onecycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_runs_have_a_rate(schedule, steps):
    for s in range(steps):
        assert 0 < lr_at(s, TrainConfig(steps=steps, warmup=0, schedule=schedule, lr=1.0)) <= 1

def test_ema_closed_form():
    model, ema = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    ws, want = torch.randn(200, generator=torch.Generator().manual_seed(0)).double(), []
    d = [min(0.9, (1 + s) / (10 + s)) for s in range(200)]
    start = ema.weight.item()
    for s, w in enumerate(ws):
        model.weight.data.fill_(w)
        ema_update(ema, model, s, 0.9)
    want = start * math.prod(d) + sum(
        (1 - d[i]) * math.prod(d[i + 1:]) * ws[i].item() for i in range(200))
    assert ema.weight.item() == pytest.approx(want, rel=1e-10)

def test_who_decays():
    decay, rest = make_optimizer(toy(), TrainConfig(weight_decay=0.1)).param_groups
    assert [g["weight_decay"] for g in (decay, rest)] == [0.1, 0.0]
    assert all(p.ndim == 2 for p in decay["params"]) and all(
        p.ndim == 1 for p in rest["params"]) and len(decay["params"] + rest["params"]) == 6

def test_muon_steps_along_the_gradients_directions_all_equally_long():
    "Against an SVD: the first step of every matrix is U V^T, of AdamW's usual length; that of a vector AdamW's with Nesterov's look-ahead, 1 + beta1 times the sign of the gradient."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 24, 3), nn.GroupNorm(2, 24), nn.Conv2d(24, 16, 3))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = make_optimizer(net, TrainConfig(optimizer="muon", lr=0.01))
    net(torch.randn(8, 4, 9, 9)).square().mean().backward()
    optimizer.step()
    for p, b in zip(net.parameters(), before):
        step = (b - p.detach()) / 0.01
        if p.ndim == 1:
            torch.testing.assert_close(step, 1.9 * p.grad.sign(), rtol=1e-2, atol=1e-2)
            continue
        g, step = p.grad.flatten(
            1).double(), step.flatten(1).double() / (0.2 * max(p.grad.flatten(1).shape)**0.5)
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        along, loud = u.T @ step @ v.T, s > 0.03 * s.max()
        assert loud.sum() > 8 and (along.diagonal()[loud] - 1).abs().max() < 0.35 and (
            along - along.diagonal().diag()).abs().max() < 0.05

# ---------------------------------------------------------------- the loop

def by_hand(model, cfg, batch):
    "AdamW from its definition, clipping, schedule and EMA, without torch.optim."
    params = list(model.parameters())
    m, v = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    ema = [p.detach().clone() for p in params]
    for step in range(cfg.steps):
        grads = torch.autograd.grad(model.loss(batch(step), None), params)
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        lr, d = lr_at(step, cfg), min(cfg.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(params, grads)):
                g = g * min(1, cfg.clip_norm / norm)
                if p.ndim > 1:
                    p -= lr * cfg.weight_decay * p
                m[i] = cfg.beta1 * m[i] + (1 - cfg.beta1) * g
                v[i] = cfg.beta2 * v[i] + (1 - cfg.beta2) * g * g
                p -= lr * (m[i] / (1 - cfg.beta1**(step + 1))) / (
                    (v[i] / (1 - cfg.beta2**(step + 1))).sqrt() + cfg.eps)
                ema[i] = d * ema[i] + (1 - d) * p
    return ema

def test_equals_a_loop_written_by_hand(tmp_path):
    cfg = dict(steps=25, weight_decay=0.3, clip_norm=0.2, ema_decay=0.8)
    model = run(tmp_path, toy(dropout=0, noise=0), **cfg)
    reference = toy(dropout=0, noise=0)
    reference.start(Points())
    for ours, theirs in zip(model.parameters(), by_hand(reference, replace(CFG, **cfg),
                                                        Points().at)):
        assert torch.allclose(ours, theirs, atol=2e-6), (ours - theirs).abs().max()
    norms = [r["grad_norm"] for r in read_log(tmp_path)]
    assert max(norms) > 0.2 and not model.training     # it did clip

def test_accumulation_equals_a_larger_batch(tmp_path):
    class Small(Points):
        batch_size = 3

        def at(self, step, rank=0, world=1):
            return {"x": Points().at(step // 2)["x"][3 * (step % 2):][:3]}
    class Start(Toy): # the same statistics for both
        def start(self, batches): pass
    torch.manual_seed(0)
    a = Start(ToyConfig(dropout=0, noise=0))
    torch.manual_seed(0)
    b = Start(ToyConfig(dropout=0, noise=0))
    run(tmp_path / "a", a)
    run(tmp_path / "b", b, Small(), accumulate=2)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.parameters(), b.parameters()))

def test_log_curve_previews_and_files(tmp_path):
    seen = []
    def preview(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return Image.new("RGB", (4, 4))
    out = tmp_path / "deep" / "run"
    model = run(out, preview=preview, preview_every=20, steps=25)
    rows = read_log(out)
    assert [r["step"] for r in rows] == [7, 14, 21, 25] and set(
        rows[0]) == {"step", "loss", "lr", "grad_norm", "images_per_s", "seconds"}
    assert [r["lr"]
            for r in rows] == [lr_at(s - 1, replace(CFG, steps=25)) for s in (7, 14, 21, 25)]
    assert sorted(p.name for p in out.rglob("*.png")) == [
        "loss.png", "step_000020.png", "step_000025.png"
    ] and seen == [(False, False)] * 2
    assert names(out) == ["step_00000020", "step_00000025"] and model.started == 1
    assert sorted(p.name for p in checkpoints(out)[-1].iterdir()) == [
        "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"
    ]
    assert same(Toy.from_pretrained(out), model) and not junk(out)
    assert not [p for p in out.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]

def test_bf16_channels_last_and_other_settings_one_after_another(tmp_path):
    a = run(tmp_path / "a")
    b = run(tmp_path / "b", precision="bf16", channels_last=True)
    c = run(tmp_path / "c")
    assert same(a, c) and not same(a, b) and all(p.dtype == torch.float32 for p in b.parameters())
    assert max((x - y).abs().max() for x, y in zip(a.parameters(), b.parameters())) < 0.1
    assert type(b).forward is Stage.forward and "forward" not in vars(b)    # accelerate left the stage alone

def test_ahead_keeps_order_and_passes_errors_on():
    assert list(ahead(lambda s: s, range(5), True)) == list(ahead(lambda s: s, range(5),
                                                                  False)) == [0, 1, 2, 3, 4]
    assert list(ahead(lambda s: s, range(3, 3), True)) == []
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda s: 1 // (2 - s), range(5), True))

# ---------------------------------------------------------------- stopping and resuming

SCRIPT = '''
import os, random, select, signal, sys, time
sys.path.insert(0, sys.argv[1])
import accelerate, torch, torch._dynamo, tqdm # once, for they are slow: the trainings below are forks of this process
torch.set_num_threads(1)
from pathlib import Path
from test_train import CFG, Points, checkpoints, junk, run, toy, train
train.start_run(toy(), Points(), CFG, sys.argv[2] + "/warm", device="cpu")
train.plot_loss = lambda out: None
work, rng = Path(sys.argv[2]), random.Random(0)

def child(out, target=None, saving=False):
    "A process that trains; it tells its step, and lingers once past `target` (or in the middle of the next save)."
    r, w = os.pipe(); pid = os.fork()
    if pid: os.close(w); return pid, r
    class Telling(Points):
        def at(self, step, rank=0, world=1):
            if target is not None and not saving and step >= target: os.write(w, b"x"); time.sleep(0.02)
            return super().at(step, rank, world)
    if saving:
        fsync, calls = os.fsync, []
        def slow(fd):
            fsync(fd); calls.append(fd)
            if len(calls) > target: os.write(w, b"x"); time.sleep(600)
        os.fsync = slow
    try: run(out, batches=Telling(), resume=True, steps=60, keep=2); os._exit(0)
    except BaseException as e: print(repr(e), file=sys.stderr); os._exit(1)

pid, _ = child(work / "whole"); assert os.waitpid(pid, 0)[1] == 0
targets = sorted(rng.sample(range(5, 45), 5)); mid_save = rng.randrange(4)
for i, target in enumerate(targets):
    pid, r = child(work / "killed", rng.randrange(6, 10) if i == mid_save else target, saving=i == mid_save)
    assert select.select([r], [], [], 300)[0], "it never got there"
    if i != mid_save: time.sleep(rng.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it had ended before it was killed"
    if i == mid_save: assert [j for j in junk(work / "killed") if j.is_dir()], "nothing half-written, so it was not killed while saving"
    print(i, "killed", "in a save" if i == mid_save else f"after step {target}", [c.name for c in checkpoints(work / "killed")])
pid, _ = child(work / "killed"); assert os.waitpid(pid, 0)[1] == 0
'''

def test_killed_five_times_ends_bit_for_bit_the_same(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT,
                           str(Path(__file__).parent),
                           str(tmp_path)],
                          capture_output=True,
                          text=True,
                          timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed") == 5 and "in a save" in done.stdout
    a, b = tmp_path / "whole", tmp_path / "killed"
    assert names(a) == names(b) and not junk(b)
    for f in sorted(a.rglob("*.safetensors")):
        assert f.read_bytes() == (b / f.relative_to(a)).read_bytes(), f
    curve = lambda out: [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in read_log(out)]
    assert curve(a) == curve(b) and len(curve(a)) == 9

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_saves_and_says_how_to_go_on(tmp_path, number, capfd):
    class Stopping(Points):
        def at(self, step, rank=0, world=1):
            if step == 12:
                signal.raise_signal(number)
            return super().at(step, rank, world)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        fit(toy(), Stopping(), CFG, tmp_path / "b", device="cpu")
    assert signal.getsignal(number) is before and "--resume" in capfd.readouterr().err
    assert names(tmp_path / "b")[-1] == "step_00000013"
    assert same(run(tmp_path / "a"), run(tmp_path / "b", resume=True))

def test_muon_resumes_exactly(tmp_path):
    whole = run(tmp_path / "a", toy(width=16), optimizer="muon")
    run(tmp_path / "b", toy(width=16), optimizer="muon", schedule="cosine", steps=30, save_every=10)
    for late in names(tmp_path / "b")[1:]:
        shutil.rmtree(tmp_path / "b/checkpoints" / late)
    resumed = run(tmp_path / "b", toy(width=16), optimizer="muon", resume=True)
    assert same(whole, resumed) and not same(whole, run(tmp_path / "c", toy(width=16)))

def test_a_second_signal_acts_at_once():
    with Interrupt():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

def test_resume_with_accumulation_and_more_steps(tmp_path):
    a = run(tmp_path / "a", accumulate=3, schedule="constant", steps=30)
    run(tmp_path / "b", accumulate=3, schedule="constant", steps=11)
    model = toy()
    b = run(tmp_path / "b",
            model,
            accumulate=3,
            schedule="constant",
            steps=30,
            save_every=4,
            keep=1,
            resume=True)
    assert same(a, b) and model.started == 0 and names(tmp_path / "b") == ["step_00000030"]
    again = run(tmp_path / "b", accumulate=3, schedule="constant", steps=30, resume=True)        # nothing left to do
    assert same(again, b)

def test_a_checkpoint_is_neither_overwritten_nor_mixed(tmp_path):
    out = tmp_path / "r"
    run(out, steps=10)
    with pytest.raises(UnclipError, match="--resume or choose another --out"):
        run(out)
    for change in (dict(lr=1.0), dict(batch_size=7), dict(seed=1), dict(ema_decay=0.5)):
        with pytest.raises(UnclipError, match=next(iter(change))):
            run(out, resume=True, **change)
    with pytest.raises(UnclipError, match="model.width = 8, this run 16"):
        run(out, toy(width=16), resume=True)
    class Other(Toy):
        name = "other"
    with pytest.raises(UnclipError, match="stage"):
        run(out, Other(ToyConfig()), resume=True)
    assert names(out) == ["step_00000010"]


DAMAGES = {
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-7]), "empty": lambda f: f.write_bytes(b""),
    "missing": lambda f: f.unlink(), "a flipped bit": lambda f: f.write_bytes(f.read_bytes(
    )[:-3] + bytes([f.read_bytes()[-3] ^ 1]) + f.read_bytes()[-2:])
}


@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(tmp_path, file, caplog):
    "Four files in four ways, and a state.json of {}: the older checkpoint is taken, that is said, and the end is the same."
    run(tmp_path / "whole")
    ways = DAMAGES | ({"{}": lambda f: f.write_text("{}"), "[]": lambda f: f.write_text("[]")}
                      if file == "state.json" else {})
    for way, damage in ways.items():
        out = tmp_path / way
        shutil.copytree(tmp_path / "whole", out)
        caplog.clear()
        damage(checkpoints(out)[-1] / file)
        assert train.newest_checkpoint(out)[0].name == "step_00000020"
        assert same(run(out, resume=True), Toy.from_pretrained(tmp_path / "whole")), way
        assert "step_00000030/" + file in caplog.text and "going on from the older step_00000020" in caplog.text
        assert names(out) == ["step_00000020", "step_00000030"] and not junk(out)
        assert len([
            p for p in (out / "checkpoints").iterdir() if p.name.startswith("damaged_step_00000030")
        ]) == 1  # nothing is thrown away

def test_damage_everywhere_is_named(tmp_path):
    run(tmp_path / "r")
    for c in checkpoints(tmp_path / "r"):
        (c / "state.json").write_text("{}")
    with pytest.raises(
            UnclipError,
            match=
            "step_00000030/model.safetensors|step_00000030/state.json is damaged.*no other checkpoint"
    ):
        run(tmp_path / "r", resume=True)

def test_checkpoints_of_a_version_without_seals_are_read(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "r")
    shutil.rmtree(checkpoints(tmp_path / "r")[-1])
    file = checkpoints(tmp_path / "r")[-1] / "state.json"
    file.write_text(
        json.dumps({
            k: v
            for k, v in json.loads(file.read_text()).items() if k not in ("files", "seal", "data")
        }))
    assert same(run(tmp_path / "r", resume=True), Toy.from_pretrained(tmp_path / "whole"))

def test_garbage_in_the_log_does_not_block_a_resume(tmp_path):
    run(tmp_path / "r", steps=10)
    with (tmp_path / "r/log.jsonl").open("ab") as f:
        f.write(b'\xff\xfe\n[1]\n{"loss": 1}\n{"step": "x", "loss": 2}\nnull\n{"step": 10, "lo')
    run(tmp_path / "r", resume=True, steps=20)
    assert [r["step"] for r in read_log(tmp_path / "r")] == [7, 10, 14, 20]

# ---------------------------------------------------------------- finished or not

def test_a_stage_is_finished_only_with_the_weights_of_its_last_checkpoint(tmp_path, monkeypatch):
    out, kw = tmp_path / "r", dict(schedule="constant")
    run(out, steps=10, **kw)
    record = train.finished_record(out)
    assert record["step"] == 10 and set(record["files"]) == {"config.json", "model.safetensors"}
    monkeypatch.setattr(train, "finish_run", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))       # killed after its last checkpoint
    with pytest.raises(KeyboardInterrupt):
        run(out, steps=20, resume=True, **kw)
    monkeypatch.undo()
    assert names(out)[-1] == "step_00000020" and train.finished_record(out) is None
    run(out, steps=20, resume=True, **kw)
    assert train.finished_record(out)["step"] == 20 and same(
        Toy.from_pretrained(out), run(tmp_path / "whole", steps=20, **kw))
    for way, damage in DAMAGES.items():
        for file in ("config.json", "model.safetensors", "run.json"):
            copy = tmp_path / f"{way} {file}"
            shutil.copytree(out, copy)
            damage(copy / file)
            assert train.finished_record(copy) is None, (way, file)

def test_ctrl_c_in_the_last_step_is_not_finished(tmp_path):
    class Stopping(Points):
        def at(self, step, rank=0, world=1):
            if step == 29:
                signal.raise_signal(signal.SIGINT)
            return super().at(step, rank, world)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", batches=Stopping())
    assert names(tmp_path / "r")[-1] == "step_00000030" and train.finished_record(
        tmp_path / "r") is None
    assert same(run(tmp_path / "r", resume=True), run(
        tmp_path / "whole")) and train.finished_record(tmp_path / "r")

def test_one_training_a_folder(tmp_path):
    "Another process holds the lock; when it is killed the lock is free."
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        with train.locked(tmp_path / "r"):
            os.write(w, b"x")
            signal.pause()
    os.read(r, 1)
    said = rf"another training \(process {pid}\) writes into .*r: wait for it, or choose another --out"
    try:
        with pytest.raises(UnclipError, match=said):
            run(tmp_path / "r")
    finally:                                                    # also where the test fails: no process stays behind
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    run(tmp_path / "r")
    assert not (tmp_path / "r/.lock").exists()

def test_other_data_are_refused_or_asked_for(tmp_path):
    class Data:
        def __init__(self, count): self.count = count
        def identity(self): return {"source": "pictures", "count": self.count}
    def points(count): p = Points(); p.data = Data(count); return p
    run(tmp_path / "r", batches=points(250), steps=10)
    with pytest.raises(UnclipError, match="other data \\(count was 250, now 262\\).*--new-data"):
        run(tmp_path / "r", batches=points(262), resume=True)
    fit(toy(),
        points(262),
        CFG,
        tmp_path / "r",
        resume=True,
        device="cpu",
        progress=False,
        new_data=True)
    assert train.finished_record(tmp_path / "r")["data"]["count"] == 262

def test_a_renamed_folder_of_the_same_data_is_the_same_data():
    "As for `embed`: the digest of names and captions decides, not the folder's name."
    before = {"source": "pictures", "count": 250, "digest": "abc"}
    assert train.other_data(before, before | {"source": "moved"}) ==""== train.other_data(
        None, before)
    assert train.other_data(before,
                            before | {"count": 262, "digest": "def", "near": False
                                      }) == "count was 250, now 262; digest was abc, now def"

def test_a_failing_preview_ends_nothing(tmp_path, caplog):
    def preview(model): raise ValueError("Expected end of text\n$")
    model = run(tmp_path / "r", preview=preview, preview_every=10)
    assert same(model, run(
        tmp_path /
        "whole")) and "no preview at step 10 (ValueError: Expected end of text)" in caplog.text
    assert caplog.text.count("no preview") == 3 and "\n$" not in caplog.text

def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    "The loss of the last step is of the weights before it: it can't tell."
    monkeypatch.setattr(train, "ema_update",
                        lambda ema, *a: next(ema.parameters()).data.fill_(math.nan))
    with pytest.raises(UnclipError, match="not finite after step 1; try a lower lr"):
        run(tmp_path / "r", steps=1)
    assert not names(tmp_path / "r") and not (tmp_path / "r/model.safetensors").exists()

def test_files_are_as_readable_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        run(tmp_path / "r", steps=10)
    finally:
        os.umask(old)
    for f in [*(tmp_path / "r").glob("*.*"), *checkpoints(tmp_path / "r")[-1].iterdir()]:
        assert f.stat().st_mode & 0o777 == 0o644, f

def test_a_picture_is_whole_or_absent(tmp_path):
    limits, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN)
    noise = Image.frombytes("RGB", (99, 99), os.urandom(3 * 99 * 99))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        with pytest.raises(UnclipError, match="cannot write .*a.png"):
            train.save_picture(noise, tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, heard)
    assert not list(tmp_path.iterdir())

def test_the_launchers_precision_is_used_unless_another_is_asked_for(monkeypatch, caplog):
    cpu, auto, no = torch.device("cpu"), TrainConfig(), TrainConfig(precision="no")
    assert train.pick_precision(auto, cpu) == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train.pick_precision(auto, cpu) == "bf16"
    assert train.pick_precision(no, cpu) == "no"
    assert train.pick_precision(auto, cpu, {"train": {"precision": "fp16"}}) == "fp16"
    assert train.make_accelerator(auto, "cpu").mixed_precision == "bf16"
    train.make_accelerator(TrainConfig(precision="no"), "cpu")
    assert "launched with mixed precision bf16, this training uses no" in caplog.text

def test_a_missing_folder_of_ours_does_not_ask_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *a, **kw: pytest.fail("the hub was asked"))
    for name in ("runs/mine", "./mine", "a" * 300):
        with pytest.raises(UnclipError, match="no folder"):
            Toy.from_pretrained(name)


@pytest.mark.parametrize("field",
                         ["lr", "weight_decay", "beta1", "beta2", "eps", "clip_norm", "ema_decay"])
def test_every_number_of_the_recipe_is_checked(field):
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(UnclipError, match=f"{field} is {bad}"):
            TrainConfig(**{field: bad})

# ---------------------------------------------------------------- faults

@pytest.mark.parametrize("where", ["data", "gradient"])
def test_nan_stops_before_the_step(tmp_path, where):
    class Bad(Points):
        def at(self, step, rank=0, world=1):
            batch = super().at(step, rank, world)
            if step == 15:
                batch["x"][0, 0] = math.nan if where == "data" else 0
            return batch
    class BadGradient(Toy):
        def loss(self, batch, generator):
            loss = super().loss(batch, generator)
            return loss + (loss * 0).sqrt() if where == "gradient" and (
                batch["x"][0, 0] == 0) else loss  # finite, with an infinite slope
    torch.manual_seed(0)
    model = BadGradient(ToyConfig())
    with pytest.raises(
            UnclipError,
            match=r"toy: loss .* at step 16; last good checkpoint: .*step_00000010; try a lower lr"
    ):
        run(tmp_path, model, Bad())
    assert all(p.isfinite().all()
               for p in model.parameters()) and names(tmp_path) == ["step_00000010"]
    assert [r["step"] for r in read_log(tmp_path)] == [7, 14]

def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    write = train.save_file
    def full(tensors, path, **kw):
        if "step_00000020" in str(path) and "optimizer" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(tensors, path, **kw)
    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(UnclipError, match="cannot write .*step_00000020: .*No space left"):
        run(tmp_path / "r")
    assert names(tmp_path / "r") == ["step_00000010"] and not junk(tmp_path / "r")
    monkeypatch.undo()
    assert same(run(tmp_path / "r", resume=True), run(tmp_path / "whole"))

def test_a_file_that_cannot_grow_leaves_the_old_weights(tmp_path):
    "The writer itself refused by the system, not a mock."
    model = toy(width=1024)
    model.save_pretrained(tmp_path / "w")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(UnclipError, match="cannot write .*/w: .*File too large"):
            toy(width=512).save_pretrained(tmp_path / "w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(Toy.from_pretrained(tmp_path / "w"), model) and not junk(tmp_path / "w")

def test_an_out_that_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UnclipError, match="cannot write"):
        run(tmp_path / "f")

def test_impossible_settings():
    for bad in (dict(schedule="cosinus"), dict(precision="fp8"), dict(steps=0), dict(keep=0),
                dict(accumulate=0)):
        with pytest.raises(UnclipError, match=next(iter(bad))):
            TrainConfig(**bad)
    with pytest.raises(UnclipError, match="fp16"):
        train.make_accelerator(TrainConfig(precision="fp16"), "cpu")

# ---------------------------------------------------------------- saving and loading a stage

def test_save_and_load(tmp_path):
    model = toy(sizes=(3, 4)).train()
    model.mean.fill_(1/3)
    model.save_pretrained(tmp_path / "a" / "b")
    again = Toy.from_pretrained(tmp_path / "a" / "b")
    assert same(model, again) and again.config == model.config and again.config.sizes == (
        3, 4) and not again.training
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = Toy.from_pretrained(tmp_path / "half")
    assert torch.equal(half.mean, model.mean) and all(p.dtype == torch.float32
                                                      for p in half.parameters())
    assert all(
        torch.equal(a.half().float(), b) for a, b in zip(model.parameters(), half.parameters()))
    assert json.loads(
        (tmp_path / "half/config.json").read_text()) == asdict(model.config) | {"sizes": [3, 4]}

def test_more_files_travel_along(tmp_path):
    class Talking(Toy):
        def save_files(self, folder): (folder / "words.txt").write_text("star")
        def load_files(self, folder): self.words = (folder / "words.txt").read_text()
    Talking(ToyConfig()).save_pretrained(tmp_path / "t")
    assert Talking.from_pretrained(tmp_path / "t").words == "star"

def test_push_to_hub_uploads_the_same_files(tmp_path, monkeypatch):
    class Api:
        def __init__(self, **kw): pass
        def create_repo(self, repo_id, **kw): return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **kw):
            return sorted(p.name for p in Path(folder_path).iterdir())
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert toy().push_to_hub("someone/toy") == ["config.json", "model.safetensors"]

def test_what_cannot_be_loaded_is_named(tmp_path):
    def broken(name, change):
        folder = tmp_path / name
        toy().save_pretrained(folder)
        change(folder / "config.json", folder / "model.safetensors")
        return folder
    def edit(**kw): return lambda c, w: c.write_text(json.dumps(json.loads(c.read_text()) | kw))

    cases = {
        "no folder": tmp_path / "none", "model.safetensors is missing": broken(
            "a", lambda c, w: w.unlink()),
        "config.json is missing": broken("b", lambda c, w: c.unlink()),
        "config.json is not JSON": broken("c", lambda c, w: c.write_text("{")),
        "config.json is not JSON of named": broken("j", lambda c, w: c.write_text("[]")),
        "damaged or truncated": broken("d", lambda c, w: w.write_bytes(w.read_bytes()[:-3])),
        "damaged": broken("e", lambda c, w: w.write_bytes(b"")),
        r"'net.0.weight' is \(8, 3\), the config makes it \(16, 3\)": broken("f", edit(width=16)),
        "not a file": broken("k", lambda c, w: (c.unlink(), c.mkdir())),
        "nested too deeply": broken("l", lambda c, w: c.write_text("[" * 100_000)),
        "unknown field 'depth'": broken("g", edit(depth=3)), "width must be even": broken(
            "h", edit(width=7))
    }
    for message, folder in cases.items():
        with pytest.raises(UnclipError, match=message):
            Toy.from_pretrained(folder)
    with pytest.raises(UnclipError, match="model.safetensors: no 'extra'"):
        class More(Toy):

            def __init__(self, config: ToyConfig):
                super().__init__(config)
                self.extra = nn.Parameter(torch.zeros(1))
        toy().save_pretrained(tmp_path / "i")
        More.from_pretrained(tmp_path / "i")

def test_a_hub_id_is_downloaded_and_loaded(tmp_path, monkeypatch):
    kept = toy()
    kept.save_pretrained(tmp_path / "snapshot")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **kw: asked.append(
            (name, kw.get("revision"))) or str(tmp_path / "snapshot"))
    again = Toy.from_pretrained("someone/toy", revision="v1")
    assert asked == [("someone/toy", "v1")] and all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(),
                                          kept.state_dict().values()))

def test_nested_tuples_come_back():
    @dataclass
    class Nested:
        a:tuple = ((1, 2), (3,))
    assert config_from(Nested, json.loads(json.dumps(asdict(Nested())))) == Nested()

# ---------------------------------------------------------------- waiting for the device

def test_the_loop_reads_losses_only_when_they_are_logged(tmp_path, monkeypatch):
    "As on a GPU: of 30 steps, a line every 10, no read but at the lines; the same log as when each step is read."
    usual = run(tmp_path / "usual", steps=30, log_every=10, save_every=30)
    started, reads = train.start_run, []
    def as_on_a_gpu(*args, **kw):
        found = started(*args, **kw)
        monkeypatch.setattr(train, "feed_of", lambda r, b: (b.at(i) for i in range(30)))
        class Device:
            type = "gpu"
        class Accelerator:
            device = Device()
            def __getattr__(self, name): return getattr(real, name)
            def reduce(self, x, how):
                reads.append(found.state["step"])
                return real.reduce(x, how)
        real = found.accelerator
        found.accelerator = Accelerator()
        return found
    monkeypatch.setattr(train, "start_run", as_on_a_gpu)
    monkeypatch.setattr(train, "to_device", lambda batch, *a: batch)
    zeros = torch.zeros
    def on_cpu(*a, device=None, **kw): return zeros(*a, **kw)
    full = torch.full
    monkeypatch.setattr(torch, "zeros", on_cpu)
    monkeypatch.setattr(torch, "full", lambda *a, device=None, **kw: full(*a, **kw))
    item, step = torch.Tensor.item, torch.optim.AdamW.step
    def counted(x):
        reads.append("item")
        return item(x)
    def adamw(*a, **kw):                    # keeps its step counts on the CPU, where reading them is free
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "item", item)
            return step(*a, **kw)
    monkeypatch.setattr(torch.Tensor, "item", counted)
    monkeypatch.setattr(torch.optim.AdamW, "step", adamw)
    quiet = run(tmp_path / "quiet", steps=30, log_every=10, save_every=30)
    assert same(usual, quiet)
    assert [r for r in reads if r != "item"] == [10, 20, 30, 30]        # and once for the finite weights
    assert reads.index("item") > reads.index(20)                        # no single number before the save
    logs = [[(r["step"], r["loss"]) for r in read_log(tmp_path / n)] for n in ("usual", "quiet")]
    assert logs[0] == logs[1]

# ---------------------------------------------------------------- many processes

class Deep(Toy):
    "A toy with blocks, so that there is something to gather one at a time, and sizes that don't divide evenly."
    name = "deep"
    def __init__(self, config:ToyConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.register_buffer("count", torch.zeros(()))
    def loss(self, batch, generator):
        x = batch["x"] - self.mean
        noise = torch.randn(x.shape, generator=generator)
        y = x + self.config.noise * noise
        for block in self.blocks:
            y = y + block(y)
        return (self.net(y) - x).square().mean()

def deep():
    torch.manual_seed(0)
    return Deep(ToyConfig(noise=0.5, dropout=0.0))

class Rows(Points):
    "As `Batches`: the rows of a step lie side by side, whoever takes them."
    def at(self, step, rank=0, world=1):
        return super().at(step * world + rank)

class Killed(Rows):
    "Rank 1 is shot at a step."
    def at(self, step, rank=0, world=1):
        if rank == 1 and step == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().at(step, rank, world)

FORKED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_train import *
n, out, port, job = int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ |= dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
pids = []
for rank in range(n):
    if not (pid := os.fork()):
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
        try:
            globals()[job](out, n)
        except UnclipError as e:
            print("UnclipError:", e, flush=True)
            os._exit(2)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    pids.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
print("codes", sorted(codes))
sys.exit(any(codes))
"""

def forked(n, out, job):
    "`job(out, n)` in n processes; the finished command."
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [str(Path(__file__).parent), str(n), str(out), str(port), job]
    return subprocess.run([sys.executable, "-c", FORKED, *words], capture_output=True, text=True, timeout=300)

SPLIT = dict(steps=12, save_every=4, log_every=1, keep=9)
def sharded(out, n, **kw):
    "Always four micro-batches a step, whoever computes them."
    return run(out, deep(), accumulate=4 // n, shard=True, **SPLIT | dict(batches=Rows()) | kw)

def two_then_stop(out, n): sharded(out, n, steps=4, schedule="constant")
def four_go_on(out, n): sharded(out, n, schedule="constant", resume=True)
def one_is_killed(out, n):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sharded(out, n, schedule="constant", batches=Killed())

def losses(out): return [r["loss"] for r in read_log(out)]

def test_sharded_two_then_one_then_four_processes_are_one(tmp_path):
    "Weights, moments and average survive each change of the number of processes, and the folder is that of one process."
    done = forked(2, tmp_path / "r", "two_then_stop")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    shutil.rmtree(tmp_path / "r" / "previews", ignore_errors=True)
    first = checkpoints(tmp_path / "r")[-1]
    assert len(list(first.glob("shard-*.safetensors"))) == 2
    assert {f.suffix for f in first.iterdir()} == {".safetensors", ".json"}      # nothing pickled
    sharded(tmp_path / "r", 1, steps=8, schedule="constant", resume=True)
    done = forked(4, tmp_path / "r", "four_go_on")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    one = sharded(tmp_path / "one", 1, schedule="constant")
    for a, b in zip(losses(tmp_path / "r"), losses(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    ours, theirs = Deep.from_pretrained(tmp_path / "r"), Deep.from_pretrained(tmp_path / "one")
    for k, v in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[k], v, atol=1e-5), k
    assert same(theirs, one)
    files = [sorted(f.name for f in (tmp_path / n).glob("*.*")) for n in ("r", "one")]
    assert files[0] == files[1] and train.finished_record(tmp_path / "r")["step"] == 12

def test_a_killed_process_ends_the_others_and_nothing_is_lost(tmp_path):
    done = forked(2, tmp_path / "r", "one_is_killed")
    assert done.returncode and "codes [-9, 2]" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "another process of this training has ended" in done.stdout
    assert names(tmp_path / "r") == ["step_00000004"] and not junk(tmp_path / "r")
    sharded(tmp_path / "r", 1, schedule="constant", resume=True)
    sharded(tmp_path / "one", 1, schedule="constant")
    assert losses(tmp_path / "r") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)

PAIR = '''
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_train import run, toy
from unclip_nb.core import UnclipError
os.environ |= dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3])
pids = []
for rank in range(2):
    if not (pid := os.fork()):
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
        out = Path(sys.argv[2]) / "pair"
        run(out, toy(dropout=0, noise=0), steps=12, accumulate=2)
        run(out, toy(dropout=0, noise=0), steps=20, accumulate=2, schedule="cosine", resume=True)
        os._exit(0)
    pids.append(pid)
sys.exit(any([os.waitpid(p, 0)[1] for p in pids]))
'''

def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", PAIR,
         str(Path(__file__).parent),
         str(tmp_path),
         str(port)],
        capture_output=True,
        text=True,
        timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    class Both(Points): # what two ranks saw together: mean of two equal halves
        batch_size = 12
    class Start(Toy):
        def start(self, batches): self.mean.copy_(Points().at(0)["x"].mean(0))
    torch.manual_seed(0)
    whole = Start(ToyConfig(dropout=0, noise=0))
    run(tmp_path / "one", whole, Both(), steps=12, accumulate=2)
    torch.manual_seed(0)
    whole = run(tmp_path / "one",
                Start(ToyConfig(dropout=0, noise=0)),
                Both(),
                steps=20,
                accumulate=2,
                resume=True)
    pair = Toy.from_pretrained(tmp_path / "pair")
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(pair.parameters(), whole.parameters()))
    with pytest.raises(UnclipError, match="batch_size x processes x accumulate = 24, this run 12"):
        run(tmp_path / "pair", toy(dropout=0, noise=0), steps=20, accumulate=2, resume=True)

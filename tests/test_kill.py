"SIGKILL at every operation on files of a stage's training: what counts as finished afterwards is finished, and resuming ends in the same bytes."
import itertools, json, os, shutil, signal, sys
from pathlib import Path
import pytest, torch
import unclip_nb.train as train
from test_train import Toy, ToyConfig, run
from unclip_nb.train import checkpoints, finished_record

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")
OPERATIONS = ("replace", "rename", "open", "fsync", "mkdir", "unlink", "rmdir", "chmod")     # of the module os; pathlib and shutil use these too

class Talking(Toy):
    "A toy with a file beside its weights, as CLIP has its tokenizer."

    def save_files(self, folder):
        (folder / "tokenizer.json").write_text(json.dumps({"words": list(range(50))}))

def talking():
    torch.manual_seed(0)
    return Talking(ToyConfig())

SHORT = dict(steps=4, save_every=2, log_every=2, keep=1)

def train_until(out, fatal, **kw):
    "A fork of this process trains into `out` and is killed at its operation number `fatal`; whether it was."
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == signal.SIGKILL
    try:
        left = itertools.count(1)
        def deadly(f):
            def call(*args, **kw):
                if next(left) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return f(*args, **kw)
            return call
        for name in OPERATIONS:
            setattr(os, name, deadly(getattr(os, name)))
        save = train.save_file
        def save_file(tensors, path, **kw):                             # written by Rust: killed with half of the file there
            save(tensors, path, **kw)
            if next(left) == fatal:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        train.save_file = save_file
        run(out, talking(), resume=True, **kw)
        os._exit(0)
    except BaseException as e:
        print(repr(e), file=sys.stderr)
        os._exit(1)


def files(out):
    return {
        f.name: f.read_bytes()
        for f in [out / "config.json", out / "model.safetensors", out / "tokenizer.json"]
        if f.exists()
    }

def is_finished(out, steps):
    record = finished_record(out)
    return record is not None and record["step"] >= steps

def kill_everywhere(tmp_path, monkeypatch, before, share=1):
    "Kill at every operation (or each `share`-th), ask, resume, compare. Returns how many kills there were."
    monkeypatch.setattr(train, "plot_loss", lambda out: None)           # matplotlib reads hundreds of files: no part of this
    torch.set_num_threads(1)
    whole, start = tmp_path/"whole", tmp_path/"start"
    start.mkdir()
    before(start)
    shutil.copytree(start, whole)
    run(whole, talking(), resume=True, **SHORT)
    want, kills = files(whole), 0
    assert is_finished(whole, 4)
    for k in itertools.count(1, share):
        out = tmp_path/f"killed{k}"
        shutil.copytree(start, out)
        if not train_until(out, k, **SHORT):
            break
        kills += 1
        if is_finished(out, 4):
            assert files(
                out) == want, f"operation {k} left a stage that counts as finished and is not"
        run(out, talking(), resume=True, **SHORT)
        assert files(out) == want and is_finished(out,
                                                  4), f"resumed after operation {k}: other files"
        assert checkpoints(out)[-1].name == "step_00000004"
    assert is_finished(out, 4)                                          # the last one was not killed any more
    return kills

SHARE = 1 if os.environ.get("UNCLIP_LONG") else 11                       # every operation, or every eleventh

def test_killed_at_any_operation_of_a_new_training(tmp_path, monkeypatch):
    assert kill_everywhere(tmp_path, monkeypatch, lambda out: None, SHARE) > 80 // SHARE

def test_killed_at_any_operation_of_a_finished_stage_trained_further(tmp_path, monkeypatch):
    assert kill_everywhere(tmp_path, monkeypatch,
                           lambda out: run(out, talking(), **SHORT | dict(steps=2)),
                           SHARE) > 40 // SHARE

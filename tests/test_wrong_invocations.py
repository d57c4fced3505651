"""Wrong values for every flag of every command: each ends with exit code 2 and one line. The short form here; `UNCLIP_WRONG=2000` asks for as many.
The commands run in this process; where a value is let through, the work itself is not done but told, and the test fails."""
import dataclasses, itertools, json, os, random, signal
import pytest
from conftest import inside
from unclip_nb import cli

COUNT = int(os.environ.get("UNCLIP_WRONG", "100"))
SECONDS = 10                                                              # for one invocation: more is a hang

WORDS = ("x", "", "1e", "--", "0x10", "none")                             # no numbers
WHOLE = (*WORDS, "nan", "inf", "-1", "0.5", str(10**9 + 1), str(10**400), "-0.0")
REAL = (*WORDS, "nan", "-nan", "inf", "-inf", "-1", "1e400", "1" * 400)
ZERO = {
    "n", "steps", "batch_size", "size", "accumulate", "save_every", "preview_every", "log_every",
    "keep", "embed_dim", "image_size", "vision_width", "vision_layers", "text_width", "text_layers",
    "text_heads", "context_length", "vocab_size", "clip_dim", "k", "buckets", "dot_buckets",
    "width", "layers", "heads", "T", "channels", "res_blocks", "head_channels", "patch",
    "clip_tokens", "low_size", "factor", "crops", "eps", "crop", "gpu_tflops", "utilisation"
}
SHARE = {
    "drop", "drop_zi", "drop_text", "dropout", "blur_p", "bsr_p", "crop", "ema_decay", "beta1",
    "beta2", "eta", "utilisation", "thetas"
}
SCALE = {"guidance", "prior_guidance"}
NAMES = {
    "optimizer", "schedule", "precision", "kind", "target", "weighting", "degradation", "vision",
    "preset"
}
PATHS = {
    "out", "weights", "data", "clip_from", "clip", "start", "config", "image", "image_a", "image_b",
    "embeddings"
}

def wrong_values(name, default, traps):
    "What no command can use for a flag."
    if name.endswith("_column") or name == "subset":
        return ()
    if name == "device":
        return ("meta", "gpu", "cuda:99", "", "xla")
    if name in NAMES:
        return ("x", "", "None")
    if name in PATHS:
        return ("a" * 300, f"{traps}/pipe", "a" * 5000)
    if isinstance(default, bool):
        return ("maybe", "2")                   # a switch takes no value
    example = default[0] if isinstance(default, tuple) and default else default
    if isinstance(example, str):
        return ()
    values = WHOLE if isinstance(example, int) or name in ("n", "size", "batch_size") else REAL
    if name == "seed":
        values = tuple(v for v in values if v != str(10**9 + 1))
    more = ("0",) if name in ZERO else ()
    if name in SHARE:
        more += ("7", "1.01")
    if name in SCALE:
        more += ("1e300", "101")
    return (*values, *more)

def flags_of(config, prefix="--"):
    "(flag, field's name, default) of a dataclass."
    for f in dataclasses.fields(config):
        name = {"clip_from": "clip", "base": "from", "new": "to"}.get(f.name, f.name)
        yield f"{prefix}{name.replace('_', '-')}", f.name, getattr(config, f.name)

def every_flag(traps):
    "All commands with one wrong value each."
    for stage in cli.STAGES:
        dashed = stage.replace("_", "-")
        parts = (("model", cli.model_config(stage,
                                            "nano")), ("train", cli.train_config(stage, "nano")))
        own = [flags_of(config, f"--{dashed}.{part}.") for part, config in parts]
        for flag, name, default in itertools.chain(*own, flags_of(cli.TrainFlags())):
            for v in wrong_values(name, default, traps):
                yield ["train", stage, "--preset", "nano", flag, v]
    needs = {
        "generate": ["a red star"], "vary": [f"{traps}/a.png"],
        "interpolate": [f"{traps}/a.png"] * 2, "edit": [f"{traps}/a.png", "--to", "a star"]
    }
    for command, (options, _) in cli.COMMANDS.items():
        for flag, name, default in flags_of(options()):
            if name in ("captions", "image", "image_a", "image_b", "thetas"):
                continue
            for v in wrong_values(name, default, traps):
                yield [command, *needs.get(command, []), flag, v]
    for v in ("nan", "2", "-1", "x"):
        yield ["edit", *needs["edit"], "--thetas", "0", v]
    yield ["generate", "a \udcff star"]
    yield ["generate", "a \0 star"]
    for trap in traps.iterdir():
        yield ["train", "clip", "--preset", "nano", "--config", str(trap)]

class Accepted(Exception):
    "Raised where the work would begin: what comes here was let through."

@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    "Files that are no config: a folder, a pipe, deep, cut, of wrong kinds and lengths."
    from PIL import Image
    folder = tmp_path_factory.mktemp("traps")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder/"pipe")
    (folder/"folder").mkdir()
    Image.new("RGB", (8, 8)).save(folder/"a.png")
    model = lambda **kw: json.dumps({"clip": {"model": kw}})
    texts = {
        "deep": "[" * 100_000, "cut": '{"clip": {', "list": "[]", "null": "null", "number": "7",
        "length": model(image_mean=[0.5]), "kind": model(embed_dim=[1]),
        "nan": model(embed_dim=float("nan")), "bool": model(embed_dim=True),
        "section": '{"clip": 7}', "huge": model(vision_width=10**12), "none": model(embed_dim=None),
        "zero": model(text_heads=0)
    }
    for name, text in texts.items():
        (folder/f"{name}.json").write_text(text)
    (folder/"bytes.json").write_bytes(b"\xff\xfe{}")
    return folder

@pytest.fixture
def no_work(monkeypatch):
    "No training, no weights: whoever asks for them was accepted."
    def accepted(*args, **kw): raise Accepted(str(args)[:200])
    monkeypatch.setattr(cli, "train_stage", accepted)
    monkeypatch.setattr(cli, "load", accepted)
    monkeypatch.setattr(cli, "clip_of", accepted)
    monkeypatch.setattr(cli, "stage_facts", accepted)
    for command, (options, run) in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, command,
                            (options, accepted if command == "demo" else run))

def verdict(args, cwd):
    "What is wrong with how an invocation ended; empty if nothing."
    def late(*_): raise TimeoutError
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        r = inside(*args, cwd=cwd)
    except Accepted:
        return "accepted"
    except TimeoutError:
        return "hangs"
    except BaseException as e:
        return f"{type(e).__name__}: {str(e)[:120]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    lines = [l for l in r.stderr.splitlines() if l.strip()]
    if r.returncode != 2:
        return f"exit code {r.returncode}"
    if len(lines) != 1 or not lines[0].startswith("unclip: "):
        return f"not one line: {r.stderr[:200]!r}"
    return ""


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"),
                    reason="hangs are found by an alarm, which is POSIX")
def test_wrong_values_of_every_flag_are_one_line(traps, no_work, tmp_path):
    cases = [c for c in every_flag(traps) if "a.png" not in c[-1]]
    assert len(cases) >= 1000
    random.Random(0).shuffle(cases)
    found = {
        " ".join(map(ascii, c))[:160]: why
        for c in cases[:COUNT] if (why := verdict(c, tmp_path))
    }
    print(
        f"{min(COUNT, len(cases))} of {len(cases)} wrong invocations, {len(found)} not answered by one line"
    )
    assert not found, json.dumps(found, indent=1)
    assert not list(tmp_path.iterdir()), "something was written"

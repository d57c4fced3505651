"A whole system, trained for a few steps by the command itself: wiring and errors can be tested on it, quality can't."
import contextlib, io, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
SMALL = [
    "--clip.model.vision-width", "8", "--clip.model.text-width", "32", "--clip.model.text-layers",
    "1", "--clip.train.steps", "6", "--clip.train.batch-size", "32", "--prior.model.width", "32",
    "--prior.model.layers", "2", "--prior.model.heads", "2", "--prior.train.steps", "6",
    "--prior.train.batch-size", "32", "--ar-prior.model.width", "32", "--ar-prior.model.layers",
    "2", "--ar-prior.model.heads", "2", "--ar-prior.train.steps", "6",
    "--ar-prior.train.batch-size", "32", "--decoder.model.channels", "16",
    "--decoder.model.res-blocks", "1", "--decoder.model.head-channels", "16",
    "--decoder.model.text-layers", "1", "--decoder.train.steps", "6", "--decoder.train.batch-size",
    "8", "--upsampler1.model.channels", "16", "--upsampler1.train.steps", "6",
    "--upsampler1.train.batch-size", "4", "--upsampler2.model.channels", "16",
    "--upsampler2.train.steps", "4", "--upsampler2.train.batch-size", "2"
]

COMMAND = [sys.executable, "-c", "from unclip_nb.cli import main; main()"]

def unclip(*args, cwd=None, **env):
    "Run the command as a user would."
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | env)

def inside(*args, cwd=None):
    "The command in this process: without the seconds that a new one spends on imports."
    from unclip_nb.cli import main
    out, err, code, here = io.StringIO(), io.StringIO(), 0, os.getcwd()
    os.chdir(cwd or here)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(a) for a in args])
    except SystemExit as e:
        code = e.code or 0
    finally:
        os.chdir(here)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

@pytest.fixture(scope="session")
def system(tmp_path_factory):
    out = tmp_path_factory.mktemp("system")/"nano"
    r = unclip("train", "all", "--preset", "nano", "--out", out, *SMALL)
    assert r.returncode == 0, r.stderr
    return out

"The `unclip` command as a user meets it: what it draws, what it leaves on disk, and how it says no."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from PIL import Image
from conftest import COMMAND, ROOT, SMALL, inside, unclip

EMOJI = ROOT.parent/"shared"/"data"/"emoji"

def says_no(r, *words):
    assert r.returncode == 2, (r.returncode, r.stderr)
    last = [l for l in r.stderr.strip().splitlines() if l][-1] if "unclip:" in r.stderr else r.stderr
    assert "Traceback" not in r.stderr
    for w in words: assert w in r.stderr, (w, r.stderr)
    return last

def test_training_leaves_a_system(system):
    for stage in ("clip", "prior", "ar_prior", "decoder", "upsampler1"):
        assert {"config.json", "model.safetensors", "log.jsonl", "loss.png", "run.json"} <= {f.name for f in (system/stage).iterdir()}
    assert (system/"decoder"/"previews").is_dir() and (system/"clip"/"tokenizer.json").exists()
    assert not [f for f in system.rglob("*") if f.suffix in (".pt", ".pkl", ".pth", ".ckpt")]

def test_a_finished_run_is_not_trained_again(system):
    before = (system/"prior"/"model.safetensors").read_bytes()
    r = inside("train", "all", "--preset", "nano", "--out", system, "--resume", *SMALL)
    assert r.returncode == 0 and "already trained" in r.stdout and (system/"prior"/"model.safetensors").read_bytes() == before

def test_run_json_is_a_config(system, tmp_path):
    r = inside("train", "upsampler1", "--preset", "nano", "--config", system/"upsampler1"/"run.json", "--upsampler1.train.steps", 2, "--out", tmp_path)
    assert r.returncode == 0, r.stderr
    assert json.loads((tmp_path/"upsampler1"/"config.json").read_text())["channels"] == 16

def test_generate_writes_pngs_and_is_seeded(system, tmp_path):
    for name in ("a", "b"):
        r = unclip("generate", "a red star above a blue ring", "a yellow circle", "--weights", system, "--n", 2, "--steps", 3, "--seed", 3, "--out", tmp_path/name)
        assert r.returncode == 0, r.stderr
    files = sorted(f.name for f in (tmp_path/"a").iterdir())
    assert len(files) == 5 and Image.open(tmp_path/"a"/files[0]).size == (64, 64)
    assert all((tmp_path/"a"/f).read_bytes() == (tmp_path/"b"/f).read_bytes() for f in files)

def test_evaluate_prints_a_table(system, tmp_path):
    r = inside("evaluate", "--weights", system, "--n", 4, "--steps", 2, "--out", tmp_path)
    assert r.returncode == 0, r.stderr
    for word in ("one object", "two objects", "unseen pairs", "upsampled truth", "true z_i", "R@1"): assert word in r.stdout

def test_embed_then_train_from_the_embeddings(system, tmp_path):
    r = inside("embed", "--data", "shapes", "--clip", system/"clip", "--n", 64, "--out", tmp_path/"e")
    assert r.returncode == 0, r.stderr
    shutil.copytree(system/"clip", tmp_path/"s"/"clip")
    r = inside("train", "prior", "--preset", "nano", "--data", tmp_path/"e", "--out", tmp_path/"s", "--prior.train.steps", 2, "--prior.train.batch-size", 16,
               "--prior.model.width", 32, "--prior.model.layers", 1, "--prior.model.heads", 2)
    assert r.returncode == 0, r.stderr

def test_info_counts_without_building(system):
    r = inside("info", "--preset", "nano")
    assert r.returncode == 0 and all(s in r.stdout for s in ("clip", "prior", "decoder", "upsampler1", "parameters"))

def test_help_is_grouped_with_defaults():
    r = inside("train", "decoder", "--preset", "nano", "--help")
    assert r.returncode == 0 and "decoder.model options" in r.stdout and "decoder.train options" in r.stdout and "default" in r.stdout
    assert "train" in inside("--help").stdout

@pytest.mark.parametrize("args, words", [
    (("fly",), ("unknown command 'fly'", "train")),
    (("train", "gan"), ("unknown stage 'gan'", "decoder")),
    (("train", "prior", "--preset", "huge"), ("unknown preset 'huge'", "tiny")),
    (("train", "clip", "--preset", "nano", "--bogus", "1"), ("bogus",)),
    (("train", "clip", "--preset", "nano", "--data", "no/such/folder"), ("no/such/folder",)),
    (("train", "clip", "--preset", "nano", "--config", "no.json"), ("no.json",)),
    (("generate",), ("caption",)),
    (("generate", "", "--weights", "tiny"), ("caption",)),
    (("generate", "a red star", "--weights", "no_such_weights"), ("no_such_weights",)),
    (("generate", "a red star", "--prior", "gan"), ("gan",)),
    (("info", "--preset", "huge"), ("unknown preset",))])
def test_mistakes_are_one_line_and_exit_2(args, words, tmp_path):
    out = ("--out", tmp_path/"o") if args[0] in ("train", "generate") else ()
    says_no(inside(*args, *out, cwd=tmp_path), *words)
    assert not (tmp_path/"o").exists() or not list((tmp_path/"o").rglob("*.safetensors"))

def test_the_process_ends_with_2():
    says_no(unclip("fly"), "unknown command 'fly'", "train")

def test_both_priors_draw(system, tmp_path):
    for prior in ("diffusion", "ar"):
        r = inside("generate", "a yellow circle", "--weights", system, "--prior", prior, "--n", 1, "--steps", 2, "--out", tmp_path/prior)
        assert r.returncode == 0, r.stderr
    assert (tmp_path/"ar"/"000.png").read_bytes() != (tmp_path/"diffusion"/"000.png").read_bytes()

def test_no_cuda_is_said(system, tmp_path):
    import torch
    if torch.cuda.is_available(): pytest.skip("this machine has CUDA")
    says_no(inside("generate", "a red star", "--weights", system, "--device", "cuda", "--out", tmp_path), "cuda", "cpu")

def test_a_decoder_without_a_clip(tmp_path):
    says_no(inside("train", "decoder", "--preset", "nano", "--out", tmp_path/"x"), "needs a CLIP", "unclip train clip")

def test_broken_and_missing_weights(system, tmp_path):
    shutil.copytree(system, tmp_path/"s")
    file = tmp_path/"s"/"decoder"/"model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    says_no(inside("generate", "a red star", "--weights", tmp_path/"s", "--out", tmp_path/"o"), "model.safetensors")
    file.unlink()
    says_no(inside("generate", "a red star", "--weights", tmp_path/"s", "--out", tmp_path/"o"), "decoder")

def test_a_folder_without_captions(tmp_path):
    (tmp_path/"d").mkdir(); Image.new("RGB", (32, 32)).save(tmp_path/"d"/"a.png")
    says_no(inside("train", "clip", "--preset", "nano", "--data", tmp_path/"d", "--out", tmp_path/"o"), "caption")

def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    args = [*COMMAND, "train", "upsampler1", "--preset", "nano", "--out", str(tmp_path/"o"), "--upsampler1.model.channels", "16",
            "--upsampler1.train.steps", "100000", "--upsampler1.train.log-every", "1", "--upsampler1.train.schedule", "constant"]
    p = subprocess.Popen(args, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    log, t0 = tmp_path/"o"/"upsampler1"/"log.jsonl", time.time()
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.time() - t0 < 120: time.sleep(0.2)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=120)[1]
    assert p.returncode == 130 and "--resume" in err
    done = len(log.read_text().splitlines())
    r = unclip(*args[3:], "--resume", "--upsampler1.train.steps", done + 2)
    assert r.returncode == 0 and len(log.read_text().splitlines()) == done + 2

@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji pictures (shared/data/emoji) are not here")
def test_real_pictures_from_files_to_a_generated_picture(tmp_path):
    r = unclip("train", "all", "--preset", "nano", "--data", EMOJI, "--out", tmp_path/"e", *SMALL)
    assert r.returncode == 0, r.stderr
    r = inside("generate", "hot pepper", "--weights", tmp_path/"e", "--n", 1, "--steps", 2, "--out", tmp_path/"o")
    assert r.returncode == 0 and (tmp_path/"o"/"000.png").exists(), r.stderr

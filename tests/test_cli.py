"The `unclip` command as a user meets it: what it draws, what it leaves on disk, and how it says no."
import json, math, os, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from PIL import Image
from conftest import COMMAND, ROOT, SMALL, inside, unclip
from unclip_nb import cli
from unclip_nb.cli import STAGES
from unclip_nb.core import UnclipError, count_parameters

EMOJI = ROOT.parent/"shared"/"data"/"emoji"

def says_no(r, *words):
    assert r.returncode == 2, (r.returncode, r.stderr)
    last = [l for l in r.stderr.strip().splitlines()
            if l][-1] if "unclip:" in r.stderr else r.stderr
    assert "Traceback" not in r.stderr
    for w in words:
        assert w in r.stderr, (w, r.stderr)
    return last

def test_training_leaves_a_system(system):
    for stage in ("clip", "prior", "ar_prior", "decoder", "upsampler1", "upsampler2"):
        assert {"config.json", "model.safetensors", "log.jsonl", "loss.png",
                "run.json"} <= {f.name
                                for f in (system / stage).iterdir()}
    assert (system/"decoder"/"previews").is_dir() and (system/"clip"/"tokenizer.json").exists()
    assert not [f for f in system.rglob("*") if f.suffix in (".pt", ".pkl", ".pth", ".ckpt")]

def test_a_finished_run_is_not_trained_again(system):
    before = (system/"prior"/"model.safetensors").read_bytes()
    r = inside("train", "all", "--preset", "nano", "--out", system, "--resume", *SMALL)
    assert r.returncode == 0 and "already trained" in r.stdout and (
        system / "prior" / "model.safetensors").read_bytes() == before

def test_run_json_is_a_config(system, tmp_path):
    r = inside("train", "upsampler1", "--preset", "nano", "--config",
               system / "upsampler1" / "run.json", "--upsampler1.train.steps", 2, "--out", tmp_path)
    assert r.returncode == 0, r.stderr
    assert json.loads((tmp_path/"upsampler1"/"config.json").read_text())["channels"] == 16

def test_generate_writes_pngs_and_is_seeded(system, tmp_path):
    for name in ("a", "b"):
        r = unclip("generate", "a red star above a blue ring", "a yellow circle", "--weights",
                   system, "--n", 2, "--steps", 3, "--seed", 3, "--out", tmp_path / name)
        assert r.returncode == 0, r.stderr
    files = sorted(f.name for f in (tmp_path/"a").iterdir())
    assert len(files) == 5 and Image.open(tmp_path/"a"/files[0]).size == (64, 64)
    assert all((tmp_path/"a"/f).read_bytes() == (tmp_path/"b"/f).read_bytes() for f in files)

def test_size_is_asked_for(system, tmp_path):
    r = inside("generate", "a yellow circle", "--weights", system, "--n", 1, "--steps", 2, "--size",
               256, "--out", tmp_path / "big")
    assert r.returncode == 0 and Image.open(tmp_path/"big"/"000.png").size == (256, 256), r.stderr
    says_no(
        inside("generate", "a yellow circle", "--weights", system, "--size", 300, "--out",
               tmp_path / "no"), "no stage draws pictures of 300 px", "16, 64, 256")
    assert not (tmp_path/"no").exists()

def test_a_stage_starts_from_trained_weights(system, tmp_path):
    from unclip_nb.cli import begin
    from unclip_nb.upsampler import Upsampler, Upsampler2
    same = lambda a, b: all(map(lambda p, q: bool((p == q).all()), a.parameters(), b.parameters()))
    first, config = Upsampler.from_pretrained(system / "upsampler1"), Upsampler2.from_pretrained(
        system / "upsampler2").config
    for start, want in ((None, True), (str(system/"upsampler1"), True), ("none", False)):
        model = Upsampler2(config)
        begin(model, "upsampler2", system, start)
        assert same(model, first) == want
    begin(Upsampler2(type(config).nano()), "upsampler2", system)                   # of another size: quietly from nothing
    says_no(
        inside("train", "upsampler2", "--preset", "nano", "--start", system / "decoder", "--out",
               tmp_path / "o"), "decoder")

def test_evaluate_prints_a_table(system, tmp_path):
    r = inside("evaluate", "--weights", system, "--n", 4, "--steps", 2, "--out", tmp_path)
    assert r.returncode == 0, r.stderr
    for word in ("one object", "two objects", "unseen pairs", "upsampled truth", "true z_i", "R@1"):
        assert word in r.stdout

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "A JPEG and a PNG of other sizes."
    folder = tmp_path_factory.mktemp("two")
    for name, size, color in (("a.jpg", (70, 50), (200, 40, 40)), ("b.png", (64, 64), (40, 40,
                                                                                       200))):
        Image.new("RGB", size, color).save(folder/name)
    return folder/"a.jpg", folder/"b.png"

def test_vary_interpolate_edit(system, two, tmp_path):
    a, b = two

    def go(name, *args):
        return inside(*args, "--weights", system, "--steps", 2, "--out", tmp_path / name)

    for name, args, n in (("v", ("vary", a, "--n", 2, "--frames"),
                           2), ("v2", ("vary", a, "--n", 2, "--frames", "--seed", 1),
                                2), ("i", ("interpolate", a, b, "--n", 3), 3),
                          ("e", ("edit", b, "--from", "a blue square", "--to", "a red square",
                                 "--thetas", 0, 0.4, "--frames"), 2)):
        r = go(name, *args)
        assert r.returncode == 0, r.stderr
        assert f"{n} pictures" in r.stdout
    files = {d.name: sorted(f.name for f in d.iterdir()) for d in tmp_path.iterdir()}
    assert files["v"] == ["000.png", "001.png", "variations.png"] and files["i"] == [
        "interpolation.png"
    ] and files["e"] == ["000.png", "001.png", "edit.png"]
    frame = lambda d, i=0: (tmp_path/d/f"{i:03d}.png").read_bytes()
    assert frame("v") != frame("v", 1) and frame("v") != frame("v2") and frame("e") != frame(
        "e", 1) and Image.open(tmp_path / "v" / "000.png").size == (64, 64)
    assert go("again", "vary", a, "--n", 2, "--frames").returncode == 0 and frame(
        "again", 1) == frame("v", 1)  # the seed fixes everything
    r = go("x", "interpolate", a, b, "--noise", "fixed", "--n", 2)
    assert r.returncode == 0, r.stderr

def test_edits_say_no(system, two, tmp_path):
    a, b = two
    (tmp_path/"note.txt").write_text("not a picture")
    (tmp_path/"cut.png").write_bytes(b.read_bytes()[:60])
    for args, words in ((("vary", ), ("no picture", )), (("vary", tmp_path / "no.png"),
                                                         ("no.png", )),
                        (("vary", tmp_path / "note.txt"), ("note.txt", "PNG or JPEG")),
                        (("vary", tmp_path / "cut.png"), ("cut.png", )), (("vary", tmp_path),
                                                                          ("PNG or JPEG", )),
                        (("interpolate", a),
                         ("two pictures", )), (("interpolate", a, tmp_path / "no.png"),
                                               ("no.png", )), (("interpolate", a, b, "--noise",
                                                                "both"), ("slerp or fixed", )),
                        (("interpolate", a, b, "--n", 1), ("at least 2", )), (("vary", a, "--n", 0),
                                                                              ("at least 1", )),
                        (("vary", a, "--size", 7), ("7 px", )), (("edit", a), ("new caption", )),
                        (("edit", a, "--from", "a red star", "--to", "a red star"),
                         ("same", )), (("edit", a, "--to", "a red star", "--thetas", 2),
                                       ("thetas", ))):
        says_no(inside(*args, "--weights", system, "--steps", 2, "--out", tmp_path/"o"), *words)
    assert not (tmp_path/"o").exists()

def test_demo_leaves_three_sheets_and_a_large_picture(system, tmp_path):
    r = inside("demo", "--weights", system, "--out", tmp_path)
    assert r.returncode == 0, r.stderr
    assert sorted(
        str(f.relative_to(tmp_path)) for f in tmp_path.glob("*/*.png") if not f.stem.isdigit()) == [
            "edits/edits.png", "gallery/gallery.png", "new_pairs/new_pairs.png"
        ]
    assert Image.open(tmp_path/"large.png").size == (256, 256)                            # one as large as this system can
    for name, n in (("gallery", 16), ("new_pairs", 16), ("edits", 18)):                   # a row of eight for each prior; six variations, six on a way, six angles
        files = [tmp_path/name/f"{i:03d}.png" for i in range(n)]
        assert f"{n} pictures: {tmp_path/name/name}.png" in r.stdout and len(
            list((tmp_path / name).iterdir())) == n + 1
        assert len({f.read_bytes()
                    for f in files}) > n / 2 and {Image.open(f).size
                                                  for f in files} == {(64, 64)}

def test_embed_then_train_from_the_embeddings(system, tmp_path):
    r = inside("embed", "--data", "shapes", "--clip", system / "clip", "--n", 64, "--out",
               tmp_path / "e")
    assert r.returncode == 0, r.stderr
    shutil.copytree(system/"clip", tmp_path/"s"/"clip")
    r = inside("train", "prior", "--preset", "nano", "--data", tmp_path / "e", "--out",
               tmp_path / "s", "--prior.train.steps", 2, "--prior.train.batch-size", 16,
               "--prior.model.width", 32, "--prior.model.layers", 1, "--prior.model.heads", 2)
    assert r.returncode == 0, r.stderr

INFO = """import resource, sys
from unclip_nb.cli import main
for preset in sys.argv[1:]: main(["info", "--preset", preset, "--batch-size", "1"]); print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""

def test_info_prints_every_stage_and_allocates_nothing():
    "In a process of its own, whose memory knows no other test: the peak after the paper's sizes beside that after the smallest. The paper's weights alone are 35 GB."
    pytest.importorskip("resource")
    out = subprocess.run([sys.executable, "-c", INFO, "nano", "paper"],
                         capture_output=True,
                         text=True,
                         check=True).stdout
    for table in out.split("peak")[:2]:
        for word in (*STAGES, "parameters", "activations", "GPU-days", "40% of 312 TFLOP/s"):
            assert word in table, word
    assert max(map(len, out.splitlines())) < 120
    nano, paper = (int(line.split()[1]) / (1e6 if sys.platform == "darwin" else 1e3)
                   for line in out.splitlines()
                   if line.startswith("peak"))  # MB; macOS counts bytes, Linux kB
    assert paper - nano < 200


@pytest.mark.parametrize("stage, table, off",
                         [("decoder", 3.5e9, 0.05), ("upsampler1", 0.7e9, 0.05),
                          ("upsampler2", 0.3e9, 0.065)])  # Table 3; its last figure has one digit
def test_the_papers_sizes(stage, table, off):
    assert abs(count_parameters(cli.meta_stage(stage, "paper")) / table - 1) < off

@pytest.mark.parametrize(
    "stage, steps, batch, lr, beta2, eps, decay, ema",
    [  # Table 3, column by column
        ("ar_prior", 1_000_000, 4096, 1.6e-4, 0.91, 1e-10, 4e-2, 0.999),
        ("prior", 600_000, 4096, 1.1e-4, 0.96, 1e-6, 6e-2, 0.9999),
        ("decoder", 800_000, 2048, 1.2e-4, 0.999, 1e-8, 0, 0.9999),
        ("upsampler1", 1_000_000, 1024, 1.2e-4, 0.999, 1e-8, 0, 0.9999),
        ("upsampler2", 1_000_000, 512, 1e-4, 0.999, 1e-8, 0, 0.9999)
    ])
def test_the_papers_training(stage, steps, batch, lr, beta2, eps, decay, ema):
    t = cli.train_config(stage, "paper")
    assert (t.steps, t.batch_size * t.accumulate, t.lr, t.beta1, t.beta2, t.eps, t.weight_decay,
            t.ema_decay) == (steps, batch, lr, 0.9, beta2, eps, decay, ema)

def test_costs_agree_with_rules_of_thumb():
    c = cli.Info("tiny", gpu_tflops=100., utilisation=0.5)
    f, t = cli.stage_facts("prior", c), cli.train_config("prior", "tiny")
    model = cli.meta_stage("prior", "tiny")
    inner = sum(p.numel() for n, p in model.net.transformer.named_parameters()
                if n.endswith("weight") and p.ndim == 2)
    tokens, width, layers = model.config.context_length + 4, model.config.width, model.config.layers
    thumb = 6 * inner * tokens + 3 * layers * 2 * 2 * tokens ** 2 * width                  # six operations a weight and token, and attention
    assert thumb < f["flops"] < 1.1 * thumb                                               # the rest: what goes in and out
    assert f["training"] == 20 * f["parameters"] and f["examples"] == t.steps * t.batch_size
    assert f["days"] == pytest.approx(f["flops"] * f["examples"] / 50e12 / 86400)
    one = cli.stage_facts("prior", cli.Info("tiny", batch_size=1))
    assert f["kept"] == t.batch_size * one["kept"]

def test_small_fits_a_card_of_24_GB():
    clip = 4 * count_parameters(cli.meta_stage("clip", "small"))                           # frozen, float32
    for stage in STAGES[1:]:
        f = cli.stage_facts(stage, cli.Info("small"))
        assert f["training"] + f["kept"] + (clip if stage in cli.ON_CLIP else 0) < 0.95 * 24e9, (
            stage, f)
    assert cli.stage_facts("clip", cli.Info("small"))["training"] is None                  # pretrained

@pytest.fixture
def bench_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/"benchmarks")
    import bench_gpu
    return bench_gpu

def test_the_gpu_benchmark_wants_a_gpu(bench_gpu, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench_gpu.main(["--stage", "decoder", "--preset", "small", "--steps", "300"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "no CUDA here" in said.err and said.err.count("\n") == 1

@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler1"])
def test_the_gpu_benchmark_measures_a_training(bench_gpu, stage):
    m = bench_gpu.measure(stage,
                          "nano",
                          2,
                          compile=False,
                          device="cpu",
                          batch_size=4,
                          precision="no",
                          peak_tflops=2.,
                          warm=1)
    assert m["speed"] > 0 and m["memory"] is None and math.isfinite(
        m["loss"]) and (m["batch"], m["accumulate"]) == (4, 1)
    assert m["utilisation"] == pytest.approx(
        cli.stage_facts(stage, cli.Info("nano"))["flops"] * m["speed"] / 2e12)

def test_the_gpu_benchmark_trains_no_pretrained_clip(bench_gpu):
    with pytest.raises(UnclipError, match="pretrained"):
        bench_gpu.measure("clip", "small", 2, compile=False, device="cpu")

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
    (("info", "--preset", "huge"), ("unknown preset",)),
    (("info", "--utilisation", "0"), ("utilisation",)),
    (("train", "all", "--preset", "small"), ("pretrained ViT-L-14", "--clip ViT-L-14:openai"))])
def test_mistakes_are_one_line_and_exit_2(args, words, tmp_path):
    out = ("--out", tmp_path/"o") if args[0] in ("train", "generate") else ()
    says_no(inside(*args, *out, cwd=tmp_path), *words)
    assert not (tmp_path/"o").exists() or not list((tmp_path/"o").rglob("*.safetensors"))

def test_the_process_ends_with_2():
    says_no(unclip("fly"), "unknown command 'fly'", "train")

def test_both_priors_draw(system, tmp_path):
    for prior in ("diffusion", "ar"):
        r = inside("generate", "a yellow circle", "--weights", system, "--prior", prior, "--n", 1,
                   "--steps", 2, "--out", tmp_path / prior)
        assert r.returncode == 0, r.stderr
    assert (tmp_path/"ar"/"000.png").read_bytes() != (tmp_path/"diffusion"/"000.png").read_bytes()

def test_no_cuda_is_said(system, tmp_path):
    import torch
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    says_no(
        inside("generate", "a red star", "--weights", system, "--device", "cuda", "--out",
               tmp_path), "cuda", "cpu")

def test_a_decoder_without_a_clip(tmp_path):
    says_no(inside("train", "decoder", "--preset", "nano", "--out", tmp_path / "x"), "needs a CLIP",
            "unclip train clip")

def test_broken_and_missing_weights(system, tmp_path):
    shutil.copytree(system, tmp_path/"s")
    file = tmp_path/"s"/"decoder"/"model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    says_no(inside("generate", "a red star", "--weights", tmp_path / "s", "--out", tmp_path / "o"),
            "model.safetensors")
    file.unlink()
    says_no(inside("generate", "a red star", "--weights", tmp_path / "s", "--out", tmp_path / "o"),
            "decoder")

def test_a_folder_without_captions(tmp_path):
    (tmp_path/"d").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path/"d"/"a.png")
    says_no(
        inside("train", "clip", "--preset", "nano", "--data", tmp_path / "d", "--out",
               tmp_path / "o"), "caption")

def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    args = [
        *COMMAND, "train", "upsampler1", "--preset", "nano", "--out",
        str(tmp_path / "o"), "--upsampler1.model.channels", "16", "--upsampler1.train.steps",
        "100000", "--upsampler1.train.log-every", "1", "--upsampler1.train.schedule", "constant"
    ]
    p = subprocess.Popen(args,
                         stderr=subprocess.PIPE,
                         env=os.environ | {"OMP_NUM_THREADS": "1"},
                         text=True)
    log, t0 = tmp_path/"o"/"upsampler1"/"log.jsonl", time.time()
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.time() - t0 < 120:
        time.sleep(0.2)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=120)[1]
    assert p.returncode == 130 and "--resume" in err
    done = len(log.read_text().splitlines())
    r = unclip(*args[3:], "--resume", "--upsampler1.train.steps", done + 2)
    assert r.returncode == 0 and len(log.read_text().splitlines()) == done + 2


@pytest.mark.skipif(not EMOJI.is_dir(),
                    reason="the emoji pictures (shared/data/emoji) are not here")
def test_real_pictures_from_files_to_a_generated_picture(tmp_path):
    r = unclip("train", "all", "--preset", "nano", "--data", EMOJI, "--out", tmp_path/"e", *SMALL)
    assert r.returncode == 0, r.stderr
    r = inside("generate", "hot pepper", "--weights", tmp_path / "e", "--n", 1, "--steps", 2,
               "--out", tmp_path / "o")
    assert r.returncode == 0 and (tmp_path/"o"/"000.png").exists(), r.stderr

# a system around somebody else's CLIP

TOY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
}

def test_a_pretrained_clip_travels_with_its_system(tmp_path):
    from safetensors.torch import save_model
    from unclip_nb.data import import_open_clip
    oc, arch = import_open_clip(), tmp_path/"toy-cli.json"
    arch.write_text(json.dumps(TOY_CLIP))
    oc.add_model_config(arch)
    save_model(oc.create_model("toy-cli"), tmp_path/"toy.safetensors")
    out, args = tmp_path / "o", ("--preset", "nano", "--clip",
                                 f"toy-cli:{tmp_path/'toy.safetensors'}")
    small = [
        a for k, v in zip(SMALL[::2], SMALL[1::2]) for a in (k, v)
        if not k.startswith("--clip") and "train.steps" not in k
    ]
    few = [a for s in STAGES[1:] for a in (f"--{s.replace('_', '-')}.train.steps", 2)]
    r = inside("train", "all", *args, "--out", out, *small, *few)
    assert r.returncode == 0 and "trained prior, ar_prior" in r.stdout, r.stderr
    r = inside("generate", "a red star", "--weights", out, "--n", 1, "--steps", 2, "--out",
               tmp_path / "pictures")
    assert r.returncode == 0 and (tmp_path/"pictures"/"000.png").exists(), r.stderr
    save_model(oc.create_model("toy-cli"), tmp_path/"other.safetensors")                                             # another CLIP does not slip in
    says_no(
        inside("train", "prior", "--preset", "nano", "--clip",
               f"toy-cli:{tmp_path/'other.safetensors'}", "--out", out, "--prior.train.steps", 3,
               "--resume"), "another CLIP")

# what a user may get wrong, or the disk

def test_an_out_that_is_a_file(system, tmp_path):
    taken = tmp_path/"taken"
    taken.write_text("precious")
    for args in (("generate", "a red star", "--weights",
                  system), ("embed", "--clip", system / "clip", "--n", 4), ("train", "upsampler1",
                                                                            "--preset", "nano"),
                 ("evaluate", "--weights", system, "--n", 1), ("demo", "--weights", system)):
        says_no(inside(*args, "--out", taken), "taken", "choose another --out")
    assert taken.read_text() == "precious"

@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
def test_a_full_disk_is_said_in_one_line(system, tmp_path):
    old, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, old[1]))
        says_no(
            inside("generate", "a red star", "--weights", system, "--n", 1, "--steps", 1, "--out",
                   tmp_path / "o"), "cannot write", "make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, heard)

def folder_of(n, folder):
    from PIL import Image
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", (64, 64), (40 * i, 20, 90)).save(folder/f"{i}.png")
        (folder/f"{i}.txt").write_text(f"picture {i}")
    return folder

def test_a_handful_of_pictures_can_be_trained_on(system, tmp_path):
    "Fewer rows than the eight of the previews, every stage's preview drawn."
    data, out = folder_of(6, tmp_path/"few"), tmp_path/"o"
    for s in ("clip", "prior", "decoder", "upsampler1"):
        flag, few = f"--{s}.", [("train.steps", 2), ("train.preview-every", 1),
                                ("train.batch-size", 2)]
        small = [
            a for k, v in zip(SMALL[::2], SMALL[1::2]) for a in (k, v)
            if k.startswith(flag) and ".train." not in k
        ]
        r = inside("train", s, "--preset", "nano", "--data", data, "--out", out, *small,
                   *(a for k, v in few for a in (flag + k, v)))
        assert r.returncode == 0 and len(list((out/s/"previews").glob("*.png"))) == 2, (s, r.stderr)
    says_no(inside("train", "ar_prior", "--preset", "nano", "--data", data, "--out", out),
            "too few for 24 components")

def test_too_few_captions_leave_nothing_behind(tmp_path):
    says_no(
        inside("train", "clip", "--preset", "nano", "--data", folder_of(6, tmp_path / "few"),
               "--out", tmp_path / "o"), "5 different captions")
    assert not (tmp_path/"o").exists()

@pytest.mark.parametrize(
    "args, words",
    [(("generate", "a red star", "--n", "x"), ("--n", "invalid literal")),
     (("generate", "a red star", "--guidance", "nan"), ("--guidance is nan", "give a number")),
     (("generate", "a red star", "--prioor", "ar"), ("--prioor", )),
     (("train", "decoder", "--decoder.train.stepz", "5"),
      ("--decoder.train.stepz", "did you mean --decoder.train.steps?")),
     (("train", "prior", "--preset", "nano", "--prior.model.heads", "5", "--clip", "tiny"),
      ("sizes of the prior", )),
     (("train", "clip", "--preset", "nano", "--clip.model.text-heads", "3"),
      ("sizes of the clip", )), (("evaluate", "--n", "0"), ("--n", )),
     (("embed", "--n", "0"), ("--n", )),
     (("train", "clip", "--config", "~nobody9/x.json"), ("no home folder", "~nobody9/x.json")),
     (("train", "upsampler1", "--preset", "nano", "--device", "cuda"), ("cuda", ))])
def test_more_mistakes_are_one_line_and_exit_2(args, words, tmp_path):
    if "cuda" in args:
        import torch
        if torch.cuda.is_available():
            pytest.skip("this machine has one")
    says_no(inside(*args, "--out", tmp_path/"o", cwd=tmp_path), *words)
    assert not (tmp_path/"o").exists()


@pytest.mark.parametrize("config, words",
                         [({"clip": 5}, ("clip", "model and train")),
                          ({"clip": {"modl": {}}}, ("modl", )),
                          ({"clip": {"model": {"embed_dim": "abc"}}}, ("embed_dim", "'abc'")),
                          ({"clip": {"train": {"lr": [1]}}}, ("lr", ))])
def test_a_config_file_is_checked(config, words, tmp_path):
    (tmp_path/"c.json").write_text(json.dumps(config))
    says_no(
        inside("train", "clip", "--preset", "nano", "--config", tmp_path / "c.json", "--out",
               tmp_path / "o"), *words)

def test_a_finished_stage_is_not_taken_for_another(system):
    args = ("train", "upsampler1", "--preset", "nano", "--out", system,
            *SMALL[SMALL.index("--upsampler1.model.channels"):SMALL.
                   index("--upsampler2.model.channels")])
    r = inside(*args)
    assert r.returncode == 0 and "already trained" in r.stdout, r.stderr
    says_no(inside(*args, "--upsampler1.model.channels", 24), "model.channels = 16, not 24")
    says_no(inside(*args, "--upsampler1.train.lr", 1), "train.lr")

def test_a_nan_stops_the_command(tmp_path):
    says_no(
        inside("train", "upsampler1", "--preset", "nano", "--out", tmp_path / "o",
               "--upsampler1.model.channels", 16, "--upsampler1.train.steps", 30,
               "--upsampler1.train.batch-size", 2, "--upsampler1.train.save-every", 1,
               "--upsampler1.train.schedule", "constant", "--upsampler1.train.warmup", 1,
               "--upsampler1.train.lr", "1e30", "--upsampler1.train.clip-norm", 0),
        "last good checkpoint", "lower lr")
    assert list((tmp_path/"o"/"upsampler1"/"checkpoints").glob("step_*"))

@pytest.mark.parametrize("start", [["-m", "unclip_nb.cli"], ["-m", "unclip_nb"]])
@pytest.mark.parametrize("words, code, said", [(["--version"], 0, "unclip 0."),
                                               (["info", "--preset", "nano"], 0, "upsampler2"),
                                               (["fly"], 2, "unknown command 'fly'")])
def test_the_modules_are_the_command(start, words, code, said):
    "`python -m` runs the command, with its output and its exit code."
    r = subprocess.run([sys.executable, *start, *words],
                       capture_output=True,
                       text=True,
                       timeout=300,
                       cwd=ROOT)
    command = unclip(*words)
    assert (r.returncode, r.stdout, r.stderr) == (command.returncode, command.stdout,
                                                  command.stderr)
    assert r.returncode == code and said in r.stdout + r.stderr

def test_torchrun_takes_the_module(tmp_path):
    "A launcher that is given the module trains, and hands on the exit code of a mistake."
    def launch(*words):
        cmd = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
            "-m", "unclip_nb.cli", *map(str, words)
        ]
        return subprocess.run(cmd,
                              capture_output=True,
                              text=True,
                              timeout=300,
                              env=os.environ | {"OMP_NUM_THREADS": "1"},
                              cwd=ROOT)

    r = launch("train", "clip", "--preset", "nano", "--out", tmp_path / "o", "--device", "cpu",
               *SMALL[:10])
    assert r.returncode == 0 and (tmp_path/"o"/"clip"/"model.safetensors").exists(), r.stderr
    r = launch("train", "gan", "--out", tmp_path/"no")
    assert r.returncode and "gan" in r.stderr and not (tmp_path/"no").exists()

# ---------------------------------------------------------------- work reused only for what it was made from

def nano_clip(data, out, steps, *more):
    "CLIP for a few steps on a folder."
    return inside("train", "clip", "--preset", "nano", "--data", data, "--out", out, *SMALL[:6],
                  "--clip.train.batch-size", 4, "--clip.train.steps", steps, *more)

def test_the_tokenizer_belongs_to_the_checkpoint(tmp_path):
    "Pictures with new words are added: refused, and with --new-data the old tokenizer stays."
    data, out = folder_of(6, tmp_path/"few"), tmp_path/"o"
    assert nano_clip(data, out, 2).returncode == 0
    before = (out/"clip"/"tokenizer.json").read_bytes()
    record = json.loads((out/"clip"/"run.json").read_text())["clip"]
    assert record["data"]["count"] == 5 and record["step"] == 2
    assert "already trained" in nano_clip(data, out, 2).stdout
    for i in range(20, 40):
        Image.new("RGB", (64, 64), (5 * i, 90, 20)).save(data/f"{i}.png")
        (data/f"{i}.txt").write_text(f"zebras quickly jump {i}")
    says_no(nano_clip(data, out, 2), "trained on other data", "count was 5, now")           # finished, and not with these
    says_no(nano_clip(data, out, 4, "--resume"), "trained on other data", "--new-data")
    assert (out/"clip"/"tokenizer.json").read_bytes() == before
    r = nano_clip(data, out, 4, "--resume", "--new-data")
    assert r.returncode == 0, r.stderr
    assert (out/"clip"/"tokenizer.json").read_bytes() == before
    assert (sorted(
        (out / "clip" / "checkpoints").iterdir())[-1] / "tokenizer.json").read_bytes() == before

def test_a_longer_clip_names_what_must_be_trained_again(system, tmp_path):
    shutil.copytree(system, tmp_path/"s")
    longer = [
        a if a != "6" or SMALL[i - 1] != "--clip.train.steps" else "8" for i, a in enumerate(SMALL)
    ]
    before = (tmp_path/"s"/"clip"/"model.safetensors").read_bytes()
    says_no(
        inside("train", "all", "--preset", "nano", "--out", tmp_path / "s", "--resume", *longer),
        "prior, ar_prior, decoder", "must be trained again")
    assert (tmp_path/"s"/"clip"/"model.safetensors").read_bytes() == before
    kept = tmp_path/"kept"
    for s in cli.ON_CLIP:
        shutil.move(tmp_path/"s"/s, kept/s)
    r = inside("train", "clip", "--preset", "nano", "--out", tmp_path/"s", "--resume", *longer[:10])
    assert r.returncode == 0, r.stderr
    shutil.copytree(kept, tmp_path/"s", dirs_exist_ok=True)                             # the old ones under the new CLIP
    says_no(
        inside("train", "all", "--preset", "nano", "--out", tmp_path / "s", "--resume", *longer),
        "prior, ar_prior, decoder", "another CLIP")

def test_an_unfinished_clip_is_not_built_on(system, tmp_path):
    shutil.copytree(system/"clip", tmp_path/"s"/"clip")
    (tmp_path/"s"/"clip"/"tokenizer.json").unlink()
    says_no(inside("train", "prior", "--preset", "nano", "--out", tmp_path / "s"), "not finished",
            "--resume")
    r = inside("train", "clip", "--preset", "nano", "--out", tmp_path/"s", "--resume", *SMALL[:10])
    assert r.returncode == 0 and "already" not in r.stdout, r.stderr
    assert (tmp_path / "s" / "clip" /
            "tokenizer.json").read_bytes() == (system / "clip" / "tokenizer.json").read_bytes()
    assert (tmp_path / "s" / "clip" /
            "model.safetensors").read_bytes() == (system / "clip" /
                                                  "model.safetensors").read_bytes()

def test_a_dollar_in_a_caption_is_a_dollar(system):
    from unclip_nb.clip import CLIP, similarity_sheet
    from unclip_nb.shapes import EIGHT_SCENES, render
    sheet = similarity_sheet(CLIP.from_pretrained(system / "clip"), render(EIGHT_SCENES[:2], 32),
                             ["costs $5 \\frac", "a $x^{ $ star"])
    assert sheet.width > 100

def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in cli.PATHS:
        assert cli.check_flag("Common", name, "~/x") == str(tmp_path/"x")

@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
def test_a_full_disk_leaves_no_cut_pictures(tmp_path):
    import torch
    old, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, old[1]))
        with pytest.raises(UnclipError, match="cannot write"):
            cli.save_pictures(torch.rand(2, 3, 64, 64), ["a", "b"], tmp_path/"o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, heard)
    assert not list((tmp_path/"o").iterdir())

def test_sizes_beyond_this_machine_are_refused_before_they_are_allocated(tmp_path):
    says_no(
        inside("train", "upsampler1", "--preset", "nano", "--upsampler1.model.channels", 65_536,
               "--out", tmp_path / "o"), "GB", "choose smaller sizes")
    config = {"low_size": 16, "channels": 65_536, "channel_mult": [1, 2], "patch": 4}
    (tmp_path/"w").mkdir()
    (tmp_path/"w"/"config.json").write_text(json.dumps(config))
    shutil.copy(ROOT/"data"/"tiny"/"upsampler1"/"model.safetensors", tmp_path/"w")
    with pytest.raises(UnclipError, match="GB, this machine has"):
        cli.stage_class("upsampler1")[0].from_pretrained(tmp_path/"w")

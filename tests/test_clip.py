"CLIP against open_clip, closed forms, and itself on two processes."
import json, math, os
import multiprocessing as mp
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from unclip_nb.clip import (CLIP, CLIPConfig, ConvTower, ViT, build_towers, clip_loss,
                            gather_rows, load_clip, retrieval_at_k, similarity_sheet, zero_shot)
from unclip_nb.core import UnclipError, resize
from unclip_nb.data import Batches, Captioned, ShapesData, Tokenizer, import_open_clip
from unclip_nb.embeddings import EmbeddedData, embed

torch.set_num_threads(1)
SMALL = CLIPConfig(embed_dim=24, vision_width=8, text_width=32, text_layers=1, text_heads=2)
TOY = dict(embed_dim=16,
           vision_cfg=dict(image_size=32, layers=1, width=64, patch_size=8),
           text_cfg=dict(width=32, heads=2, layers=1))
DATA = ShapesData("train")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)

@pytest.fixture(scope="module")
def tokenizer(): return Tokenizer.train(DATA.captions(500), vocab_size=320)

@pytest.fixture(scope="module")
def clip(tokenizer):
    torch.manual_seed(0)
    return CLIP(SMALL, tokenizer).eval()

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A small open_clip architecture, its random weights in a file, and open_clip's own model with them."
    from safetensors.torch import save_file
    oc, folder = import_open_clip(), tmp_path_factory.mktemp("toy")
    (folder / "toy-clip.json").write_text(json.dumps(TOY))
    oc.add_model_config(folder / "toy-clip.json")
    torch.manual_seed(1)
    model = oc.CLIP(**TOY).eval()
    save_file(model.state_dict(), folder / "weights.safetensors")
    torch.save({"state_dict": {f"module.{k}": v
                               for k, v in model.state_dict().items()}}, folder / "checkpoint.pt")
    return folder, model

# the loss

@pytest.mark.parametrize("n,scale", [(2, 1.), (7, 14.3), (64, 100.)])
def test_loss_equals_open_clip(n, scale):
    zi, zt = unit(n, 16), unit(n, 16, seed=1)
    assert torch.isclose(clip_loss(zi, zt, scale),
                         import_open_clip().ClipLoss()(zi, zt, torch.tensor(scale)))

def test_loss_in_closed_form():
    "Orthogonal pairs: ln(1 + (n-1) e^-s). Identical rows: ln n. k captions alike among n: (k/n) ln k."
    assert torch.isclose(clip_loss(torch.eye(4), torch.eye(4), 5.),
                         torch.tensor(math.log(1 + 3 * math.exp(-5))))
    assert torch.isclose(clip_loss(torch.ones(6, 1), torch.ones(6, 1), 9.),
                         torch.tensor(math.log(6)))
    twins = torch.eye(6)[[0, 0, 0, 3, 4, 5]]
    assert torch.isclose(clip_loss(twins, twins, 100.), torch.tensor(3 / 6 * math.log(3)))

def test_loss_is_symmetric_and_asks_both_ways():
    zi, zt = unit(8, 4), unit(8, 4, seed=1)
    assert torch.isclose(clip_loss(zi, zt, 10.), clip_loss(zt, zi, 10.))
    one_way = F.cross_entropy(10 * zi @ zt.T, torch.arange(8))
    assert not torch.isclose(clip_loss(zi, zt, 10.), one_way)

def test_loss_stays_exact_under_autocast():
    zi, zt = unit(32, 16), unit(32, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        half = clip_loss(zi, zt, 100.)
    assert half.dtype == torch.float32 and torch.equal(half, clip_loss(zi, zt, 100.))

def test_scale_starts_and_is_clipped_as_open_clip_does(clip):
    assert math.isclose(clip.scale.item(), 1 / 0.07, rel_tol=1e-5)
    model = CLIP(SMALL, clip.tokenizer)
    with torch.no_grad():
        model.model.logit_scale.fill_(9.)
    model.loss(DATA.batch(range(4))).backward()
    assert math.isclose(model.model.logit_scale.item(), math.log(100), rel_tol=1e-6)
    assert math.isclose(model.scale.item(), 100, rel_tol=1e-5)
    assert model.model.logit_scale.grad is not None

def _share(rank, world, port, queue, state, tokenizer, batch):
    "One of two processes: the loss and the averaged gradients, as DDP would make them."
    import torch.distributed as dist
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = CLIP(SMALL, tokenizer)
    model.load_state_dict(state)
    mine = slice(rank * 4, rank * 4 + 4)
    loss = model.loss({"image": batch["image"][mine], "tokens": batch["tokens"][mine]})
    loss.backward()
    grads = {}
    for k, p in model.named_parameters():
        dist.all_reduce(p.grad)
        grads[k] = (p.grad / world).numpy()
    queue.put((rank, loss.item(), grads if rank == 0 else None))
    dist.destroy_process_group()


@pytest.mark.skipif("fork" not in mp.get_all_start_methods(),
                    reason="needs fork, so that open_clip is not imported thrice")
def test_two_processes_equal_one_with_the_whole_batch(clip):
    import socket
    batch = Batches(DATA, 8, clip.tokenizer).at(0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ctx = mp.get_context("fork")
    queue = ctx.Queue()
    whole = CLIP(SMALL, clip.tokenizer)
    whole.load_state_dict(clip.state_dict())
    workers = [
        ctx.Process(target=_share,
                    args=(r, 2, port, queue, clip.state_dict(), clip.tokenizer, batch))
        for r in range(2)
    ]
    for w in workers:
        w.start()
    got = sorted((queue.get(timeout=120) for _ in workers), key=lambda r: r[0])
    for w in workers:
        w.join(30)
    loss = whole.loss(batch)
    loss.backward()
    assert got[0][1] != got[1][1]                    # each lost its own rows against all
    assert math.isclose(sum(l for _, l, _ in got) / len(got), loss.item(), rel_tol=1e-5)
    for k, p in whole.named_parameters():
        assert torch.allclose(torch.from_numpy(got[0][2][k]), p.grad, atol=1e-5, rtol=1e-3), k

def test_one_process_gathers_nothing():
    x = unit(3, 4)
    assert gather_rows(x) is x

# the towers

@pytest.mark.parametrize("size,layers", [(8, 6), (16, 6), (32, 6), (64, 6), (64, 4), (32, 3)])
def test_conv_tower_ends_in_four_by_four(size, layers):
    tower = ConvTower(10, size, width=8, layers=layers)
    assert tower.convs(torch.zeros(2, 3, size, size)).shape[-2:] == (4, 4)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in tower.convs) == layers
    assert tower(torch.zeros(2, 3, size, size)).shape == (2, 10)

@pytest.mark.parametrize("size,layers", [(0, 6), (4, 6), (24, 6), (33, 6), (64, 3)])
def test_conv_tower_refuses_other_sizes(size, layers):
    with pytest.raises(UnclipError, match="power of two"):
        ConvTower(10, size, layers=layers)

def test_presets_have_the_promised_sizes():
    tiny = build_towers(CLIPConfig.tiny())
    assert isinstance(tiny, import_open_clip().CLIP)
    assert 1.4e6 < sum(p.numel() for p in tiny.parameters()) < 1.7e6
    assert sum(p.numel() for p in build_towers(CLIPConfig.nano()).parameters()) < 5e5
    with torch.device("meta"):
        paper = build_towers(CLIPConfig.paper())
    assert 0.9e9 < sum(p.numel() for p in paper.parameters()) < 1.1e9
    p, theirs = CLIPConfig.paper(), import_open_clip().get_model_config("ViT-H-16")
    assert (p.vision_width, p.vision_layers, p.patch_size,
            p.vision_width // p.vision_heads) == tuple(theirs["vision_cfg"][k]
                                                       for k in ("width", "layers", "patch_size",
                                                                 "head_width"))
    assert (p.text_width, p.text_layers, p.text_heads,
            p.embed_dim) == (*(theirs["text_cfg"][k]
                               for k in ("width", "layers", "heads")), theirs["embed_dim"])

def test_vit_instead_of_conv(tokenizer):
    vit = CLIP(replace(SMALL, vision="vit", vision_width=32, vision_layers=1, patch_size=8),
               tokenizer)
    assert vit.encode_image(torch.zeros(2, 3, 32, 32)).shape == (2, 24)
    with pytest.raises(UnclipError, match="vision"):
        CLIP(replace(SMALL, vision="resnet"), tokenizer)
    with pytest.raises(UnclipError, match="no model"):
        build_towers(CLIPConfig(open_clip="ViT-Z-99"))

# encoding

def test_embeddings_are_unit_and_of_any_size(clip):
    x = DATA.batch(range(3))["image"]
    for images in (x, F.interpolate(x,
                                    (64, 64)), F.interpolate(x,
                                                             (16, 16)), F.interpolate(x, (40, 70))):
        z = clip.encode_image(images)
        assert z.shape == (3, 24) and torch.allclose(z.norm(dim=1), torch.ones(3))

def test_oblong_pictures_show_their_middle(clip):
    wide = torch.rand(2, 3, 32, 50) * 2 - 1
    assert torch.allclose(clip.encode_image(wide), clip.encode_image(wide[..., 9:41]), atol=1e-6)

def test_nothing_is_normalised_twice(clip):
    "Our own towers get [-1, 1] as it is."
    x = DATA.batch(range(2))["image"]
    assert torch.allclose(clip.encode_image(x),
                          F.normalize(clip.model.visual(x), dim=-1),
                          atol=1e-6)
    big = ShapesData("train", size=64).batch(range(2))["image"]
    assert torch.allclose(clip.encode_image(big),
                          F.normalize(clip.model.visual(resize(big, 32)), dim=-1),
                          atol=1e-6)

def test_text_tokens_equal_open_clip_and_are_zero_after_the_end(clip):
    texts = ["a red star", "a large white heart above a small cyan cross on a navy background", ""]
    tokens = clip.tokenizer.encode(texts)
    zt, text = clip.encode_text_tokens(texts)
    assert torch.allclose(zt, clip.model.encode_text(tokens, normalize=True), atol=1e-6)
    assert torch.equal(zt, clip.encode_text_tokens(tokens)[0])
    ends = (tokens == clip.tokenizer.end_id).int().argmax(1)
    for row, end in zip(text, ends):
        assert (row[end + 1:] == 0).all() and (row[:end + 1].abs().sum(-1) > 0).all()

def test_text_tower_is_causal(clip):
    short, long = (clip.encode_text_tokens([t])[1][0]
                   for t in ("a red star", "a red star below a blue ring"))
    n = clip.tokenizer.encode(["a red star"]).argmax().item()
    assert torch.allclose(short[:n], long[:n],
                          atol=1e-6) and not torch.allclose(short[n], long[n], atol=1e-3)

def test_embed_batch_adds_and_keeps(clip):
    batch = DATA.batch(range(4))
    out = clip.embed_batch(batch)
    assert out["caption"] == batch["caption"] and torch.equal(out["image"], batch["image"])
    assert torch.allclose(out["zi"], clip.encode_image(
        batch["image"])) and not out["zi"].requires_grad
    assert out["text"].shape == (4, clip.context_length, clip.text_width) and "zi" not in batch
    assert torch.equal(clip.embed_batch({**batch, "tokens": out["tokens"]})["zt"], out["zt"])

def test_no_tokenizer_is_said():
    with pytest.raises(UnclipError, match="no tokenizer"):
        CLIP(SMALL).encode_text(["a red star"])

def test_training_lowers_the_loss(tokenizer):
    torch.manual_seed(0)
    model, batch = CLIP(SMALL, tokenizer), Batches(DATA, 16, tokenizer, distinct=True).at(0)
    opt, first = torch.optim.Adam(model.parameters(), 3e-3), model.loss(batch).item()
    for _ in range(40):
        opt.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        opt.step()
    assert first > 0.9 * math.log(16) and loss.item() < 0.2

# measuring

def test_zero_shot_is_a_softmax_of_scaled_cosines(clip):
    x, prompts = DATA.batch(range(5))["image"], ["a red star", "a blue ring", "a cyan cross"]
    p = zero_shot(clip, x, prompts)
    theirs = (clip.model.get_logits(x, clip.tokenizer.encode(prompts))[0]).softmax(-1)
    assert torch.allclose(p, theirs, atol=1e-5) and torch.allclose(p.sum(1), torch.ones(5))

@pytest.mark.parametrize("k", [1, 3, 10])
def test_retrieval_equals_topk(k):
    zi, zt = unit(50, 8), F.normalize(unit(50, 8) + 1.5 * unit(50, 8, seed=1), dim=-1)
    hits = [(s.topk(k, 1).indices == torch.arange(50)[:, None]).any(1).float().mean().item()
            for s in (zi @ zt.T, zt @ zi.T)]
    assert retrieval_at_k(zi, zt, k) == pytest.approx(hits, abs=1e-6) and 0 < hits[0] < 1

def test_similarity_sheet_shows_the_matrix(clip):
    b = DATA.batch(range(3))
    sheet = similarity_sheet(clip, b["image"], b["caption"])
    assert sheet.mode == "RGB" and len(set(sheet.resize((64, 48)).getdata())) > 20

# saving

def test_saving_keeps_tokenizer_and_fingerprint(clip, tmp_path):
    clip.save_pretrained(tmp_path, dtype=torch.float16)
    assert {f.name
            for f in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    again = CLIP.from_pretrained(tmp_path)
    assert again.fingerprint == clip.fingerprint and again.config == clip.config and not again.training
    assert torch.allclose(again.encode_text(["a red star"]),
                          clip.encode_text(["a red star"]),
                          atol=1e-2)
    assert load_clip(tmp_path).fingerprint == load_clip(
        tmp_path / "model.safetensors").fingerprint == clip.fingerprint

def test_fingerprint_tells_clips_apart(clip, tokenizer):
    torch.manual_seed(5)
    other = CLIP(SMALL, tokenizer)
    before = other.fingerprint
    assert len(before) == 12 and before != clip.fingerprint and before == other.fingerprint
    with torch.no_grad():
        other.model.visual.proj.weight[0, 0] += 0.01
    assert other.fingerprint != before

def test_missing_pieces_are_named(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UnclipError, match="tokenizer.json"):
        CLIP.from_pretrained(tmp_path)
    with pytest.raises(UnclipError, match="config.json"):
        load_clip(tmp_path.parent)
    with pytest.raises(UnclipError, match="no folder"):
        load_clip(tmp_path / "nowhere")

def test_embed_is_read_back_and_can_be_resumed(clip, tmp_path):
    data = ShapesData("valid")
    embed(clip, data, tmp_path, batch_size=8, n=50, shard=20, progress=False)
    stored = EmbeddedData(tmp_path, clip.fingerprint)
    rows = [0, 19, 20, 49]
    got, want = stored.batch(rows), clip.embed_batch(data.batch(rows))
    assert len(stored) == 50 and got["caption"] == want["caption"] and torch.equal(
        got["tokens"], want["tokens"])
    for k, tol in (("zi", 1e-5), ("zt", 1e-5), ("text", 5e-3)):
        assert torch.allclose(got[k], want[k], atol=tol), k
    assert torch.equal(got["text"] == 0, want["text"] == 0)
    kept, lost = (tmp_path / f"shard_0000{i}.safetensors" for i in (0, 1))
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UnclipError, match="no finished"):
        EmbeddedData(tmp_path)
    embed(clip, data, tmp_path, batch_size=8, n=50, shard=20, progress=False)
    assert kept.stat().st_mtime_ns == stamp and torch.allclose(
        EmbeddedData(tmp_path).batch(rows)["zi"], want["zi"], atol=1e-5)

def test_embed_refuses_a_folder_of_another_clip(clip, tokenizer, tmp_path):
    embed(clip, ShapesData("valid"), tmp_path, n=4, progress=False)
    torch.manual_seed(7)
    with pytest.raises(UnclipError, match="another clip"):
        embed(CLIP(SMALL, tokenizer), ShapesData("valid"), tmp_path, n=4, progress=False)
    with pytest.raises(UnclipError, match="not"):
        EmbeddedData(tmp_path, "0" * 12)

def test_embed_says_when_it_cannot_write(clip, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(UnclipError, match="cannot write .*taken"):
        embed(clip, ShapesData("valid"), taken, n=4, progress=False)
    assert taken.read_text() == "a file"

@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
def test_embed_survives_a_full_disk(clip, tmp_path):
    import resource, signal
    old, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        with pytest.raises(UnclipError, match="cannot write .*shard_00000"):
            embed(clip, ShapesData("valid"), tmp_path, n=8, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, heard)
    embed(clip, ShapesData("valid"), tmp_path, n=8, progress=False)                 # room again: it goes on
    assert len(EmbeddedData(tmp_path)) == 8

def test_open_clip_imports_beside_a_torchvision_that_cannot_load(tmp_path):
    "A CPU-only torch beside torchvision's CUDA build: the first import fails on the missing operator, and the second finds it declared."
    import subprocess, sys
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "import torch\ntry: torch.ops.torchvision.nms.default\nexcept AttributeError: raise RuntimeError('operator torchvision::nms does not exist') from None\n"
    )
    (tmp_path / "open_clip.py").write_text("import torchvision\n")
    code = "from unclip_nb.data import import_open_clip; print(import_open_clip().__name__)"
    run = subprocess.run([sys.executable, "-c", code],
                         env=os.environ | {"PYTHONPATH": str(tmp_path)},
                         capture_output=True,
                         text=True)
    assert run.returncode == 0 and run.stdout.strip() == "open_clip", run.stderr

# pretrained models

@pytest.mark.parametrize("file", ["weights.safetensors", "checkpoint.pt"])
def test_pretrained_from_a_file_equals_open_clip(toy, file):
    oc, (folder, theirs) = import_open_clip(), toy
    ours = CLIP.from_open_clip("toy-clip", str(folder / file))
    x, texts = DATA.batch(range(3))["image"], ["a dog", "a photo of a very large cat"]
    mean, std = (torch.tensor(v).view(3, 1, 1)
                 for v in (oc.OPENAI_DATASET_MEAN, oc.OPENAI_DATASET_STD))
    assert torch.allclose(ours.encode_image(x),
                          theirs.encode_image(((x + 1) / 2 - mean) / std, normalize=True),
                          atol=1e-5)
    tokens = oc.get_tokenizer("ViT-B-32")(texts)
    assert torch.allclose(ours.encode_text(texts),
                          theirs.encode_text(tokens, normalize=True),
                          atol=1e-6)
    zt, text = ours.encode_text_tokens(texts)
    assert torch.allclose(zt, ours.encode_text(texts), atol=1e-6) and text.shape == (2, 77, 32)
    assert (ours.dim, ours.text_width, ours.context_length, ours.config.image_size) == (16, 32, 77,
                                                                                        32)
    assert load_clip(f"toy-clip:{folder / file}").fingerprint == ours.fingerprint

def test_pretrained_survives_saving(toy, tmp_path):
    folder, _ = toy
    ours = CLIP.from_open_clip("toy-clip", str(folder / "weights.safetensors"))
    ours.save_pretrained(tmp_path)
    again = CLIP.from_pretrained(tmp_path)
    x = DATA.batch(range(2))["image"]
    assert again.config == ours.config and again.fingerprint == ours.fingerprint
    assert torch.equal(again.encode_image(x), ours.encode_image(x)) and torch.equal(
        again.encode_text(["a cat"]), ours.encode_text(["a cat"]))

def test_pretrained_errors_say_the_way_out(toy, tmp_path):
    folder, _ = toy
    for name, weights, say in (("ViT-L-41", None, "no model"), ("ViT-B-32", "not-a-tag", "laion2b"),
                               ("toy-clip", None, "no tags"),
                               ("toy-clip", str(tmp_path / "absent.safetensors"), "absent")):
        with pytest.raises(UnclipError, match=say):
            CLIP.from_open_clip(name, weights)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder / "weights.safetensors").read_bytes()[:1000])
    with pytest.raises(UnclipError, match="cannot load"):
        CLIP.from_open_clip("toy-clip", str(cut))
    wider = tmp_path / "wider-clip.json"
    wider.write_text(json.dumps({**TOY, "embed_dim": 20}))
    import_open_clip().add_model_config(wider)
    with pytest.raises(UnclipError, match="cannot load"):
        CLIP.from_open_clip("wider-clip", str(folder / "weights.safetensors"))

def test_config_needs_no_open_clip():
    "Importing the module and making a config stays light."
    import subprocess, sys
    code = "import sys; from unclip_nb.clip import CLIPConfig; CLIPConfig.paper(); sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

class Drawings(ShapesData):
    "A data set that is small, and whose captions or pictures can be replaced."

    def __init__(self, start=0, word=""):
        super().__init__("valid")
        self.start, self.word = start, word
    def __len__(self): return 12
    def batch(self, indices):
        b = super().batch([i + self.start for i in indices])
        return {**b, "caption": [self.word + c for c in b["caption"]]}

    def texts(self, indices):
        return [self.word + c for c in super().texts([i + self.start for i in indices])]
    def identity(self): return Captioned.identity(self)


@pytest.mark.parametrize("other,n", [(lambda: ShapesData("train"), 12), (lambda: Drawings(100), 12),
                                     (lambda: Drawings(word="no "), 12), (lambda: Drawings(), 8)])
def test_embed_refuses_a_folder_of_other_data(clip, tmp_path, other, n):
    "Another split, other pictures of equal number, other captions, another number: 0 of the captions would belong to the embeddings."
    embed(clip, Drawings(), tmp_path, n=12, progress=False)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(UnclipError,
                       match="holds embeddings of another .*choose another folder") as e:
        embed(clip, other(), tmp_path, n=n, progress=False)
    assert "\n" not in str(
        e.value) and before == {f.name: f.read_bytes()
                                for f in tmp_path.iterdir()}
    embed(clip, Drawings(), tmp_path, n=12, progress=False)
    stored = EmbeddedData(tmp_path, clip.fingerprint)
    assert stored.identity()["data"] == Drawings().identity() == stored.meta["data"]
    want = clip.embed_batch(Drawings().batch(range(12)))
    assert torch.allclose(stored.batch(range(12))["zi"], want["zi"],
                          atol=1e-5) and stored.captions(12) == want["caption"]

def test_embed_refuses_a_replaced_folder(clip, tmp_path):
    from PIL import Image
    from unclip_nb.files import load_captioned
    folder = tmp_path / "set"
    folder.mkdir()
    def fill(word):
        for i in range(6):
            Image.new("RGB", (20, 20), word).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"{word} {i}")
    fill("red")
    embed(clip, load_captioned(folder, size=32), tmp_path / "e", progress=False)
    fill("blue")
    with pytest.raises(UnclipError, match="digest was"):
        embed(clip, load_captioned(folder, size=32), tmp_path / "e", progress=False)
    fill("red")
    folder.rename(tmp_path / "renamed")                                 # the same rows by another name
    assert len(
        EmbeddedData(
            embed(clip,
                  load_captioned(tmp_path / "renamed", size=32),
                  tmp_path / "e",
                  progress=False))) == 5

def test_embedded_captions_are_those_of_the_pictures(clip, tmp_path):
    "A picture that cannot be read is stepped over with its caption."
    from PIL import Image
    from unclip_nb.files import load_captioned
    from unclip_nb.folders import PictureData
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20), (30 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red {i}")
    rows = load_captioned(folder, size=32).rows
    for i in (2, 3):
        (folder / f"{i}.png").write_bytes(b"junk")
    data = PictureData(rows, 32, "set", keep=False)
    stored = EmbeddedData(embed(clip, data, tmp_path / "e", batch_size=3, progress=False))
    for row in stored:
        k = int(row["caption"].split()[1])
        want = clip.encode_image(
            torch.tensor([30 * k, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 127.5 - 1)
        assert k not in (2, 3) and torch.allclose(row["zi"], want[0], atol=1e-5)

def test_a_copied_tokenizer_reads_marks_as_text():
    import copy, pickle
    from unclip_nb.core import data_path
    from unclip_nb.data import Tokenizer
    tokenizer = Tokenizer.load(data_path("tiny") / "clip")
    right = tokenizer.encode(["a red <end> star"])
    for again in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(again.encode(["a red <end> star"]), right)

@pytest.mark.parametrize("n", [0, -1, 10_001, 10**9])
def test_embed_refuses_more_rows_than_there_are(clip, tmp_path, n):
    with pytest.raises(UnclipError, match="^n is .*at most 10000$"):
        embed(clip, ShapesData("valid"), tmp_path / "e", n=n, progress=False)
    assert not (tmp_path / "e").exists()

# our ViT under open_clip's names

VIT = replace(SMALL, vision="vit", vision_width=32, vision_layers=2, vision_heads=4, patch_size=8)

def their_vit():
    "What `vision='vit'` built before this package had a ViT of its own."
    text = dict(context_length=24, vocab_size=512, width=32, heads=2, layers=1)
    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=8)
    torch.manual_seed(3)
    return import_open_clip().CLIP(24, vision, text).eval()

def test_vit_equals_open_clip_and_has_its_names():
    old, new = their_vit(), build_towers(VIT).eval()
    assert type(new.visual) is ViT
    assert new.state_dict().keys() == old.state_dict().keys()
    new.load_state_dict(old.state_dict())
    x = DATA.batch(range(3))["image"]
    assert torch.allclose(new.encode_image(x), old.encode_image(x), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(),
                                                 [old.state_dict()[k] for k in new.state_dict()]))

def test_a_checkpoint_of_the_former_vit_loads_with_its_fingerprint(tokenizer, tmp_path):
    config = replace(VIT, vocab_size=tokenizer.vocab_size, context_length=tokenizer.context_length)
    text = dict(context_length=config.context_length, vocab_size=config.vocab_size, width=32, heads=2,
                layers=1)
    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=8)
    former = CLIP(config, tokenizer, model=import_open_clip().CLIP(24, vision, text))
    former.save_pretrained(tmp_path / "clip", dtype=torch.float16)
    again = CLIP.from_pretrained(tmp_path / "clip")
    assert type(again.model.visual) is ViT and again.fingerprint == former.fingerprint
    again.save_pretrained(tmp_path / "again", dtype=torch.float16)
    weights = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("clip", "again")]
    assert weights[0] == weights[1]

def test_vit_trains_and_resumes_under_one_set_of_names(tokenizer, tmp_path):
    from unclip_nb.train import TrainConfig, fit
    rows = Batches(DATA, 8, tokenizer)
    how = TrainConfig(steps=2, batch_size=8, save_every=1, log_every=1, schedule="constant")
    torch.manual_seed(0)
    clip = CLIP(VIT, tokenizer)
    names = [k for k, _ in clip.named_parameters()]
    assert set(names) <= clip.state_dict().keys() and any(".resblocks.1.attn.in_proj" in k for k in names)
    whole = fit(clip, rows, how, tmp_path / "whole", device="cpu", progress=False)
    torch.manual_seed(0)
    fit(CLIP(VIT, tokenizer), rows, replace(how, steps=1), tmp_path / "half", device="cpu", progress=False)
    resumed = fit(CLIP(VIT, tokenizer), rows, how, tmp_path / "half", device="cpu", progress=False,
                  resume=True)
    assert resumed.fingerprint == whole.fingerprint

@pytest.mark.parametrize("change,says", [(dict(vision_heads=5), "5 heads don't divide"),
                                         (dict(patch_size=64), "don't fit a picture")])
def test_a_vit_that_cannot_be(change, says):
    with pytest.raises(UnclipError, match=says):
        build_towers(replace(VIT, **change))

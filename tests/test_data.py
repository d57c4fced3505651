"02_data against independent oracles: the files are made here, the expected values come from PIL, torch, tokenizers and open_clip."
import csv, io, json, random, sys, subprocess, tarfile
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from unclip_nb.core import UnclipError
from unclip_nb.data import (Batches, Captioned, OpenCLIPTokenizer, ShapesData, Tokenizer,
                            read_picture, write_text)
from unclip_nb.embeddings import EmbeddedData
from unclip_nb.files import load_captioned
from unclip_nb.folders import PictureData, hold_out, of_split

EMOJI = Path(__file__).parents[2] / "shared/data/emoji"

@pytest.fixture(scope="module")
def tokenizer(): return Tokenizer.train(ShapesData("train").captions(3000))

@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    "What `datasets` prepares goes to a folder of the test."
    import datasets
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield patch.undo()

def png(color, size=(20, 20)):
    b = io.BytesIO()
    Image.new("RGB", size, color).save(b, "PNG")
    return b.getvalue()

def color_of(i): return (i * 6 % 256, i * 40 % 256, 255 - i * 5 % 256)

def make_folder(folder, n, how="jsonl"):
    "n flat pictures, each of its own colour, captioned 'picture i'."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i:03}.png").write_bytes(png(color_of(i)))
    rows = [{"file_name": f"{i:03}.png", "text": f"picture {i}"} for i in range(n)]
    if how == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if how == "txt":
        [(folder / f"{i:03}.txt").write_text(f"picture {i}\n") for i in range(n)]
    if how == "csv":
        with open(folder / "metadata.csv", "w", newline="") as f:
            w = csv.DictWriter(f, ["file_name", "text"])
            w.writeheader()
            w.writerows(rows)
    return folder

def check(batch):
    "Each caption's picture has the colour that was written under that number."
    for x, text in zip(batch["image"], batch["caption"]):
        want = torch.tensor(color_of(int(text.split()[-1]))) / 127.5 - 1
        assert torch.allclose(x.mean((1, 2)), want, atol=1e-6), text

# ---- tokenizer

def test_tokens_have_the_shape_open_clip_pools_on(tokenizer):
    tokens = tokenizer.encode(["a red star", "", "a star above " * 40])
    assert tokens.shape == (
        3, 24
    ) and tokens.dtype == torch.long and tokenizer.end_id == tokenizer.vocab_size - 1 == tokens.max(
    )
    assert ((tokens == tokenizer.end_id).sum(1) == 1).all() and (tokens[:, 0] == tokens[0, 0]).all()
    for row in tokens.tolist():
        assert all(t == 0 for t in row[row.index(tokenizer.end_id) +
                                       1:]) and 0 not in row[:row.index(tokenizer.end_id)]
    assert tokens[2, -1] == tokenizer.end_id

def test_every_text_survives_the_round_trip(tokenizer):
    wide = Tokenizer.train(ShapesData("train").captions(200), context_length=300)
    rng = random.Random(0)
    for text in [
            "<end> <pad> <start>", "日本語 🎉", "x" * 40, "".join(rng.choices("abc é€★", k=30)).strip()
    ]:
        assert wide.decode(wide.encode([text]))[0].split() == text.lower().split()
    data = ShapesData("valid").captions(300)
    assert tokenizer.decode(tokenizer.encode(data)) == data

def test_training_is_deterministic_and_case_and_space_do_not_matter(tokenizer):
    assert Tokenizer.train(
        ShapesData("train").captions(3000)).bpe.to_str() == tokenizer.bpe.to_str()
    a = tokenizer.encode(["  A RED   star ", "a red star"])
    assert torch.equal(a[0], a[1])

def test_ids_are_those_of_the_library(tokenizer, tmp_path):
    from tokenizers import Tokenizer as Library
    tokenizer.save(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    captions = ShapesData("valid").captions(50)
    assert tokenizer.encode(captions).tolist() == [e.ids for e in library.encode_batch(captions)]
    assert torch.equal(Tokenizer.load(tmp_path).encode(captions), tokenizer.encode(captions))
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]

def test_full_captions_fit(tokenizer):
    tokens = tokenizer.encode(ShapesData("train", full=True).captions(1000))
    assert (tokens != 0).sum(1).max() < 24

def test_tokenizer_errors(tmp_path):
    with pytest.raises(UnclipError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UnclipError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UnclipError, match="vocab_size"):
        Tokenizer.train(["a"], vocab_size=100)

def test_open_clip_tokenizer_equals_open_clip(tmp_path):
    tok = OpenCLIPTokenizer("ViT-B-32")
    import open_clip
    captions = ["a red star above a blue ring", "ünïcode"]
    assert torch.equal(tok.encode(captions), open_clip.tokenize(
        captions)) and tok.encode(captions).max() == tok.end_id == tok.vocab_size - 1
    assert tok.decode(tok.encode(captions)) == captions
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert isinstance(again, OpenCLIPTokenizer) and again.name == "ViT-B-32"
    with pytest.raises(UnclipError, match="no model"):
        OpenCLIPTokenizer("nonsense")
    with pytest.raises(UnclipError, match="Hugging Face"):
        OpenCLIPTokenizer("ViT-B-16-SigLIP")

# ---- one picture

def save(im, **kw): b = io.BytesIO(); im.save(b, "PNG", **kw); return b.getvalue()

def test_crop_is_central_and_resize_is_antialiased():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(90, 166, (3, 96, 160), generator=g, dtype=torch.uint8)     # PIL rounds and clips between its two passes
    im = Image.fromarray(x.permute(1, 2, 0).numpy())
    want = F.interpolate(x[None, :, :, 32:128].float(), (32, 32), mode="bicubic",
                         antialias=True)[0].clamp(0, 255)
    assert (read_picture(save(im), 32).float() - want)[..., 1:-1].abs().max() <= 1.1            # (at the cut PIL's filter looks beyond it)
    assert torch.equal(read_picture(save(im.crop((32, 0, 128, 96))), 96), x[:, :, 32:128])       # same size: untouched

@pytest.mark.parametrize("tag,turn", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotation(tag, turn):
    x = torch.zeros(3, 24, 24, dtype=torch.uint8)
    x[0, :12, :12] = 255
    x[1, 12:, :6] = 255
    exif = Image.Exif()
    exif[0x0112] = tag
    got = read_picture(save(Image.fromarray(x.permute(1, 2, 0).numpy()), exif=exif), 24)
    assert torch.equal(got, torch.rot90(x, turn, (1, 2)))

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16"])
def test_modes(mode):
    if mode == "P":
        im = Image.new("P", (8, 8), 0)
        im.putpalette([10, 20, 30])
        data, want = save(im, transparency=0), (255, 255, 255)
    elif mode == "CMYK":
        b = io.BytesIO()
        Image.new(mode, (8, 8), (0, 0, 0, 0)).save(b, "TIFF")
        data, want = b.getvalue(), (255, 255, 255)
    elif mode == "I;16":
        data, want = save(Image.new(mode, (8, 8), 100 * 256)), (100, 100, 100)
    else:
        value, want = {
            "RGBA": ((200, 0, 0, 51), (244, 204, 204)), "LA": ((0, 51), (204, ) * 3),
            "L": (77, (77, ) * 3), "1": (1, (255, ) * 3)
        }[mode]
        data = save(Image.new(mode, (8, 8), value))
    assert (read_picture(data, 8).float() - torch.tensor(want)[:, None, None]).abs().max() <= 1

def test_transparent_edges_do_not_bleed():
    "Invisible pixels of any colour must not tint the resized picture."
    a, b = Image.new("RGBA", (64, 64), (255, 0, 0, 0)), Image.new("RGBA", (64, 64), (0, 0, 255, 0))
    for im in (a, b):
        im.paste((0, 128, 0, 255), (16, 16, 48, 48))
    assert torch.equal(read_picture(save(a), 13), read_picture(save(b), 13))

# ---- the shapes

def test_shapes_rows_do_not_depend_on_the_batch():
    d = ShapesData("train", 24)
    whole = d.batch([5, 900_000, 17])
    for k, i in enumerate([5, 900_000, 17]):
        assert torch.allclose(
            d[i]["image"], whole["image"][k],
            atol=1e-6) and d[i]["caption"] == whole["caption"][k] == d.texts([i])[0]
    assert whole["image"].shape == (3, 3, 24,
                                    24) and -1 <= whole["image"].min() and whole["image"].max() <= 1
    assert d[-1]["caption"] == d.texts([999_999])[0]
    with pytest.raises(IndexError):
        d[1_000_000]

def test_near_misses_come_in_fours_and_stay_together():
    from unclip_nb.core import generator
    from unclip_nb.shapes import near_misses, scene_at
    fours = ShapesData("train", size=16, near=True)
    assert [fours.scene(k) for k in (40, 41, 42, 43)
            ] == [scene_at(10), *near_misses(scene_at(10), generator("near", "train", 10))]
    for world in (1, 2):
        rows = Batches(fours, 16, seed=3).rows(5, world)
        assert all(rows[k:k + 4] == list(range(4 * (rows[k] // 4), 4 * (rows[k] // 4) + 4))
                   for k in range(0, len(rows), 4))
    assert len({r // 4 for s in range(20) for r in Batches(fours, 16).rows(s)}) == 80          # no group twice
    texts = fours.texts(range(400))
    assert all(
        len({
            " ".join(w for w in t.split() if w in ("picture", "see", "there", "background"))
            for t in texts[k:k + 4]
        }) == 1 for k in range(0, 400, 4))  # worded alike

def test_shapes_captions_tell_the_truth():
    from unclip_nb.shapes import parse_caption, scene_at
    for split in ("train", "valid", "unseen"):
        for i, text in enumerate(ShapesData(split, full=True).captions(100)):
            assert {(o.shape, o.color)
                    for o in scene_at(i, split).objects} == {(o.shape, o.color)
                                                             for o in parse_caption(text).objects}

def test_shapes_need_neither_datasets_nor_open_clip():
    code = (
        "import sys; from unclip_nb.data import *; from unclip_nb.files import load_captioned; d = load_captioned('shapes'); t = Tokenizer.train(d.captions(50)); Batches(d, 4, t).at(0); "
        "assert not {'datasets', 'open_clip', 'torchvision', 'pandas'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)

# ---- files

@pytest.mark.parametrize("how", ["jsonl", "csv", "txt"])
def test_folder_layouts(tmp_path, how):
    make_folder(tmp_path / "set", 40, how)
    train, valid = (load_captioned(tmp_path / "set", s, size=8) for s in ("train", "valid"))
    assert (len(train), len(valid)) == (38, 2) and set(train.captions(99)) | set(
        valid.captions(99)) == {f"picture {i}"
                                for i in range(40)}
    check(train.batch(range(38)))
    check(valid.batch([1, 0]))
    assert valid.captions(2) == load_captioned(tmp_path / "set", "valid", size=8).captions(2)

def test_folder_with_its_own_splits(tmp_path):
    make_folder(tmp_path / "train", 5)
    make_folder(tmp_path / "validation", 3)
    make_folder(tmp_path / "test", 2)
    train, valid = (load_captioned(tmp_path, s, size=8) for s in ("train", "valid"))
    assert (len(train), len(valid)) == (5, 3)
    check(valid.batch(range(3)))

def make_tar(file, rows, captions=True):
    with tarfile.open(file, "w") as tar:
        for i in rows:
            for name, data in ((f"{i:03}.png", png(color_of(i))), (f"{i:03}.txt",
                                                                   f"picture {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

def make_parquet(file, rows, columns=("image", "text")):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(
        pa.table({
            "id": list(rows), columns[0]: [png(color_of(i)) for i in rows],
            columns[1]: [f"picture {i}" for i in rows]
        }), file)

@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make,suffix", [(make_parquet, "parquet"), (make_tar, "tar")])
def test_shards(tmp_path, make, suffix, streaming):
    make(tmp_path / f"a.{suffix}", range(30))
    make(tmp_path / f"b.{suffix}", range(30, 40))
    got = {
        s: load_captioned(tmp_path / f"*.{suffix}", s, size=8, streaming=streaming)
        for s in ("train", "valid")
    }
    texts = {s: d.captions(99) for s, d in got.items()}
    assert len(texts["valid"]) == 2 and sorted(texts["train"] + texts["valid"]) == sorted(
        f"picture {i}" for i in range(40))
    check(Batches(got["train"], 16).at(1))
    assert load_captioned(tmp_path, size=8, streaming=streaming).captions(99) == texts["train"]      # the folder means the same

def test_shards_with_their_own_splits_and_odd_columns(tmp_path):
    make_parquet(tmp_path / "train-00000.parquet", range(6), ("photo", "words"))
    make_parquet(tmp_path / "valid-00000.parquet", range(6, 9), ("photo", "words"))
    with pytest.raises(UnclipError, match="image_column"):
        load_captioned(tmp_path, size=8)
    kw = dict(size=8, image_column="photo", caption_column="words")
    train, valid = load_captioned(tmp_path, **kw), load_captioned(tmp_path, "valid", **kw)
    assert (len(train), len(valid)) == (6, 3)
    check(valid.batch(range(3)))
    with pytest.raises(UnclipError, match="no column 'nope'.*words"):
        load_captioned(tmp_path, size=8, image_column="photo", caption_column="nope")

def test_bad_rows_are_named_skipped_and_counted(tmp_path, caplog):
    folder = make_folder(tmp_path / "set", 40)
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[:len(whole) // 2])
    (folder / "004.png").write_text("not a picture")
    (folder / "005.png").unlink()
    lines = [json.loads(x) for x in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[6]["text"] = "  "
    lines[7]["text"] = None
    del lines[8]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    parts = [load_captioned(folder, s, size=8) for s in ("train", "valid")]
    told = " ".join(t for d in parts for t in d.skipped)
    for name in ("003.png: unreadable", "004.png: unreadable", "005.png: the file is missing",
                 "006.png: empty", "007.png: empty", "008.png: no caption"):
        assert name in told, name
    assert "set: skipped" in caplog.text and "of 3" in caplog.text and sum(map(len, parts)) == 34
    for d in parts:
        check(d.batch(range(len(d))))

@pytest.mark.parametrize("streaming", [False, True])
def test_large_sets_and_streams_step_over_a_broken_picture(tmp_path, streaming, caplog):
    folder = make_folder(tmp_path / "set", 20, "txt")
    (folder / "009.png").write_bytes(b"junk")
    data = load_captioned(folder, size=8, streaming=streaming)
    if not streaming:
        data = PictureData(data.rows, 8, "set", keep=False)
    for s in range(4):
        check(Batches(data, 8).at(s))
    assert sum("009.png: unreadable" in t
               for t in data.skipped) == 1 and caplog.text.count("009.png") >= 1

def test_decoded_once_or_as_read_gives_the_same(tmp_path):
    data = load_captioned(make_folder(tmp_path / "set", 12), size=8)
    assert data.pixels is not None
    lazy = PictureData(data.rows, 8, keep=False)
    assert lazy.pixels is None
    assert torch.equal(lazy.batch([3, 1])["image"], data.batch([3, 1])["image"])

@pytest.mark.parametrize("spoil,message", [
    (lambda f: [p.unlink() for p in f.glob("*.txt")], "no captions in"),
    (lambda f: [p.write_text(" ") for p in f.glob("*.txt")], "no captions in"),
    (lambda f: [p.write_text("x") for p in f.glob("*.png")], "none of its"),
    (lambda f: [p.unlink() for p in f.iterdir()], "no pictures in"),
    (lambda f: (f / "metadata.jsonl").write_text("{broken"), "metadata.jsonl cannot be read"),
    (lambda f: (f / "metadata.jsonl").write_text('{"name": "a"}'), "without file_name"),
    (lambda f: (f / "a.parquet").write_text("junk"), "while reading a.parquet"),
])
def test_useless_folders(tmp_path, spoil, message):
    spoil(make_folder(tmp_path / "set", 6, "txt"))
    with pytest.raises(UnclipError, match=message) as e:
        load_captioned(tmp_path / "set", size=8)
    assert "\n" not in str(e.value)

def test_missing_sources(monkeypatch, tmp_path):
    import huggingface_hub, datasets
    for c in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(c, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnclipError, match="check the path"):
        load_captioned("no/such/folder")
    with pytest.raises(UnclipError, match="check the path"):
        load_captioned("nowhere")
    with pytest.raises(UnclipError, match="hub gives no data set"):
        load_captioned("nobody/nothing-at-all")
    with pytest.raises(UnclipError, match="cannot read .*a.zip"):
        (tmp_path / "a.zip").write_text("")
        load_captioned(tmp_path / "a.zip")
    with pytest.raises(UnclipError, match="no split 'best'"):
        load_captioned("shapes", "best")
    with pytest.raises(UnclipError, match="no split 'best'"):
        load_captioned(tmp_path, "best")

def test_hold_out_keeps_equal_keys_together():
    keys = [f"{i % 97}" for i in range(250)]
    train, valid = hold_out(keys, "train"), hold_out(keys, "valid")
    assert sorted(train + valid) == list(range(250)) and len(
        {keys[i]
         for i in valid}) == 5 and not {keys[i]
                                        for i in train} & {keys[i]
                                                           for i in valid}
    assert hold_out(["a", "b"], "train") != hold_out(
        ["a", "b"], "valid") and hold_out(["a"], "train") == hold_out(["a"], "valid") == [0]

def test_split_words():
    assert of_split(["latest/a", "contest/b"], "valid") == ([0, 1], False)                      # "test" inside another word is no split
    assert of_split(["train", "validation", "test"], "valid") == ([1], True) and of_split(
        ["train", "test"], "train") == ([0], True)
    assert of_split(["test"], "train") == ([0], False)

@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji are not beside this checkout")
def test_emoji():
    train, valid = load_captioned(EMOJI, size=32), load_captioned(EMOJI, "valid", size=32)
    assert (len(train), len(valid)) == (1290, 68) and not train.skipped
    rows = [json.loads(x) for x in (EMOJI / "metadata.jsonl").read_text().splitlines()]
    file = {r["text"]: r["file_name"] for r in rows}[valid.captions(1)[0]]
    want = Image.open(EMOJI / file).convert("RGB").resize((32, 32), Image.BICUBIC)
    assert torch.equal(
        valid[0]["image"],
        torch.tensor(list(want.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 127.5 - 1)

# ---- batches

class Numbers(Captioned):
    def __init__(self, n, words=None): self.n, self.words = n, words or n
    def __len__(self): return self.n
    def images(self, indices): return torch.tensor(indices).float().view(-1, 1, 1, 1)
    def texts(self, indices): return [f"word {i % self.words}" for i in indices]

def ids(batch): return batch["image"].flatten().int().tolist()

@pytest.mark.parametrize("n,size", [(10, 3), (7, 7), (3, 8), (64, 16)])
def test_every_epoch_sees_every_row_once(n, size):
    b = Batches(Numbers(n), size, seed=3)
    got = [i for s in range(4 * n) for i in ids(b.at(s))]
    epochs = [got[k:k + n] for k in range(0, len(got) - n + 1, n)]
    assert all(sorted(e) == list(range(n)) for e in epochs) and len(set(map(tuple, epochs))) > 1
    assert got != [i for s in range(4 * n) for i in ids(Batches(Numbers(n), size, seed=4).at(s))]

def test_batches_have_no_memory():
    steps = [5, 0, 9, 5, 2]
    b = Batches(Numbers(10), 4)
    assert [ids(b.at(s)) for s in steps] == [ids(Batches(Numbers(10), 4).at(s)) for s in steps]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    b.at(11)
    assert torch.equal(state, torch.random.get_rng_state())

@pytest.mark.parametrize("distinct", [False, True])
def test_processes_share_one_batch(distinct):
    data = Numbers(100, 50)
    for step in range(5):
        one, four = Batches(data, 16, distinct=distinct), Batches(data, 4, distinct=distinct)
        assert ids(
            one.at(step)) == [i for r in range(4) for i in ids(four.at(step, rank=r, world=4))]

@pytest.mark.parametrize("n,words,size", [(100, 50, 40), (40, 20, 20), (1000, 999, 100)])
def test_distinct_batches_have_no_twins(n, words, size):
    data = Numbers(n, words)
    plain, b = Batches(data, size), Batches(data, size, distinct=True)
    for s in range(8):
        texts = b.at(s)["caption"]
        assert len(set(texts)) == size
        first = {data.texts([i])[0]: i for i in reversed(ids(plain.at(s)))}
        assert set(first.values()) <= set(ids(b.at(s)))                         # only twins were swapped
    with pytest.raises(UnclipError, match=f"only {words} different captions"):
        Batches(data, words + 1, distinct=True).at(0)

def test_tokens_and_prepare(tokenizer):
    b = Batches(ShapesData("train", 16),
                4,
                tokenizer,
                prepare=lambda x: {**x, "n": len(x["tokens"])}).at(2)
    assert torch.equal(b["tokens"], tokenizer.encode(b["caption"])) and b["n"] == 4

@pytest.mark.parametrize("distinct", [False, True])
def test_streams_resume_and_share(tmp_path, distinct):
    folder = make_folder(tmp_path / "set", 20, "txt")
    [(folder / f"{i:03}.txt").write_text("picture 0") for i in (0, 1, 2)]
    [(folder / f"{i:03}.png").write_bytes(png(color_of(0))) for i in (1, 2)]
    new = lambda size=4: Batches(
        load_captioned(folder, size=8, streaming=True), size, seed=2, distinct=distinct)
    b = new()
    walk = [b.at(s) for s in range(12)]
    assert all(torch.equal(new().at(s)["image"], walk[s]["image"]) for s in (0, 7, 11))          # resumed in a new process
    assert b.at(3)["caption"] == walk[3]["caption"]                                             # and backwards
    assert new(2).at(5, 0, 2)["caption"] + new(2).at(5, 1, 2)["caption"] == walk[5]["caption"]
    for x in walk:
        check(x)
        assert not distinct or len(set(x["caption"])) == 4
    if distinct:
        with pytest.raises(UnclipError, match="different captions"):
            new(30).at(0)

# ---- embeddings

def write_embeddings(folder, sizes=(3, 2)):
    start = 0
    for k, n in enumerate(sizes):
        i = torch.arange(start, start + n)
        start += n
        save_file(
            {
                "zi": i[:, None].half().repeat(1, 4),
                "zt": -i[:, None].half().repeat(1, 4), "text": i.view(-1, 1, 1).half().repeat(
                    1, 6, 5), "tokens": i[:, None].repeat(1, 6).int()
            }, folder / f"shard_{k:05d}.safetensors")
    write_text(folder / "captions.jsonl",
               "".join(json.dumps({"caption": f"row {i}"}) + "\n" for i in range(start)))
    write_text(folder / "meta.json", json.dumps({"clip_fingerprint": "abc", "rows": start}))

def test_a_hub_id_gives_its_own_splits(monkeypatch):
    "The road to the hub, with the network's two ends replaced."
    import datasets
    png = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(png, "PNG")
    rows = lambda n: datasets.Dataset.from_dict({
        "image": [{"bytes": png.getvalue(), "path": None}] * n,
        "text": [f"row {i}" for i in range(n)]
    }).cast_column("image", datasets.Image(decode=False))
    monkeypatch.setattr(
        datasets, "get_dataset_split_names",
        lambda name: {"someone/two": ["train", "test"], "someone/one": ["train"]}[name])
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda name, split, streaming: rows({"train": 40, "test": 3}[split]))
    assert [len(load_captioned("someone/two", split=s, size=8))
            for s in ("train", "valid")] == [40, 3]
    train, valid = (load_captioned("someone/one", split=s, size=8) for s in ("train", "valid"))       # no split of its own: 5 % are held out
    assert (len(train), len(valid)) == (38,
                                        2) and not set(train.captions(99)) & set(valid.captions(99))
    assert train[0]["image"].shape == (3, 8, 8) and train[0]["image"][0].mean() > 0.99

def test_embedded_rows_come_from_their_shard(tmp_path):
    write_embeddings(tmp_path)
    data = EmbeddedData(tmp_path, "abc")
    b = data.batch([4, 0, 3, 2])
    assert len(data) == 5 and b["zi"][:, 0].tolist() == [
        4, 0, 3, 2
    ] and b["tokens"].dtype == torch.long and b["text"].shape == (4, 6, 5)
    assert b["caption"] == ["row 4", "row 0", "row 3", "row 2"
                            ] and b["zt"].dtype == torch.float32 and data[-1]["caption"] == "row 4"

def test_embedded_errors(tmp_path):
    with pytest.raises(UnclipError, match="no finished embeddings"):
        EmbeddedData(tmp_path)
    write_embeddings(tmp_path)
    with pytest.raises(UnclipError, match="embedded with CLIP abc, not xyz"):
        EmbeddedData(tmp_path, "xyz")
    whole = (tmp_path / "meta.json").read_text()
    for broken in ("{", "[]", "5"):
        (tmp_path / "meta.json").write_text(broken)
        with pytest.raises(UnclipError, match="meta.json is broken"):
            EmbeddedData(tmp_path)
    (tmp_path / "meta.json").write_text(whole)
    file = tmp_path / "shard_00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(UnclipError, match="shard_00001.safetensors is broken"):
        EmbeddedData(tmp_path)
    file.unlink()
    with pytest.raises(UnclipError, match="3 embeddings for 5 captions"):
        EmbeddedData(tmp_path)

def test_write_text_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1

def test_an_old_library_is_named_and_not_the_file(tmp_path, monkeypatch):
    "Where an installed version is below the floor of settings.ini, the message says which and what to do."
    from importlib import metadata
    from unclip_nb.data import import_open_clip
    from unclip_nb.folders import import_datasets
    (tmp_path/"tokenizer.json").write_text('{"version": "9.0", "model": {}}')
    with pytest.raises(UnclipError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    have = metadata.version
    for name, old, call in (("tokenizers", "0.19.1", lambda: Tokenizer.load(tmp_path)),
                            ("open_clip_torch", "2.24.0", import_open_clip), ("datasets", "2.21.0",
                                                                              import_datasets)):
        monkeypatch.setattr(metadata,
                            "version",
                            lambda n, name=name, old=old: old if n == name else have(n))
        with pytest.raises(UnclipError, match=f"^{name} {old} is too old .*pip install") as e:
            call()
        assert "\n" not in str(e.value) and "tokenizer.json" not in str(e.value)
    monkeypatch.setattr(metadata, "version", have)
    assert import_open_clip() and import_datasets()

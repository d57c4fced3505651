"Feeding: workers, streams that are found by arithmetic, what is drawn at each step, and embeddings beside pictures."
import json, os, signal, subprocess, sys
import pytest, torch
from PIL import Image, ImageDraw
from unclip_nb.core import UnclipError
from unclip_nb.data import Batches, Captioned, ShapesData, Tokenizer, fetched, read_picture
from unclip_nb.files import StreamData, TablePiece, braces, load_captioned, source_files
from unclip_nb.folders import Framing, PictureData
from test_data import check, color_of, make_folder, make_parquet, make_tar, png, private_cache

def same(a, b):
    return all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()) and a.keys() == b.keys()

# ---- workers

def sources(tmp_path):
    folder = make_folder(tmp_path / "set", 30)
    (tmp_path / "tables").mkdir()
    for k in range(4):
        make_parquet(tmp_path / "tables" / f"{k}.parquet", range(10 * k, 10 * k + 10))
    yield ShapesData("train", 16)
    yield load_captioned(folder, size=8)
    yield PictureData(load_captioned(folder, size=8).rows, Framing(8, flip=True, random_crop=True))
    yield load_captioned(tmp_path / "tables", size=8, streaming=True)

@pytest.mark.parametrize("distinct", [False, True])
def test_batches_are_the_same_whatever_the_number_of_workers(tmp_path, distinct):
    tokenizer = Tokenizer.train(ShapesData("train").captions(200))
    for data in sources(tmp_path):
        want = Batches(data, 6, tokenizer, seed=3, distinct=distinct)
        for rank, world in ((0, 1), (1, 2)):
            for workers in (0, 1, 3):
                feed = Batches(data, 6, tokenizer, seed=3, distinct=distinct).stream(2, 5, rank, world, workers=workers)
                got = list(feed)
                assert len(got) == 3
                assert all(same(b, want.at(2 + i, rank, world)) for i, b in enumerate(got)), (type(data), workers)

def test_a_stream_of_batches_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    feed = Batches(ShapesData("train", 8), 2).stream(workers=1)
    next(feed)
    feed.close()
    assert torch.equal(before, torch.random.get_rng_state())

def test_prepare_runs_in_this_process():
    here = os.getpid()
    b = Batches(ShapesData("train", 8), 2, prepare=lambda batch: {**batch, "pid": os.getpid()})
    assert [x["pid"] for x in b.stream(0, 2, workers=2)] == [here, here]

def test_an_error_of_a_worker_is_one_line(tmp_path):
    with pytest.raises(UnclipError, match="^only 8 different captions") as e:
        class Few(ShapesData):
            def texts(self, indices): return [f"word {i % 8}" for i in indices]
        list(Batches(Few("valid", 8), 9, distinct=True).stream(0, 1, workers=2))
    assert "\n" not in str(e.value)

def test_a_killed_worker_is_one_line():
    def fetch(i):
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return i
    with pytest.raises(UnclipError, match="fewer --workers") as e:
        list(fetched(fetch, ((i,) for i in range(9)), workers=2))
    assert "\n" not in str(e.value)

# ---- streams

def stream_of(tmp_path, n=80, each=10, suffix="parquet", **how):
    folder = tmp_path / suffix
    if not folder.exists():
        folder.mkdir()
        for k in range(0, n, each):
            (make_parquet if suffix == "parquet" else make_tar)(folder / f"train-{k // each:03}.{suffix}", range(k, k + each))
        (make_parquet if suffix == "parquet" else make_tar)(folder / f"valid-000.{suffix}", range(n, n + 3))
    return load_captioned(folder, size=8, streaming=True, **how)

@pytest.mark.parametrize("n,size", [(80, 16), (80, 7), (30, 8), (10, 4)])
def test_every_epoch_of_a_stream_shows_every_row_once(tmp_path, n, size):
    data = stream_of(tmp_path, n)
    rows = [r for s in range(3 * n) for r in data.rows_of(4, s, size)]
    steps = n                                       # `size` epochs in n steps
    assert sorted(rows[:steps * size]) == sorted(list(range(n)) * size)
    whole = n // size                               # steps that lie inside the first epoch
    assert len(set(rows[:whole * size])) == whole * size
    assert rows[:n] != [r for s in range(3 * n) for r in data.rows_of(5, s, size)][:n]

@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_a_resumed_stream_opens_no_earlier_shard(tmp_path, suffix):
    "All shards but those of one step are deleted: that step still comes, so nothing else was read."
    first = stream_of(tmp_path, suffix=suffix)
    if suffix == "tar":                             # their lengths are known, as webdataset writes them
        names = sorted(f.name for f in (tmp_path / "tar").glob("*.tar"))
        (tmp_path / "tar" / "sizes.json").write_text(json.dumps({n: 10 for n in names if "train" in n}))
    want = [Batches(first, 2, seed=1).at(s) for s in range(40)]
    data = stream_of(tmp_path, suffix=suffix)       # a new process
    needed = {r // 10 for r in data.rows_of(1, 37, 2)}
    for k in range(8):
        if k not in needed:
            (tmp_path / suffix / f"train-{k:03}.{suffix}").unlink()
    assert len(needed) <= 2 and same(Batches(data, 2, seed=1).at(37), want[37])
    with pytest.raises(UnclipError, match="check the file and the network|can be read"):
        [Batches(data, 2, seed=1).at(s) for s in range(37)]

def test_ranks_and_workers_open_their_own_shards(tmp_path):
    data = stream_of(tmp_path)
    for world in (2, 4, 8):
        opened = [set() for _ in range(world)]
        for step in range(5):                       # one epoch of 80 rows
            rows = data.rows_of(0, step, 16)
            for rank in range(world):
                opened[rank] |= {r // 10 for r in rows[rank * 16 // world:(rank + 1) * 16 // world]}
        assert sum(map(len, opened)) == len(set.union(*opened)) == 8, opened
    rows = []
    data.batch = lambda r, draws=None: rows.append(r) or {"image": torch.zeros(len(r), 1), "caption": [""] * len(r)}
    whole = Batches(data, 16)
    [whole._load(s, 0, 1, part, 4) for s in range(5) for part in range(4)]
    parts = [{r // 10 for k in range(p, 20, 4) for r in rows[k]} for p in range(4)]
    assert [len(p) for p in parts] == [2, 2, 2, 2] and len(set.union(*parts)) == 8

def test_sizes_that_are_wrong_lose_no_row(tmp_path):
    make_tar(tmp_path / "a.tar", range(10))
    for told in (11, 25):
        (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": told}))
        data = load_captioned(tmp_path / "a.tar", size=8, streaming=True)
        seen = {t for s in range(30) for t in Batches(data, 5).at(s)["caption"]}
        assert len(seen) == 9 and data.captions(99) == sorted(seen)         # row 0 is held out
    (tmp_path / "sizes.json").write_text("[1")
    assert len(load_captioned(tmp_path / "a.tar", size=8, streaming=True)) == 9

def test_a_stream_of_rows_without_captions_says_so(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table({"image": [png("red")] * 4, "text": ["", " ", None, ""]}), tmp_path / "a.parquet")
    with pytest.raises(UnclipError, match="no row has a caption"):
        Batches(load_captioned(tmp_path, size=8, streaming=True), 2).at(0)

def test_row_groups_are_pieces(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    table = pa.table({"image": [png(color_of(i)) for i in range(40)], "text": [f"picture {i}" for i in range(40)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    data = load_captioned(tmp_path / "a.parquet", size=8, streaming=True)
    assert [len(p) for p in data.pieces] == [10, 10, 10, 10] and len(data) == 38
    for s in range(10):
        check(Batches(data, 8, distinct=True).at(s))

# ---- sources

@pytest.mark.parametrize("text,count,last", [("a{000..012}.tar", 13, "a012.tar"), ("{a,b}{1..2}", 4, "b2"), ("plain", 1, "plain"),
                                             ("a{b}c", 1, "a{b}c"), ("{x}{1..3}", 3, "{x}3")])
def test_braces(text, count, last):
    found = braces(text)
    assert len(found) == len(set(found)) == count and found[-1] == last

def test_braces_that_stand_for_too_much_or_for_nothing(tmp_path):
    with pytest.raises(UnclipError, match="more than a million"):
        braces("{0..99999999999}.tar")
    make_tar(tmp_path / "0.tar", range(3))
    with pytest.raises(UnclipError, match="1.tar and 1 more of 3 files are missing"):
        load_captioned(tmp_path / "{0..2}.tar")
    with pytest.raises(UnclipError, match="check the path"):
        load_captioned(tmp_path / "{7..9}.tar")

def test_patterns_reach_into_folders(tmp_path):
    for k in range(3):
        (tmp_path / f"d{k}" / "e").mkdir(parents=True)
        make_tar(tmp_path / f"d{k}" / "e" / "0.tar", range(3))
    assert len(source_files(tmp_path / "**" / "*.tar")[1]) == len(source_files(tmp_path / "d{0..2}" / "e" / "*.tar")[1]) == 3

class Hub:
    "The hub's two ends: names of splits, and where the files are."
    def __init__(self, files): self.config = type("Config", (), {"data_files": {"train": files}})

@pytest.mark.parametrize("subset", [None, "small"])
def test_a_hub_stream_reads_parquet_in_place(tmp_path, monkeypatch, subset):
    import datasets
    for k in range(4):
        make_parquet(tmp_path / f"{k}.parquet", range(10 * k, 10 * k + 10))
    asked = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a: asked.append(a) or ["train"])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a: asked.append(a) or Hub([f"file://{tmp_path}/{k}.parquet" for k in range(4)]))
    parts = [load_captioned("someone/many", s, size=8, streaming=True, subset=subset) for s in ("train", "valid")]
    assert set(asked) == {("someone/many", *([subset] if subset else []))} and list(map(len, parts)) == [38, 2]
    check(Batches(parts[0], 16).at(1))
    assert parts[0].identity().get("subset") == subset
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a: Hub(["hf://x/0.tar"]))
    with pytest.raises(UnclipError, match="leave out --streaming"):
        load_captioned("someone/many", streaming=True)

@pytest.mark.parametrize("subset,match", [(None, "several subsets: choose one with --subset: small, large"), ("tiny", "no subset 'tiny'")])
def test_a_hub_set_with_subsets_lists_them(monkeypatch, subset, match):
    import datasets
    def refuse(*a): raise ValueError("Config name is missing. Please pick one among the available configs: ['small', 'large']"
                                     if subset is None else "BuilderConfig 'tiny' not found. Available: ['small', 'large']")
    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(UnclipError, match=match) as e:
        load_captioned("someone/many", subset=subset)
    assert "small, large" in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("flags", [dict(streaming=True), dict(subset="a"), dict(flip=True), dict(random_crop=True), dict(aspect="pad")])
def test_flags_that_mean_nothing_are_refused(tmp_path, flags):
    with pytest.raises(UnclipError, match="is for your own pictures"):
        load_captioned("shapes", **flags)
    make_folder(tmp_path, 4)
    if "subset" in flags:
        with pytest.raises(UnclipError, match="leave out --subset"):
            load_captioned(tmp_path, **flags)

def test_framings_that_cannot_be():
    with pytest.raises(UnclipError, match="use crop or pad"):
        Framing(8, "squash")
    with pytest.raises(UnclipError, match="nothing to crop"):
        Framing(8, "pad", random_crop=True)

# ---- what is drawn

def halves(folder, n=12, text="picture"):
    "Wide pictures: red left, green in the middle, blue right."
    folder.mkdir()
    for i in range(n):
        im = Image.new("RGB", (90, 30), "red")
        im.paste("lime", (30, 0, 60, 30))
        im.paste("blue", (60, 0, 90, 30))
        im.save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"{text} {i}")
    return folder

def test_crops_move_and_come_again(tmp_path):
    data = load_captioned(halves(tmp_path / "set"), size=9, random_crop=True)
    x = torch.cat([Batches(data, 8, seed=2).at(s)["image"] for s in range(8)])
    reds = [(y[0] > 0.9).float().mean().item() for y in x]
    assert max(reds) > 0.5 and min(reds) < 0.1 and len(set(reds)) > 4
    assert torch.equal(x[:8], Batches(data, 8, seed=2).at(0)["image"]) and not torch.equal(x[:8], Batches(data, 8, seed=3).at(0)["image"])
    still = load_captioned(tmp_path / "set", size=9)
    assert all((y[1, :, 2:-2] > 0.9).all() for y in Batches(still, 8).at(0)["image"])    # the central third

@pytest.mark.parametrize("text,turns", [("picture", True), ("the left of", False), ("to the RIGHT", False), ("a bright", True)])
@pytest.mark.parametrize("streaming", [False, True])
def test_half_of_the_pictures_are_mirrored_unless_a_side_is_named(tmp_path, text, turns, streaming):
    folder = halves(tmp_path / "set", text=text)
    data = load_captioned(folder, size=30, aspect="pad", flip=True, streaming=streaming)
    x = torch.cat([Batches(data, 8).at(s)["image"] for s in range(8)])
    turned = sum((y[2, :, :8].mean() > y[0, :, :8].mean()).item() for y in x)            # blue on the left
    assert 20 < turned < 44 if turns else turned == 0

def test_padding_keeps_the_whole_picture(tmp_path):
    x = load_captioned(halves(tmp_path / "set"), size=30, aspect="pad")[0]["image"]
    assert (x[:, :9] == 1).all() and (x[:, 21:] == 1).all() and x[0, 15, 3] > 0.9 and x[2, 15, 27] > 0.9
    assert load_captioned(tmp_path / "set", size=30, aspect="pad").identity()["aspect"] == "pad"
    assert "aspect" not in load_captioned(tmp_path / "set", size=30).identity()

# ---- decoding at reduced size

@pytest.mark.parametrize("size", [64, 256])
def test_decoding_at_reduced_size_is_as_good(tmp_path, size):
    "Against the exact picture, averaged from all pixels: never farther than a full decode by more than half a grey level."
    g = torch.Generator().manual_seed(0)
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 48, 48, generator=g), (512, 512), mode="bicubic").clamp(0, 1)
    im = Image.fromarray((noise[0] * 255).byte().permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(im)
    for k in range(0, 512, 16):
        draw.line([(0, k), (511, 511 - k)], fill=(k // 2, 0, 255 - k // 2), width=2)
    im.save(tmp_path / "a.jpg", quality=95)
    exact = torch.nn.functional.adaptive_avg_pool2d(torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8)
                                                    .view(512, 512, 3).permute(2, 0, 1).float(), size)
    full = Image.open(tmp_path / "a.jpg").convert("RGB").resize((size, size), Image.BICUBIC)
    full = torch.frombuffer(bytearray(full.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).float()
    reduced = read_picture(tmp_path / "a.jpg", size).float()
    error = lambda x: (x - exact).abs().mean().item()
    assert error(reduced) <= error(full) + 0.5, (error(reduced), error(full))

# ---- embeddings

@pytest.fixture(scope="module")
def clip():
    from unclip_nb.clip import CLIP
    from unclip_nb.core import data_path
    return CLIP.from_pretrained(data_path("tiny") / "clip").eval()

def test_embeddings_by_workers_are_the_same(clip, tmp_path):
    from unclip_nb.embeddings import EmbeddedData, embed
    data = ShapesData("valid", size=32)
    a, b = (EmbeddedData(embed(clip, data, tmp_path / str(w), n=24, shard=10, batch_size=4, workers=w, progress=False)) for w in (0, 2))
    assert same(a.batch(range(24)), b.batch(range(24)))

def test_embeddings_beside_their_pictures(clip, tmp_path):
    from unclip_nb.embeddings import EmbeddedData, embed
    folder = make_folder(tmp_path / "set", 20)
    data = load_captioned(folder, size=32)
    where = embed(clip, data, tmp_path / "e", progress=False)
    both = EmbeddedData(where, clip.fingerprint, pictures=data)
    live = Batches(data, 4, clip.tokenizer, prepare=clip.embed_batch).at(3)
    stored = Batches(both, 4, clip.tokenizer).at(3)
    assert torch.equal(live["image"], stored["image"]) and live["caption"] == stored["caption"]
    assert torch.allclose(live["zi"], stored["zi"], atol=1e-5) and (live["text"] - stored["text"]).abs().max() < 0.01
    for other in (load_captioned(make_folder(tmp_path / "other", 22), size=32), load_captioned(folder, size=32, aspect="pad")):
        with pytest.raises(UnclipError, match="embedded from other pictures"):
            EmbeddedData(where, clip.fingerprint, pictures=other)
    with pytest.raises(UnclipError, match="leave out flip and random-crop"):
        EmbeddedData(where, clip.fingerprint, pictures=load_captioned(folder, size=32, flip=True))

@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")
def test_opening_embeddings_reads_no_tensors(tmp_path):
    from safetensors.torch import save_file
    (tmp_path / "e").mkdir()
    for k in range(4):
        save_file({"zi": torch.zeros(1000, 4), "text": torch.ones(1000, 25_000, dtype=torch.half)}, tmp_path / "e" / f"shard_{k:05d}.safetensors")
    (tmp_path / "e" / "captions.jsonl").write_text("".join(json.dumps({"caption": f"row {i}"}) + "\n" for i in range(4000)))
    (tmp_path / "e" / "meta.json").write_text(json.dumps({"clip_fingerprint": "abc"}))
    code = ("import sys; from unclip_nb.embeddings import EmbeddedData\n"
            "def mb(): return int(open('/proc/self/statm').read().split()[1]) * 4 // 1024\n"
            "before = mb(); data = EmbeddedData(sys.argv[1]); b = data.batch([5, 3999]); print(mb() - before, b['text'].mean().item())")
    r = subprocess.run([sys.executable, "-c", code, str(tmp_path / "e")], capture_output=True, text=True)
    grown, mean = r.stdout.split()
    assert int(grown) < 60 and float(mean) == 1, r.stdout + r.stderr            # of 200 MB on disk

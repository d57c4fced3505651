"Faults that people met with their own pictures and captions: each input is small, and the right answer was worked out by hand."
import json, os, shutil, sys, time
from pathlib import Path
import pytest, torch
from PIL import Image
from safetensors.torch import save_file
from unclip_nb.core import UnclipError
from unclip_nb.data import Batches, ShapesData, Tokenizer, what_differs, write_text
from unclip_nb.embeddings import EmbeddedData
from unclip_nb.files import load_captioned
from unclip_nb.folders import PictureData
from test_data import check, color_of, make_folder, make_parquet, make_tar, png, private_cache, write_embeddings

# ---- a data set knows what it is

def test_identity_of_the_shapes():
    assert ShapesData("valid").identity() == {
        "source": "shapes", "split": "valid", "count": 10_000, "full": False, "near": False
    }
    assert ShapesData("train", near=True).identity() != ShapesData("train").identity()

@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", ["add", "remove", "replace", "caption", "rename"])
def test_identity_changes_with_every_kind_of_change(tmp_path, change, streaming):
    folder = make_folder(tmp_path / "set", 20, "txt")
    identity = lambda at=folder: load_captioned(at, size=8, streaming=streaming).identity()
    before = identity()
    assert before == identity() == json.loads(
        json.dumps(before)) and before["count"] == 19 and before["split"] == "train"
    if change == "add":
        (folder / "100.png").write_bytes(png("red"))
        (folder / "100.txt").write_text("picture 100")
    if change == "remove":
        (folder / "003.png").unlink()
        (folder / "003.txt").unlink()
    if change == "replace":
        (folder / "003.png").write_bytes(png("red", (30, 30)))
    if change == "caption":
        (folder / "003.txt").write_text("a picture of three")
    if change == "rename":
        [(folder / f"003{s}").rename(folder / f"003b{s}") for s in (".png", ".txt")]
    assert what_differs(before, identity()) and identity()["digest"] != before["digest"]

@pytest.mark.parametrize("streaming", [False, True])
def test_identity_does_not_depend_on_the_place(tmp_path, streaming):
    folder = make_folder(tmp_path / "set", 20, "txt")
    (folder / "sub").mkdir()
    [(folder / f"004{s}").rename(folder / "sub" / f"004{s}") for s in (".png", ".txt")]
    before = load_captioned(folder, size=8, streaming=streaming).identity()
    (tmp_path / "other").mkdir()
    folder.rename(tmp_path / "other" / "moved")
    now = load_captioned(tmp_path / "other" / "moved", size=16, streaming=streaming).identity()
    assert str(tmp_path) not in json.dumps(now) and what_differs(
        before, now) =="" and now["digest"] == before["digest"]

@pytest.mark.parametrize("make,suffix", [(make_parquet, "parquet"), (make_tar, "tar")])
@pytest.mark.parametrize("streaming", [False, True])
def test_identity_of_shards(tmp_path, make, suffix, streaming):
    make(tmp_path / f"a.{suffix}", range(30))
    before = load_captioned(tmp_path, size=8, streaming=streaming).identity()
    assert what_differs(before,
                        load_captioned(tmp_path, size=8, streaming=streaming).identity()) ==""
    make(tmp_path / f"a.{suffix}", range(60))
    assert what_differs(before, load_captioned(tmp_path, size=8, streaming=streaming).identity())

def test_identity_is_quick_for_many_rows():
    import datasets
    rows = datasets.Dataset.from_dict({
        "image": [{"bytes": b"x" * (i % 99), "path": f"{i}.png"} for i in range(100_000)],
        "caption": [f"row {i}" for i in range(100_000)]
    })
    data = PictureData(rows.select(range(99_999)), 8, keep=False)
    start = time.perf_counter()
    data.identity()
    assert time.perf_counter() - start < 5                  # 0.4 s where it was written

def test_identity_of_embeddings(tmp_path):
    write_embeddings(tmp_path)
    found = EmbeddedData(tmp_path).identity()
    assert found["count"] == 5 and found["clip"] == "abc" and found["data"] is None
    write_text(tmp_path / "captions.jsonl",
               "".join(json.dumps({"caption": f"line {i}"}) + "\n" for i in range(5)))
    assert "digest" in what_differs(found, EmbeddedData(tmp_path).identity())

# ---- pictures: one place opens them, and one reason comes back

def float_tiff(folder):
    x = Image.new("F", (8, 8), 0.0)
    x.paste(1.0, (4, 0, 8, 8))
    x.save(folder / "f.tif")
    return folder / "f.tif"

def test_training_and_load_image_read_the_same_picture(tmp_path):
    from unclip_nb.core import to_tensor
    from unclip_nb.pipeline import load_image
    from unclip_nb.data import read_picture
    want = load_image(float_tiff(tmp_path))
    assert (want[:, :, :4] == -1).all() and (want[:, :, 4:] == 1).all()
    sixteen = Image.new("I;16", (8, 8), 0)
    sixteen.paste(49087, (4, 0, 8, 8))
    sixteen.save(tmp_path / "i.png")
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    side = Image.new("RGB", (8, 8), "black")
    side.paste("white", (4, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    side.save(tmp_path / "side.png", exif=exif)
    for file in sorted(tmp_path.iterdir()):
        whole = load_image(file)
        assert torch.allclose(read_picture(file, 8).float() / 127.5 - 1, whole,
                              atol=1e-6), file.name
        assert torch.equal(read_picture(file.read_bytes(), 8), read_picture(file, 8))
        assert torch.equal(to_tensor(Image.open(file)), whole)

def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    import subprocess
    Image.new("1", (13_300, 13_300)).save(tmp_path / "big.png")
    assert (tmp_path / "big.png").stat().st_size < 504_000
    code = (
        "import sys, resource; from unclip_nb.pipeline import load_image; from unclip_nb.core import UnclipError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_image(sys.argv[1])\n"
        "except UnclipError as e: print(e)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)")
    r = subprocess.run([sys.executable, "-W", "ignore", "-c", code,
                        str(tmp_path / "big.png")],
                       capture_output=True,
                       text=True)
    told, grown = r.stdout.splitlines()
    assert "big.png" in told and "177 million pixels, over the limit of 64 million" in told and int(
        grown) < 50  # MB

def test_a_large_jpeg_is_decoded_small(tmp_path):
    from unclip_nb.core import open_picture
    Image.new("RGB", (9000, 8000), "red").save(tmp_path / "a.jpg")
    with pytest.raises(UnclipError, match="72 million pixels"):
        open_picture(tmp_path / "a.jpg")
    assert open_picture(tmp_path / "a.jpg", 64).size == (1125, 1000)

@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX")
def test_what_is_not_a_file_is_named_and_nothing_hangs(tmp_path, caplog):
    from unclip_nb.pipeline import load_image
    folder = make_folder(tmp_path / "set", 40)
    os.remove(folder / "003.png")
    os.mkfifo(folder / "003.png")
    os.remove(folder / "004.png")
    (folder / "004.png").symlink_to("/dev/zero")
    os.remove(folder / "005.png")
    (folder / "005.png").mkdir()
    os.remove(folder / "006.png")
    (folder / "006.png").symlink_to(tmp_path / "nowhere.png")
    parts = [load_captioned(folder, s, size=8) for s in ("train", "valid")]
    told = [t for d in parts for t in d.skipped]
    for i in (3, 4, 5):
        assert f"00{i}.png: not a regular file" in told
    assert "006.png: the file is missing" in told and sum(map(len, parts)) == 36
    for i in (3, 4, 5):
        with pytest.raises(UnclipError, match="not a regular file"):
            load_image(folder / f"00{i}.png")

def mutants(seed, n):
    "Files of six formats with some of their bytes changed, cut or doubled."
    import io, random
    rng, whole = random.Random(seed), []
    base = Image.radial_gradient("L").resize((24, 20)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "words"
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        for mode in ("RGB", "L", "P", "RGBA", "I;16", "F", "CMYK"):
            b = io.BytesIO()
            try:
                base.convert(mode).save(b, kind, **({} if kind == "BMP" else {"exif": exif}))
            except (OSError, ValueError):
                continue
            whole.append(b.getvalue())
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        b = io.BytesIO()
        base.save(b, "TIFF", compression=compression)
        whole.append(b.getvalue())
    for _ in range(n):
        x = bytearray(rng.choice(whole))
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            k = rng.randrange(len(x)) if rng.random() < 0.5 else rng.randrange(min(len(x), 80))
            how = rng.random()
            if how < 0.7:
                x[k] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            elif how < 0.8:
                x[k:k + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"))
            elif how < 0.9:
                del x[k:k + rng.choice((1, 2, 64))]
            else:
                x[k:k] = x[k:k + 8]
            if not x:
                x = bytearray(b"x")
        yield bytes(x)

def test_no_damaged_picture_ends_in_anything_but_a_reason():
    "UNCLIP_FUZZ=40000 makes it long."
    import warnings
    from unclip_nb.data import read_picture
    reasons = {}
    for x in mutants(13, int(os.environ.get("UNCLIP_FUZZ", 3000))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_picture(x, 8).shape == (3, 8, 8)
                told = "read"
            except UnclipError as e:
                told = str(e)
        assert "\n" not in told
        reasons[told.split(":")[0]] = reasons.get(told.split(":")[0], 0) + 1
    assert reasons["read"] > 500 and len(reasons) > 4
    print(reasons)

# ---- folders, metadata and shards: named, skipped, counted


def both(source, **how):
    return [load_captioned(source, s, size=8, **how) for s in ("train", "valid")]
def texts(parts): return sorted(t for d in parts for t in d.captions(999))
def told(parts): return "\n".join(t for d in parts for t in d.skipped)

@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_are_no_splits(tmp_path, caplog, streaming):
    for k, name in enumerate(("boat", "car", "train")):
        make_folder(tmp_path / name, 6, "txt")
        for f in (tmp_path / name).glob("*.txt"):
            f.write_text(f"{name} {f.stem}")
    assert texts(both(tmp_path, streaming=streaming)) == sorted(f"{n} 00{i}"
                                                                for n in ("boat", "car", "train")
                                                                for i in range(6))
    assert "train is not taken as a split, because boat, car carries no split word" in caplog.text and "all 18" in caplog.text

def test_a_top_beside_train_is_all_used(tmp_path, caplog):
    make_folder(tmp_path, 4, "txt")
    make_folder(tmp_path / "train", 4, "txt")
    assert len(texts(
        both(tmp_path))) == 8 and "because the top carries no split word" in caplog.text

def test_a_third_split_is_named_and_counted(tmp_path, caplog):
    for name, n in (("train", 5), ("validation", 3), ("test", 2)):
        make_folder(tmp_path / name, n, "txt")
    assert list(map(len, both(tmp_path))) == [
        5, 3
    ] and "left out 2 in test, neither train nor valid" in caplog.text

@pytest.mark.parametrize("make,suffix", [(make_parquet, "parquet"), (make_tar, "tar")])
def test_a_shard_beside_train_shards_is_used(tmp_path, caplog, make, suffix):
    make(tmp_path / f"train-0.{suffix}", range(10))
    make(tmp_path / f"extra.{suffix}", range(10, 20))
    assert texts(both(tmp_path)) == sorted(
        f"picture {i}" for i in range(20)) and "is not taken as a split" in caplog.text

def tar_of(file, members):
    import io, tarfile
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

def jpg(color):
    import io
    b = io.BytesIO()
    Image.new("RGB", (20, 20), color).save(b, "JPEG", quality=100, subsampling=0)
    return b.getvalue()

@pytest.mark.parametrize("streaming", [False, True])
def test_tar_shards_of_different_kinds(tmp_path, streaming):
    tar_of(tmp_path / "a.tar", [
        x for i in range(10)
        for x in ((f"{i:03}.jpg", jpg(color_of(i))), (f"{i:03}.txt", f"picture {i}".encode()))
    ])
    make_tar(tmp_path / "b.tar", range(10, 20))
    parts = both(tmp_path, streaming=streaming)
    assert texts(parts) == sorted(f"picture {i}" for i in range(20))
    if not streaming:
        for d in parts:
            for x, text in zip(d.batch(range(len(d)))["image"], d.captions(99)):
                assert (x.mean((1, 2)) - torch.tensor(color_of(int(text.split()[1]))) / 127.5 +
                        1).abs().max() < 0.03, text

@pytest.mark.parametrize("streaming", [False, True])
def test_tar_shards_with_bad_samples(tmp_path, streaming):
    rows = [(f"{i:03}.png", png(color_of(i)))
            for i in range(12)] + [(f"{i:03}.txt", f"picture {i}".encode()) for i in range(12)]
    rows = dict(rows)
    del rows["000.txt"], rows["001.png"]
    rows["002.txt"] = b"caf\xe9"
    rows["003.txt"] = b" \n"
    rows["a.b.004.png"], rows["a.b.004.txt"] = rows.pop(
        "004.png"), b"\xef\xbb\xbf" + rows.pop("004.txt")
    rows["005.json"] = json.dumps({"caption": "picture 5", "id": 7}).encode()
    del rows["005.txt"]
    tar_of(tmp_path / "a.tar", sorted(rows.items()))
    parts = both(tmp_path, streaming=streaming)
    assert texts(parts) == sorted(f"picture {i}" for i in range(4, 12))
    for why in ("000.png: no caption", "001: no picture", "002.png: its caption is not UTF-8",
                "003.png: empty caption"):
        assert why in told(parts)
    if not streaming:
        for d in parts:
            check(d.batch(range(len(d))))

def test_a_damaged_tar_beside_whole_ones(tmp_path):
    make_tar(tmp_path / "a.tar", range(6))
    make_tar(tmp_path / "b.tar", range(6, 12))
    (tmp_path / "b.tar").write_bytes(b"junk" * 500)
    parts = both(tmp_path)
    assert texts(parts) == sorted(
        f"picture {i}" for i in range(6)) and "b.tar: damaged after 0 samples" in told(parts)
    (tmp_path / "a.tar").write_bytes(b"junk" * 500)
    with pytest.raises(UnclipError, match="no picture with a caption while reading a.tar"):
        load_captioned(tmp_path)

@pytest.mark.parametrize("how", ["jsonl", "csv", "txt"])
def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path, how):
    folder = make_folder(tmp_path / "set", 8, how)
    for f in [*folder.glob("*.txt"), *folder.glob("metadata.*")]:
        f.write_bytes(b"\xef\xbb\xbf" + f.read_bytes())
    assert texts(both(folder)) == sorted(f"picture {i}" for i in range(8))

def test_bad_rows_of_metadata_jsonl(tmp_path):
    folder = make_folder(tmp_path / "set", 12)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[0] = '{"file_name": null, "text": "x"}'
    lines[1] = '{"file_name": 7, "text": "x"}'
    lines[2] = '{"file_name": "002.png", "text": NaN}'
    lines[3] = '{"file_name": "003.png"'
    lines[4] = "[" * 100_000
    lines[5] = '["005.png", "x"]'
    lines[6] = '{"file_name": "006.png", "text": "\\ud800"}'
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    parts = both(folder)
    assert texts(parts) == sorted(f"picture {i}" for i in range(7, 12))
    for why in ("row 1: without file_name", "row 2: without file_name", "002.png: empty caption",
                "row 4: not a JSON object", "row 5: not a JSON object", "row 6: not a JSON object",
                "006.png: empty caption"):
        assert why in told(parts), why

def test_bad_rows_of_metadata_csv(tmp_path):
    folder = make_folder(tmp_path / "set", 10, "none")
    rows = [
        "file_name,text", "000.png", "001.png,a red, star", "002.png," + "x" * 200_000,
        ",picture 3", "", *(f"{i:03}.png,picture {i}" for i in range(5, 10))
    ]
    (folder / "metadata.csv").write_text("\n".join(rows))
    (folder / "metadata.csv").write_bytes((folder / "metadata.csv").read_bytes() +
                                          b"\n004.png,caf\xe9")
    parts = both(folder)
    assert texts(parts) == sorted(f"picture {i}" for i in range(5, 10))
    for why in ("row 1: 1 fields for 2", "row 2: 3 fields for 2", "row 3: field larger",
                "row 4: without file_name", "004.png: empty"):
        assert why in told(parts), why

def test_one_metadata_file_a_folder(tmp_path, caplog):
    folder = make_folder(make_folder(tmp_path / "set", 10), 10, "csv")
    assert texts(both(folder)) == sorted(
        f"picture {i}" for i in range(10)) and "metadata.csv: left out" in caplog.text

def test_captions_that_are_not_utf8(tmp_path):
    folder = make_folder(tmp_path / "set", 10, "txt")
    (folder / "003.txt").write_bytes(b"caf\xe9")
    parts = both(folder)
    assert len(texts(parts)) == 9 and "003.png: its caption is not UTF-8" in told(parts)

@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes are Linux's")
def test_names_that_are_not_utf8(tmp_path):
    folder = make_folder(tmp_path / "set", 10, "txt")
    os.rename(folder / "003.png", os.fsencode(folder) + b"/caf\xe9.png")
    parts = both(folder)
    assert len(texts(parts)) == 9 and "its name is not UTF-8" in told(parts)

def test_links_to_folders_are_followed_once(tmp_path, caplog):
    real = make_folder(tmp_path / "elsewhere", 10, "txt")
    folder = tmp_path / "set"
    (folder / "b").mkdir(parents=True)
    (folder / "a").symlink_to(real)
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "c").symlink_to(real)
    assert texts(both(folder)) == sorted(f"picture {i}"
                                         for i in range(10)) and "left out 2 folders" in caplog.text

@pytest.mark.parametrize("make,suffix", [(make_parquet, "parquet"), (make_tar, "tar")])
@pytest.mark.parametrize("streaming", [False, True])
def test_brackets_in_names(tmp_path, make, suffix, streaming):
    folder = tmp_path / "set [1]"
    folder.mkdir()
    file = folder / f"part[0] 100%.{suffix}"
    make(file, range(10))
    for source in (folder, file, folder / f"*.{suffix}"):
        assert texts(both(source,
                          streaming=streaming)) == sorted(f"picture {i}" for i in range(10)), source


@pytest.mark.parametrize("column,values,word", [("text", list(range(9)), "not text"),
                                                ("text", [0.5] * 9, "not text"),
                                                ("image", list(range(9)), "not pictures"),
                                                ("image", [0.5] * 9, "not pictures"),
                                                ("text", [True] * 9, "not text")])
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_the_wrong_type(tmp_path, column, values, word, streaming):
    import pyarrow as pa, pyarrow.parquet as pq
    table = {
        "image": [png(color_of(i)) for i in range(9)], "text": [f"picture {i}" for i in range(9)]
    }
    pq.write_table(pa.table({**table, column: values}), tmp_path / "a.parquet")
    with pytest.raises(UnclipError, match=f"column '{column}' holds .*{word}") as e:
        load_captioned(tmp_path, size=8, streaming=streaming)
    assert "\n" not in str(e.value)

def test_an_empty_parquet_and_sources_that_are_no_files(tmp_path):
    make_parquet(tmp_path / "a.parquet", range(0))
    with pytest.raises(UnclipError):
        load_captioned(tmp_path)
    os.mkfifo(tmp_path / "pipe.tar")
    for source, word in ((tmp_path / "pipe.tar", "not a regular file"),
                         ("/dev/zero", "not a regular file"), ("a\0b", "check the path"),
                         ("x" * 300, "check the path"), ("~nobody-at-all/x", "no such user")):
        with pytest.raises(UnclipError, match=word):
            load_captioned(source)

def test_several_captions_are_said_and_one_is_drawn_each_step(tmp_path, caplog):
    folder = make_folder(tmp_path / "set", 8)
    lines = [{"file_name": f"{i:03}.png", "text": [f"picture {i}", f"another {i}"]} for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert texts(both(folder)) == sorted(f"picture {i}" for i in range(8))
    assert "7 rows hold several captions: one is drawn each time" in caplog.text
    for streaming in (False, True):
        data = load_captioned(folder, size=8, streaming=streaming)
        drawn = [Batches(data, 7, seed=5).at(s) for s in range(8)]
        for b in drawn:
            check(b)                                                    # whichever is drawn belongs to the picture
        first = [t.split()[0] for b in drawn for t in b["caption"]]
        assert 14 < first.count("another") < 42, first
        again = Batches(load_captioned(folder, size=8, streaming=streaming), 7, seed=5)
        assert all(again.at(s)["caption"] == drawn[s]["caption"] for s in (5, 0))

def test_cut_captions_are_said_once(caplog):
    from unclip_nb.data import say_cut
    tokenizer = Tokenizer.train(["a red star"] * 9)
    assert tokenizer.lengths(["a red star", "a " * 40, ""]) == [5, 42, 2]
    assert [int((tokenizer.encode([t]) != 0).sum()) for t in ("a red star", "")] == [5, 2]
    assert say_cut(tokenizer, ["a red star", "a " * 40, "", "a " * 22]) == 0.25
    assert "25 % of 4 captions are cut at 24 tokens" in caplog.text and "--clip.model.context-length 42" in caplog.text
    caplog.clear()
    b = Batches(ShapesData("valid", 8), 4, Tokenizer.train(ShapesData("valid").captions(500)))
    b.at(0)
    b.at(1)
    assert "cut" not in caplog.text

def test_captions_of_streams_and_sets_are_bounded_by_what_there_is(tmp_path):
    folder = make_folder(tmp_path / "set", 10, "txt")
    for streaming in (False, True):
        data = load_captioned(folder, size=8, streaming=streaming)
        assert len(data.captions(10**12)) == 9 and data.captions(0) == data.captions(-1) == []

# ---- embeddings

def test_a_folder_of_pictures_with_a_meta_json_is_no_embeddings(tmp_path):
    from unclip_nb.embeddings import is_embedded
    from unclip_nb.cli import load_rows
    folder = make_folder(tmp_path / "set", 10, "txt")
    (folder / "meta.json").write_text('{"author": "me"}')
    assert not is_embedded(folder) and len(load_rows(str(folder), 8)) == 9
    (tmp_path / "e").mkdir()
    write_embeddings(tmp_path / "e")
    assert is_embedded(tmp_path / "e")
    (tmp_path / "e" / "meta.json").unlink()
    assert is_embedded(tmp_path / "e")

def test_embedded_captions_are_checked(tmp_path):
    from unclip_nb.data import digest
    write_embeddings(tmp_path)
    write_text(
        tmp_path / "meta.json",
        json.dumps({
            "clip_fingerprint": "abc", "rows": 5, "captions": digest(f"row {i}" for i in range(5))
        }))
    assert len(EmbeddedData(tmp_path)) == 5
    lines = (tmp_path / "captions.jsonl").read_text()
    write_text(tmp_path / "captions.jsonl", lines.replace("row 3", "row 9"))
    with pytest.raises(UnclipError, match="other captions than were embedded"):
        EmbeddedData(tmp_path)
    write_text(tmp_path / "captions.jsonl", "{")
    with pytest.raises(UnclipError, match="captions.jsonl is missing or broken"):
        EmbeddedData(tmp_path)

def test_one_distinct_picture_has_no_width_to_whiten(caplog):
    from unclip_nb.diffusion_prior import EmbeddingStats
    from unclip_nb.pca import PCAQuantizer
    one = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(0)),
                                        dim=0)
    z = one.repeat(200, 1) + 1e-7 * torch.randn(200, 16, generator=torch.Generator().manual_seed(1))     # as kernels of other batch sizes leave it
    for rows in (z, one.repeat(200, 1)):
        stats = EmbeddingStats(16)
        stats.fit(rows)
        assert torch.allclose(stats(rows), 4 * rows, atol=1e-5) and torch.allclose(
            stats.inverse(stats(rows)), rows, atol=1e-5)
        assert "all 200 embeddings are alike" in caplog.text
        q = PCAQuantizer(4, 8).fit(rows)
        assert torch.allclose(q.decode(q.encode(rows)), rows, atol=1e-5)
    two = torch.stack([one, -one]).repeat(50, 1)
    stats = EmbeddingStats(16)
    stats.fit(two)
    assert stats(two).isfinite().all() and stats(two).abs().max() > 0

def test_a_set_with_one_distinct_picture_trains(tmp_path):
    from conftest import SMALL, inside
    folder = make_folder(tmp_path / "set", 40)
    for f in folder.glob("*.png"):
        f.write_bytes(png("red"))
    def train(stage):
        flags = [
            x for i in range(0, len(SMALL), 2)
            if SMALL[i].startswith(f"--{stage.replace('_', '-')}.") for x in SMALL[i:i + 2]
        ]
        return inside("train", stage, "--preset", "nano", "--data", folder, "--out",
                      tmp_path / "run", *flags)
    for stage in ("clip", "prior"):
        r = train(stage)
        assert r.returncode == 0, r.stderr
    r = train("ar_prior")
    assert r.returncode == 2 and "1 different embeddings are too few" in r.stderr

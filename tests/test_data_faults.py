"Faults that people met with their own pictures and captions: each input is small, and the right answer was worked out by hand."
import json, os, shutil, sys, time
from pathlib import Path
import pytest, torch
from PIL import Image
from safetensors.torch import save_file
from unclip_nb.core import UnclipError
from unclip_nb.data import Batches, EmbeddedData, PictureData, ShapesData, Tokenizer, load_captioned, what_differs, write_text
from test_data import check, color_of, make_folder, make_parquet, make_tar, png, private_cache, write_embeddings

# ---- a data set knows what it is

def test_identity_of_the_shapes():
    assert ShapesData("valid").identity() == {"source": "shapes", "split": "valid", "count": 10_000, "full": False, "near": False}
    assert ShapesData("train", near=True).identity() != ShapesData("train").identity()

@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", ["add", "remove", "replace", "caption", "rename"])
def test_identity_changes_with_every_kind_of_change(tmp_path, change, streaming):
    folder = make_folder(tmp_path / "set", 20, "txt")
    identity = lambda at=folder: load_captioned(at, size=8, streaming=streaming).identity()
    before = identity()
    assert before == identity() == json.loads(json.dumps(before)) and before["count"] == 19 and before["split"] == "train"
    if change == "add": (folder / "100.png").write_bytes(png("red")); (folder / "100.txt").write_text("picture 100")
    if change == "remove": (folder / "003.png").unlink(); (folder / "003.txt").unlink()
    if change == "replace": (folder / "003.png").write_bytes(png("red", (30, 30)))
    if change == "caption": (folder / "003.txt").write_text("a picture of three")
    if change == "rename": [(folder / f"003{s}").rename(folder / f"003b{s}") for s in (".png", ".txt")]
    assert what_differs(before, identity()) and identity()["digest"] != before["digest"]

@pytest.mark.parametrize("streaming", [False, True])
def test_identity_does_not_depend_on_the_place(tmp_path, streaming):
    folder = make_folder(tmp_path / "set", 20, "txt")
    (folder / "sub").mkdir(); [(folder / f"004{s}").rename(folder / "sub" / f"004{s}") for s in (".png", ".txt")]
    before = load_captioned(folder, size=8, streaming=streaming).identity()
    (tmp_path / "other").mkdir(); folder.rename(tmp_path / "other" / "moved")
    now = load_captioned(tmp_path / "other" / "moved", size=16, streaming=streaming).identity()
    assert str(tmp_path) not in json.dumps(now) and what_differs(before, now) == "" and now["digest"] == before["digest"]

@pytest.mark.parametrize("make,suffix", [(make_parquet, "parquet"), (make_tar, "tar")])
@pytest.mark.parametrize("streaming", [False, True])
def test_identity_of_shards(tmp_path, make, suffix, streaming):
    make(tmp_path / f"a.{suffix}", range(30))
    before = load_captioned(tmp_path, size=8, streaming=streaming).identity()
    assert what_differs(before, load_captioned(tmp_path, size=8, streaming=streaming).identity()) == ""
    make(tmp_path / f"a.{suffix}", range(60))
    assert what_differs(before, load_captioned(tmp_path, size=8, streaming=streaming).identity())

def test_identity_is_quick_for_many_rows():
    import datasets
    rows = datasets.Dataset.from_dict({"image": [{"bytes": b"x" * (i % 99), "path": f"{i}.png"} for i in range(100_000)],
                                       "caption": [f"row {i}" for i in range(100_000)]})
    data = PictureData(rows.select(range(99_999)), 8, keep=False)
    start = time.perf_counter(); data.identity()
    assert time.perf_counter() - start < 5                  # 0.4 s where it was written

def test_identity_of_embeddings(tmp_path):
    write_embeddings(tmp_path)
    found = EmbeddedData(tmp_path).identity()
    assert found["count"] == 5 and found["clip"] == "abc" and found["data"] is None
    write_text(tmp_path / "captions.jsonl", "".join(json.dumps({"caption": f"line {i}"}) + "\n" for i in range(5)))
    assert "digest" in what_differs(found, EmbeddedData(tmp_path).identity())

# ---- pictures: one place opens them, and one reason comes back

def float_tiff(folder):
    x = Image.new("F", (8, 8), 0.0); x.paste(1.0, (4, 0, 8, 8)); x.save(folder / "f.tif")
    return folder / "f.tif"

def test_training_and_load_image_read_the_same_picture(tmp_path):
    from unclip_nb.core import to_tensor
    from unclip_nb.pipeline import load_image
    from unclip_nb.data import read_picture
    want = load_image(float_tiff(tmp_path))
    assert (want[:, :, :4] == -1).all() and (want[:, :, 4:] == 1).all()
    sixteen = Image.new("I;16", (8, 8), 0); sixteen.paste(49087, (4, 0, 8, 8)); sixteen.save(tmp_path / "i.png")
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0)); clear.save(tmp_path / "clear.png")
    side = Image.new("RGB", (8, 8), "black"); side.paste("white", (4, 0, 8, 8))
    exif = Image.Exif(); exif[0x0112] = 6; side.save(tmp_path / "side.png", exif=exif)
    for file in sorted(tmp_path.iterdir()):
        whole = load_image(file)
        assert torch.allclose(read_picture(file, 8).float() / 127.5 - 1, whole, atol=1e-6), file.name
        assert torch.equal(read_picture(file.read_bytes(), 8), read_picture(file, 8))
        assert torch.equal(to_tensor(Image.open(file)), whole)

def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    import subprocess
    Image.new("1", (13_300, 13_300)).save(tmp_path / "big.png")
    assert (tmp_path / "big.png").stat().st_size < 504_000
    code = ("import sys, resource; from unclip_nb.pipeline import load_image; from unclip_nb.core import UnclipError\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try: load_image(sys.argv[1])\n"
            "except UnclipError as e: print(e)\n"
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)")
    r = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "big.png")], capture_output=True, text=True)
    told, grown = r.stdout.splitlines()
    assert "big.png" in told and "177 million pixels, over the limit of 64 million" in told and int(grown) < 50      # MB

def test_a_large_jpeg_is_decoded_small(tmp_path):
    from unclip_nb.core import open_picture
    Image.new("RGB", (9000, 8000), "red").save(tmp_path / "a.jpg")
    with pytest.raises(UnclipError, match="72 million pixels"): open_picture(tmp_path / "a.jpg")
    assert open_picture(tmp_path / "a.jpg", 64).size == (1125, 1000)

@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX")
def test_what_is_not_a_file_is_named_and_nothing_hangs(tmp_path, caplog):
    from unclip_nb.pipeline import load_image
    folder = make_folder(tmp_path / "set", 40)
    os.remove(folder / "003.png"); os.mkfifo(folder / "003.png")
    os.remove(folder / "004.png"); (folder / "004.png").symlink_to("/dev/zero")
    os.remove(folder / "005.png"); (folder / "005.png").mkdir()
    os.remove(folder / "006.png"); (folder / "006.png").symlink_to(tmp_path / "nowhere.png")
    parts = [load_captioned(folder, s, size=8) for s in ("train", "valid")]
    told = [t for d in parts for t in d.skipped]
    for i in (3, 4, 5): assert f"00{i}.png: not a regular file" in told
    assert "006.png: the file is missing" in told and sum(map(len, parts)) == 36
    for i in (3, 4, 5):
        with pytest.raises(UnclipError, match="not a regular file"): load_image(folder / f"00{i}.png")

def mutants(seed, n):
    "Files of six formats with some of their bytes changed, cut or doubled."
    import io, random
    rng, whole = random.Random(seed), []
    base = Image.radial_gradient("L").resize((24, 20)).convert("RGB")
    exif = Image.Exif(); exif[0x0112] = 6; exif[0x010E] = "words"
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        for mode in ("RGB", "L", "P", "RGBA", "I;16", "F", "CMYK"):
            b = io.BytesIO()
            try: base.convert(mode).save(b, kind, **({} if kind == "BMP" else {"exif": exif}))
            except (OSError, ValueError): continue
            whole.append(b.getvalue())
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        b = io.BytesIO(); base.save(b, "TIFF", compression=compression); whole.append(b.getvalue())
    for _ in range(n):
        x = bytearray(rng.choice(whole))
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            k = rng.randrange(len(x)) if rng.random() < 0.5 else rng.randrange(min(len(x), 80))
            how = rng.random()
            if how < 0.7: x[k] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            elif how < 0.8: x[k:k + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"))
            elif how < 0.9: del x[k:k + rng.choice((1, 2, 64))]
            else: x[k:k] = x[k:k + 8]
            if not x: x = bytearray(b"x")
        yield bytes(x)

def test_no_damaged_picture_ends_in_anything_but_a_reason():
    "UNCLIP_FUZZ=40000 makes it long."
    import warnings
    from unclip_nb.data import read_picture
    reasons = {}
    for x in mutants(13, int(os.environ.get("UNCLIP_FUZZ", 3000))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: assert read_picture(x, 8).shape == (3, 8, 8); told = "read"
            except UnclipError as e: told = str(e)
        assert "\n" not in told
        reasons[told.split(":")[0]] = reasons.get(told.split(":")[0], 0) + 1
    assert reasons["read"] > 500 and len(reasons) > 4
    print(reasons)

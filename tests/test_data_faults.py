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

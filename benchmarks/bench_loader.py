"""What the loader alone costs, in processor seconds a picture: `python benchmarks/bench_loader.py [--json FILE]`.

Processor seconds of this process and its threads, one thread for torch, median of three; so other work on the machine hardly counts.
The 2,000 JPEGs are 100 different pictures of 512 px under 2,000 names, and lie in the page cache.
"""
import argparse
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
import torch
from PIL import Image
from unclip_nb.core import to_pil
from unclip_nb.data import Batches, ShapesData, mend_torchvision, read_picture
from unclip_nb.files import load_captioned
from unclip_nb.folders import Framing, PictureData, import_datasets


def jpegs(different:int=100) -> list[bytes]:
    "Pictures of the shapes world at 512 px with noise like a camera's, as JPEG."
    shapes, g, out = ShapesData("train", size=512), torch.Generator().manual_seed(0), []
    for i in range(different):
        x = shapes[i]["image"]
        noise = torch.randn(x.shape, generator=g) * 0.04
        buffer = io.BytesIO()
        to_pil((x + noise).clamp(-1, 1)).save(buffer, "JPEG", quality=90)
        out.append(buffer.getvalue())
    return out

def write_folder(folder:Path, pictures:list[bytes], n:int):
    "Pictures with a `.txt` beside each."
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:05}.jpg").write_bytes(pictures[i % len(pictures)])
        (folder / f"{i:05}.txt").write_text(f"picture {i}")

def write_tars(folder:Path, pictures:list[bytes], n:int, each:int=500):
    "Tar shards, as webdataset writes them."
    folder.mkdir()
    for first in range(0, n, each):
        with tarfile.open(folder / f"{first // each:05}.tar", "w") as tar:
            for i in range(first, min(first + each, n)):
                for name, content in ((f"{i:05}.jpg", pictures[i % len(pictures)]), (f"{i:05}.txt", f"picture {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

def write_parquet(folder:Path, pictures:list[bytes], n:int, each:int=500):
    "Parquet files with row groups of 100."
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder.mkdir()
    for first in range(0, n, each):
        rows = range(first, min(first + each, n))
        table = pa.table({"image": [pictures[i % len(pictures)] for i in rows], "text": [f"picture {i}" for i in rows]})
        pq.write_table(table, folder / f"{first // each:05}.parquet", row_group_size=100)

def cost(fn, pictures:int, runs:int=3) -> float:
    "Median processor seconds a picture of a call that makes so many."
    fn(0)
    times = []
    for run in range(1, runs + 1):
        began = time.process_time()
        fn(run)
        times.append((time.process_time() - began) / pictures)
    return statistics.median(times)

def loader(data, steps:int, batch_size:int=64) -> float:
    "Processor seconds a picture of batches of a data set."
    batches = Batches(data, batch_size)
    def run(k):
        for step in range(k * steps, (k + 1) * steps):
            batches.at(step)
    return cost(run, steps * batch_size)

def decoders(pictures:list[bytes]) -> dict:
    "Milliseconds to decode one JPEG of 512 px and shrink it: `read_picture`, Pillow without draft mode, torchvision.io."
    def whole(b, size):
        return Image.open(io.BytesIO(b)).convert("RGB").resize((size, size), Image.BICUBIC)
    def vision(b, size):
        x = decode_jpeg(torch.frombuffer(bytearray(b), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return torch.nn.functional.interpolate(x[None], (size, size), mode="bicubic", antialias=True)
    mend_torchvision()
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
        decode_jpeg(torch.frombuffer(bytearray(pictures[0]), dtype=torch.uint8), mode=ImageReadMode.RGB)
        ways = (("read_picture", read_picture), ("Pillow, whole", whole), ("torchvision.io", vision))
    except Exception as e:
        print(f"torchvision.io cannot decode here ({type(e).__name__})")
        ways = (("read_picture", read_picture), ("Pillow, whole", whole))
    out = {}
    for size in (64, 256):
        for name, way in ways:
            def run(_, way=way, size=size):
                return [way(b, size) for b in pictures]
            out[f"{name}, {size} px"] = 1000 * cost(run, len(pictures))
    return out

def processor() -> str:
    "The processor's name where Linux tells it."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

def main(n:int=2000, json_file:str|None=None):
    torch.set_num_threads(1)
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder, pictures = Path(name), jpegs()
        import_datasets().config.HF_DATASETS_CACHE = folder / "cache"
        write_folder(folder / "pictures", pictures, n)
        write_tars(folder / "tars", pictures, n)
        write_parquet(folder / "tables", pictures, n)
        rows["shapes, 32 px"] = loader(ShapesData("train", size=32), 8)
        for size, steps in ((64, 8), (256, 4)):
            listed = load_captioned(folder / "pictures", size=8).rows
            rows[f"folder of JPEGs, {size} px"] = loader(PictureData(listed, Framing(size), keep=False), steps)
            rows[f"tar shards, streamed, {size} px"] = loader(load_captioned(folder / "tars", size=size, streaming=True), steps)
            rows[f"parquet, streamed, {size} px"] = loader(load_captioned(folder / "tables", size=size, streaming=True), steps)
        speeds = decoders(pictures)
    for what, seconds in rows.items():
        print(f"{what:36} {1000 * seconds:7.2f} CPU-ms a picture {1 / seconds:8.0f} pictures a CPU-second")
    for what, ms in speeds.items():
        print(f"{what:36} {ms:7.2f} CPU-ms to decode")
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "pillow": Image.__version__},
        "pictures": n, "jpeg_bytes": round(statistics.mean(map(len, pictures))),
        "cpu_ms_a_picture": {k: round(1000 * v, 3) for k, v in rows.items()},
        "decode_cpu_ms": {k: round(v, 3) for k, v in speeds.items()},
    }
    if json_file:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000, help="pictures in the folder and in the shards")
    parser.add_argument("--json", help="write the numbers here")
    args = parser.parse_args()
    main(args.n, args.json)

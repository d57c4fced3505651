"The page in the browser, built: sources from play/, onnxruntime-web from npm, ONNX files from `unclip export`. `make play`, or tools/play.py OUT [WEIGHTS]."
import base64, gzip, hashlib, json, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path
from unclip_nb.core import UnclipError

ROOT = Path(__file__).parent.parent
RUNTIME = json.loads((ROOT/"play"/"package.json").read_text())
PARTS = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify")
}

def fetch_runtime(out:Path):
    "Files of onnxruntime-web, by npm, into `out`; the package is kept beside it. Raises `UnclipError` without npm or network, and for another package than the pinned one."
    npm, version = shutil.which("npm"), RUNTIME["dependencies"]["onnxruntime-web"]
    kept = ROOT/"_docs"/f"onnxruntime-web-{version}.tgz"
    if not kept.exists():
        if not npm:
            raise UnclipError(
                "make play needs npm to fetch onnxruntime-web: install Node.js (apt-get install nodejs npm)"
            )
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as temp:
            r = subprocess.run([npm, "pack", "--silent", f"onnxruntime-web@{version}"],
                               cwd=temp,
                               capture_output=True,
                               text=True)
            packed = list(Path(temp).glob("*.tgz"))
            if r.returncode or not packed:
                raise UnclipError(
                    f"npm could not fetch onnxruntime-web {version}: {(r.stderr.strip().splitlines() or ['no answer'])[-1]}"
                )
            shutil.move(packed[0], kept)
    found = "sha512-" + base64.b64encode(hashlib.sha512(kept.read_bytes()).digest()).decode()
    if found != RUNTIME["integrity"]:
        kept.unlink()
        raise UnclipError(
            f"onnxruntime-web {version} from npm is not the package that play/package.json names: its sum is {found}"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(kept) as tar:
        for module, stem in PARTS.values():
            for name in (module, f"{stem}.mjs"):
                (out/name).write_bytes(tar.extractfile(f"package/dist/{name}").read())
            wasm = tar.extractfile(f"package/dist/{stem}.wasm").read()
            (out/f"{stem}.wasm.gz").write_bytes(gzip.compress(wasm, 6, mtime=0))       # a plain static host packs nothing

def build(out:Path, weights:str="tiny", second:str=""):
    "The whole page in `out`."
    from unclip_nb.export import Export, export_command
    for f in sorted((ROOT/"play").rglob("*")):
        if f.is_file() and f.name != "package.json":
            to = out/f.relative_to(ROOT/"play")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(f, to)
    fetch_runtime(out/"ort")
    export_command(Export(weights=weights, out=str(out/"files"), second_clip=second))
    facts = {
        k: {
            "module": f"ort/{m}", "wasm": f"ort/{s}.wasm.gz",
            "bytes": (out / "ort" / f"{s}.wasm.gz").stat().st_size
        }
        for k, (m, s) in PARTS.items()
    }
    (out/"build.json").write_text(json.dumps(facts))
    files = sum(f.stat().st_size for f in (out/"files").iterdir())
    print(
        f"{out}/index.html: a visitor loads {(files + facts['wasm']['bytes']) / 1e6:.0f} MB ({(files + facts['webgpu']['bytes']) / 1e6:.0f} MB with WebGPU); "
        f"python -m http.server -d {out.parent}, then /{out.name}/")

if __name__ == "__main__":
    try:
        build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/"_docs"/"html"/"play"), *sys.argv[2:])
    except UnclipError as e:
        sys.exit(f"play: {e}")

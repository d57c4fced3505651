"""The export and the page: ONNX against PyTorch, the command's refusals, then the page in headless Chromium. Without onnxruntime, npm or Chromium the tests
that need them are skipped, and say so. Screenshots go to the folder named by SHOTS."""
import base64, http.server, importlib.util, json, os, shutil, threading
from io import BytesIO
from pathlib import Path
import pytest
import torch
from PIL import Image
from unclip_nb.core import UnclipError, to_tensor
from unclip_nb.diffusion import Schedule, ddim_sample, predict, spaced
from unclip_nb.solvers import dpm_sample, spaced_snr
from unclip_nb.edits import slerp
from unclip_nb.inversion import ddim_invert
from unclip_nb.pipeline import UnCLIP
from unclip_nb.shapes import EIGHT_CAPTIONS, matches, parse_caption, read_scene

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from unclip_nb.export import Exported, GraphSpec, describe, export, write_graph   # noqa: E402
from conftest import inside                                                                    # noqa: E402

ROOT = Path(__file__).parent.parent

def load_builder():
    "tools/play.py as a module."
    spec = importlib.util.spec_from_file_location("build_play", ROOT/"tools"/"play.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope="module")
def model(): return UnCLIP.from_pretrained("tiny", device="cpu")

@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("files")
    export(model, out)
    return out

# Without a browser

def test_every_step_is_pytorchs(files):
    facts = json.loads((files/"unclip.json").read_text())
    assert {"clip_text", "clip_image", "prior_step", "ar_step", "decoder_step",
            "upsampler1_step"} <= set(facts["graphs"])
    assert all(g["apart"] <= 1e-3 for g in facts["graphs"].values())
    assert sum(f.stat().st_size for f in files.iterdir()) <= 25e6

def test_a_whole_picture_is_pytorchs(files, model):
    ours, theirs = Exported(files, model).generate(list(EIGHT_CAPTIONS[:2]),
                                                   seed=3), model.generate(list(EIGHT_CAPTIONS[:2]),
                                                                           seed=3)
    assert (((ours - theirs).abs() * 127.5) <= 1).float().mean() >= 0.99

def test_an_operator_that_onnx_lacks_is_one_line(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x): return torch.special.bessel_j0(x)
    with pytest.raises(UnclipError, match="odd cannot be written as ONNX") as e:
        write_graph("odd", GraphSpec(Odd(), {"x": torch.ones(2)}, ["y"]), tmp_path/"odd.onnx")
    assert "\n" not in str(e.value)

def test_another_tokenizer_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.clip, "tokenizer", object())
    with pytest.raises(UnclipError, match="open_clip's tokenizer"):
        describe(model)

def test_a_wrong_file_stops_the_export(model, tmp_path, monkeypatch):
    monkeypatch.setattr("unclip_nb.export.difference", lambda *a: 0.5)
    with pytest.raises(UnclipError, match="clip_text as ONNX differs from PyTorch by 0.5"):
        export(model, tmp_path/"out")
    assert not (tmp_path/"out"/"unclip.json").exists()

def test_the_command_lists_and_refuses():
    assert "export" in inside("--help").stdout
    r = inside("export", "--weights", "nothing-of-that-name")
    assert r.returncode == 2 and r.stderr.count("\n") == 1

# The page


def find_chromium():
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which(
        "chromium-browser")

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not find_chromium():
        pytest.skip("no Chromium here: apt-get install chromium, or name one in CHROMIUM")
    pytest.importorskip("playwright.sync_api")
    out = tmp_path_factory.mktemp("site")/"play"
    try:
        load_builder().build(out)
    except UnclipError as e:
        pytest.skip(str(e))
    def handler(*a, **k): return Quiet(*a, directory=str(out.parent), **k)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/play/"
    server.shutdown()

@pytest.fixture(scope="module")
def browser(site):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=find_chromium(),
                              headless=True,
                              args=["--no-sandbox", "--disable-gpu"])
        yield b
        b.close()

@pytest.fixture(scope="module")
def page(browser, site):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(90_000)
    page.goto(site)
    page.wait_for_selector("body[data-ready]")
    yield page

IDLE = "!document.body.classList.contains('busy')"
def settled(page): page.wait_for_function(IDLE)
def status(page): return page.inner_text("#status span")
def canvas(page, selector):
    "A canvas of the page as a picture in [-1, 1]."
    url = page.eval_on_selector(selector, "c => c.toDataURL()")
    return to_tensor(Image.open(BytesIO(base64.b64decode(url.split(",")[1]))))

def shot(page, name):
    if os.environ.get("SHOTS"):
        page.screenshot(path=str(Path(os.environ["SHOTS"])/f"{name}.png"), full_page=True)

def test_javascript_samplers_are_pythons(page):
    "One toy denoiser, the same numbers in both languages."
    schedule, x_T = Schedule(), torch.linspace(-2, 2, 8)[None]
    def denoise(x, t): return predict(schedule, "x0", 0.5 * torch.sin(x), x, t)
    b = torch.linspace(1, -1, 8)[None] ** 3
    want = {
        "ts": spaced(7), "snr": spaced_snr(20, schedule),
        "ddim": ddim_sample(denoise, x_T, schedule, spaced(20))[0].tolist(),
        "dpm": dpm_sample(denoise, x_T, schedule, spaced_snr(20, schedule))[0].tolist(),
        "invert": ddim_invert(denoise, x_T / 2, schedule, spaced(50), start=50)[0].tolist(),
        "slerp": slerp(x_T, b, 0.3)[0].tolist()
    }
    have = page.evaluate(
        """async ([abar, x, b]) => {
        const s = await import(new URL('js/samplers.js', location.href)), f = Float32Array.from(x);
        const denoise = async (x, t) => s.predict('x0', x.map(v => 0.5 * Math.sin(v)), x, abar[t]);
        return {ts: s.spaced(7, 1000), snr: s.spaced_snr(20, abar),
                ddim: [...await s.ddim_sample(denoise, f, abar, s.spaced(20, 1000))], dpm: [...await s.dpm_sample(denoise, f, abar, s.spaced_snr(20, abar))],
                invert: [...await s.ddim_invert(denoise, f.map(v => v / 2), abar, s.spaced(50, 1000), {start: 50})], slerp: [...s.slerp(f, Float32Array.from(b), 0.3)]}; }""",
        [schedule.abar.tolist(), x_T[0].tolist(), b[0].tolist()])
    for k, v in want.items():
        assert have[k] == pytest.approx(v, abs=2e-5), k

def test_javascript_tokens_are_pythons(page, model):
    texts = [
        *EIGHT_CAPTIONS, "  A RED\tStar!! 12x ", "ça va? ☃ 日本 <end>", "it's a ring", "star " * 40
    ]
    have = page.evaluate(
        """async texts => { const {Tokenizer} = await import(new URL('js/tokenizer.js', location.href));
        const t = new Tokenizer((await (await fetch('files/unclip.json')).json()).tokenizer); return texts.map(x => t.encode(x)); }""",
        texts)
    assert have == model.clip.tokenizer.encode(texts).tolist()

def test_draws_what_the_captions_say(page):
    right = 0
    for c in EIGHT_CAPTIONS:
        page.fill("#caption", c)
        page.click(".main")
        page.wait_for_function("document.querySelector('#draw-out .use')")
        page.click("#cancel")
        settled(page)
        right += bool(
            matches(parse_caption(c), read_scene(canvas(page, "#draw-out canvas"),
                                                 strict=False))["all"])
    assert right >= 7

def test_the_strips(page):
    for k in ("eta", "blend-at", "parts-at"):
        page.eval_on_selector(
            f"#{k}", "e => { e.value = 1; e.dispatchEvent(new Event('input', {bubbles: true})); }")
        assert page.inner_text(f"label:has(#{k}) output").strip()
    for name, n in (("vary", 2), ("diff", 7)):
        page.click(f"#{name}-go")
        settled(page)
        assert status(page).startswith("Done") and page.locator(f"#{name}-out canvas").count() == n
    seen = []
    for i in (0, 6):
        page.eval_on_selector(
            "#diff-at",
            f"e => {{ e.value = {i}; e.dispatchEvent(new Event('input', {{bubbles: true}})); }}")
        seen.append(canvas(page, "#diff-view"))
    assert (seen[0] - seen[1]).abs().mean() > 0.01
    shot(page, "strips")

def test_cancel_stops_and_keeps(page):
    page.click("#blend-go")
    page.wait_for_function("document.querySelector('#blend-out canvas')?.width > 32")
    page.click("#cancel")
    settled(page)
    assert status(page).startswith("Cancelled")

def test_uploads(page):
    buffer = BytesIO()
    Image.new("RGBA", (90, 40), (220, 40, 40, 255)).save(buffer, "PNG")
    page.set_input_files("[data-slot='0'] input[type=file]",
                         {"name": "red.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    page.wait_for_function("document.querySelector('.said').textContent.startsWith('red.png')")
    assert canvas(page, "[data-slot='0'] canvas").mean(
        (1, 2)).tolist() == pytest.approx([220 / 127.5 - 1, 40 / 127.5 - 1, 40 / 127.5 - 1],
                                          abs=0.02)
    page.set_input_files("[data-slot='0'] input[type=file]",
                         {"name": "odd.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_function("document.querySelector('#status').classList.contains('bad')")
    assert "“odd.png” cannot be read as a picture" in status(page)

def test_a_link_brings_the_state_back(browser, site, page):
    page.fill("#caption", "a green heart")
    page.click("summary")
    page.fill("#seed", "7")
    link = page.evaluate("location.href")
    assert "caption=a+green+heart" in link and "seed=7" in link
    other = browser.new_page(viewport={"width": 390, "height": 844})
    other.goto(link)
    assert other.input_value("#caption") == "a green heart" and other.input_value("#seed") == "7"
    assert other.evaluate("document.documentElement.scrollWidth") <= 390
    other.close()

def test_an_empty_caption_is_a_sentence(page):
    page.fill("#caption", " ")
    page.click(".main")
    assert status(page).startswith("The caption is empty")


@pytest.mark.parametrize("missing, says", [("files/prior_step.onnx", "prior_step.onnx is missing"),
                                           ("files/unclip.json", "unclip.json is missing"),
                                           ("ort/ort.wasm.min.mjs", "runs the networks")])
def test_a_missing_file_is_a_sentence(browser, site, missing, says):
    page = browser.new_page()
    page.context.route(f"**/{missing}", lambda route: route.fulfill(status=404, body=""))
    page.goto(site)
    page.wait_for_selector("#status.bad", timeout=60_000)
    assert says in status(page)
    page.close()

def test_a_browser_without_simd_is_told(browser, site):
    page = browser.new_page()
    page.add_init_script("WebAssembly.validate = () => false")
    page.goto(site)
    page.wait_for_selector("#status.bad", timeout=20_000)
    assert "WebAssembly with SIMD" in status(page)
    page.close()

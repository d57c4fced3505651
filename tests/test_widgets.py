"""The widgets: first in Python, then in a real browser. Chromium comes from the system (as root, apt fetches it when it is missing); without one the
browser's tests are skipped, and say so. Screenshots go to the folder named by SHOTS."""
import base64, io, json, os, re, shutil, socket, subprocess, sys, threading, time, urllib.error, urllib.request, warnings
from pathlib import Path
import psutil
import pytest
import torch
from PIL import Image
from unclip_nb.core import UnclipError, to_tensor
from unclip_nb.edits import interpolate, pca_sweep, text_diff, variations
from unclip_nb.pipeline import UnCLIP, explore_priors
from unclip_nb.widgets import (PENDING, PICTURES, Picker, Scrubber, as_jpeg, caption_widget,
                               interpolation_widget, pca_widget, place_label, priors_widget,
                               read_picture, scrub_html, text_diff_widget, variations_widget)

ROOT = Path(__file__).parent.parent
tint = lambda k, n=16: torch.full((3, 8, 8), 2 * k / n - 1)                       # picture k, told from all others
file = lambda picture, kind="PNG", **how: (buffer := io.BytesIO(), picture.save(
    buffer, kind, **how), buffer.getvalue())[2]

def tinted(n, batch=1):
    "A generator of the first n tints."
    def draw():
        for k in range(0, n, batch):
            yield torch.stack([tint(i) for i in range(k, min(k + batch, n))])
    return draw

# Without a browser

def test_a_label_names_what_the_sliders_say():
    assert place_label({"noise": ["fixed", "slerped"], "θ": [0, 0.25]},
                       (1, 1)) == "slerped · θ = 0.25"

def test_scrub_html_counts_and_escapes():
    page = scrub_html([b"a", b"b"], {"<x>": [0, 1]}, ["1 < 2", '"two"'])
    assert "<x>" not in page and "1 &lt; 2" in page and "&quot;two&quot;" in page and page.count(
        "<img") == 2 and page.count(" onload") == 1
    assert '[[&quot;x&quot;, 1]]' in scrub_html([b"a"], {"x": ["only"]})
    assert '[[&quot;x&quot;, 3]]' in scrub_html([b"a"] * 3, {"row": ["only"], "x": [0, 1, 2]})       # nothing to choose among one row

def test_without_scripts_a_strip_is_a_labelled_sheet():
    "What is left when a page takes every script away: all pictures, in rows and columns with their labels, and no dead slider."
    from bs4 import BeautifulSoup
    page = BeautifulSoup(
        scrub_html([bytes([k]) for k in range(6)], {"row": ["up", "down"], "θ": [0, 0.5, 1]}),
        "html.parser")
    rows = [[
        e.get_text() or base64.b64decode(e.img["src"].split(",")[1])[0] if e.img else e.get_text()
        for e in row.find_all(["th", "td"])
    ] for row in page.find_all("tr")]
    assert rows == [["", "θ = 0", "θ = 0.5", "θ = 1"], ["up", 0, 1, 2], ["down", 3, 4, 5]]
    assert not page.find_all(["input", "script", "button"]) and all(
        int(i["width"]) <= 213 for i in page.find_all("img"))
    with pytest.raises(UnclipError, match="2 pictures for 3 places"):
        scrub_html([b"a", b"b"], {"x": [0, 1, 2]})

@pytest.mark.parametrize("batch", [1, 2, 6])
def test_pictures_come_row_by_row(batch):
    w = Scrubber("", "", {"row": "ab", "x": range(3)}, tinted(6, batch)).start().wait()
    assert [t.value for t in w.thumbs] == [as_jpeg(
        tint(k)) for k in range(6)] and w.bar.value == 6 and w.button.description == "Compute"

def test_or_column_by_column():
    w = Scrubber("", "", {"row": "ab", "x": range(3)}, tinted(6), by_column=True).start().wait()
    assert [t.value for t in w.thumbs] == [as_jpeg(tint(k)) for k in (0, 2, 4, 1, 3, 5)]

def test_three_axes():
    w = Scrubber("", "", {"a": range(2), "b": range(3), "c": range(2)}, tinted(12)).start().wait()
    for s, v in zip(w.sliders, (1, 2, 0)):
        s.value = v
    assert w.at == 10 and w.picture.value == as_jpeg(
        tint(10)) and w.label.value == "a = 1 · b = 2 · c = 0"

def test_sliders_choose_picture_label_frame_and_ends():
    w = Scrubber("", "", {"row": ["up", "down"], "θ": [0, 0.5, 1]}, tinted(6)).start().wait()
    w.sliders[0].value, w.sliders[1].value = 1, 1
    assert w.picture.value == as_jpeg(tint(4)) and w.label.value == "down · θ = 0.5"
    assert [i for i, t in enumerate(w.thumbs) if "scrub-now" in t._dom_classes] == [4]
    assert [(p.value, t.value) for p, t in w.ends] == [(as_jpeg(tint(3)), "θ = 0"),
                                                       (as_jpeg(tint(5)), "θ = 1")]

def test_a_move_costs_milliseconds():
    "The quickest of forty: other work on the machine can make some of them slow, not all."
    w, took = Scrubber("", "", {"row": "ab", "x": range(9)}, tinted(18)).start().wait(), []
    for k in range(1, 41):
        t = time.perf_counter()
        w.sliders[1].value = k % 9
        took.append(time.perf_counter() - t)
        assert w.picture.value == as_jpeg(tint(k % 9))
    assert min(took) < 0.01

def test_labels_of_pictures_are_said_and_forgotten():
    said = iter(["first", "second"])
    def draw(): yield tint(0)[None], [next(said)]
    w = Scrubber("", "", {"x": [0]}, draw).start().wait()
    assert w.label.value == "x = 0 · first"
    w.start().wait()
    assert w.label.value == "x = 0 · second"

def gated(n=3):
    gate = threading.Semaphore(0)
    def draw():
        for k in range(n):
            gate.acquire()
            yield tint(k)[None]
    return gate, draw

def until(true, seconds=10, pause=0.002):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "not in time"
        time.sleep(pause)

def test_pictures_can_be_looked_at_before_all_are_there():
    gate, draw = gated()
    w = Scrubber("", "", {"x": range(3)}, draw).start()
    gate.release()
    until(lambda: w.bar.value == 1)
    assert w.picture.value == as_jpeg(tint(0)) and w.job
    w.sliders[0].value = 1
    assert w.picture.value == PENDING
    gate.release()
    until(lambda: w.picture.value == as_jpeg(tint(1)))               # arrives under the slider
    w.stop()
    gate.release()
    w.wait()
    assert w.status.value == "stopped at 2 of 3" and w.thumbs[2].value == PENDING

def test_started_anew_the_old_thread_writes_nothing():
    old, draw = gated()
    w = Scrubber("", "", {"x": range(3)}, draw)
    first = w.start().thread
    w.frames = lambda: iter([torch.stack([tint(9)] * 3)])
    w.start().wait()
    for _ in range(3):
        old.release()
    first.join(5)
    assert not first.is_alive()
    assert [
        t.value for t in w.thumbs
    ] == [as_jpeg(tint(9))] * 3 and w.bar.value == 3 and w.status.value.startswith("3 pictures in")

def test_widgets_of_a_page_wait_in_line_and_a_person_does_not():
    gate, draw = gated(1)
    first, second = Scrubber("", "", {"x": [0]}, draw), Scrubber("", "", {"x": [0]}, tinted(1))
    first._view_count = 1
    second._view_count = 1                                    # both come into view
    time.sleep(0.05)
    assert second.status.value == "waits for the widgets above" and not second.done
    person = Scrubber("", "", {"x": [0]}, tinted(1)).start().wait(5)
    assert person.done == 1
    gate.release()
    first.wait(5)
    second.wait(5)
    assert second.done == 1

def test_out_of_sight_is_stopped():
    gate, draw = gated()
    w = Scrubber("", "", {"x": range(3)}, draw)
    assert not w.job                                                                 # nobody looks: nothing is computed
    w._view_count = 1
    assert w.job
    w._view_count = 0
    assert not w.job
    gate.release()
    w.wait(5)
    assert w.thumbs[0].value == PENDING

@pytest.mark.parametrize("error, line", [(UnclipError("caption 1 is empty"), "caption 1 is empty"),
                                         (RuntimeError("out of\nmemory"), "RuntimeError: out of")])
def test_an_error_is_one_line_in_the_widget(error, line):
    def draw(): yield tint(0)[None]; raise error
    w = Scrubber("", "", {"x": range(2)}, draw).start()
    with pytest.raises(UnclipError, match=re.escape(line)):
        w.wait()
    assert w.error.value == line and not w.job and w.button.description == "Compute" and w.thumbs[
        0].value == as_jpeg(tint(0))
    w.frames = tinted(2)
    w.start().wait()
    assert w.error.value == ""

def test_the_same_pictures_without_a_kernel():
    w = Scrubber("", "", {"row": "ab", "x": range(3)}, tinted(6)).start().wait()
    inside = [base64.b64decode(s) for s in re.findall(r"base64,([^\"]+)", w.as_html())]
    assert inside == [t.value
                      for t in w.thumbs] and re.findall('alt="([^"]+)', w.as_html()) == w.labels


def upload(picker, name, data):
    picker._take(type("", (), dict(new=[dict(name=name, content=memoryview(data))])))

def test_uploads_are_read_as_the_command_reads_them():
    clear = Image.new("RGBA", (5, 4), (255, 0, 0, 0))
    assert (read_picture(file(clear)) == 1).all()           # transparency is laid on white
    tall = Image.new("RGB", (2, 6), "red")
    exif = Image.Exif()
    exif[274] = 6
    assert read_picture(file(tall, "JPEG", exif=exif)).shape == (3, 2, 6)                                       # turned upright
    for junk in (b"", b"text", file(tall)[:30]):
        with pytest.raises(UnclipError, match="'x.png'.*PNG or JPEG"):
            read_picture(junk, "x.png")

def test_a_picker_takes_uploads_and_complains_about_what_is_none():
    p, heard = Picker("A", {"a": tint(1), "b": tint(2)}, 1), []
    p.observe(lambda c: heard.append(c.new), "value")
    assert p.value == "b"
    for k, want in ((5, "mine"), (6, "mine'")):
        upload(p, "mine", file(Image.new("RGB", (4, 4), (k,) * 3)))
        assert p.value == want and p.picture.mean() == pytest.approx(k / 127.5 - 1)
    upload(p, "bad.txt", b"no")
    assert p.value == "mine'" and "bad.txt" in p.error.value
    p.menu.value = "a"
    assert p.error.value == "" and p.thumb.value == as_jpeg(tint(1))
    assert heard == ["mine", "mine'", "a"]                                                                       # no detours by the first of the menu

@pytest.fixture(scope="module")
def model(): return UnCLIP.from_pretrained("tiny", device="cpu")

THETAS = (0.0, 0.3, 0.4, 0.5)
QUICK = dict(steps=2, upsample=False)
shots = lambda w: [t.value for t in w.start().wait().thumbs]
opened = lambda data: to_tensor(Image.open(io.BytesIO(data)))
same = lambda got, want: max(
    (opened(a) - opened(as_jpeg(b))).abs().mean() for a, b in zip(got, want, strict=True)) < 0.02

def test_each_widget_shows_what_its_edit_draws(model):
    names, captions = list(PICTURES), ["a large red circle", "a small blue ring"]
    a, b = PICTURES[names[0]], PICTURES[names[3]]
    assert same(
        shots(interpolation_widget(model, n=4, **QUICK)),
        torch.cat([interpolate(model, a, b, 4, noise, **QUICK) for noise in ("slerp", "fixed")]))
    assert same(shots(text_diff_widget(model, {"a": a}, *captions, THETAS, **QUICK)),
                text_diff(model, a, *captions, THETAS, **QUICK))
    by_eta = [variations(model, a, 2, eta, **QUICK) for eta in (0.0, 1.0)]
    assert same(shots(variations_widget(model, {"a": a}, 2, (0.0, 1.0), **QUICK)),
                [by_eta[0][0], by_eta[1][0], by_eta[0][1], by_eta[1][1]])
    sweeps = [
        pca_sweep(model, a, ks=(1, 5, 50, 96), noise=how, **QUICK) for how in ("inverted", "fixed")
    ]
    assert same(shots(pca_widget(model, {"a": a}, (1, 5, 50, 96, 1000), **QUICK)),
                torch.cat(sweeps))
    zi = model.sample_zi(captions[0], "diffusion")
    grid = [
        model.decode(zi, captions[:1], guidance=g, steps=k, sampler="dpm", upsample=False)[0]
        for k in (2, 3) for g in (1.0, 3.0)
    ]
    assert same(shots(caption_widget(model, captions[0], (1.0, 3.0), (2, 3), upsample=False)), grid)
    pool = torch.stack(list(PICTURES.values()))
    w = priors_widget(model, captions[0], 2, pool, steps=2)
    pictures, titles = explore_priors(model, captions[0], 2, pool, steps=2)
    assert same(shots(w), torch.cat([pictures[0::2], pictures[1::2]])) and w.labels[1].endswith(
        titles[2])

def reseed(w, times=1):
    "Click so often without a pause, wait for every thread that a click began: what is then to be seen."
    button, threads = next(x for x in w.children[1].children
                           if "scrub-reseed" in x._dom_classes), []
    for _ in range(times):
        button.click()
        threads.append(w.thread)
    for t in threads:
        t.join()
    return [t.value for t in w.wait().thumbs]

def test_reseed_draws_anew_what_is_noise_and_nothing_else(model):
    a = PICTURES[list(PICTURES)[0]]
    w = variations_widget(model, {"a": a}, 2, (0.0, 1.0), **QUICK)
    first, second = shots(w), reseed(w)
    assert first[0::2] == second[0::2]                                               # eta 0: the picture, whatever the seed
    assert not set(first[1::2]) & set(second[1::2])
    assert same(second[1::2], variations(model, a, 2, 1.0, seed=1, **QUICK))
    last = reseed(w, 3)                                                              # the first two give up and write nothing
    assert same(last[1::2], variations(model, a, 2, 1.0, seed=4, **
                                       QUICK)) and w.bar.value == 4 and not w.job
    w = interpolation_widget(model, n=3, **QUICK)
    first, second = shots(w), reseed(w)
    assert first[:3] == second[:3] and not set(first[3:]) & set(second[3:])          # slerped x_T is the pictures'; fixed x_T is a draw


@pytest.mark.parametrize("make, field", [(text_diff_widget, "to"), (caption_widget, "caption"),
                                         (priors_widget, "caption")])
def test_an_empty_caption_is_said_before_anything_is_computed(model, make, field):
    w = make(model)
    text = next(x for x in w.children[1].children if getattr(x, "description", "") == field)
    text.value = "  "                                                                # as a person would: a change starts anew
    with pytest.raises(UnclipError, match="empty"):
        w.wait()
    assert "empty" in w.error.value and w.done == 0

# In a browser

ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync"
]
SHOTS = os.environ.get("SHOTS")
PATIENCE = 240                                                                       # seconds: other tests may keep the machine busy

def find_chromium():
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if shutil.which(name):
            return shutil.which(name)
    return os.environ.get("CHROMIUM")

@pytest.fixture(scope="session")
def chromium():
    pytest.importorskip("playwright.sync_api")
    if not find_chromium() and hasattr(os,
                                       "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60"]
        for cmd in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            try:
                subprocess.run(apt + cmd,
                               timeout=240,
                               stdin=subprocess.DEVNULL,
                               capture_output=True,
                               env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
            except subprocess.TimeoutExpired:
                break
    return find_chromium() or pytest.skip(
        "no Chromium here: apt-get install chromium, or name one in CHROMIUM")

@pytest.fixture
def page(chromium, tmp_path, request):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        ctx = p.chromium.launch_persistent_context(str(tmp_path / "profile"),
                                                   executable_path=chromium,
                                                   headless=True,
                                                   args=ARGS,
                                                   viewport={"width": 1200, "height": 1000})
        ctx.set_default_timeout(1000 * PATIENCE)
        yield ctx.pages[0]
        shoot(ctx.pages[0], request.node.name)
        ctx.close()

def shoot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(SHOTS)/f"{name}.png")

def serve(cmd, probe, tmp):
    "A server on a free port with settings of its own; killed when it does not come up."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = dict(JUPYTER_CONFIG_DIR="config",
               JUPYTER_DATA_DIR="data",
               JUPYTER_RUNTIME_DIR="run",
               IPYTHONDIR="ipython")
    env = os.environ | {k: str(tmp / v)
                        for k, v in own.items()} | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    (tmp/"config"/"labconfig").mkdir(parents=True)                                   # no 'Jupyter news' pop-up
    (tmp / "config" / "labconfig" / "page_config.json"
     ).write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    shutil.copy(ROOT/"tools"/"jupyter_server_config.py", tmp/"config")                # as `make setup` does for the environment
    with open(tmp/"server.log", "w") as log:
        p = subprocess.Popen([*cmd, f"--port={port}"],
                             env=env,
                             stdout=log,
                             stderr=log,
                             stdin=subprocess.DEVNULL,
                             start_new_session=True,
                             cwd=ROOT)
    url, end = f"http://127.0.0.1:{port}", time.time() + PATIENCE
    while time.time() < end and p.poll() is None:
        try:
            urllib.request.urlopen(url + probe, timeout=5)
            return p, url
        except urllib.error.HTTPError:
            return p, url                                 # it answers: up
        except OSError:
            time.sleep(0.2)
    stop(p)
    raise RuntimeError((tmp/"server.log").read_text()[-2000:])

def stop(p):
    p.terminate()
    try:
        p.wait(20)
    except subprocess.TimeoutExpired:
        p.kill()
        p.wait()

@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    "Copies of nbs/, not run yet. The widgets' has a last cell of our own and not its strips, which nbval runs; toy is its beginning, up to the toy; index ends with its first picture."
    home = tmp_path_factory.mktemp("copy")/"nbs"
    shutil.copytree(ROOT / "nbs",
                    home,
                    ignore=shutil.ignore_patterns(".ipynb_checkpoints", "solutions"))

    def code(source, **how):
        return dict(cell_type="code",
                    id="probe",
                    metadata={},
                    outputs=[],
                    execution_count=None,
                    source=source) | how
    def copy(name, to, choose):
        nb = json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text("utf8"))
        cells = [
            code("".join(c["source"]), id=c["id"], metadata=c["metadata"])
            if c["cell_type"] == "code" else c for c in nb["cells"]
        ]
        (home/f"{to}.ipynb").write_text(json.dumps(nb | dict(cells=choose(cells))), "utf8")

    def until_cell(pattern):
        return lambda cells: cells[:1 + next(i for i, c in enumerate(cells)
                                             if c["cell_type"] == "code" and re.search(
                                                 pattern, c["source"]))]

    copy(
        "17_widgets", "17_widgets",
        lambda cells: [c for c in cells if ".wait().as_html())" not in c["source"]
                       ] + [code('print("I am", "free")')])
    copy("17_widgets", "toy", until_cell(r"\ntoy$"))
    copy("index", "index", until_cell(r"(^|\n)show_images\("))
    return home

@pytest.fixture(scope="module")
def lab(chromium, notebooks, tmp_path_factory):
    p, url = serve([
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True",
        f"--ServerApp.root_dir={notebooks}"
    ], "/api/status", tmp_path_factory.mktemp("lab"))
    yield url
    stop(p)

@pytest.fixture
def voila(chromium, tmp_path):
    p, url = serve(
        [sys.executable,
         str(ROOT / "tools" / "app.py"), "--no-browser", "--Voila.ip=127.0.0.1"], "/voila/nothing",
        tmp_path)
    yield url
    stop(p)


BYTES = "async el => { const b = new Uint8Array(await (await fetch(el.src)).arrayBuffer()); return btoa(Array.from(b, x => String.fromCharCode(x)).join('')) }"
bytes_of = lambda image: base64.b64decode(image.evaluate(BYTES))
pixels = lambda data, side=32: to_tensor(
    Image.open(io.BytesIO(data)).resize((side, side), Image.BOX))

def says(element, pattern, seconds=PATIENCE):
    from playwright.sync_api import expect
    expect(element).to_have_text(re.compile(pattern), timeout=1000 * seconds)

class Card:
    "A widget on the page, as a person sees it."

    def __init__(self, page, title):
        self.page, self.box = page, page.locator(".unclip-scrub").filter(has_text=title)
    def __getattr__(self, name): return self.box.locator(f".scrub-{name}")
    def says(self, css, pattern): says(self.box.locator(css), pattern)
    def ready(self): self.says(".scrub-status", "^[0-9]+ pictures in")
    def thumbnails(self): return [bytes_of(t) for t in self.thumb.all()]
    def shown(self):
        "The number of the large picture: the one frame that is marked, and the same bytes."
        marked = [
            i for i, t in enumerate(self.thumb.all()) if "scrub-now" in t.get_attribute("class")
        ]
        assert len(marked) == 1 and bytes_of(self.picture) == bytes_of(self.thumb.nth(marked[0]))
        return marked[0]
    def drag(self, share, pattern):
        "Drag the handle to a share of the track. Pages move while they load: wait until it stands still, and try again when it was missed."
        handle, track = self.box.locator(".scrub-slider .noUi-handle"), self.box.locator(
            ".scrub-slider .noUi-target")
        for _ in range(5):
            handle.scroll_into_view_if_needed()
            was, b = None, handle.bounding_box()
            while b != was:
                self.page.wait_for_timeout(200)
                was, b = b, handle.bounding_box()
            t, y = track.bounding_box(), b["y"] + b["height"] / 2
            self.page.mouse.move(b["x"] + b["width"] / 2, y)
            self.page.mouse.down()
            self.page.mouse.move(t["x"] + t["width"] * share, y, steps=8)
            self.page.mouse.up()
            try:
                return says(self.label, pattern, 5)
            except AssertionError:
                continue
        says(self.label, pattern, 5)
    def key(self, key, times=1):
        self.box.locator(".scrub-slider .noUi-handle").focus()
        for _ in range(times):
            self.page.keyboard.press(key)
    def lag(self, keys):
        "Milliseconds from a key to a new picture, each."
        self.picture.evaluate(
            """im => { window.seen?.disconnect(); window.lat = []; window.seen = new MutationObserver(() => window.lat.push(performance.now() - window.t0));
                                         window.seen.observe(im, {attributes: true, attributeFilter: ['src']});
                                         document.addEventListener('keydown', () => window.t0 = performance.now(), true); }"""
        )
        out = []
        for k in keys:
            self.key(k)
            self.page.wait_for_function("n => window.lat.length > n", arg=len(out))
            out = self.page.evaluate("window.lat")
        return out

def crowd(work=0.1):
    "How many share a core: seconds that pass while this process works one."
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < work:
        pass
    return (time.perf_counter() - wall) / work

def quick(card, limit=50, rounds=3):
    """From key to picture, ten moves, in the best of some rounds: the third quickest within `limit` ms, the median within twice that (both times two at most where others wait for the cores).
    Not the median within `limit`: most likely because tornado leaves Nagle's algorithm on in Jupyter's websockets, about half of the moves come 40 ms later than the others, which show what is ours."""
    best, most = (float("inf"), float("inf")), 1.0
    for _ in range(rounds):
        others = crowd()
        lat = sorted(card.lag(["ArrowLeft", "ArrowRight"] * 5))
        others = max(others, crowd())
        print(
            f"key to picture: median {lat[5]:.0f} ms of {[round(x) for x in lat]}, {others:.1f} share a core"
        )
        best, most = min(best, (lat[2], lat[5])), max(most, others)
        if best[0] <= limit * min(2, most) and best[1] <= 2 * limit * min(2, most):
            return
    if most < 3:
        raise AssertionError(
            f"{best[0]:.0f} ms from key to picture in the third quickest of ten, {best[1]:.0f} in the median"
        )
    warnings.warn(
        f"{best[1]:.0f} ms from key to picture, not judged: {most:.0f} processes shared a core")

def scrub(card):
    "Drag and step through a finished interpolation: the right picture each time."
    card.ready()
    frames, (a,
             b) = card.thumbnails(), [bytes_of(i) for i in card.box.locator(".picker-thumb").all()]
    assert len(set(frames)) == 18 and card.shown() == 0
    for frame, source in ((frames[0], a), (frames[8], b)):
        assert (pixels(frame) - pixels(source)).square().mean() < 0.04     # the ends are the pictures, 20 dB
    card.drag(0.5, r"^x_T slerped · θ = 0\.5$")
    assert card.shown() == 4
    card.drag(1.2, r"θ = 1$")
    assert card.shown() == 8
    card.key("ArrowLeft", 3)
    card.says(".scrub-label", r"θ = 0\.625$")
    assert card.shown() == 5 and bytes_of(card.picture) == frames[5]
    card.box.get_by_role("button", name="x_T fixed").click()
    card.says(".scrub-label", r"^x_T fixed · θ = 0\.625$")
    assert card.shown() == 14
    assert [bytes_of(e) for e in card.end.all()] == [frames[9], frames[17]]
    quick(card)
    return frames

def send(card, which, name, data):
    with card.page.expect_file_chooser() as chooser:
        card.box.locator(".picker-upload").nth(which).click()
    chooser.value.set_files(files=[dict(name=name, mimeType="image/png", buffer=data)])

def upload_and_stop(card, before):
    "A file that is no picture, then one that is: the first frames of the new path, and no more."
    send(card, 0, "letter.png", b"Dear Sir or Madam")
    card.says(".picker-error >> nth=0", "cannot read 'letter.png' as a picture")
    assert card.thumbnails() == before                                                            # nothing was lost
    cross = PICTURES[list(PICTURES)[6]]
    send(card, 0, "cross.png", file(Image.open(io.BytesIO(as_jpeg(cross, 100)))))
    card.box.get_by_role("button", name="x_T slerped").click()
    card.says(".scrub-label", "^x_T slerped")
    card.key("Home")
    card.says(".scrub-label", r"^x_T slerped · θ = 0$")
    card.says(".scrub-status", r"^([3-9]|1\d) of 18")
    card.box.locator(".scrub-button").click()     # there is something to see, and more to stop
    card.says(".scrub-status", r"^stopped at ([3-9]|1\d) of 18$")
    card.says(".scrub-button", "Compute")
    assert card.shown() == 0 and (pixels(bytes_of(card.picture)) -
                                  pixels(as_jpeg(cross))).square().mean() < 0.04
    stopped = card.thumbnails()
    assert not set(stopped[:3]) & set(before) and stopped[17] == PENDING

def test_a_strip_flips_without_a_kernel(page):
    axes = {"row": ["a", "b"], "x": [0, 1, 2]}
    page.set_content(scrub_html([as_jpeg(tint(k)) for k in range(6)], axes) * 2)                  # two of them: each minds its own
    strip, other = page.locator(".scrub").all()
    for place, k in (((0, 0), 0), ((0, 2), 2), ((1, 2), 5), ((1, 0), 3)):
        for slider, v in zip(strip.locator("input").all(), place):
            slider.fill(str(v))
        seen = strip.locator("img:visible")
        assert seen.count() == 1 and bytes_of(seen) == as_jpeg(tint(k))
        assert strip.locator("output").inner_text() == place_label(axes, place)
    assert bytes_of(other.locator("img:visible")) == as_jpeg(tint(0))
    strip.locator("input").nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert bytes_of(strip.locator("img:visible")) == as_jpeg(tint(4))

def test_a_page_without_scripts_shows_the_sheet(page):
    "The same HTML where no script runs: two rows of three pictures, all to be seen."
    strip = scrub_html([as_jpeg(tint(k)) for k in range(6)], {"row": ["a", "b"], "x": [0, 1, 2]})
    bare = re.sub(r' onload="[^"]*"', "", strip)                                                  # as JupyterLab does with an untrusted notebook
    page.set_content(bare)
    assert [bytes_of(i)
            for i in page.locator(".scrub img").all()] == [as_jpeg(tint(k)) for k in range(6)]
    assert page.locator(".scrub img:visible").count() == 6 and page.locator(
        ".scrub input").count() == 0
    assert page.locator(".scrub th").all_inner_texts() == ["", "x = 0", "x = 1", "x = 2", "a", "b"]

def test_voila_page(page, voila):
    page.goto(voila)
    titles = page.locator(".unclip-scrub h3")
    titles.nth(5).wait_for()
    assert titles.all_inner_texts() == [
        "From one picture to another", "Edited by words", "Variations",
        "A caption, guidance and steps", "Growing numbers of components", "What the priors draw"
    ]
    assert page.locator("pre").filter(has_text="Error").count() == 0
    caption = Card(page, "A caption, guidance")
    text = caption.caption.locator("input")
    text.fill(" ")
    text.press("Enter")
    caption.says(".scrub-error", "^caption 1 is empty")        # while others compute: the kernel is free
    card = Card(page, "From one")
    before = scrub(card)
    shoot(page, "voila_first")
    upload_and_stop(card, before)

def kernels(pid):
    "The kernels that a server runs, but for one that is just ending."
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.NoSuchProcess:
            pass                                                         # a zombie is one too
    return found

@pytest.fixture
def bare_app(chromium, tmp_path):
    "The app as it is started, with kernels that are culled after two seconds without a page."
    p, url = serve([
        sys.executable,
        str(ROOT / "tools" / "app.py"), "--no-browser", "--Voila.ip=127.0.0.1",
        "--MappingKernelManager.cull_idle_timeout=2", "--MappingKernelManager.cull_interval=1"
    ], "/voila/nothing", tmp_path)
    yield p.pid, url
    stop(p)

def test_the_app_keeps_to_itself(page, bare_app):
    "Nothing is loaded from elsewhere, other names for this machine are refused, a large file is answered, and a visit leaves no process."
    pid, url = bare_app
    asked = []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(url)
    page.locator(".picker-upload").first.wait_for()
    assert len(kernels(pid)) == 1
    assert not [
        u for u in asked if not u.startswith((url, "data:", "blob:", url.replace("http", "ws")))
    ]
    icon = page.locator(".picker-upload i").first
    assert "Awesome" in icon.evaluate(
        "e => getComputedStyle(e, '::before').fontFamily + getComputedStyle(e).fontFamily")
    card = Card(page, "From one")
    send(card, 0, "huge.png", b"\0" * 11_000_000)
    card.says(".picker-error >> nth=0", "^huge.png has 11.0 MB: choose one of at most 9 MB$")
    send(card, 0, "letter.png", b"Dear Sir or Madam")
    card.says(".picker-error >> nth=0", "cannot read 'letter.png' as a picture")
    page.goto("about:blank")                                                                      # the page says goodbye
    until(lambda: not kernels(pid), 20, 0.2)
    foreign = urllib.request.Request(url, headers={"Host": "evil.example.com"})
    with pytest.raises(urllib.error.HTTPError) as e:
        urllib.request.urlopen(foreign, timeout=60)
    assert e.value.code == 403 and not kernels(pid)
    urllib.request.urlopen(url, timeout=PATIENCE).read()                                          # a visitor that never closes: no browser at all
    until(lambda: not kernels(pid), 60, 0.5)

def open_notebook(page, server, path):
    "Open, wait until the page has its kernel, run all cells."
    page.goto(server + path)

    def ready():
        return any(s["kernel"]["connections"] and s["kernel"]["execution_state"] == "idle"
                   for s in json.load(urllib.request.urlopen(f"{server}/api/sessions")))
    until(ready, PATIENCE, 0.2)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def no_errors(page):
    assert page.locator(
        '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
    ).count() == 0

def end_kernels(lab):
    "What still computes would slow down the next test."
    for k in json.load(urllib.request.urlopen(f"{lab}/api/sessions")):
        urllib.request.urlopen(
            urllib.request.Request(f"{lab}/api/sessions/{k['id']}", method="DELETE"))

def test_lab_runs_the_notebook_and_stays_free(page, lab):
    open_notebook(page, lab, "/lab/tree/17_widgets.ipynb?reset")
    cell = page.locator(".jp-CodeCell").filter(has_text='"I am"')
    cell.get_by_text("I am free", exact=True).wait_for()
    no_errors(page)
    prompt = cell.locator(".jp-InputPrompt")
    ran = int(re.search(r"\d+", prompt.inner_text())[0])
    cell.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    says(prompt, rf"\[{ran + 1}\]")
    first, last = Card(page, "From one picture"), Card(page, "What the priors")
    assert re.search("waits|^[0-9]+ of|from caption", last.status.inner_text())                   # a cell ran, and the pictures are still being computed
    before = scrub(first)
    shoot(page, "lab_first")
    second = Card(page, "Edited by words")
    second.says(".scrub-status", "^[3-7] (of|pictures)")   # the next in line
    second.drag(1 / 3, r"^θ = 0\.2$")
    assert second.shown() == 2 and bytes_of(second.picture) != PENDING
    text = second.caption.locator("input").nth(1)
    text.fill("")
    text.press("Enter")
    second.says(".scrub-error", "^the new caption is empty")
    shoot(page, "lab_error")
    upload_and_stop(first, before)
    end_kernels(lab)

def test_classic_notebook_moves_a_slider(page, lab):
    "Notebook 7, which the same server serves: the lesson up to its toy."
    pytest.importorskip("notebook")
    open_notebook(page, lab, "/notebooks/toy.ipynb")
    toy = Card(page, "Orange to blue")
    toy.ready()
    no_errors(page)
    frames = toy.thumbnails()
    assert len(set(frames)) == 10 and toy.shown() == 8                  # where the lesson left it
    toy.drag(0.5, r"^dark · i = 2$")
    assert toy.shown() == 7
    toy.box.get_by_role("button", name="light").click()
    toy.says(".scrub-label", r"^light · i = 2$")
    toy.key("ArrowRight", 2)
    toy.says(".scrub-label", r"^light · i = 4$")
    assert toy.shown() == 4 and bytes_of(toy.picture) == frames[4]
    end_kernels(lab)

def test_lab_opens_the_tour(page, lab):
    "What `make lab` opens, up to its first picture; the rest is nbval's."
    open_notebook(page, lab, "/lab/tree/index.ipynb?reset")
    page.locator(".jp-OutputArea-executeResult img").wait_for()
    no_errors(page)
    end_kernels(lab)

def test_lab_saves_a_notebook_as_it_was(page, lab, notebooks):
    "Opened and saved by hand, `00_core` is what it was: no `language_info`, no timings, every count and picture."
    file, stored = notebooks/"00_core.ipynb", (ROOT/"nbs"/"00_core.ipynb").read_text("utf8")
    file.write_text(stored.replace('"name": "python3"', '"name":  "python3"'), "utf8")                # so that a save can be seen
    before = file.stat().st_mtime_ns
    page.goto(f"{lab}/lab/tree/00_core.ipynb?reset")
    page.locator(".jp-CodeCell").nth(2).wait_for()
    until(
        lambda: any(s["kernel"]["execution_state"] == "idle"
                    for s in json.load(urllib.request.urlopen(f"{lab}/api/sessions"))), PATIENCE,
        0.2)
    page.locator(".jp-MarkdownCell").first.click()
    page.keyboard.press("Control+s")
    until(lambda: file.stat().st_mtime_ns != before, 60, 0.2)
    def content(text):
        nb = json.loads(text)
        for o in (o for cell in nb["cells"] for o in cell.get("outputs", [])):
            for kind, data in o.get("data", {}).items():
                if kind.startswith("image/"):
                    o["data"][kind] = "".join(data).rstrip()
        return nb
    assert content(file.read_text("utf8")) == content(stored)
    end_kernels(lab)

"UnCLIP: the promises of the design page, on a system trained for a few steps."
import json, shutil, pytest, torch
from unclip_nb.core import UnclipError, generator
from unclip_nb.pipeline import UnCLIP, as_picture, load_image
from unclip_nb.upsampler import psnr
from unclip_nb.shapes import EIGHT_CAPTIONS, render, scene_at

@pytest.fixture(scope="module")
def model(system): return UnCLIP.from_pretrained(str(system), device="cpu")

CAPTIONS = ["a red star above a blue ring", "a yellow circle", "a white heart"]

def test_generate_shapes_and_order(model):
    x = model.generate(CAPTIONS[:2], n=2, steps=3, seed=0)
    assert x.shape == (4, 3, 64, 64) and x.min() >= -1 and x.max() <= 1 and x.isfinite().all()
    assert model.generate(CAPTIONS[0], steps=3, upsample=False).shape == (1, 3, 16, 16)

def test_every_size_that_a_stage_draws(model, system, tmp_path):
    assert model.sizes == {16: [], 64: ["upsampler1"], 256: ["upsampler1", "upsampler2"]}
    at = lambda m, **kw: m.generate(CAPTIONS[:1], steps=2, **kw)
    assert at(model, size=256).shape == (1, 3, 256, 256) and torch.equal(
        at(model, size=16), at(model, upsample=False)) and torch.equal(
            at(model, size=64), at(model))
    assert torch.allclose(model.generate(CAPTIONS, steps=2, size=256)[2:],
                          model.generate(CAPTIONS[2:], steps=2, size=256),
                          atol=1e-3)
    with pytest.raises(UnclipError,
                       match="no stage draws pictures of 512 px: this system draws 16, 64, 256$"):
        at(model, size=512)
    one = tmp_path/"one"
    shutil.copytree(system, one)
    shutil.rmtree(one/"upsampler2")
    old = UnCLIP.from_pretrained(str(one), device="cpu")
    assert torch.equal(at(old), at(model))                                        # the same pictures as with a second stage
    with pytest.raises(UnclipError,
                       match="draws 16, 64; train another stage with `unclip train upsampler2`"):
        at(old, size=256)
    shutil.copytree(system, tmp_path/"gap")
    shutil.rmtree(tmp_path/"gap"/"upsampler1")
    gap = UnCLIP.from_pretrained(str(tmp_path/"gap"), device="cpu")
    assert gap.sizes == {16: []} and at(gap).shape == (1, 3, 16, 16)               # the second needs the first

def test_decode_takes_generators_for_the_stages_it_is_given(model):
    zi = model.encode_image(render([scene_at(0)], 32))
    mine = {"decoder": [generator(7, "decoder", 0)]}
    assert torch.equal(model.decode(zi, steps=2, size=256, seed=7, generators=mine),
                       model.decode(zi, steps=2, size=256, seed=7))

def test_same_seed_same_pictures_whatever_the_batch(model):
    together = model.generate(CAPTIONS, n=2, steps=3, seed=5)
    alone = model.generate(CAPTIONS[2:], n=2, steps=3, seed=5)
    assert torch.allclose(together[4:], alone, atol=1e-3)
    small = model.generate(CAPTIONS, n=2, steps=3, seed=5, batch_size=1)
    assert torch.allclose(together, small, atol=1e-3)
    assert not torch.allclose(together, model.generate(CAPTIONS, n=2, steps=3, seed=6), atol=1e-2)
    assert not torch.allclose(together[0], together[1], atol=1e-2)

def test_embeddings_are_unit_norm_at_any_size(model):
    for size in (16, 50, 128):
        assert torch.allclose(model.encode_image(render(scene_at(0), size)).norm(dim=1),
                              torch.ones(1),
                              atol=1e-5)
    assert torch.allclose(model.encode_text(CAPTIONS).norm(dim=1), torch.ones(3), atol=1e-5)

def test_decode_is_deterministic_given_x_T(model):
    zi = model.encode_image(render([scene_at(0), scene_at(1)], 32))
    x_T = torch.randn(2, 3, 16, 16, generator=generator(0))
    a, b = (model.decode(zi, x_T=x_T, steps=3, upsample=False, seed=s) for s in (0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(
        a, model.decode(zi, x_T=x_T, steps=3, upsample=False, eta=1.0), atol=1e-2)

def test_the_upsamplers_noise_is_part_of_the_seed(model):
    zi = model.encode_image(render([scene_at(0)], 32))
    x_T = torch.randn(1, 3, 16, 16, generator=generator(0))
    small, large = ([model.decode(zi, x_T=x_T, steps=3, seed=s, upsample=up) for s in (0, 0, 1)]
                    for up in (False, True))
    assert torch.equal(small[0], small[2])                                        # z_i and x_T say it all ...
    assert torch.equal(large[0], large[1]) and (large[0] - large[2]).abs().max() > 1e-4               # ... but for the upsampler's grain
    second = [
        model.decode(zi,
                     x_T=x_T,
                     steps=2,
                     size=256,
                     generators={"upsampler1": [generator(0)], "upsampler2": [generator(s)]})
        for s in (0, 1)
    ]
    assert (second[0] - second[1]).abs().max() > 1e-4                             # the second's too

def test_save_and_load_return_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path/"full")
    again = UnCLIP.from_pretrained(str(tmp_path/"full"), device="cpu")
    assert torch.equal(model.generate(CAPTIONS, steps=3), again.generate(CAPTIONS, steps=3))
    model.save_pretrained(tmp_path/"half", dtype=torch.float16)
    half = UnCLIP.from_pretrained(str(tmp_path/"half"), device="cpu")
    size = lambda d: sum(f.stat().st_size for f in d.rglob("*.safetensors"))
    assert size(tmp_path/"half") < 0.6 * size(tmp_path/"full")
    assert (half.generate(CAPTIONS, steps=3) -
            model.generate(CAPTIONS, steps=3)).abs().mean() < 0.02
    assert not list(tmp_path.rglob("*.part")) and set(
        json.loads((tmp_path / "half" / "unclip.json").read_text())["stages"]) == {
            "clip", "prior", "ar_prior", "decoder", "upsampler1", "upsampler2"
        }

def test_another_clip_is_refused(system, tmp_path):
    shutil.copytree(system, tmp_path/"mixed")
    config = tmp_path/"mixed"/"decoder"/"config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"clip_fingerprint": "0123456789ab"}))
    with pytest.raises(UnclipError, match="decoder was trained with CLIP 0123456789ab"):
        UnCLIP.from_pretrained(str(tmp_path/"mixed"))


@pytest.mark.parametrize("captions, message", [([], "no caption"), ([" "], "caption 1 is empty"),
                                               (["a red star", ""], "caption 2 is empty")])
def test_bad_captions(model, captions, message):
    with pytest.raises(UnclipError, match=message):
        model.generate(captions)

def test_bad_settings(model):
    with pytest.raises(UnclipError, match="unknown prior 'gan'"):
        model.generate(CAPTIONS, prior="gan")
    with pytest.raises(UnclipError, match="at least 1"):
        model.generate(CAPTIONS, n=0)
    with pytest.raises(UnclipError):
        model.generate(CAPTIONS, steps=100_000)

def test_missing_and_broken_weights(system, tmp_path):
    with pytest.raises(UnclipError, match="no weights called 'huge'"):
        UnCLIP.from_pretrained("huge")
    (tmp_path/"empty").mkdir()
    with pytest.raises(UnclipError, match="lacks clip, prior, decoder"):
        UnCLIP.from_pretrained(str(tmp_path/"empty"))
    shutil.copytree(system, tmp_path/"cut")
    file = tmp_path/"cut"/"prior"/"model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnclipError):
        UnCLIP.from_pretrained(str(tmp_path/"cut"))

@pytest.fixture(scope="module")
def tiny(): return UnCLIP.from_pretrained("tiny", device="cpu")

def test_a_latent_gives_its_picture_back(tiny):            # tiny = UnCLIP.from_pretrained("tiny", device="cpu"), module scope
    images = render([scene_at(i, "unseen") for i in range(8)], 32)
    latent = tiny.invert(images, 50)
    again = tiny.decode(latent.zi, x_T=latent.x_T, timesteps=latent.timesteps, upsample=False)
    assert latent.x_T.shape == (8, 3, 32, 32) and psnr(again, images).mean() >= 25
    assert psnr(again, images).mean() > psnr(again.roll(1, 0), images).mean() + 10
    latent, one = tiny.invert(images[:2], 20), tiny.invert(images[1], 20)      # does not depend on the batch
    assert torch.allclose(one.x_T, latent[1].x_T, atol=1e-2)

def test_any_picture_goes_in(tiny, tmp_path):
    from PIL import Image
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    red.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6                  # to be turned by 90 degrees clockwise: left becomes top
    red.save(tmp_path/"a.jpg", exif=exif, quality=95)
    x = load_image(tmp_path/"a.jpg")
    assert x.shape == (3, 40, 20) and x[2, 0, 10] > 0.8 and x[0, -1, 10] > 0.8
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path/"b.png")
    assert (load_image(tmp_path/"b.png") == 1).all()
    (tmp_path/"e.png").write_text("no picture")
    with pytest.raises(UnclipError, match="e.png"):
        load_image(tmp_path/"e.png")
    with pytest.raises(UnclipError, match="nowhere"):
        load_image(tmp_path/"nowhere.png")
    assert tiny.pictures([tmp_path/"a.jpg", red, torch.zeros(3, 9, 50)]).shape == (3, 3, 32, 32)

def modes():
    "One picture of 8 x 8 for each mode that a file may have: left half dark (0.25), right half light (0.75), and what it should read as."
    from PIL import Image

    def halves(mode, dark, light):
        x = Image.new(mode, (8, 8), dark)
        x.paste(light, (4, 0, 8, 8))
        return x
    palette = halves("P", 1, 2)
    palette.putpalette([0, 0, 0, 64, 64, 64, 191, 191, 191])
    clear = halves("P", 1, 2)
    clear.putpalette([0, 0, 0, 64, 64, 64, 191, 191, 191])
    clear.info["transparency"] = 1
    yield "L.png", halves("L", 64, 191), (64, 191)
    yield "LA.png", halves("LA", (64, 255), (191, 255)), (64, 191)
    yield "LA_clear.png", halves("LA", (64, 0), (191, 255)), (255, 191)            # transparent is white
    yield "P.png", palette, (64, 191)
    yield "P_clear.png", clear, (255, 191)
    yield "CMYK.jpg", halves("CMYK", (0, 0, 0, 191), (0, 0, 0, 64)), (64, 191)
    yield "F.tif", halves("F", 0.25, 0.75), (64, 191)                              # floats, 0 to 1
    yield "F255.tif", halves("F", 64.0, 191.0), (64, 191)                          # floats, 0 to 255
    yield "I16.png", halves("I;16", 16448, 49087), (64, 191)
    yield "I.tif", halves("I", 16448, 49087), (64, 191)


@pytest.mark.parametrize("name", [
    "L.png", "LA.png", "LA_clear.png", "P.png", "P_clear.png", "CMYK.jpg", "F.tif", "F255.tif",
    "I16.png", "I.tif"
])
def test_every_mode_of_picture_is_read_as_it_looks(name, tmp_path):
    image, want = next((i, w) for n, i, w in modes() if n == name)
    image.save(tmp_path/name, **({"quality": 95} if name.endswith("jpg") else {}))
    for x in (load_image(tmp_path/name), as_picture(image)):
        assert x.shape == (3, 8, 8) and [
            round(float((v.mean() + 1) * 127.5)) for v in (x[:, :, :3], x[:, :, 5:])
        ] == pytest.approx(want, abs=2), name

def test_a_float_picture_on_its_side_is_turned(tmp_path):
    from PIL import Image
    x = Image.new("F", (8, 4), 0.0)
    x.paste(1.0, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6        # left becomes top
    x.save(tmp_path/"a.tif", exif=exif)
    y = load_image(tmp_path/"a.tif")
    assert y.shape == (3, 8, 4) and (y[:, :4] == 1).all() and (y[:, 4:] == -1).all()

@pytest.mark.parametrize("values", [(0, 4000), (-1, 1), (float("nan"), 0.5)])
def test_floats_of_unknown_scale_are_refused_not_black(values, tmp_path):
    from PIL import Image
    x = Image.new("F", (8, 8), float(values[0]))
    x.paste(float(values[1]), (4, 0, 8, 8))
    x.save(tmp_path/"raw.tif")
    with pytest.raises(UnclipError, match="raw.tif.*floats from"):
        load_image(tmp_path/"raw.tif")
    with pytest.raises(UnclipError, match="floats from"):
        as_picture(x)

def test_an_ar_prior_is_another_way_to_a_picture(model, system, tmp_path):
    with_ar = model.generate(CAPTIONS, prior="ar", steps=3, seed=5)
    alone = model.generate(CAPTIONS[2:], prior="ar", steps=3, seed=5)
    assert torch.allclose(with_ar[2:], alone, atol=1e-3) and not torch.equal(
        with_ar, model.generate(CAPTIONS, steps=3, seed=5))
    ar, diffusion = (model.sample_zi(CAPTIONS, p, seed=5) for p in ("ar", "diffusion"))     # pictures of an untrained decoder hardly differ, embeddings do
    assert (ar * diffusion).sum(1).max() < 0.98
    shutil.copytree(system, tmp_path/"one")
    shutil.rmtree(tmp_path/"one"/"ar_prior")
    one = UnCLIP.from_pretrained(str(tmp_path/"one"), device="cpu")
    with pytest.raises(UnclipError, match="no ar prior: train one with `unclip train ar_prior`"):
        one.generate(CAPTIONS, prior="ar", steps=3)
    config = tmp_path/"other"
    shutil.copytree(system, config)
    file = config/"ar_prior"/"config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_fingerprint": "0123456789ab"}))
    with pytest.raises(UnclipError, match="ar_prior was trained with CLIP 0123456789ab"):
        UnCLIP.from_pretrained(str(config))

def test_the_index_says_what_belongs_to_a_system(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    small = UnCLIP(tiny.clip, tiny.prior, tiny.decoder)
    small.save_pretrained(tmp_path)
    assert list(UnCLIP.from_pretrained(tmp_path, device="cpu").stages) == [
        "clip", "prior", "decoder"
    ] and (tmp_path / "ar_prior").is_dir()
    (tmp_path/"unclip.json").write_text("{")
    with pytest.raises(UnclipError, match="unclip.json is damaged"):
        UnCLIP.from_pretrained(tmp_path, device="cpu")

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_save_load_and_draw(tiny, tmp_path, dtype):
    import copy
    right, other = (tiny.generate(CAPTIONS[:1], steps=3, upsample=False, seed=s) for s in (0, 1))
    tiny.save_pretrained(tmp_path/"a", dtype=dtype)
    loaded = UnCLIP.from_pretrained(tmp_path/"a", device="cpu")
    cast = copy.deepcopy(tiny).to(dtype)
    assert loaded.clip.fingerprint == cast.clip.fingerprint == tiny.clip.fingerprint
    cast.save_pretrained(tmp_path/"b")
    asked = UnCLIP.from_pretrained(tmp_path/"b", device="cpu", dtype=dtype)
    assert next(asked.decoder.parameters()
                ).dtype == dtype and asked.decoder.stats.mean.dtype == torch.float32
    for model in (loaded, cast, asked):
        drawn = model.generate(CAPTIONS[:1], steps=3, upsample=False)
        assert drawn.dtype == torch.float32 and (
            drawn - right).abs().mean() < 0.2 * (other - right).abs().mean()
    assert cast.invert(drawn, 3).x_T.dtype == torch.float32
    assert cast.generate(CAPTIONS[:1], prior="ar", steps=2).isfinite().all()

def test_another_default_precision_changes_nothing(tiny):
    right = tiny.generate(CAPTIONS[:1], steps=2, upsample=False)
    try:
        torch.set_default_dtype(torch.float64)
        again = UnCLIP.from_pretrained("tiny", device="cpu").generate(CAPTIONS[:1],
                                                                      steps=2,
                                                                      upsample=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(right, again)

def test_a_compiled_system_is_saved_under_its_own_names(tiny, tmp_path):
    import copy
    model = copy.deepcopy(tiny)
    model.decoder.unet, model.clip.model = torch.compile(model.decoder.unet), torch.compile(
        model.clip.model)
    model.save_pretrained(tmp_path)
    assert UnCLIP.from_pretrained(tmp_path, device="cpu").clip.fingerprint == tiny.clip.fingerprint

def test_options_of_loading_and_saving_are_known_or_refused(tiny, tmp_path, monkeypatch):
    for options, says in ((dict(torch_dtype=torch.float16), "did you mean dtype"),
                          (dict(misspelt=1), "no option 'misspelt'"), (dict(dtype=torch.int8),
                                                                       "dtype is torch.int8")):
        with pytest.raises(UnclipError, match=says):
            UnCLIP.from_pretrained("tiny", **options)
        with pytest.raises(UnclipError, match=says):
            type(tiny.prior).from_pretrained(tmp_path, **options)
    for save in (tiny.save_pretrained, tiny.prior.save_pretrained):
        with pytest.raises(UnclipError, match="call push_to_hub"):
            save(tmp_path/"x", push_to_hub=True)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.append(
        (name, kw)) or str(tmp_path / "hub"))
    tiny.save_pretrained(tmp_path/"hub")
    UnCLIP.from_pretrained("someone/system",
                           device="cpu",
                           revision="v1",
                           cache_dir="c",
                           local_files_only=True,
                           token="t")
    assert asked == [
        ("someone/system",
         dict(allow_patterns=["*.json", "*.txt", "*.safetensors"],
              ignore_patterns=["*.fp16.safetensors", "*.bf16.safetensors", "*.non_ema.safetensors"],
              revision="v1",
              token="t",
              cache_dir="c",
              local_files_only=True))
    ]


@pytest.mark.parametrize(
    "path", ["runs/mine", "./mine/that", "../mine", "~/mine/that", "/no/where", "a/b/c"])
def test_a_local_path_never_asks_the_hub(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *a, **kw: pytest.fail("asked the hub"))
    with pytest.raises(UnclipError, match="no folder|no weights"):
        UnCLIP.from_pretrained(path)


def test_files_of_weights_follow_the_umask_and_unreadable_ones_are_named(
        tiny, tmp_path, monkeypatch):
    import os
    before = os.umask(0o027)
    try:
        tiny.prior.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {oct(f.stat().st_mode & 0o777) for f in tmp_path.iterdir()} == {"0o640"}
    def refuse(*a, **kw): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("unclip_nb.train.load_file", refuse)
    with pytest.raises(UnclipError, match="cannot read .*model.safetensors: Permission denied"):
        type(tiny.prior).from_pretrained(tmp_path)

def test_bytes_are_pictures_at_every_entry(tiny):
    from PIL import Image
    import numpy as np
    picture = render([scene_at(3)], 64)
    small = ((picture + 1) * 127.5).round().to(torch.uint8)
    right = small.float() / 127.5 - 1
    for given in (small, small[0].permute(1, 2, 0).numpy(),
                  Image.fromarray(small[0].permute(1, 2, 0).contiguous().numpy())):
        assert torch.equal(tiny.encode_image(given), tiny.encode_image(right))
        assert torch.equal(tiny.invert(given, 2).x_T, tiny.invert(right, 2).x_T)
    with pytest.raises(UnclipError, match="floats from 0 to 255"):
        tiny.encode_image((picture > 0) * 255.0)

def test_many_large_pictures_are_shrunk_as_they_are_read(tmp_path):
    "Peak memory of 40 photos of 1600 x 1200 (920 MB as float32) over that of one."
    import subprocess, sys, os
    from PIL import Image
    Image.effect_noise((1600, 1200), 90).convert("RGB").save(tmp_path/"a.jpg")
    code = f"""import resource
from unclip_nb.pipeline import UnCLIP
m = UnCLIP.from_pretrained("tiny", device="cpu")
def peak(n): m.pictures([{str(tmp_path/'a.jpg')!r}] * n); return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak(1), peak(40))"""
    r = subprocess.run([sys.executable, "-c", code],
                       capture_output=True,
                       text=True,
                       timeout=300,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, many = map(int, r.stdout.split())
    assert many - one < 200_000, r.stdout                                     # KB

def test_the_batch_changes_a_picture_by_rounding_only(tiny):
    together = tiny.generate(CAPTIONS, seed=3, steps=8)
    alone = torch.cat([tiny.generate([c], seed=3, steps=8) for c in CAPTIONS])
    level = lambda x: ((x + 1) * 127.5).round()
    apart = level(together) - level(alone)
    assert (together - alone
            ).abs().max() < 1e-3 and apart.abs().max() <= 1 and apart.ne(0).float().mean() < 1e-3

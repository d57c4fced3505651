"Core: seeds that are the same everywhere, noise that ignores its batch, pictures that survive the disk, errors in one line."
import os, subprocess, sys
import numpy as np, pytest, torch
from PIL import Image
from unclip_nb import core
from unclip_nb.core import (UnclipError, count_parameters, data_path, generator, image_grid, number,
                            pick_device, randn, resize, seed_for, show_images, to_pil, to_tensor)

def test_seeds_are_fixed_for_good():
    "Checkpoints, galleries and the shipped weights rest on these numbers."
    assert seed_for("noise", 7) == 715471765355541205
    assert seed_for() != seed_for("") and 0 <= seed_for("x") < 2**63

def test_seeds_do_not_depend_on_the_process():
    code = "from unclip_nb.core import seed_for; print(seed_for('a red star', 3))"
    run = subprocess.run([sys.executable, '-c', code],
                         env={**os.environ, 'PYTHONHASHSEED': '1'},
                         capture_output=True,
                         text=True,
                         check=True)
    assert int(run.stdout) == seed_for('a red star', 3)

def test_seeds_differ():
    seeds = {seed_for(a, b) for a in ("data", "noise", "1", 1) for b in range(500)}
    assert len(seeds) == 2000 and seed_for("ab", "c") != seed_for(
        "a", "bc") and seed_for(1) != seed_for("1")

def test_noise_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    randn((2, 3), generator("a"))
    randn((2, 3), [generator("a"), generator("b")])
    assert torch.random.get_rng_state().equal(before)

def test_a_row_does_not_depend_on_its_batch():
    names = ["a", "b", "c", "d"]
    draw = lambda ns: randn((len(ns), 3, 4), [generator(n) for n in ns])
    assert draw(names)[[3, 1]].equal(draw(["d", "b"]))
    assert draw(["b"])[0].equal(torch.randn(3, 4, generator=generator("b")))
    with pytest.raises(UnclipError, match="2 generators for 3 rows"):
        randn((3, 4), [generator(0), generator(1)])

def test_noise_is_standard_normal():
    x = randn((64, 500), [generator("moments", i) for i in range(64)])
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02

@pytest.mark.parametrize("name", ["abacus", "cuda:x", ""])
def test_unknown_devices(name):
    with pytest.raises(UnclipError, match="use auto, cpu, cuda or mps"):
        pick_device(name)

def test_absent_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device().type == "cpu" == pick_device("cpu").type
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(UnclipError, match="use --device cpu") as e:
            pick_device(name)
        assert "\n" not in str(e.value)

def test_every_byte_survives():
    bytes_ = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    x = to_tensor(Image.fromarray(bytes_))
    assert x.shape == (3, 16, 16) and -1 <= x.min() and x.max() <= 1
    assert np.array_equal(np.array(to_pil(x)), bytes_)
    assert to_tensor(to_pil(x * 1000)).abs().eq(1).all()                 # clipped, not wrapped round

@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_modes(mode):
    x = to_tensor(Image.new(mode, (5, 4)))
    assert x.shape == (3, 4, 5) and x.dtype == torch.float32

def test_transparency_is_laid_on_white():
    half = to_tensor(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).flatten()
    assert torch.allclose(half, torch.zeros(3), atol=0.02)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    palette.info["transparency"] = 0
    assert to_tensor(palette).eq(1).all()

def test_resize_is_the_mean_or_pillow():
    x = torch.rand(2, 3, 24, 24, generator=generator("resize")) * 2 - 1
    assert resize(x, 24) is x
    assert torch.allclose(resize(x, 8),
                          x.unflatten(2, (8, 3)).unflatten(4, (8, 3)).mean((3, 5)),
                          atol=1e-6)
    for size in (10, 40):                                               # Pillow's bilinear filter, an independent implementation
        want = np.stack([[
            np.array(Image.fromarray(c.numpy()).resize((size, size), Image.BILINEAR)) for c in row
        ] for row in x])
        assert np.abs(resize(x, size).numpy() - want).max() < 1e-4
    assert resize(torch.zeros(1, 3, 10, 20), 5).shape == (1, 3, 5, 5)

def test_count_parameters_counts_what_trains():
    m = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert count_parameters(m) == 8 + 4
    m[0].weight.requires_grad_(False)
    assert count_parameters(m) == 2 + 4

def test_sheet():
    red = torch.tensor([1., -1, -1]).view(3, 1, 1).expand(5, 3, 8, 8)
    plain, titled = image_grid(red, cols=2,
                               height=16), image_grid(red, ["a caption that is far too long"] * 5,
                                                      cols=2,
                                                      height=16)
    assert plain.size == (2 * 22 + 6, 3 * 22 +
                          6) and titled.height > plain.height and titled.width == plain.width
    px = np.array(plain)
    assert (px.reshape(-1, 3) == [255, 0, 0]).all(1).sum() == 5 * 16 * 16 and (px[:6] == 255).all()
    assert image_grid(torch.zeros(3, 3, 8, 16), height=8).size == (3*22 + 6, 8 + 12)
    assert show_images(red).data[:2] == b"\xff\xd8"

def test_shipped_data(tmp_path, monkeypatch):
    assert (data_path() / "README.md").samefile(data_path("README.md"))
    with pytest.raises(UnclipError, match="called 'tinny'; there is: .*README.md"):
        data_path("tinny")
    lib = tmp_path / "unclip_nb"
    lib.mkdir()
    monkeypatch.setattr(core, "__file__", str(lib / "core.py"))
    with pytest.raises(UnclipError, match="there is: nothing"):
        data_path("tiny")
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    assert data_path("tiny") == tmp_path / "data" / "tiny"            # a checkout
    (lib / "shipped" / "tiny").mkdir(parents=True)
    assert data_path("tiny") == lib / "shipped" / "tiny"                # a wheel

@pytest.mark.skipif(os.environ.get('UNCLIP_TYPES') == '0', reason='switched off')
def test_shapes_are_checked_while_tests_run():
    "conftest.py switches jaxtyping's run-time checker on: no annotation is decoration."
    from jaxtyping import TypeCheckError
    with pytest.raises(TypeCheckError):
        to_pil(torch.zeros(4, 8, 8))
    with pytest.raises(TypeCheckError):
        resize(torch.zeros(3, 8, 8), 4)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 10**400, True, None, "3", [1],
     torch.zeros(2), 2.5])
def test_number_refuses_what_is_no_whole_number_in_one_line(value):
    with pytest.raises(UnclipError, match="^steps is .*: give a whole number at least 1$"):
        number("steps", value, low=1, whole=True)

def test_number_keeps_its_bounds():
    assert number("eta", 1, low=0, high=1) == 1.0
    assert isinstance(number("steps", 3, low=1, whole=True), int)
    for bounds, value in ((dict(low=1), 0), (dict(high=1), 2), (dict(above=0), 0), (dict(below=1),
                                                                                    1)):
        with pytest.raises(UnclipError):
            number("x", value, **bounds)

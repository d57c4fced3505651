"Moves in the bipartite latent: slerp against scipy and by hand, and that every edit begins at the picture itself."
import json, math, sys
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from PIL import Image
from unclip_nb.core import UnclipError, data_path, generator, randn, to_pil
from unclip_nb.edits import (angle, as_latent, frames, interpolate, interpolation_path, pca_path,
                             pca_sweep, slerp, text_diff, text_diff_path, text_direction,
                             variation_path, variations)
from unclip_nb.pca import PCA
from unclip_nb.pipeline import Latent, UnCLIP
from unclip_nb.shapes import render, scene_at

HOW = dict(steps=3, upsample=False)

@pytest.fixture(scope="module")
def model(): return UnCLIP.from_pretrained("tiny", device="cpu")
@pytest.fixture(scope="module")
def images(): return render([scene_at(i, "valid") for i in range(2)], 32)
@pytest.fixture(scope="module")
def latent(model, images): return model.invert(images, 3)
@pytest.fixture(scope="module")
def again(model, latent): return model.decode(latent.zi, x_T=latent.x_T, steps=3, upsample=False)

def unit(*shape, key="u"): return F.normalize(randn(shape, generator(key)).double(), dim=1)
def close(a, b, tol=1e-4): return a.shape == b.shape and (a - b).abs().max() < tol       # the same rows in another batch: rounding only

# slerp

def test_slerp_is_scipys():
    scipy = pytest.importorskip("scipy.spatial")
    a, b = unit(4, 50, key="a"), unit(4, 50, key="b")
    ts = torch.linspace(0, 1, 13, dtype=torch.float64)
    for row in range(4):
        theirs = torch.from_numpy(scipy.geometric_slerp(a[row].numpy(), b[row].numpy(), ts.numpy()))
        assert (slerp(a[row].expand(13, -1), b[row].expand(13, -1), ts) -
                theirs).abs().max() < 1e-12

@pytest.mark.parametrize("shape", [(3, 768), (3, 4, 8, 8)])
def test_slerp_is_the_formula_whatever_the_lengths(shape):
    a, b = 50 * randn(shape, generator("a")).double(), 60 * randn(shape, generator("b")).double()
    for t in (0.2, 0.5, 0.9):
        for x, y, got in zip(a, b, slerp(a, b, t)):
            omega = math.acos(float((x * y).sum() / x.norm() / y.norm()))
            assert torch.allclose(got,
                                  math.sin((1 - t) * omega) / math.sin(omega) * x +
                                  math.sin(t * omega) / math.sin(omega) * y,
                                  rtol=1e-9)

def test_whole_rows_not_numbers():
    "The elementwise arccosine of a pipeline in use leaves the sphere (length 1.26 at a cosine of 0.6)."
    u, v = unit(8, 768, key="u"), unit(8, 768, key="v")
    v = F.normalize(0.6 * u + 0.8 * F.normalize(v - (u * v).sum(1, keepdim=True) * u, dim=1), dim=1)
    assert (slerp(u, v, 0.5).norm(dim=1) - 1).abs().max() < 1e-12
    omega = torch.acos(u * v)
    wrong = torch.sin(0.5 * omega) / torch.sin(omega) * (u + v)
    assert (wrong.norm(dim=1) - 1.26).abs().max() < 0.02


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-6),
                                        (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_sphere_ends_speed_and_dtype(dtype, tol):
    a, b = unit(6, 96, key="a").to(dtype), unit(6, 96, key="b").to(dtype)
    path = [slerp(a, b, t) for t in torch.linspace(0, 1, 9)]
    assert torch.equal(path[0], a) and torch.equal(path[-1], b) and all(p.dtype == dtype
                                                                        for p in path)
    assert max(float((p.double().norm(dim=1) - 1).abs().max()) for p in path) < tol
    turns = torch.stack([angle(p, q) for p, q in zip(path, path[1:])])
    assert (turns - angle(a, b) / 8).abs().max() < 2 * tol + 1e-7

@pytest.mark.parametrize("off", [0, 1e-12, 1e-7, 1e-4])
def test_nearly_parallel_and_nearly_opposite(off):
    a = unit(5, 96, key="a")
    b = F.normalize(a + off * unit(5, 96, key="b"), dim=1)
    for end in (b, -b):
        path = torch.stack([slerp(a, end, t) for t in torch.linspace(0, 1, 9, dtype=torch.float64)])
        assert path.isfinite().all() and (path.norm(dim=-1) - 1).abs().max() < 1e-3
        assert torch.equal(path[0], a) and (path[-1] - end).abs().max() < 1e-12
        turns = torch.stack([angle(p, q) for p, q in zip(path, path[1:])])
        assert (turns - angle(a, end) / 8).abs().max() < 1e-3
    assert torch.equal(slerp(a, -a, 0.3), slerp(a, -a, 0.3))                              # always the same meridian

def test_angle_sees_what_the_arccosine_does_not():
    a = torch.tensor([[1.0, 0.0]])
    assert torch.allclose(angle(a, torch.tensor([[1.0, 1e-6]])),
                          torch.tensor(1e-6, dtype=torch.float64),
                          rtol=1e-6)
    assert angle(a, -3 * a).item() == pytest.approx(math.pi) and angle(
        a, a.flip(1)).item() == pytest.approx(math.pi / 2)

def test_slerp_one_theta_a_row_one_vector_and_bad_shapes():
    a, b = unit(3, 8, key="a"), unit(3, 8, key="b")
    rows = slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(rows[0], a[0]) and torch.equal(rows[2], b[2]) and torch.allclose(
        rows[1], slerp(a[1], b[1], 0.5))
    with pytest.raises(UnclipError, match="shapes"):
        slerp(a, b[:, :4], 0.5)
    assert slerp(torch.zeros(1, 4), torch.ones(1, 4), 0.5).isfinite().all()

# paths

def test_frames_in_any_batches_are_the_same(model, latent):
    path = interpolation_path(latent[0], latent[1], 5)
    whole = torch.cat(list(frames(model, path, upsample=False)))
    single = list(frames(model, path, upsample=False, batch_size=1))
    assert len(single) == 5 and close(torch.cat(single), whole, 1e-3)
    noisy = [
        torch.cat(
            list(frames(model, variation_path(latent[0], 5), eta=1, upsample=False, batch_size=k)))
        for k in (2, 5)
    ]
    assert close(*noisy, 1e-3)                                                            # a frame's noise is its own

def test_upsampled_frames_do_not_flicker(model, latent):
    x, y = torch.cat(list(frames(model, variation_path(latent[0], 2))))
    assert x.shape == (3, 128, 128) and close(x, y, 1e-3)                                 # the same latent: the same pixels

def test_variations(model, images, latent, again):
    still = variations(model, images[0], n=3, eta=0, **HOW)
    assert close(still, again[:1].expand(3, -1, -1, -1), 1e-3)                            # eta 0: the reconstruction
    a, b, other = (variations(model, latent[0], n=3, eta=1, seed=s, upsample=False)
                   for s in (0, 0, 1))
    assert torch.equal(a, b) and not close(a, other) and not close(a[0], a[1])            # seeded, and all different
    mild = variations(model, latent[0], n=3, eta=0.3, upsample=False)
    assert mild.var(0).mean() < a.var(0).mean()
    assert variations(model, images, n=2, eta=0, **HOW).shape == (4, 3, 32, 32)           # several pictures: picture-major

def test_interpolation_ends(model, images, again):
    path = interpolate(model, images[0], images[1], n=4, **HOW)
    assert close(path[[0, -1]], again, 1e-3)                                              # slerped noise: the reconstructions
    fixed = [
        interpolate(model, images[0], images[1], n=3, noise="fixed", seed=s, **HOW) for s in (0, 1)
    ]
    z = model.encode_image(model.pictures(images))
    assert close(fixed[0][:1], model.decode(z[:1], steps=3, upsample=False), 1e-3)        # the draw that seed 0 always starts from
    assert not close(*fixed) and not close(fixed[0][:1], again[:1], 1e-2)

def test_interpolation_path_is_on_the_sphere(latent):
    path = interpolation_path(latent[0], latent[1], 7)
    assert len(path) == 7 and (path.zi.norm(dim=1) - 1).abs().max() < 1e-6 and torch.equal(
        path[0].zi, latent[0].zi) and torch.equal(path[6].x_T, latent[1].x_T)
    assert torch.allclose(path.zi[3], slerp(latent.zi[0], latent.zi[1], 0.5))
    fixed = interpolation_path(latent[0], latent[1], 7, "fixed", seed=5).x_T
    assert torch.equal(fixed[0], fixed[6]) and 0.9 < fixed[0].std() < 1.1

def test_text_diff(model, images, latent, again):
    edit = text_diff(model, images[0], "a red star", "a blue star", thetas=(0, 0.5), **HOW)
    assert close(edit[:1], again[:1], 1e-3) and not close(edit[1], edit[0], 1e-2)         # theta 0: the reconstruction
    zd = text_direction(model, "a red star", "a blue star")
    by_hand = F.normalize(model.encode_text(["a blue star"]) - model.encode_text(["a red star"]),
                          dim=1)
    assert torch.allclose(zd, by_hand, atol=1e-6) and torch.allclose(
        text_direction(model, "a blue star", "a red star"), -zd, atol=1e-6)
    path = text_diff_path(latent, zd, (0, 1))
    assert torch.equal(path.zi[::2], latent.zi) and torch.allclose(
        path.zi[1::2], zd.expand(2, -1), atol=1e-6)
    assert torch.equal(path.x_T[0], path.x_T[1])                                          # the noise is held
    assert text_diff(model, latent[0], "", "a blue star", thetas=[0.3],
                     upsample=False).shape == (1, 3, 32, 32)
    two = text_direction(model, ["a red star", ""], ["a blue star"] * 2)
    assert torch.allclose(two[:1], zd, atol=1e-5)                                         # one a picture

def test_pca_sweep(model, images, latent, again):
    d = latent.zi.shape[1]
    pca = PCA().fit(model.encode_image(render([scene_at(i) for i in range(200)], 32)))
    path = pca_path(latent[0], pca, (1, 10, d))
    assert (path.zi.norm(dim=1) - 1).abs().max() < 1e-5 and torch.allclose(
        path.zi[2], latent.zi[0], atol=1e-4)  # all components: z_i
    by_hand = pca.mean + (latent.zi[0] - pca.mean) @ pca.components[:10].T @ pca.components[:10]
    assert torch.allclose(path.zi[1], by_hand / by_hand.norm(), atol=1e-5)
    whole = pca_sweep(model, images[0], pca, (d,), noise="inverted", **HOW)
    assert close(whole, again[:1], 5e-3)
    fixed = pca_sweep(model, images[0], None, (1, d), **HOW)                              # the AR prior's own
    assert close(fixed[1:], model.decode(latent.zi[:1], steps=3, upsample=False),
                 5e-3) and not close(fixed[0], fixed[1], 1e-2)
    assert close(pca_sweep(model, latent[0], None, (1, d), upsample=False), fixed, 5e-3)  # a latent says in how many steps

def test_a_picture_may_be_anything(model, images, tmp_path):
    to_pil(images[0]).resize((70, 50)).save(tmp_path/"a.png")
    for x in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"),
              images[0], images[:1], [images[0]]):
        assert len(as_latent(model, x, 2)) == 1
    assert interpolate(model, tmp_path/"a.png", images[1], n=2, **HOW).shape == (2, 3, 32, 32)
    held = Latent(torch.zeros(1, 96), torch.zeros(1, 3, 32, 32), [500, 0])
    assert as_latent(model, held) is held

def test_clear_errors(model, images, latent, tmp_path):
    (tmp_path/"note.txt").write_text("no picture")
    no = lambda words: pytest.raises(UnclipError, match=words)
    with no("cannot read"):
        variations(model, tmp_path/"note.txt", **HOW)
    with no("no file"):
        text_diff(model, "no.png", "a", "b", **HOW)
    with no("variations"):
        variations(model, latent[0], n=0)
    with no("eta"):
        variations(model, latent[0], eta=-1)
    with no("slerp or fixed"):
        interpolate(model, latent[0], latent[1], noise="both")
    with no("at least 2"):
        interpolate(model, latent[0], latent[1], n=1)
    with no("same steps"):
        interpolation_path(latent[0], Latent(latent.zi[1:], latent.x_T[1:], [700, 0]))
    with no("same to CLIP"):
        text_diff(model, latent[0], "a red star", "a red star")
    with no("empty"):
        text_diff(model, latent[0], "a red star", " ")
    with no("thetas"):
        text_diff(model, latent[0], "a red star", "a blue star", thetas=(0, 2))
    with no("fixed or inverted"):
        pca_sweep(model, latent[0], ks=(1,), noise="slerp")
    with no("components"):
        pca_sweep(model, latent[0], ks=(1000,), upsample=False)
    with no("at least one"):
        pca_sweep(model, latent[0], ks=())

# the judged table

@pytest.fixture(scope="module")
def bench():
    "benchmarks/edits.py as a module."
    folder = str(Path(__file__).parent.parent/"benchmarks")
    sys.path.insert(0, folder)
    try:
        import edits
    finally:
        sys.path.remove(folder)
    return edits

def test_the_judged_table_belongs_to_the_shipped_weights(model, bench):
    stored = json.loads((data_path("tiny")/"edits.json").read_text())
    made_with = {"clip": model.clip.fingerprint, "decoder": bench.fingerprint(model.decoder)}
    assert {k: stored.get(k)
            for k in made_with
            } == made_with, "data/tiny/edits.json is of other weights: run benchmarks/edits.py"
    assert stored["n"] >= 64 and stored["steps"] == 50
    for kind in ("color", "shape", "size", "background"):
        for base, least in (("described", 4), ("empty", 3)):
            rows = {r["theta"]: r for r in stored["rows"] if (r["kind"], r["base"]) == (kind, base)}
            assert len(rows) >= least and 0 in rows and all(
                r["n"] == stored["n"]
                and r["place"] <= r["both"] <= min(r["changed"], r["stayed"]) <= r["n"]
                for r in rows.values())
            assert rows[0]["changed"] == 0                                                # a reconstruction is no edit

def test_rows_of_other_weights_are_not_kept(bench, model, tmp_path):
    out, rows = tmp_path / "edits.json", [
        dict(kind=k, base="empty", theta=t, n=1) for k in ("shape", "color") for t in (0.5, 0)
    ]
    made = bench.settings(model, 1, 3, 0)
    assert bench.kept(out, made) == [] and made["clip"] != made["decoder"]
    bench.save(out, made, rows)
    assert [(r["kind"], r["theta"]) for r in bench.kept(out, made)] == [
        ("color", 0), ("color", 0.5), ("shape", 0), ("shape", 0.5)
    ] and not list(tmp_path.glob("*.part"))
    assert bench.kept(out, made | {"decoder": "0123456789ab"}) == [] == bench.kept(
        out, made | {"steps": 4})

@pytest.mark.parametrize("kind", ["color", "shape", "size", "background"])
def test_the_judge_of_edits(bench, kind):
    scenes = [s for s in (scene_at(i, "valid") for i in range(30)) if len(s.objects) == 1][:8]
    wanted = [bench.changed(s, kind, generator("judge", i)) for i, s in enumerate(scenes)]
    drawn, asleep = render(wanted, 32), render(scenes, 32)
    assert bench.judged(drawn, wanted, kind) == dict(changed=8, stayed=8, both=8, place=8)
    assert bench.judged(asleep, wanted, kind) == dict(changed=0, stayed=8, both=0, place=0)
    assert bench.judged(torch.zeros_like(drawn), wanted, kind)["both"] == 0
    other = {"background": "color"}.get(kind, "background")                               # the wish came true, and something else went
    spoilt = [bench.changed(s, other, generator("spoil", i)) for i, s in enumerate(wanted)]
    assert bench.judged(render(spoilt, 32), wanted, kind) == dict(changed=8,
                                                                  stayed=0,
                                                                  both=0,
                                                                  place=0)

def test_the_bench_goes_on_where_it_was_stopped(bench, tmp_path, capsys):
    how = dict(weights="tiny",
               n=1,
               steps=2,
               seed=0,
               batch_size=4,
               device="cpu",
               out=tmp_path / "edits.json")
    bench.run(thetas=[0, 0.5, 0.6], **how)
    first = json.loads(how["out"].read_text())
    assert [sum(r["base"] == b for r in first["rows"]) for b in ("described", "empty")] == [12, 8]        # the empty base at every second theta
    how["out"].write_text(json.dumps(first | {"rows": first["rows"][:-3]}))
    capsys.readouterr()
    bench.run(thetas=[0, 0.5, 0.6], **how)
    assert json.loads(
        how["out"].read_text()) == first and "17 of 20 rows are there" in capsys.readouterr().out

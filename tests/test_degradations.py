"Blurs against plain loops, scipy and torchvision; resizes against Pillow; JPEG against Pillow; BSR's plans counted against its authors' numbers."
import io, math
from collections import Counter
import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage, stats
from unclip_nb.core import UnclipError, generator, to_pil, to_tensor
from unclip_nb.data import import_open_clip
from unclip_nb.degradations import (BSR, WAYS, Dice, add_noise, area_weights, blur, blur_and_pick,
                                    blur_some, bsr_apply, bsr_degrade, bsr_plan, convolve,
                                    gaussian_blur, gaussian_kernel, jpeg, mirror_pad, noise_mix,
                                    oval_kernel, rescale)


def pictures(n=4, h=9, w=7):
    return torch.rand(n, 3, h, w, generator=generator("pictures"), dtype=torch.float64) * 2 - 1


def plain_blur(image, sigma, kernel):
    "Every pixel as a weighted sum over its neighbourhood, in loops."
    r, pad = kernel // 2, np.pad(image, [(0, 0), (kernel // 2, ) * 2, (kernel // 2, ) * 2],
                                 mode="reflect")
    k = np.array([[math.exp(-(i * i + j * j) / (2 * sigma * sigma)) for j in range(-r, r + 1)]
                  for i in range(-r, r + 1)])
    k /= k.sum()
    return np.array([[[(pad[c, y:y + kernel, x:x + kernel] * k).sum()
                       for x in range(image.shape[2])] for y in range(image.shape[1])]
                     for c in range(3)])


@pytest.mark.parametrize("sigma, kernel", [(0.6, 3), (1.2, 5), (2.0, 7)])
def test_blur_equals_a_plain_loop(sigma, kernel):
    x = pictures(2)
    want = torch.from_numpy(np.stack([plain_blur(i.numpy(), sigma, kernel) for i in x]))
    assert torch.allclose(gaussian_blur(x, sigma, kernel), want, atol=1e-10)


def test_the_default_is_the_papers():
    x = pictures(1)
    assert torch.allclose(gaussian_blur(x)[0],
                          torch.from_numpy(plain_blur(x[0].numpy(), 0.6, 3)),
                          atol=1e-10)


@pytest.mark.parametrize("sigma, kernel", [(0.6, 3), (1.5, 5)])
def test_blur_equals_torchvision(sigma, kernel):
    import_open_clip()                                                        # makes torchvision load beside any torch
    from torchvision.transforms.functional import gaussian_blur as theirs
    x = pictures().float()
    assert torch.allclose(gaussian_blur(x, sigma, kernel),
                          theirs(x, [kernel, kernel], [sigma, sigma]),
                          atol=1e-6)


def test_each_picture_has_its_own_sigma():
    x, sigmas = pictures(), torch.tensor([0.0, 0.3, 0.6, 1.5])
    together = gaussian_blur(x, sigmas)
    for i, s in enumerate(sigmas.tolist()):
        assert torch.allclose(together[i:i + 1], gaussian_blur(x[i:i + 1], s), atol=1e-6)
    assert torch.equal(together[0], x[0])                                     # sigma 0 changes nothing


def test_kernels_add_up_and_flat_pictures_stay_flat():
    k = gaussian_kernel(torch.tensor([0.0, 0.6, 5.0], dtype=torch.float64), 5)
    assert torch.allclose(k.sum(1), torch.ones(3, dtype=torch.float64)) and torch.equal(
        k, k.flip(1)) and k[0].tolist() == [0, 0, 1, 0, 0]
    flat = torch.full((2, 3, 6, 6), 0.7)
    assert torch.allclose(gaussian_blur(flat, 3.0, 5), flat)                  # also at the border


def test_dtype_device_and_gradient_are_kept():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = pictures().to(dtype)
        assert gaussian_blur(x, 0.6).dtype == dtype and blur_some(x, 0.5,
                                                                  generator("g")).dtype == dtype
    x = pictures().requires_grad_()
    gaussian_blur(x).sum().backward()
    assert torch.isclose(x.grad.sum(), torch.tensor(float(x.numel()), dtype=torch.float64))


def test_blur_some_blurs_that_share_and_leaves_the_others_alone():
    x = pictures(400, 5, 5)
    y, blurred = blur_some(x, 0.25, generator("some")), gaussian_blur(x)
    same, soft = [(y == z).flatten(1).all(1) for z in (x, blurred)]
    assert (same ^ soft).all() and 0.18 < soft.float().mean() < 0.32
    assert torch.equal(blur_some(x, 0.0, generator("g")), x) and torch.equal(
        blur_some(x, 1.0, generator("g")), blurred)


def test_blur_some_is_a_function_of_its_generator():
    x, g, h = pictures(50), generator("a"), generator("a")
    assert torch.equal(blur_some(x, 0.5, g, (0.3, 0.9)), blur_some(x, 0.5, h, (0.3, 0.9)))
    blur_some(x, 0.0, g)
    blur_some(x, 1.0, h)
    assert torch.equal(g.get_state(), h.get_state())                          # takes the same draws, whatever p
    assert not torch.equal(blur_some(x, 0.5, generator("b")), blur_some(x, 0.5, generator("c")))


def test_a_range_of_sigmas_draws_within_it():
    edge = torch.zeros(500, 1, 5, 5, dtype=torch.float64)
    edge[:, :, 2, 2] = 1
    middle = blur_some(edge, 1.0, generator("range"), (0.4, 0.8))[:, 0, 2, 2]
    low, high = [gaussian_blur(edge[:1], s)[0, 0, 2, 2] for s in (0.8, 0.4)]
    assert (middle >= low - 1e-6).all() and (middle <= high + 1e-6).all() and middle.std() > 0.05


@pytest.mark.parametrize("wrong, says", [
    (lambda x: gaussian_blur(x, 0.6, 4), "odd"),
    (lambda x: gaussian_blur(x, -1.0), "sigma"),
    (lambda x: gaussian_blur(x, 0.6, 15), "too large"),
])
def test_mistakes_are_named(wrong, says):
    with pytest.raises(UnclipError, match=says) as e:
        wrong(pictures())
    assert "\n" not in str(e.value)


def test_a_wrong_number_of_sigmas_is_named():
    with pytest.raises(Exception, match="sigma"):
        gaussian_blur(pictures(4), torch.ones(3))    # ours, or the type checker's


def test_which_and_how_much_are_drawn_apart():
    dot = torch.zeros(500, 1, 5, 5, dtype=torch.float64)
    dot[:, :, 2, 2] = 1
    middle = blur_some(dot, 0.5, generator("apart"), (0.4, 0.8))[:, 0, 2, 2]
    blurred, strongest = middle[middle < 1], gaussian_blur(dot[:1], 0.75)[0, 0, 2, 2]
    assert 200 < len(blurred) < 300 and (blurred < strongest).sum() > 10      # strong blurs too, not only those with a small draw


# BSR's operations


def smooth(n=2, h=32, w=32):
    return F.interpolate(torch.rand(n, 3, 8, 8, generator=generator("smooth")) * 1.6 - 0.8, (h, w),
                         mode="bicubic").clamp(-0.9, 0.9)


@pytest.mark.parametrize("s1, s2, angle, size", [(2.0, 0.7, 0.0, 15), (2.0, 0.7, 0.8, 15),
                                                 (0.5, 2.5, 2.6, 25), (1.3, 1.3, 1.0, 7),
                                                 (0.9, 1.4, 0.5, 6)])
def test_oval_weights_are_a_normal_density(s1, s2, angle, size):
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    at = np.arange(size) - size // 2
    xy = np.stack(np.meshgrid(at, at), -1)                                    # [row, column] -> (x, y)
    want = stats.multivariate_normal.pdf(xy, cov=turn @ np.diag([s1 ** 2, s2 ** 2]) @ turn.T)
    k = oval_kernel(torch.tensor([[s1, s2]], dtype=torch.float64),
                    torch.tensor([angle], dtype=torch.float64), size)[0]
    assert np.allclose(k, want / want.sum(), atol=1e-12) and math.isclose(k.sum(), 1)


def test_a_shifted_bell_has_its_mean_there():
    k = oval_kernel(torch.tensor([[1.5, 1.5]], dtype=torch.float64),
                    torch.zeros(1, dtype=torch.float64),
                    25,
                    shift=1.5)[0]
    at = torch.arange(25.) - 12
    assert math.isclose((k.sum(0) * at).sum(), 1.5, abs_tol=1e-6) and math.isclose(
        (k.sum(1) * at).sum(), 1.5, abs_tol=1e-6)


@pytest.mark.parametrize("h, w, before, after", [(5, 4, 2, 2), (3, 7, 12, 11), (2, 2, 5, 6),
                                                 (1, 3, 4, 4)])
def test_mirror_pad_is_numpys_reflect(h, w, before, after):
    x = pictures(2, h, w)
    want = np.pad(x.numpy(), [(0, 0), (0, 0), (before, after), (before, after)], mode="reflect")
    assert np.array_equal(mirror_pad(x, before, after), want)


@pytest.mark.parametrize("h, w, size", [(16, 13, 7), (9, 7, 25), (20, 20, 14)])
def test_convolve_is_scipys_correlate_one_kernel_a_picture(h, w, size):
    x, k = pictures(3, h, w), torch.rand(3,
                                         size,
                                         size,
                                         generator=generator("k"),
                                         dtype=torch.float64)
    want = np.stack([[ndimage.correlate(c, kk, mode="mirror") for c in image]
                     for image, kk in zip(x.numpy(), k.numpy())])
    assert np.allclose(convolve(x, k), want, atol=1e-9)


def test_blur_takes_one_pair_or_one_a_picture():
    x, sigma, angle = smooth(3), torch.tensor([[0.5, 2.0], [1.0, 1.0],
                                               [2.5, 0.4]]), torch.tensor([0.1, 0.0, 2.0])
    y = blur(x, 9, sigma, angle)
    for i in range(3):
        assert torch.allclose(y[i:i + 1],
                              blur(x[i:i + 1], 9, tuple(sigma[i].tolist()), angle[i].item()),
                              atol=1e-6)
    assert torch.allclose(blur(x, 9, (1.0, 1.0)), gaussian_blur(x, 1.0, 9), atol=1e-5)


@pytest.mark.parametrize("n, m", [(12, 8), (64, 16), (7, 5), (5, 7), (9, 1), (6, 6)])
def test_area_is_repeating_and_averaging(n, m):
    x = torch.rand(n, 3, generator=generator("area"), dtype=torch.float64)
    want = x.repeat_interleave(m, 0).view(m, n, 3).mean(1)                   # n*m fine pixels, n of them in each new one
    w = area_weights(n, m).double()
    assert torch.allclose(w @ x, want, atol=1e-6) and torch.allclose(
        w.sum(1), torch.ones(m, dtype=torch.float64), atol=1e-6)


def pil_resize(x, size, how):
    return torch.from_numpy(
        np.stack([[np.array(Image.fromarray(c).resize(size[::-1], how)) for c in im]
                  for im in x.numpy()]))


def test_halving_carefully_is_pillows_bicubic():
    x = smooth()
    assert torch.allclose(rescale(x, (16, 16), "antialiased"),
                          pil_resize(x, (16, 16), Image.BICUBIC).clamp(-1, 1),
                          atol=1e-4)
    assert torch.allclose(rescale(x, (16, 16), "area"),
                          pil_resize(x, (16, 16), Image.BOX),
                          atol=1e-5)


def test_bilinear_and_bicubic_skip_pixels_by_closed_form():
    x = pictures(1, 12, 12)
    b = rescale(x, (3, 3), "bilinear")                                       # new pixel i looks at old position 4 i + 1.5
    assert torch.allclose(b[0, :, 1, 2], x[0, :, 5:7, 9:11].mean((1, 2)))
    w = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375], dtype=torch.float64)       # Keys' cubic with a = -0.75 half way, as in OpenCV
    c = rescale(x, (3, 3), "bicubic")[0, :, 1, 1]
    assert torch.allclose(c, torch.einsum("cyx,y,x->c", x[0, :, 4:8, 4:8], w, w).clamp(-1, 1))


@pytest.mark.parametrize("how", [*WAYS, "antialiased"])
@pytest.mark.parametrize("size", [(16, 16), (11, 5), (1, 1), (50, 40)])
def test_every_way_gives_the_size_and_stays_in_range(how, size):
    y = rescale(torch.sign(pictures(2, 32, 32)), size, how)
    assert y.shape == (2, 3, *size) and y.abs().max() <= 1


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.4])
def test_blur_and_pick_keeps_the_picture_in_place(factor, sigma):
    ramp = torch.linspace(-0.9, 0.9, 64, dtype=torch.float64)
    x = (ramp[:, None] + 0.05 * ramp).expand(1, 3, 64, 64) / 1.1
    inner = slice(32 // factor - 4, 32 // factor + 4)
    got, want = blur_and_pick(x, factor, sigma), F.avg_pool2d(x, factor)
    assert got.shape == want.shape
    late = (got - want)[..., inner, inner].abs().max() / (x[0, 0, 1, 0] - x[0, 0, 0, 0])        # in pixels
    assert late < 0.02 if sigma > 0.5 else late < 0.51                       # so narrow a bell, half way between two pixels, takes either


@pytest.mark.parametrize("kind, cov", [("color", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
                                       ("gray", [[1, 1, 1]] * 3)])
def test_noise_has_its_level_and_covariance(kind, cov):
    noise = add_noise(torch.zeros(4, 3, 64, 64), 10., noise_mix(kind, generator("m")),
                      generator("n")) * 127.5
    assert torch.allclose(noise.transpose(0, 1).flatten(1).cov() / 100,
                          torch.tensor(cov, dtype=torch.float32),
                          atol=0.04)


def test_correlated_noise_is_the_authors_covariance():
    corr = []
    for i in range(200):
        m = noise_mix("correlated", generator("c", i))
        g = generator("c", i)
        d, r = torch.rand(3, generator=g).numpy(), torch.rand(3, 3, generator=g).numpy()
        u = np.linalg.svd(r)[0]
        assert np.allclose(m @ m.T, np.abs(u.T @ np.diag(d) @ u), atol=1e-4)
        corr.append((m @ m.T)[0, 1] / ((m @ m.T)[0, 0] * (m @ m.T)[1, 1]).sqrt())
    assert min(corr) >= 0 and 0.1 < np.mean(corr) < 0.9
    noise = add_noise(torch.zeros(4, 3, 64, 64), 10., m, generator("n")) * 127.5
    assert torch.allclose(noise.transpose(0, 1).flatten(1).cov() / 100, m @ m.T, atol=0.04)


def test_noise_a_level_and_a_generator_for_each_picture():
    x, mix = torch.zeros(3, 3, 32, 32), noise_mix("color", generator("m"))
    y = add_noise(x, torch.tensor([0., 5., 20.]), mix, [generator(i) for i in range(3)])
    assert torch.equal(y[0], x[0]) and torch.allclose(
        y.flatten(1).std(1) * 127.5, torch.tensor([0., 5., 20.]), rtol=0.05)
    assert torch.equal(y[2:], add_noise(x[2:], 20., mix, [generator(2)]))
    assert add_noise(x + 0.99, 25., mix, generator(0)).abs().max() <= 1


@pytest.mark.parametrize("quality", [30, 80, 95])
@pytest.mark.parametrize("h, w", [(32, 32), (17, 5)])
def test_jpeg_is_pillows(quality, h, w):
    x = smooth(3, h, w)
    def plain(im):
        a = np.clip(np.rint((im.numpy() + 1) * 255 / 2), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        f = io.BytesIO()
        Image.fromarray(a).save(f, "JPEG", quality=quality)
        assert f.getvalue()[:2] == b"\xff\xd8"
        return np.asarray(Image.open(f)).transpose(2, 0, 1) / 255 * 2 - 1
    assert np.allclose(jpeg(x, quality), np.stack([plain(im) for im in x]), atol=1e-5)


def test_jpeg_of_each_quality_keeps_dtype_and_the_better_is_nearer():
    x = smooth(4)
    y = jpeg(x.to(torch.float64), (10, 40, 80, 95))
    assert y.dtype == torch.float64 and torch.equal(y[1:2], jpeg(x[1:2].double(), 40))
    error = [(jpeg(x, q) - x).square().mean() for q in (10, 40, 80, 95)]
    assert error == sorted(error, reverse=True) and error[-1] > 0


def test_the_codec_torchvision_has_agrees():
    import_open_clip()
    try:
        from torchvision.io import decode_jpeg, encode_jpeg
        encode_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8))
    except Exception as e:
        pytest.skip(f"torchvision without its compiled part: {type(e).__name__}")
    x = smooth(1)
    theirs = decode_jpeg(encode_jpeg(((x[0] + 1) * 127.5).round().byte(), quality=80)) / 127.5 - 1
    assert (jpeg(x, 80)[0] - theirs).abs().mean() < 0.02


# The plan


def plans(variant="full", factor=4, n=1500, size=(256, 192)):
    return [bsr_plan(size, generator("plans", i), factor, variant) for i in range(n)]
FULL, LIGHT = plans(), plans("light")
def given(plans, op): return [params for plan in plans for name, params in plan if name == op]
def halved(plan): return plan[0][0] == "halve"
def near(count, n, p): return abs(count - n * p) < 4 * math.sqrt(n * p * (1 - p))        # four standard deviations


def even(values, low, high):
    return min(values) >= low and max(values) <= high and stats.kstest(
        values, "uniform", (low, high - low)).pvalue > 1e-4


@pytest.mark.parametrize("plans, blurs, resized", [(FULL, 2, 0.75), (LIGHT, 1, 0.8)])
def test_how_often_each_operation_runs(plans, blurs, resized):
    count, n = Counter(name for plan in plans for name, _ in plan), len(plans)
    assert count["blur"] == blurs * n and count["noise"] == count[
        "fit"] == n and count["shrink"] + count["pick"] == n
    assert near(count["halve"], n, 0.25) and near(count["shrink"], n, resized) and near(
        count["jpeg"] - n, n, 0.9)
    assert set(count) == {"halve", "blur", "shrink", "pick", "fit", "noise", "jpeg"}


@pytest.mark.parametrize("plans", [FULL, LIGHT])
def test_the_order_is_shuffled_within_its_constraints(plans):
    names = [[name for name, _ in plan] for plan in plans]
    assert all(x[-1] == "jpeg" and "halve" not in x[1:] and x.count("jpeg") <= 2 for x in names)
    assert all(x.index("fit") > x.index("shrink" if "shrink" in x else "pick") for x in names)
    middle = [[("shrink" if a == "pick" else a) for a in x[:-1] if a != "halve"] for x in names]
    full = [x for x in middle if "jpeg" in x]
    n, k = len(full), len(full[0])
    for name in ("noise", "jpeg"):                                           # unconstrained: anywhere
        for at, c in Counter(x.index(name) for x in full).items():
            assert near(c, n, 1 / k), (name, at, c)
    for at in range(1, k):
        assert near(sum(x.index("fit") == at for x in full), n, 2 * at / (k * (k - 1)))      # the later of two
    assert near(sum(x.index("noise") < x.index("fit") for x in full), n, 2 / 3)


def test_the_blurs_are_the_authors():
    for plans, width, ovals, rounds in ((FULL, 1, set(range(7, 26, 2)), set(range(7, 26, 2))),
                                        (LIGHT, 0.25, set(range(5, 15)), {5, 6, 7})):
        every = given(plans, "blur")
        oval = [p for p in every if p["sigma"][0] != p["sigma"][1]]
        round_ = [p for p in every if p["sigma"][0] == p["sigma"][1]]
        assert near(len(oval), len(every), 0.5)
        assert {p["size"] for p in oval} == ovals and {p["size"] for p in round_} == rounds
        assert even([p["angle"] for p in oval], 0, math.pi)
        for f, some in ((4, [p for p in plans
                             if not halved(p)]), (2, [p for p in plans if halved(p)])):
            oval = [
                s**2 for p in given(some, "blur") for s in p["sigma"]
                if p["sigma"][0] != p["sigma"][1]
            ]
            round_ = [p["sigma"][0] for p in given(some, "blur") if p["sigma"][0] == p["sigma"][1]]
            assert even(oval, 0.1 - 1e-9,
                        width * (4 + f) + 1e-9) and even(round_, 0.1, width * (2 + 0.2 * f))


def test_the_shrinkings_are_the_authors():
    for some, f, h in (([p for p in FULL
                         if not halved(p)], 4, 256), ([p for p in FULL if halved(p)], 2, 128)):
        shrink, pick = given(some, "shrink"), given(some, "pick")
        assert even([h / (p["size"][0] + 0.5) for p in shrink], 0.99, 2 * f + 0.01)
        assert all(p["factor"] == f for p in pick) and even([p["sigma"]
                                                             for p in pick], 0.1, 0.6 * f)
        assert all(abs(p["size"][1] - p["size"][0] * 0.75) < 2 for p in shrink)
    for op in ("shrink", "fit"):
        hows = Counter(p["how"] for p in given(FULL, op))
        assert set(hows) == set(WAYS)
        assert all(near(c, hows.total(), 1 / 3) for c in hows.values())
    assert all(p["size"] == (64, 48)
               for p in given(FULL, "fit")) and all(p["size"] == (128, 96)
                                                    for p in given(FULL, "halve"))
    halves = Counter(p["how"] for p in given(FULL, "halve"))
    assert near(halves["antialiased"], halves.total(),
                0.5) and set(halves) == {*WAYS, "antialiased"}


@pytest.mark.parametrize("plans, noise, quality", [(FULL, (2, 25), (30, 95)),
                                                   (LIGHT, (1, 2), (80, 95))])
def test_noise_levels_and_jpeg_qualities_are_the_authors(plans, noise, quality):
    every = given(plans, "noise")
    kinds = Counter(p["kind"] for p in every)
    for kind, p in (("color", 0.4), ("gray", 0.4), ("correlated", 0.2)):
        assert near(kinds[kind], len(every), p)
    assert all(p["level"] == noise[1] for p in every if p["kind"] == "correlated")
    for values, (low, high) in (([p["level"] for p in every if p["kind"] != "correlated"], noise),
                                ([p["quality"] for p in given(plans, "jpeg")], quality)):
        assert {type(v) for v in values} == {int} and set(values) == set(range(low, high + 1))
        assert stats.chisquare(list(Counter(values).values())).pvalue > 1e-4
    assert len({p["seed"] for p in every}) > 0.99 * len(every)


def test_factor_two_is_never_halved_and_uses_its_own_ranges():
    two = plans(factor=2, n=500)
    assert not any(halved(p) for p in two) and all(
        p["size"] == (128, 96) for p in given(two, "fit")) and all(p["factor"] == 2
                                                                   for p in given(two, "pick"))


def test_a_plan_is_a_function_of_its_generator_and_takes_the_same_draws():
    g, h = generator("x"), generator("x")
    assert bsr_plan((64, 64), g) == bsr_plan((64, 64), h) and bsr_plan((64, 64), g) != bsr_plan(
        (64, 64), generator("y"))
    bsr_plan((64, 64), h, variant="light")
    assert torch.equal(g.get_state(), h.get_state())
    dice = Dice(generator("z"), 3)
    [dice.chance(0.5) for _ in range(3)]
    with pytest.raises(StopIteration):
        dice.chance(0.5)


def test_a_variant_of_ones_own():
    mild = BSR(blurs=0, resized=1., noise=(0, 0), quality=(100, 100))
    some = plans(mild, n=50)
    assert not given(some, "blur") and not given(some, "pick") and {
        p["quality"]
        for p in given(some, "jpeg")
    } == {100}


# The deed

@pytest.mark.parametrize("variant", ["full", "light"])
@pytest.mark.parametrize("h, w, factor", [(32, 32, 4), (64, 40, 4), (8, 8, 4), (24, 36, 2),
                                          (30, 60, 3), (4, 4, 4)])
def test_shape_range_and_dtype(variant, h, w, factor):
    x = torch.sign(pictures(24, h, w)).float()
    y = bsr_degrade(x, generator("deed"), factor, variant)
    assert y.shape == (24, 3, h // factor, w // factor
                       ) and y.abs().max() <= 1 and y.dtype == torch.float32 and y.isfinite().all()
    assert bsr_degrade(x[:2].to(torch.bfloat16), generator("deed"), factor,
                       variant).dtype == torch.bfloat16


def test_a_picture_does_not_depend_on_its_batch():
    x = smooth(6)
    g = lambda: [generator("row", i) for i in range(6)]
    together = bsr_degrade(x, g())
    for i in range(6):
        assert torch.equal(together[i:i + 1], bsr_degrade(x[i:i + 1], [generator("row", i)]))
    assert torch.equal(bsr_degrade(x.flip(0), g()[::-1]), together.flip(0))
    assert torch.equal(bsr_degrade(x[:3], generator("one")), bsr_degrade(x, generator("one"))[:3])      # one generator: by place
    same = bsr_degrade(x[:1].expand(6, -1, -1, -1), generator("one"))
    assert len({p.numpy().tobytes() for p in same}) == 6                     # each its own fate
    torch.manual_seed(0)
    a = bsr_degrade(x, g())
    torch.manual_seed(1)
    assert torch.equal(a, bsr_degrade(x, g()))     # nothing global


def test_one_draw_a_picture_is_taken_whatever_comes_of_it():
    states = []
    for kw in (dict(), dict(variant="light"), dict(p=0.), dict(p=0.5)):
        g = generator("draws")
        bsr_degrade(smooth(3), g, **kw)
        states.append(g.get_state())
    assert all(torch.equal(states[0], s) for s in states)


def test_p_leaves_the_others_clean():
    x = smooth(1, 16, 16).expand(300, -1, -1, -1)
    clean = F.avg_pool2d(x, 4)
    y = bsr_degrade(x, generator("p"), p=0.25)
    spared = ((y - clean).abs().flatten(1).amax(1) < 1e-5).sum().item()
    assert near(spared, 300, 0.75)


def test_a_plan_applied_to_a_batch_or_one_by_one():
    x = smooth(3)
    for i in range(12):
        plan = [s for s in bsr_plan((32, 32), generator("apply", i)) if s[0] != "noise"]
        assert torch.allclose(bsr_apply(x, plan),
                              torch.cat([bsr_apply(a[None], plan) for a in x]),
                              atol=0.05)
        plan = bsr_plan((32, 32), generator("apply", i))
        assert torch.equal(bsr_apply(x[:1], plan), bsr_apply(x[:1], plan))


def test_light_is_lighter_than_full():
    x = smooth(40)
    clean = F.avg_pool2d(x, 4)
    full, light = [(bsr_degrade(x, generator("v"), variant=v) - clean).square().mean()
                   for v in ("full", "light")]
    assert light < 0.8 * full


def test_gradients_end_and_the_input_is_left_alone():
    x = smooth(2).requires_grad_()
    before = x.detach().clone()
    assert not bsr_degrade(x, generator("g")).requires_grad and torch.equal(x, before)


@pytest.mark.parametrize("wrong, says", [
    (lambda x: bsr_degrade(x[..., :30], generator(0)), "32 x 30"),
    (lambda x: bsr_degrade(x, generator(0), variant="heavy"), "heavy"),
    (lambda x: rescale(x, (8, 8), "lanczos"), "lanczos"),
    (lambda x: noise_mix("pink", generator(0)), "pink"),
    (lambda x: jpeg(x, 0), "1 to 100"),
    (lambda x: jpeg(x, (50, 60, 70)), "3"),
])
def test_bsr_mistakes_are_named(wrong, says):
    with pytest.raises(UnclipError) as e:
        wrong(smooth())
    assert "\n" not in str(e.value) and (says in str(e.value) or says == "3")


def test_a_wrong_number_of_generators_is_named():
    with pytest.raises(ValueError, match="one per row"):
        bsr_degrade(smooth(3), [generator(0)])

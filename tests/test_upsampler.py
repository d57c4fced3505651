"The upsampler: its arithmetic against PIL and closed forms, its sampler with a perfect network, its promises, and the shipped weights."
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from unclip_nb.core import UnclipError, count_parameters, generator, randn, resize
from unclip_nb.degradations import blur_some, bsr_degrade
from unclip_nb.diffusion import ddim_sample, predict, q_sample, spaced, target
from unclip_nb.shapes import render, scene_at
from unclip_nb.unet import UNet
from unclip_nb.upsampler import Upsampler, Upsampler2, Upsampler2Config, UpsamplerConfig, crops, enlarge, psnr, sharpness, ssim

WEIGHTS, WEIGHTS2 = (Path(__file__).parent.parent / "data" / "tiny" / k
                     for k in ("upsampler1", "upsampler2"))


def little(**kw):
    return UpsamplerConfig(
        **(dict(low_size=8, channels=16, channel_mult=(1, 2), res_blocks=1, patch=4, crop=0.5)
           | kw))

def model(seed=0, **kw):
    "A small one whose zero layers are shaken, so that it answers something."
    torch.manual_seed(seed)
    net = Upsampler(little(**kw)).eval()
    for p in net.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return net


def pictures(n, size=32, start=0):
    return render([scene_at(start + i, "valid") for i in range(n)], size)

# -- arithmetic ------------------------------------------------------------------------------------------------------------
def test_psnr_is_the_textbook_one():
    a, b = np.random.default_rng(0).integers(0, 256, (2, 5, 3, 8, 8))
    want = [10 * np.log10(255 ** 2 / np.mean((x - y) ** 2.)) for x, y in zip(a, b)]
    got = psnr(*(torch.tensor(x).float() / 127.5 - 1 for x in (a, b)))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)
    assert psnr(torch.full((1, 3, 2, 2), 9.), torch.ones(1, 3, 2, 2)).item() > 100     # clipped first

def test_ssim_is_the_papers():
    "Against SciPy's own Gaussian windows (sigma 1.5, 11 wide), the arithmetic of scikit-image's structural_similarity(gaussian_weights=True, use_sample_covariance=False)."
    from scipy.ndimage import gaussian_filter
    a = torch.randn(2, 3, 20, 31, generator=generator("a")).clamp(-1.2, 1.2)
    b = a + 0.3 * torch.randn(a.shape, generator=generator("b"))
    def want(x, y):
        f = lambda v: gaussian_filter(v, 1.5, truncate=3.5)
        x, y = ((np.float64(v).clip(-1, 1) + 1) / 2 for v in (x, y))
        mx, my = f(x), f(y)
        vx, vy, c = f(x * x) - mx ** 2, f(y * y) - my ** 2, f(x * y) - mx * my
        return ((2 * mx * my + .01**2) * (2 * c + .03**2) /
                ((mx**2 + my**2 + .01**2) * (vx + vy + .03**2)))[5:-5, 5:-5].mean()

    np.testing.assert_allclose(ssim(a, b).numpy(),
                               [np.mean([want(x, y) for x, y in zip(p, q)]) for p, q in zip(a, b)],
                               rtol=1e-5)
    assert ssim(a, a).tolist() == pytest.approx([1, 1]) and torch.equal(ssim(a, b), ssim(b, a))

def test_sharpness_is_the_laplacians_variance():
    from scipy.ndimage import gaussian_filter, laplace
    x = pictures(3, 64)
    want = [laplace(p.double().mean(0).numpy())[1:-1, 1:-1].var() for p in x]
    np.testing.assert_allclose(sharpness(x).numpy(), want, rtol=1e-5)
    soft = torch.tensor(gaussian_filter(x.numpy(), (0, 0, 1, 1)))
    assert (sharpness(soft) < 0.5 * sharpness(x)).all()

@pytest.mark.parametrize("mode,how", [("nearest", Image.NEAREST), ("bilinear", Image.BILINEAR)])
def test_enlarge_equals_pil(mode, how):
    x = torch.randn(1, 1, 6, 9)
    want = np.array(Image.fromarray(x[0, 0].numpy()).resize((36, 24), how))
    np.testing.assert_allclose(enlarge(x, 4, mode)[0, 0].numpy(), want, atol=1e-5)

@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_enlarge_keeps_flat_pictures_and_is_centred(mode):
    assert torch.allclose(enlarge(torch.full((1, 3, 4, 4), 0.3), 4, mode), torch.tensor(0.3))
    x = torch.randn(1, 3, 5, 5)
    assert torch.allclose(enlarge(x.flip(3), 4, mode), enlarge(x, 4, mode).flip(3), atol=1e-5)

def test_crops_are_aligned_pieces_of_their_own_picture():
    ys, xs = torch.meshgrid(torch.arange(24.), torch.arange(32.), indexing="ij")
    x = torch.stack([torch.stack([torch.full_like(xs, i), ys, xs]) for i in range(3)])
    got = crops(x, 8, 50, align=4, generator=generator(0))
    assert got.shape == (150, 3, 8, 8) and (got[:, 0]
                                            == torch.arange(3.).repeat_interleave(50)[:, None,
                                                                                      None]).all()
    corners = got[:, 1:, 0, 0]
    assert (corners % 4 == 0).all() and torch.equal(got[:, 1, :, 0] - corners[:, :1],
                                                    torch.arange(8.).expand(150, 8))
    assert set(corners[:, 0].tolist()) == {0, 4, 8, 12, 16} and set(
        corners[:, 1].tolist()) == {0, 4, 8, 12, 16, 20, 24}  # to the very edge

# -- the loss --------------------------------------------------------------------------------------------------------------
def spy(net, monkeypatch):
    "What the network was given; it answers zero."
    seen = {}
    def network(x_t, t, big): seen.update(x_t=x_t, t=t, big=big); return torch.zeros_like(x_t)
    monkeypatch.setattr(net, "network", network)
    return seen

def test_loss_gives_the_network_matching_pieces(monkeypatch):
    net = model(blur_p=0., crop=0.5, crops=3, T=1000)
    seen = spy(net, monkeypatch)
    x0 = (torch.linspace(-1, 1, 32)[:, None] * torch.tensor([1., .5, -.5])[:, None, None] +
          0.7 * torch.linspace(-1, 1, 32)).clamp(-1, 1)[None].repeat(4, 1, 1, 1)
    x0 = enlarge(resize(x0, 8))                                       # smooth enough for its own enlargement to be close to it
    monkeypatch.setattr(torch,
                        "randint",
                        lambda lo, hi, shape, generator=None, _r=torch.randint: _r(
                            lo, hi if hi < 1000 else 1, shape, generator=generator))
    loss = net.loss({"image": x0}, generator(0))
    assert seen["x_t"].shape == seen["big"].shape == (12, 3, 16, 16) and (seen["t"] == 0).all()
    clean = seen["x_t"] / net.schedule.signal[0].item()                # at t = 0 hardly any noise
    assert (clean - seen["big"]).abs().mean() < 0.03                   # the same piece of the same picture; 1 small pixel off would be 0.1
    assert loss.item() == pytest.approx(1, abs=0.1)                    # the target is the noise, the answer zero

def test_loss_is_the_mean_squared_error_to_the_target(monkeypatch):
    for kind in ("eps", "x0", "v"):
        net = model(blur_p=0., crop=1.0, target=kind)
        seen = spy(net, monkeypatch)
        x0 = pictures(4)
        loss = net.loss({"image": x0}, generator(1))
        t, a, s = seen["t"], *(net.schedule.gather(k, seen["t"], x0) for k in ("signal", "noise"))
        noise = (seen["x_t"] - a * x0) / s
        want = target(net.schedule, kind, x0, noise, t).square().mean()
        torch.testing.assert_close(loss, want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(seen["big"], enlarge(resize(x0, 8)))

def test_blur_happens_to_its_share_only(monkeypatch):
    x0, share = pictures(200), []
    for p in (0., 0.5, 1.):
        net = model(blur_p=p, crop=1.0)
        seen = spy(net, monkeypatch)
        net.loss({"image": x0}, generator(2))
        share.append(
            (seen["big"] -
             enlarge(resize(x0, 8))).flatten(1).abs().amax(1).gt(1e-5).double().mean().item())
    assert share[0] == 0 and 0.35 < share[1] < 0.65 and share[2] == 1

def test_a_range_of_blur_gives_every_picture_its_own():
    x0 = pictures(40)
    small, (real, given) = resize(x0, 8), model(blur_p=1., blur_sigma=(0.3, 2.),
                                                crop=1.0).pairs(x0, generator("range"))
    assert torch.equal(real, x0) and torch.equal(
        given, enlarge(blur_some(small, 1., generator("range"), (0.3, 2.))))
    lost = lambda sigma: (model(blur_p=1., blur_sigma=sigma, crop=1.0).pairs(
        x0, generator("range"))[1] - enlarge(small)).flatten(1).norm(dim=1)
    least, some, most = lost(0.3), lost((0.3, 2.)), lost(2.)
    assert (least < some).all() and (some < most).all() and (some / most).std() > 0.1

@pytest.mark.parametrize("kind", ["bsr", "bsr_light"])
def test_bsr_spoils_its_share_of_the_crops(kind):
    x0 = pictures(30)
    for p, least, most in ((0., 0, 0), (0.5, 0.3, 0.7), (1., 1, 1)):
        real, given = model(degradation=kind, bsr_p=p, crops=2).pairs(x0, generator("bsr"))
        assert real.shape == given.shape == (60, 3, 16, 16)
        hurt = (given - enlarge(resize(real, 4))).flatten(1).abs().amax(1) > 1e-4
        assert least <= hurt.double().mean() <= most
    real, given = model(degradation=kind, crop=1.0).pairs(x0[:3], g := generator("order"))
    again = generator("order")
    crops(x0[:3], 32, 1, 4, again)
    assert torch.equal(real, x0[:3]) and torch.equal(
        given, enlarge(bsr_degrade(x0[:3], again, 4, "light" if "light" in kind else "full")))

def test_none_leaves_small_pictures_alone():
    real, given = model(degradation="none", crop=1.0).pairs(pictures(40), generator(0))
    assert torch.equal(given, enlarge(resize(real, 8)))
    with pytest.raises(UnclipError,
                       match="unknown degradation 'jpeg': use none, blur, bsr, bsr_light"):
        little(degradation="jpeg")

def test_loss_is_a_function_of_its_generator_and_takes_any_size():
    net, x0 = model(), pictures(4)
    assert torch.equal(net.loss({"image": x0}, generator(3)), net.loss({"image": x0}, generator(3)))
    assert not torch.equal(net.loss({"image": x0}, generator(3)),
                           net.loss({"image": x0}, generator(4)))
    assert net({"image": pictures(4, 64)}, generator(3)).isfinite()     # forward is loss; larger pictures are averaged down first

def learned(**kw):
    "Loss and all gradients of a training step, dropout included."
    net = model(dropout=0.3, target="x0", **kw).train()
    torch.manual_seed(3)
    loss = net.loss({"image": pictures(4)}, generator("learned"))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])

def test_checkpointing_changes_neither_loss_nor_gradients(monkeypatch):
    import unclip_nb.unet as unet
    calls, checkpoint = [], unet.checkpoint
    monkeypatch.setattr(unet, "checkpoint",
                        lambda *a, **kw: calls.append(0) or checkpoint(*a, **kw))
    plain = learned()
    assert not calls and plain[1].norm() > 0
    torch.testing.assert_close(learned(checkpoint=True), plain, rtol=1e-5, atol=1e-7)
    assert calls and Upsampler2Config(
        checkpoint=True).unet.checkpoint and not UpsamplerConfig().unet.checkpoint

# -- the sampler -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_a_perfect_network_gives_the_picture_back(kind, monkeypatch):
    net, x0 = model(target=kind), pictures(3)
    def network(x_t, t, big):
        assert torch.equal(big, enlarge(resize(x0, 8)))
        noise = (x_t - net.schedule.gather("signal", t, x_t) * x0) / net.schedule.gather(
            "noise", t, x_t)
        return target(net.schedule, kind, x0, noise, t)
    monkeypatch.setattr(net, "network", network)
    assert psnr(net.sample(resize(x0, 8), generator=generator(0)),
                x0).min() > (35 if kind == "eps" else 60)

def test_a_row_does_not_depend_on_its_batch():
    net, low = model(), resize(pictures(3), 8)
    gens = lambda rows: [generator("row", i) for i in rows]
    together, alone = net.sample(low, 4, gens(range(3))), net.sample(low[1:2], 4, gens([1]))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[1], net.sample(low[1:2], 4, gens([2]))[0], atol=1e-2)

@pytest.mark.parametrize("h,w", [(8, 8), (4, 10), (16, 6)])
def test_any_size_that_the_stride_divides(h, w):
    out = model().sample(torch.zeros(1, 3, h, w), 2, generator(0))
    assert out.shape == (1, 3, 4 * h, 4 * w) and out.abs().max() <= 1 and not out.requires_grad
    with pytest.raises(UnclipError, match="multiples of 8"):
        model().sample(torch.zeros(1, 3, 8, 7), 2, generator(0))


@pytest.mark.parametrize("cls,config,steps", [(Upsampler, UpsamplerConfig, 27),
                                              (Upsampler2, Upsampler2Config, 15)])
def test_default_steps_are_the_papers(cls, config, steps, monkeypatch):
    net, asked = cls(
        config(low_size=8, channels=16, channel_mult=(1, ), res_blocks=1, patch=4, crop=0.5)), []
    monkeypatch.setattr(net, "network",
                        lambda x_t, t, big: asked.append(t[0].item()) or torch.zeros_like(x_t))
    net.sample(torch.zeros(1, 3, 8, 8), generator=generator(0))
    assert len(asked) == steps and asked[0] == 999 and asked == sorted(asked, reverse=True)

@pytest.mark.parametrize("many", [True, False])
def test_a_few_at_a_time_are_all_at_once(many, monkeypatch):
    net, low, rows = model(), resize(pictures(5), 8), []
    give = lambda: [generator("few", i) for i in range(5)] if many else generator("few")
    eta = float(many)                                                  # fresh noise in every step: from the row's own generator
    whole, network = net.sample(low, 3, give(), eta), net.network
    monkeypatch.setattr(net, "network",
                        lambda x_t, t, big: rows.append(len(x_t)) or network(x_t, t, big))
    few = net.sample(low, 3, give(), eta, pixels=2 * 32 * 32)
    torch.testing.assert_close(few, whole, rtol=1e-4, atol=1e-4)
    assert set(rows) == {2, 1} and len(rows) == 9
    assert len(net.sample(low[:2], 1, give()[:2] if many else give(), pixels=1)) == 2       # never less than one picture

@pytest.mark.parametrize("kind", ["x0", "v"])
def test_a_fresh_residual_network_answers_the_enlarged_picture(kind):
    net, x0 = Upsampler(little(target=kind, residual=True)).eval(), pictures(2)
    low = resize(x0, 8)
    first = net.denoiser(low)(randn(x0.shape, generator(0)), torch.full((2,), 999)).x0
    torch.testing.assert_close(first, enlarge(low), rtol=0, atol=1e-3)
    plain = Upsampler(little(target=kind)).eval().denoiser(low)(randn(x0.shape, generator(0)),
                                                                torch.full((2, ), 999)).x0
    assert plain.abs().max() < 1e-3                                    # without: grey

@pytest.mark.parametrize("kind", ["x0", "v"])
def test_residual_predictions_agree_with_each_other(kind, monkeypatch):
    "A U-Net that knows the answer, asked for the residual, gives the picture back at every step."
    net, x0 = Upsampler(little(target=kind, residual=True)).eval(), pictures(2)
    big = enlarge(resize(x0, 8))
    noise = randn(x0.shape, generator(0))
    for t in (0, 300, 700, 990):
        tt = torch.full((2,), t)
        x_t = q_sample(net.schedule, x0, tt, noise)
        s = net.schedule.gather("noise", tt, x0)
        answer = x0 - big if kind == "x0" else net.schedule.gather("signal", tt, x0) * noise - s * (
            x0 - big)  # v of the residual
        monkeypatch.setattr(net.unet, "forward", lambda *a: answer)
        torch.testing.assert_close(net.denoiser(resize(x0, 8))(x_t, tt).x0,
                                   x0,
                                   rtol=1e-4,
                                   atol=1e-4)

# -- sizes and files -------------------------------------------------------------------------------------------------------
def test_presets():
    with torch.device("meta"):
        counts = {
            k: count_parameters(UNet(getattr(UpsamplerConfig, k)().unet))
            for k in ("nano", "tiny", "small", "paper")
        }
    assert counts["paper"] / 1e9 == pytest.approx(
        0.7277,
        rel=1e-3) and counts["tiny"] < 2e6 and counts["nano"] < counts["tiny"] < counts["small"]
    assert [(c.low_size, c.size) for c in (UpsamplerConfig.nano(), UpsamplerConfig.tiny(),
                                           UpsamplerConfig.paper())] == [(16, 64), (32, 128),
                                                                         (64, 256)]
    assert UpsamplerConfig.paper().crop == UpsamplerConfig.tiny(
    ).crop == 0.25 and UpsamplerConfig.paper().unet.attention == ()
    for k in ("nano", "tiny"):
        Upsampler(getattr(UpsamplerConfig, k)())                     # their crops fit

def test_presets_of_the_second_stage():
    "Table 3: 192 channels, depth 2, multiples 1,1,2,2,4,4, linear, 15 steps. We count 0.281 billion, the table says 300M."
    with torch.device("meta"):
        counts = {
            k: count_parameters(Upsampler2(getattr(Upsampler2Config, k)()))
            for k in ("nano", "tiny", "small", "paper")
        }
    assert counts["paper"] / 1e9 == pytest.approx(
        0.2821,
        rel=1e-3) and counts["tiny"] <= 1.5e6 and counts["nano"] < counts["tiny"] < counts["small"]
    for k in counts:
        first, second = getattr(UpsamplerConfig, k)(), getattr(Upsampler2Config, k)()
        assert second.low_size == first.size and (first.schedule, second.schedule) == (
            "cosine", "linear") and (first.steps, second.steps) == (27, 15)
        assert first.degradation == "blur" and second.degradation.startswith(
            "bsr") and second.unet.attention == ()
    assert Upsampler2Config.paper().crop == Upsampler2Config.tiny(
    ).crop == 0.25 and Upsampler2Config.paper().size == 1024 and Upsampler2Config.tiny().size == 512

@pytest.mark.parametrize("crop", [0.1, 0.3, 0., 2.])
def test_a_crop_that_does_not_fit_is_named(crop):
    with pytest.raises(
            UnclipError,
            match="multiple of the U-Net's stride" if 0 < crop <= 1 else "crop is .*give a number"):
        Upsampler(little(crop=crop))

def test_saves_and_loads(tmp_path):
    net = model(blur_sigma=(0.2, 0.9))
    net.save_pretrained(tmp_path / "up")
    again, low = Upsampler.from_pretrained(tmp_path / "up"), resize(pictures(1), 8)
    assert again.config == net.config
    assert torch.equal(again.sample(low, 3, generator(0)), net.sample(low, 3, generator(0)))

def test_the_second_stage_is_saved_under_its_own_config(tmp_path):
    net = Upsampler2(
        Upsampler2Config(low_size=8,
                         channels=16,
                         channel_mult=(1, ),
                         res_blocks=1,
                         patch=4,
                         crop=0.5,
                         bsr_p=0.25))
    net.save_pretrained(tmp_path / "up2")
    again = Upsampler2.from_pretrained(tmp_path / "up2")
    assert type(
        again.config
    ) is Upsampler2Config and again.config == net.config and again.schedule.kind == "linear"
    assert (Upsampler.name, Upsampler2.name) == ("upsampler1", "upsampler2")

@pytest.mark.skipif(not WEIGHTS.exists(), reason="no shipped upsampler in data/tiny")
def test_weights_from_before_the_second_stage_mean_what_they_meant():
    c = Upsampler.from_pretrained(WEIGHTS).config
    assert (c.degradation, c.blur_p, c.steps, c.schedule) == ("blur", 0.5, 27, "cosine")

# -- what was learned ------------------------------------------------------------------------------------------------------
def test_learns_to_beat_its_start():
    torch.manual_seed(0)
    net, x0, g, losses = Upsampler(little(target="x0")), pictures(32), generator("learn"), []   # what the presets ask for
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(60):
        loss = net.loss({"image": x0}, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def tiles(x, side):
    return x.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

@pytest.mark.skipif(not WEIGHTS.exists(), reason="no shipped upsampler in data/tiny")
def test_shipped_weights_beat_bicubic_and_crops_equal_whole_pictures():
    net = Upsampler.from_pretrained(WEIGHTS)
    truth = pictures(3, net.config.size, 500)
    low = resize(truth, net.config.low_size)
    whole = net.sample(low, generator=[generator("whole", i) for i in range(3)])
    gain = psnr(whole, truth) - psnr(enlarge(low, 4, "bicubic"), truth)
    assert (gain > 1).all()
    side = net.config.crop_side
    big, pieces = tiles(enlarge(low), side), tiles(truth, side)
    ask = lambda x_t, t: predict(net.schedule, net.config.target, net.network(x_t, t, big), x_t, t)
    with torch.no_grad():
        alone = ddim_sample(ask, randn(pieces.shape, generator("alone")), net.schedule, spaced(27))
    pooled = lambda a, b: psnr(a.reshape(1, 1, 1, -1), b.reshape(1, 1, 1, -1)).item()
    assert abs(pooled(whole, truth) - pooled(alone, pieces)) < 0.5

@pytest.mark.skipif(not WEIGHTS2.exists(), reason="no shipped second upsampler in data/tiny")
def test_shipped_second_stage_beats_bicubic_and_forgives():
    one, two = Upsampler.from_pretrained(WEIGHTS), Upsampler2.from_pretrained(WEIGHTS2)
    rows = lambda n: [generator("two", i) for i in range(n)]
    truth = pictures(2, 512, 500)
    low = resize(truth, 128)
    drawn, cubic = two.sample(low, 5, rows(2)), enlarge(low, 4, "bicubic")
    assert (psnr(drawn, truth) > psnr(cubic, truth) + 1).all() and ssim(drawn, truth).mean() > ssim(
        cubic, truth).mean()
    truth = pictures(6, 256, 510)
    bad = bsr_degrade(truth, rows(6))
    score = lambda x: psnr(x, truth).mean().item()
    assert score(two.sample(
        bad, 5,
        rows(6))) > max(score(enlarge(bad, 4, "bicubic")), score(one.sample(bad, 5, rows(6)))) + 1

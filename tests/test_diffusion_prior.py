"The diffusion prior against diffusers' PriorTransformer, scikit-learn's ridge, closed forms, and its own slow path."
import math
import pytest, torch
import torch.nn.functional as F
from unclip_nb.core import UnclipError, count_parameters, generator, randn
from unclip_nb.diffusion import Schedule, ddpm_sample, predict, spaced
from unclip_nb.diffusion_prior import (SAMPLERS, DiffusionPrior, EmbeddingStats, Prefix,
                                       PriorConfig, PriorNet, compare_priors, first_embeddings,
                                       hide_captions, keep_best, linear_prior, nearest_prior,
                                       score_draws)
from unclip_nb.layers import KVCache

SMALL = dict(clip_dim=16, text_width=12, context_length=6, width=32, layers=2, heads=4)

@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    p = DiffusionPrior(PriorConfig(**SMALL)).eval()
    for x in p.parameters():
        torch.nn.init.normal_(x, std=0.3 if x.ndim == 1 else x.shape[-1] ** -0.5)   # no zero or tiny part may hide a mistake
    p.cov = 0.3 * torch.rand(1000, generator=generator("cov"))
    return p

def captions(n=3, seed=0):
    g = generator("captions", seed)
    text = randn((n, 6, 12), g)
    for i in range(n):
        text[i, 2 + i % 4:] = 0
    return text, F.normalize(randn((n, 16), g), dim=1)

def own(n): return [generator("row", i) for i in range(n)]

# ---- architecture

def test_paper_preset_is_table_3():
    c = PriorConfig.paper()
    assert (c.width, c.layers, c.heads, c.clip_dim, c.context_length, c.T, c.schedule,
            c.drop) == (2048, 24, 32, 1024, 256, 1000, "cosine", 0.1)
    with torch.device("meta"):
        assert 1.2e9 < count_parameters(PriorNet(c)) < 1.3e9
    assert 1.0e6 < count_parameters(PriorNet(PriorConfig.tiny())) < 1.6e6

def to_diffusers(prior):
    "The same weights in diffusers' PriorTransformer, which has one input width for text and embeddings."
    from unclip_nb.data import import_open_clip
    import_open_clip()                                                  # lets torchvision load beside a CPU-only torch; diffusers needs it
    from diffusers import PriorTransformer
    c, net = prior.config, prior.net
    theirs = PriorTransformer(c.heads,
                              c.width // c.heads,
                              c.layers,
                              embedding_dim=c.clip_dim,
                              num_embeddings=c.context_length).eval()
    state = {"positional_embedding": net.positions[None], "prd_embedding": net.query[None, None]}
    pairs = {
        "proj_in": net.zi_in, "embedding_proj": net.zt_in,
        "encoder_hidden_states_proj": net.text_in, "norm_out": net.transformer.norm,
        "time_embedding.linear_1": net.time.mlp[0], "time_embedding.linear_2": net.time.mlp[2],
        "proj_to_clip_embeddings": net.out
    }
    for i, b in enumerate(net.transformer.blocks):
        at = f"transformer_blocks.{i}."
        pairs |= {
            at + "norm1": b.norm1, at + "norm3": b.norm2, at + "attn1.to_out.0": b.attention.out,
            at + "ff.net.0.proj": b.mlp[0], at + "ff.net.2": b.mlp[2]
        }
        for name, w, bias in zip("qkv", b.attention.qkv.weight.chunk(3),
                                 b.attention.qkv.bias.chunk(3)):
            state |= {f"{at}attn1.to_{name}.weight": w, f"{at}attn1.to_{name}.bias": bias}
    for name, layer in pairs.items():
        state |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"clip_mean", "clip_std"}
    return theirs

def test_same_network_as_diffusers():
    torch.manual_seed(1)
    p = DiffusionPrior(PriorConfig(**{**SMALL, "text_width": 16})).eval()
    for x in p.parameters():
        torch.nn.init.normal_(x, std=0.3 if x.ndim == 1 else x.shape[-1] ** -0.5)
    g = generator("diffusers")
    text, zt, zi_t, t = randn((4, 6, 16), g), randn((4, 16), g), randn(
        (4, 16), g), torch.tensor([0, 5, 500, 999])
    with torch.no_grad():
        want = to_diffusers(p)(zi_t, t, zt, text, attention_mask=torch.ones(
            4, 6)).predicted_image_embedding  # without a mask theirs isn't causal
        torch.testing.assert_close(p.net(text, zt, zi_t, t), want, atol=2e-5, rtol=1e-4)

def test_causal_and_in_order(prior):
    text, zt = captions(2)
    text = randn((2, 6, 12), generator("full"))
    zi_t = randn((2, 16), generator("zi"))
    t = torch.tensor([3, 700])
    def run(text, zt, zi_t, t):
        with torch.no_grad():
            return prior.net.transformer(
                torch.cat([prior.net.prefix(text, zt),
                           prior.net.suffix(zi_t, t)], 1))
    base, bumped = run(text, zt, zi_t, t), text.clone()
    bumped[:, 2] += 1
    for first, other in ((2, run(bumped, zt, zi_t,
                                 t)), (6, run(text, -zt, zi_t,
                                              t)), (7, run(text, zt, zi_t,
                                                           t + 50)), (8, run(text, zt, -zi_t, t))):
        changed = (base - other).abs().amax((0, 2)) > 1e-4
        assert changed.tolist() == [i >= first for i in range(10)]      # text 0..5, z_t 6, step 7, zi_t 8, query 9

def test_zero_rows_are_padding(prior):
    text, zt = captions(2)
    prefix = prior.net.prefix(text, zt) - prior.net.positions[:-3]
    torch.testing.assert_close(prefix[0, 2:6], prior.net.padding.expand(4, -1))
    empty = prior.net.prefix(
        *hide_captions(text, zt, torch.tensor([True, False]))) - prior.net.positions[:-3]
    torch.testing.assert_close(empty[0],
                               torch.cat([prior.net.padding.expand(6, -1), prior.net.no_zt[None]]))
    torch.testing.assert_close(empty[1], prefix[1])

# ---- learning

def test_loss_by_hand(prior):
    text, zt = captions(4)
    zi = F.normalize(randn((4, 16), generator("zi")), dim=1)
    got = prior.loss(dict(zi=zi, zt=zt, text=text), generator("loss"))
    g, s = generator("loss"), 0.54 * 4
    keep = torch.rand(4, generator=g) >= 0.1
    t = torch.randint(0, 1000, (4,), generator=g)
    noise = torch.randn(4, 16, generator=g)
    abar = Schedule("cosine", 1000).abar[t][:, None].float()
    out = prior.net(text * keep[:, None, None], zt * s * keep[:, None],
                    abar.sqrt() * s * zi + (1 - abar).sqrt() * noise, t)
    torch.testing.assert_close(got, (out - s * zi).square().mean())

def test_scale():
    assert DiffusionPrior(PriorConfig.nano()).scale == pytest.approx(0.54 * 8)
    assert DiffusionPrior(PriorConfig(**SMALL, scale=3.)).scale == 3
    assert PriorConfig.paper().scale == 17.2 == pytest.approx(0.54 * math.sqrt(1024), abs=0.1)

def test_stats_whiten_to_the_identity_and_start_harmless():
    z = torch.randn(4000, 12, generator=generator(0)) @ torch.randn(12, 12,
                                                                    generator=generator(1)) + 2
    stats = EmbeddingStats(12)
    assert torch.allclose(stats(z), z * 12 ** 0.5)
    stats.fit(z, floor=0.)
    assert torch.allclose(stats(z).T.cov(correction=0), torch.eye(12),
                          atol=1e-3) and stats(z).mean(0).abs().max() < 1e-4

def test_stats_hold_flat_directions_at_a_floor():
    z = torch.randn(1000, 4, generator=generator(0)) * torch.tensor([1., 1., 1., 1e-6])
    stats = EmbeddingStats(4)
    stats.fit(z, floor=0.01)
    assert stats(z).T.cov()[3, 3] < 1e-6

def narrow(n, seed=0):
    "Embeddings around a centre, some directions 50 times as wide as others."
    turn = torch.linalg.qr(randn((16, 16), generator("turn"))).Q
    return randn((n, 16), generator("narrow", seed)) * torch.logspace(-0.7, -2.4, 16) @ turn + 0.1

def test_whitening_equals_scikit_learn_and_comes_back():
    from sklearn.decomposition import PCA
    z, stats = narrow(500), EmbeddingStats(16)
    stats.fit(z, floor=0.)
    theirs = PCA(whiten=True, svd_solver="full").fit(z.double().numpy())
    want = theirs.transform(z.double().numpy()) @ theirs.components_ * (500 / 499) ** 0.5      # turned back; theirs divides by n - 1
    torch.testing.assert_close(stats(z), torch.from_numpy(want).float(), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(stats.inverse(stats(z)), z, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = stats(z), stats.inverse(stats(z))      # mixed precision is too coarse for this
    assert torch.equal(rough[0], stats(z)) and torch.equal(rough[1], stats.inverse(stats(z)))

def test_a_whitened_prior_measures_first_learns_in_whitened_units_and_answers_in_embeddings():
    class Rows:
        batch_size = 100
        def at(self, step): return dict(zi=F.normalize(narrow(100, step), dim=1))
    z = first_embeddings(Rows(), 400)
    assert len(z) == 500 and torch.equal(z[:100], Rows().at(-1)["zi"])
    p = DiffusionPrior(PriorConfig(**SMALL, whiten=True)).eval()
    p.start(Rows())
    want = EmbeddingStats(16)
    want.fit(first_embeddings(Rows()))
    assert torch.equal(p.stats.matrix, want.matrix) and torch.equal(p.stats.mean, want.mean)
    plain = DiffusionPrior(PriorConfig(**SMALL))
    plain.start(Rows())
    assert torch.equal(plain.stats(z), z * 0.54 * 4)                                           # without it, nothing is measured
    (text, zt), zi = captions(), z[:3]
    p.net.forward = lambda text, zt, x, t: torch.zeros_like(x)
    loss = p.loss(dict(zi=zi, zt=zt, text=text), generator("loss"))
    torch.testing.assert_close(loss, want(zi).square().mean())
    del p.net.forward
    torch.nn.init.zeros_(p.net.out.weight)
    p.net.out.bias.data.copy_(want(zi)[0])             # always answers with this embedding, whitened
    torch.testing.assert_close(p.sample(text, zt, steps=5, generator=own(3)),
                               zi[:1].expand(3, -1),
                               atol=1e-4,
                               rtol=1e-4)

def test_captions_are_hidden_together_a_tenth_of_the_time(monkeypatch):
    p, seen = DiffusionPrior(PriorConfig(**SMALL)), []
    forward = PriorNet.forward
    monkeypatch.setattr(
        PriorNet, "forward", lambda self, text, zt, *a: (seen.append(
            (text.any(-1).any(-1), zt.any(-1))), forward(self, text, zt, *a))[1])
    text, zt = captions(4000)
    with torch.no_grad():
        p.loss(dict(zi=zt, zt=zt, text=text), generator("many"))
    has_text, has_zt = seen[0]
    assert torch.equal(has_text, has_zt) and 0.08 < 1 - has_zt.float().mean() < 0.12

def test_learns_the_conditional_mean():
    "Gaussian pictures around each caption's centre: the best denoiser is known, and a small prior gets near it."
    torch.manual_seed(0)
    centres, spread, schedule = F.normalize(randn((2, 4), generator("centres")),
                                            dim=1), 0.3, Schedule("cosine", 1000)
    p = DiffusionPrior(
        PriorConfig(clip_dim=4,
                    text_width=2,
                    context_length=1,
                    width=32,
                    layers=1,
                    heads=2,
                    scale=1.,
                    drop=0.))
    def batch(step, n=256):
        g = generator("gauss", step)
        c = torch.randint(2, (n,), generator=g)
        return c, dict(zi=centres[c] + spread * randn((n, 4), g),
                       zt=centres[c],
                       text=torch.eye(2)[c][:, None])
    optimizer = torch.optim.Adam(p.parameters(), 3e-3)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 500)
        optimizer.zero_grad()
        p.loss(batch(step)[1], generator("noise", step)).backward()
        optimizer.step()
    c, b = batch(10 ** 6, 2000)
    g = generator("test")
    t = torch.randint(0, 1000, (2000,), generator=g)
    a = schedule.abar[t].float()[:, None]
    x = a.sqrt() * b["zi"] + (1 - a).sqrt() * randn((2000, 4), g)
    best = centres[c] + spread**2 * a.sqrt() / (spread**2 * a + 1 - a) * (x - a.sqrt() * centres[c])
    with torch.no_grad():
        out = p.net(b["text"], b["zt"], x, t)
    assert (out - best).square().mean() < 0.1 * (best - centres[c]).square().mean()

# ---- sampling

@pytest.mark.parametrize("guidance", [1., 0., 2.5])
@pytest.mark.parametrize("draws", [1, 3])
def test_cache_changes_nothing(prior, guidance, draws):
    text, zt = captions()
    x, t = randn((3 * draws, 16), generator("x")), torch.full((3 * draws,), 400)
    with torch.no_grad():
        fast, slow = (prior.denoiser(text, zt, guidance, draws, cache=c)(x, t)
                      for c in (True, False))
    torch.testing.assert_close(fast.x0, slow.x0, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cached_sample_is_the_full_sample(prior, sampler):
    a, b = (prior.sample(*captions(),
                         steps=64,
                         guidance=2.,
                         generator=own(3),
                         cache=c,
                         sampler=sampler) for c in (True, False))
    assert (a - b).abs().max() < 1e-5 and (a.norm(dim=1) - 1).abs().max() < 1e-5

def test_prefix_is_a_cache_that_is_not_extended():
    g = generator("kv")
    k, v, a, b = (randn((2, 3, n, 4), g) for n in (5, 5, 2, 2))
    cache, rows = KVCache(k, v), torch.tensor([1, 0, 1])
    with torch.no_grad():
        prefix = Prefix(cache, rows, 2)
        for new in (a, b):                                              # the second step finds nothing of the first
            for got, old in zip(prefix.join(new[rows], -new[rows]), (k, v)):
                torch.testing.assert_close(
                    got, torch.cat([old[rows], new[rows] if old is k else -new[rows]], 2))
        assert len(prefix) == 5
    new = a[rows].requires_grad_()                                      # with gradients nothing may be overwritten
    for got, old in zip(Prefix(cache, rows, 2).join(new, new), (k, v)):
        torch.testing.assert_close(got, torch.cat([old[rows], new], 2))

def test_gradients_pass_through_a_cached_sampler(prior):
    text, zt = captions()
    x = randn((3, 16), generator("x")).requires_grad_()
    grads = []
    for cache in (True, False):
        denoise = prior.denoiser(text, zt, 2., cache=cache)
        y = denoise(denoise(x, torch.full((3,), 700)).x0, torch.full((3,), 300)).x0
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)

def test_caption_tokens_are_computed_once(prior, monkeypatch):
    sizes, forward = [], type(prior.net.transformer).forward
    def spy(self, x, *a, **k): sizes.append(tuple(x.shape[:2])); return forward(self, x, *a, **k)
    monkeypatch.setattr(type(prior.net.transformer), "forward", spy)
    prior.sample(*captions(), steps=5, guidance=2., candidates=2, generator=generator(0))
    assert sizes == [(4, 7)] + [(12, 3)] * 5                            # 3 captions + 1 empty; then 3 tokens for 3 captions x 2 draws x 2 branches

def test_guidance(prior):
    text, zt = captions()
    x, t = randn((3, 16), generator("x")), torch.full((3,), 400)
    with torch.no_grad():
        cond, null = prior.net(text, zt * prior.scale, x, t), prior.net(text * 0, zt * 0, x, t)     # the null branch keeps x
        for s in (0., 1., 3.):
            got = prior.denoiser(text, zt, s)(x, t)
            torch.testing.assert_close(got.x0, null + s * (cond - null), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(got.eps,
                                       predict(prior.schedule, "x0", got.x0, x, t).eps,
                                       atol=1e-4,
                                       rtol=1e-4)

def test_two_draws_keep_the_larger_product(prior):
    text, zt = captions()
    two = prior.sample(text, zt, steps=8, generator=own(3))
    one = prior.sample(text, zt, steps=8, generator=own(3), candidates=1)
    gs = own(3)
    [torch.randn(16, generator=g) for g in gs]              # the second draw alone: each row's first noise is spent
    other = prior.sample(text, zt, steps=8, generator=gs, candidates=1)
    want = torch.where(((one * zt).sum(1) >= (other * zt).sum(1))[:, None], one, other)
    torch.testing.assert_close(two, want, atol=1e-5, rtol=1e-5)
    assert not torch.equal(want, one)                                   # somewhere the second won
    z = randn((2, 3, 4), generator("z"))
    assert torch.equal(keep_best(z, z[:, 2] * 100), z[:, 2])

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(prior, sampler):
    text, zt = captions()
    together = prior.sample(text, zt, steps=6, guidance=2., generator=own(3), sampler=sampler)
    alone = prior.sample(text[1:2],
                         zt[1:2],
                         steps=6,
                         guidance=2.,
                         generator=own(3)[1:2],
                         sampler=sampler)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_embeddings_are_not_clipped(sampler):
    p, want = DiffusionPrior(PriorConfig(**SMALL)).eval(), torch.linspace(-4, 4, 16)
    p.cov = torch.full((1000,), 0.2)
    torch.nn.init.zeros_(p.net.out.weight)
    p.net.out.bias.data.copy_(want)          # always answers the same, far outside [-1, 1]
    z = p.sample(*captions(), steps=5, generator=own(3), sampler=sampler)
    torch.testing.assert_close(z, F.normalize(want, dim=0).expand(3, -1), atol=1e-4, rtol=1e-4)

def test_save_and_load(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    again = DiffusionPrior.from_pretrained(tmp_path)
    assert again.config == prior.config
    assert torch.equal(prior.sample(*captions(), steps=4, generator=own(3)),
                       again.sample(*captions(), steps=4, generator=own(3)))

def test_errors(prior):
    text, zt = captions()
    with pytest.raises(UnclipError, match="sampler 'heun'"):
        prior.sample(text, zt, sampler="heun")
    with pytest.raises(UnclipError, match="6 tokens of width 12"):
        prior.sample(text[..., :8], zt)
    with pytest.raises(UnclipError, match="CLIP it was trained with"):
        prior.loss(dict(zi=zt, zt=zt, text=text[:, :5]), generator(0))

# ---- analytic variance

class Gauss:
    "Embeddings around 0 whose best denoiser is known: N(0, spread^2)."
    def __init__(self, spread=0.25, seed=0): self.spread, self.seed = spread, seed
    def at(self, step, rank=0, world=1):
        g = generator("gauss", self.seed, step)
        return dict(zi=self.spread * randn((512, 16), g),
                    zt=F.normalize(randn((512, 16), g), dim=1),
                    text=randn((512, 6, 12), g))

def perfect(spread=0.25, slip=0.):
    "A prior whose network is the best denoiser of `Gauss`, off by `slip` in every component."
    p = DiffusionPrior(PriorConfig(**SMALL, scale=1.)).eval()
    def denoiser(text, zt, *a, **k):
        def denoise(x, t):
            abar = p.schedule.gather("abar", t, x)
            return predict(p.schedule, "x0",
                           abar.sqrt() * spread**2 / (abar * spread**2 + 1 - abar) * x + slip, x, t)
        return denoise
    p.denoiser = denoiser
    return p

def test_measured_variance_is_the_posterior():
    p = perfect().measure_variance(Gauss())
    snr = p.schedule.snr
    want = (1 / (1 / 0.25 ** 2 + snr)).float()                          # of x0 given x_t, both Gaussian
    assert p.cov.shape == (1000,) and p.cov.dtype == torch.float32
    torch.testing.assert_close(p.cov, want, rtol=0.04, atol=1e-6)

def test_measured_variance_is_the_validation_error_within_its_bounds():
    p, slip = perfect(slip=0.05).measure_variance(Gauss()), 0.05 ** 2
    snr = p.schedule.snr.float()
    torch.testing.assert_close(p.cov[300:500], (1 / (1 / 0.25**2 + snr) + slip)[300:500],
                               rtol=0.04,
                               atol=1e-6)
    assert (p.cov * snr <= 1.0001).all() and p.cov.max() <= 0.25 ** 2 * 1.02  # no doubt is larger than that of "no noise" or of "zero"
    torch.testing.assert_close(p.cov[:5], 1 / snr[:5])
    other = perfect(slip=0.05).measure_variance(Gauss(), first=3)
    assert not torch.equal(p.cov, other.cov) and torch.equal(
        p.cov,
        perfect(slip=0.05).measure_variance(Gauss()).cov)

@pytest.mark.parametrize("steps", [2, 5, 20])
def test_analytic_steps_keep_a_gaussians_spread(steps):
    p = perfect().measure_variance(Gauss())
    x_T, denoise = randn((20_000, 16), generator("x_T")), p.denoiser(None, None)

    def spread(d):
        return ddpm_sample(d, x_T, p.schedule, spaced(steps), generator("noise"), clip=False).std().item()
    assert spread(p.with_variance(denoise)) == pytest.approx(0.25, rel=0.02)
    if steps < 20:
        assert spread(denoise) < 0.97 * 0.25                 # the small variance loses some

def test_analytic_sample_by_hand(prior):
    text, zt = captions()
    got = prior.sample(text,
                       zt,
                       steps=3,
                       guidance=2.,
                       candidates=1,
                       sampler="analytic",
                       generator=generator("hand"))
    g, abar, d = generator("hand"), prior.schedule.abar, prior.denoiser(text, zt, 2.)
    x = torch.randn(3, 16, generator=g)
    for r, s in ((999, 500), (500, 0)):
        beta = 1 - abar[r] / abar[s]
        with torch.no_grad():
            x0 = d(x, torch.full((3,), r)).x0
        mean = (abar[s].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - abar[s]) * x) / (1 - abar[r])
        var = (1 - abar[s]) / (1 - abar[r]) * beta + abar[s] * beta**2 / (
            1 - abar[r])**2 * prior.cov[r].double()
        x = (mean + var.sqrt() * torch.randn(3, 16, generator=g)).float()
    with torch.no_grad():
        x = d(x, torch.zeros(3, dtype=torch.long)).x0
    torch.testing.assert_close(got, F.normalize(x, dim=1), atol=1e-4, rtol=1e-3)

def test_no_variance_is_the_ancestral_sampler(prior):
    text, zt = captions()
    draw = lambda s: prior.sample(text, zt, steps=6, sampler=s, generator=own(3))
    old, prior.cov = prior.cov, torch.zeros(1000)
    try:
        torch.testing.assert_close(draw("analytic"), draw("ddpm"))
    finally:
        prior.cov = old
    assert (draw("analytic") - draw("ddpm")).abs().max() > 1e-3

def test_finish_measures_on_the_batches_after_training():
    p, data = perfect(), Gauss()
    p.finish(data, 7)
    assert torch.equal(p.cov, perfect().measure_variance(data, first=7).cov)

def test_variance_is_saved_with_the_model_and_may_be_absent(prior, tmp_path):
    prior.save_pretrained(tmp_path/"new", torch.float16)
    again = DiffusionPrior.from_pretrained(tmp_path/"new")
    assert torch.equal(again.cov, prior.cov) and again.cov.dtype == torch.float32
    # measured statistics stay float32 where the weights do not: half precision keeps 3 digits of them, and a system is saved with all
    assert torch.equal(again.half().cov, prior.cov) and again.cov.dtype == torch.float32
    assert {p.dtype for p in again.parameters()} == {torch.float16}
    (tmp_path/"new"/"variance.safetensors").unlink()                            # weights of the first version
    old = DiffusionPrior.from_pretrained(tmp_path/"new")
    assert old.cov is None
    with pytest.raises(UnclipError, match="never measured: call measure_variance"):
        old.sample(*captions(), steps=2, sampler="analytic")
    assert torch.isfinite(old.sample(*captions(), steps=2, generator=own(3))).all()
    prior.save_pretrained(tmp_path/"new")
    old.save_pretrained(tmp_path/"new")                   # no stale variance beside other weights
    assert DiffusionPrior.from_pretrained(tmp_path/"new").cov is None

def test_damaged_variance(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    file = tmp_path/"variance.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UnclipError, match="variance.safetensors is damaged"):
        DiffusionPrior.from_pretrained(tmp_path)
    other = DiffusionPrior(PriorConfig(**SMALL, T=50))
    other.cov = torch.ones(50)
    other.save_files(tmp_path)
    with pytest.raises(UnclipError, match="variance of 50 steps, this prior has 1000"):
        DiffusionPrior.from_pretrained(tmp_path)

def test_shipped_prior_has_its_variance():
    from unclip_nb.core import data_path
    p = DiffusionPrior.from_pretrained(data_path("tiny")/"prior")
    assert p.cov.shape == (1000, ) and torch.isfinite(
        p.cov).all() and (p.cov > 0).all() and p.cov.max() < 0.54**2 + 1e-3

# ---- rivals

def test_linear_prior_is_ridge_regression():
    from sklearn.linear_model import Ridge
    zt, zi = randn((50, 6), generator("zt")), randn((50, 4), generator("zi"))
    x = F.pad(zt.double(), (0, 1), value=1)
    alpha = (0.1 * x.square().sum(0).mean()).item()                     # ours also shrinks the constant, as one feature among others
    want = Ridge(alpha=alpha, fit_intercept=False).fit(x.numpy(),
                                                       zi.double().numpy()).predict(x.numpy())
    torch.testing.assert_close(
        linear_prior(zt, zi, ridge=0.1)(zt),
        F.normalize(torch.from_numpy(want), dim=1).float())

def test_nearest_prior():
    zt, zi = F.normalize(randn((20, 6), generator("zt")), dim=1), randn((20, 4), generator("zi"))
    assert torch.equal(nearest_prior(zt, zi)(zt.flip(0) * 5), zi.flip(0))

def test_compare_priors_by_hand():
    up, side = torch.tensor([[0., 1.]]), torch.tensor([[1., 0.]])
    t = compare_priors(
        {"same": torch.stack([up, up]), "both": torch.stack([up, side]), "one": side[None]}, up,
        torch.tensor([[.6, .8], [0., -1.]]))
    assert t["same"] == pytest.approx(dict(truth=1, nearest=.8, diversity=0), abs=1e-6)
    assert t["both"] == pytest.approx(dict(truth=.5, nearest=.7, diversity=1), abs=1e-6)
    assert t["one"] == pytest.approx(dict(truth=0, nearest=.6, diversity=0), abs=1e-6)
    t = compare_priors({"both": torch.stack([up, side])},
                       up,
                       up,
                       zt=F.normalize(torch.tensor([[1., 3.]]), dim=1))
    assert t["both"]["agreement"] == pytest.approx(2 / 10 ** .5)

def test_scores_are_those_of_single_captions_and_margins_their_spread():
    g = generator("scores")
    z, zi, zt, real = (F.normalize(randn(s, g), dim=-1)
                       for s in ((3, 40, 5), (40, 5), (40, 5), (7, 5)))
    rows = [compare_priors({"": z[:, i:i+1]}, zi[i:i+1], real, zt[i:i+1])[""] for i in range(40)]
    scores, table = score_draws(z, zi, real, zt), compare_priors({"": z},
                                                                 zi,
                                                                 real,
                                                                 zt,
                                                                 margins=True)[""]
    assert set(table) == {
        k + m
        for k in ("truth", "nearest", "diversity", "agreement")
        for m in ("", " ±")
    }
    for k, v in scores.items():
        one = torch.tensor([r[k] for r in rows])
        torch.testing.assert_close(v, one, atol=1e-5, rtol=1e-4)
        assert table[k] == pytest.approx(one.mean().item(), abs=1e-5)
        assert table[f"{k} ±"] == pytest.approx(1.96 * one.std().item() / 40 ** .5, rel=1e-3)
    pairs = 1 - torch.stack([(z[a] * z[b]).sum(-1) for a, b in ((0, 1), (0, 2), (1, 2))]).mean(0)
    torch.testing.assert_close(scores["diversity"], pairs, atol=1e-5, rtol=1e-4)

"The AR prior against counting, closed forms, exact probabilities of whole sentences, and its own slow path."
import math
import pytest, torch
import torch.nn.functional as F
from unclip_nb.ar_prior import ARPrior, ARPriorConfig, ARPriorNet, Condenser, hide_conditions, narrow, pick, uniforms
from unclip_nb.core import UnclipError, count_parameters, generator, randn
from unclip_nb.train import TrainConfig, fit

SMALL = dict(clip_dim=16,
             text_width=12,
             context_length=6,
             k=7,
             buckets=5,
             dot_buckets=4,
             width=32,
             layers=2,
             heads=4)

def pairs(n=400, seed="pairs"):
    g = generator(seed)
    zt = F.normalize(randn((n, 16), g), dim=1)
    return F.normalize(zt + randn((n, 16), g) * torch.linspace(1, .1, 16), dim=1), zt

def build(**kw):
    torch.manual_seed(0)
    p = ARPrior(ARPriorConfig(**SMALL | kw)).eval()
    for x in p.parameters():
        torch.nn.init.normal_(x, std=0.3 if x.ndim == 1 else x.shape[-1] ** -0.5)   # no zero or tiny part may hide a mistake
    p.measure(*pairs())
    return p

@pytest.fixture(scope="module", params=["own", "shared", "condensed"])
def prior(request):
    return build(
        **{
            "own": {}, "shared": dict(own_codes=False), "condensed": dict(
                caption_tokens=3, encoder_width=24, encoder_layers=1, encoder_heads=2)
        }[request.param])

def captions(n=3, seed=0):
    g = generator("captions", seed)
    text = randn((n, 6, 12), g)
    for i in range(n):
        text[i, 2 + i % 4:] = 0
    return text, F.normalize(randn((n, 16), g), dim=1)

def own(n): return [generator("row", i) for i in range(n)]

def random_codes(n=3): return torch.randint(5, (n, 7), generator=generator("codes"))

# ---- architecture

def test_paper_preset_is_table_3():
    c = ARPriorConfig.paper()
    assert (c.width, c.layers, c.heads, c.k, c.buckets, c.clip_dim, c.drop) == (1664, 24, 26, 319,
                                                                                1024, 1024, 0.1)
    assert (c.context_length, c.encoder_width, c.encoder_layers,
            c.encoder_heads) == (256, 2048, 24, 32) and c.length == 384
    with torch.device("meta"):
        model = ARPrior(c)
        assert 1.95e9 < count_parameters(model) < 2.1e9                 # paper.md: about 2.0B with the text encoder
        own, one = (count_parameters(
            ARPriorNet(ARPriorConfig.paper(own_codes=x, layers=1, encoder_layers=1)))
                    for x in (True, False))
        assert own - one == 318 * 1024 * 1664
    assert model.quantizer.centres.shape == (319, 1024)

@pytest.mark.parametrize("preset", ["nano", "tiny", "small"])
def test_presets_build(preset):
    with torch.device("meta"):
        net = ARPriorNet(getattr(ARPriorConfig, preset)())
    if preset == "tiny":
        assert count_parameters(net) < 0.65e6

def test_nothing_after_moves_anything_before(prior):
    "On the whole model: caption, z_t, dot product, then every code."
    text, zt = captions()
    dot, codes = torch.tensor([0, 1, 3]), random_codes()
    with torch.no_grad():
        base = prior.net(text, zt, dot, codes)
        for p in range(7):
            other = codes.clone()
            other[:, p] = (codes[:, p] + 1) % 5
            moved = (base - prior.net(text, zt, dot, other)).abs().amax((0, 2)) > 1e-5
            assert moved.tolist() == [q > p for q in range(7)]
        for changed in ((text * 2, zt, dot), (text, -zt, dot), (text, zt, (dot + 1) % 4)):
            assert ((base - prior.net(*changed, codes)).abs().amax((0, 2)) > 1e-4).all()

def test_order_of_the_prefix():
    net, (text, zt) = build().net, captions(2)
    text = randn((2, 6, 12), generator("full"))
    dot, codes = torch.tensor([1, 2]), random_codes(2)
    def run(text, zt, dot):
        with torch.no_grad():
            return net.transformer(
                torch.cat(
                    [net.prefix(text, zt, dot), net.embed(codes[:, :-1])], 1))
    base, bumped = run(text, zt, dot), text.clone()
    bumped[:, 2] += 1
    for first, other in ((2, run(bumped, zt, dot)), (6, run(text, -zt,
                                                            dot)), (7, run(text, zt, dot + 1))):
        assert ((base - other).abs().amax((0, 2))
                > 1e-5).tolist() == [i >= first
                                     for i in range(14)]  # text 0..5, z_t 6, dot 7, codes 8..13

def test_every_component_has_its_own_rows():
    net, codes = build().net, random_codes()
    e = net.embed(codes) - net.positions[-7:]
    for b in range(3):
        for p in range(7):
            assert torch.equal(e[b, p],
                               (net.codes.weight[p * 5 + codes[b, p]] + net.positions[8 + p]) -
                               net.positions[8 + p])
    h = randn((3, 7, 32), generator("h"))
    want = (h @ net.codes.weight.T).unflatten(-1, (7, 5)).diagonal(dim1=1, dim2=2).movedim(
        -1, 1) + net.bias  # all 35 logits, then the component's own five
    torch.testing.assert_close(net.logits(h), want)
    torch.testing.assert_close(net.logits(h[:, 2:4], 2), want[:, 2:4])
    shared = build(own_codes=False).net
    assert shared.codes.weight.shape == (5, 32)
    torch.testing.assert_close(shared.logits(h), h @ shared.codes.weight.T + shared.bias)

def test_condenser_reads_the_whole_caption():
    torch.manual_seed(0)
    m, x = Condenser(6, 3, 8, 1, 2), randn((2, 6, 8), generator("x"))
    for i in range(6):
        y = x.clone()
        y[:, i] *= -1
        assert ((m(x) - m(y)).abs().amax(-1) > 1e-6).all() and m(x).shape == (2, 3, 8)

# ---- statistics of the data

def test_start_measures_the_embeddings():
    zi, zt = pairs(6000)
    class Rows:
        batch_size = 64

        def at(self, step, rank=0, world=1):
            r = torch.randint(6000, (64, ), generator=generator(step))
            return dict(zi=zi[r], zt=zt[r])
    p = ARPrior(ARPriorConfig(**SMALL))
    p.start(Rows())
    counts = torch.bincount(p.dot_codes(zi, zt), minlength=4) / 6000
    assert (counts - 0.25).abs().max() < 0.03                           # equally full
    torch.testing.assert_close(p.quantizer.pca.mean, zi.mean(0), atol=0.03, rtol=0)
    low, high = (zi * zt).sum(1)[p.dot_codes(zi, zt) == 0].max(), (
        zi * zt).sum(1)[p.dot_codes(zi, zt) == 3].min()
    assert low < p.dot_edges[0] < p.dot_edges[2] <= high

def test_too_few_embeddings():
    zi, zt = pairs(6)
    with pytest.raises(UnclipError, match="6 different embeddings are too few for 7 components"):
        ARPrior(ARPriorConfig(**SMALL)).measure(zi.repeat(50, 1), zt.repeat(50, 1))
    with pytest.raises(UnclipError, match="17 components of embeddings of length 16"):
        ARPrior(ARPriorConfig(**SMALL | dict(k=17)))
    text, zt = captions()
    with pytest.raises(UnclipError, match="fit"):
        ARPrior(ARPriorConfig(**SMALL)).loss(dict(zi=zt, zt=zt, text=text), generator(0))

# ---- learning

def test_loss_by_hand(prior):
    text, zt = captions(4)
    zi = pairs(4, "zi")[0]
    batch = dict(zi=zi, zt=zt, text=text)
    keep = torch.rand(4, generator=generator("loss")) >= 0.1
    codes = prior.quantizer.encode(zi)
    dot = torch.where(keep, torch.bucketize((zi * zt).sum(1), prior.dot_edges, right=True), 4)
    logp = prior.net(text * keep[:, None, None], zt * 4 * keep[:, None], dot, codes).log_softmax(-1)      # 4 = sqrt(16)
    want = -torch.stack([logp[i, p, codes[i, p]] for i in range(4) for p in range(7)]).view(4, 7)
    torch.testing.assert_close(prior.loss(batch, generator("loss")), want.mean())
    torch.testing.assert_close(prior.losses(batch, ~keep), want.mean(0))

def test_all_three_are_hidden_together_a_tenth_of_the_time(monkeypatch):
    p, seen, forward = build(), [], ARPriorNet.forward
    monkeypatch.setattr(
        ARPriorNet, "forward", lambda self, text, zt, dot, c: (seen.append(
            (text, zt, dot)), forward(self, text, zt, dot, c))[1])
    text, zt = captions(4000)
    with torch.no_grad():
        p.loss(dict(zi=pairs(4000)[0], zt=zt, text=text), generator("many"))
    text, zt, dot = seen[0]
    assert torch.equal(text.any(-1).any(-1), zt.any(-1)) and torch.equal(
        zt.any(-1), dot < 4) and 0.08 < (dot == 4).float().mean() < 0.12

def test_a_hidden_row_knows_nothing(prior):
    "Whatever the caption, z_t and the dot product were, a hidden row's logits are the same."
    codes, hide = random_codes(1).repeat(2, 1), torch.tensor([True, True])
    a, b = (prior.net(*hide_conditions(*captions(2, s), torch.tensor(d), hide, 4), codes)
            for s, d in ((1, [0, 1]), (2, [3, 2])))
    assert torch.equal(a, b)

def test_learns_a_code_that_depends_on_an_earlier_one():
    "Two signs whose product the caption tells: the first is a coin (ln 2), the second follows from it (0)."
    torch.manual_seed(0)
    p = ARPrior(
        ARPriorConfig(clip_dim=2,
                      text_width=2,
                      context_length=1,
                      k=2,
                      buckets=2,
                      dot_buckets=1,
                      width=16,
                      layers=2,
                      heads=2,
                      drop=0.))
    p.measure(*[torch.tensor([[.8, .6], [.8, -.6], [-.8, .6], [-.8, -.6]])] * 2)
    def batch(step):
        g = generator("xor", step)
        first, same = (torch.randint(2, (128,), generator=g) * 2 - 1 for _ in range(2))
        return dict(zi=torch.stack([.8 * first, .6 * first * same], 1),
                    zt=torch.tensor([[1., 0.]]).repeat(128, 1),
                    text=torch.eye(2)[(same + 1) // 2][:, None])
    optimizer = torch.optim.Adam(p.parameters(), 5e-3)
    for step in range(120):
        optimizer.zero_grad()
        p.loss(batch(step), generator(step)).backward()
        optimizer.step()
    with torch.no_grad():
        first, second = p.losses(batch(10 ** 6)).tolist()
    assert abs(first - math.log(2)) < 0.05 and second < 0.1

# ---- sampling

@pytest.mark.parametrize("guidance", [1., 0., 2.5])
def test_cache_is_no_cache_is_training_step_by_step(prior, guidance):
    text, zt = captions()
    dot, codes = torch.tensor([0, 1, 3]), random_codes()
    with torch.no_grad():
        fast, slow = (prior.writer(text, zt, dot, guidance, cache=c) for c in (True, False))
        cond, null = prior.net(text, zt * 4, dot,
                               codes), prior.net(text * 0, zt * 0, dot * 0 + 4,
                                                 codes)  # the null branch reads the same codes
        for p in range(7):
            got = fast(codes[:, :p])
            torch.testing.assert_close(got, slow(codes[:, :p]), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(got, (null + guidance * (cond - null))[:, p],
                                       atol=1e-4,
                                       rtol=1e-4)


@pytest.mark.parametrize(
    "how", [{}, dict(guidance=2.),
            dict(guidance=3., temperature=.7, top_p=.8, percentile=85.)])
def test_same_seed_same_codes_cached_alone_or_in_company(prior, how):
    text, zt = captions()
    codes = prior.sample_codes(text, zt, generator=own(3), **how)
    assert codes.shape == (3, 7) and 0 <= codes.min() and codes.max() < 5
    assert torch.equal(codes, prior.sample_codes(text, zt, generator=own(3), **how))
    assert torch.equal(codes, prior.sample_codes(text, zt, generator=own(3), cache=False, **how))
    assert torch.equal(codes[1:2],
                       prior.sample_codes(text[1:2], zt[1:2], generator=own(3)[1:2], **how))
    assert not torch.equal(
        codes,
        prior.sample_codes(text, zt, generator=[generator("else", i) for i in range(3)], **how))

def test_after_the_prefix_one_token_a_code(monkeypatch):
    p, sizes = build(), []
    forward = type(p.net.transformer).forward
    monkeypatch.setattr(
        type(p.net.transformer), "forward", lambda self, x, *a, **k:
        (sizes.append(tuple(x.shape[:2])), forward(self, x, *a, **k))[1])
    p.sample(*captions(), guidance=2., generator=generator(0))
    assert sizes == [(4, 8)] + [(6, 1)] * 6                             # 3 captions + 1 empty; then a token for 3 captions x 2 branches, none for the last code

def test_codes_come_as_often_as_the_model_says():
    "Exact probabilities of all 4^2 sentences, from the network, against 20,000 draws."
    p = build(k=2, buckets=4, dot_buckets=1)
    text, zt = captions(1)
    both = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    with torch.no_grad():
        logp = p.net(text.expand(16, -1, -1),
                     zt.expand(16, -1) * 4, torch.zeros(16, dtype=torch.long), both).log_softmax(-1)
    want = logp.gather(-1, both[..., None]).sum((1, 2)).exp()
    codes = p.sample_codes(text.expand(20_000, -1, -1),
                           zt.expand(20_000, -1),
                           generator=generator("frequencies"))
    assert abs(want.sum() -
               1) < 1e-5 and (torch.bincount(codes @ torch.tensor([4, 1]), minlength=16) / 20_000 -
                              want).abs().max() < 0.012

def test_dot_product_is_drawn_from_above_the_percentile(monkeypatch):
    p, seen, writer = build(dot_buckets=20), [], ARPrior.writer
    monkeypatch.setattr(
        ARPrior, "writer", lambda self, text, zt, dot, *a:
        (seen.append(dot), writer(self, text, zt, dot, *a))[1])
    text, zt = captions(2000)
    for percentile, lowest in ((0., 0), (50., 10), (70., 14), (85., 17), (95., 19), (100., 19)):
        p.sample_codes(text, zt, percentile=percentile, generator=generator("dot"))
        counts = torch.bincount(seen.pop(), minlength=20)
        assert (counts[:lowest]
                == 0).all() and (counts[lowest:] / 2000 - 1 /
                                 (20 - lowest)).abs().max() < 0.04  # evenly over the rest
    p.sample_codes(text, zt, generator=generator("dot"))
    assert seen.pop().min() == 10                                       # the paper's choice is the default

def test_samples_have_unit_norm_and_are_the_decoded_codes(prior):
    z = prior.sample(*captions(), generator=own(3))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(
        z,
        F.normalize(prior.quantizer.decode(prior.sample_codes(*captions(), generator=own(3))),
                    dim=1))

# ---- from logits to a code

def test_temperature_and_top_p_against_closed_forms():
    probs = torch.tensor([[.05, .5, .15, .3], [.25, .25, .25, .25]])
    torch.testing.assert_close(narrow(probs.log()), probs)
    torch.testing.assert_close(narrow(probs.log(), 0.5), probs**2 / (probs**2).sum(1, keepdim=True))
    torch.testing.assert_close(narrow(probs.log(), 2.),
                               probs**.5 / (probs**.5).sum(1, keepdim=True))
    assert torch.equal(narrow(probs.log(), 0.)[0], torch.tensor([0., 1, 0, 0]))
    for top_p, want in ((.4, [0, 1, 0,
                              0]), (.7, [0, 5 / 8, 0,
                                         3 / 8]), (.94, [0, .5 / .95, .15 / .95,
                                                         .3 / .95]), (.96, [.05, .5, .15, .3])):
        torch.testing.assert_close(narrow(probs[:1].log(), top_p=top_p),
                                   torch.tensor([want], dtype=torch.float))
    squared = torch.tensor([.0025, .25, .0225, .09]) / .365             # first the temperature, then the tail
    torch.testing.assert_close(
        narrow(probs[:1].log(), .5, .9),
        torch.where(squared > .2, squared, 0)[None] / squared[squared > .2].sum())

def test_pick_inverts_the_running_sum():
    probs, n = torch.tensor([[.1, 0., .6, .3, 0.]]), 100_000
    codes = pick(probs.expand(n, -1), (torch.arange(n) + .5) / n)
    torch.testing.assert_close(torch.bincount(codes, minlength=5) / n, probs[0], atol=2e-5, rtol=0)
    assert pick(torch.tensor([[0., 1.]]), torch.zeros(1)) == 1 and pick(
        torch.tensor([[1., 0.]]), torch.tensor([1 - 2**-24])) == 0

def test_uniforms_a_row_each():
    a = uniforms((3, 4), own(3))
    assert torch.equal(a[1], torch.rand(4, generator=own(3)[1])) and a.min() >= 0 and a.max() < 1
    with pytest.raises(UnclipError, match="2 generators for 3 rows"):
        uniforms((3, 4), own(2))

# ---- saving, training, errors

def test_save_and_load(prior, tmp_path):
    prior.save_pretrained(tmp_path, dtype=torch.float16)
    again = ARPrior.from_pretrained(tmp_path)
    assert again.config == prior.config
    for k, x in prior.named_buffers():
        assert torch.equal(x, dict(again.named_buffers())[k])     # quantiser and dot product stay exact
    prior.save_pretrained(tmp_path)
    assert torch.equal(prior.sample(*captions(), generator=own(3)),
                       ARPrior.from_pretrained(tmp_path).sample(*captions(), generator=own(3)))

def test_fit_measures_first_and_resumes(tmp_path):
    zi, zt = pairs(5000)
    class Rows:
        batch_size = 16
        def at(self, step, rank=0, world=1):
            g = generator("rows", step)
            r = torch.randint(5000, (16,), generator=g)
            return dict(zi=zi[r], zt=zt[r], text=randn((16, 6, 12), g))
    def run(steps, out, resume=False):
        torch.manual_seed(0)
        return fit(ARPrior(ARPriorConfig(**SMALL)),
                   Rows(),
                   TrainConfig(steps=steps, batch_size=16, save_every=2, schedule="constant"),
                   tmp_path / out,
                   resume=resume,
                   device="cpu",
                   progress=False)
    run(2, "halves")
    halves, whole = run(4, "halves", True), run(4, "whole")
    for k, x in whole.state_dict().items():
        assert torch.equal(x, halves.state_dict()[k]), k
    assert whole.quantizer.pca.fitted and whole.dot_edges.unique().numel() == 3

def test_sizes_of_another_clip(prior):
    text, zt = captions()
    with pytest.raises(UnclipError, match="6 tokens of width 12"):
        prior.sample(text[..., :8], zt)
    with pytest.raises(UnclipError, match="CLIP it was trained with"):
        prior.loss(dict(zi=zt, zt=zt, text=text[:, :5]), generator(0))

def test_the_last_tenth_is_cut_off_unless_asked_for():
    p = build()
    drawn = [
        p.sample_codes(*captions(), generator=own(3), **how)
        for how in ({}, dict(top_p=.9), dict(top_p=1.))
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("how, message", [(dict(temperature=-1.), "temperature is -1"),
                                          (dict(top_p=0.), "top_p is 0"),
                                          (dict(top_p=1.5), "top_p is 1.5"),
                                          (dict(percentile=101.), "percentile is 101")])
def test_impossible_settings(how, message):
    with pytest.raises(UnclipError, match=message):
        build().sample(*captions(), **how)

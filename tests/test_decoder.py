"The decoder: conditions, dropout, guidance, independence of the batch, and a loss that a closed form predicts."
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
import pytest, torch
from unclip_nb.core import data_path, generator, randn
from unclip_nb.decoder import Decoder, DecoderConfig, TextEncoder
from unclip_nb.diffusion import q_sample

CFG = DecoderConfig(image_size=16,
                    channels=16,
                    channel_mult=(1, 2),
                    res_blocks=1,
                    attention=(8, ),
                    head_channels=16,
                    patch=1,
                    text_width=32,
                    text_layers=1,
                    text_heads=2,
                    context_length=8,
                    vocab_size=32,
                    clip_dim=12)

@pytest.fixture
def decoder():
    torch.manual_seed(0)
    m = Decoder(CFG).eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.abs().sum() == 0:
                p.normal_(0, 0.1)              # zero-initialised layers would hide mistakes
    return m

@pytest.fixture
def batch():
    g = generator(1)
    z = torch.nn.functional.normalize(torch.randn(6, 12, generator=g), dim=1)
    tokens = torch.randint(1, 31, (6, 8), generator=g)
    tokens[:, 5:] = 0
    return dict(image=torch.rand(6, 3, 16, 16, generator=g) * 2 - 1, zi=z, tokens=tokens)

def test_padding_tokens_are_never_looked_up():
    enc = TextEncoder(32, 8, 16, 1, 2)
    tokens = torch.tensor([[1, 4, 9, 31, 0, 0, 0, 0]])
    before = enc(tokens)
    with torch.no_grad():
        enc.tokens.weight[0] += 100             # the padding id's row of the table
    assert torch.equal(before, enc(tokens))

@pytest.mark.parametrize("hidden", [0, 20])
def test_four_tokens_are_four_slices(batch, hidden):
    decoder = Decoder(replace(CFG, zi_hidden=hidden))
    _, context = decoder.condition(batch["zi"], batch["tokens"])
    w, last = CFG.text_width, decoder.zi_to_tokens[-1] if hidden else decoder.zi_to_tokens
    with torch.no_grad():
        last.weight[2 * w:3 * w] += 1
    _, moved = decoder.condition(batch["zi"], batch["tokens"])
    changed = [(moved[:, 8 + k] - context[:, 8 + k]).abs().max() > 1e-3 for k in range(4)]
    assert changed == [False, False, True, False] and torch.equal(moved[:, :8], context[:, :8])

def test_zi_reaches_the_picture_by_both_ways(decoder, batch):
    x, t = randn((6, 3, 16, 16), generator(0)), torch.full((6,), 300)
    base = decoder.denoiser(batch["zi"], batch["tokens"])(x, t).x0
    for part in (decoder.zi_to_time, decoder.zi_to_tokens):
        saved = {k: v.clone() for k, v in part.state_dict().items()}
        with torch.no_grad():
            for p in part.parameters():
                p.zero_()
        assert (decoder.denoiser(batch["zi"], batch["tokens"])(x, t).x0 - base).abs().max() > 1e-4
        part.load_state_dict(saved)

@pytest.mark.parametrize("way", ["time embedding", "tokens", "neither"])
def test_the_caption_reaches_the_picture_by_both_ways(decoder, batch, way, monkeypatch):
    "With one way cut the other still tells two captions apart; with both cut nothing does."
    whole = decoder.condition
    def cut(*args):
        vector, context = whole(*args)
        return vector, context if way == "tokens" else torch.cat(
            [context[:, :8] * 0, context[:, 8:]], 1)
    monkeypatch.setattr(decoder, "condition", cut)
    if way != "time embedding":
        torch.nn.init.zeros_(decoder.text_to_time.weight)
    x, t = randn((6, 3, 16, 16), generator(0)), torch.full((6,), 300)
    with torch.no_grad():
        one, other = (decoder.denoiser(batch["zi"], tokens)(x, t).x0
                      for tokens in (batch["tokens"], batch["tokens"].flip(0)))
    assert (one - other).abs().max() > 1e-4 if way != "neither" else torch.equal(one, other)

def test_what_stands_for_nothing_is_learned(decoder, batch):
    "The null z_i and the padding vectors get gradients where z_i or the caption is hidden, and only there."
    def gradients(**drop):
        decoder.zero_grad()
        decoder.config = replace(CFG, **drop)
        decoder.loss(batch, generator(3)).backward()
        return [
            0 if p.grad is None else p.grad.abs().sum().item()
            for p in (decoder.null_zi, decoder.text.padding)
        ] + [decoder.text.padding.grad[:5].abs().sum().item()]
    null, padding, among_words = gradients(drop_zi=0.0, drop_text=0.0)
    assert null == 0 and padding > 0 and among_words == 0          # captions of five tokens: behind them there is padding anyway
    null, padding, among_words = gradients(drop_zi=1.0, drop_text=1.0)
    assert null > 0 and among_words > 0

def test_hidden_zi_and_caption_cannot_be_heard(decoder, batch):
    decoder.config = replace(CFG, drop_zi=1.0, drop_text=1.0)
    other = batch | dict(zi=-batch["zi"], tokens=batch["tokens"].flip(0))
    assert decoder.loss(batch, generator(3)).item() == decoder.loss(other, generator(3)).item()
    decoder.config = replace(CFG, drop_zi=0.0, drop_text=0.0)
    assert decoder.loss(batch, generator(3)).item() != decoder.loss(other, generator(3)).item()

def test_shares_of_hidden_conditions(batch, monkeypatch):
    m, seen = Decoder(replace(CFG, channels=16)), []
    rows = {k: v[:1].expand(2000, *v.shape[1:]) for k, v in batch.items()}
    monkeypatch.setattr(
        m, "condition", lambda zi, tokens, keep: (seen.append((keep, tokens.sum(1) > 0)),
                                                  (None, None))[1])
    monkeypatch.setattr(m, "network", lambda x, t, *_: x)
    m.loss(rows, generator(0))
    keep_zi, keep_text = seen[0]
    assert abs((~keep_zi).float().mean() - 0.1) < 0.03 and abs((~keep_text).float().mean() -
                                                               0.5) < 0.05
    both = (~keep_zi & ~keep_text).float().mean()
    assert abs(both - 0.05) < 0.02                                 # hidden independently of each other

def test_guidance_is_linear_and_one_is_unguided(decoder, batch):
    x, t = randn((6, 3, 16, 16), generator(0)), torch.full((6,), 300)
    def at(s, **kw): return decoder.denoiser(batch["zi"], batch["tokens"], s)(x, t).eps
    null = decoder.denoiser(batch["zi"], batch["tokens"], 0.0)(x, t).eps
    assert torch.allclose(at(1.0), at(1.0 + 1e-7), atol=1e-5)
    assert torch.allclose(at(3.0), null + 3 * (at(1.0) - null), atol=1e-4)
    hidden = decoder.condition(batch["zi"], batch["tokens"] * 0, torch.zeros(6, dtype=torch.bool))
    from unclip_nb.diffusion import predict
    by_hand = predict(decoder.schedule, CFG.target, decoder.network(x, t, *hidden), x, t).eps
    assert torch.allclose(null, by_hand, atol=1e-5)                # the other branch hides both, and sees the same x_t

def test_a_sample_does_not_depend_on_its_batch(decoder, batch):
    z, tok = batch["zi"], batch["tokens"]
    gens = lambda rows: [generator(7, i) for i in rows]
    all_ = decoder.sample(z, tok, steps=4, generator=gens(range(6)))
    alone = decoder.sample(z[3:4], tok[3:4], steps=4, generator=gens([3]))
    assert torch.allclose(all_[3:4], alone, atol=1e-4)

@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_first_loss_is_the_targets_mean_square(batch, target):
    m = Decoder(replace(CFG, target=target))
    g = generator(5)
    t = torch.randint(0, 1000, (6,), generator=g)
    noise = randn(batch["image"].shape, g)
    from unclip_nb.diffusion import target as asked
    expected = asked(m.schedule, target, batch["image"], noise, t).square().mean()
    assert torch.allclose(m.loss(batch, generator(5)), expected, atol=1e-5)

def test_larger_pictures_are_made_small_first(batch):
    m = Decoder(CFG)
    big = torch.nn.functional.interpolate(batch["image"], 64, mode="nearest")
    assert torch.allclose(m.loss(batch, generator(0)),
                          m.loss(batch | dict(image=big), generator(0)),
                          atol=1e-5)

def test_no_zi_is_the_hidden_one(decoder, batch):
    x, t, tok = randn((6, 3, 16, 16), generator(0)), torch.full((6,), 300), batch["tokens"]
    vector, context = decoder.condition(batch["zi"], tok, torch.zeros(6, dtype=torch.bool))
    assert torch.allclose(decoder.denoiser(None, tok)(x, t).x0,
                          decoder.prediction(decoder.network(x, t, vector, context), x, t).x0,
                          atol=1e-5)
    null = decoder.denoiser(None, tok, 0.0)(x, t).eps
    assert torch.allclose(null, decoder.denoiser(batch["zi"], tok, 0.0)(x, t).eps, atol=1e-5)      # the null branch is the same with and without z_i
    assert decoder.sample(None, tok, steps=2, generator=generator(0)).shape == (6, 3, 16, 16)

@pytest.fixture
def unsure(batch):
    torch.manual_seed(0)
    m = Decoder(replace(CFG, learned_variance=True, target="eps")).eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.abs().sum() == 0:
                p.normal_(0, 0.1)
    return m

def test_learned_variance_equals_diffusers(unsure, batch):
    "One ancestral step from the six channels, against diffusers' scheduler with variance_type learned_range."
    from diffusers import DDPMScheduler
    from unclip_nb.diffusion import Prediction, ddpm_sample
    x, z, tok = randn((6, 3, 16, 16), generator(0)), batch["zi"], batch["tokens"]
    theirs = DDPMScheduler(1000,
                           beta_schedule="squaredcos_cap_v2",
                           variance_type="learned_range",
                           prediction_type="epsilon",
                           clip_sample=True)
    t = torch.full((6,), 400)
    with torch.no_grad():
        out = unsure.network(x, t, *unsure.condition(z, tok))
        p = unsure.denoiser(z, tok)(x, t)
    assert out.shape[1] == 6 and p.mix.shape == x.shape and p.mix.std() > 0
    from unclip_nb.variance import split_variance
    assert torch.equal(p.mix, split_variance(out)[1])
    ours = unsure.schedule
    logvar = p.mix * ours.gather("log_large", t, x) + (1 - p.mix) * ours.gather("log_small", t, x)
    want = theirs._get_variance(400, predicted_variance=out[:, 3:])           # diffusers returns its logarithm for learned_range
    assert torch.allclose(logvar, want, atol=1e-4)

def test_only_the_mean_is_guided(unsure, batch):
    x, t = randn((6, 3, 16, 16), generator(0)), torch.full((6,), 300)
    plain, strong = (unsure.denoiser(batch["zi"], batch["tokens"], s)(x, t) for s in (1.0, 3.0))
    assert torch.allclose(plain.mix, strong.mix,
                          atol=1e-5) and (plain.x0 - strong.x0).abs().max() > 1e-2

def test_the_bound_teaches_the_variance_alone(unsure, batch):
    "L_vlb's gradient reaches the three extra channels, never the three of the mean (paper 4: the mean is detached)."
    head = unsure.unet.out
    unsure.loss(batch, generator(2)).backward()
    extra, mean = head.weight.grad[3:].abs().sum(), head.weight.grad[:3].clone()
    assert extra > 0
    plain = Decoder(replace(CFG, target="eps"))
    state = unsure.state_dict()
    plain.load_state_dict(
        {k: v[:3] if k in ("unet.out.weight", "unet.out.bias") else v
         for k, v in state.items()})
    plain.eval()
    plain.loss(batch, generator(2)).backward()
    assert torch.allclose(plain.unet.out.weight.grad, mean, atol=1e-5)

def test_the_bounds_weight_counts_the_bound_alone(unsure, batch):
    "The loss is linear in vlb_weight: at 0 the simple loss, and the paper's 0.001 is the default."
    losses = {}
    for w in (0.0, 1e-5, 1e-3):
        unsure.config = replace(unsure.config, vlb_weight=w)
        losses[w] = unsure.loss(batch, generator(3)).item()
    bound = (losses[1e-3] - losses[0.0]) / 1e-3
    assert bound > 0 and losses[1e-5] - losses[0.0] == pytest.approx(1e-5 * bound, rel=0.05)
    unsure.config = replace(unsure.config, learned_variance=False)
    unsure.network = lambda *a, real=unsure.network: real(*a)[:, :3]                    # the same answers without the other half
    assert unsure.loss(batch, generator(3)).item() == pytest.approx(losses[0.0], rel=1e-5)
    assert DecoderConfig().vlb_weight == DecoderConfig.paper(
    ).vlb_weight == 0.001 and DecoderConfig.tiny().vlb_weight < 0.001

def test_ddpm_uses_the_learned_variance_and_samplers_are_named(unsure, batch):
    from unclip_nb.core import UnclipError
    z, tok = batch["zi"][:2], batch["tokens"][:2]
    draw = lambda **kw: unsure.sample(
        z, tok, guidance=1.0, steps=3, generator=[generator(1), generator(2)], **kw)
    first = draw(sampler="ddpm")
    with torch.no_grad():
        unsure.unet.out.bias[3:] += 2
    assert (draw(sampler="ddpm") - first).abs().max() > 1e-3
    for bad, word in ((dict(sampler="euler"), "ddim, ddpm or dpm"),
                      (dict(sampler="dpm",
                            eta=0.5), "deterministic"), (dict(sampler="ddpm",
                                                              eta=0.5), "its own noise")):
        with pytest.raises(UnclipError, match=word):
            draw(**bad)

@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm", "ddpm"])
def test_conditions_are_encoded_once_a_sampling(unsure, batch, sampler, guidance):
    "Text encoder, z_i's tokens, and every layer's keys and values of the context: once, however many steps."
    calls, layers = Counter(), [a.context_kv for a in unsure.unet.attentions()]
    for name, module in [("text", unsure.text), ("zi", unsure.zi_to_tokens), *enumerate(layers),
                         ("steps", unsure.unet)]:
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    unsure.sample(batch["zi"],
                  batch["tokens"],
                  guidance=guidance,
                  steps=5,
                  sampler=sampler,
                  generator=generator(0))
    assert len(layers) > 1 and calls == {"text": 1, "zi": 1, "steps": 5} | dict.fromkeys(
        range(len(layers)), 1)

def test_sizes_of_the_paper():
    from unclip_nb.core import count_parameters
    with torch.device("meta"):
        n = count_parameters(Decoder(DecoderConfig.paper()))
    assert abs(n / 3.5e9 - 1) < 0.05                               # Table 3: 3.5B

# -- the study of the shipped decoder -----------------------------------------------------------------------------------------
@pytest.fixture
def study_of(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent/"benchmarks"))
    import decoder_study
    return decoder_study

def test_fingerprint_survives_saving_and_hears_every_weight(decoder, study_of, tmp_path):
    before = study_of.fingerprint(decoder)
    decoder.save_pretrained(tmp_path)
    assert study_of.fingerprint(Decoder.from_pretrained(tmp_path)) == before and len(before) == 12
    with torch.no_grad():
        decoder.unet.out.bias[0] += 1
    assert study_of.fingerprint(decoder) != before

def test_the_study_is_of_the_shipped_decoder(study_of):
    found, shipped = json.loads(
        (data_path("tiny") / "study.json").read_text()), Decoder.from_pretrained(
            data_path("tiny") / "decoder")
    assert found["decoder"] == shipped.config.clip_fingerprint
    assert found["decoder_weights"] == study_of.fingerprint(
        shipped), "other weights since: python benchmarks/decoder_study.py"

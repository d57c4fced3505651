"Schedules, targets and samplers against diffusers, plain-Python formulas and closed forms."
import copy, math
import numpy as np, pytest, torch
from unclip_nb.core import UnclipError, generator, randn
from unclip_nb.diffusion import (Prediction, Schedule, TARGETS, ddim_sample, ddpm_sample, guided, loss_weight, mixture_denoiser, predict,
                                 q_sample, respace, simple_loss, target)

KINDS = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def plain_abar(kind, T=1000):
    "abar in Python floats, written from the papers."
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    abar, out = 1.0, []
    for i in range(T):
        beta = min(1 - f((i + 1) / T) / f(i / T), 0.999) if kind == "cosine" else 1e-4 + i * (0.02 - 1e-4) / (T - 1)
        abar *= 1 - beta; out.append(abar)
    return torch.tensor(out, dtype=torch.float64)


def theirs(cls, kind, prediction, **kw):
    "A diffusers scheduler with its tables in float64 (theirs are float32, which is 1e-5 off at t = T-1)."
    diffusers = pytest.importorskip("diffusers")
    s = getattr(diffusers, cls)(beta_schedule=KINDS[kind], beta_start=1e-4, beta_end=0.02, prediction_type=NAMES[prediction], **kw)
    s.alphas_cumprod = plain_abar(kind)
    for name in ("one", "final_alpha_cumprod"):
        if hasattr(s, name): setattr(s, name, torch.tensor(1.0, dtype=torch.float64))
    return s


def batch(n=6, dtype=torch.float64):
    return [randn((n, 3, 4, 4), generator("batch", i)).to(dtype) for i in range(2)] + [torch.tensor([0, 1, 250, 700, 998, 999])]


def network(x, t):
    "Stands for a network: any smooth function of x and t."
    return torch.tanh(1.3 * x + 0.2 * x.roll(1, -1)) * (1.2 - t.view(-1, 1, 1, 1).to(x) / 1500)


def denoiser(schedule, kind):
    return lambda x, t: predict(schedule, kind, network(x, t), x, t)


def same(a, b, tol=1e-5):
    assert a.shape == b.shape and (a.double() - b.double()).norm() <= tol * b.double().norm(), (a.double() - b.double()).norm() / b.double().norm()


# ---- schedules and targets

@pytest.mark.parametrize("kind", KINDS)
def test_schedule_equals_the_formula_and_diffusers(kind):
    s = Schedule(kind)
    assert s.abar.dtype == torch.float64 and ((s.abar / plain_abar(kind) - 1).abs() < 1e-9).all()
    diffusers = pytest.importorskip("diffusers")
    ref = diffusers.DDPMScheduler(beta_schedule=KINDS[kind], beta_start=1e-4, beta_end=0.02).alphas_cumprod.double()
    off = (s.abar / ref - 1).abs()
    assert (off[:-1] < 1e-5).all() and off[-1] < 2e-5        # their last beta is 0.999 in float32
    assert (s.abar.diff() < 0).all() and torch.allclose(s.signal ** 2 + s.noise ** 2, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 4, 25, 100])
def test_short_schedules_are_sane(kind, T):
    s = Schedule(kind, T)
    assert len(s.betas) == T and (s.betas > 0).all() and (s.betas <= 0.999).all() and torch.isfinite(s.snr).all()


@pytest.mark.parametrize("kind", KINDS)
def test_noising_and_velocity_equal_diffusers(kind):
    (x0, eps, t), s, ref = batch(), Schedule(kind), theirs("DDPMScheduler", kind, "v")
    same(q_sample(s, x0, t, eps), ref.add_noise(x0, eps, t))
    same(target(s, "v", x0, eps, t), ref.get_velocity(x0, eps, t))


@pytest.mark.parametrize("kind", TARGETS)
def test_predict_inverts_target(kind):
    (x0, eps, t), s = batch(), Schedule()
    x_t = q_sample(s, x0, t, eps)
    p = predict(s, kind, target(s, kind, x0, eps, t), x_t, t)
    same(p.x0, x0, 1e-10); same(p.eps, eps, 1e-10)
    answer = predict(s, kind, network(x_t, t), x_t, t)                       # any answer: its two halves make x_t again
    same(q_sample(s, answer.x0, t, answer.eps), x_t, 1e-10)


def test_dtypes_are_kept_and_half_answers_are_widened():
    s = Schedule()
    for dtype in (torch.float32, torch.float64):
        x0, eps, t = batch(dtype=dtype)
        out = target(s, "v", x0, eps, t).bfloat16()
        assert q_sample(s, x0, t, eps).dtype == dtype and predict(s, "v", out, x0, t).x0.dtype == dtype
        assert simple_loss(s, "v", out, x0, eps, t, "min_snr").dtype == dtype
    assert torch.equal(s.gather("abar", t, x0), s.abar[t].view(-1, 1, 1, 1)) and copy.deepcopy(s).T == 1000


# ---- loss

def test_loss_is_the_mean_square_and_its_gradient_flows():
    (x0, eps, t), s = batch(), Schedule()
    for kind in TARGETS:
        out = network(x0, t).requires_grad_()
        loss = simple_loss(s, kind, out, x0, eps, t)
        assert torch.allclose(loss, torch.nn.functional.mse_loss(out, target(s, kind, x0, eps, t))); loss.backward()
        assert out.grad.abs().sum() > 0


def test_min_snr_equals_the_published_weights():
    s, t = Schedule(), torch.arange(1000)
    abar = plain_abar("cosine")
    snr = abar / (1 - abar)
    clipped = torch.minimum(snr, torch.tensor(5.0))
    for kind, ref in {"eps": clipped / snr, "v": clipped / (snr + 1), "x0": clipped}.items():
        assert torch.allclose(loss_weight(s, kind, t, "min_snr"), ref, rtol=1e-9)


def test_min_snr_counts_the_same_mistake_the_same_for_every_target():
    (x0, eps, t), s = batch(), Schedule()
    x_t = q_sample(s, x0, t, eps)
    wrong = predict(s, "x0", x0 + 0.1 * eps.flip(0), x_t, t)
    losses = [simple_loss(s, k, target(s, k, *wrong, t), x0, eps, t, "min_snr") for k in TARGETS]
    assert max(losses) - min(losses) < 1e-6 * max(losses) and losses[0] > 0


# ---- respacing

def test_respace_is_linspace_with_both_ends():
    for n in (2, 3, 25, 27, 50, 250, 999, 1000): assert respace(1000, n) == np.linspace(0, 999, n).round().astype(int)[::-1].tolist()
    assert respace(1000, 1) == [999] and respace(1, 1) == [0] and respace(7, 7) == [6, 5, 4, 3, 2, 1, 0]
    for T in (8, 50, 999):
        for n in range(1, T + 1):
            ts = respace(T, n)
            assert len(ts) == n and ts == sorted(set(ts), reverse=True) and ts[0] == T - 1 and (n == 1 or ts[-1] == 0)


def test_respace_by_section_is_guided_diffusions():
    def space_timesteps(T, counts):                                          # their loop, in short
        start, out = 0, []
        for i, n in enumerate(counts):
            size = T // len(counts) + (i < T % len(counts)); cur = 0.0
            for _ in range(n): out.append(start + round(cur)); cur += (size - 1) / (n - 1)
            start += size
        return sorted(out, reverse=True)
    for counts in ((10, 10, 3, 2, 2), (5, 4), (50,)): assert respace(1000, counts) == space_timesteps(1000, counts)
    assert len(respace(1000, (10, 10, 3, 2, 2))) == 27


# ---- samplers against diffusers

def reference(sched, x, noise_seed, kind, **kw):
    g = generator(noise_seed)
    for t in sched.timesteps.tolist():
        out = network(x, torch.full((len(x),), t))
        x = sched.step(out, t, x, **({"variance_noise": randn(x.shape, g).to(x)} if kw.get("eta") else {}), **kw).prev_sample
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_equals_diffusers(kind, prediction, clip):
    s, x_T = Schedule(kind), batch()[0]
    for steps, stride in [(38, 27), (10, 111)]:                              # evenly spaced with both ends: 999 = 37 * 27 = 9 * 111
        sched = theirs("DDIMScheduler", kind, prediction, clip_sample=clip, timestep_spacing="linspace")
        sched.set_timesteps(steps)
        assert sched.timesteps.tolist() == respace(1000, steps)
        sched.num_inference_steps = 1000 // stride                           # it takes the previous timestep to be T // this below
        assert 1000 // sched.num_inference_steps == stride
        for eta in (0.0, 0.6):
            ref = reference(sched, x_T, "dice", prediction, eta=eta, use_clipped_model_output=True)
            same(ddim_sample(denoiser(s, prediction), x_T, s, steps, eta, generator("dice"), clip), ref)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("steps", [27, (10, 10, 3, 2, 2), 1])
def test_ddpm_equals_diffusers_at_any_spacing(kind, prediction, steps, monkeypatch):
    s, x_T, g = Schedule(kind), batch()[0], generator("dice")
    sched = theirs("DDPMScheduler", kind, prediction, clip_sample=True, variance_type="fixed_small")
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, dtype=None, **kw: randn(shape, g).to(dtype))
    sched.set_timesteps(timesteps=respace(1000, steps))
    same(ddpm_sample(denoiser(s, prediction), x_T, s, steps, generator("dice")), reference(sched, x_T, "unused", prediction))


def test_float32_follows_float64():
    s, x_T = Schedule(), batch()[0]
    for sampler in (ddim_sample, ddpm_sample):
        a, b = [sampler(denoiser(s, "v"), x_T.to(d), s, 50, generator=generator("dice")) for d in (torch.float32, torch.float64)]
        assert a.dtype == torch.float32; same(a, b, 1e-4)


# ---- samplers against closed forms

def test_mixture_denoiser_equals_numeric_integration():
    s, centres, tau = Schedule(), torch.tensor([[-0.7], [0.2], [0.9]], dtype=torch.float64), 0.1
    grid = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((grid - centres) / tau) ** 2).sum(0)
    for step, x_t in [(100, 0.3), (400, -0.5), (800, 1.1)]:
        post = density * torch.exp(-0.5 * ((x_t - s.signal[step] * grid) / s.noise[step]) ** 2)
        got = mixture_denoiser(s, centres, tau)(torch.tensor([[x_t]], dtype=torch.float64), torch.tensor([step])).x0.item()
        assert abs(got - ((grid * post).sum() / post.sum()).item()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_maps_the_standard_normal_to_the_data(kind):
    s = Schedule(kind)
    bell = mixture_denoiser(s, torch.tensor([[0.3]], dtype=torch.float64), 0.5)
    low, mid, high = ddim_sample(bell, torch.tensor([[-1.], [0.], [1.]], dtype=torch.float64), s, 1000, clip=False).flatten()
    assert abs(mid - 0.3) < 0.005 and abs((high - low) / 2 - 0.5) < 0.002


def test_ddpm_draws_have_the_datas_mean_and_spread():
    s = Schedule()
    bell = mixture_denoiser(s, torch.tensor([[0.3]]), 0.5)
    x = ddpm_sample(bell, randn((20_000, 1), generator("a")), s, 250, generator("b"), clip=False)
    assert abs(x.mean() - 0.3) < 0.015 and abs(x.std() - 0.5) < 0.015


def test_one_ddim_with_eta_one_is_ddpm():
    s, x_T = Schedule(), batch()[0]
    a = ddim_sample(denoiser(s, "x0"), x_T, s, 30, 1.0, generator("g"))
    same(a, ddpm_sample(denoiser(s, "x0"), x_T, s, 30, generator("g")), 1e-9)


def test_pictures_known_by_heart_come_out_exactly():
    s, eight = Schedule(), torch.rand(8, 3, 8, 8, generator=generator("pictures")) * 2 - 1
    for sampler in (ddim_sample, ddpm_sample):
        x = sampler(mixture_denoiser(s, eight), randn((16, 3, 8, 8), generator("T")), s, 60, generator=generator("dice"))
        nearest = (x[:, None] - eight).flatten(2).abs().amax(2).min(1)
        assert nearest.values.max() < 1e-3 and len(nearest.indices.unique()) > 3


# ---- habits

def test_the_last_step_adds_no_noise():
    s, x_T = Schedule(T=25), batch()[0]
    fixed = lambda x, t: predict(s, "x0", torch.full_like(x, 0.5), x, t)
    for steps in (1, 25):
        x = ddpm_sample(fixed, x_T, s, steps, generator("g"))
        assert torch.allclose(x, torch.full_like(x, 0.5), atol=1e-12)        # with noise it would be off by sqrt(beta_0) = 0.07
        assert torch.allclose(ddim_sample(fixed, x_T, s, steps, 1.0, generator("g")), x, atol=1e-12)


def test_without_noise_the_generator_is_not_touched():
    s, g = Schedule(), generator("g")
    before = g.get_state()
    ddim_sample(denoiser(s, "v"), batch()[0], s, 5, 0.0, g)
    assert torch.equal(g.get_state(), before)


def test_a_row_does_not_depend_on_its_batch():
    s, x_T = Schedule(), batch()[0]
    def run(rows, sampler, **kw): return sampler(denoiser(s, "eps"), x_T[rows], s, 12, generator=[generator("row", i) for i in rows], **kw)
    for sampler, kw in ((ddpm_sample, {}), (ddim_sample, {"eta": 1.0})):
        assert torch.allclose(run(range(6), sampler, **kw)[4], run([4], sampler, **kw)[0], atol=1e-12)


def test_clip_holds_the_picture_and_nothing_is_clipped_without_it():
    s, x_T = Schedule(), batch()[0]
    far = lambda x, t: predict(s, "x0", torch.full_like(x, 3.0), x, t)
    for sampler in (ddpm_sample, ddim_sample):
        assert torch.allclose(sampler(far, x_T, s, 10), torch.ones_like(x_T)) and torch.allclose(sampler(far, x_T, s, 10, clip=False), torch.full_like(x_T, 3.0))


def test_guidance():
    (a, b, t), s = batch(), Schedule()
    x_t = q_sample(s, a, t, b)
    cond, null = predict(s, "v", network(x_t, t), x_t, t), predict(s, "v", network(-x_t, t), x_t, t)
    for got, want in zip(guided(cond, null, 1.0) + guided(cond, null, 0.0), cond + null): assert torch.equal(got, want)
    g = guided(cond, null, 3.0)
    same(g.eps, null.eps + 3 * (cond.eps - null.eps), 1e-10); same(g.x0, predict(s, "eps", g.eps, x_t, t).x0, 1e-6)


def test_guidance_of_gaussians_is_exact():
    "For N(c, tau^2) against N(0, tau^2) guidance s is the same as asking for N(s c, tau^2)."
    s, x, t = Schedule(), randn((50, 2), generator("x")).double(), torch.full((50,), 600)
    c = torch.tensor([[0.4, -0.2]], dtype=torch.float64)
    of = lambda centre: mixture_denoiser(s, centre, 0.3)(x, t)
    same(guided(of(c), of(0 * c), 2.5).x0, of(2.5 * c).x0, 1e-10)


def test_the_bar_is_shown_only_when_asked_for(capsys):
    s, x_T = Schedule(), batch()[0]
    ddim_sample(denoiser(s, "v"), x_T, s, 3); assert capsys.readouterr().err == ""
    ddpm_sample(denoiser(s, "v"), x_T, s, 3, progress="decoder"); assert "decoder" in capsys.readouterr().err


@pytest.mark.parametrize("wrong, says", [
    (lambda s, x, t: Schedule("sigmoid"), "sigmoid"), (lambda s, x, t: Schedule(T=0), "T=0"),
    (lambda s, x, t: target(s, "noise", x, x, t), "noise"), (lambda s, x, t: predict(s, "epsilon", x, x, t), "epsilon"),
    (lambda s, x, t: simple_loss(s, "v", x, x, x, t, "snr"), "snr"), (lambda s, x, t: respace(1000, 1001), "1001"),
    (lambda s, x, t: respace(1000, 0), "0 of 1000"), (lambda s, x, t: respace(1000, ()), "steps"),
    (lambda s, x, t: ddim_sample(denoiser(s, "v"), x, s, 2000), "2000"),
])
def test_mistakes_are_named(wrong, says):
    with pytest.raises(UnclipError, match=says) as e: wrong(Schedule(), *batch()[::2])
    assert "\n" not in str(e.value)

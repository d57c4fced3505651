"Schedules, targets and samplers against diffusers, plain-Python formulas and closed forms."
import copy, math, subprocess, sys
import numpy as np, pytest, torch
from unclip_nb.core import UnclipError, generator, randn
from unclip_nb.diffusion import (Prediction, Schedule, TARGETS, check_timesteps, ddim_sample,
                                 ddpm_sample, guided, loss_weight, mixture_denoiser, predict,
                                 q_sample, simple_loss, spaced, target)
from unclip_nb.solvers import dpm_sample, fast27, in_sections, spaced_snr, strided
from unclip_nb.variance import (bits_per_dim, hybrid_loss, normal_kl, pixel_log_prob,
                                split_variance, vlb_terms)

SECTIONS = in_sections((10, 10, 3, 2, 2))
SNR20 = [999, 980, 968, 949, 919, 871, 798, 690, 551, 401, 268, 170, 105, 62, 36, 20, 10, 4, 1, 0]

KINDS = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def plain_abar(kind, T=1000):
    "abar in Python floats, written from the papers."
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    abar, out = 1.0, []
    for i in range(T):
        beta = min(1 - f((i + 1) / T) / f(i / T),
                   0.999) if kind == "cosine" else 1e-4 + i * (0.02 - 1e-4) / (T - 1)
        abar *= 1 - beta
        out.append(abar)
    return torch.tensor(out, dtype=torch.float64)


def theirs(cls, kind, prediction, **kw):
    "A diffusers scheduler with its tables in float64 (theirs are float32, which is 1e-5 off at t = T-1)."
    diffusers = pytest.importorskip("diffusers")
    s = getattr(diffusers, cls)(beta_schedule=KINDS[kind],
                                beta_start=1e-4,
                                beta_end=0.02,
                                prediction_type=NAMES[prediction],
                                **kw)
    s.alphas_cumprod = plain_abar(kind)
    for name in ("one", "final_alpha_cumprod"):
        if hasattr(s, name):
            setattr(s, name, torch.tensor(1.0, dtype=torch.float64))
    return s


def batch(n=6, dtype=torch.float64):
    return [randn((n, 3, 4, 4), generator("batch", i)).to(dtype)
            for i in range(2)] + [torch.tensor([0, 1, 250, 700, 998, 999])]


def network(x, t):
    "Stands for a network: any smooth function of x and t."
    return torch.tanh(1.3 * x + 0.2 * x.roll(1, -1)) * (1.2 - t.view(-1, 1, 1, 1).to(x) / 1500)


def denoiser(schedule, kind):
    return lambda x, t: predict(schedule, kind, network(x, t), x, t)


def same(a, b, tol=1e-5):
    assert a.shape == b.shape and (a.double() - b.double()).norm() <= tol * b.double().norm(), (
        a.double() - b.double()).norm() / b.double().norm()


# ---- schedules and targets

@pytest.mark.parametrize("kind", KINDS)
def test_schedule_equals_the_formula_and_diffusers(kind):
    s = Schedule(kind)
    assert s.abar.dtype == torch.float64 and ((s.abar / plain_abar(kind) - 1).abs() < 1e-9).all()
    diffusers = pytest.importorskip("diffusers")
    ref = diffusers.DDPMScheduler(beta_schedule=KINDS[kind], beta_start=1e-4,
                                  beta_end=0.02).alphas_cumprod.double()
    off = (s.abar / ref - 1).abs()
    assert (off[:-1] < 1e-5).all() and off[-1] < 2e-5        # their last beta is 0.999 in float32
    assert (s.abar.diff() < 0).all() and torch.allclose(s.signal**2 + s.noise**2,
                                                        torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 4, 25, 100])
def test_short_schedules_are_sane(kind, T):
    s = Schedule(kind, T)
    assert len(s.betas) == T and (s.betas > 0).all() and (s.betas
                                                          <= 0.999).all() and torch.isfinite(
                                                              s.snr).all()
    assert s.x0_weight.shape == s.log_small.shape == (T, ) and torch.isfinite(
        s.log_small).all() and (s.log_small <= s.log_large + 1e-12).all()
    assert abs(s.x0_weight[0] - 1) < 1e-9 and (T == 1 or s.log_small[0] == s.log_small[1])


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
    same(p.x0, x0, 1e-10)
    same(p.eps, eps, 1e-10)
    answer = predict(s, kind, network(x_t, t), x_t, t)                       # any answer: its two halves make x_t again
    same(q_sample(s, answer.x0, t, answer.eps), x_t, 1e-10)


def test_dtypes_are_kept_and_half_answers_are_widened():
    s = Schedule()
    for dtype in (torch.float32, torch.float64):
        x0, eps, t = batch(dtype=dtype)
        out = target(s, "v", x0, eps, t).bfloat16()
        assert q_sample(s, x0, t, eps).dtype == dtype and predict(s, "v", out, x0,
                                                                  t).x0.dtype == dtype
        assert simple_loss(s, "v", out, x0, eps, t, "min_snr").dtype == dtype
    assert torch.equal(s.gather("abar", t, x0), s.abar[t].view(-1, 1, 1,
                                                               1)) and copy.deepcopy(s).T == 1000


# ---- loss

def test_loss_is_the_mean_square_and_its_gradient_flows():
    (x0, eps, t), s = batch(), Schedule()
    for kind in TARGETS:
        out = network(x0, t).requires_grad_()
        loss = simple_loss(s, kind, out, x0, eps, t)
        assert torch.allclose(loss, torch.nn.functional.mse_loss(out, target(s, kind, x0, eps, t)))
        loss.backward()
        assert out.grad.abs().sum() > 0


def test_min_snr_equals_the_published_weights():
    s, t = Schedule(), torch.arange(1000)
    abar = plain_abar("cosine")
    snr = abar / (1 - abar)
    clipped = torch.minimum(snr, torch.tensor(5.0))
    for kind, ref in {"eps": clipped / snr, "v": clipped / (snr + 1), "x0": clipped}.items():
        assert torch.allclose(loss_weight(s, kind, t, "min_snr"), ref, rtol=1e-9)


def test_sqrt_snr_is_the_ratio_of_signal_to_noise_at_most_three():
    s, t = Schedule(), torch.arange(1000)
    abar = plain_abar("cosine")
    omega = torch.minimum((abar.sqrt() / (1 - abar).sqrt()), torch.tensor(3.0))
    for kind, per_x0 in {"eps": abar / (1 - abar), "v": 1 / (1 - abar),
                         "x0": torch.ones(1000)}.items():
        assert torch.allclose(loss_weight(s, kind, t, "sqrt_snr"), omega / per_x0, rtol=1e-9)


@pytest.mark.parametrize("weighting", ["min_snr", "sqrt_snr"])
def test_a_weighting_counts_the_same_mistake_the_same_for_every_target(weighting):
    (x0, eps, t), s = batch(), Schedule()
    x_t = q_sample(s, x0, t, eps)
    wrong = predict(s, "x0", x0 + 0.1 * eps.flip(0), x_t, t)
    losses = [
        simple_loss(s, k, target(s, k, wrong.x0, wrong.eps, t), x0, eps, t, weighting)
        for k in TARGETS
    ]
    assert max(losses) - min(losses) < 1e-6 * max(losses) and losses[0] > 0


# ---- respacing

def test_spaced_is_linspace_with_both_ends():
    for n in (2, 3, 25, 27, 50, 250, 999, 1000):
        assert spaced(n) == np.linspace(0, 999, n).round().astype(int)[::-1].tolist()
    assert spaced(1) == [999] and spaced(1, 1) == [0] and spaced(7, 7) == [6, 5, 4, 3, 2, 1, 0]
    for T in (8, 50, 999):
        for n in range(1, T + 1):
            ts = spaced(n, T)
            assert len(ts) == n and ts == sorted(
                set(ts), reverse=True) and ts[0] == T - 1 and (n == 1 or ts[-1] == 0)


def test_sections_are_guided_diffusions():
    def space_timesteps(T, counts):                                          # their loop, in short
        start, out = 0, []
        for i, n in enumerate(counts):
            size = T // len(counts) + (i < T % len(counts))
            cur = 0.0
            for _ in range(n):
                out.append(start + round(cur))
                cur += (size - 1) / (n - 1)
            start += size
        return sorted(out, reverse=True)
    for counts in ((10, 10, 3, 2, 2), (5, 4), (50,)):
        assert in_sections(counts) == space_timesteps(1000, counts)
    authors = {*space_timesteps(1000, (10, 10, 3, 2, 2))} - {999} | {997}             # as they build "fast27"
    assert fast27() == sorted(authors, reverse=True) and len(fast27()) == 27


def test_strided_steps_leave_out_the_noisiest():
    assert strided(50) == list(range(0, 1000, 20))[::-1]
    assert strided(250) == list(range(0, 1000, 4))[::-1]


def test_the_lists_are_those_that_pictures_were_drawn_with():
    "Written down when the samplers still took a number or a name: the same seed draws the same picture."
    assert spaced(7) == [999, 832, 666, 500, 333, 166, 0]
    assert spaced(25)[:3] == [999, 957, 916] and spaced(25)[-2:] == [42, 0]
    assert spaced(50, 980)[:3] == [979, 959, 939] and spaced(50, 980)[-2:] == [20, 0]
    assert SECTIONS == [999, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266, 244, 222,
                        200, 199, 177, 155, 133, 111, 88, 66, 44, 22, 0]
    assert spaced_snr(10, Schedule()) == [999, 980, 943, 838, 588, 268, 92, 27, 5, 0]
    assert spaced_snr(20, Schedule()) == SNR20


@pytest.mark.parametrize("kind", KINDS)
def test_spaced_snr_is_even_and_complete(kind):
    s = Schedule(kind)
    clock = plain_abar(kind)
    clock = (clock / (1 - clock)).log() / 2
    ts = spaced_snr(12, s)
    jumps = clock[ts[1:]].diff()
    assert ts[0] == 999 and ts[-1] == 0 and abs(clock[ts[1]] +
                                                3.5) < 0.1 and jumps.max() / jumps[:-3].min() < 1.5
    for T in (1, 2, 25, 1000):
        for n in {1, 2, min(T, 40), T}:
            ts = spaced_snr(min(n, T), Schedule(kind, T))
            assert len(ts) == min(n, T) and ts == sorted(
                set(ts), reverse=True) and ts[0] == T - 1 and ts[-1] in (0, T - 1 if n == 1 else 0)
    assert spaced_snr(1000, s) == spaced(1000)


# ---- samplers against diffusers

def reference(sched, x, noise_seed, kind, **kw):
    g = generator(noise_seed)
    for t in sched.timesteps.tolist():
        out = network(x, torch.full((len(x),), t))
        x = sched.step(out, t, x,
                       **({"variance_noise": randn(x.shape, g).to(x)} if kw.get("eta") else {}),
                       **kw).prev_sample
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_equals_diffusers(kind, prediction, clip):
    s, x_T = Schedule(kind), batch()[0]
    for steps, stride in [(38, 27), (10, 111)]:                              # evenly spaced with both ends: 999 = 37 * 27 = 9 * 111
        sched = theirs("DDIMScheduler",
                       kind,
                       prediction,
                       clip_sample=clip,
                       timestep_spacing="linspace")
        sched.set_timesteps(steps)
        assert sched.timesteps.tolist() == spaced(steps)
        sched.num_inference_steps = 1000 // stride                           # it takes the previous timestep to be T // this below
        assert 1000 // sched.num_inference_steps == stride
        for eta in (0.0, 0.6):
            ref = reference(sched, x_T, "dice", prediction, eta=eta, use_clipped_model_output=True)
            same(ddim_sample(denoiser(s, prediction), x_T, s, spaced(steps), eta, generator("dice"),
                             clip),
                 ref)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("steps", [spaced(27), SECTIONS, spaced(1)], ids=len)
def test_ddpm_equals_diffusers_at_any_spacing(kind, prediction, steps, monkeypatch):
    s, x_T, g = Schedule(kind), batch()[0], generator("dice")
    sched = theirs("DDPMScheduler", kind, prediction, clip_sample=True, variance_type="fixed_small")
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor",
                        lambda shape, dtype=None, **kw: randn(shape, g).to(dtype))
    sched.set_timesteps(timesteps=steps)
    same(ddpm_sample(denoiser(s, prediction), x_T, s, steps, generator("dice")),
         reference(sched, x_T, "unused", prediction))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("steps", [spaced(20), spaced_snr(20, Schedule()), SECTIONS, spaced_snr(2, Schedule())])
def test_dpm_solver_equals_diffusers(kind, prediction, steps):
    s, x_T = Schedule(kind), batch()[0]
    sched = theirs("DPMSolverMultistepScheduler",
                   kind,
                   prediction,
                   algorithm_type="dpmsolver++",
                   solver_order=2,
                   solver_type="midpoint",
                   lower_order_final=True,
                   final_sigmas_type="zero")
    sched.set_timesteps(timesteps=steps)
    abar = plain_abar(kind)[sched.timesteps]
    sched.sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])      # theirs are float32
    same(dpm_sample(denoiser(s, prediction), x_T, s, steps, clip=False),
         reference(sched, x_T, "unused", prediction))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("steps", [spaced(15), SECTIONS], ids=len)
def test_learned_variance_equals_diffusers(kind, prediction, steps, monkeypatch):
    s, x_T, g = Schedule(kind), batch()[0], generator("dice")
    sched = theirs("DDPMScheduler",
                   kind,
                   prediction,
                   clip_sample=True,
                   variance_type="learned_range")
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor",
                        lambda shape, dtype=None, **kw: randn(shape, g).to(dtype))
    sched.set_timesteps(timesteps=steps)
    both = lambda x, t: torch.cat([network(x, t), torch.sin(3 * x.flip(1))], 1)      # six channels: answers, and v in -1 .. 1
    ref = x_T
    for t in sched.timesteps.tolist():
        ref = sched.step(both(ref, torch.full((len(ref),), t)), t, ref).prev_sample
    def denoise(x, t):
        answer, mix = split_variance(both(x, t))
        assert answer.shape == mix.shape == x.shape and mix.min() >= 0 and mix.max() <= 1
        return predict(s, prediction, answer, x, t)._replace(mix=mix)
    ours = ddpm_sample(denoise, x_T, s, steps, generator("dice"))
    same(ours, ref)
    small = ddpm_sample(denoiser(s, prediction), x_T, s, steps, generator("dice"))
    assert (ours - small).norm() > 1e-3 * small.norm()                               # it matters


def test_float32_follows_float64():
    s, x_T = Schedule(), batch()[0]
    for sampler in (ddim_sample, ddpm_sample, dpm_sample):
        a, b = [
            sampler(denoiser(s, "v"), x_T.to(d), s, spaced(50), generator=generator("dice"))
            for d in (torch.float32, torch.float64)
        ]
        assert a.dtype == torch.float32
        same(a, b, 1e-4)


# ---- samplers against closed forms

def test_mixture_denoiser_equals_numeric_integration():
    s, centres, tau = Schedule(), torch.tensor([[-0.7], [0.2], [0.9]], dtype=torch.float64), 0.1
    grid = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((grid - centres) / tau) ** 2).sum(0)
    for step, x_t in [(100, 0.3), (400, -0.5), (800, 1.1)]:
        post = density * torch.exp(-0.5 * ((x_t - s.signal[step] * grid) / s.noise[step]) ** 2)
        got = mixture_denoiser(s, centres, tau)(torch.tensor([[x_t]], dtype=torch.float64),
                                                torch.tensor([step])).x0.item()
        assert abs(got - ((grid * post).sum() / post.sum()).item()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_maps_the_standard_normal_to_the_data(kind):
    s = Schedule(kind)
    bell = mixture_denoiser(s, torch.tensor([[0.3]], dtype=torch.float64), 0.5)
    low, mid, high = ddim_sample(bell,
                                 torch.tensor([[-1.], [0.], [1.]], dtype=torch.float64),
                                 s,
                                 clip=False).flatten()
    assert abs(mid - 0.3) < 0.005 and abs((high - low) / 2 - 0.5) < 0.002


def test_ddpm_draws_have_the_datas_mean_and_spread():
    s = Schedule()
    bell = mixture_denoiser(s, torch.tensor([[0.3]]), 0.5)
    x = ddpm_sample(bell, randn((20_000, 1), generator("a")), s, spaced(250), generator("b"), clip=False)
    assert abs(x.mean() - 0.3) < 0.015 and abs(x.std() - 0.5) < 0.015


@pytest.mark.parametrize("steps", [*map(spaced, (1, 2, 4, 30)), in_sections((3, 2))], ids=len)
def test_analytic_variance_makes_gaussians_exact_at_any_steps(steps):
    "With the true cov each step is the exact reverse step: measured by moments carried through a sampler that is linear in its noise."
    s, tau = Schedule(), 0.5
    bell = mixture_denoiser(s, torch.tensor([[0.3]], dtype=torch.float64), tau, variance=True)
    n = len(steps) - 1
    pushes = torch.eye(n + 2, n + 1, dtype=torch.float64)                            # row k: a unit of noise at one place; the last row: none
    draws = iter(pushes[:, 1:].T)
    def noise(shape, g, device): return next(draws)[:, None]
    with pytest.MonkeyPatch.context() as m:
        m.setattr("unclip_nb.diffusion.randn", noise)
        out = ddpm_sample(bell, pushes[:, :1], s, steps, clip=False).flatten()
    mean, var = out[-1], ((out[:-1] - out[-1]) ** 2).sum()
    last = steps[-1]
    unsaid = tau ** 2 * (1 - s.abar[last]) / (1 - s.abar[last] + s.abar[last] * tau ** 2)     # the last step adds no noise
    assert abs(mean - 0.3) < 1e-4 and abs(var + unsaid - tau ** 2) < 1e-6


def test_cov_per_row_and_mix_at_both_ends():
    s, x_T = Schedule(), batch()[0]
    base = denoiser(s, "x0")

    def run(**fields):
        return ddpm_sample(lambda x, t: base(x, t)._replace(**{k: f(x)
                                                               for k, f in fields.items()}), x_T, s,
                           spaced(9), generator("g"))
    same(run(mix=torch.zeros_like), run(), 1e-9)
    same(run(cov=lambda x: x.new_zeros(6, 1, 1, 1)), run(), 1e-12)
    rows = torch.tensor([0., .1, .2, .3, .4, .5], dtype=torch.float64).view(6, 1, 1, 1)
    same(run(cov=lambda x: rows)[:1], run()[:1], 1e-12)
    same(run(cov=lambda x: rows)[3], run(cov=lambda x: torch.full_like(x, 0.3))[3], 1e-12)
    assert (run(cov=lambda x: rows)[5] - run()[5]).norm() > 0.05
    seen = []                                                                        # mix = 1: the betas of the respaced process
    def note(shape, g, device): seen.append(1); return torch.ones(shape)
    still = lambda x, t: Prediction(0 * x, x, mix=torch.ones_like(x))
    with pytest.MonkeyPatch.context() as m:
        m.setattr("unclip_nb.diffusion.randn", note)
        x = ddpm_sample(lambda x, t: still(x, t) if t[0] == 999 else Prediction(x, x),
                        torch.zeros(1, 1, dtype=torch.float64), s, spaced(2))
    assert len(seen) == 1 and torch.allclose(x, (1 - s.abar[999] / s.abar[0]).sqrt())


def test_mixture_variance_equals_numeric_integration():
    s, tau = Schedule(), 0.1
    centres = torch.tensor([[-0.7], [0.2], [0.9]], dtype=torch.float64)
    grid = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((grid - centres) / tau) ** 2).sum(0)
    for step, x_t in [(100, 0.3), (400, -0.5), (800, 1.1)]:
        post = density * torch.exp(-0.5 * ((x_t - s.signal[step] * grid) / s.noise[step]) ** 2)
        mean = (grid * post).sum() / post.sum()
        var = ((grid - mean) ** 2 * post).sum() / post.sum()
        p = mixture_denoiser(s, centres, tau, variance=True)(torch.tensor([[x_t]],
                                                                          dtype=torch.float64),
                                                             torch.tensor([step]))
        assert abs(p.x0 - mean) < 1e-6 and abs(p.cov - var) < 1e-6
    assert mixture_denoiser(s, torch.zeros(5, 3, 4, 4),
                            variance=True)(torch.zeros(2, 3, 4, 4),
                                           torch.tensor([1, 2])).cov.shape == (2, 1, 1, 1)


def test_dpm_solver_is_of_second_order():
    s, start = Schedule(T=1000), torch.tensor([[-1.], [0.2], [1.5]], dtype=torch.float64)
    pair = mixture_denoiser(s, torch.tensor([[-0.5], [0.5]], dtype=torch.float64), 0.2)
    truth = dpm_sample(pair, start, s, spaced_snr(500, s), clip=False)
    def off(f, n):
        steps = spaced_snr(n, s) if f is dpm_sample else spaced(n)
        return (f(pair, start, s, steps, clip=False) - truth).abs().max().item()

    assert off(dpm_sample, 20) / off(dpm_sample, 80) > 9 and off(ddim_sample, 20) / off(
        ddim_sample, 80) < 6  # 16 and 4, were they perfect
    assert off(dpm_sample, 20) < off(ddim_sample, 20) / 2 and off(dpm_sample, 20) < off(
        ddim_sample, 50)


# ---- the variational bound

def parts(n=4):
    x0 = (torch.rand(n, 3, 4, 4, generator=generator("x0")).double() * 255).round() / 127.5 - 1
    noise, v = randn(x0.shape, generator("n")).double(), torch.sin(
        5 * randn(x0.shape, generator("v"))).double()
    return x0, noise, v


def test_kl_equals_torch():
    m1, l1, m2, l2 = randn((4, 200), generator("kl")).double()
    N = torch.distributions.Normal
    same(normal_kl(m1, l1, m2, l2),
         torch.distributions.kl_divergence(N(m1, (l1 / 2).exp()), N(m2, (l2 / 2).exp())), 1e-10)


def test_pixel_areas_add_up_and_equal_torch():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, sd in [(0.0, 0.5), (0.99, 0.02), (-1.3, 0.1), (0.3, 0.001)]:
        logp = pixel_log_prob(levels,
                              torch.tensor(mean).double(),
                              torch.tensor(sd).double().log() * 2)
        cdf = torch.distributions.Normal(torch.tensor(mean).double(), sd).cdf
        areas = cdf(levels + 1 / 255) - cdf(levels - 1 / 255)
        areas[0], areas[-1] = cdf(levels[0] + 1 / 255), 1 - cdf(levels[-1] - 1 / 255)
        likely = areas > 1e-9
        assert abs(logp.exp().sum() - 1) < 1e-6 and torch.allclose(
            logp[likely], areas[likely].log(), atol=1e-6)
        assert torch.isfinite(logp).all()
    x = torch.tensor([-1., 0., 1.], requires_grad=True)                              # far off, and in float32: still finite, gradient too
    logp = pixel_log_prob(-x.detach(), x, torch.full((3,), -10.))
    logp.sum().backward()
    assert torch.isfinite(logp).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bound_equals_the_definition(kind):
    "Each term from q's and p's own Gaussians, by torch.distributions; the authors' choice for the variance at t = 0."
    (x0, noise, v), s, abar = parts(), Schedule(kind), plain_abar(kind)
    N, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    for t in (0, 1, 2, 300, 999):
        ts = torch.full((4,), t)
        x_t = q_sample(s, x0, ts, noise)
        p = predict(s, "v", network(x_t, ts), x_t, ts)._replace(mix=(v + 1) / 2)
        prev = abar[t - 1] if t else torch.tensor(1.).double()
        beta = 1 - abar[t] / prev
        small = beta * (1 - prev) / (1 - abar[t]) if t else (1 - abar[1] / abar[0]) * (
            1 - abar[0]) / (1 - abar[1])
        mean = lambda guess: prev.sqrt() * beta / (1 - abar[t]) * guess + (1 - beta).sqrt() * (
            1 - prev) / (1 - abar[t]) * x_t
        sd = ((v + 1) / 2 * beta.log() + (1 - v) / 2 * small.log()).exp().sqrt()
        if t:
            nats = kl(N(mean(x0), small.sqrt()), N(mean(p.x0), sd))
        else:
            nats = -pixel_log_prob(x0, p.x0, 2 * sd.log())
        same(vlb_terms(s, p, x0, ts), nats.flatten(1).mean(1) / math.log(2), 1e-5)
        plain = vlb_terms(s, p._replace(mix=None), x0,
                          ts), vlb_terms(s, p._replace(mix=torch.zeros_like(v)), x0, ts)
        same(*plain, 1e-9)
    cov = torch.full((4, 1, 1, 1), 0.2).double()
    w = prev.sqrt() * beta / (1 - abar[t])
    same(
        vlb_terms(s, p._replace(mix=None, cov=cov), x0, ts),
        kl(N(mean(x0), small.sqrt()), N(mean(p.x0),
                                        (small + w**2 * 0.2).sqrt())).flatten(1).mean(1) /
        math.log(2))


def test_steps_may_differ_in_a_batch():
    (x0, noise, v), s, t = parts(), Schedule(), torch.tensor([0, 5, 0, 900])
    p = predict(s, "x0", network(x0, t), q_sample(s, x0, t, noise), t)._replace(mix=v)
    for i in range(4):
        same(
            vlb_terms(s, p, x0, t)[i:i + 1],
            vlb_terms(s, Prediction(p.x0[i:i + 1], p.eps[i:i + 1], v[i:i + 1]), x0[i:i + 1],
                      t[i:i + 1]), 1e-12)


def test_hybrid_loss_is_the_sum_and_the_mean_is_detached():
    (x0, noise, v), t = parts(), torch.tensor([0, 3, 400, 999])
    for T, t in ((1000, t), (100, t // 10)):
        s = Schedule(T=T)
        x_t = q_sample(s, x0, t, noise)
        out = torch.cat([network(x_t, t), v], 1).requires_grad_()
        for kind in TARGETS:
            loss = hybrid_loss(s, kind, out, x0, noise, t)
            p = predict(s, kind, out[:, :3], x_t, t)._replace(mix=(v + 1) / 2)
            same(
                loss,
                simple_loss(s, kind, out[:, :3], x0, noise, t) +
                T / 1000 * vlb_terms(s, p, x0, t).mean(), 1e-9)
            grad, = torch.autograd.grad(loss, out)
            alone, = torch.autograd.grad(simple_loss(s, kind, out[:, :3], x0, noise, t), out)
            assert torch.equal(
                grad[:, :3],
                alone[:, :3]) and alone[:, 3:].abs().sum() == 0 and grad[:, 3:].abs().sum() > 0
    half = hybrid_loss(s, "v", out.detach().bfloat16(), x0.float(), noise.float(), t)
    assert half.dtype == torch.float32 and torch.isfinite(half)


COMPILED = """
import torch
from unclip_nb.diffusion import Schedule
from unclip_nb.variance import hybrid_loss
s = Schedule()
g = torch.Generator().manual_seed(0)
x0, noise, t = torch.rand(6, 3, 4, 4, generator=g) * 2 - 1, torch.randn(6, 3, 4, 4, generator=g), torch.tensor([0, 1, 0, 500, 999, 3])
def run(f):
    out = torch.randn(6, 6, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = f(s, "x0", out, x0, noise, t); loss.backward()
    return loss.detach(), out.grad
breaks = torch._dynamo.explain(hybrid_loss)(s, "x0", torch.zeros(6, 6, 4, 4), x0, noise, t).break_reasons      # with fullgraph=True alone shapes from data pass
assert not breaks, breaks
compiled = torch.compile(hybrid_loss, fullgraph=True, backend="eager")
for a, b in zip(run(compiled), run(hybrid_loss)): torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
"""

def test_hybrid_loss_is_one_graph_whatever_the_steps():
    "Which rows are at t = 0 is data: were it a shape, compiling would fall back to Python in the middle of the loss."
    done = subprocess.run([sys.executable, "-c", COMPILED],
                          capture_output=True,
                          text=True,
                          timeout=600)  # without the checks of shapes
    assert done.returncode == 0, done.stderr[-2000:]


def test_rows_elsewhere_do_not_poison_the_gradient_of_the_pixels():
    "Every row goes through both formulas; what it is not asked for must not send back infinities."
    (x0, noise, v), s, t = parts(), Schedule(), torch.tensor([0, 1, 500, 999])
    mix, guess = (2 * v.float()).requires_grad_(), (10 * noise.float()).requires_grad_()
    vlb_terms(s, Prediction(guess, guess, mix), x0.float(), t)[1:].sum().backward()
    for x in (guess, mix):
        assert torch.isfinite(
            x.grad).all() and x.grad[0].abs().sum() == 0 and (x.grad[1:].abs().amax(
                (1, 2, 3)) > 0).all()


def test_the_best_mix_is_the_analytic_variance():
    "The bound's gradient for mix vanishes, on average, where eq. 11 gives the variance of eq. 10."
    s, t = Schedule(T=20), torch.full((200_000,), 6)
    bell = mixture_denoiser(s, torch.tensor([[0.3]], dtype=torch.float64), 0.5, variance=True)
    x0, noise = (randn((200_000, 1), generator(k)).double() for k in "ab")
    x0 = 0.3 + 0.5 * x0
    p = bell(q_sample(s, x0, t, noise), t)
    best = ((s.log_small[6].exp() + s.x0_weight[6]**2 * p.cov[0]).log() -
            s.log_small[6]) / (s.log_large[6] - s.log_small[6])
    def slope(m):
        m = torch.full((1, 1), m, dtype=torch.float64, requires_grad=True)
        vlb_terms(s, p._replace(mix=m, cov=None), x0, t).mean().backward()
        return m.grad.item()

    assert 0.05 < best < 0.95 and slope(best.item() - 0.1) < -5 * abs(slope(
        best.item())) and slope(best.item() + 0.1) > 5 * abs(slope(best.item()))


def test_one_of_eight_costs_three_bits():
    s, pictures = Schedule(T=250), torch.rand(8, 3, 4, 4, generator=generator("p")) * 2 - 1
    bits = bits_per_dim(mixture_denoiser(s, pictures), pictures.repeat(12, 1, 1, 1), s,
                        generator("bits"))
    assert bits.shape == (251, 96)
    per_picture = bits.mean(1) * 48
    assert 2.9 < per_picture[1:-1].sum() < 3.5 and (bits >= 0).all()                 # finitely many steps pay a little more
    prior = torch.distributions.kl_divergence(
        torch.distributions.Normal(s.signal[-1] * pictures.double(), s.noise[-1]),
        torch.distributions.Normal(0., 1.))
    assert torch.allclose(bits[-1][:8].double(), prior.flatten(1).mean(1) / math.log(2), atol=1e-7)


def test_one_ddim_with_eta_one_is_ddpm():
    s, x_T = Schedule(), batch()[0]
    a = ddim_sample(denoiser(s, "x0"), x_T, s, spaced(30), 1.0, generator("g"))
    same(a, ddpm_sample(denoiser(s, "x0"), x_T, s, spaced(30), generator("g")), 1e-9)


def test_pictures_known_by_heart_come_out_exactly():
    s, eight = Schedule(), torch.rand(8, 3, 8, 8, generator=generator("pictures")) * 2 - 1
    for sampler in (ddim_sample, ddpm_sample, dpm_sample):
        x = sampler(mixture_denoiser(s, eight),
                    randn((16, 3, 8, 8), generator("T")),
                    s,
                    spaced(60),
                    generator=generator("dice"))
        nearest = (x[:, None] - eight).flatten(2).abs().amax(2).min(1)
        assert nearest.values.max() < 1e-3 and len(nearest.indices.unique()) > 3


# ---- habits

def test_the_last_step_adds_no_noise():
    s, x_T = Schedule(T=25), batch()[0]
    fixed = lambda x, t: predict(s, "x0", torch.full_like(x, 0.5), x, t)
    for steps in (1, 25):
        x = ddpm_sample(fixed, x_T, s, spaced(steps, 25), generator("g"))
        assert torch.allclose(x, torch.full_like(x, 0.5), atol=1e-12)        # with noise it would be off by sqrt(beta_0) = 0.07
        assert torch.allclose(ddim_sample(fixed, x_T, s, spaced(steps, 25), 1.0, generator("g")), x, atol=1e-12)


def test_without_noise_the_generator_is_not_touched():
    s, g = Schedule(), generator("g")
    before = g.get_state()
    ddim_sample(denoiser(s, "v"), batch()[0], s, spaced(5), 0.0, g)
    assert torch.equal(g.get_state(), before)


def test_a_row_does_not_depend_on_its_batch():
    s, x_T = Schedule(), batch()[0]

    def run(rows, sampler, **kw):
        return sampler(denoiser(s, "eps"),
                       x_T[rows],
                       s,
                       spaced(12),
                       generator=[generator("row", i) for i in rows],
                       **kw)
    for sampler, kw in ((ddpm_sample, {}), (ddim_sample, {"eta": 1.0})):
        assert torch.allclose(run(range(6), sampler, **kw)[4],
                              run([4], sampler, **kw)[0],
                              atol=1e-12)


def test_clip_holds_the_picture_and_nothing_is_clipped_without_it():
    s, x_T = Schedule(), batch()[0]
    far = lambda x, t: predict(s, "x0", torch.full_like(x, 3.0), x, t)
    for sampler in (ddpm_sample, ddim_sample, dpm_sample):
        assert torch.allclose(sampler(far, x_T, s, spaced(10)), torch.ones_like(x_T)) and torch.allclose(
            sampler(far, x_T, s, spaced(10), clip=False), torch.full_like(x_T, 3.0))


def test_guidance():
    (a, b, t), s = batch(), Schedule()
    x_t = q_sample(s, a, t, b)
    cond, null = predict(s, "v", network(x_t, t), x_t, t), predict(s, "v", network(-x_t, t), x_t, t)
    for got, want in zip(
            guided(cond, null, 1.0)[:2] + guided(cond, null, 0.0)[:2], cond[:2] + null[:2]):
        assert torch.equal(got, want)
    mixed = guided(cond._replace(mix=x_t, cov=t), null._replace(mix=-x_t), 3.0)
    assert mixed.mix is x_t and mixed.cov is t and torch.equal(mixed.x0, guided(cond, null, 3.0).x0)    # only the mean is guided
    g = guided(cond, null, 3.0)
    same(g.eps, null.eps + 3 * (cond.eps - null.eps), 1e-10)
    same(g.x0, predict(s, "eps", g.eps, x_t, t).x0, 1e-6)


def test_guidance_of_gaussians_is_exact():
    "For N(c, tau^2) against N(0, tau^2) guidance s is the same as asking for N(s c, tau^2)."
    s, x, t = Schedule(), randn((50, 2), generator("x")).double(), torch.full((50,), 600)
    c = torch.tensor([[0.4, -0.2]], dtype=torch.float64)
    of = lambda centre: mixture_denoiser(s, centre, 0.3)(x, t)
    same(guided(of(c), of(0 * c), 2.5).x0, of(2.5 * c).x0, 1e-10)


def test_the_bar_is_shown_only_when_asked_for(capsys):
    s, x_T = Schedule(), batch()[0]
    ddim_sample(denoiser(s, "v"), x_T, s, spaced(3))
    assert capsys.readouterr().err == ""
    ddpm_sample(denoiser(s, "v"), x_T, s, spaced(3), progress="decoder")
    assert "decoder" in capsys.readouterr().err


@pytest.mark.parametrize("wrong, says", [
    (lambda s, x, t: Schedule("sigmoid"), "sigmoid"),
    (lambda s, x, t: Schedule(T=0), "T=0"),
    (lambda s, x, t: target(s, "noise", x, x, t), "noise"),
    (lambda s, x, t: predict(s, "epsilon", x, x, t), "epsilon"),
    (lambda s, x, t: simple_loss(s, "v", x, x, x, t, "snr"), "snr"),
    (lambda s, x, t: spaced(1001), "1001"),
    (lambda s, x, t: spaced(0), "steps is 0"),
    (lambda s, x, t: in_sections(()), "one number each"),
    (lambda s, x, t: in_sections((10, 501)), "501"),
    (lambda s, x, t: spaced_snr(1001, s), "1001"),
    (lambda s, x, t: strided(300), "300 of 1000"),
    (lambda s, x, t: check_timesteps(50, 1000), r"50: give a list, such as spaced\(50, 1000\)"),
    (lambda s, x, t: check_timesteps("snr20", 1000), "snr20"),
    (lambda s, x, t: ddpm_sample(denoiser(s, "v"), x, s, spaced(5, 2000)), "1999"),
    (lambda s, x, t: check_timesteps(spaced(5)[::-1], 1000), "large to small"),
    (lambda s, x, t: check_timesteps([500, 500], 1000), "none twice"),
    (lambda s, x, t: check_timesteps([500, 2.5], 1000), "2.5"),
    (lambda s, x, t: check_timesteps([], 1000), "give a list"),
    (lambda s, x, t: split_variance(x), "even number"),
])
def test_mistakes_are_named(wrong, says):
    with pytest.raises(UnclipError, match=says) as e:
        wrong(Schedule(), *batch()[::2])
    assert "\n" not in str(e.value)

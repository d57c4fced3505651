"DDIM inversion against diffusers, against closed forms, and against the sampler that it inverts."
import json, math, sys
from pathlib import Path
import pytest, torch
from unclip_nb.core import UnclipError, generator, randn
from unclip_nb.diffusion import Prediction, Schedule, ddim_sample, mixture_denoiser, spaced
from unclip_nb.solvers import in_sections, spaced_snr, strided
from unclip_nb.inversion import ddim_invert

SCHEDULE = Schedule()
ANGLE = torch.arange(8) * math.tau / 8
RING = torch.stack([ANGLE.cos(), ANGLE.sin()], 1).double()

@pytest.fixture
def points(): return RING.repeat(10, 1) + 0.1 * randn((80, 2), generator("points"))
@pytest.fixture
def exact(): return mixture_denoiser(SCHEDULE, RING, spread=0.1)

def wobbly(schedule):
    "A denoiser that is right about nothing in particular, but smooth in x and t, and asks nothing of the data."
    def denoise(x, t):
        eps = torch.sin(1.3 * x + t.view(-1, 1) / 150) + 0.2 * x.flip(1)
        a, s = schedule.gather("signal", t, x), schedule.gather("noise", t, x)
        return Prediction((x - s * eps) / a, eps)
    return denoise

def miss(denoise, x0, steps, schedule=SCHEDULE, **how):
    x_T = ddim_invert(denoise, x0, schedule, spaced(steps), **how)
    return (ddim_sample(denoise, x_T, schedule, spaced(steps), clip=False) -
            x0).square().mean().sqrt().item()

@pytest.mark.parametrize("kind,name", [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
@pytest.mark.parametrize("from_clean", [True, False])
@pytest.mark.parametrize("steps", [10, 50, 250])
def test_it_is_diffusers_inverse_scheduler(kind, name, from_clean, steps):
    diffusers = pytest.importorskip("diffusers")
    schedule = Schedule(kind)
    theirs = diffusers.DDIMInverseScheduler(beta_start=1e-4,
                                            beta_end=0.02,
                                            beta_schedule=name,
                                            clip_sample=False,
                                            set_alpha_to_one=from_clean,
                                            timestep_spacing="leading")
    theirs.alphas_cumprod = schedule.abar.clone()                                  # theirs are float32; the steps are what we compare
    theirs.initial_alpha_cumprod = torch.tensor(
        1.0, dtype=torch.float64) if from_clean else schedule.abar[0]
    theirs.set_timesteps(steps)
    denoise = wobbly(schedule)
    x = x0 = randn((5, 7), generator("x0")).double()
    for t in theirs.timesteps:
        x = theirs.step(denoise(x, t.expand(5)).eps, int(t), x).prev_sample
    ours = ddim_invert(denoise, x0, schedule, strided(steps), from_clean=from_clean)   # their "leading" grid
    assert (ours - x).norm() / x.norm() < 1e-9

def test_it_is_diffusers_inverse_scheduler_with_their_own_numbers_in_float32():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMInverseScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    theirs.set_timesteps(50)
    denoise = wobbly(SCHEDULE)
    x = x0 = randn((5, 7), generator("x0"))
    for t in theirs.timesteps:
        x = theirs.step(denoise(x, t.expand(5)).eps, int(t), x).prev_sample
    assert (ddim_invert(denoise, x0, SCHEDULE, strided(50), from_clean=True) -
            x).norm() / x.norm() < 1e-5

def test_current_convention_is_the_authors_formula():
    "guided-diffusion's ddim_reverse_sample, on neighbouring timesteps, up to T-1."
    schedule, x0 = Schedule(T=40), randn((5, 7), generator("x0")).double()
    denoise, x = wobbly(schedule), x0
    for t in range(39):
        p, after = denoise(x, torch.full((5,), t)), schedule.abar[t + 1]
        x = p.x0 * after.sqrt() + (1 - after).sqrt() * p.eps
    assert torch.allclose(ddim_invert(denoise, x0, schedule, spaced(40, 40), convention="current"),
                          x,
                          rtol=1e-10)

def test_a_standard_normal_is_its_own_noise():
    "eps-hat = noise * x there, and the ODE leaves every point where it is; many steps must find that."
    denoise = mixture_denoiser(SCHEDULE, torch.zeros(1, 3, dtype=torch.float64), spread=1.)
    x0 = randn((6, 3), generator("normal")).double()
    for convention in ("target", "current"):
        assert (ddim_invert(denoise, x0, SCHEDULE, spaced(400), convention) - x0).abs().max() < 0.02

def test_one_step_by_hand():
    schedule, x = Schedule(), torch.tensor([[1.0]], dtype=torch.float64)
    constant = lambda x, t: Prediction(x, torch.full_like(x, 0.5))
    ts = spaced(3)[::-1]
    got = ddim_invert(constant, x, schedule, spaced(3))
    u, sigma = x / schedule.abar[0].sqrt(), ((1 - schedule.abar) / schedule.abar).sqrt()
    assert torch.allclose(
        got, schedule.abar[-1].sqrt() *
        (u + 0.5 * (sigma[ts[-1]] - sigma[ts[0]])))  # eq. 2: a constant eps is a straight line

def test_more_steps_less_error_and_target_beats_current(exact, points):
    for how in ({}, dict(convention="current"), dict(refine=1)):
        errors = [miss(exact, points, n, **how) for n in (10, 25, 50, 100)]
        assert all(a > b for a, b in zip(errors, errors[1:]))
    assert all(
        miss(exact, points, n) < miss(exact, points, n, convention="current") for n in (10, 50))

def test_refining_helps_and_converges_to_the_exact_inverse(exact, points):
    errors = [miss(exact, points, 50, refine=k) for k in (0, 1, 3)]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.6 * errors[1]
    assert miss(exact, points, 100, refine=6, from_clean=True) < 1e-3

def test_noise_comes_back_too(exact):
    "Down, then up: x_T itself is found again."
    x_T = randn((40, 2), generator("dots")).double()
    x0 = ddim_sample(exact, x_T, SCHEDULE, spaced(200), clip=False)
    near = (ddim_invert(exact, x0, SCHEDULE, spaced(200), refine=2, from_clean=True) - x_T).norm(dim=1)
    assert near.median() < 0.01


@pytest.mark.parametrize("steps",
                         [*map(spaced, (1, 2, 7)), in_sections((10, 10, 3, 2, 2)), strided(25),
                          spaced_snr(20, SCHEDULE), in_sections((1, 6))], ids=len)
def test_every_grid_of_the_sampler(exact, points, steps):
    assert torch.isfinite(ddim_invert(exact, points, SCHEDULE, steps)).all()
    asked = []
    def noting(x, t): asked.append(int(t[0])); return exact(x, t)
    ddim_sample(noting, points, SCHEDULE, steps, clip=False)
    down, asked[:] = list(asked), []
    ddim_invert(noting, points, SCHEDULE, steps, from_clean=True)
    assert asked == down[::-1]                                                   # the same timesteps, the other way round

def test_ends_of_the_walk_and_cost(exact, points):
    asked = []
    def noting(x, t): asked.append(int(t[0])); return exact(x, t)

    def walk(**how):
        asked.clear()
        ddim_invert(noting, points, SCHEDULE, spaced(3), **how)
        return list(asked)
    mid = spaced(3)[1]
    assert walk() == [mid, 999] and walk(from_clean=True) == [0, mid, 999
                                                              ] and walk(skip_last=True) == [mid]
    assert walk(convention="current") == [0, mid] and walk(convention="current",
                                                           from_clean=True) == [0, 0, mid]
    assert walk(refine=2) == [mid] * 3 + [999] * 3

def test_start_takes_the_picture_for_a_later_state(exact, points):
    asked = []
    def noting(x, t): asked.append(int(t[0])); return exact(x, t)

    def walk(**how):
        asked.clear()
        ddim_invert(noting, points, SCHEDULE, spaced(21), **how)
        return list(asked)
    up = spaced(21)[::-1]
    assert walk() == walk(start=0) == up[1:] and walk(start=49) == up[1:] and walk(
        start=50) == up[2:] and walk(start=200) == [t for t in up if t > 200]
    assert walk(start=200, from_clean=True) == up and walk(
        start=200, convention="current") == [t for t in up if t >= 200][:-1]
    below = ddim_invert(exact, points, SCHEDULE, spaced(21), start=200)                                 # by hand: the same steps from t = 200 up
    x, ts = points, [t for t in up if t >= 200]
    for s, r in zip(ts, ts[1:]):
        a, b, eps = SCHEDULE.abar[s], SCHEDULE.abar[r], exact(x, torch.full((len(x),), r)).eps
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    assert torch.allclose(below, x)

def test_a_later_start_keeps_a_mistaken_denoiser_from_shouting(points):
    "A miss of size m in x0-hat is read as noise of size m / noise[t] at the first timestep asked (eq. 6): later is quieter."
    def off(x, t):
        x0 = points + 0.1
        a, s = SCHEDULE.gather("signal", t, x), SCHEDULE.gather("noise", t, x)
        return Prediction(x0, (x - a * x0) / s)
    for start in (0, 20, 50):
        first = next(t for t in spaced(250)[::-1] if t > start)
        size = ddim_invert(off, points, SCHEDULE, spaced(250), start=start).square().mean().sqrt().item()
        assert size == pytest.approx(0.1 / SCHEDULE.noise[first].item(), rel=0.2)

def test_x0_is_never_clipped():
    schedule, x0 = Schedule(), torch.full((1, 4), 3.0, dtype=torch.float64)      # far outside of [-1, 1]
    denoise = mixture_denoiser(schedule, torch.full((1, 4), 2.9, dtype=torch.float64), spread=0.3)
    assert miss(denoise, x0, 250) < 0.05                                         # a clipped walk would miss by 2

def test_rows_are_independent_and_dtype_is_kept(exact, points):
    whole = ddim_invert(exact, points.float(), SCHEDULE, spaced(10))
    assert whole.dtype == torch.float32 and not whole.requires_grad
    assert torch.allclose(whole[3:5],
                          ddim_invert(exact, points[3:5].float(), SCHEDULE, spaced(10)),
                          atol=1e-5)

def test_clear_errors(exact, points):
    with pytest.raises(UnclipError, match="target or current"):
        ddim_invert(exact, points, SCHEDULE, spaced(5), convention="diffusers")
    with pytest.raises(UnclipError, match="refine"):
        ddim_invert(exact, points, SCHEDULE, spaced(5), refine=-1)
    with pytest.raises(UnclipError, match="1999"):
        ddim_invert(exact, points, SCHEDULE, spaced(5, 2000))
    with pytest.raises(UnclipError, match="start further down"):
        ddim_invert(exact, points, SCHEDULE, spaced(5), start=999)
    with pytest.raises(UnclipError, match="large to small"):
        ddim_invert(exact, points, SCHEDULE, spaced(5)[::-1])

@pytest.fixture(scope="module")
def benchmark():
    "benchmarks/inversion.py as a module."
    sys.path.insert(0, str(Path(__file__).parent.parent/"benchmarks"))
    try:
        import inversion
    finally:
        sys.path.pop(0)
    return inversion

@pytest.fixture(scope="module")
def model():
    "A system that has learned nothing."
    from dataclasses import replace
    from unclip_nb.clip import CLIP, CLIPConfig
    from unclip_nb.core import data_path
    from unclip_nb.decoder import Decoder, DecoderConfig
    from unclip_nb.pipeline import UnCLIP
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig.nano(), CLIP.from_pretrained(data_path("tiny")/"clip").tokenizer)
    decoder = Decoder(
        replace(DecoderConfig.nano(),
                channels=16,
                res_blocks=1,
                head_channels=16,
                clip_dim=clip.dim,
                clip_fingerprint=clip.fingerprint))
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(0.05 * torch.randn_like(p))         # a fresh one answers 0, whatever it is asked
    return UnCLIP(clip, None, decoder)

def test_the_benchmark_measures_what_is_missing(benchmark, model, tmp_path, capsys, monkeypatch):
    out = tmp_path/"table.json"
    monkeypatch.setattr(benchmark.UnCLIP, "from_pretrained", lambda name, device: model)

    def run(*args):
        benchmark.main(["--weights", "mine", "--out", str(out), *map(str, args)])
        return json.loads(out.read_text())
    table = run("--steps", 5, 3, "--refine", 0, 1, "--n", 2)
    assert [(r["steps"], r["refine"], r["n"]) for r in table["rows"]] == [(3, 0, 2), (3, 1, 2),
                                                                          (5, 0, 2), (5, 1, 2)]
    first = table["rows"][0]
    assert {k: first[k]
            for k in benchmark.SHIPPED} == benchmark.SHIPPED | dict(steps=3) and len(
                first["each"]) == 2
    assert first["mean"] == pytest.approx(
        sum(first["each"]) / 2, abs=0.01) and first["min"] == pytest.approx(min(first["each"]),
                                                                            abs=0.01)
    assert first["below_25"] == sum(d < 25 for d in first["each"]) / 2 and (
        table["clip"], table["decoder"]) == (model.clip.fingerprint,
                                             benchmark.fingerprint(model.decoder))
    first["each"][0] = 99.0
    out.write_text(json.dumps(table))                                    # a row that is there is not measured again ...
    table = run("--steps", 3, "--n", 1, "--convention", "target", "current", "--skip-last", 0, 1,
                "--start", 0, 50)
    assert len(table["rows"]) == 4 + 7 and sum(99.0 in r["each"] for r in table["rows"]) == 1
    assert table["ceiling"]["n"] == 2
    assert "99.0" not in str(run("--steps", 3, "--n", 3)["rows"])                                  # ... unless more pictures are wanted,
    out.write_text(json.dumps(table | dict(decoder="0123456789ab")))
    assert [r["steps"] for r in run("--steps", 4, "--n", 1)["rows"]] == [4]                        # or the weights are others
    assert "below 25 dB" in capsys.readouterr().out

def test_the_benchmark_walks_as_the_product_does(benchmark, model):
    from unclip_nb.shapes import render, scene_at
    x0 = render([scene_at(i, "unseen") for i in range(3)], model.decoder.config.image_size)
    latent = model.invert(x0, 30)
    again = model.decode(latent.zi, x_T=latent.x_T, steps=30, upsample=False)
    db, sizes = benchmark.trip(model, x0, **benchmark.SHIPPED | dict(steps=30), batch_size=2)
    assert db.std() > 0.1 and torch.allclose(db, benchmark.decibels(
        again, x0), atol=0.05) and torch.allclose(
            sizes, latent.x_T.square().mean((1, 2, 3)).sqrt(), rtol=1e-3)

def test_the_stored_table_is_whole_of_these_weights_and_reaches_its_goals(benchmark):
    from unclip_nb.core import data_path
    from unclip_nb.pipeline import UnCLIP
    table, model = json.loads(
        (data_path("tiny") / "inversion.json").read_text()), UnCLIP.from_pretrained("tiny",
                                                                                    device="cpu")
    assert (table["clip"], table["decoder"]) == (benchmark.fingerprint(
        model.clip), benchmark.fingerprint(model.decoder)), "run benchmarks/inversion.py again"
    rows = {benchmark.key(r): r for r in table["rows"]}
    assert {benchmark.key(how) for how in benchmark.PLAN} <= set(rows)
    at = lambda steps: rows[benchmark.key(benchmark.SHIPPED | dict(steps=steps))]["mean"]
    assert at(50) >= 25 and at(250) >= 30

def test_the_shipped_decoder_gets_its_picture_back():
    "Loosely tied to the promise of 25 dB at 50 steps, for pictures of unseen pairs; fewer steps and pictures here, to be quick."
    from unclip_nb.clip import CLIP
    from unclip_nb.core import data_path
    from unclip_nb.decoder import Decoder
    from unclip_nb.shapes import render, scene_at
    clip, decoder = CLIP.from_pretrained(data_path("tiny") / "clip"), Decoder.from_pretrained(
        data_path("tiny") / "decoder")
    x0 = render([scene_at(i, "unseen") for i in (0, 2)], 32)
    with torch.no_grad():
        denoise = decoder.denoiser(clip.encode_image(x0))
        x_T = ddim_invert(denoise, x0, decoder.schedule, spaced(25))
        again, clipped = (ddim_sample(denoise, x_T, decoder.schedule, spaced(25), clip=c)
                          for c in (False, True))
    decibels = lambda x: 10 * torch.log10(4 / (x - x0).square().flatten(1).mean(1))
    assert decibels(again).mean() > 22 and decibels(clipped).mean() > 22

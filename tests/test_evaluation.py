"The judge: intervals against the binomial distribution, marks of true, changed and empty pictures; routes with the truth put in."
import math, pytest, torch
from pathlib import Path
from unclip_nb import evaluation
from unclip_nb.core import UnclipError, generator
from unclip_nb.evaluation import KINDS, Marks, evaluate, exam, judge, prior_exam, routes, table, take_exam, wilson, zi_sources
from unclip_nb.pipeline import UnCLIP
from unclip_nb.shapes import EIGHT_CAPTIONS, EIGHT_SCENES, UNSEEN, caption, render

def test_wilson_solves_its_equation():
    for right, asked in ((0, 5), (3, 10), (50, 60), (256, 256)):
        for p in wilson(right, asked):
            if 0 < p < 1:
                assert math.isclose(abs(right / asked - p),
                                    1.96 * math.sqrt(p * (1 - p) / asked),
                                    rel_tol=1e-6)

def test_wilson_covers():
    p, n, hits = 0.9, 40, 0
    counts = torch.binomial(torch.full((2000, ), float(n)),
                            torch.full((2000, ), p),
                            generator=generator(0))
    for k in counts.int().tolist():
        lo, hi = wilson(k, n)
        hits += lo <= p <= hi
    assert 0.92 < hits / 2000 < 0.98

def test_true_pictures_get_full_marks():
    for kind in KINDS:
        scenes, captions = exam(kind, 24)
        m = judge(render(scenes, 64), captions)
        assert m.share() >= 23 / 24 and m.asked["all"] == 24

def test_each_attribute_is_marked_alone():
    from dataclasses import replace
    s = EIGHT_SCENES[0]
    a, b = s.objects
    changes = {
        "color": replace(s, objects=(replace(a, color="green"), b)),
        "shape": replace(s, objects=(replace(a, shape="square"), b)),
        "background": replace(s, background="black"),
        "relation": replace(s, objects=(replace(a, y=1 - a.y), replace(b, y=1 - b.y)))
    }
    for attribute, changed in changes.items():
        m = judge(render(changed, 64), [EIGHT_CAPTIONS[0]])
        assert m.share("all") == 0 and m.share(attribute) == 0, attribute
        for other in set(changes) - {attribute}:
            assert m.share(other) == 1, (attribute, other)

def test_unmentioned_attributes_are_not_marked():
    m = judge(render(EIGHT_SCENES[1], 64), ["a yellow circle"])
    assert m.share() == 1 and m.asked["background"] == m.asked["size"] == m.asked["relation"] == 0


@pytest.mark.parametrize("junk", [
    torch.zeros(3, 64, 64),
    torch.full((3, 64, 64), -1.),
    torch.randn(3, 64, 64, generator=generator(0)).clamp(-1, 1)
])
def test_junk_gets_nothing(junk): assert judge(junk[None], EIGHT_CAPTIONS[:1]).share() == 0

def test_captions_from_elsewhere_are_an_error():
    with pytest.raises(UnclipError, match="names 0 objects"):
        judge(torch.zeros(1, 3, 64, 64), ["hot pepper"])

def test_exams_are_of_their_kind():
    for kind, (_, n) in KINDS.items():
        scenes, _ = exam(kind, 50)
        assert all(len(s.objects) == n for s in scenes)
        unseen = [any((o.color, o.shape) in UNSEEN for o in s.objects) for s in scenes]
        assert all(unseen) if kind == "unseen pairs" else not any(unseen)
    with pytest.raises(UnclipError, match="unknown kind"):
        exam("three objects", 1)

def test_table_has_a_row_each():
    m = Marks()
    m.asked["all"] = 8
    m.right["all"] = 6
    text = table({("one object", "prior"): m})
    assert len(text.splitlines()) == 2 and "75.0" in text

# -- routes, on the shipped weights ------------------------------------------------------------------------------------------
WEIGHTS = Path(__file__).parent.parent / "data" / "tiny"

@pytest.fixture(scope="module")
def model():
    if not (WEIGHTS/"unclip.json").exists():
        pytest.skip("no shipped weights")
    return UnCLIP.from_pretrained(str(WEIGHTS), device="cpu")

def test_the_truth_is_upsampled_with_as_many_steps_as_decoded_pictures(model, monkeypatch):
    steps, sample = [], model.upsampler1.sample
    monkeypatch.setattr(model.upsampler1, "sample",
                        lambda low, **kw: steps.append(kw["steps"]) or sample(low, **kw))
    marks, images = take_exam(model, "one object", 2, routes(model)["upsampled truth"])
    assert marks.share() == 1 and images.shape == (2, 3, 128, 128)                   # the truth itself, but for what the upsampler loses
    take_exam(model, "one object", 1, routes(model, steps=1)["z_t as z_i"])
    assert steps == [model.upsampler1.config.draw["steps"]] * 2

def test_sources_are_fitted_once_for_all_exams(model, monkeypatch):
    fits, pairs = [], evaluation.training_pairs
    monkeypatch.setattr(evaluation, "training_pairs", lambda *a: fits.append(a[1]) or pairs(*a))
    sources = zi_sources(model, 20)
    names = set(sources)
    assert fits == [20] and {"linear map", "nearest"
                             } < names and names - {"linear map", "nearest"} == set(
                                 zi_sources(model))
    rows = prior_exam(model, 4, draws=2, fitted=20, sources=sources)
    marks = evaluate(model, 1, steps=1, progress=False, sources=sources)
    assert fits == [20] and set(sources) == names and set(marks) == {
        (k, n)
        for k in KINDS
        for n in {"upsampled truth", *names}
    }
    again = prior_exam(model, 4, draws=2, fitted=20)
    assert fits == [20, 20] and all(
        {**rows[k], "ms": 0} == pytest.approx({**again[k], "ms": 0}, abs=1e-5) for k in rows)
    assert rows["linear map"]["diversity"] == pytest.approx(
        0, abs=1e-5) and rows["diffusion prior"]["diversity"] > 1e-3

"The judge: intervals against the binomial distribution, marks of true, changed and empty pictures."
import math, pytest, torch
from unclip_nb.core import UnclipError, generator
from unclip_nb.evaluation import KINDS, Marks, exam, judge, table, wilson
from unclip_nb.shapes import EIGHT_CAPTIONS, EIGHT_SCENES, UNSEEN, caption, render

def test_wilson_solves_its_equation():
    for right, asked in ((0, 5), (3, 10), (50, 60), (256, 256)):
        for p in wilson(right, asked):
            if 0 < p < 1: assert math.isclose(abs(right / asked - p), 1.96 * math.sqrt(p * (1 - p) / asked), rel_tol=1e-6)

def test_wilson_covers():
    p, n, hits = 0.9, 40, 0
    counts = torch.binomial(torch.full((2000,), float(n)), torch.full((2000,), p), generator=generator(0))
    for k in counts.int().tolist():
        lo, hi = wilson(k, n); hits += lo <= p <= hi
    assert 0.92 < hits / 2000 < 0.98

def test_true_pictures_get_full_marks():
    for kind in KINDS:
        scenes, captions = exam(kind, 24)
        m = judge(render(scenes, 64), captions)
        assert m.share() >= 23 / 24 and m.asked["all"] == 24

def test_each_attribute_is_marked_alone():
    from dataclasses import replace
    s = EIGHT_SCENES[0]; a, b = s.objects
    changes = {"color": replace(s, objects=(replace(a, color="green"), b)), "shape": replace(s, objects=(replace(a, shape="square"), b)),
               "background": replace(s, background="black"), "relation": replace(s, objects=(replace(a, y=1 - a.y), replace(b, y=1 - b.y)))}
    for attribute, changed in changes.items():
        m = judge(render(changed, 64), [EIGHT_CAPTIONS[0]])
        assert m.share("all") == 0 and m.share(attribute) == 0, attribute
        for other in set(changes) - {attribute}:
            assert m.share(other) == 1, (attribute, other)

def test_unmentioned_attributes_are_not_marked():
    m = judge(render(EIGHT_SCENES[1], 64), ["a yellow circle"])
    assert m.share() == 1 and m.asked["background"] == m.asked["size"] == m.asked["relation"] == 0

@pytest.mark.parametrize("junk", [torch.zeros(3, 64, 64), torch.full((3, 64, 64), -1.), torch.randn(3, 64, 64, generator=generator(0)).clamp(-1, 1)])
def test_junk_gets_nothing(junk): assert judge(junk[None], EIGHT_CAPTIONS[:1]).share() == 0

def test_captions_from_elsewhere_are_an_error():
    with pytest.raises(UnclipError, match="names 0 objects"): judge(torch.zeros(1, 3, 64, 64), ["hot pepper"])

def test_exams_are_of_their_kind():
    for kind, (_, n) in KINDS.items():
        scenes, _ = exam(kind, 50)
        assert all(len(s.objects) == n for s in scenes)
        unseen = [any((o.color, o.shape) in UNSEEN for o in s.objects) for s in scenes]
        assert all(unseen) if kind == "unseen pairs" else not any(unseen)
    with pytest.raises(UnclipError, match="unknown kind"): exam("three objects", 1)

def test_table_has_a_row_each():
    m = Marks(); m.asked["all"] = 8; m.right["all"] = 6
    text = table({("one object", "prior"): m})
    assert len(text.splitlines()) == 2 and "75.0" in text

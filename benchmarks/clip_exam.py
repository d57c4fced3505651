"""Is a CLIP good enough to be frozen? `python benchmarks/clip_exam.py [WEIGHTS or the folder of a clip] [N]`

Seen pairs and unseen ones: R@1 among N scenes with full captions, no two equal; zero-shot shape and colour of one object among the 64 prompts "a COLOR SHAPE"; whether two objects stand beside or
above each other, by a linear probe on z_i (logistic regression, fitted on 6,000 training scenes); true captions against captions turned round or with the colours swapped."""
import sys
from dataclasses import replace
from pathlib import Path
import torch
from unclip_nb.clip import CLIP, load_clip, retrieval_at_k, zero_shot
from unclip_nb.core import data_path
from unclip_nb.evaluation import wilson
from unclip_nb.shapes import COLORS, RELATIONS, SHAPES, caption, render, scene_at

def scenes(split:str, n:int, objects:int=0) -> list:
    "The first n scenes with full captions that all differ; of one or two objects if asked."
    found, i = {}, 0
    while len(found) < n:
        scene = scene_at(i, split)
        i += 1
        if objects in (0, len(scene.objects)):
            found.setdefault(caption(scene, full=True), scene)
    return list(found.values())


def embed(clip: CLIP, rows: list):
    return torch.cat([
        clip.encode_image(render(rows[k:k + 250], clip.config.image_size))
        for k in range(0, len(rows), 250)
    ])
def horizontal(scene) -> bool: return scene.relation in RELATIONS[:2]
def turned(scene):
    axis = "x" if horizontal(scene) else "y"
    return replace(scene,
                   objects=tuple(replace(o, **{axis: 1 - getattr(o, axis)}) for o in scene.objects))
def swapped(scene):
    a, b = scene.objects
    return replace(scene, objects=(replace(a, color=b.color), replace(b, color=a.color)))

@torch.no_grad()
def exam(clip:CLIP, split:str, n:int) -> dict[str, tuple[int, int]]:
    "How many were right of those asked, by task."
    from sklearn.linear_model import LogisticRegression
    rows = scenes(split, n)
    r = retrieval_at_k(embed(clip, rows), clip.encode_text([caption(s, full=True) for s in rows]))
    marks = {
        "R@1, picture to text": (round(r[0] * n), n), "R@1, text to picture": (round(r[1] * n), n)
    }
    one = [s for s in (scene_at(i, split) for i in range(10 * n)) if len(s.objects) == 1][:n]
    best = torch.cat([
        zero_shot(clip, render(one[k:k + 250], clip.config.image_size),
                  [f"a {c} {s}" for c in COLORS for s in SHAPES]).argmax(1)
        for k in range(0, n, 250)
    ]).tolist()
    marks["shape of one object"] = sum(SHAPES[b % 8] == s.objects[0].shape
                                       for b, s in zip(best, one)), n
    marks["colour of one object"] = sum([*COLORS][b // 8] == s.objects[0].color
                                        for b, s in zip(best, one)), n
    two = scenes(split, n, 2) if split != "unseen" else [
        s for s in (scene_at(i, split) for i in range(10 * n)) if len(s.objects) == 2
    ][:n]
    if two:
        fit, z = scenes("train", 6000, 2), embed(clip, two)
        probe = LogisticRegression(max_iter=3000, C=1e4).fit(embed(clip, fit),
                                                             [horizontal(s) for s in fit])
        marks["relation, linear probe"] = round(
            probe.score(z, [horizontal(s) for s in two]) * len(two)), len(two)
        for name, change in (("true caption or turned round", turned),
                             ("true caption or colours swapped", swapped)):
            asked = [
                k for k, s in enumerate(two)
                if change is turned or s.objects[0].color != s.objects[1].color
            ]
            right, wrong = (clip.encode_text([caption(f(two[k]), full=True) for k in asked])
                            for f in (lambda s: s, change))
            marks[name] = int(((z[asked] * (right - wrong)).sum(1) > 0).sum()), len(asked)
    return marks

if __name__ == "__main__":
    where, n = Path(sys.argv[1] if len(sys.argv) > 1 else data_path("tiny")), int(
        sys.argv[2]) if len(sys.argv) > 2 else 1000
    clip = load_clip(where / "clip" if (where / "clip").is_dir() else where).eval()
    print(f"clip {clip.fingerprint}, {n} scenes a task")
    for split in ("valid", "unseen"):
        for task, (right, asked) in exam(clip, split, n).items():
            lo, hi = wilson(right, asked)
            print(
                f"{split:8}{task:34}{100 * right / asked:7.1f} %   ({100 * lo:.1f} to {100 * hi:.1f})"
            )

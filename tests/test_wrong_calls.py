"""Wrong values for every argument of the public functions.

The rule: what a user can mend (a value of the wrong type, shape, range or spelling) is an `UnclipError` of one line.
A missing or misspelt argument of a plain function stays Python's own TypeError; `from_pretrained`, `save_pretrained` and the
edits, whose options are many, answer that with an `UnclipError` too. Nothing hangs, nothing wrong is accepted.

The calls run in a process of their own, without the type checker that tests otherwise use. Every call is the right one but for
one argument. 250 of them, drawn by a seed, run by default; UNCLIP_WRONG_CALLS=all runs every one."""
import json, math, os, random, subprocess, sys
from pathlib import Path
import pytest

def values():
    "Wrong values for each kind of argument: name of the kind -> a list."
    import numpy as np, torch
    from unclip_nb.pipeline import Latent
    nan, inf = math.nan, math.inf
    none_of = lambda *keep: [
        x for x in (None, True, "3", "", b"1", [], [2], {}, object(), torch.tensor([1., 2.]),
                    np.array([1, 2]), print) if not any(x is k for k in keep)
    ]
    real = [nan, inf, -inf, 1e300, 10 ** 400, 1j, *none_of()]
    whole = [0, -1, 1.5, nan, inf, 10 ** 400, -10 ** 12, *none_of()]
    bad_floats = [torch.full((1, 3, 8, 8), x) for x in (nan, inf, 255.0, -40.0)]
    odd_shapes = [
        torch.zeros(s) for s in ((), (8, ), (8, 8), (2, 8, 8), (5, 8, 8), (0, 3, 8, 8),
                                 (1, 3, 0, 8), (1, 1, 3, 8, 8))
    ]
    odd_types = [
        torch.zeros(1, 3, 8, 8, dtype=d)
        for d in (torch.int64, torch.bool, torch.complex64, torch.int8)
    ]
    pictures = [
        None, 5, 1.5, nan, b"x", "", "nowhere.png", "/", "a\0b", {}, [], [None], [5],
        object(),
        np.array(["x"]),
        np.zeros((8, 8, 3), dtype=object),
        np.full((8, 8, 3), nan),
        np.full((8, 8, 3), 200.0), [torch.zeros(3, 8, 8), None], *bad_floats, *odd_shapes,
        *odd_types
    ]
    zi = [
        None, 5, "x", [1.0], {},
        np.zeros((1, 96)),
        torch.zeros(96),
        torch.zeros(1, 95),
        torch.zeros(0, 96),
        torch.zeros(1, 96, 1),
        torch.zeros(()),
        torch.full((1, 96), nan),
        torch.full((1, 96), inf),
        torch.zeros(1, 96, dtype=torch.int64),
        torch.zeros(1, 96, dtype=torch.bool)
    ]
    x_T = [
        5, "x", [0.0],
        np.zeros((1, 3, 32, 32)),
        torch.zeros(3, 32, 32),
        torch.zeros(2, 3, 32, 32),
        torch.zeros(1, 3, 16, 16),
        torch.zeros(1, 4, 32, 32),
        torch.full((1, 3, 32, 32), nan),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    ]
    words = [
        None, 5, 1.5, True, "", "x", b"diffusion", [], ["ddim"], {},
        object(), "DIFFUSION", "ddim "
    ]
    good = torch.nn.functional.normalize(torch.ones(1, 96), dim=1)
    noise = torch.zeros(1, 3, 32, 32)
    return dict(whole=whole,
                real=real,
                eta=[-1, -1e-9, 1.01, 5, *real],
                seed=[1.5, nan, inf, 10**400, *none_of()],
                timesteps=[
                    5, 0, True, nan, 2.5, "", "snr20", "10,10", [], (), {}, [0, 1], [5, 5], [1000], [-1],
                    [2.5], ["a"], [None], [[1]], b"20",
                    object()
                ],

                steps=[
                    0, -5, 1001, 10**12, 10**400, nan, 2.5, None, True, "", "x", "snr",
                    "snrx", "snr0", "snr1001", "ddim0", "ddim999", "1e3", [], [0], [2.5], ["a"],
                    [10**9], {}, b"20",
                    object()
                ],
                pictures=pictures,
                zi=zi,
                x_T=x_T,
                words=words,
                captions=[
                    None, 5, 1.5, b"a star", [], [None], [5], ["a star", None], ["a star", " "], "",
                    " \n", [b"a"], {"a": 1},
                    object(), [["a"]], "\ud800", ("", )
                ],
                size=[0, -1, 100, 1.5, nan, inf, "128", [128], True, {}, 10**400],
                generators=[
                    5, "x", [5], [None, None, None], [torch.Generator()] * 3, (), {},
                    object()
                ],
                dict_of_generators=[
                    5, "x", [torch.Generator()], {"decoder": 5},
                    {"decoder": [torch.Generator()] * 3}, {"decoder": ["x"]}
                ],
                thetas=[
                    None, 0.3, nan, "0.5", "", [], [nan], [inf], [-0.1], [1.1], ["0.5"], [None], {},
                    object(), [[0.1]], [True],
                    np.array(0.3)
                ],
                theta=[
                    None, nan, inf, -0.1, 1.1, "0.5", [0.5], {},
                    torch.tensor([0.1, 0.2, 0.3]),
                    torch.tensor(nan),
                    torch.tensor(2.0), True
                ],
                ks=[
                    None, 5, "5", [], [nan], [2.5], [-1], [1000], [10**400], ["5"], [None], {},
                    object(), [True]
                ],
                latent=[
                    None, 5, "nowhere.png", [], {},
                    object(),
                    Latent(good[0], noise, [500, 0]),
                    Latent(good, noise[0], [500, 0]),
                    Latent(good * nan, noise, [500, 0]),
                    Latent(None, noise, [500, 0]),
                    Latent(good, None, [500, 0]),
                    Latent(good[:0], noise[:0], [500, 0]),
                    Latent(good.expand(3, -1), noise, [500, 0])
                ],
                direction=[
                    None, 5, "x", [0.1], good[0],
                    torch.zeros(1, 95),
                    torch.zeros(3, 96),
                    torch.zeros(0, 96)
                ],
                path=[
                    None, 5, "", b"x", [], {},
                    object(), "a\0b", "nowhere", "./nowhere", "/no/where", "runs/mine",
                    "~/no/such/folder", "a/b/c", " "
                ],
                dtype=["float16", 16, "x", float, [], {}, True, 1.5],
                device=[5, "x", "meta", "cuda:99", [], {}, 1.5, True, "",
                        object()],
                embeddings=[
                    None, 5, "x", [1.0],
                    torch.zeros(1, 95),
                    torch.zeros(()),
                    np.zeros((1, 96))
                ],
                rows=[
                    None, 5, "x", [1.0], {},
                    torch.zeros(4, dtype=torch.int64),
                    torch.zeros(()),
                    torch.zeros(3, 7)
                ],
                pair=[
                    None, 5, "x", b"x", {}, [],
                    torch.zeros(3, 8, 8),
                    torch.zeros(1, 3, 16, 8),
                    torch.zeros(0, 3, 16, 16),
                    torch.zeros(2, 3, 16, 16),
                    torch.zeros(1, 3, 16, 16, dtype=torch.int64)
                ],
                share=[-0.1, 1.1, 5, *real],
                count=[-1, 1.5, nan, inf, 10**400, *none_of()])

def table(folder):
    "Every function with its right arguments and the kind of each: (name, function, right arguments, {argument: kind})."
    import torch
    import unclip_nb.core as core, unclip_nb.diffusion as D, unclip_nb.solvers as solvers, unclip_nb.edits as E, unclip_nb.evaluation as V, unclip_nb.pipeline as P
    from unclip_nb import clip as C, pca as A, upsampler as S
    from unclip_nb.ar_prior import ARPrior
    from unclip_nb.decoder import Decoder
    from unclip_nb.inversion import ddim_invert
    from unclip_nb.shapes import read_scene, render, scene_at
    from unclip_nb.train import local_folder
    m = P.UnCLIP.from_pretrained("tiny", device="cpu")
    image = render([scene_at(3)], 64)
    zi, star = m.encode_image(image), "a red star"
    latent, quick = m.invert(image, 2), dict(steps=2, upsample=False)
    zt, text = m.clip.encode_text_tokens([star])
    schedule, noise = D.Schedule(), torch.zeros(1, 3, 32, 32)
    exact = D.mixture_denoiser(schedule, noise)
    z = torch.randn(200, 96, generator=core.generator(0))
    pca, quantizer = A.PCA().fit(z), A.PCAQuantizer(8, 4).fit(z)
    drawing = dict(steps="steps", seed="seed", guidance="real", size="size", batch_size="whole")
    sampling = dict(timesteps="timesteps")
    rows = [
        ("encode_image", m.encode_image, dict(images=image), dict(images="pictures")),
        ("encode_text", m.encode_text, dict(captions=[star]), dict(captions="captions")),
        ("pictures", m.pictures, dict(images=image), dict(images="pictures")),
        ("invert", m.invert, dict(images=image, steps=2),
         dict(images="pictures", steps="steps", refine="count", start="count", batch_size="whole")),
        ("decode", m.decode, dict(zi=zi, **quick),
         dict(zi="zi",
              x_T="x_T",
              eta="eta",
              guidance="real",
              steps="steps",
              sampler="words",
              seed="seed",
              size="size",
              generators="dict_of_generators")),
        ("decode upsampled", m.decode, dict(zi=zi, steps=2), dict(up_steps="steps")),
        ("sample_zi", m.sample_zi, dict(captions=[star]),
         dict(captions="captions",
              prior="words",
              guidance="real",
              seed="seed",
              generators="generators")),
        ("sample_zi ar", m.sample_zi, dict(captions=[star], prior="ar"),
         dict(guidance="real", generators="generators")),
        ("generate", m.generate, dict(captions=[star], **quick),
         dict(captions="captions",
              prior="words",
              n="whole",
              guidance="real",
              prior_guidance="real",
              steps="steps",
              sampler="words",
              seed="seed",
              batch_size="whole",
              size="size")),
        ("upsamplers", m.upsamplers, dict(size=32), dict(size="size")),
        ("save_pretrained", m.save_pretrained, dict(folder=folder),
         dict(dtype="dtype", push_to_hub="push", misspelt="push")),
        ("UnCLIP.from_pretrained", P.UnCLIP.from_pretrained, dict(name="tiny"),
         dict(name="path", device="device", dtype="dtype", torch_dtype="push", misspelt="push")),
        ("CLIP.from_pretrained", C.CLIP.from_pretrained,
         dict(folder=core.data_path("tiny") / "clip"),
         dict(folder="path", device="device", dtype="dtype", misspelt="push")),
        ("ARPrior.from_pretrained", ARPrior.from_pretrained,
         dict(folder=core.data_path("tiny") / "ar_prior"),
         dict(folder="path", device="device", dtype="dtype")),
        ("find_system", P.find_system, dict(name="tiny"), dict(name="path")),
        ("local_folder", local_folder, dict(source=folder), dict(source="path")),
        ("load_clip", C.load_clip, dict(name=core.data_path("tiny") / "clip"), dict(name="path")),
        ("explore_priors", P.explore_priors, dict(model=m, caption=star, n=1, pool=image, steps=2),
         dict(caption="words_not_text",
              n="whole",
              pool="pool",
              guidance="real",
              steps="steps",
              seed="seed")),
        ("slerp", E.slerp, dict(a=zi, b=zi, theta=0.5), dict(a="rows", b="rows", theta="theta")),
        ("angle", E.angle, dict(a=zi, b=zi), dict(a="rows", b="rows")),
        ("as_latent", E.as_latent, dict(model=m, image=image, steps=2),
         dict(image="pictures", steps="steps", refine="count")),
        ("frames", lambda **kw: list(E.frames(**kw)), dict(model=m, path=latent, upsample=False),
         dict(path="latent",
              eta="eta",
              guidance="real",
              size="size",
              seed="seed",
              batch_size="whole")),
        ("variation_path", E.variation_path, dict(latent=latent, n=2), dict(n="whole")),
        ("variations", E.variations, dict(model=m, image=latent, n=1, **quick),
         dict(image="latent", n="whole", eta="eta", misspelt="push", **drawing)),
        ("variations of", E.variations, dict(model=m, image=image, n=1,
                                             **quick), dict(image="pictures", refine="count")),
        ("interpolation_path", E.interpolation_path, dict(a=latent, b=latent),
         dict(n="whole", noise="words", seed="seed")),
        ("interpolate", E.interpolate, dict(model=m, image_a=latent, image_b=latent, n=2, **quick),
         dict(image_a="latent",
              image_b="latent",
              n="whole",
              noise="words",
              misspelt="push",
              **drawing)),
        ("text_direction", E.text_direction, dict(model=m, base="",
                                                  new=star), dict(new="captions", base="no_text")),
        ("text_diff_path", E.text_diff_path, dict(latent=latent, direction=zi),
         dict(direction="direction", thetas="thetas")),
        ("text_diff", E.text_diff,
         dict(model=m, image=latent, base_caption="", new_caption=star, thetas=[0.1], **quick),
         dict(image="latent",
              new_caption="captions",
              base_caption="no_text",
              thetas="thetas",
              misspelt="push",
              **drawing)),
        ("pca_path", E.pca_path, dict(latent=latent, pca=m.ar_prior.quantizer,
                                      ks=[3]), dict(ks="ks", pca="object")),
        ("pca_sweep", E.pca_sweep, dict(model=m, image=latent, ks=[3], **quick),
         dict(image="latent", ks="ks", noise="words", misspelt="push", **drawing)),
        ("as_images", core.as_images, dict(images=image), dict(images="pictures")),
        ("as_picture", core.as_picture, dict(image=image), dict(image="pictures")),
        ("load_image", core.load_image, dict(path="x"), dict(path="path")),
        ("pick_device", core.pick_device, dict(name="cpu"), dict(name="device")),
        ("expand", core.expand, dict(path="x"), dict(path="no_path")),
        ("randn", core.randn, dict(shape=(1, 2)), dict(generator="generators")),
        ("data_path", core.data_path, dict(name="tiny"), dict(name="path_but_empty")),
        ("clip.encode_image", m.clip.encode_image, dict(images=image), dict(images="pictures")),
        ("clip.encode_text", m.clip.encode_text, dict(captions=[star]), dict(captions="no_text")),
        ("encode_text_tokens", m.clip.encode_text_tokens, dict(tokens=[star]),
         dict(tokens="no_text")),
        ("zero_shot", C.zero_shot, dict(clip=m.clip, images=image,
                                        prompts=[star]), dict(images="pictures",
                                                              prompts="no_text")),
        ("retrieval_at_k", C.retrieval_at_k, dict(zi=zi, zt=zi), dict(k="whole")),
        ("PCA.transform", pca.transform, dict(z=z), dict(z="embeddings_not_array", k="k")),
        ("PCA.truncate", pca.truncate, dict(z=z, k=3), dict(k="k")),
        ("PCA.components_for", pca.components_for, dict(), dict(share="share")),
        ("PCA.fit", A.PCA().fit, dict(z=z), dict(k="k")),
        ("PCAQuantizer", A.PCAQuantizer, dict(k=8, buckets=4),
         dict(k="whole", buckets="whole", kind="words")),
        ("quantizer.encode", quantizer.encode, dict(z=z), dict(z="embeddings_not_array")),
        ("Schedule", D.Schedule, dict(), dict(kind="words", T="whole")),
        ("spaced", D.spaced, dict(n=5), dict(n="steps")),
        ("ddim_sample", D.ddim_sample, dict(denoise=exact, x_T=noise, schedule=schedule,
                                            timesteps=[999, 0]), dict(eta="eta", **sampling)),
        ("ddpm_sample", D.ddpm_sample, dict(denoise=exact, x_T=noise, schedule=schedule, timesteps=[999, 0]),
         dict(timesteps="timesteps", generator="generators")),
        ("dpm_sample", solvers.dpm_sample, dict(denoise=exact, x_T=noise, schedule=schedule,
                                          timesteps=[999, 0]), sampling),
        ("target", D.target,
         dict(schedule=schedule,
              kind="v",
              x0=noise,
              noise=noise,
              t=torch.zeros(1, dtype=torch.long)), dict(kind="words")),
        ("ddim_invert", ddim_invert, dict(denoise=exact, x0=noise, schedule=schedule, timesteps=[999, 0]),
         dict(timesteps="timesteps", convention="words", refine="count", start="count")),
        ("prior.sample", m.prior.sample, dict(text=text, zt=zt, steps=2),
         dict(steps="steps",
              guidance="real",
              generator="generators",
              candidates="whole",
              sampler="words_not_ddim")),
        ("ar_prior.sample", m.ar_prior.sample, dict(text=text, zt=zt),
         dict(guidance="real",
              temperature="temperature",
              top_p="top_p",
              percentile="percentile",
              generator="generators")),
        ("decoder.sample", m.decoder.sample, dict(zi=zi, steps=2),
         dict(guidance="real", steps="steps", eta="eta", sampler="words", generator="generators")),
        ("upsampler1.sample", m.upsampler1.sample, dict(low_res=noise, steps=1),
         dict(low_res="odd_pictures",
              steps="steps_or_none",
              eta="eta",
              pixels="whole",
              generator="generators")),
        ("psnr", S.psnr, dict(a=torch.zeros(1, 3, 16, 16),
                              b=torch.zeros(1, 3, 16, 16)), dict(a="pair", b="pair")),
        ("ssim", S.ssim, dict(a=torch.zeros(1, 3, 16, 16),
                              b=torch.zeros(1, 3, 16, 16)), dict(a="pair", b="pair")),
        ("read_scene", read_scene, dict(image=image[0]), dict(image="pictures")),
        ("judge", V.judge, dict(images=image,
                                captions=[star]), dict(images="pictures", captions="captions")),
        ("exam", V.exam, dict(kind="one object", n=1), dict(kind="words", n="whole")),
        ("take_exam", V.take_exam, dict(model=m, kind="one object", n=1, steps=2),
         dict(kind="words",
              n="whole",
              route="words",
              guidance="real",
              steps="steps",
              seed="seed",
              batch_size="whole")),
        ("evaluate", V.evaluate, dict(model=m, n=1, steps=2, progress=False),
         dict(n="whole", guidance="real", steps="steps", seed="seed", fitted="count")),
        ("prior_exam", V.prior_exam, dict(model=m, n=2, draws=1, fitted=4),
         dict(n="whole", draws="whole", fitted="count", seed="seed")),
        ("retrieval", V.retrieval, dict(model=m, n=2), dict(n="whole")),
        ("zi_sources", V.zi_sources, dict(model=m), dict(fitted="count")),
        ("wilson", V.wilson, dict(right=1, asked=2), dict(right="count", asked="count", z="minus")),
    ]
    kinds = values()
    some = lambda kind, *without: [
        x for x in kinds[kind]
        if not any(x is w or (isinstance(w, str) and isinstance(x, str) and x == w)
                   for w in without)
    ]
    kinds |= dict(
        push=[True],
        object=[None, 5, "x", {}, object()],
        no_text=[None, 5, 1.5, b"x", [None], [5], {},
                 object(), [["a"]]],
        words_not_text=[None, 5, 1.5, b"x", "", " ", {}, object()],
        pool=some("pictures", None),
        k=[x for x in kinds["whole"] if x is not None and not (type(x) is int and x == 0)] + [1000],
        steps_or_none=some("steps", None),
        embeddings_not_array=kinds["embeddings"],
        no_path=[None, 5, "", b"x", [], {}, object(), "a\0b", " "],
        path_but_empty=some("path", "", "~/no/such/folder"),
        words_not_ddim=kinds["words"],
        odd_pictures=kinds["pictures"],
        temperature=[-1, *kinds["real"]],
        top_p=[0, -1, 1.5, *kinds["real"]],
        percentile=[-1, 101, *kinds["real"]],
        minus=[-1, *kinds["real"]])
    for name, f, right, wrong in rows:
        for argument, kind in wrong.items():
            for i, value in enumerate(kinds[kind]):
                if value is None and default(f, argument) is None:
                    continue           # None is this argument's own default
                yield name, argument, kind, i, value, f, right

def default(f, argument):
    "The default of an argument, or an object of its own where there is none."
    import inspect
    known = inspect.signature(f).parameters
    return known[argument].default if argument in known else object()

class Hangs(BaseException):
    pass

def run(share:str, seed:int):
    "Make the calls and print what was wrong with their outcomes, as JSON."
    import signal, tempfile, warnings
    import torch
    from unclip_nb.core import UnclipError
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    def alarm(*_): raise Hangs
    signal.signal(signal.SIGALRM, alarm)
    with tempfile.TemporaryDirectory() as folder:
        calls = list(table(folder))
        if share != "all":
            calls = random.Random(seed).sample(calls, int(share))
        wrong = []
        for name, argument, kind, i, value, f, right in calls:
            text = f"{name}({argument}={repr(value)[:60]!s})".replace("\n", " ")
            try:
                signal.alarm(20)
                f(**right | {argument: value})
                wrong.append(f"{text}: accepted")
            except UnclipError as e:
                if "\n" in str(e) or len(str(e)) > 400:
                    wrong.append(f"{text}: more than a line: {e}")
            except Hangs:
                wrong.append(f"{text}: hangs")
            except BaseException as e:
                wrong.append(f"{text}: {type(e).__name__}: {str(e)[:80]}")
            finally:
                signal.alarm(0)
    print(json.dumps(dict(calls=len(calls), wrong=wrong)))

def test_wrong_values_are_answered_in_one_line():
    share = os.environ.get("UNCLIP_WRONG_CALLS", "250")
    r = subprocess.run(
        [sys.executable, __file__, share, "0"],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | {
            "OMP_NUM_THREADS": "1", "UNCLIP_TYPES": "0", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1"
        })
    assert r.returncode == 0, r.stderr[-2000:]
    found = json.loads(r.stdout.splitlines()[-1])
    assert found["calls"] >= (500 if share == "all" else
                              int(share)) and not found["wrong"], "\n".join(found["wrong"])

if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))

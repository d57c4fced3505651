"PCA and its quantiser against scikit-learn, numpy's quantiles and what can be proved."
from dataclasses import dataclass
import numpy as np
import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.decomposition import PCA as SkPCA
from sklearn.preprocessing import KBinsDiscretizer
from unclip_nb.core import UnclipError, data_path, generator, randn
from unclip_nb.pca import PCA, PCAQuantizer, bucket_centres, bucket_edges, moments, to_codes
from unclip_nb.train import Stage

def data(n=400, d=12, seed=0, mean=3.):
    "Unit vectors with a spectrum and a mean that is far from zero."
    mix = torch.linalg.qr(randn((d, d), generator("mix", d))).Q * torch.logspace(0, -2, d)[:, None]
    return F.normalize(randn(
        (n, d), generator("data", seed)) @ mix + mean * F.normalize(torch.ones(d), dim=0) / 4,
                       dim=1)

Z = data()
KINDS = pytest.mark.parametrize("kind", ["uniform", "quantile"])

# ---- PCA

def same_up_to_sign(ours, theirs):
    theirs = torch.as_tensor(theirs).float()
    return (ours - theirs * (ours * theirs).sum(1, keepdim=True).sign()).abs().max()

@pytest.mark.parametrize("n,d", [(400, 12), (100, 96), (64, 64)])
def test_equals_scikit_learn(n, d):
    z = data(n, d)
    ours, sk = PCA().fit(z), SkPCA(svd_solver="full").fit(z.double().numpy())
    determined = min(n - 1, d)                                          # a direction without variance is anybody's choice
    assert same_up_to_sign(ours.components[:determined], sk.components_[:determined]) < 1e-5
    assert torch.allclose(ours.variances, torch.tensor(sk.explained_variance_).float(), atol=1e-6)
    assert torch.allclose(ours.mean, torch.tensor(sk.mean_).float(), atol=1e-6)
    k = d // 2
    sk_k = SkPCA(k, svd_solver="full").fit(z.double().numpy())
    again = sk_k.inverse_transform(sk_k.transform(z.double().numpy()))
    assert (ours.truncate(z, k) - torch.tensor(again).float()).abs().max() < 1e-5

def test_components_are_orthonormal_in_decreasing_order_with_a_fixed_sign():
    p = PCA().fit(Z)
    assert torch.allclose(p.components @ p.components.T, torch.eye(12), atol=1e-6)
    assert (p.variances.diff() <= 0).all() and (p.variances >= 0).all()
    assert (p.components.gather(1, p.components.abs().argmax(1, keepdim=True)) > 0).all()
    assert all(b.dtype == torch.float32 for b in p.buffers())

@pytest.mark.parametrize("sizes", [[400], [1] * 400, [399, 1], [0, 7, 0, 393], [100, 250, 50]])
def test_stream_equals_one_shot(sizes):
    one, many = PCA().fit(Z), PCA().fit_batches(iter(Z.split(sizes)))   # an iterator: nothing is gone through twice
    for a, b in zip(one.buffers(), many.buffers()):
        assert torch.allclose(a, b, atol=1e-6)

def test_moments_equal_numpy_far_from_zero():
    x = Z.double() + 1e4
    n, mean, cov = moments(x.split(37))
    assert n == 400 and np.allclose(mean,
                                    x.numpy().mean(0)) and np.allclose(
                                        cov, np.cov(x.numpy().T), atol=1e-9)

def test_error_is_the_variance_dropped_and_no_projection_is_better():
    p = PCA().fit(Z)
    for k in range(13):
        lost = (p.truncate(Z, k) - Z).square().sum(1).mean()
        assert torch.isclose(lost, p.variances[k:].sum() * 399 / 400, atol=1e-6)
        other = torch.linalg.qr(randn((12, 12), generator("other", k))).Q[:k]
        assert ((Z - p.mean) - (Z - p.mean) @ other.T @ other).square().sum(1).mean() >= lost - 1e-6

def test_round_trip_and_centring():
    p = PCA().fit(Z)
    assert torch.allclose(p.inverse(p.transform(Z)), Z, atol=1e-6)
    assert torch.allclose(p.truncate(Z, 0), Z.mean(0).expand_as(Z), atol=1e-6)
    shifted = PCA().fit(Z + 5)                                          # where the cloud lies changes the mean and nothing else
    assert torch.allclose(shifted.components, p.components, atol=1e-4) and torch.allclose(
        shifted.transform(Z + 5), p.transform(Z), atol=1e-4)

def test_components_for():
    p = PCA(dim=4)
    p.components, p.variances = torch.eye(4), torch.tensor([5., 3., 1., 1.])
    assert [p.components_for(s) for s in (0.0, 0.5, 0.51, 0.8, 0.95, 1.0)] == [1, 1, 2, 2, 4, 4]

def test_autocast_does_not_touch_it():
    q = PCAQuantizer(6, 256).fit(Z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(q.encode(Z),
                           PCAQuantizer(6, 256).fit(Z).encode(Z)) and q.decode(
                               q.encode(Z)).dtype == torch.float32
    assert torch.equal(q.encode(Z), PCAQuantizer(6, 256).fit(Z).encode(Z))

# ---- buckets

@pytest.mark.parametrize("buckets", [1, 2, 7, 64])
def test_edges_equal_numpy(buckets):
    y = PCA().fit(Z).transform(Z, 5)
    at = np.linspace(0, 1, buckets + 1)
    assert np.allclose(bucket_edges(y, buckets, "quantile"),
                       np.quantile(y.double().numpy(), at, axis=0).T,
                       atol=1e-6)
    assert np.allclose(bucket_edges(y, buckets),
                       np.linspace(y.min(0).values.numpy(),
                                   y.max(0).values.numpy(), buckets + 1).T,
                       atol=1e-6)

@KINDS
def test_codes_equal_scikit_learn(kind):
    y = PCA().fit(Z).transform(Z, 5)
    kw = dict(quantile_method="linear") if kind == "quantile" else {}
    sk = KBinsDiscretizer(9, encode="ordinal", strategy=kind, subsample=None,
                          **kw).fit(y.double().numpy())
    theirs = torch.tensor(sk.transform(y.double().numpy())).long()
    assert (to_codes(y, bucket_edges(y, 9, kind)) == theirs).float().mean() > 0.995      # an edge on a value may round to either side

def test_toy_by_hand():
    toy = torch.tensor([[0., 0., .3], [2., 1., .1], [4., 2., .2], [5., 3., .6], [7., 4., .5],
                        [9., 30., .4]])
    uniform, quantile = (bucket_edges(toy, 3, k) for k in ("uniform", "quantile"))
    assert to_codes(toy, uniform).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 2],
                                               [2, 0, 2], [2, 2, 1]]
    assert to_codes(toy, quantile).tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0], [1, 1, 2],
                                                [2, 2, 2], [2, 2, 1]]
    assert torch.allclose(bucket_centres(toy, uniform)[1], torch.tensor([5., 15., 25.]))
    assert torch.allclose(
        bucket_centres(toy, quantile, "quantile")[1], torch.tensor([.5, 2.5, 17.]))

@KINDS
@pytest.mark.parametrize("value", [0., 1.7])
def test_a_component_without_variance(kind, value):
    y = torch.full((20, 1), value)
    edges = bucket_edges(y, 4, kind)
    codes, centres = to_codes(y, edges), bucket_centres(y, edges, kind)
    assert 0 <= codes.min() and codes.max() < 4 and torch.allclose(centres[0][codes],
                                                                   y) and centres.isfinite().all()

def test_quantile_buckets_are_equally_full_and_their_means_the_best_centres():
    q = PCAQuantizer(5, 16, "quantile").fit(Z)
    counts = torch.stack([torch.bincount(c, minlength=16) for c in q.encode(Z).T])
    assert counts.min() >= 24 and counts.max() <= 26                    # 400 / 16 = 25
    y, codes = q.pca.transform(Z, 5), q.encode(Z)
    def error(c): return (c.T.gather(0, codes) - y).square().mean()
    for nudge in (1e-2, -1e-2):
        assert error(q.centres) < error(q.centres + nudge)
    assert error(q.centres) < error((q.edges[:, 1:] + q.edges[:, :-1]) / 2)

# ---- quantiser

@pytest.mark.parametrize("buckets", [1, 2, 10, 1024])
def test_error_is_at_most_half_a_bucket_inside_the_range(buckets):
    q, new = PCAQuantizer(6, buckets).fit(Z), data(seed=1)
    y, back = q.pca.transform(new, 6), q.pca.transform(q.decode(q.encode(new)), 6)
    half, inside = (q.edges[:, 1] - q.edges[:, 0]) / 2, (y >= q.edges[:, 0]) & (y <= q.edges[:, -1])
    assert ((y - back).abs() <= half + 1e-6)[inside].all() and 0.95 < inside.float().mean() < 1

@KINDS
def test_outside_clamps_to_the_end_buckets(kind):
    q = PCAQuantizer(3, 8, kind).fit(Z)
    far = q.pca.inverse(torch.tensor([[99., -99., 99.], [-99., 99., -99.]]))
    assert q.encode(far).tolist() == [[7, 0, 7], [0, 7, 0]]

@KINDS
def test_decoded_codes_encode_to_themselves(kind):
    q = PCAQuantizer(6, 16, kind).fit(Z)
    codes = torch.randint(16, (50, 6), generator=generator("codes"))
    assert torch.equal(q.encode(q.decode(codes)), codes) and q.encode(Z).dtype == torch.int64

def test_more_of_everything_is_closer():

    def cosine(k, n):
        q = PCAQuantizer(k, n).fit(Z)
        return F.cosine_similarity(q.decode(q.encode(Z)), Z).mean()

    assert cosine(2, 8) < cosine(4, 8) < cosine(4, 32) < cosine(12, 256) and cosine(12,
                                                                                    1024) > 0.99999

@KINDS
def test_fit_from_batches_equals_fit(kind):
    one, many = PCAQuantizer(6, 32, kind).fit(Z), PCAQuantizer(6, 32, kind).fit(list(Z.split(33)))
    for a, b in zip(one.buffers(), many.buffers()):
        assert torch.allclose(a, b, atol=1e-6)

@dataclass
class Config:
    dim:int=12
class Holder(Stage):
    "A stage with a quantiser inside."
    name = "holder"
    def __init__(self, config:Config):
        super().__init__(config)
        self.quantizer, self.weight = PCAQuantizer(5, 16, "quantile",
                                                   dim=config.dim), torch.nn.Linear(3, 3)

def test_saves_with_its_stage_in_float32(tmp_path):
    stage = Holder(Config())
    stage.quantizer.fit(Z)
    stage.save_pretrained(tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["weight.weight"].dtype == torch.float16 and {
        x.dtype
        for k, x in stored.items() if "quantizer" in k
    } == {torch.float32}
    again = Holder.from_pretrained(tmp_path).quantizer
    assert torch.equal(again.encode(Z), stage.quantizer.encode(Z)) and torch.equal(
        again.decode(again.encode(Z)), stage.quantizer.decode(again.encode(Z)))

def test_paper_size_builds_without_memory():
    with torch.device("meta"):
        q = PCAQuantizer(319, 1024, dim=1024)
    assert q.edges.shape == (319, 1025) and q.centres.shape == (
        319, 1024) and q.pca.components.shape == (1024, 1024)
    assert not list(q.parameters())

@pytest.mark.parametrize("mistake,says", [
    (lambda: PCA().fit(Z[:11]), "11 embeddings are too few for 12 components"),
    (lambda: PCA().fit(Z[:0]), "0 embeddings"),
    (lambda: PCA().fit_batches([]), "0 embeddings"),
    (lambda: PCA().fit(Z, 13), "at most 12"),
    (lambda: PCA(8).fit(Z), "length 8, not 12"),
    (lambda: PCA().fit(torch.cat([Z, Z[:1] * float("nan")])), "NaN"),
    (lambda: PCA(12).transform(Z), "call fit first"),
    (lambda: PCA().inverse(Z), "call fit first"),
    (lambda: PCA(12).components_for(), "call fit first"),
    (lambda: PCA().fit(Z).transform(Z, 13), "at most 12"),
    (lambda: PCA().fit(Z).truncate(Z[:, :5], 3), "length 12, not 5"),
    (lambda: PCA().fit(Z).inverse(torch.zeros(1, 13)), "at most 12"),
    (lambda: PCAQuantizer(5, 8).fit(Z[:4]), "4 embeddings are too few for 5 components"),
    (lambda: PCAQuantizer(13, 8).fit(Z), "at most 12"),
    (lambda: PCAQuantizer(13, 8, dim=12), "at most 12"),
    (lambda: PCAQuantizer(0, 8), "at least one"),
    (lambda: PCAQuantizer(5, 8, "equal"), "uniform or quantile"),
    (lambda: bucket_edges(Z, 8, "equal"), "uniform or quantile"),
    (lambda: PCAQuantizer(5, 8).fit(iter(Z.split(100))), "only once"),
    (lambda: PCAQuantizer(5, 8).encode(Z), "call fit first"),
    (lambda: PCAQuantizer(5, 8, dim=12).encode(Z), "call fit first"),
    (lambda: PCAQuantizer(5, 8, dim=12).decode(torch.zeros(1, 5, dtype=torch.long)),
     "call fit first"),
    (lambda: PCAQuantizer(5, 8).fit(Z).decode(torch.full((1, 5), 8)), "give 0 to 7"),
    (lambda: PCAQuantizer(5, 8).fit(Z).decode(torch.full((1, 5), -1)), "give 0 to 7"),
    (lambda: PCAQuantizer(5, 8).fit(Z).decode(torch.zeros(1, 4, dtype=torch.long)), "give 5"),
])
def test_mistakes_are_named(mistake, says):
    with pytest.raises(UnclipError, match=says):
        mistake()

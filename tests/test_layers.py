"Layers against independent implementations: diffusers' time embedding, torch.nn's attention, the causal claim and the cache."
import pytest, torch
from torch import nn
from unclip_nb.layers import Attention, Block, KVCache, TimeEmbedding, Transformer, timestep_embedding


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("dim", [2, 32, 33])
def test_timestep_embedding_equals_diffusers(dim):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0, 1, 17, 500, 999])
    theirs = embeddings.get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(t, dim), theirs)
    assert timestep_embedding(t / 7, dim).shape == (5, dim)   # fractions too

def test_time_embedding_follows_its_weights_dtype():
    assert TimeEmbedding(16, 8).bfloat16()(torch.tensor([3, 4])).dtype == torch.bfloat16

@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_torch(causal):
    torch.manual_seed(0)
    ours, theirs = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias
    })
    x = tokens(2, 7, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
    assert torch.allclose(ours(x, causal=causal),
                          theirs(x, x, x, attn_mask=mask, need_weights=False)[0],
                          atol=1e-6)

def test_block_equals_torch():
    torch.manual_seed(0)
    ours, theirs = Block(24, 3), nn.TransformerEncoderLayer(24,
                                                            3,
                                                            96,
                                                            dropout=0.0,
                                                            activation="gelu",
                                                            batch_first=True,
                                                            norm_first=True)
    names = {
        "self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.",
        "linear1.": "mlp.0.", "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2."
    }
    theirs.load_state_dict({
        k + end: ours.state_dict()[v + end]
        for k, v in names.items()
        for end in ("weight", "bias")
    })
    x, mask = tokens(2, 7, 24), nn.Transformer.generate_square_subsequent_mask(7)
    assert torch.allclose(ours(x), theirs(x, src_mask=mask), atol=1e-5)

def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads"):
        Attention(24, 5)


@pytest.mark.parametrize(
    "cuts", [(0, 9), (0, 1, 2, 3, 9), (0, 8, 9),
             (0, 3, 6, 9), tuple(range(10))])
@torch.no_grad()
def test_cached_equals_uncached(cuts):
    torch.manual_seed(0)
    model, x = Transformer(32, 3, 4), tokens(2, 9, 32)
    cache = model.make_cache()
    pieces = [model(x[:, a:b], cache) for a, b in zip(cuts, cuts[1:])]
    assert torch.allclose(torch.cat(pieces, 1), model(x), atol=1e-5)
    assert [len(c) for c in cache] == [9] * 3

@torch.no_grad()
def test_a_prefix_can_be_used_again_and_for_several_draws():
    torch.manual_seed(0)
    model, prefix, ends = Transformer(32, 3, 4), tokens(2, 6, 32), tokens(4, 3, 32, seed=1)
    cache = model.make_cache()
    model(prefix, cache)
    twice = [c.repeat(2) for c in cache]
    for _ in range(2):
        out = model(ends, twice, append=False)
    whole = model(torch.cat([prefix.repeat_interleave(2, 0), ends], 1))[:, 6:]
    assert torch.allclose(out, whole, atol=1e-5) and [len(c) for c in twice
                                                      ] == [6] * 3 and [len(c)
                                                                        for c in cache] == [6] * 3
    assert len(KVCache().repeat(3)) == 0

@torch.no_grad()
def test_nothing_after_k_moves_k():
    torch.manual_seed(0)
    model, x = Transformer(32, 3, 4), tokens(1, 8, 32)
    base = model(x)
    for k in range(8):
        y = x.clone()
        y[:, k] *= -1   # not += 1: LayerNorm would take it away again
        moved = (model(y) - base).abs().amax(-1)[0]
        assert (moved[:k] == 0).all() and (moved[k:] > 1e-4).all()
        assert ((model(y, causal=False) - model(x, causal=False)).abs().amax(-1) > 1e-4).all()

@torch.no_grad()
def test_uncausal_with_a_cache_sees_everything_new():
    torch.manual_seed(0)
    model, x = Attention(32, 4), tokens(1, 8, 32)
    cache = KVCache()
    model(x[:, :5], cache, causal=False)
    assert torch.allclose(model(x[:, 5:], cache, causal=False),
                          model(x, causal=False)[:, 5:],
                          atol=1e-6)

@torch.no_grad()
def test_the_stream_does_not_grow_with_depth():
    torch.manual_seed(0)
    x = tokens(4, 16, 64)
    sizes = [Transformer(64, layers, 4, final_norm=False)(x).std().item() for layers in (2, 8, 32)]
    assert max(sizes) < 2 and max(sizes) / min(sizes) < 1.3

def test_gradients_reach_every_parameter():
    model = Transformer(16, 2, 2)
    (model(tokens(2, 5, 16)) * tokens(2, 5, 16, seed=1)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

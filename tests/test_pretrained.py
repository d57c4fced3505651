"Published weights: every part of a tiny Karlo against diffusers and transformers, both ways, and what goes wrong."
import json, os, shutil, sys, subprocess, warnings
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import pytest, torch
import torch.nn.functional as F
from unclip_nb.clip import CLIP
from unclip_nb.core import UnclipError, generator
from unclip_nb.data import mend_torchvision
from unclip_nb.diffusion import predict, spaced
from unclip_nb.pipeline import UnCLIP
from unclip_nb.pretrained import Karlo, clip_names, from_diffusers, prior_names, save_diffusers, tiny_karlo, unet_names
from unclip_nb.unet import UNet, UNetConfig

CAPTIONS = ['a big red frog on a green leaf', 'an old monk, highly detailed']

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny Karlo in diffusers' format, written by us"
    out = tmp_path_factory.mktemp('karlo')/'tiny'
    save_diffusers(tiny_karlo(), out)
    return out

@pytest.fixture(scope='module')
def model(folder): return UnCLIP.from_pretrained(folder, device='cpu')

@pytest.fixture(scope='module')
def pipe(folder):
    "The same folder as diffusers reads it"
    mend_torchvision()
    warnings.filterwarnings('ignore')
    import diffusers.pipelines as P, diffusers.pipelines.deprecated.unclip as U
    P.unclip = U                                    # what the published index calls the module
    from diffusers import UnCLIPPipeline
    from diffusers.utils import logging
    logging.set_verbosity_error()
    pipe = UnCLIPPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def apart(a, b): return ((a - b).norm() / b.norm()).item()

# Equality, part by part

@torch.no_grad()
def test_clip_equals_transformers(model, pipe, folder):
    from transformers import CLIPVisionModelWithProjection
    zt, hidden, mask = pipe._encode_prompt(CAPTIONS, 'cpu', 1, False)
    ours_zt, ours_text = model.clip.encode_text_tokens(CAPTIONS)
    assert apart(ours_zt, zt) < 1e-5 and apart(ours_text, hidden * mask[..., None]) < 1e-5
    assert ours_text.any(-1).equal(mask) and (zt.norm(dim=1) > 1.5).all()              # raw, not of unit norm
    tower = CLIPVisionModelWithProjection.from_pretrained(folder/'image_encoder')
    x = torch.rand(2, 3, 32, 32, generator=generator('x')) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1)
                 for v in (model.clip.config.image_mean, model.clip.config.image_std))
    assert apart(model.encode_image(x), tower(((x + 1) / 2 - mean) / std).image_embeds) < 1e-5

@torch.no_grad()
@pytest.mark.parametrize('guidance', (1.0, 4.0))
@pytest.mark.parametrize('cache', (True, False))
@pytest.mark.parametrize('t', (999, 500, 0))
def test_prior_step_equals_diffusers(model, pipe, guidance, cache, t):
    zt, hidden, mask = pipe._encode_prompt(CAPTIONS, 'cpu', 1, True)                   # null first
    x = torch.randn(2, 32, generator=generator('x', t))
    both = pipe.prior(torch.cat([x, x]),
                      timestep=torch.tensor(t),
                      proj_embedding=zt,
                      encoder_hidden_states=hidden,
                      attention_mask=mask)
    null, cond = both.predicted_image_embedding.chunk(2)
    want = (null + guidance * (cond - null)).clamp(-5, 5)
    ours_zt, text = model.clip.encode_text_tokens(CAPTIONS)
    got = model.prior.denoiser(text, ours_zt, guidance, cache=cache)(x, torch.full((2,), t)).x0
    assert apart(got, want) < 2e-5

@torch.no_grad()
def test_prior_holds_its_guess_within_the_limit(model, monkeypatch):
    "A limit that binds: at 5, a tiny random prior never reaches it"
    zt, text = model.clip.encode_text_tokens(CAPTIONS)
    x, t = torch.randn(2, 32, generator=generator('x')), torch.full((2,), 500)
    def guess(limit):
        monkeypatch.setattr(model.prior.config, 'limit', limit)
        return model.prior.denoiser(text, zt, 4.0)(x, t).x0
    free, held = guess(1e9), guess(0.1)
    assert free.abs().max() > 0.2 and torch.allclose(held, free.clamp(-0.1, 0.1))

@torch.no_grad()
@pytest.mark.parametrize('guidance', (1.0, 8.0))
def test_decoder_step_equals_diffusers(model, pipe, guidance):
    zt, hidden, mask = pipe._encode_prompt(CAPTIONS, 'cpu', 1, True)
    g = generator('decoder')
    z, x, t = torch.randn(2, 32, generator=g) * 4, torch.randn(2, 3, 16, 16,
                                                               generator=g), torch.full((2, ), 480)
    context, vector = pipe.text_proj(image_embeddings=z,
                                     prompt_embeds=zt,
                                     text_encoder_hidden_states=hidden,
                                     do_classifier_free_guidance=True)
    out = pipe.decoder(sample=torch.cat([x, x]),
                       timestep=t[0],
                       encoder_hidden_states=context,
                       class_labels=vector,
                       attention_mask=F.pad(mask, (4, 0), value=True)).sample
    (null, _), (cond, variance) = (o.split(3, dim=1) for o in out.chunk(2))
    p = model.decoder.denoiser(z, model.clip.tokenizer.encode(CAPTIONS), guidance)(x, t)
    assert apart(p.eps, null + guidance * (cond - null)) < 3e-5
    assert apart(p.mix, (variance + 1) / 2) < 1e-5                                     # learned variance: the conditional half's

@torch.no_grad()
@pytest.mark.parametrize('t,net', ((832, 'super_res_first'), (0, 'super_res_last')))
def test_super_resolution_equals_diffusers(model, pipe, t, net):
    g = generator('up')
    x, low = torch.randn(2, 3, 64, 64, generator=g), torch.rand(2, 3, 16, 16, generator=g) * 2 - 1
    big = F.interpolate(low, size=[64, 64], mode='bicubic', align_corners=False, antialias=True)
    want = getattr(pipe, net)(sample=torch.cat([x, big], 1), timestep=t).sample
    p = model.upsampler1.denoiser(low)(x, torch.full((2,), t))
    assert apart(p.eps, want) < 1e-5

@pytest.mark.parametrize('n', (2, 7, 25, 50))
def test_timesteps_equal_diffusers(pipe, n):
    pipe.decoder_scheduler.set_timesteps(n)
    assert pipe.decoder_scheduler.timesteps.tolist() == spaced(n)

def reads_as(pipe, clip):
    "Captions read by diffusers' own tower, at its own precision: z_t, and the tokens up to the end"
    def read(captions):
        tokens = clip.tokens_of(captions)
        tokens = torch.where(tokens.any(1, keepdim=True), tokens, clip.tokenizer.encode(['']))
        keep = torch.arange(tokens.shape[1]) <= tokens.argmax(1)[:, None]
        out = pipe.text_encoder(tokens * keep)
        return out.text_embeds, out.last_hidden_state * keep[..., None]
    return read

@torch.no_grad()
def test_whole_text_to_image_equals_diffusers(model, pipe, monkeypatch):
    """Prior, decoder at guidance 8 and both super-resolution nets in float64 from the same captions' embeddings, noise and schedule.
    `CLIP.encode_text_tokens` gives float32, which the guided steps enlarge to 9e-5 in the picture: so diffusers' own tower reads for both
    here, and the two towers are compared in `test_clip_equals_transformers`. diffusers' schedule is float32, where its last step shrinks
    the picture by 0.05 %: both take ours. Statistics are kept as 1 / std, here from diffusers' std without rounding."""
    import copy
    import unclip_nb.decoder, unclip_nb.diffusion, unclip_nb.pretrained
    pipe, ours = copy.deepcopy(pipe), copy.deepcopy(model).double()
    for s in (ours.prior, ours.decoder):
        object.__setattr__(s, 'reader', ours.clip)
    for part in ('prior', 'decoder', 'text_proj', 'text_encoder', 'super_res_first',
                 'super_res_last'):
        getattr(pipe, part).double()
    ours.prior.stats.mean, ours.prior.stats.matrix = ours.prior.stats.mean.double(), torch.diag(
        1 / pipe.prior.clip_std[0])
    assert ours.prior.stats.matrix.dtype == torch.float64
    for s in (pipe.prior_scheduler, pipe.decoder_scheduler, pipe.super_res_scheduler):
        s.betas, s.alphas_cumprod = model.decoder.schedule.betas, model.decoder.schedule.abar
        s.alphas = 1 - s.betas
    seen = {}
    heard, first = pipe.text_proj.forward, pipe.super_res_first.forward
    pipe.text_proj.forward = lambda **k: (seen.setdefault('zi', k['image_embeddings']), heard(**k))[
        1]
    pipe.super_res_first.forward = lambda sample, timestep: (seen.setdefault('low', sample[:, 3:]),
                                                             first(sample, timestep))[1]
    want = pipe(CAPTIONS, generator=torch.Generator().manual_seed(5), output_type='np',
                prior_num_inference_steps=5, decoder_num_inference_steps=5).images

    def double(shape, generator=None, device=None):
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    for module in (unclip_nb.diffusion, unclip_nb.pretrained, unclip_nb.decoder):
        monkeypatch.setattr(module, 'randn', double)
    ours.clip.__dict__['encode_text_tokens'] = reads_as(pipe, ours.clip)
    g = torch.Generator().manual_seed(5)
    tokens = ours.clip.tokenizer.encode(CAPTIONS)
    zt, text = ours.clip.encode_text_tokens(tokens)
    z = ours.prior.sample(text, zt, 5, generator=g)
    x = ours.decoder.sample(z, tokens, 8.0, 5, g, sampler='ddpm')
    y = ours.upsampler1.sample(x, generator=g)
    big = F.interpolate(x, (64, 64), mode='bicubic', align_corners=False, antialias=True)
    want = torch.from_numpy(want).permute(0, 3, 1, 2) * 2 - 1                          # diffusers gives pictures in float32
    far = [apart(z, seen['zi']), apart(big, seen['low']), apart(y, want)]
    assert y.dtype == torch.float64 and max(far) < 1e-6, far

# Names and shapes

def test_names_and_shapes_at_real_size():
    "Every parameter of Karlo's decoder and super-resolution U-Nets, on the meta device, in diffusers' class and in ours"
    mend_torchvision()
    from diffusers import UNet2DConditionModel, UNet2DModel
    from unclip_nb.pretrained import their_unet
    for c, cls, count in ((UNetConfig(64,
                                      3,
                                      6,
                                      320, (1, 2, 3, 4),
                                      3, (32, 16, 8),
                                      64,
                                      context_width=1536), UNet2DConditionModel,
                           885_439_686), (UNetConfig(256,
                                                     6,
                                                     3,
                                                     320, (1, 2, 3, 4),
                                                     3, (),
                                                     film=False), UNet2DModel, 691_579_523)):
        with torch.device('meta'):
            mine, other = UNet(c), cls(**their_unet(c, cls.__name__))
        theirs, names, used = other.state_dict(), unet_names(c), set()
        for k, v in mine.state_dict().items():
            parts = [names[k]] if isinstance(names[k], str) else names[k]
            used.update(parts)
            assert sum(
                theirs[p].shape[0]
                for p in parts) == v.shape[0] and theirs[parts[0]].shape[1:] == v.shape[1:], k
        assert {k for k in theirs.keys() - used if not k.startswith('time_embedding')} == set()
        assert sum(p.numel() for p in other.parameters()) == count

def test_no_diffusers_at_run_time(folder):
    code = (
        "import sys; sys.modules['diffusers'] = sys.modules['transformers'] = None\n"
        "from unclip_nb.pipeline import UnCLIP\n"
        f"m = UnCLIP.from_pretrained({str(folder)!r}, device='cpu'); print(tuple(m.generate('a frog', steps=2).shape))"
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.stdout.strip() == '(1, 3, 64, 64)', run.stderr[-2000:]

# The other way

def test_diffusers_writes_and_we_read(pipe, folder, model, tmp_path):
    "diffusers' own save_pretrained, read by us: the same numbers"
    pipe.save_pretrained(tmp_path)
    shutil.copytree(folder/'image_encoder', tmp_path/'image_encoder')
    again = from_diffusers(tmp_path, device='cpu')
    for k, stage in model.stages.items():
        a, b = stage.state_dict(), again.stages[k].state_dict()
        assert a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a), k

def test_saves_itself_in_the_format_it_came_in(model, tmp_path):
    model.save_pretrained(tmp_path/'again', dtype=torch.float16)
    again = UnCLIP.from_pretrained(tmp_path/'again', device='cpu')
    assert isinstance(again, Karlo)
    a, b = model.decoder.null_zi, again.decoder.null_zi
    assert a.half().float().equal(b)

def test_our_own_systems_are_refused(tmp_path):
    with pytest.raises(UnclipError, match="cannot be written in Karlo's format: its CLIP"):
        save_diffusers(UnCLIP.from_pretrained('tiny', device='cpu'), tmp_path/'x')
    assert not (tmp_path/'x').exists()

# What became general

def test_lengths_are_kept(model):
    from unclip_nb.edits import angle, interpolation_path, pca_path, slerp, text_diff_path
    from unclip_nb.pca import PCA
    from unclip_nb.pipeline import Latent
    z = F.normalize(torch.randn(2, 32, generator=generator('z')), dim=1) * torch.tensor([[20.],
                                                                                         [30.]])
    latent = Latent(z, torch.zeros(2, 3, 16, 16), [800, 600, 400, 200, 0])
    turned = text_diff_path(latent, F.normalize(torch.randn(1, 32, generator=generator('d')),
                                                dim=1), [0.25, 0.5]).zi
    assert torch.allclose(turned.norm(dim=1), torch.tensor([20., 20., 30., 30.]))
    assert 0.3 < angle(turned[1:2], z[:1]).item()                                      # a unit direction would turn it by 0.05
    way = interpolation_path(latent[0], latent[1], 5).zi
    assert torch.allclose(way.norm(dim=1), torch.linspace(20, 30, 5))
    steps = [angle(a[None], b[None]).item() for a, b in zip(way, way[1:])]
    assert max(steps) - min(steps) < 1e-4                                              # constant angular speed
    assert slerp(z[:1], z[1:], 0.0, lengths=True).allclose(z[:1]) and slerp(
        z[:1], z[1:], 1.0, lengths=True).allclose(z[1:])
    pca = PCA().fit(torch.randn(64, 32, generator=generator('p')))
    assert torch.allclose(
        pca_path(latent, pca, [3, 32]).zi.norm(dim=1), torch.tensor([20., 20., 30., 30.]))

def test_zi_is_of_the_full_picture(model):
    photo = F.interpolate(torch.rand(1, 3, 9, 12, generator=generator('photo')) * 2 - 1, (90, 120),
                          mode='bicubic').clamp(-1, 1)
    full = model.encode_image(photo)
    assert apart(model.invert(photo, steps=3).zi, full) < 1e-6
    assert apart(model.encode_image(model.pictures(photo)), full) > 1e-3               # of the small picture: another
    tiny = UnCLIP.from_pretrained('tiny', device='cpu')
    assert apart(tiny.see(photo), tiny.encode_image(tiny.pictures(photo))) < 1e-6      # ours: of the small picture, as they were trained

def test_edits_leave_out_the_noisiest_step(model):
    assert model.invert(torch.zeros(1, 3, 16, 16), steps=4).timesteps == spaced(4, 980)
    assert model.decoder.config.edit_timesteps(50)[0] == 979
    ours = UnCLIP.from_pretrained('tiny', device='cpu').decoder.config
    assert ours.edit_timesteps(50) == spaced(50)

@torch.no_grad()
def test_hidden_tokens_change_nothing():
    from unclip_nb.layers import Transformer
    net = UNet(UNetConfig(16, 3, 3, 32, (1, 2), 1, (8,), 16, context_width=8)).eval()
    for p in net.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator('w', p.numel())))
    x, emb, g = torch.randn(1, 3, 16, 16,
                            generator=generator('x')), torch.zeros(1, 128), generator('c')
    context = torch.randn(1, 5, 8, generator=g)
    other = context.clone()
    other[:, 3:] = 9
    keep = torch.tensor([[True, True, True, False, False]])
    assert net(x, emb, (context, keep)).equal(net(x, emb, (other, keep)))
    assert torch.allclose(net(x, emb, (context, keep)), net(x, emb, context[:, :3]), atol=1e-5)
    assert not torch.allclose(net(x, emb, context), net(x, emb, other), atol=1e-3)
    t = Transformer(16, 2, 2)
    words = torch.randn(1, 6, 16, generator=g)
    hidden = torch.tensor([[True, True, False, False, True, True]])
    assert torch.allclose(t(words, keep=hidden)[:, [0, 1, 4, 5]],
                          t(words[:, [0, 1, 4, 5]]),
                          atol=1e-5)

def test_the_embedding_can_be_added():
    from unclip_nb.unet import ResBlock
    added, scaled = ResBlock(32, 32, 8, film=False), ResBlock(32, 32, 8)
    assert added.emb.out_features == 32 and scaled.emb.out_features == 64
    x, e = torch.randn(1, 32, 4, 4), torch.randn(1, 8)
    torch.nn.init.normal_(added.conv2.weight)
    h = added.norm2(added.conv1(F.silu(added.norm1(x))) + added.emb(F.silu(e))[:, :, None, None])
    assert torch.allclose(added(x, e), x + added.conv2(F.silu(h)), atol=1e-5)

def test_half_precision_keeps_noise_and_statistics(folder, model):
    half = UnCLIP.from_pretrained(folder, device='cpu', dtype=torch.bfloat16)
    assert half.decoder.null_zi.dtype == half.prior.net.query.dtype == half.upsampler1.unet.stem.weight.dtype == torch.bfloat16
    assert half.prior.stats.matrix.dtype == torch.float32
    zi = half.sample_zi(['a frog'])
    latent = half.invert(torch.zeros(1, 3, 16, 16), steps=3)
    x = half.decode(latent.zi, x_T=latent.x_T, timesteps=latent.timesteps)
    assert zi.dtype == latent.zi.dtype == latent.x_T.dtype == x.dtype == torch.float32
    assert apart(half.encode_image(x), model.encode_image(x)) < 0.05

def test_fingerprint_is_computed_once(model, monkeypatch):
    import unclip_nb.clip as C
    first, calls = model.clip.fingerprint, []
    monkeypatch.setattr(C.hashlib, 'sha256',
                        lambda: calls.append(1) or (_ for _ in ()).throw(AssertionError))
    assert model.clip.fingerprint == first and not calls
    monkeypatch.undo()
    p = next(model.clip.parameters())
    old = p.detach().clone()
    with torch.no_grad():
        p.add_(1)
    assert model.clip.fingerprint != first
    with torch.no_grad():
        p.copy_(old)
    assert model.clip.fingerprint == first

def test_offload_moves_one_stage_at_a_time(folder, monkeypatch):
    m = UnCLIP.from_pretrained(folder, device='cpu', offload=True)
    here, peak, names = set(), [], {id(s): k for k, s in m.stages.items()}
    m.offload = torch.device('cpu', 0)                                                 # the same memory under another name
    for s in m.stages.values():
        def to(device, *a, s=s, **k):
            (here.add if str(device) == 'cpu:0' else here.discard)(names[id(s)])
            peak.append(frozenset(here))
            return s
        monkeypatch.setattr(s, 'to', to, raising=False)
    pic = m.generate('a frog', steps=2)
    latent = m.invert(pic, steps=2)
    assert not here and all('prior' not in p or 'decoder' not in p for p in peak)
    assert {'prior', 'clip'} in peak and {'decoder', 'clip'} in peak and {'upsampler1'
                                                                          } in peak and max(
                                                                              map(len, peak)) == 2

def test_offload_of_our_own_system():
    here, off = UnCLIP.from_pretrained('tiny', device='cpu'), UnCLIP.from_pretrained('tiny',
                                                                                     device='cpu',
                                                                                     offload=True)
    assert here.offload is None and off.offload == torch.device('cpu')
    assert off.generate('a red circle', steps=2).equal(here.generate('a red circle', steps=2))

def test_another_network_for_the_last_step(model):
    asked = []
    hooks = [
        getattr(model.upsampler1, k).register_forward_hook(lambda *_, k=k: asked.append(k))
        for k in ('unet', 'last_unet')
    ]
    model.upsampler1.sample(torch.zeros(1, 3, 16, 16))
    for h in hooks:
        h.remove()
    assert asked == ['unet'] * 6 + ['last_unet']

def test_defaults_come_from_the_config(model, monkeypatch):
    said = {}
    monkeypatch.setattr(model, 'sample_zi', lambda c, prior, guidance, **k: torch.zeros(len(c), 32))
    monkeypatch.setattr(model, 'decode',
                        lambda zi, c, **k: said.update(k) or torch.zeros(1, 3, 64, 64))
    model.generate('a frog')
    assert (said['steps'], said['guidance'], said['sampler']) == (25, 8.0, 'ddpm')

# Bad input

def broken(folder, tmp_path, what):
    out = tmp_path/'broken'
    shutil.copytree(folder, out)
    what(out)
    with pytest.raises(UnclipError) as e:
        UnCLIP.from_pretrained(out, device='cpu')
    assert '\n' not in str(e.value)
    return str(e.value)

def change(file, **values): file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize('part',
                         ('decoder', 'text_proj', 'text_encoder', 'prior', 'super_res_last'))
def test_a_part_is_missing(folder, tmp_path, part):
    assert f'lacks {part}' in broken(folder, tmp_path, lambda f: shutil.rmtree(f/part))

def test_pickles_are_named_and_never_opened(folder, tmp_path, monkeypatch):
    import pickle
    for name in ('load', 'loads', 'Unpickler'):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, 'load', None)

    def pickled(f):
        (f / 'decoder' / 'diffusion_pytorch_model.safetensors').rename(
            f / 'decoder' / 'diffusion_pytorch_model.bin')
    assert 'pickles only (diffusion_pytorch_model.bin)' in broken(folder, tmp_path, pickled)

def test_truncated_weights(folder, tmp_path):
    def cut(f): os.truncate(f/'prior'/'diffusion_pytorch_model.safetensors', 5000)
    assert 'damaged or truncated' in broken(folder, tmp_path, cut)

@pytest.mark.parametrize('part,values,tensor',
                         (('text_proj', dict(clip_embeddings_dim=64), 'null_zi'),
                          ('prior', dict(num_embeddings=60), 'net.positions')))
def test_another_shape(folder, tmp_path, part, values, tensor):
    told = broken(folder, tmp_path, lambda f: change(f/part/'config.json', **values))
    assert tensor in told and 'config makes it' in told

@pytest.mark.parametrize(
    'part,values,told',
    (('decoder', dict(block_out_channels=[128, 384]), 'config makes it'),
     ('decoder', dict(down_block_types=['DownBlock2D', 'CrossAttnDownBlock2D']), 'DownBlock2D'),
     ('decoder', dict(norm_num_groups=16), 'norm_num_groups'),
     ('prior', dict(added_emb_type=None), 'added_emb_type'), ('prior', dict(num_layers=4), "no '"),
     ('prior', dict(num_layers=2), 'an unknown'),
     ('text_encoder', dict(hidden_act='gelu'), 'hidden_act')))
def test_configs_that_do_not_fit(folder, tmp_path, part, values, told):
    assert told in broken(folder, tmp_path, lambda f: change(f/part/'config.json', **values))

def test_shards_and_variants(folder, tmp_path):
    def shard(f):
        file = f/'decoder'/'diffusion_pytorch_model.safetensors'
        shutil.copy(file, file.with_name('diffusion_pytorch_model-00001-of-00002.safetensors'))
        file.rename(file.with_name('diffusion_pytorch_model-00002-of-00002.safetensors'))
    told = broken(folder, tmp_path, shard)
    assert 'in 2 shards' in told and 'join them into diffusion_pytorch_model.safetensors' in told
    with pytest.raises(
            UnclipError,
            match='in 2 shards.*join them into diffusion_pytorch_model.fp16.safetensors'):
        from unclip_nb.pretrained import read_part
        read_part(tmp_path/'broken', 'decoder', 'fp16')

def test_no_image_encoder(folder, tmp_path, monkeypatch):
    "As kakaobrain/karlo-v1-alpha is published: ViT-L-14 is asked for, and its absence is told with the two ways out"
    import unclip_nb.pretrained
    def absent(name): raise UnclipError(f'cannot load {name}')
    monkeypatch.setattr(unclip_nb.pretrained, 'load_clip', absent)
    told = broken(folder, tmp_path, lambda f: shutil.rmtree(f/'image_encoder'))
    assert 'has no image_encoder' in told and 'cannot load ViT-L-14:openai' in told and 'ViT-L-14:FILE' in told

def test_another_pipeline(folder, tmp_path):
    assert 'StableDiffusionPipeline' in broken(
        folder, tmp_path,
        lambda f: change(f / 'model_index.json', _class_name='StableDiffusionPipeline'))

def test_wrong_clip(folder):
    with pytest.raises(UnclipError, match='not the one in'):
        UnCLIP.from_pretrained(folder,
                               device='cpu',
                               clip=UnCLIP.from_pretrained('tiny', device='cpu').clip)

def test_prior_can_be_left_out(folder, tmp_path):
    shutil.copytree(folder, tmp_path/'edits')
    shutil.rmtree(tmp_path/'edits'/'prior')
    m = UnCLIP.from_pretrained(tmp_path/'edits', device='cpu', prior=False)
    assert m.prior is None and m.invert(torch.zeros(1, 3, 20, 20), steps=2).zi.shape == (1, 32)
    with pytest.raises(UnclipError, match='no diffusion prior'):
        m.generate('a frog')

# The hub and the command line

def test_only_what_is_needed_is_fetched(folder, monkeypatch):
    import huggingface_hub
    asked = {}
    monkeypatch.setattr(huggingface_hub, 'snapshot_download',
                        lambda name, **k: asked.update(k, name=name) or str(folder))
    m = UnCLIP.from_pretrained('kakaobrain/karlo-v1-alpha', 'cpu', prior=False, revision='abc')
    assert asked['name'] == 'kakaobrain/karlo-v1-alpha' and asked[
        'revision'] == 'abc' and m.prior is None
    assert set(asked['allow_patterns']) == {'*.json', '*.txt', '*.safetensors'
                                            } and 'prior/*' in asked['ignore_patterns']
    with pytest.raises(UnclipError, match='fp16.safetensors'):
        UnCLIP.from_pretrained('kakaobrain/karlo-v1-alpha', 'cpu', variant='fp16')
    assert '*.fp16.safetensors' in asked['allow_patterns'] and '*.safetensors' not in asked[
        'allow_patterns']

def test_push_to_hub_sends_the_whole_system_with_its_card(model, monkeypatch):
    import huggingface_hub
    sent = {}
    class Hub:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **k): sent['repo'] = repo_id

        def upload_folder(self, repo_id, folder_path, **k):
            sent['files'] = {
                str(p.relative_to(folder_path)): p.read_bytes()
                for p in folder_path.rglob('*') if p.is_file()
            }
    monkeypatch.setattr(huggingface_hub, 'HfApi', Hub)
    model.push_to_hub('someone/karlo', dtype=torch.float16)
    card = sent['files']['README.md'].decode()
    assert sent['repo'] == 'someone/karlo' and 'model_index.json' in sent[
        'files'] and 'prior/diffusion_pytorch_model.safetensors' in sent['files']
    assert 'library_name: unclip_nb' in card and 'from_pretrained("someone/karlo")' in card and 'KarloDecoder' in card
    with pytest.raises(UnclipError, match='no hub id'):
        model.push_to_hub('karlo')


@pytest.mark.parametrize('argv',
                         (['edit', 'PHOTO', '--from', 'a cat', '--to', 'a dog', '--steps', '2'], [
                             'vary', 'PHOTO', '--n', '2', '--steps', '2'
                         ], ['interpolate', 'PHOTO', 'PHOTO', '--n', '2', '--steps', '2'
                             ], ['generate', 'a frog', '--n', '1', '--steps', '2']))
def test_commands_take_the_folder(folder, tmp_path, argv, capsys):
    from PIL import Image
    from unclip_nb.cli import main
    Image.new('RGB', (40, 30), 'teal').save(tmp_path/'photo.png')
    main([str(tmp_path / 'photo.png') if a == 'PHOTO' else a for a in argv] +
         ['--weights', str(folder), '--out',
          str(tmp_path / 'out'), '--device', 'cpu'])
    assert list((tmp_path/'out').glob('*.png')) and 'pictures' in capsys.readouterr().out

def test_info_of_weights(folder, capsys):
    from unclip_nb.cli import main
    main(['info', '--weights', str(folder)])
    out = capsys.readouterr().out
    assert all(k in out for k in ('prior', 'decoder', 'upsampler1', 'half precision',
                                  's at 40%')) and out.split('decoder')[1].split()[0] == '13.3'

@pytest.mark.parametrize('widget,how', (('interpolation_widget', dict(n=2, steps=2)),
                                        ('text_diff_widget', dict(thetas=(0.0, 0.3), steps=2)),
                                        ('variations_widget', dict(n=1, etas=(0.0, 1.0), steps=2)),
                                        ('caption_widget', dict(guidances=(1.0, ), steps=(2, ))),
                                        ('priors_widget', dict(n=1, steps=2)),
                                        ('pca_widget', dict(ks=(1, 2), steps=2))))
def test_widgets_take_the_folder(model, widget, how):
    import unclip_nb.widgets as W
    w = getattr(W, widget)(model, **how).start()
    if widget == 'pca_widget':
        with pytest.raises(UnclipError, match='no AR prior whose PCA'):
            w.wait(90)
    else:
        w.wait(90)
        assert w.done == len(w.thumbs)

# Kandinsky 2.2

@torch.no_grad()
def test_kandinsky_unet_equals_diffusers(tmp_path):
    mend_torchvision()
    from diffusers import UNet2DConditionModel
    from unclip_nb.pretrained import load_kandinsky_unet
    torch.manual_seed(0)
    other = UNet2DConditionModel(sample_size=16,
                                 in_channels=4,
                                 out_channels=8,
                                 block_out_channels=(128, 256),
                                 layers_per_block=1,
                                 attention_head_dim=16,
                                 down_block_types=('ResnetDownsampleBlock2D',
                                                   'SimpleCrossAttnDownBlock2D'),
                                 up_block_types=('SimpleCrossAttnUpBlock2D',
                                                 'ResnetUpsampleBlock2D'),
                                 mid_block_type='UNetMidBlock2DSimpleCrossAttn',
                                 cross_attention_dim=48,
                                 encoder_hid_dim=40,
                                 encoder_hid_dim_type='image_proj',
                                 addition_embed_type='image',
                                 resnet_time_scale_shift='scale_shift')
    for p in other.parameters():
        if p.ndim == 1 or not p.any():
            p.add_(0.1 * torch.randn(p.shape))
    other.save_pretrained(tmp_path/'unet')
    net = load_kandinsky_unet(tmp_path)
    x, z, t = torch.randn(2, 4, 16, 16), torch.randn(2, 40), torch.full((2,), 400)
    want = other(sample=x,
                 timestep=t[0],
                 encoder_hidden_states=None,
                 added_cond_kwargs={'image_embeds': z}).sample
    assert apart(net(x, t, z), want) < 1e-5

@torch.no_grad()
def test_kandinsky_prior_is_karlos_class(tmp_path, model):
    "Another width of embeddings, limit 10, and the scheduler under another name"
    from diffusers import PriorTransformer
    from unclip_nb.pretrained import load_prior
    torch.manual_seed(0)
    other = PriorTransformer(num_attention_heads=2,
                             attention_head_dim=16,
                             num_layers=2,
                             embedding_dim=40,
                             num_embeddings=77,
                             additional_embeddings=4)
    for p in other.parameters():
        p.add_(0.1 * torch.randn(p.shape))
    other.clip_std.copy_(1 + torch.rand(1, 40))
    other.save_pretrained(tmp_path/'prior')
    (tmp_path/'scheduler').mkdir()
    (tmp_path / 'scheduler' / 'scheduler_config.json').write_text(
        json.dumps(
            dict(prediction_type='sample', variance_type='fixed_small_log',
                 clip_sample_range=10.0)))
    prior = load_prior(tmp_path, model.clip, scheduler='scheduler')
    text, zt, x = torch.randn(2, 77, 40), torch.randn(2, 40), torch.randn(2, 40)
    text[:, 9:] = 0
    want = other(x,
                 timestep=torch.tensor(300),
                 proj_embedding=zt,
                 encoder_hidden_states=text,
                 attention_mask=text.any(-1)).predicted_image_embedding
    assert prior.config.limit == 10 and apart(prior.net(text, zt, x, torch.full(
        (2, ), 300)), want) < 1e-5
    assert apart(prior.stats.inverse(x), other.post_process_latents(x)) < 1e-5

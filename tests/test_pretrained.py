"Published weights: every part of a tiny Karlo against diffusers and transformers, both ways, and what goes wrong."
import json, os, shutil, sys, subprocess, warnings
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import pytest, torch
import torch.nn.functional as F
from unclip_nb.clip import CLIP
from unclip_nb.core import UnclipError, generator
from unclip_nb.data import mend_torchvision
from unclip_nb.diffusion import predict, respace
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
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.clip.config.image_mean, model.clip.config.image_std))
    assert apart(model.encode_image(x), tower(((x + 1) / 2 - mean) / std).image_embeds) < 1e-5

@torch.no_grad()
@pytest.mark.parametrize('guidance', (1.0, 4.0))
@pytest.mark.parametrize('cache', (True, False))
@pytest.mark.parametrize('t', (999, 500, 0))
def test_prior_step_equals_diffusers(model, pipe, guidance, cache, t):
    zt, hidden, mask = pipe._encode_prompt(CAPTIONS, 'cpu', 1, True)                   # null first
    x = torch.randn(2, 32, generator=generator('x', t))
    both = pipe.prior(torch.cat([x, x]), timestep=torch.tensor(t), proj_embedding=zt, encoder_hidden_states=hidden, attention_mask=mask)
    null, cond = both.predicted_image_embedding.chunk(2)
    want = (null + guidance * (cond - null)).clamp(-5, 5)
    ours_zt, text = model.clip.encode_text_tokens(CAPTIONS)
    got = model.prior.denoiser(text, ours_zt, guidance, cache=cache)(x, torch.full((2,), t)).x0
    assert apart(got, want) < 2e-5

@torch.no_grad()
@pytest.mark.parametrize('guidance', (1.0, 8.0))
def test_decoder_step_equals_diffusers(model, pipe, guidance):
    zt, hidden, mask = pipe._encode_prompt(CAPTIONS, 'cpu', 1, True)
    g = generator('decoder')
    z, x, t = torch.randn(2, 32, generator=g) * 4, torch.randn(2, 3, 16, 16, generator=g), torch.full((2,), 480)
    context, vector = pipe.text_proj(image_embeddings=z, prompt_embeds=zt, text_encoder_hidden_states=hidden, do_classifier_free_guidance=True)
    out = pipe.decoder(sample=torch.cat([x, x]), timestep=t[0], encoder_hidden_states=context, class_labels=vector,
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
    assert pipe.decoder_scheduler.timesteps.tolist() == respace(1000, n)

@torch.no_grad()
def test_whole_text_to_image_equals_diffusers(model, pipe):
    "Same noise, one schedule for both: diffusers' own is float32, where its last step shrinks the picture by 0.05 %"
    import copy
    pipe = copy.deepcopy(pipe)
    for s in (pipe.prior_scheduler, pipe.decoder_scheduler, pipe.super_res_scheduler):
        s.betas, s.alphas_cumprod = model.decoder.schedule.betas, model.decoder.schedule.abar
        s.alphas = 1 - s.betas
    want = pipe(CAPTIONS, generator=torch.Generator().manual_seed(5), output_type='np', prior_num_inference_steps=5, decoder_num_inference_steps=5).images
    g = torch.Generator().manual_seed(5)
    tokens = model.clip.tokenizer.encode(CAPTIONS)
    zt, text = model.clip.encode_text_tokens(tokens)
    z = model.prior.sample(text, zt, 5, generator=g)
    x = model.decoder.sample(z, tokens, 8.0, 5, g, sampler='ddpm')
    y = model.upsampler1.sample(x, generator=g)
    assert apart(y, torch.from_numpy(want).permute(0, 3, 1, 2) * 2 - 1) < 1e-4

# Names and shapes

def test_names_and_shapes_at_real_size():
    "Every parameter of Karlo's decoder and super-resolution U-Nets, on the meta device, in diffusers' class and in ours"
    mend_torchvision()
    from diffusers import UNet2DConditionModel, UNet2DModel
    from unclip_nb.pretrained import their_unet
    for c, cls, count in ((UNetConfig(64, 3, 6, 320, (1, 2, 3, 4), 3, (32, 16, 8), 64, context_width=1536), UNet2DConditionModel, 885_439_686),
                          (UNetConfig(256, 6, 3, 320, (1, 2, 3, 4), 3, (), film=False), UNet2DModel, 691_579_523)):
        with torch.device('meta'): mine, other = UNet(c), cls(**their_unet(c, cls.__name__))
        theirs, names, used = other.state_dict(), unet_names(c), set()
        for k, v in mine.state_dict().items():
            parts = [names[k]] if isinstance(names[k], str) else names[k]
            used.update(parts)
            assert sum(theirs[p].shape[0] for p in parts) == v.shape[0] and theirs[parts[0]].shape[1:] == v.shape[1:], k
        assert {k for k in theirs.keys() - used if not k.startswith('time_embedding')} == set()
        assert sum(p.numel() for p in other.parameters()) == count

def test_no_diffusers_at_run_time(folder):
    code = ("import sys; sys.modules['diffusers'] = sys.modules['transformers'] = None\n"
            "from unclip_nb.pipeline import UnCLIP\n"
            f"m = UnCLIP.from_pretrained({str(folder)!r}, device='cpu'); print(tuple(m.generate('a frog', steps=2).shape))")
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
    with pytest.raises(UnclipError, match="cannot be written in Karlo's format: its CLIP"): save_diffusers(UnCLIP.from_pretrained('tiny', device='cpu'), tmp_path/'x')
    assert not (tmp_path/'x').exists()

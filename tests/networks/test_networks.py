"""Our networks give what diffusers and transformers give from the same weights."""

from dataclasses import replace

import pytest
import torch

from sd.checkpoints.names import component_names, model_names
from sd.clip import CLIP
from sd.config import DIGITS, SD15, TINY, ModelConfig
from sd.unet import UNet
from sd.vae import VAEDecoder, VAEEncoder
from tests.peers import ours_and_peers

DEEP = replace(TINY, name="deep", unet=replace(TINY.unet, layers_per_block=2), vae=replace(TINY.vae, layers_per_block=2))
INPAINT = replace(TINY, name="inpaint", unet=replace(TINY.unet, in_channels=9))
GELU = replace(TINY, name="gelu", clip=replace(TINY.clip, activation="gelu"))
CONFIGS = [TINY, DEEP, DIGITS, INPAINT, GELU]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(scope="module", params=[(c, d) for c in CONFIGS for d in TOLERANCE], ids=lambda p: f"{p[0].name}-{p[1]}")
def pair(request):
    config, dtype = request.param
    with torch.no_grad():
        yield config, dtype, *ours_and_peers(config, dtype)


def assert_close(ours, peer, dtype):
    assert ours.shape == peer.shape
    assert (ours - peer).abs().max() <= TOLERANCE[dtype] * peer.abs().max()
    assert peer.std() > 0.01  # a reference that is flat would prove nothing


@pytest.mark.parametrize("height, width, tokens", [(8, 8, 77), (16, 24, 9), (9, 13, 77)])
def test_unet_equals_diffusers(pair, height, width, tokens):
    config, dtype, ours, peers = pair
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.unet.in_channels, height, width, generator=g, dtype=dtype)
    context = torch.randn(3, tokens, config.unet.context_width, generator=g, dtype=dtype)
    t = torch.tensor([0, 417, 999])
    with torch.no_grad():
        assert_close(ours["diffusion"](x, t, context), peers["unet"](x, t, context).sample, dtype)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 40), (36, 68)])
def test_vae_encoder_equals_diffusers(pair, height, width):
    config, dtype, ours, peers = pair
    x = torch.randn(2, config.vae.image_channels, height, width, generator=torch.Generator().manual_seed(2), dtype=dtype)
    with torch.no_grad():
        mean, logvar = ours["encoder"](x)
        posterior = peers["vae"].encode(x).latent_dist
    assert_close(mean, posterior.mean, dtype)
    assert_close(logvar, posterior.logvar, dtype)


@pytest.mark.parametrize("height, width", [(4, 4), (5, 7)])
def test_vae_decoder_equals_diffusers(pair, height, width):
    config, dtype, ours, peers = pair
    z = torch.randn(2, config.vae.latent_channels, height, width, generator=torch.Generator().manual_seed(3), dtype=dtype)
    with torch.no_grad():
        assert_close(ours["decoder"](z), peers["vae"].decode(z).sample, dtype)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_equals_transformers(pair, clip_skip):
    config, dtype, ours, peers = pair
    tokens = torch.randint(0, 49406, (3, 77), generator=torch.Generator().manual_seed(4))
    tokens[:, 0], tokens[:, 9:] = 49406, 49407
    peer = peers["text_encoder"]
    with torch.no_grad():
        out = peer(tokens, output_hidden_states=True)
        norm = getattr(peer, "text_model", peer).final_layer_norm
        expected = norm(out.hidden_states[-clip_skip]) if clip_skip > 1 else out.last_hidden_state
        assert_close(ours["clip"](tokens, clip_skip), expected, dtype)


def networks(config: ModelConfig):
    with torch.device("meta"):
        return {"clip": CLIP(config.clip), "encoder": VAEEncoder(config.vae), "decoder": VAEDecoder(config.vae),
                "diffusion": UNet(config.unet)}


def test_sd15_unet_has_the_parameters_of_sd15():
    unet = networks(SD15)["diffusion"]
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert len(unet.state_dict()) == 686


@pytest.mark.parametrize("config", [*CONFIGS, SD15], ids=lambda c: c.name)
def test_the_table_of_names_covers_each_network_exactly_and_is_a_bijection(config):
    for component, network in networks(config).items():
        names = component_names(component, getattr(config, {"clip": "clip", "diffusion": "unet"}.get(component, "vae")))
        assert {n.ours for n in names} == {k.rpartition(".")[0] for k in network.state_dict()}
        assert len(names) == len({n.ours for n in names})
    names = model_names(config)
    for spelling in ("path", "ldm", "kohya"):
        values = [getattr(n, spelling) for n in names if getattr(n, spelling) is not None]
        assert len(values) == len(set(values)), spelling


def test_timesteps_of_a_batch_are_independent(pair):
    config, dtype, ours, _ = pair
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, config.unet.in_channels, 8, 8, generator=g, dtype=dtype)
    context = torch.randn(2, 77, config.unet.context_width, generator=g, dtype=dtype)
    with torch.no_grad():
        both = ours["diffusion"](x, torch.tensor([10, 900]), context)
        one = ours["diffusion"](x[1:], torch.tensor([900]), context[1:])
    assert torch.allclose(both[1:], one, rtol=0, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("clip_skip", [0, 3, -1])
def test_a_clip_skip_outside_the_layers_is_refused(clip_skip):
    with pytest.raises(ValueError, match=rf"clip_skip is {clip_skip}; allowed: 1 \(last layer\) to 2"):
        CLIP(TINY.clip)(torch.zeros(1, 77, dtype=torch.long), clip_skip)

"""Our networks against those of diffusers and transformers, on the same random weights, in fp32 and fp64.

    python -m bench.parity --full
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from bench.common import GIB, Options, block, difference, run
from bench.process import isolated
from sd.clip import CLIP
from sd.unet import UNet
from sd.vae import VAEDecoder, VAEEncoder
from tests.peers import copy_from_peer, peer_clip, peer_unet, peer_vae, randomize

LIMIT = 2e-5
HEADER = ("network", "input", "ours - theirs, fp32", "limit", "ours fp32 - theirs fp64", "theirs fp32 - theirs fp64",
          "ours fp64 - theirs fp64", "parameters", "peak GiB")


def unet(options: Options):
    c, side, g = options.config.unet, options.latent, torch.Generator().manual_seed(1)
    x = torch.randn(2, c.in_channels, side, side, generator=g)
    context, t = torch.randn(2, 77, c.context_width, generator=g), torch.tensor([17, 917])
    return (UNet(c), peer_unet(c), "unet", (x, t, context), lambda m, *a: {"UNet": m(*a)},
            lambda m, *a: {"UNet": m(*a).sample})


def encoder(options: Options):
    c, side = options.config.vae, options.latent * options.config.vae.factor
    x = torch.rand(1, c.image_channels, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1

    def theirs(m, x):
        posterior = m.encode(x).latent_dist
        return {"VAE encode, mean": posterior.mean, "VAE encode, logvar": posterior.logvar}
    return VAEEncoder(c), peer_vae(c), "vae", (x,), lambda m, x: dict(zip(HEADS, m(x))), theirs


HEADS = ("VAE encode, mean", "VAE encode, logvar")


def decoder(options: Options):
    c, side = options.config.vae, options.latent
    z = torch.randn(1, c.latent_channels, side, side, generator=torch.Generator().manual_seed(3)) / c.scale
    return (VAEDecoder(c), peer_vae(c), "vae", (z,), lambda m, z: {"VAE decode": m(z)},
            lambda m, z: {"VAE decode": m.decode(z).sample})


def clip(options: Options):
    c = options.config.clip
    tokens = torch.randint(0, 49406, (2, c.max_tokens), generator=torch.Generator().manual_seed(4))
    tokens[:, 0], tokens[:, 9:] = 49406, 49407
    return (CLIP(c), peer_clip(c), "text_encoder", (tokens,), lambda m, t: {"CLIP": m(t)},
            lambda m, t: {"CLIP": m(t).last_hidden_state})


@torch.no_grad()
def measure(network, options: Options) -> list[list]:
    """Rows of the table for one network. One fp64 network is in memory at a time."""
    ours, peer, folder, inputs, run_ours, run_peer = network(options)
    copy_from_peer(ours, randomize(peer), folder)
    mine, theirs = run_ours(ours, *inputs), run_peer(peer, *inputs)
    parameters = sum(p.numel() for p in ours.parameters())
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = run_peer(peer.double(), *wide)
    del peer
    mine_exact = run_ours(ours.double(), *wide)
    shape = " ".join("[" + ", ".join(map(str, x.shape)) + "]" for x in inputs)
    return [[name, shape, difference(mine[name], theirs[name]), LIMIT, difference(mine[name], exact[name]),
             difference(theirs[name], exact[name]), difference(mine_exact[name], exact[name]), f"{parameters:,}"]
            for name in theirs]


def main(options: Options) -> str:
    size = options.size or min(options.config.image_size, 256)  # fp64 convolutions are slow, and large in memory
    options, rows = replace(options, device="cpu", dtype="fp32", size=size), []
    for network in (clip, encoder, decoder, unet):
        measured = isolated(options, measure, network, options)
        rows += [[*row, f"{measured.peak / GIB:.1f}"] for row in measured.result]
    failed = [row[0] for row in rows if not row[2] <= LIMIT]  # also catches NaN
    cells = [[f"{x:.1e}" if isinstance(x, float) else x for x in row] for row in rows]
    note = ("max |difference| / max |value|; random weights, norms and biases included; theirs is diffusers and "
            "transformers. The sinusoids of the time embedding are fp32 on both sides.")
    verdict = f"Above the limit: {', '.join(failed)}." if failed else "All within the limit."
    text = block("Parity of the networks", options, [note, verdict], (HEADER, cells))
    if failed:
        print(text)
        sys.exit(1)
    return text


if __name__ == "__main__":
    run(main)

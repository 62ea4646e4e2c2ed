"""The scheduler of diffusers with which each sampler is compared: a new sampler needs a row here, and no other edit."""

from __future__ import annotations

from dataclasses import dataclass, field

import diffusers
import pytest

from sd.sampling.samplers import SAMPLERS

# scheduler/scheduler_config.json of SD 1.5, from which users of diffusers make all other schedulers
SD15_SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                      steps_offset=1, set_alpha_to_one=False, clip_sample=False, trained_betas=None)


@dataclass(frozen=True)
class Peer:
    """A scheduler class with its options, and where it does something else than ours."""

    kind: type | None
    options: dict = field(default_factory=dict)
    other_spacings: bool = True  # karras and exponential sigmas too
    own_steps: bool = True  # steps to its own next timestep; else by 1000 // n, whatever the spacing
    same_v: bool = True  # of several v it combines their eps
    same_middle: bool = True  # begins img2img with the entry that belongs to the strength
    from_data: bool = True  # draws from the data with the best denoiser; else with a consistency function only


PEERS = {
    "ddpm": Peer(diffusers.DDPMScheduler, other_spacings=False),
    "ddim": Peer(diffusers.DDIMScheduler, other_spacings=False, own_steps=False),
    # It combines the v of several t, and is cut one entry early, without the second evaluation of its first step.
    "pndm": Peer(diffusers.PNDMScheduler, {"skip_prk_steps": True}, own_steps=False, same_v=False, same_middle=False),
    "euler": Peer(diffusers.EulerDiscreteScheduler),
    "euler_a": Peer(diffusers.EulerAncestralDiscreteScheduler, other_spacings=False),
    "heun": Peer(diffusers.HeunDiscreteScheduler),
    "dpmpp_2m": Peer(diffusers.DPMSolverMultistepScheduler),
    "dpmpp_2m_sde": Peer(diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Peer(diffusers.UniPCMultistepScheduler),
    "lcm": Peer(diffusers.LCMScheduler, from_data=False),
}


def peer_of(name: str, spacing: str | None = None, base=None, **more):
    """The scheduler of a sampler, of `base` or SD 1.5, with its default spacing where that is None.

    The test of a sampler that has none fails with the sampler's name.
    """
    if name not in PEERS:
        pytest.fail(f"sampler {name!r} has no peer to be compared with; give it a row in tests/sampling/peers.py")
    options = dict(PEERS[name].options)
    if spacing in ("leading", "trailing", "linspace"):
        options["timestep_spacing"] = spacing
    elif spacing in ("karras", "exponential"):
        options[f"use_{spacing}_sigmas"] = True
    return PEERS[name].kind.from_config({**(base or SD15_SCHEDULER), **options, **more})


def samplers(**facts) -> list[str]:
    """The samplers whose peer has these facts, and those without a peer, whose tests then fail."""
    missing = Peer(None, **facts)
    return [name for name in SAMPLERS if all(getattr(PEERS.get(name, missing), key) == v for key, v in facts.items())]

"""A whole step of LoRA training keeps the rules of a graph: through the stand-in, its bits are those of plain steps."""

from functools import partial

import pytest
import torch
from torch import nn

from sd.config import TINY, UNetConfig
from sd.lora import apply_lora_to_model, get_lora_parameters
from sd.training.loss import PLAIN, Objective, diffusion_loss
from sd.unet import UNet
from tests.peers import randomize
from tests.pipeline.checked_tape import BrokenRule, CheckedTape

WIDTH = 32
SMALL = UNetConfig(widths=(16, 32), attention=(True, False), layers_per_block=1, heads=2, context_width=WIDTH, norm_groups=8)
BATCHES = 4


class Pair(dict):
    config = TINY


class Step:
    """Forward, backward, clipping and AdamW on inputs that stay where they are, in a model with a LoRA."""

    def __init__(self, objective=PLAIN, kind="lora"):
        self.models = Pair(diffusion=randomize(UNet(SMALL)).requires_grad_(False))
        torch.manual_seed(0)
        apply_lora_to_model(self.models, rank=2, alpha=3.0, target_modules="kohya", kind=kind)
        self.factors = get_lora_parameters(self.models)
        self.optimizer = torch.optim.AdamW(self.factors, lr=1e-2, fused=True)
        self.objective, self.given = objective, self.batch(0)

    @staticmethod
    def batch(i):
        g = torch.Generator().manual_seed(i)
        return (torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, WIDTH, generator=g),
                torch.randint(0, 1000, (2,), generator=g), torch.randn(2, 4, 8, 8, generator=g))

    def show(self, i):
        for own, new in zip(self.given, self.batch(i)):
            own.copy_(new)

    def __call__(self):
        with torch.enable_grad():
            self.optimizer.zero_grad(set_to_none=True)
            loss = diffusion_loss(self.models, *self.given, objective=self.objective)
            loss.backward()
            nn.utils.clip_grad_norm_(self.factors, 1.0)
            self.optimizer.step()
            return loss.detach()


def weights(step):
    return [p.detach().clone() for p in step.factors]


@pytest.mark.parametrize("make", [
    Step, partial(Step, Objective(weighting="min_snr", loss="huber")), partial(Step, kind="loha"), partial(Step, kind="lokr")])
def test_a_step_repeated_by_the_stand_in_has_the_bits_of_a_plain_step(make):
    plain, taped, losses = make(), make(), []
    for i in range(BATCHES):
        plain.show(i)
        losses.append(float(plain()))
    tape = CheckedTape()
    for i in range(BATCHES):
        taped.show(i)
        if i == 0:
            loss = taped()  # makes the optimizer's state
        elif i == 1:
            loss = tape.capture(taped)
        else:
            tape.replay()
            loss = tape.output
        assert float(loss) == losses[i]
    before = Step().factors
    assert all(map(torch.equal, weights(plain), weights(taped)))
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain), before))


def test_a_step_that_asks_for_its_loss_is_refused():
    step = Step()
    step()
    with pytest.raises(BrokenRule, match="to the host"):
        CheckedTape().capture(lambda: step() * float(step().item()))

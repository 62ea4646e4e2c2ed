"""transformers' Conv1D, a linear layer whose weight is stored as [in, out]. Imported only if transformers is."""

from __future__ import annotations

import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from sd.adapters.layer import LoRALayer
from sd.adapters.weights import LayerShape


class LoRATransposedLinear(LoRALayer, Conv1D):
    """Adapters see the weight as that of an nn.Linear, [out, in]."""

    routable = True

    def lora_shape(self):
        return LayerShape(tuple(self.weight.shape[::-1]))

    def op(self, x, weight, bias):
        return F.linear(x, weight, bias)

    def plain_weight(self):
        return self.weight.T

    def base_forward(self, x):
        return Conv1D.forward(self, x)

    def set_base(self, weight, bias):
        super().set_base(weight.T.contiguous(), bias)

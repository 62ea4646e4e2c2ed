"""torch's layers with LoRA, and the in-place conversion of plain layers to them."""

from __future__ import annotations

import sys

import torch.nn as nn
import torch.nn.functional as F

from sd.adapters.layer import LoRALayer
from sd.adapters.low_rank import LowRank
from sd.adapters.weights import LayerShape, LoRAError


class LoRALinear(LoRALayer, nn.Linear):
    """nn.Linear that can carry adapters; with rank > 0 it starts with an adapter named "default"."""

    routable = True

    def __init__(self, in_features: int, out_features: int, bias: bool = True, rank: int = 0, alpha: float = 1.0,
                 dropout: float = 0.0):
        super().__init__(in_features, out_features, bias)
        self.init_lora()
        if rank:
            check_rank(rank, self.lora_shape(), "LoRALinear")
            self.add_adapter("default", LowRank(self.lora_shape(), rank, alpha, dropout=dropout))

    def op(self, x, weight, bias):
        return F.linear(x, weight, bias)


class _LoRAConv(LoRALayer):
    def lora_shape(self):
        return LayerShape(tuple(self.weight.shape), groups=self.groups)

    def op(self, x, weight, bias):
        return self._conv_forward(x, weight, bias)  # torch's own, with all padding modes


class LoRAConv1d(_LoRAConv, nn.Conv1d):
    pass


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    pass


class LoRAConv3d(_LoRAConv, nn.Conv3d):
    pass


class LoRAEmbedding(LoRALayer, nn.Embedding):
    bias = None

    def lora_shape(self):
        return LayerShape(tuple(self.weight.shape), embedding=True)

    def op(self, x, weight, bias):
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def base_forward(self, x):
        return nn.Embedding.forward(self, x)  # its gradient may be sparse


class LoRAGroupNorm(LoRALayer, nn.GroupNorm):
    def op(self, x, weight, bias):
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class LoRALayerNorm(LoRALayer, nn.LayerNorm):
    def op(self, x, weight, bias):
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


LORA_CLASSES: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear, nn.Conv1d: LoRAConv1d, nn.Conv2d: LoRAConv2d, nn.Conv3d: LoRAConv3d,
    nn.Embedding: LoRAEmbedding, nn.GroupNorm: LoRAGroupNorm, nn.LayerNorm: LoRALayerNorm,
    nn.modules.linear.NonDynamicallyQuantizableLinear: LoRALinear,  # the out_proj of nn.MultiheadAttention
}
_registered: dict[type[nn.Module], type[LoRALayer]] = {}  # process-wide; written by register_lora_layer alone


def lora_classes() -> dict[type[nn.Module], type[LoRALayer]]:
    """Layer type -> its class with LoRA."""
    if "transformers.pytorch_utils" in sys.modules:  # else such a layer cannot exist
        from sd.adapters.transformers_conv1d import Conv1D, LoRATransposedLinear
        return LORA_CLASSES | {Conv1D: LoRATransposedLinear} | _registered
    return LORA_CLASSES | _registered


def register_lora_layer(module_type: type[nn.Module], lora_class: type[LoRALayer]) -> None:
    """Let modules of exactly this type carry adapters, as one layer: modules inside them are no longer targets.

    `lora_class` is a class LoRAMine(LoRALayer, Mine) that defines op(x, weight, bias), linear in weight and bias, with the
    outputs on the weight's first axis: it is called with `down` as a weight too. Mine has a parameter `weight`; if it has no
    bias, the class sets `bias = None`. It may be one of torch's own layers. Raises LoRAError for any other class.
    """
    if not (isinstance(lora_class, type) and issubclass(lora_class, LoRALayer) and issubclass(lora_class, module_type)):
        raise LoRAError(f"{lora_class!r} cannot carry the adapters of {module_type.__name__}; "
                        f"a class LoRA{module_type.__name__}(LoRALayer, {module_type.__name__}) is needed")
    if lora_class.op is LoRALayer.op:
        raise LoRAError(f"{lora_class.__name__} does not define op(self, x, weight, bias), the operation of its layer")
    _registered[module_type] = lora_class


def is_registered(module: nn.Module) -> bool:
    """Whether the module, converted or not, is of a type given to `register_lora_layer`."""
    return type(module) in _registered or type(module) in _registered.values()


def as_lora_layer(layer: nn.Module, path: str = "layer") -> LoRALayer:
    """Convert a plain layer in place: only its class changes; identity, ties, hooks and keys stay. Raises LoRAError."""
    if isinstance(layer, LoRALayer):
        return layer.attached()
    plain = type(layer)
    layer.__class__ = lora_class(layer, path)
    assert isinstance(layer, LoRALayer)
    layer.init_lora(plain)
    return layer


def shape_of(layer: nn.Module, path: str = "layer") -> LayerShape:
    """The LayerShape of a layer, plain or converted. Raises LoRAError if it has no LoRA form."""
    return lora_class(layer, path).lora_shape(layer)


def lora_class(layer: nn.Module, path: str) -> type[LoRALayer]:
    """The class with LoRA of a layer. Raises LoRAError, and changes nothing, if there is none."""
    if isinstance(layer, LoRALayer):
        return type(layer)
    classes = lora_classes()
    if type(layer) not in classes:  # exact types: a subclass may compute something else
        raise LoRAError(f"{path} is a {type(layer).__name__}, which has no LoRA form; those that have: "
                        f"{', '.join(c.__name__ for c in classes)}, MultiheadAttention; see register_lora_layer")
    if "forward" in vars(layer):
        raise LoRAError(f"{path} has a forward of its own, set by a hook such as offloading, which would bypass the LoRA; "
                        f"remove the hook first")
    if type(layer) not in _registered and "weight" not in layer._parameters and "weight" not in layer._modules:
        raise LoRAError(f"{path} has a weight that a hook computes, such as weight_norm, spectral_norm or pruning; "
                        f"remove the hook first")
    if layer.weight is None:
        raise LoRAError(f"{path} has no weight to adapt (affine parameters are off)")
    if getattr(layer, "max_norm", None) is not None:
        raise LoRAError(f"{path} is an Embedding with max_norm, which writes to its base weight on every look-up")
    return classes[type(layer)]


def check_rank(rank: int, shape: LayerShape, path: str) -> None:
    limit = min(shape.fan_in * shape.groups, shape.fan_out)  # each group of a convolution gets its share of the rank
    if type(rank) is not int or not 1 <= rank <= limit:  # True is an int too
        raise LoRAError(f"rank {rank!r} does not fit {path}, which maps {shape.fan_in * shape.groups} to {shape.fan_out} "
                        f"values; allowed: 1 to {limit}")

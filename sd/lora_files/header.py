"""The header (metadata) of a LoRA file: the fields that other programs read, and those derived from its tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from sd.adapters.kinds import KINDS
from sd.adapters.weights import AdapterWeights
from sd.config import CONFIG_KEY, SD15, ModelConfig
from sd.files.hashes import tensor_bytes_hash

# Fields derived from the tensors, by us or other programs: never copied from another file.
DERIVED = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata", "sdlora.modules", "format")


def lora_metadata(state: Mapping[str, AdapterWeights], config: ModelConfig | None = None,
                  extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The fields that other programs read (ss_*, modelspec.*), and each module's kind, rank and alpha under our own key.

    `extra` overrides all but the fields derived from the tensors. The same input gives the same header: it has a date or a
    title only if `extra` does. Ranks or alphas that differ between modules are "Dynamic", as in kohya's tools.
    """
    header = {"format": "pt", **_network(state)}
    if config is not None:
        header[CONFIG_KEY] = json.dumps(config.to_dict())
        if (config.unet.widths, config.clip.width) == (SD15.unet.widths, SD15.clip.width):
            header |= {"ss_base_model_version": "sd_v1", "ss_v2": "False", "modelspec.sai_model_spec": "1.0.1",
                       "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.implementation": "diffusers",
                       "modelspec.prediction_type": {"eps": "epsilon"}.get(config.prediction, config.prediction),
                       "modelspec.resolution": f"{config.image_size}x{config.image_size}"}
    return header | {key: value for key, value in (extra or {}).items() if key not in DERIVED}


def _network(state: Mapping[str, AdapterWeights]) -> dict[str, str]:
    found: dict[str, set[float]] = {
        "ss_network_dim": {w.rank for w in state.values() if w.rank},
        "ss_network_alpha": {w.alpha for w in state.values() if w.rank and w.alpha is not None}}
    header = {key: str(plain_number(min(values))) if len(values) == 1 else "Dynamic" for key, values in found.items() if values}
    listed = {"sdlora.modules": json.dumps({path: [w.kind, w.rank, w.alpha] for path, w in sorted(state.items())})}
    if any(KINDS[w.kind].lycoris_name is None for w in state.values()):
        return header | listed  # no other program has a module for this kind
    modifiers = {name for w in state.values() for name in w.tensors}
    cores = {name for w in state.values() for name in KINDS[w.kind].cores if name in w.tensors}
    norms = {path for path, w in state.items() if w.kind == "full" and all(t.dim() == 1 for t in w.tensors.values())}
    if {w.kind for w in state.values()} <= {"lora"} and modifiers <= {"down", "up"}:
        header["ss_network_module"] = "networks.lora"
    else:
        kinds = Counter(w.kind for path, w in state.items() if path not in norms) or Counter(["full"])
        arguments = {"algo": KINDS[kinds.most_common(1)[0][0]].lycoris_name}
        arguments |= {key: "True" for key, on in (("dora_wd", "magnitude" in modifiers), ("train_norm", norms),
                                                  ("use_tucker", cores)) if on}
        header |= {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
    return header | listed


def renewed(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header for a file rewritten in kohya's spelling, with the fields derived from the tensors recomputed."""
    return with_hash({"format": "pt"} | {key: value for key, value in metadata.items() if key not in DERIVED}, tensors)


def with_hash(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header with the hash of the tensors, by which kohya's tools and A1111 identify a LoRA."""
    return dict(header) | {"sshs_model_hash": tensor_bytes_hash(tensors)}


def plain_number(number: float) -> float | int:
    """An int where nothing is lost: 4.0 is written as 4."""
    return int(number) if number == int(number) else number

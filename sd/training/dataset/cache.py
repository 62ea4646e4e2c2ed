"""What the frozen networks make of pictures and captions, computed once: in memory, or in a folder that runs may share.

Each file is named by the hash of all that its content depends on, is written at once or not at all, and is checked when it
is read. B images, h, w latents, L tokens, D context width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sd.adapters.targets import lora_layers
from sd.files.hashes import digest, headed
from sd.files.tensor_file import CheckpointError
from sd.files.tensors import read_tensors, write_safetensors
from sd.placement import placed_for
from sd.training.dist import own_first
from sd.training.errors import DataError

log = logging.getLogger("sd")

FORMAT = 1  # raised when what is computed changes


class Store:
    """A folder of small tensor files. `limit`: bytes of all of them, above which no more are written.

    A key is JSON of everything that the content depends on. Two processes may use one folder.
    """

    def __init__(self, folder: str | Path, limit: int | None = None):
        self.folder, self.limit = Path(folder), limit
        self.bytes = None if limit is None else sum(f.stat().st_size for f in self.folder.glob("*/*.safetensors"))

    def path(self, key: Mapping[str, object]) -> Path:
        """Where it lies: below the first letters of the picture's digest, or of the key's."""
        own = digest([self._text(key)])[:32]
        name = f"{key['picture']}-{own}" if "picture" in key else own
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, key: Mapping[str, object]) -> dict[str, Tensor] | None:
        """The tensors, copied out of their file; None where there is none, or a damaged one, which a line then tells."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            file = read_tensors(path)
            tensors = {name: tensor.clone() for name, tensor in file.items()}
            if (file.metadata.get("key"), file.metadata.get("sha256")) == (self._text(key), _checksum(tensors)):
                return tensors
            reason = "its content is not what was written"
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{path}: ")
        log.warning("%s: damaged (%s); it is made again", path, reason)
        return None

    def write(self, key: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Raises DataError when the disk is full or the folder cannot be written to."""
        if self.limit is not None:
            size = sum(tensor.nbytes for tensor in tensors.values())
            if self.bytes + size > self.limit:
                return
            self.bytes += size
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, dict(tensors), {"key": self._text(key), "sha256": _checksum(tensors)})
        except OSError as error:
            raise DataError(f"{path.parent}: the cache cannot be written ({error.strerror}); name another folder for "
                            f"it") from None

    @staticmethod
    def _text(key: Mapping[str, object]) -> str:
        return json.dumps({"format": FORMAT, **key}, sort_keys=True)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return digest(part for name in sorted(tensors) for part in headed(name, tensors[name]))


def network_hash(network: nn.Module) -> str:
    """Of everything that a network's output depends on: its weights, and the adapters in force with their multipliers."""
    parts = []
    for name, tensor in network.state_dict().items():
        if ".adapters." not in name:
            parts += headed(name, tensor)
    for path, layer in lora_layers(network).items():
        for name, multiplier in (layer.effective.multipliers if layer.lora_enabled else {}).items():
            weights = layer.adapter(name).weights()
            parts.append(repr((path, multiplier, weights.kind, weights.alpha)))
            for key in sorted(weights.tensors):
                parts += headed(key, weights.tensors[key])
    return digest(parts)


# ---- pictures --------------------------------------------------------------------------------------------------------

class Posteriors:
    """indices, variants -> mean and std of the pictures' latents in the UNet's scale, [B, 4, h, w] each, on the CPU.

    Both are kept, not a sample of them, so that each use of a picture draws its latents anew. All are computed here, before
    the training; in a `folder` they are found again by the content of the picture, the VAE's weights, size, crop, variant and
    dtype. Up to `limit` bytes of what lies in the folder are held in memory as well. Raises DataError.
    """

    def __init__(self, models, dataset, folder: str | Path | None = None, *, limit: int = 2 << 30, progress: bool = False):
        self.dataset, self.limit, self.bytes = dataset, limit, 0
        self.kept: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.store = None if folder is None else Store(Path(folder, "latents"))
        variants, self.masked = getattr(dataset, "variants", 1), getattr(dataset, "masked", False)
        encoder = models["encoder"]
        self.about = {} if self.store is None else {
            "what": "latents", "vae": network_hash(encoder), "scale": models.config.vae.scale,
            "dtype": str(placed_for(encoder, torch.empty(0)).dtype)}
        pictures = range(len(dataset)) if self.store is None else own_first(range(len(dataset)))
        for i in tqdm(pictures, "latents", len(dataset), unit="picture", disable=not progress, dynamic_ncols=True):
            for variant in range(variants):
                key = self._key(i, variant)
                tensors = self.store.read(key) if self.store else None
                if tensors is None:
                    tensors = self._encode(models, i, variant)
                    if self.store:
                        self.store.write(key, tensors)
                self._keep(i, variant, tensors)

    def __call__(self, indices: list[int], variants: list[int] | None = None) -> tuple[Tensor, Tensor]:
        found = self._rows(indices, variants)
        return torch.stack([row["mean"] for row in found]), torch.stack([row["std"] for row in found])

    def masks(self, indices: list[int], variants: list[int] | None = None) -> Tensor | None:
        """[B, 1, h, w] in [0, 1], the mean of the mask over each latent; None for pictures without masks."""
        return torch.stack([row["mask"] for row in self._rows(indices, variants)]) if self.masked else None

    def _rows(self, indices: list[int], variants: list[int] | None) -> list[dict[str, Tensor]]:
        return [self._row(i, v) for i, v in zip(indices, [0] * len(indices) if variants is None else variants, strict=True)]

    def _row(self, i: int, variant: int) -> dict[str, Tensor]:
        if (i, variant) in self.kept:
            return self.kept[i, variant]
        tensors = self.store.read(self._key(i, variant))
        if tensors is None:
            raise DataError(f"{self.store.path(self._key(i, variant))}: was changed or removed while it is used; start again, "
                            f"and it will be made anew")
        return tensors

    def _keep(self, i: int, variant: int, tensors: dict[str, Tensor]) -> None:
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.store is None or self.bytes <= self.limit:
            self.kept[i, variant] = tensors

    def _key(self, i: int, variant: int) -> dict[str, object]:
        if self.store is None:
            return {}
        if hasattr(self.dataset, "made_of"):
            return self.about | self.dataset.made_of(i, variant)
        return self.about | {"picture": _checksum({"picture": self.dataset.picture(i)})[:32]}

    @torch.no_grad()
    def _encode(self, models, i: int, variant: int) -> dict[str, Tensor]:
        """One at a time: a picture's latents must be the same bits whatever else is encoded, with a folder and without."""
        encoder, vae = models["encoder"], models.config.vae
        picture = self.dataset.picture(i, variant) if hasattr(self.dataset, "made_of") else self.dataset.picture(i)
        mean, logvar = encoder(placed_for(encoder, picture[None]))
        found = {"mean": vae.scale * mean[0].float().cpu(), "std": vae.scale * (0.5 * logvar[0].float()).exp().cpu()}
        if self.masked:
            found["mask"] = F.avg_pool2d(self.dataset.mask(i, variant), vae.factor)
        return found


def cached_pictures(folder: str | Path | None) -> set[str]:
    """Digests of the pictures that a cache holds latents of: they were read and found good before."""
    if folder is None:
        return set()
    return {file.name.split("-")[0] for file in Path(folder, "latents").glob("*/*-*.safetensors")}

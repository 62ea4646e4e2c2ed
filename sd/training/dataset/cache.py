"""Outputs of the frozen networks for pictures and captions, computed once: in memory, or in a folder that runs can share.

Each file is named by the hash of everything that its content depends on, written atomically, and verified when it is read,
which is at its first use: a start only looks which files there are.
B images, h, w latents, L tokens, D context width.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sd.adapters.targets import lora_layers
from sd.files.hashes import digest, headed, tensor_hash
from sd.files.tensor_file import CheckpointError
from sd.files.tensors import read_tensors, write_safetensors
from sd.placement import at, placed_for
from sd.training.dist import own_share_first
from sd.training.errors import DataError

log = logging.getLogger("sd")

FORMAT = 1  # increase it when the computation changes


class Store:
    """A folder of small tensor files, by key. Once they take `limit` bytes together, no more are written.

    A key holds, as JSON, everything that the content depends on. Several processes may share a folder.
    """

    def __init__(self, folder: str | Path, limit: int | None = None):
        self.folder, self.limit, self.has_room = Path(folder), limit, True
        self.bytes = 0 if limit is None else sum(entry.stat().st_size for entry in _files(self.folder))
        self.present = {entry.name for entry in _files(self.folder)}  # names of files when the store was opened

    def has(self, key: Mapping[str, object]) -> bool:
        """Whether there is a file, damaged or not."""
        path = self.path(key)
        return path.name in self.present or path.exists()

    def path(self, key: Mapping[str, object]) -> Path:
        """Path of the file, in a subfolder named by the first two letters of its name."""
        own = digest([self._text(key)])[:32]
        name = f"{key['picture']}-{own}" if "picture" in key else own
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, key: Mapping[str, object]) -> dict[str, Tensor] | None:
        """Copies of the file's tensors; None if it is missing or, with a warning, damaged."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            file = read_tensors(path)
            tensors = {name: tensor.clone() for name, tensor in file.items()}
            if (file.metadata.get("key"), file.metadata.get("sha256")) == (self._text(key), tensor_hash(tensors)):
                return tensors
            reason = "its content is not what was written"
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{path}: ")
        log.warning("%s: damaged (%s); rebuilding it", path, reason)
        return None

    def write(self, key: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Write a file, unless the limit is reached. Raises DataError if the disk is full or the folder is not writable."""
        if self.limit is not None:
            size = sum(tensor.nbytes for tensor in tensors.values())
            if self.bytes + size > self.limit:
                self.has_room = False
                return
            self.bytes += size
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, dict(tensors), {"key": self._text(key), "sha256": tensor_hash(tensors)})
        except OSError as error:
            raise DataError(f"{path.parent}: the cache cannot be written ({error.strerror}); name another folder for "
                            f"it") from None

    @staticmethod
    def _text(key: Mapping[str, object]) -> str:
        return json.dumps({"format": FORMAT, **key}, sort_keys=True)


def _files(folder: Path) -> Iterator[os.DirEntry]:
    """All files of a store."""
    try:
        with os.scandir(folder) as parts:
            for part in parts:
                if part.is_dir():
                    with os.scandir(part) as files:
                        yield from (entry for entry in files if entry.name.endswith(".safetensors"))
    except (FileNotFoundError, NotADirectoryError):  # there is none yet; writing says what is wrong
        return


def network_hash(network: nn.Module) -> str:
    """Hash of everything that a network's output depends on: its weights, and the active adapters with their multipliers."""
    parts: list[str | Tensor] = []
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

    Mean and std are kept instead of a sample, so that each use of a picture draws new latents. The constructor computes those
    that are not there. With a `folder` they are stored by the content of the picture, the VAE's weights, size, crop, variant
    and dtype, read when they are first used, and up to `limit` bytes of them kept in memory. Raises DataError.
    """

    def __init__(self, models, dataset, folder: str | Path | None = None, *, limit: int = 2 << 30, progress: bool = False):
        self.models, self.dataset, self.limit, self.bytes = models, dataset, limit, 0
        self.kept: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.store = None if folder is None else Store(Path(folder, "latents"))
        encoder = models["encoder"]
        self.about = {} if self.store is None else {
            "what": "latents", "vae": network_hash(encoder), "scale": models.config.vae.scale,
            "dtype": str(placed_for(encoder, torch.empty(0)).dtype)}
        pictures = range(len(dataset)) if self.store is None else own_share_first(range(len(dataset)))
        for i in tqdm(pictures, "latents", len(dataset), unit="picture", disable=not progress, dynamic_ncols=True):
            for variant in range(dataset.variants):
                if self.store is None or not self.store.has(self._key(i, variant)):
                    self._make(i, variant)

    def __call__(self, indices: Sequence[int], variants: list[int] | None = None) -> tuple[Tensor, Tensor]:
        found = self._rows(indices, variants)
        return torch.stack([row["mean"] for row in found]), torch.stack([row["std"] for row in found])

    def masks(self, indices: Sequence[int], variants: list[int] | None = None) -> Tensor | None:
        """[B, 1, h, w] in [0, 1]: the mask averaged over the pixels of each latent; None if the pictures have no masks."""
        return torch.stack([row["mask"] for row in self._rows(indices, variants)]) if self.dataset.masked else None

    def _rows(self, indices: Sequence[int], variants: list[int] | None) -> list[dict[str, Tensor]]:
        return [self._row(i, v) for i, v in zip(indices, [0] * len(indices) if variants is None else variants, strict=True)]

    def _row(self, i: int, variant: int) -> dict[str, Tensor]:
        if (i, variant) in self.kept:
            return self.kept[i, variant]
        assert self.store is not None  # without one all are kept
        key = self._key(i, variant)
        tensors = self.store.read(key)
        if tensors is not None:
            self._keep(i, variant, tensors)
            return tensors
        if not self.store.path(key).exists():
            raise DataError(f"{self.store.path(key)}: was changed or removed while in use; start again to have it rebuilt")
        # Damaged: the same bits as at the start, so neither on the device of an idle network nor under autocast.
        device = self.models.device
        with at(self.models["encoder"], device), torch.autocast(device.type, enabled=False):
            return self._make(i, variant)

    def _make(self, i: int, variant: int) -> dict[str, Tensor]:
        tensors = self._encode(self.models, i, variant)
        if self.store:
            self.store.write(self._key(i, variant), tensors)
        self._keep(i, variant, tensors)
        return tensors

    def _keep(self, i: int, variant: int, tensors: dict[str, Tensor]) -> None:
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.store is None or self.bytes <= self.limit:
            self.kept[i, variant] = tensors

    def _key(self, i: int, variant: int) -> dict[str, object]:
        return {} if self.store is None else self.about | self.dataset.made_of(i, variant)

    @torch.no_grad()
    def _encode(self, models, i: int, variant: int) -> dict[str, Tensor]:
        """One picture at a time: its latents must be the same bits whatever else is encoded, with and without a folder."""
        encoder, vae = models["encoder"], models.config.vae
        mean, logvar = encoder(placed_for(encoder, self.dataset.picture(i, variant)[None]))
        found = {"mean": vae.scale * mean[0].float().cpu(), "std": vae.scale * (0.5 * logvar[0].float()).exp().cpu()}
        if self.dataset.masked:
            found["mask"] = F.avg_pool2d(self.dataset.mask(i, variant), vae.factor)
        return found


def cached_pictures(folder: str | Path | None) -> set[str]:
    """Hashes of the pictures with latents in a cache, which were therefore read without error before."""
    if folder is None:
        return set()
    return {entry.name.split("-")[0] for entry in _files(Path(folder, "latents")) if "-" in entry.name}

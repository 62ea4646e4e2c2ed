"""Tasks on any model: LoRA adapters that are chosen at each call. A thin layer over sd.lora."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from sd.adapters.attach import apply_lora_to_model, get_lora_parameters, loaded_adapter, lora_state, remove_lora
from sd.adapters.merging import merge, merge_lora_weights, unmerge
from sd.adapters.switch import active_multipliers, adapter_names, check_known, exclusive, use_adapters
from sd.adapters.targets import lora_layers
from sd.adapters.weights import AdapterWeights, LoRAError, LoRAFormatError
from sd.lora import load_lora_weights, save_lora_weights
from sd.lora_files.modern import read_entries
from sd.lora_files.modules import modules_of
from sd.lora_files.read import LoadReport, read_lora
from sd.lora_files.write import write_kohya

ALL = object()  # base and tasks together, as in nn.Module; None is the base

Task = str | None | Sequence[str | Mapping[str, float] | None]


class LoRAModel(nn.Module):
    """A model with tasks. `model(x)` is the base, `model(x, task="anime")` the base with that task.

    `task=["anime", None, {"line": 0.5}]` gives each sample of the batch (axis 0) its own; `tasks=["anime", "line"]` and
    `tasks={"anime": 0.7, "line": 0.3}` put several on at once. What was active before is restored after the call, even after
    an exception, and calls of other threads wait. The model is changed in place (its base is frozen, layers with tasks are
    converted) and stays usable by itself, with the same keys. A model that does its own activation checkpointing needs
    `sd.lora.recomputation` as context_fn.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise LoRAError(f"the model is {model!r}; an nn.Module is needed")
        self.model = model
        self.requires_grad_(False, task=None)

    @property
    def tasks(self) -> list[str]:
        return adapter_names(self.model)

    def add_task(self, name: str, rank: int = 4, alpha: float | None = None, targets="full", **options) -> None:
        """Add a task that changes nothing until it is trained; alpha None means the rank, so that the change is not scaled.

        `targets`, options and errors are those of `sd.lora.apply_lora_to_model`; "full" means every layer with a matrix.
        """
        alpha = rank if alpha is None else alpha
        with use_adapters(self.model, {}):
            apply_lora_to_model(self.model, rank, alpha, target_modules=targets, name=name, **options)

    def remove_task(self, name: str) -> None:
        """Remove a task; layers left without any become plain again."""
        remove_lora(self.model, name)

    def forward(self, *args, task: Task = None, tasks: Sequence[str] | Mapping[str, float] | None = None, **kwargs):
        with self.using(task, tasks):
            if self.model._compiled_call_impl is not None:
                for layer in lora_layers(self.model).values():
                    layer.prepare()
            return self.model(*args, **kwargs)

    def using(self, task: Task = None, tasks: Sequence[str] | Mapping[str, float] | None = None):
        """The context in which `model` computes with these tasks, for more than a plain call: generate(), or a backward."""
        return use_adapters(self.model, _multipliers(task, tasks))

    def compile(self, *args, **kwargs) -> None:
        """torch.compile the model in place; a different choice of tasks does not recompile it."""
        self.model.compile(*args, **kwargs)

    # ---- merging and files --------------------------------------------------------------------------------------------

    def merge(self, task: str | None = None, tasks: Sequence[str] | Mapping[str, float] | None = None) -> None:
        """Compute merged weights beside the base's; calls with exactly these tasks use them. Undone by `unmerge`.

        Raises LoRAError if no task is named, or if samples differ in their tasks.
        """
        with self.using(task, tasks):
            if not active_multipliers(self.model):
                raise LoRAError("there is nothing to merge: no task is named, or all have the weight 0")
            merge(self.model)

    def unmerge(self) -> None:
        unmerge(self.model)

    def merge_for_good(self, task: str | None = None, tasks: Sequence[str] | Mapping[str, float] | None = None, *,
                       untie: bool = False) -> nn.Module:
        """The model with these tasks in its weights and without any adapter; see `sd.lora.merge_lora_weights`."""
        with self.using(task, tasks):
            return merge_lora_weights(self.model, untie=untie)

    def save_task(self, path: str | os.PathLike, name: str, **options) -> None:
        """Write a task as safetensors under the model's module paths, alpha included; see `sd.lora.save_lora_weights`."""
        save_lora_weights(self.model, path, name, **options)

    def load_task(self, path: str | os.PathLike | Mapping[str, Tensor], name: str, **options) -> LoadReport:
        """Add a frozen task from a file of any program, replacing one of that name. See `sd.lora.load_lora_weights`."""
        with use_adapters(self.model, {}):
            return load_lora_weights(self.model, path, name, **options)

    # ---- methods of nn.Module, each also for one task, or for the base (task=None) -------------------------------------

    def parameters(self, recurse: bool = True, *, task=ALL) -> Iterator[nn.Parameter]:
        if task is ALL:
            return super().parameters(recurse)
        if task is not None:
            return iter(get_lora_parameters(self.model, task))
        adapters = {id(p) for layer in lora_layers(self.model).values() for p in layer.adapters.parameters()}
        return (p for p in self.model.parameters(recurse) if id(p) not in adapters)

    def requires_grad_(self, requires_grad: bool = True, *, task=ALL) -> LoRAModel:
        for p in self.parameters(task=task):
            p.requires_grad_(requires_grad)
        return self

    def state_dict(self, *args, task=ALL, **kwargs) -> dict[str, Tensor]:  # type: ignore[override]  # no `destination`
        """State of the base (task=None) with the bare model's keys, of a task as in its file, or of all with adapters' keys."""
        if task is ALL:
            return self.model.state_dict(*args, **kwargs)
        if task is None:  # by identity: inside a nested LoRAModel keys are not module paths
            adapters = {id(t) for layer in lora_layers(self.model).values()
                        for t in layer.adapters.state_dict(keep_vars=True).values()}
            state = self.model.state_dict(*args, **kwargs | {"keep_vars": True})
            return {k: v.detach() if isinstance(v, Tensor) and not kwargs.get("keep_vars") else v
                    for k, v in state.items() if id(v) not in adapters}
        return write_kohya(lora_state(self.model, task), modules_of(self.model).names)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False, *, task=ALL):
        """Inverse of `state_dict`, in place. A task must exist, with the rank of the tensors.

        Unless `strict`, what only one side has is skipped and returned: keys of the base, module paths of a task; modules
        that the model lacks as the file spells them. Raises LoRAError for missing or unexpected keys or modules, and for
        tensors that do not fit.
        """
        if task is ALL:
            return self.model.load_state_dict(state_dict, strict, assign)
        if not isinstance(state_dict, Mapping):
            raise LoRAError(f"the state is {state_dict!r}; a dict of tensors is needed")
        what, unknown = "the base", list[str]()
        given: Mapping[str, Any] = state_dict
        if task is not None:
            what, (given, unknown) = f"task {task!r}", self._read(state_dict, task, strict)
        own: Mapping[str, Any] = self.state_dict(task=None) if task is None else lora_state(self.model, task)
        missing, unexpected = ([k for k in a if k not in b] for a, b in ((own, given), (given, own)))
        if strict and (missing or unexpected):
            counts = [f"{len(keys)} are {how}, first {keys[0]!r}"
                      for how, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
            raise LoRAError(f"the state does not fit {what}: {' and '.join(counts)}")
        given = {k: v for k, v in given.items() if k in own}
        if task is None:
            misfits = [key for key, value in given.items() if value.shape != own[key].shape]
            if misfits:  # torch would copy the others before it raises
                key = misfits[0]
                raise LoRAError(f"{len(misfits)} of {len(given)} tensors do not fit the base, first {key!r}: it has the shape "
                                f"{list(own[key].shape)}, the one given {list(given[key].shape)}")
            self.model.load_state_dict(given, strict=False, assign=assign)  # missing keys were checked above; adapters stay
        else:
            self._write(given, task)
        return _IncompatibleKeys(missing, unexpected + unknown)

    def _read(self, state_dict: Mapping[str, Tensor], task: str, strict: bool) -> tuple[dict[str, AdapterWeights], list[str]]:
        """The adapters by module path, and the modules that the model lacks."""
        check_known(lora_layers(self.model).values(), [task])
        modules = modules_of(self.model)
        try:
            return read_lora(state_dict, modules).state, []
        except LoRAFormatError:
            if strict:
                raise
        entries, strange, _ = read_entries(state_dict)
        left = {key: key for key in strange} | {entry.key: entry.module for entry in entries if not modules.find(entry.module)}
        rest = {key: tensor for key, tensor in state_dict.items() if key not in left}
        return read_lora(rest, modules).state if rest else {}, list(dict.fromkeys(left.values()))

    @torch.no_grad()
    def _write(self, state, task: str) -> None:
        layers, new = lora_layers(self.model), {}
        for path, weights in state.items():
            try:
                new[path] = loaded_adapter(weights, layers[path], path)
            except LoRAFormatError as error:
                raise LoRAError(f"{path}: {error}") from None
            ours, theirs = ({k: list(v.shape) for k, v in adapter.state_dict().items()}
                            for adapter in (layers[path].adapter(task), new[path]))
            if ours != theirs:
                raise LoRAError(f"{path} of task {task!r} holds {ours}, the tensors given are {theirs}")
        with exclusive(self.model):
            for path, loaded in new.items():
                adapter = layers[path].adapter(task)
                adapter.load_state_dict(loaded.state_dict())
                adapter.alpha = loaded.alpha
                layers[path].drop_derived()  # compiled code would not see the write

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Only called where this model lies in another, whose state dict has our keys without "model.".
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}model.{key[len(prefix):]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _multipliers(task: Task, tasks: Sequence[str] | Mapping[str, float] | None) -> dict[str, float | Tensor]:
    """What `use_adapters` takes."""
    if tasks is not None:
        if task is not None or isinstance(tasks, str | bytes) or not isinstance(tasks, Iterable):
            raise LoRAError(f"task is {task!r} and tasks is {tasks!r}; one of them is needed, and tasks is a list of names or "
                            f"a dict of their weights")
        if isinstance(tasks, Mapping):
            return dict(tasks)
        names = list(tasks)
        if any(name in names[:i] for i, name in enumerate(names)):
            raise LoRAError(f"tasks is {names!r}, which names one twice; give a dict of weights, such as {{{names[0]!r}: 2.0}}")
        return dict.fromkeys(names, 1.0)
    if task is None:
        return {}
    if isinstance(task, str):
        return {task: 1.0}
    given = [] if isinstance(task, Mapping) or not isinstance(task, Iterable) else list(task)
    if not given or not all(isinstance(t, str | Mapping | None) for t in given):
        raise LoRAError(f"task is {task!r}; a name, None, or a list with one entry for each sample is needed: a name, None or "
                        f"a dict of weights")
    samples = [{} if t is None else {t: 1.0} if isinstance(t, str) else t for t in given]
    return {name: torch.tensor([float(sample.get(name, 0.0)) for sample in samples])
            for name in dict.fromkeys(name for sample in samples for name in sample)}

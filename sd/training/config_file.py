"""Training options from a TOML, JSON or YAML file, flat or in sections; also LoRAW's `lora` section."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sd.errors import SDError
from sd.training.config import TrainConfig
from sd.training.errors import TrainError

SECTIONS = ("data", "model", "lora", "objective", "optimizer", "training", "samples", "run")
# Names in LoRAW's section -> ours. Its multiplier and component_whitelist have no single counterpart.
LORAW_OPTIONS = {"lr": "learning_rate", "weight_decompose": "dora"}
LORAW_NETWORKS = {"unet": "unet", "diffusion": "unet", "text_encoder": "text_encoder", "clip": "text_encoder"}


def read_config(path: str | Path) -> dict[str, object]:
    """Field of TrainConfig -> value, to be used as `TrainConfig(**read_config("train.toml"))`.

    Sections (SECTIONS) only group fields. Raises TrainError, with the file's name, for an unknown option, an option given
    twice, or a value of the wrong type.
    """
    values: dict[str, object] = {}
    for key, value in parse(path).items():
        section = value if isinstance(value, dict) else {key: value}
        if isinstance(value, dict) and key not in SECTIONS:
            raise TrainError(f"{path}: has a section {key!r}; allowed: {', '.join(SECTIONS)}")
        for name, one in (_from_loraw(section, path) if key == "lora" and isinstance(value, dict) else section).items():
            if name in values:
                raise TrainError(f"{path}: {name} is given twice")
            values[name] = one
    return train_options(values, path)


def train_options(values: Mapping[str, object], where: str | Path) -> dict[str, object]:
    """Convert values to the types of TrainConfig's fields. Raises TrainError, starting with `where`, as `read_config` does."""
    kinds, found = get_type_hints(TrainConfig), {}
    for name, value in values.items():
        if name not in kinds:
            near = get_close_matches(name, kinds, n=1)
            raise TrainError(f"{where}: {name!r} is not a training option" + (f"; did you mean {near[0]!r}?" if near else ""))
        found[name] = _of_kind(value, kinds[name], f"{where}: {name}")
    return found


def config_flags(values: Mapping[str, object]) -> list[str]:
    """The same options as flags of the command line."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}={value}"]
    return words


def parse(path: str | Path) -> dict[str, object]:
    """Name -> value of a TOML, JSON or YAML file, by its extension. Raises TrainError, which names the file and the fault."""
    path = Path(path)
    readers: dict[str, Callable[[str], object]] = {".toml": _toml, ".json": json.loads, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix.lower() not in readers:
        raise TrainError(f"{path}: a config is a {', '.join(readers)} file")
    try:
        found = readers[path.suffix.lower()](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise TrainError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise TrainError(f"{path}: has no names with values")
    return found


def _toml(text: str) -> object:
    return tomllib.loads(text)


def _yaml(text: str) -> object:
    import yaml
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SDError(error) from None


def _from_loraw(section: dict[str, object], path: str | Path) -> dict[str, object]:
    """Translate LoRAW's options: `multiplier` is a factor of alpha; `component_whitelist` has networks, or layers in them."""
    found = {LORAW_OPTIONS.get(name, name): value for name, value in section.items()}
    if "multiplier" in found:
        alpha = _of_kind(found.get("alpha", TrainConfig.alpha), float, f"{path}: alpha")
        found["alpha"] = alpha * _of_kind(found.pop("multiplier"), float, f"{path}: multiplier")
    if "component_whitelist" in found:
        names = _of_kind(found.pop("component_whitelist"), tuple[str, ...], f"{path}: component_whitelist")
        networks = {LORAW_NETWORKS[name] for name in names if name in LORAW_NETWORKS}
        if networks:
            found |= {"unet": "unet" in networks, "text_encoder": "text_encoder" in networks}
        if layers := [name for name in names if name not in LORAW_NETWORKS]:
            found["targets"] = layers
    return found


def _of_kind(value: Any, kind, where: str) -> Any:
    """Convert a value to a field's type: lists to tuples, integers to floats. Raises TrainError for any other type."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    (kind,) = [option for option in options if option is not type(None)]
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise TrainError(f"{where} is {value!r}; allowed: {', '.join(get_args(kind))}")
    if get_origin(kind) is tuple:
        one = get_args(kind)[0]
        if isinstance(value, (list, tuple)):
            if ... not in get_args(kind) and len(value) != len(get_args(kind)):
                raise TrainError(f"{where} is {value!r}; it must be a list of {len(get_args(kind))}")
            return tuple(_of_kind(v, one, where) for v in value)
        if one is str and isinstance(value, str):
            return (value,)
        raise TrainError(f"{where} is {value!r}; it must be a list")
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4, without a point, as a string
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    raise TrainError(f"{where} is {value!r}; it must be {words[kind]}")

"""Generation parameters as A1111's text: format and parse."""

from __future__ import annotations

import json
import re

# Our name -> (label in the text, type of its value).
NUMBER = r"-?[\d.]+(?:e-?\d+)?"  # a multiplier, as {:g} writes it
_LABELS = {"n_inference_steps": ("Steps", int), "sampler_name": ("Sampler", str), "cfg_scale": ("CFG scale", float),
           "seed": ("Seed", int), "size": ("Size", str), "model_hash": ("Model hash", str), "model": ("Model", str),
           "strength": ("Denoising strength", float), "clip_skip": ("Clip skip", int)}


_NAMES = {label: (name, read) for name, (label, read) in _LABELS.items()}


def format_parameters(parameters: dict) -> str:
    """The text that Automatic1111 writes and most programs read: prompt, negative prompt, one line of settings.

    Known keys: prompt, uncond_prompt, width, height, lora {name: multiplier} (as <lora:name:0.8> after the prompt),
    lora_hashes {name: hash} and those of _LABELS; any other key is its own label.
    """
    rest = dict(parameters)
    prompt, negative = str(rest.pop("prompt", "")), str(rest.pop("uncond_prompt", None) or "")
    loras, hashes = rest.pop("lora", None), rest.pop("lora_hashes", None)
    if isinstance(loras, dict):
        prompt = " ".join([prompt, *(f"<lora:{name}:{multiplier}>" for name, multiplier in loras.items())])
    elif loras:
        rest["lora"] = loras
    if "width" in rest and "height" in rest:
        rest["size"] = f"{rest.pop('width')}x{rest.pop('height')}"
    fields = [(label, rest.pop(name)) for name, (label, _) in _LABELS.items() if rest.get(name) is not None]
    fields += rest.items()
    if isinstance(hashes, dict):
        fields.append(("Lora hashes", ", ".join(f"{name}: {digest}" for name, digest in hashes.items())))
    settings = ", ".join(f"{label}: {_quote(value)}" for label, value in fields)
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), settings])


def _quote(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def parse_parameters(text: str) -> dict:
    """The inverse of `format_parameters`, as far as the text is unambiguous; unknown fields keep their label."""
    lines = text.strip("\n").split("\n")
    field = r'\s*([\w][\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)'
    settings = lines.pop() if re.match(r"\s*Steps: \d", lines[-1]) or len(re.findall(field, lines[-1])) > 2 else ""
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    found: dict = {"prompt": "\n".join(lines[:start])}
    if start < len(lines):
        found["uncond_prompt"] = "\n".join(lines[start:]).removeprefix("Negative prompt:").removeprefix(" ")
    tags = re.findall(rf"<lora:([^:<>]+):({NUMBER})>", found["prompt"])
    if tags:
        found["prompt"] = re.sub(rf" ?<lora:[^:<>]+:{NUMBER}>", "", found["prompt"])
        found["lora"] = {name: float(multiplier) for name, multiplier in tags}
    for label, value in re.findall(field, settings):
        value = value.strip()
        try:
            value = json.loads(value) if value.startswith('"') else value
            name, read = _NAMES.get(label, (label, str))
            found[name] = read(value)
        except ValueError:
            found[label] = value
    if re.fullmatch(r"\d+x\d+", found.get("size", "")):
        found["width"], found["height"] = map(int, found.pop("size").split("x"))
    if "Lora hashes" in found:
        pairs = [pair.rpartition(": ") for pair in found.pop("Lora hashes").split(", ")]
        found["lora_hashes"] = {name: digest for name, _, digest in pairs}
    return found

"""LoRAs inside a checkpoint: the same model as base and file, out again bit for bit, merged; damaged ones are refused."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sd.checkpoints.lora_inside import EMBEDDED, EmbeddedLoRA, embed_keys
from sd.checkpoints.writer import ldm_state
from sd.config import TINY
from sd.files.hashes import lora_hash
from sd.files.tensor_file import CheckpointError
from sd.files.tensors import read_tensors
from sd.lora import LoRAFormatError, active_multipliers, adapter_names, remove_lora, use_adapters
from sd.model_loader import (
    load_lora_into_models,
    merge_lora_into_checkpoint,
    new_models,
    save_checkpoint,
)
from sd.tools.embed import embed, take_out
from tests.checkpoints.cases import (
    LDM,
    ONE,
    PROJ,
    TEXT,
    TWO,
    Q,
    as_ldm,
    assert_merged,
    expected,
    load,
    rand,
    write,
)

HALF = {key: tensor if key.endswith("alpha") else tensor.half() for key, tensor in ONE.items()}
# The same LoRA as PEFT spells it: an alpha that stands in the metadata alone.
PEFT = {f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{end}.weight": ONE[f"{Q}.lora_{side}.weight"]
        for end, side in (("A", "down"), ("B", "up"))}
CONFIG = {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 2.0, "unet.target_modules": ["to_q"]})}


def outputs(models):
    """Of copies: the last bit of a product may depend on where its factors begin in memory, and a mapped file decides that."""
    models = {key: deepcopy(models[key]) for key in ("clip", "diffusion")}
    g = torch.Generator().manual_seed(0)
    tokens, latents = torch.randint(0, 49406, (2, 77), generator=g), torch.randn(2, 4, 8, 8, generator=g)
    with torch.no_grad():
        context = models["clip"](tokens)
        return torch.cat([context.flatten(), models["diffusion"](latents, torch.tensor([3, 700]), context).flatten()])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model as `m.safetensors` and as the folder `m`, and LoRA files."""
    folder = tmp_path_factory.mktemp("base")
    models = new_models(TINY, seed=4)
    save_checkpoint(models, folder / "m.safetensors")
    save_checkpoint(models, folder / "m")
    write(folder / "one v1.5.safetensors", HALF, {"ss_output_name": "one", "note": "ü"})
    write(folder / "two.safetensors", TWO)
    write(folder / "peft.safetensors", PEFT, CONFIG)
    return folder


@pytest.fixture(scope="module")
def files(base):
    return {base / "one v1.5.safetensors": 0.8, base / "two.safetensors": -0.5}


@pytest.mark.parametrize("source", ["m.safetensors", "m"])
def test_a_checkpoint_with_loras_inside_is_the_base_with_the_files_loaded(base, files, tmp_path, source):
    embed(base / source, files, tmp_path / "e.safetensors")
    inside, beside = load(tmp_path / "e.safetensors"), load(base / source)
    plain = outputs(inside), outputs(beside)
    assert not torch.equal(*plain)
    for path, multiplier in files.items():
        load_lora_into_models(beside, path, multiplier=multiplier)
    assert active_multipliers(inside) == active_multipliers(beside) == {"one v1.5": 0.8, "two": -0.5}
    assert torch.equal(outputs(inside), outputs(beside))
    report = inside.lora_reports["one v1.5"]
    assert report.tensors == len(HALF) and report.metadata == {"ss_output_name": "one", "note": "ü"} and report.hash is None
    with use_adapters(inside, {}):
        assert torch.equal(outputs(inside), plain[1])


def test_the_bases_tensors_lie_in_it_bit_for_bit_so_other_programs_load_the_base(base, files, tmp_path):
    embed(base / "m", files, tmp_path / "e.safetensors")
    found, plain = (safetensors.torch.load_file(path) for path in (tmp_path / "e.safetensors", base / "m.safetensors"))
    assert all(torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)) for key, tensor in plain.items())
    assert {key.split(".")[1] for key in found.keys() - plain.keys()} == {"one%20v1%2E5", "two"}
    assert found["lora.one%20v1%2E5." + Q + ".lora_up.weight"].dtype == torch.float16


def test_what_is_taken_out_is_what_was_put_in(base, files, tmp_path):
    embed(base / "m.safetensors", files, tmp_path / "e.safetensors")
    taken = take_out(tmp_path / "e.safetensors", tmp_path / "out")
    assert taken == [tmp_path / "out" / path.name for path in files]
    for path, original in zip(taken, files):
        a, b = read_tensors(path), read_tensors(original)
        assert a.keys() == b.keys() and b.metadata.items() <= a.metadata.items()
        assert a.metadata["sshs_model_hash"].startswith(lora_hash(path))
        assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in b)
    with pytest.raises(CheckpointError, match="one v1.5.safetensors: exists; name another folder"):
        take_out(tmp_path / "e.safetensors", tmp_path / "out")


def test_a_lora_of_another_program_is_embedded_in_kohyas_spelling_with_its_alpha(base, tmp_path):
    embed(base / "m.safetensors", {base / "peft.safetensors": 1.0}, tmp_path / "e.safetensors")
    (taken,) = take_out(tmp_path / "e.safetensors", tmp_path)
    found = safetensors.torch.load_file(taken)
    assert found.keys() == {key for key in ONE if key.startswith(Q)}
    assert all(torch.equal(found[key], ONE[key]) for key in found) and found[Q + ".alpha"].item() == 2.0
    beside = load_lora_into_models(load(base / "m.safetensors"), base / "peft.safetensors")
    assert torch.equal(outputs(load(tmp_path / "e.safetensors")), outputs(beside))


def test_more_loras_go_into_a_checkpoint_that_has_some(base, files, tmp_path):
    one, two = files
    embed(base / "m.safetensors", {one: 0.8}, tmp_path / "a.safetensors")
    embed(tmp_path / "a.safetensors", {two: -0.5}, tmp_path / "b.safetensors")
    embed(base / "m.safetensors", files, tmp_path / "c.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="two LoRAs are named 'two'; rename one of the files"):
        embed(tmp_path / "b.safetensors", {two: 1.0}, tmp_path / "d.safetensors")


def test_merging_melts_what_is_inside_with_its_multipliers_and_what_is_given(base, files, tmp_path):
    one, two = files
    embed(base / "m.safetensors", {one: 0.8}, tmp_path / "e.safetensors")
    tensors = safetensors.torch.load_file(base / "m.safetensors")
    merge_lora_into_checkpoint(tmp_path / "e.safetensors", {}, tmp_path / "o.safetensors")
    assert_merged(as_ldm(tmp_path / "o.safetensors"), tensors, expected(tensors, [(HALF, 0.8)]))
    merge_lora_into_checkpoint(tmp_path / "e.safetensors", {two: 2.0}, tmp_path / "o")
    assert_merged(as_ldm(tmp_path / "o"), tensors, expected(tensors, [(HALF, 0.8), (TWO, 2.0)]))
    (tmp_path / "in").mkdir()
    same = write(tmp_path / "in" / one.name, HALF)
    merge_lora_into_checkpoint(tmp_path / "e.safetensors", {same: 0.1}, tmp_path / "p.safetensors")
    assert_merged(as_ldm(tmp_path / "p.safetensors"), tensors, expected(tensors, [(HALF, 0.9)]))


# ---- checkpoints of lora_wrapper ----------------------------------------------------------------------------------------

WRAPPED = {LDM[Q]: (0.7, 32, 32, 3), LDM[PROJ]: (1.3, 64, 64, 5), LDM[TEXT]: (-0.25, 64, 32, 2)}  # scale, out, in, R


def lora_wrapper(base, wrapped=WRAPPED, base_layer=True):
    """{key: tensor} of a wrapped model, as its state dict has them, and W + scale · B · A of each module in fp64."""
    state, sums = dict(base), {}
    for i, (module, (scale, out, into, rank)) in enumerate(wrapped.items()):
        down, up, weight = rand(rank, into, seed=20 + i), rand(out, rank, seed=30 + i), f"{module}.weight"
        scale = torch.tensor(scale)
        state |= {f"{module}.lora_A": down, f"{module}.lora_B": up, f"{module}.lora_scale": scale}
        change = scale.double() * (up.double() @ down.double())
        sums[weight] = base[weight].double() + change.reshape(base[weight].shape)
        for tail in ("weight", "bias"):
            if base_layer and f"{module}.{tail}" in state:
                state[f"{module}.base_layer.{tail}"] = state.pop(f"{module}.{tail}")
    return state, sums


@pytest.mark.parametrize("base_layer", [True, False])
@pytest.mark.parametrize("name", ["wrapped.ckpt", "wrapped.safetensors"])
def test_a_checkpoint_of_lora_wrapper_loads_with_its_lora(base, tmp_path, name, base_layer):
    plain = safetensors.torch.load_file(base / "m.safetensors")
    state, sums = lora_wrapper(plain, base_layer=base_layer)
    path = tmp_path / name
    torch.save({"state_dict": state}, path) if name.endswith("ckpt") else safetensors.torch.save_file(state, path)
    models = load(path, config=TINY)
    assert active_multipliers(models) == {"wrapped": 1.0} and models.lora_reports["wrapped"].tensors == 9
    merge_lora_into_checkpoint(path, {}, tmp_path / "o.safetensors", config=TINY)
    assert_merged(as_ldm(tmp_path / "o.safetensors"), plain, sums)
    merged = load(tmp_path / "o.safetensors")
    assert (outputs(models) - outputs(merged)).abs().max() <= 2e-5 * outputs(merged).abs().max()
    remove_lora(models)
    assert all(torch.equal(tensor, plain[key]) for key, tensor in ldm_state(models).items())


def test_the_lora_of_a_lora_wrapper_checkpoint_is_taken_out_as_a_file_for_any_base(base, tmp_path):
    plain = safetensors.torch.load_file(base / "m.safetensors")
    torch.save({"state_dict": lora_wrapper(plain)[0]}, tmp_path / "wrapped.ckpt")
    (file,) = take_out(tmp_path / "wrapped.ckpt", tmp_path / "out", config=TINY)
    found = safetensors.torch.load_file(file)
    assert file.name == "wrapped.safetensors" and torch.equal(found[f"{Q}.lora_down.weight"], rand(3, 32, seed=20))
    assert found[f"{Q}.alpha"].item() == pytest.approx(0.7 * 3, rel=1e-7) and len(found) == 9
    beside = load_lora_into_models(load(base / "m.safetensors"), file)
    inside = load(tmp_path / "wrapped.ckpt", config=TINY)
    assert torch.equal(outputs(beside), outputs(inside))


def test_a_lora_wrapper_checkpoint_becomes_one_of_ours(base, tmp_path):
    plain = safetensors.torch.load_file(base / "m.safetensors")
    torch.save({"state_dict": lora_wrapper(plain)[0]}, tmp_path / "wrapped.ckpt")
    embed(tmp_path / "wrapped.ckpt", {}, tmp_path / "e.safetensors", config=TINY)
    assert torch.equal(outputs(load(tmp_path / "e.safetensors")), outputs(load(tmp_path / "wrapped.ckpt", config=TINY)))


SOFT = {"model.diffusion_model.out.2.lora_A.weight": torch.ones(4, 2, 3, 3),
        "model.diffusion_model.out.2.lora_B.weight": torch.ones(2, 32, 3, 3),
        "model.diffusion_model.out.2.lora_scale": torch.tensor(1.0)}


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s.update(SOFT), "its LoRA on 'model.diffusion_model.out.2' is a soft convolution of lora_wrapper"),
    (lambda s: s.pop(f"{LDM[Q]}.lora_B"), f"its LoRA on '{LDM[Q]}' is incomplete: '{LDM[Q]}.lora_B' is not in the file"),
    (lambda s: s.pop(f"{LDM[Q]}.lora_scale"), f"is incomplete: '{LDM[Q]}.lora_scale' is not in the file"),
    (lambda s: s.update({f"{LDM[Q]}.lora_A": torch.ones(3)}), r"has lora_A [3], lora_B [32, 3] and lora_scale []"),
    (lambda s: s.update({f"{LDM[Q]}.lora_A": torch.ones(3, 31)}), "1 of 3 LoRA modules do not fit this model"),
    (lambda s: s.update({f"{LDM[Q]}.lora_A": torch.full((3, 32), torch.nan)}), "not finite"),
    (lambda s: s.update({"model.x.lora_A": torch.ones(3, 3)}), "has a LoRA of lora_wrapper on 'model.x'"),
])
def test_a_lora_wrapper_checkpoint_that_is_not_whole_is_refused(base, tmp_path, change, sentence):
    state, _ = lora_wrapper(safetensors.torch.load_file(base / "m.safetensors"))
    change(state)
    torch.save({"state_dict": state}, tmp_path / "wrapped.ckpt")
    with pytest.raises((CheckpointError, LoRAFormatError)) as error:
        load(tmp_path / "wrapped.ckpt", config=TINY)
    assert sentence in str(error.value) and "wrapped" in str(error.value)


def test_a_lora_of_lora_wrapper_alone_is_no_checkpoint(tmp_path):
    torch.save({f"{LDM[Q]}.lora_A": torch.ones(2, 32), f"{LDM[Q]}.lora_B": torch.ones(32, 2),
                f"{LDM[Q]}.lora_scale": torch.tensor(1.0)}, tmp_path / "lora.ckpt")
    with pytest.raises(CheckpointError, match="it seems to be a LoRA, not a checkpoint"):
        load(tmp_path / "lora.ckpt", config=TINY)


# ---- what is damaged or cannot be -------------------------------------------------------------------------------------

def entry(**changes):
    return {"two": {"multiplier": 1.0, "metadata": {}} | changes}


@pytest.mark.parametrize("metadata, sentence", [
    (None, "does not describe the LoRAs in it (KeyError: 'sdlora.embedded')"),
    ("{", "does not describe the LoRAs in it (JSONDecodeError"),
    ("[]", "does not describe the LoRAs in it (AttributeError"),
    ('{"two": 3}', "does not describe the LoRAs in it (TypeError"),
    (json.dumps({"two": {"multiplier": 1.0}}), "does not describe the LoRAs in it (KeyError: 'metadata')"),
    (json.dumps(entry(multiplier="1")), "the multiplier of 'two' is '1'; a finite number is needed"),
    (json.dumps(entry(multiplier=True)), "the multiplier of 'two' is True; a finite number is needed"),
    (json.dumps(entry(multiplier=float("nan"))), "the multiplier of 'two' is nan; a finite number is needed"),
    (json.dumps(entry(metadata={"a": 1})), "the metadata of 'two' must be strings by name"),
    (json.dumps(entry(metadata=[])), "the metadata of 'two' must be strings by name"),
    (json.dumps(entry() | {"gone": {"multiplier": 1.0, "metadata": {}}}), "'gone' has no tensors"),
    ("{}", "'two' is not in it, though its tensors are there"),
])
def test_damaged_metadata_is_told_and_nothing_is_taken_out(base, tmp_path, metadata, sentence):
    embed(base / "m.safetensors", {base / "two.safetensors": 1.0}, tmp_path / "e.safetensors")
    file = read_tensors(tmp_path / "e.safetensors")
    header = {k: v for k, v in file.metadata.items() if k != EMBEDDED} | ({} if metadata is None else {EMBEDDED: metadata})
    path = write(tmp_path / "bad.safetensors", dict(file), header)
    for read in (load, lambda p: take_out(p, tmp_path / "out")):
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert sentence in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_lora_inside_that_does_not_fit_is_named(base, tmp_path):
    embed(base / "m.safetensors", {base / "two.safetensors": 1.0}, tmp_path / "e.safetensors")
    file = read_tensors(tmp_path / "e.safetensors")
    for key, sentence in (("lora.two.lora_unet_nowhere.diff", "two: 1 of 4 LoRA modules are unknown"),
                          ("lora.two.colour", "two: 1 of 8 tensors are not understood")):
        write(tmp_path / "bad.safetensors", dict(file) | {key: torch.ones(3)}, file.metadata)
        with pytest.raises(LoRAFormatError, match=sentence):
            load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", ".", "..", "c:x"])
def test_a_name_that_leads_out_of_the_folder_is_refused(base, tmp_path, name):
    embed(base / "m.safetensors", {base / "two.safetensors": 1.0}, tmp_path / "e.safetensors")
    file = read_tensors(tmp_path / "e.safetensors")
    inside = {key.removeprefix("lora.two."): tensor for key, tensor in file.items() if key.startswith("lora.")}
    tensors, header = embed_keys([EmbeddedLoRA(name, 1.0, inside)])
    base_tensors = {key: tensor for key, tensor in file.items() if not key.startswith("lora.")}
    path = write(tmp_path / "bad.safetensors", base_tensors | tensors, file.metadata | header)
    assert adapter_names(load(path)) == [name], "any name is good for an adapter"
    with pytest.raises(CheckpointError, match="has a name that cannot be that of a file"):
        take_out(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_embedded_is_refused_and_nothing_is_written(base, tmp_path):
    before = sorted(base.iterdir())
    out, two = tmp_path / "e.safetensors", base / "two.safetensors"
    bad = write(tmp_path / "bad.safetensors", {f"{PROJ}.diff": torch.ones(63, 64, 1, 1)})
    (tmp_path / "in").mkdir()
    twin = write(tmp_path / "in/two.safetensors", TWO)
    for loras, where, sentence in (
            ({two: 1.0}, tmp_path / "e.ckpt", "is written as .safetensors"),
            ({two: 1.0}, two, "is read by this"), ({two: 1.0}, base / "m.safetensors", "is read by this"),
            ({}, out, "nothing to embed"), ({bad: 1.0}, out, "do not fit this model"),
            ({two: 1.0, twin: 1.0}, out, "two LoRAs are named 'two'"),
            ({two: float("nan")}, out, "a finite number is needed")):
        with pytest.raises(ValueError, match=sentence):
            embed(base / "m.safetensors", loras, where)
    with pytest.raises(CheckpointError, match="has no LoRA inside it"):
        take_out(base / "m.safetensors", tmp_path / "out")
    assert sorted(base.iterdir()) == before and not out.exists() and not Path(tmp_path / "out").exists()

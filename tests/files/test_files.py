"""Reading and writing of files, against safetensors, torch.save, diffusers and hashlib."""

import copy
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd.files.folder import read_diffusers_folder
from sd.files.hashes import lora_hash, model_hash
from sd.files.tensor_file import CheckpointError
from sd.files.tensors import read_tensors, write_pt, write_safetensors, write_tensors
from tests.files.cases import assert_same, run, some_tensors

# safetensors


def test_what_safetensors_writes_is_read_with_metadata(tmp_path):
    save_file(some_tensors(), tmp_path / "a.safetensors", metadata={"format": "pt", "name": "ü"})
    file = read_tensors(tmp_path / "a.safetensors")
    assert_same(file, load_file(tmp_path / "a.safetensors"))
    assert file.metadata == {"format": "pt", "name": "ü"}
    assert file.shapes["weight"] == (5, 3) and file.shapes["scalar"] == ()


def test_safetensors_reads_what_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, some_tensors(), {"format": "pt", "name": "ü"})
    assert_same(load_file(path), some_tensors())
    assert_same(read_tensors(path), some_tensors())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "name": "ü"}


def test_views_transposed_and_shared_tensors_are_written_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"t": base.T, "slice": base[:, 1:3], "expanded": base[:1].expand(5, 4), "tied": base, "tied2": base,
               "parameter": torch.nn.Parameter(base)}
    for name in ("a.safetensors", "a.pt"):
        with pytest.warns(UserWarning, match="metadata") if name == "a.pt" else memoryview(b""):
            write_tensors(tmp_path / name, tensors)
        assert_same(read_tensors(tmp_path / name), {k: v.detach() for k, v in tensors.items()})


def test_the_same_tensors_give_the_same_bytes_whatever_their_order(tmp_path):
    write_safetensors(tmp_path / "a", some_tensors(), {"x": "1"})
    write_safetensors(tmp_path / "b", dict(reversed(some_tensors().items())), {"x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_may_be_written_to_and_the_file_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    before = path.read_bytes()
    read_tensors(path)["w"].add_(1)
    assert path.read_bytes() == before and read_tensors(path)["w"].sum() == 1000


def test_tensors_stay_valid_when_their_file_is_replaced_by_a_write_of_themselves(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(100_000.0), "x": torch.zeros(3)}, path)
    file = read_tensors(path)
    write_safetensors(path, {"w": file["w"]})
    assert torch.equal(file["w"], torch.arange(100_000.0)) and torch.equal(read_tensors(path)["w"], file["w"])


def test_a_copy_of_one_tensor_does_not_copy_the_file(tmp_path):
    save_file({"big": torch.zeros(1_000_000), "small": torch.zeros(10)}, tmp_path / "a")
    small = read_tensors(tmp_path / "a")["small"]
    buffer = io.BytesIO()
    torch.save(small, buffer)
    assert buffer.tell() < 5000 and copy.deepcopy(small).untyped_storage().nbytes() == 40


def test_a_header_that_is_not_padded_is_read(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert len(header) % 4
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + np.float32([1, 2]).tobytes())
    tensor = read_tensors(tmp_path / "a")["w"]
    assert tensor.tolist() == [1, 2] and tensor.data_ptr() % 4 == 0


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x1f\x8b", b"{\"", b"<!"])
def test_a_header_length_that_looks_like_another_kind_of_file_is_a_length(tmp_path, start):
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(int.from_bytes(start, "little"))
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + np.float32([1, 2]).tobytes())
    assert (tmp_path / "a").read_bytes()[:2] == start
    assert read_tensors(tmp_path / "a")["w"].tolist() == [1, 2]


def test_mapped_files_hold_no_file_descriptors(tmp_path):
    write_safetensors(tmp_path / "a", {"w": torch.zeros(4)})
    before = len(os.listdir("/proc/self/fd"))
    kept = [read_tensors(tmp_path / "a") for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and len(kept) == 20


@pytest.mark.parametrize("tensors, metadata, message", [
    ({"w": [1.0]}, None, "must be a dense tensor"),
    ({"w": torch.eye(2).to_sparse()}, None, "must be a dense tensor"),
    ({"w": torch.empty(2, device="meta")}, None, "must be a dense tensor"),
    ({"w": torch.zeros(2, dtype=torch.complex128)}, None, "complex128"),
    ({3: torch.zeros(2)}, None, "name of a tensor"),
    ({"__metadata__": torch.zeros(2)}, None, "name of a tensor"),
    ({"w": torch.zeros(2)}, {"rank": 4}, "'rank' is 4"),
])
def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path, tensors, metadata, message):
    with pytest.raises(TypeError, match=message):
        write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    assert not list(tmp_path.iterdir())


# damaged and foreign files


def safetensors_bytes(header: str | dict, data: bytes = b"") -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text)) + text.encode() + data


def entry(begin: int, end: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def zip_bytes(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), content)
    return buffer.getvalue()


WRONG = {
    "empty": (b"", "is empty"),
    "short": (b"ab", "a text file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG picture"),
    "html": (b"\n<!DOCTYPE html><html><body>Please log in</body></html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n", "a git-lfs pointer"),
    "text": ("Grüße: dies ist kein Modell\n".encode() * 40, "a text file"),
    "json": (b'{"model": 1}', "a text file"),
    "zeros": (bytes(4096), "nothing but zeros"),
    "noise": (bytes(range(255, 100, -1)), "an unknown kind"),
    "zip": (zip_bytes(readme=b"hello"), "a zip archive that torch did not write"),
    "gguf": (b"GGUF" + bytes(30), "a GGUF file"),
    "header too large": (struct.pack("<Q", 200_000_000) + b"{" + bytes(99), "claims 200,000,000 bytes"),
    "header cut": (safetensors_bytes({"w": entry(0, 8)})[:30], "truncated safetensors"),
    "data cut": (safetensors_bytes({"w": entry(0, 8)}, bytes(7)), "truncated safetensors"),
    "data too long": (safetensors_bytes({"w": entry(0, 8)}, bytes(9)), "damaged safetensors"),
    "not json": (safetensors_bytes("{nonsense   "), "header cannot be read"),
    "no offsets": (safetensors_bytes({"w": {"dtype": "F32", "shape": [2]}}), "header cannot be read"),
    "three offsets": (safetensors_bytes({"w": entry(0, 8) | {"data_offsets": [0, 8, 9]}}, bytes(8)),
                      "header cannot be read"),
    "wrong size": (safetensors_bytes({"w": entry(0, 8, (3,))}, bytes(8)), "cannot lie at bytes 0 to 8"),
    "negative": (safetensors_bytes({"w": entry(0, 8, (-1, -2))}, bytes(8)), "cannot lie"),
    "overlap": (safetensors_bytes({"v": entry(0, 8), "w": entry(4, 12)}, bytes(12)), "the last one ends at 8"),
    "gap": (safetensors_bytes({"v": entry(0, 8), "w": entry(12, 20)}, bytes(20)), "the last one ends at 8"),
    "dtype": (safetensors_bytes({"w": entry(0, 8, dtype="F4")}, bytes(8)), "dtype 'F4'"),
    "not torch": (zip_bytes(a__data_pkl=pickle.dumps({"a": 1}, 2)), "or a pickle that torch did not write"),
    "plain pickle": (pickle.dumps({"a": [1, 2]}, 2), "a pickle that torch did not write"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_checkpoint_gets_one_sentence_that_names_it(tmp_path, name):
    content, message = WRONG[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_tensors(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text and len(text) < len(str(path)) + 250


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    for read in (read_tensors, model_hash, lora_hash):
        with pytest.raises(CheckpointError, match="no such file"):
            read(tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match="is a folder"):
            read(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_diffusers_folder(tmp_path / "x")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind):
    path, tensors = tmp_path / "a", {"w": torch.randn(300), "v": torch.randn(4)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 15, 40, *range(60, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_tensors(path)


def file_bytes(kind: str) -> bytes:
    tensors, buffer = {"w": torch.zeros(3, 2), "v": torch.zeros(4, dtype=torch.half)}, io.BytesIO()
    if kind == "safetensors":
        return safetensors.torch.save(tensors, metadata={"a": "b"})
    torch.save(tensors, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


WHOLE = {kind: file_bytes(kind) for kind in ("safetensors", "zip", "old")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(list(WHOLE)))
def test_damaged_bytes_never_raise_anything_but_a_checkpoint_error(tmp_path, data, kind):
    content = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a").write_bytes(content)
    try:
        read_tensors(tmp_path / "a")
    except CheckpointError:
        pass


# pickles


@pytest.fixture
def lightning(monkeypatch):
    """A class that pickles as a callback of pytorch_lightning does."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return module.ModelCheckpoint


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_published_checkpoint_with_callbacks_and_numpy_scalars_is_read(tmp_path, lightning, monkeypatch, is_zip):
    allowed = set(torch.serialization.get_safe_globals())
    callback = lightning()
    callback.best = np.float64(0.3)
    weights = OrderedDict(w=torch.randn(3, 4), half=torch.randn(5).half(), n=torch.tensor(7),
                          p=torch.nn.Parameter(torch.ones(2)))
    torch.save({
        "state_dict": weights, "global_step": 470000, "epoch": np.int64(3), "pytorch-lightning_version": "1.4.2",
        "callbacks": {lightning: {"best": np.float32(0.1)}}, "more": [callback], "history": np.arange(3.0),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    }, tmp_path / "v1.ckpt", _use_new_zipfile_serialization=is_zip)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.setitem(sys.modules, name, None)
    file = read_tensors(tmp_path / "v1.ckpt")
    assert_same(file, {k: v.detach() for k, v in weights.items()})
    assert not file["p"].requires_grad
    assert set(file.ignored) == {"global_step", "epoch", "callbacks", "more", "optimizer_states", "history",
                                 "pytorch-lightning_version"}
    assert set(torch.serialization.get_safe_globals()) == allowed


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(tmp_path, is_zip, protocol):
    trace = tmp_path / "it-ran"
    for call, name in [((os.system, f"touch {trace}"), "posix.system"), ((os.mkdir, str(trace)), "posix.mkdir"),
                       ((exec, f"open({str(trace)!r}, 'w')"), "builtin.*exec"),
                       ((torch.hub.load, "a/b", "c"), "torch.hub.load")]:
        torch.save({"state_dict": {"w": torch.ones(2)}, "x": Malicious(*call)}, tmp_path / "evil.ckpt",
                   _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
        with pytest.raises(CheckpointError, match=name):
            read_tensors(tmp_path / "evil.ckpt")
    assert not trace.exists()
    if protocol == 2:  # the file does what it says when it is loaded carelessly
        torch.save(Malicious(os.mkdir, str(trace)), tmp_path / "evil.ckpt", _use_new_zipfile_serialization=is_zip)
        torch.load(tmp_path / "evil.ckpt", weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_malicious_pickle_is_refused_by_name(tmp_path, protocol):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious(os.system, f"touch {tmp_path}/it-ran"), protocol))
    with pytest.raises(CheckpointError, match="posix.system"):
        read_tensors(tmp_path / "evil.pt")
    assert os.listdir(tmp_path) == ["evil.pt"]


def test_calling_an_inert_stub_does_nothing(tmp_path, lightning):
    class Names(pickle.Pickler):
        def reducer_override(self, obj):
            return (lightning, ("rm", "-rf"), {"a": 1}) if isinstance(obj, Malicious) else NotImplemented

    stub = types.ModuleType("pickler")
    stub.Pickler = Names
    torch.save({"w": torch.ones(1), "x": Malicious(None)}, tmp_path / "a.pt", pickle_module=stub)
    assert read_tensors(tmp_path / "a.pt").ignored == {"x": "an object that is not loaded"}


def test_scalars_lists_and_nested_dicts_of_pickles_are_kept(tmp_path):
    torch.save({"a.lora_A": torch.ones(2, 3), "a.alpha": 0.5, "a.rank": 4, "note": "x",
                "diffusion": {"b": torch.zeros(1), "r": 2}, "optimizer": {"state": {}, "param_groups": []}},
               tmp_path / "a.pt")
    file = read_tensors(tmp_path / "a.pt")
    assert list(file) == ["a.lora_A", "diffusion.b"] and file.ignored == {"optimizer": "dict"}
    assert file.scalars == {"a.alpha": 0.5, "a.rank": 4, "note": "x", "diffusion.r": 2}
    torch.save([torch.ones(2), torch.zeros(3)], tmp_path / "b.pt")
    assert read_tensors(tmp_path / "b.pt").shapes == {"0": (2,), "1": (3,)}


def test_a_pt_file_is_a_flat_dict_that_weights_only_reads(tmp_path):
    base = torch.randn(1000, 100)
    tensors = {"row": base[3], "t": base[:2].T, "half": base[:5].half()}
    with pytest.warns(UserWarning, match="holds no metadata"):
        write_tensors(tmp_path / "a.pt", tensors, {"rank": "4"})
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True), tensors)
    assert (tmp_path / "a.pt").stat().st_size < 10_000  # a view is saved without the rest of its storage
    with pytest.raises(TypeError, match="must be a dense tensor"):
        write_pt(tmp_path / "b.pt", {"alpha": 1.0})


@pytest.mark.parametrize("save", ["safetensors", "zip", "old"])
def test_the_kind_of_a_file_is_its_content_whatever_its_name(tmp_path, save):
    for suffix in (".safetensors", ".ckpt", ".bin", ""):
        path = tmp_path / f"model{suffix}"
        if save == "safetensors":
            save_file({"w": torch.ones(3)}, path)
        else:
            torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=save == "zip")
        assert read_tensors(path)["w"].tolist() == [1, 1, 1]


# memory


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Memory of a process that reads and writes 160 MB, as factors of that size; pages of the map are counted."""
    folder = tmp_path_factory.mktemp("memory")
    tensors = {f"{i}.weight": torch.full((1024, 2048), float(i)) for i in range(20)}
    save_file(tensors, folder / "a.safetensors")
    torch.save({"state_dict": tensors}, folder / "a.ckpt")
    result = run("""if 1:
        import json, re, sys, torch
        from sd.files.tensors import read_tensors, write_safetensors
        torch.ones(8).sum()
        def status(key, file="status"):
            return int(re.search(key + r":\\s+(\\d+) kB", open(f"/proc/self/{file}").read())[1]) * 1024 / (20 * 2**23)
        def restart():
            open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
            return status("VmHWM"), status("Anonymous", "smaps_rollup")
        report = {}
        for name in ("a.safetensors", "a.ckpt"):
            with torch.device("meta"):
                model = torch.nn.Sequential(*[torch.nn.Linear(2048, 1024, bias=False) for _ in range(20)])
            peak, private = restart()
            file = read_tensors(sys.argv[1] + "/" + name)
            opened = status("VmHWM") - peak
            model.load_state_dict(file, strict=True, assign=True)
            total = sum(p.sum().item() for p in model.parameters())
            report[name] = opened, status("VmHWM") - peak, status("Anonymous", "smaps_rollup") - private, total
            del model, file
        tensors = {str(i): torch.ones(1024, 2048) for i in range(10)}
        tensors |= {f"{i}.T": tensors[str(i)].T for i in range(10)}
        peak, private = restart()
        write_safetensors(sys.argv[1] + "/b", tensors)
        print(json.dumps(report | {"write": status("VmHWM") - peak}))
    """, folder, MALLOC_MMAP_THRESHOLD_=str(1 << 20))  # else glibc keeps what is freed, sometimes
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_reading_into_a_model_needs_at_most_1_2_times_the_file(memory, name):
    opened, peak, private, total = memory[name]
    assert opened < 0.05, "opening reads tensors"
    assert 0.95 < peak < 1.2 and private < 0.05, "there is a second copy"
    assert total == sum(range(20)) * 1024 * 2048


def test_writing_needs_no_second_copy(memory):
    assert memory["write"] < 0.12


# diffusers folders


def make_component(folder: Path, **options) -> dict[str, torch.Tensor]:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                        attention_head_dim=4, down_block_types=("DownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "UpBlock2D"))
    model.save_pretrained(folder, **options)
    return model.state_dict()


@pytest.mark.parametrize("options, argument", [
    ({}, None), ({"variant": "fp16"}, "fp16"), ({"variant": "fp16"}, None), ({"safe_serialization": False}, None),
    ({"max_shard_size": "10KB"}, None), ({"max_shard_size": "10KB", "variant": "fp16"}, "fp16"),
    ({"max_shard_size": "10KB", "safe_serialization": False}, None),
])
def test_a_folder_that_diffusers_saved_is_read(tmp_path, options, argument):
    expected = make_component(tmp_path / "unet", **options)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    folder = read_diffusers_folder(tmp_path, variant=argument)
    assert set(folder.components) == {"unet"}
    assert_same(folder.components["unet"], expected)
    assert folder.configs["scheduler/scheduler_config.json"] == {"prediction_type": "epsilon"}
    assert folder.configs["unet/config.json"]["block_out_channels"] == [8, 8] and "model_index.json" in folder.configs


def test_plain_weights_win_over_variants_and_safetensors_over_bin(tmp_path):
    make_component(tmp_path / "vae", variant="fp16")
    for name, value in [("model.safetensors", 1.0), ("model.fp16.safetensors", 2.0)]:
        save_file({"w": torch.tensor(value)}, tmp_path / "vae" / f"diffusion_pytorch_{name}")
    torch.save({"w": torch.tensor(3.0)}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    torch.save({"w": torch.tensor(4.0)}, tmp_path / "vae" / "diffusion_pytorch_model.non_ema.bin")
    for variant, value in [(None, 1), ("fp16", 2), ("non_ema", 4)]:
        assert read_diffusers_folder(tmp_path, variant=variant).components["vae"]["w"] == value
    assert read_diffusers_folder(tmp_path / "vae").components[""]["w"] == 1
    with pytest.raises(CheckpointError, match="'bf16'; there are 'fp16', 'non_ema'"):
        read_diffusers_folder(tmp_path, variant="bf16")


def test_a_folder_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(CheckpointError, match="no weights in it"):
        read_diffusers_folder(tmp_path)
    make_component(tmp_path / "unet", max_shard_size="10KB")
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = content["weight_map"]
    index.write_text(json.dumps(content | {"weight_map": shards | {"extra": shards["conv_in.bias"]}}))
    with pytest.raises(CheckpointError, match="1 of .* tensors are not in the shards, first: 'extra'"):
        read_diffusers_folder(tmp_path)
    index.write_text(json.dumps(content | {"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="does not name files of this folder"):
        read_diffusers_folder(tmp_path)
    (tmp_path / "unet/config.json").write_text("{")
    with pytest.raises(CheckpointError, match="unet/config.json: is not valid JSON"):
        read_diffusers_folder(tmp_path)
    with pytest.raises(CheckpointError, match="is a file, a diffusers folder"):
        read_diffusers_folder(index)

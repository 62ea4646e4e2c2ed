"""Hashes of files and of tensors, against hashlib."""

import hashlib
import os
import struct

import torch
from safetensors.torch import save_file

from sd.files.hashes import digest, headed, lora_hash, model_hash, tensor_bytes_hash
from sd.files.tensors import write_safetensors
from tests.files.cases import some_tensors


def test_hashes_are_those_of_the_file_and_of_its_tensor_part(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(some_tensors(), path, metadata={"a": "1"})
    content = path.read_bytes()
    assert model_hash(path) == hashlib.sha256(content).hexdigest()[:10]
    start = 8 + struct.unpack("<Q", content[:8])[0]
    assert lora_hash(path) == hashlib.sha256(content[start:]).hexdigest()[:12]
    other = tmp_path / "other.safetensors"
    save_file(some_tensors(), other, metadata={"another": "header"})
    assert lora_hash(other) == lora_hash(path) and model_hash(other) != model_hash(path)


def test_a_hash_is_computed_once_until_the_file_changes(tmp_path, monkeypatch):
    path, reads = tmp_path / "a.pt", []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: (reads.append(1), digest(*args))[1])
    torch.save({"w": torch.ones(2)}, path)
    first = [model_hash(path), model_hash(path), lora_hash(path)]
    assert len(reads) == 1 and lora_hash(path)[:10] == first[0]
    torch.save({"w": torch.zeros(2)}, path)
    os.utime(path, ns=(1, 1))
    assert model_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:10] != first[0]


def test_a_digest_is_that_of_texts_and_of_the_bytes_of_tensors_one_after_the_other(tmp_path):
    flat, turned = torch.arange(6, dtype=torch.bfloat16), torch.randn(3, 4).T
    content = "a(6,)torch.bfloat16é".encode() + flat.view(torch.uint8).numpy().tobytes() + turned.contiguous().numpy().tobytes()
    text, same = headed("a", flat)
    assert same is flat
    assert digest([text, "é", flat, torch.empty(0, 3), turned]) == hashlib.sha256(content).hexdigest()
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"flat": flat, "turned": turned})
    assert tensor_bytes_hash({"flat": flat, "turned": turned})[:12] == lora_hash(path)

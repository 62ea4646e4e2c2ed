"""Files that are written whole or not at all: kills, full disks, exceptions, and what is left behind."""

import errno
import os
import resource
import signal
import time

import pytest
import torch

from sd.files.atomic import atomic_write, remove_stale_temporaries
from sd.files.tensors import write_pt, write_safetensors
from tests.files.cases import run


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    result = run("""if 1:
        import glob, os, signal, sys, time, torch
        from sd.files.tensors import read_tensors, write_safetensors
        path, killed = sys.argv[1] + "/a.safetensors", 0
        tensors = [{"w": torch.full((2_000_000,), float(i))} for i in range(2)]
        start = time.perf_counter()
        write_safetensors(path, tensors[0])
        once = time.perf_counter() - start
        for i in range(20):
            child = os.fork()
            while not child:
                for tensor in tensors:
                    write_safetensors(path, tensor)
            time.sleep(once * (1 + i / 10))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            values = read_tensors(path)["w"]
            assert values.min() == values.max()
        print(len(glob.glob(sys.argv[1] + "/.*")))
    """, tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 3, "too few kills came in the middle of a write for this to be a test"


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.ones(3)})
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # a real short write: the kernel refuses the bytes after the first 100,000
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        for write in (write_safetensors, write_pt):
            with pytest.raises(OSError, match=r"File too large: '.*a.safetensors'$"):
                write(path, {"w": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*a.safetensors"):
        write_safetensors(path, {"w": torch.ones(5)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_an_exception_or_an_interrupt_in_the_block_leaves_nothing(tmp_path):
    for exception in (ValueError, KeyboardInterrupt):
        with pytest.raises(exception), atomic_write(tmp_path / "a.png") as file:
            file.write(b"half")
            raise exception
    assert not os.listdir(tmp_path)


def test_an_atomic_file_has_usual_permissions_and_keeps_symbolic_links(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
        assert (tmp_path / "real").read_bytes() == b"old"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    (tmp_path / "usual").touch()
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_is_on_disk_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.path.isdir(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_safetensors(tmp_path / "a", {"w": torch.ones(3)})
    assert calls == [False, "replace", True]


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/a.safetensors"):
        write_safetensors(tmp_path / "nowhere/a.safetensors", {"w": torch.ones(3)})


def test_only_temporaries_of_dead_writers_are_removed(tmp_path):
    with pytest.raises(ValueError), atomic_write(tmp_path / "x"):
        (temporary,) = os.listdir(tmp_path)
        raise ValueError
    for name, age in [(temporary, 7200), ("." + temporary, 60), ("old.txt", 7200), (".old.tmp", 7200)]:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_stale_temporaries(tmp_path)
    assert set(os.listdir(tmp_path)) == {"." + temporary, "old.txt", ".old.tmp"}

"""Saved results: what stands in them, and where they say they come from; and the memory that is left."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest

from entroformer_lib import files, memory
from entroformer_lib.studies import results


def test_a_result_is_json_for_everybody():
    """Which knows no infinity, as the PSNR of an exact picture has, and no NaN."""
    text = results.as_json({"rows": [{"psnr_db": np.inf, "bpp": [1.5, np.nan]}], "mean": {"psnr_db": -np.inf, "n": 3}})
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"rows": [{"psnr_db": None, "bpp": [1.5, None]}], "mean": {"psnr_db": None, "n": 3}}


def test_another_projects_commit_is_not_ours(tmp_path, monkeypatch):
    """Where the library is installed inside somebody's checkout."""
    package = tmp_path / "venv" / "entroformer_lib" / "studies"
    package.mkdir(parents=True)
    shutil.copy(results.__file__, package)
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "theirs"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    ours = results.git_revision()
    assert ours is None or re.fullmatch(r"[0-9a-f]{40}\+?", ours)
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    assert results.git_revision() is None
    (tmp_path / ".git").rename(tmp_path / "venv" / ".git")
    assert results.git_revision().endswith("+")  # its own checkout, in which files have moved
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["add", "-A"], ["commit", "-qm", "ours"]):
        subprocess.run([*git, *words], cwd=tmp_path / "venv", check=True)
    assert re.fullmatch("[0-9a-f]{40}", results.git_revision())


def test_a_command_says_nothing_of_this_machine():
    words = ["/home/me/x.py", "--data", "/home/me/photos", "--out=/tmp/a b/r.json", "photos/1.png", "a/b", "-j2"]
    assert results.command_line(words) == "x.py --data photos --out=r.json photos/1.png a/b -j2"


def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch):
    """Whoever has the old one open keeps it, and its content is on the disk before it takes the name."""
    path, done = tmp_path / "file", []
    files.write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            act = getattr(os, name)
            patch.setattr(os, name, lambda *words, name=name, act=act: (done.append(name), act(*words))[1])
        with open(path, "rb") as old:
            files.write_bytes(path, b"new")
            assert old.read() == b"old" and path.read_bytes() == b"new"
    assert done == ["fsync", "replace"]


def test_a_containers_limit_counts(tmp_path: Path):
    whole = psutil.virtual_memory().total
    assert 0 < memory.free_memory(tmp_path) <= whole  # no container
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    (tmp_path / "memory.current").write_text("700\n")
    for most, left in (("1000", 600), ("300", 0)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert memory.free_memory(tmp_path) == left
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(tmp_path) > 10**6

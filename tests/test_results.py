"""Saved results: what stands in them, and where they say they come from; and the memory that is left."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest

from entroformer_lib import memory
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
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    assert results.git_revision() is None
    assert ours is None or len(ours.rstrip("+")) == 40
    (tmp_path / ".git").rename(tmp_path / "venv" / ".git")
    assert len(results.git_revision().rstrip("+")) == 40  # its own checkout


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

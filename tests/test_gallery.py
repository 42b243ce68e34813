"""docs/gallery.md runs as it stands there, in one folder."""

import re
import shlex
import sys
from pathlib import Path

import warm

from entroformer_lib import cli

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"


def from_top_to_bottom() -> None:
    names = {"__name__": "gallery"}
    for language, code in re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(), re.S):
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
        for line in code.splitlines() if language == "sh" else ():
            sys.argv = shlex.split(line)
            assert sys.argv[0] == "entroformer" and not cli.main(), line


def test_the_gallery_runs_as_it_stands(tmp_path):
    process = warm.start(from_top_to_bottom, output=tmp_path / "said.txt", folder=tmp_path)
    process.join(300)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 0, said
    assert "mine against BPG 4:4:4: " in said and "bits per pixel" in said
    assert (tmp_path / "curves.png").is_file()

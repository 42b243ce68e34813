"""The recipes run as they are printed, at size tiny; those for Slurm with stand-ins for its commands."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm

RECIPES = Path(__file__).parents[1] / "recipes"
# What a recipe calls: it hands its words to the process with the library, and ends with the code that comes back.
HAND_OVER = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$@" > "$PIPES/words"
exit "$(cat "$PIPES/code")"
"""


def command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def cooked(recipe: str, here: Path) -> None:
    """A recipe, whose calls of the library are done by this process, one after the other."""
    os.mkfifo(here / "words"), os.mkfifo(here / "code")
    for name in ("entroformer", "python"):
        command(here / name, HAND_OVER)
    script = f'bash "{RECIPES / recipe}"; echo "end $?" > "$PIPES/words"'
    environment = os.environ | {"PATH": f"{here}:{os.environ['PATH']}", "PIPES": str(here)}
    process = subprocess.Popen(["bash", "-c", script], env=environment)
    while (words := (here / "words").read_text().splitlines())[0] in ("entroformer", "python"):
        print(*words, flush=True)
        sys.argv, module = (words, "entroformer_lib") if words[0] == "entroformer" else (words[2:], words[2])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        (here / "code").write_text(str(code))
    process.wait()
    assert words == ["end 0"], words


@pytest.mark.parametrize(("recipe", "given", "made"), [
    ("paper.sh", dict(LMBDAS="0.013", BATCH="2"), ["0.013"]),
    ("fast.sh", dict(BATCH="2"), ["constant", "cooled"]),
    ("family.sh", dict(VARIANTS="parallel minnen"), ["parallel", "minnen"]),
])  # fmt: skip
def test_recipes_run_as_printed(recipe, given, made, photo_folder, tmp_path):
    sizes = dict(
        STEPS="2",
        SIZE="tiny",
        CROP="64",
        LAST_CROP="128",
        WORKERS="0",
        DATA=str(photo_folder),
        OUT=str(tmp_path / "out"),
    )
    said, here = tmp_path / "said.txt", tmp_path / "here"
    here.mkdir()
    process = warm.start(cooked, recipe, here, output=said, environment=os.environ | sizes | given)
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    for name in made:
        assert (tmp_path / "out" / name / "weights.safetensors").is_file()


# Slurm's commands: srun does as it is told, scancel hands the signal to what trains, scontrol writes down its words.
SLURM = {
    "srun": '#!/usr/bin/env bash\nexec "$@"\n',
    "scancel": '#!/usr/bin/env bash\nkill "-${1#--signal=}" "$(cat "$HERE/training")"\n',
    "scontrol": '#!/usr/bin/env bash\necho "$@" >> "$HERE/asked"\n',
}
TRAINING = """#!/usr/bin/env bash
echo "$@" >> "$HERE/trained"
trap 'exit 1' TERM
echo $$ > "$HERE/training"
echo ready > "$HERE/pipe"
case $DOES in end) exit 0 ;; fail) exit 1 ;; esac
read < "$HERE/pipe"
"""


@pytest.mark.parametrize("job", ["paper", "fast"])
@pytest.mark.parametrize("does", ["end", "fail", "train on"])
def test_jobs_of_slurm_are_queued_again_at_the_limit_alone(job, does, tmp_path):
    for name, text in SLURM.items() | {("entroformer", TRAINING)}:
        command(tmp_path / name, text)
    os.mkfifo(tmp_path / "pipe")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path), "DOES": does}
    environment |= dict(SLURM_JOB_ID="42", SLURM_ARRAY_TASK_ID="1", DATA="shards", OUT="runs", STEPS="20")
    process = subprocess.Popen(["bash", RECIPES / f"{job}.sbatch"], env=environment, cwd=RECIPES.parent)
    (tmp_path / "pipe").read_text()
    if does == "train on":
        process.send_signal(signal.SIGUSR1)
    elif does == "end" and job == "fast":  # its second run
        (tmp_path / "pipe").read_text()
    assert process.wait(60) == (0 if does == "end" else 1)
    trained = (tmp_path / "trained").read_text().splitlines()
    assert len(trained) == (2 if (job, does) == ("fast", "end") else 1)
    assert "--lmbda 0.0035 " in trained[0] or job == "fast"
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 42\n" if does == "train on" else "")


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda path: path.name)
def test_recipes_are_shell_and_say_what_they_need(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert path.name == "requeue.sh" or "# Time: " in text
    assert (
        path.suffix != ".sh"
        or path.name == "requeue.sh"
        or all(f"# {w}: " in text for w in ("Needs", "Memory", "Result"))
    )

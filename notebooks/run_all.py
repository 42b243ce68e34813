"""Runs every notebook from top to bottom and writes their figures: `make figures`.

Executed copies, with outputs, go to build/notebooks; the notebooks themselves stay as they are. Notebooks run side by
side, one on each core, up to four.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXECUTED = ROOT / "build" / "notebooks"
LONGEST = ("01_train.ipynb", "05_ablations.ipynb")  # these begin first


def execute(notebook: Path, threads: int) -> tuple[float, str | None]:
    """Runs a notebook.  threads: that PyTorch may use  ->  seconds, and what went wrong, if anything"""
    os.environ["ENTROFORMER_FIGURES"] = str(ROOT / "figures")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    import papermill
    from traitlets.config import Config

    # No open ports; sockets of its own, since kernels that start at once would choose the same names
    folder = tempfile.TemporaryDirectory(prefix="kernel-")
    place = {"transport": "ipc", "ip": f"{folder.name}/k"} if os.name == "posix" else {}
    sockets = Config({"KernelManager": place})
    begin, wrong = time.monotonic(), None
    try:
        papermill.execute_notebook(
            notebook, EXECUTED / notebook.name, cwd=ROOT, kernel_name="python3", progress_bar=False, config=sockets
        )
    except papermill.PapermillExecutionError as error:
        wrong = f"{error.ename} in cell {error.cell_index}: {error.evalue}"
    finally:
        folder.cleanup()
    return time.monotonic() - begin, wrong


def main() -> int:
    """Exit code 1 where a notebook stops; the others run all the same."""
    EXECUTED.mkdir(parents=True, exist_ok=True)
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"), key=lambda path: (path.name not in LONGEST, path))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(4, cores)
    failed = 0
    with ProcessPoolExecutor(workers) as pool:
        running = {pool.submit(execute, notebook, max(1, cores // workers)): notebook.name for notebook in notebooks}
        for done in as_completed(running):
            seconds, wrong = done.result()
            failed += wrong is not None
            print(f"{running[done]}: {wrong or f'{seconds:.0f} s'}", file=sys.stderr if wrong else None, flush=True)
    if failed:
        return 1
    print(f"{len(notebooks)} notebooks ran; their figures are in {ROOT / 'figures'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The loop: exact resume, a golden log, several processes, signals."""

import functools
import json
import os
import signal
import socket
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import LMBDAS, MICRO, micro_model
from lightning.fabric.utilities.rank_zero import rank_zero_only
from PIL import Image
from torch import nn

from entroformer_lib import cli
from entroformer_lib.errors import ConfigError, TrainingError, UserError
from entroformer_lib.models import config as model_config
from entroformer_lib.training import folder, loop
from entroformer_lib.training.chance import DRAWN, conditions, random_choice
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.data import PreloadedCrops, Sampling, held_out_crops
from entroformer_lib.training.initial import initial_model
from entroformer_lib.training.loop import Run, train
from entroformer_lib.training.loss import TrainingStep, rates_and_distortions, tempered, unrest
from entroformer_lib.training.optimizer import learning_rate_factor
from entroformer_lib.training.strategies import whole
from entroformer_lib.weights.zoo import load_model

GOLDEN = Path(__file__).parent / "golden" / "training_20_steps.jsonl"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on worker counts and the like


@pytest.fixture
def config(photo_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(model_config.SIZES, "tiny", MICRO)
    return TrainConfig(
        data=str(photo_folder),
        out=str(tmp_path / "run"),
        steps=20,
        batch=2,
        crop=64,
        lr=1e-3,
        pretrain=0.4,
        pretrain_lmbda=0.1,
        log_every=1,
        accelerator="cpu",
        devices=1,
    )


def log_of(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def losses(config) -> list[float]:
    return [row["loss"] for row in log_of(config)]


def test_golden_log_of_20_steps(config):
    """Change of behaviour anywhere in model, data or loop shows here. A new file takes a reason in its commit."""
    train(config, progress=False)
    names = ("step", "rd_loss", "bpp_y", "bpp_z", "psnr_db", "lr", "lmbda")
    rows = [{name: row[name] for name in names} for row in log_of(config)]
    golden = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    for row, expected in zip(rows, golden, strict=True):
        assert row == pytest.approx(expected, rel=2e-3), f"step {row['step']}"
    assert sum(r["rd_loss"] for r in rows[4:8]) < sum(r["rd_loss"] for r in rows[:4])


def crash_at(step: int):
    """A watcher under which the process ends at a step that is logged, but in no checkpoint."""

    def watch(row, model):
        if row["step"] == step:
            raise RuntimeError("the power is gone")

    return watch


def signal_at(step: int):
    """A watcher under which the process gets a signal at a step."""

    def watch(row, model):
        if row["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    return watch


def assert_same_run(a, b):
    """Two finished runs with the same losses and the same weights."""
    assert losses(a) == losses(b)
    ours, theirs = (load_model(Path(c.out) / "weights.safetensors", "cpu").state_dict() for c in (a, b))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("variant", ["tiny-parallel", "tiny-serial"])
@pytest.mark.parametrize("preset", ["paper", "official"])  # official draws k at random
def test_resume_equals_uninterrupted(config, tmp_path, variant, preset):
    config = replace(config, model=variant, preset=preset, steps=8)
    train(config, progress=False)
    cut = replace(config, out=str(tmp_path / "cut"), checkpoint_seconds=0.0)
    with pytest.raises(RuntimeError, match="power"):
        train(cut, progress=False, watch=crash_at(6))
    assert len(losses(cut)) == 6
    train(cut, progress=False)
    assert_same_run(cut, config)


def test_resume_with_muon_mean_and_variable_rate(config, tmp_path):
    """What these add to the state is in the checkpoint too; the crop grows after the cut."""
    more = dict(optimizer="muon", ema=0.9, lmbdas=(0.01, 0.1), last_crop=128, schedule="linear")
    config = replace(config, steps=5, pretrain_lmbda=None, **more)
    train(config, progress=False)
    cut = replace(config, out=str(tmp_path / "cut"))
    with pytest.raises(TrainingError, match="Stopped by a signal at step 2"):
        train(cut, progress=False, watch=signal_at(2))
    train(cut, progress=False)
    assert_same_run(cut, config)


@pytest.mark.parametrize("lmbdas", [(), (0.01, 0.1)])
def test_too_large_a_batch_names_one_that_fits(config, monkeypatch, lmbdas):
    """The memory of a GPU, imitated: no more than three crops at a time."""
    forward = TrainingStep.forward
    config = replace(config, lmbdas=lmbdas, pretrain_lmbda=None if lmbdas else 0.1)

    def small_memory(self, x, *rest, **more):
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert sys.exc_info()[1] is None  # an error that is being handled would keep the graph that failed
        return forward(self, x, *rest, **more)

    train(replace(config, steps=2), progress=False)  # leaves a checkpoint
    longer = replace(config, steps=2, batch=8, out=config.out + "2")
    monkeypatch.setattr(TrainingStep, "forward", small_memory)
    with pytest.raises(TrainingError, match="2 at a time fit, and the same command with --accumulate 4 goes on"):
        train(longer, progress=False)
    train(replace(longer, accumulate=4), progress=False)
    assert log_of(longer)[-1]["step"] == 2


def test_passes_of_a_step_are_the_step_of_the_whole_batch(config):
    """Whatever is left to chance; and a run goes on with another number of passes."""
    config = replace(config, steps=4, batch=4, preset="official", lmbdas=(0.01, 0.1), pretrain_lmbda=None)
    train(config, progress=False)
    cut = replace(config, out=config.out + "2", accumulate=2)
    with pytest.raises(TrainingError, match="Stopped by a signal at step 2"):
        train(cut, progress=False, watch=signal_at(2))
    train(replace(cut, accumulate=4), progress=False)
    for name in ("loss", "rd_loss", "bpp_y", "bpp_z"):
        assert [row[name] for row in log_of(cut)] == pytest.approx([row[name] for row in log_of(config)], rel=1e-5), (
            name
        )


def test_watch_sees_every_row_of_the_log(config):
    seen = []

    def watch(row, model):
        model.eval()
        seen.append(row["step"])

    train(replace(config, steps=4, log_every=2), progress=False, watch=watch)
    assert seen == [2, 4]


def test_variable_rate_from_weights_of_one_rate(config):
    """Gains start at 1 for the lambda of the weights, so that rate codes as before."""
    one = train(replace(config, steps=2, pretrain=0, lmbda=0.02), progress=False)
    several = replace(config, init=str(one), lmbdas=(0.005, 0.02, 0.08), pretrain_lmbda=None, out=config.out + "2")
    start, several = load_model(one, "cpu"), initial_model(several).eval()
    several.level = several.gain.level_of(0.02)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(start(x)["x_hat"], several(x)["x_hat"])
    y = torch.rand(1, 1, 4, 4).expand(1, several.config.M, 4, 4)
    assert torch.equal(several.scaled(y), y) and (several.scaled(y, 2) > 1.9 * y).all()  # sqrt(0.08 / 0.02) = 2


def test_another_architecture_begins_with_what_fits(config):
    one = train(replace(config, steps=2, pretrain=0), progress=False)
    start = load_model(one, "cpu")
    wider = initial_model(replace(config, init=str(one), architecture=(f"M={MICRO['M'] + 8}",)))
    assert wider.config == start.config.replaced(M=MICRO["M"] + 8)
    before, after = start.state_dict(), wider.state_dict()
    taken = {n for n in before if before[n].shape == after[n].shape and torch.equal(before[n], after[n])}
    assert {"g_a.0.weight", "g_s.6.weight", "context_model.stack.blocks.0.attention.qkv.weight"} <= taken
    assert not taken & {"g_a.6.weight", "g_s.0.weight", "entropy_parameters.layers.2.weight"}
    with pytest.raises(ConfigError, match="no field 'N2'"):
        initial_model(replace(config, init=str(one), architecture=("N2=3",)))


def test_a_number_of_numpy_does_not_spoil_the_checkpoint(config):
    train(replace(config, lr=np.float64(1e-3), steps=1), progress=False)
    assert folder.read_checkpoint(Path(config.out) / "checkpoint.pt", torch.device("cpu"))["step"] == 1


def test_a_finished_run_is_not_repeated(config):
    config = replace(config, steps=2)
    train(config, progress=False)
    before = (Path(config.out) / "log.jsonl").read_text()
    train(config, progress=False)
    assert (Path(config.out) / "log.jsonl").read_text() == before


def test_a_run_does_not_become_shorter(config):
    config = replace(config, schedule="constant", steps=2)
    train(config, progress=False)
    with pytest.raises(TrainingError, match="has 2 steps already, and not 1"):
        train(replace(config, steps=1), progress=False)


def test_another_run_in_the_same_folder_is_refused(config):
    train(replace(config, steps=1), progress=False)
    with pytest.raises(TrainingError, match="another lmbda"):
        train(replace(config, steps=1, lmbda=0.5), progress=False)


def test_a_loss_that_is_no_number_names_the_step(config, monkeypatch):
    config = replace(config, steps=6, checkpoint_seconds=0.0)
    forward = TrainingStep.forward

    def forward_with_nan(self, x, *rest, **more):
        self.calls = getattr(self, "calls", 0) + 1
        return forward(self, x * (float("nan") if self.calls == 4 else 1), *rest, **more)

    monkeypatch.setattr(TrainingStep, "forward", forward_with_nan)
    with pytest.raises(TrainingError, match="step 4"):
        train(config, progress=False)
    state = torch.load(Path(config.out) / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and all(t.isfinite().all() for t in state["model"].values())


def test_a_gradient_that_is_no_number_moves_no_weight(config, monkeypatch):
    config = replace(config, steps=3, checkpoint_seconds=0.0)
    backward = Run.forward_and_backward

    def with_infinity(self, x, step, samples):
        terms = backward(self, x, step, samples)
        if step == 1:
            self.model.g_s[0].weight.grad[0, 0, 0, 0] = float("inf")
        return terms

    monkeypatch.setattr(Run, "forward_and_backward", with_infinity)
    with pytest.raises(TrainingError, match="step 2, or its gradient"):
        train(config, progress=False)
    state = torch.load(Path(config.out) / "checkpoint.pt", weights_only=True)
    assert state["step"] == 1 and all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.parametrize("changes, sentence", [
    (dict(crop=100), "multiple of 64"),
    (dict(metric="ms-ssim"), "160"),
    (dict(steps=0), "steps must be a whole number"),
    (dict(lmbdas=(0.1, 0.01), pretrain_lmbda=None), "rise"),
    (dict(lmbdas=(0.01, 0.1)), "pretrain_lmbda"),
    (dict(ema=1.5), "below 1"),
    (dict(graphics=1.5), "graphics must be a share"),
    (dict(schedule="decay"), "for a branch"),
    (dict(branch="nowhere.pt"), "cannot be read"),
    (dict(branch="nowhere.pt", init="blocks-parallel"), "not for it"),
    (dict(held_out="nowhere.txt"), "cannot be read"),
    (dict(transforms="blocks-parallel@0.014", latents="there", lmbdas=(0.1, 0.2)), "goes with pictures"),
    (dict(transforms="blocks-parallel@0.014", latents="there", metric="ms-ssim", crop=256), "goes with pictures"),
    (dict(init="blocks-parallel", lmbda=5.0, pretrain=0.0, pretrain_lmbda=None), "lmbda and pretrain_lmbda are for a"),
    (dict(init="blocks-parallel"), "lmbda and pretrain_lmbda are for a"),
    (dict(init="blocks-parallel", metric="ms-ssim", crop=192, pretrain_lmbda=None), "give lmbdas for MS-SSIM"),
    (dict(graphics=0.5, accumulate=2), "two crops in it at least"),
    (dict(accumulate=3), r"A batch of 2 does not divide into 3 equal parts \(processes: 1, passes of each: 3\)\.$"),
])  # fmt: skip
def test_runs_that_cannot_start(config, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        train(replace(config, **changes), progress=False)


def test_finetune_from_weights(config, tmp_path):
    first = train(replace(config, steps=2), progress=False)
    second = replace(config, steps=1, init=str(first), out=str(tmp_path / "second"), lmbda=0.01, pretrain=0.0, lr=1e-9)
    tuned = load_model(train(second, progress=False), "cpu")
    torch.testing.assert_close(tuned.g_a[0].weight, load_model(first, "cpu").g_a[0].weight)


def test_bfloat16_trains_close_to_float32(config, tmp_path):
    train(replace(config, steps=3), progress=False)
    narrow = replace(config, steps=3, precision="bfloat16", out=str(tmp_path / "narrow"))
    train(narrow, progress=False)
    for a, b in zip(log_of(config), log_of(narrow), strict=True):
        assert b["rd_loss"] == pytest.approx(a["rd_loss"], rel=0.05)


@pytest.mark.parametrize("quick", [torch.float32, torch.bfloat16])
def test_the_quick_type_is_taken_where_it_is_left_open(config, tmp_path, monkeypatch, quick):
    monkeypatch.setattr(loop, "quick_type", lambda device: quick)
    for precision in ("auto", "float32", "bfloat16"):
        train(replace(config, steps=2, precision=precision, out=str(tmp_path / precision)), progress=False)
    found = {precision: losses(replace(config, out=str(tmp_path / precision))) for precision in ("float32", "bfloat16")}
    left_open = losses(replace(config, out=str(tmp_path / "auto")))
    assert [name for name, values in found.items() if values == left_open] == [str(quick).removeprefix("torch.")]


def test_compiled_transforms_train_the_same(held_out, monkeypatch):
    """Taken apart by torch.compile, but not translated to C++, which would take a minute."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled(module, backend="eager"))
    train(held_out, progress=False)
    other = replace(held_out, out=held_out.out + "2", compile=True)
    train(other, progress=False)
    assert losses(other) == pytest.approx(losses(held_out), rel=1e-5)
    assert log_of(other)[-1]["held_out"][0] == pytest.approx(log_of(held_out)[-1]["held_out"][0], rel=1e-4)


def test_ms_ssim_can_be_the_goal(photo_folder, config):
    train(replace(config, steps=2, metric="ms-ssim", crop=192, batch=1, lmbda=30.0), progress=False)
    rows = log_of(config)
    assert len(rows) == 2
    for row in rows:
        lmbda = 0.1 if row["step"] <= 1 else 30.0  # 40% of two steps are pretraining
        assert row["rd_loss"] == pytest.approx(lmbda * (1 - row["ms_ssim"]) + row["bpp"], rel=1e-4)


def test_schedule_of_the_paper():
    factors = [learning_rate_factor(s, 1000) for s in range(1000)]
    assert factors[0] == 1 / 50 and factors[49] == 1 and factors[199] == 1
    assert [factors[s] for s in (200, 400, 600, 800, 999)] == pytest.approx([0.75, 0.75**2, 0.75**3, 0.75**4, 0.75**4])


def command(config, *extra) -> list:
    fields = [f"--{k}={getattr(config, k)}" for k in ("data", "out", "steps", "batch", "crop", "lr", "accelerator")]
    return ["train", *fields, "--log-every=1", "--devices=1", *extra]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_a_sentence(config, number, tmp_path, monkeypatch):
    """Meanwhile nobody else trains in the folder."""
    config, said = replace(config, steps=10_000), tmp_path / "said.txt"
    process = warm.start(warm.entroformer, *command(config), output=said)
    log = Path(config.out) / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.exitcode is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)
    monkeypatch.setattr(folder, "PATIENCE", 0)
    with pytest.raises(TrainingError, match="Another process is training in the folder .*run"):
        train(config, progress=False)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 1
    step = torch.load(Path(config.out) / "checkpoint.pt", weights_only=True)["step"]
    assert f"Stopped by a signal at step {step} of 10000" in said.read_text().splitlines()[-1]
    assert log_of(config)[-1]["step"] == step


def test_a_folder_is_free_after_a_run_however_it_ended(config, monkeypatch):
    """After an error, and after SIGKILL."""
    monkeypatch.setattr(folder, "PATIENCE", 0)
    config = replace(config, steps=2)
    with pytest.raises(RuntimeError, match="power"):
        train(config, progress=False, watch=crash_at(1))
    run = folder.RunFolder(Path(config.out))
    if not (child := os.fork()):
        with run.alone():
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with run.alone(), pytest.raises(TrainingError, match="Another process"):
        train(config, progress=False)
    train(config, progress=False)
    assert [row["step"] for row in log_of(config)] == [1, 2]


@pytest.mark.parametrize(
    "words, code, sentence",
    [
        ("--lmbda -1", 1, "lmbda must be a number above 0, and is -1.0."),
        ("--log-every 0", 1, "log_every must be a whole number of at least 1, and is 0."),
        ("--data=", 1, "data must be"),
        ("--lr nan", 1, "lr must be"),
        ("--devices 0", 1, "devices must be"),
        ("--devices several", 2, "several"),
        ("--accelerator banana", 2, "banana"),
        ("--accelerator cuda", 1, "--accelerator cpu works"),
        ("--accelerator gpu --devices 2", 1, "--accelerator gpu --devices 2 asks for"),
        ("--accelerator mps", 1, "--accelerator cpu works"),
    ],
)
def test_nonsense_on_the_command_line_is_refused_before_any_work(words, code, sentence, config, monkeypatch, capsys):
    if ("cuda" in words or "gpu" in words) and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(sys, "argv", ["entroformer", *command(config), *words.split()])
    try:
        found = cli.main()
    except SystemExit as stop:
        found = stop.code
    errors = capsys.readouterr().err
    assert found == code and sentence in errors and "Traceback" not in errors
    assert not Path(config.out).exists()


# ---- torn and foreign files in the folder of a run ------------------------------------------------------------------


@pytest.fixture
def finished(config):
    """A run of two steps that may be continued."""
    config = replace(config, schedule="constant", steps=2, pretrain=0, pretrain_lmbda=None)
    train(config, progress=False)
    return config


@pytest.mark.parametrize(
    "damage",
    [
        lambda log: log[: len(log) * 3 // 4],
        lambda log: log + bytes(100),
        lambda log: b'\xff\n{"loss": 1}\n[1]\n\n' + log,
    ],
    ids=["cut", "zeros", "foreign"],
)
def test_a_torn_log_loses_its_damaged_rows(damage, finished):
    log = Path(finished.out) / "log.jsonl"
    whole = log_of(finished)
    log.write_bytes(damage(log.read_bytes()))
    with pytest.warns(UserWarning, match="damaged rows of .*log.jsonl"):
        train(replace(finished, steps=3), progress=False)
    rows = log_of(finished)
    assert rows[-1]["step"] == 3 and rows[:-1] in (whole, whole[:1])


EVIL = Path(tempfile.gettempdir()) / f"ran-{os.getpid()}"


class Evil:
    """Somebody else's checkpoint: it makes a folder where it is unpickled without care."""

    def __reduce__(self):
        return os.mkdir, (str(EVIL),)


def other_optimizer(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"optimizer": {}}, path)


def other_model(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"model": {"weight": torch.zeros(3)}}, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:20_000]),
        lambda path: path.write_text("no checkpoint"),
        lambda path: torch.save([1], path),
        lambda path: torch.save({"step": 1}, path),
        lambda path: torch.save(Evil(), path),
        other_optimizer,
        other_model,
    ],
    ids=["empty", "cut", "text", "list", "foreign", "evil", "other optimizer", "other model"],
)
def test_a_checkpoint_that_is_none_is_named(damage, finished, tmp_path):
    """Where a run goes on from it, and where a branch begins at it."""
    path = Path(finished.out) / "checkpoint.pt"
    damage(path)
    before = path.read_bytes()
    with pytest.raises(TrainingError, match=f"{path} is (damaged|that of another run)"):
        train(replace(finished, steps=3), progress=False)
    with pytest.raises(UserError):
        train(replace(finished, out=str(tmp_path / "branch"), branch=str(path)), progress=False)
    assert path.read_bytes() == before and not EVIL.exists()


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:40], lambda text: "", lambda text: "[1]", lambda text: '{"architectures": ["bert"]}'],
    ids=["cut", "empty", "list", "foreign"],
)
def test_a_config_that_is_none_is_named_and_kept(damage, finished):
    path = Path(finished.out) / "config.json"
    path.write_text(damage(path.read_text()))
    before = path.read_text()
    with pytest.raises(TrainingError, match=f"{path} is damaged or not that of a run"):
        train(finished, progress=False)
    assert path.read_text() == before


@pytest.fixture
def unequal_shards(photo_folder, tmp_path) -> Path:
    """The photographs as two shards."""
    (tmp_path / "shards").mkdir()
    first, *others = sorted(photo_folder.glob("*.png"))
    for name, paths in (("a.tar", [first]), ("b.tar", others)):
        with tarfile.open(tmp_path / "shards" / name, "w") as file:
            for path in paths:
                file.add(path, path.name)
    return tmp_path / "shards"


def test_a_streamed_run_resumes_exactly(config, unequal_shards, tmp_path):
    config = replace(config, data=str(unequal_shards), preload=False, workers=1, steps=4)
    train(config, progress=False)
    cut = replace(config, out=str(tmp_path / "cut"), workers=0)
    with pytest.raises(TrainingError, match="Stopped by a signal at step 3"):
        train(cut, progress=False, watch=signal_at(3))
    train(replace(cut, workers=2), progress=False)
    assert_same_run(cut, config)


class Keeping(torch.optim.Adam):
    """Adam, which writes down the gradients that it is given. So it does after each pass, in each process."""

    path: Path

    def step(self):
        gradients = [whole(p.grad).clone() for g in self.param_groups for p in g["params"]]
        if os.environ.get("RANK", "0") == "0":
            torch.save(gradients, self.path / "gradients.pt")
        return super().step()


def after_pass(out: Path, run: Run, *given) -> dict:
    """A pass of `Run`, which lets its process write down the gradient's norm."""
    terms = PASS(run, *given)
    norm = sum(float(p.grad.square().sum()) for p in run.model.parameters() if p.grad is not None)
    with open(out / f"passes{os.environ.get('RANK', '')}.txt", "a") as file:
        file.write(f"{norm!r}\n")
    return terms


PASS = Run.forward_and_backward
WAYS = {"alone": {}, "ddp": {}, "passes": dict(accumulate=2), "fsdp": dict(strategy="fsdp")}
WAYS["fsdp-passes"] = WAYS["fsdp"] | WAYS["passes"]


def one_step(data: Path, out: Path, processes: int, ways: list[str]) -> None:
    """One step of four crops in several ways, as one process or as one of two; gradients go to gradients.pt."""
    for number, way in enumerate(ways):
        (out / way).mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(model_config.SIZES, "tiny", MICRO)
            patch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))  # each run meets under a name of its own
            patch.setattr(torch.optim, "Adam", Keeping)
            patch.setattr(Keeping, "path", out / way, raising=False)
            patch.setattr(
                Run, "forward_and_backward", functools.partialmethod(functools.partial(after_pass, out / way))
            )
            names = dict(data=str(data), out=str(out / way), preset="official", accelerator="cpu", devices=processes)
            names |= dict(preload=False, workers=processes - 1, **WAYS[way])
            train(TrainConfig(**names, steps=1, batch=4, crop=64, clip=1e9, pretrain=1.0), progress=False)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def odd_batch(data: Path, out: Path) -> None:
    """What is said of a batch that two processes cannot share."""
    config = TrainConfig(data=str(data), out=str(out), batch=3, accelerator="cpu", devices=2)
    with pytest.raises(TrainingError) as refused:
        train(config, progress=False)
    torch.distributed.destroy_process_group()
    (out / f"{os.environ['RANK']}.txt").write_text(str(refused.value))


def odd_batch_and_steps(data: Path, out: Path, *given) -> None:
    """Several runs one after the other, because processes cost more than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "9")
        odd_batch(data, out / "odd")
    one_step(data, out, *given)


def under_torchrun(data: Path, out: Path, ways: list[str]) -> None:
    """The same by what torchrun is made of, in two processes."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    here = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="two", start_method="fork")
    elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **here), odd_batch_and_steps)(
        data, out, 2, ways
    )


def test_two_processes_give_the_gradients_of_one(unequal_shards, tmp_path):
    """torchrun with gloo: same crops, same noise, same masks, same k, shared between the processes, with either
    strategy, in one pass or two. The crops come from shards of one and three pictures."""
    said, ways = tmp_path / "said.txt", [way for way in WAYS if way != "alone"]
    process = warm.start(under_torchrun, unequal_shards, tmp_path, ways, output=said)
    one_step(unequal_shards, tmp_path, 1, ["alone"])
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    gradients = {way: torch.load(tmp_path / way / "gradients.pt", weights_only=True) for way in WAYS}
    assert len(gradients["alone"]) > 100
    flat = {way: torch.cat([g.flatten() for g in parts]) for way, parts in gradients.items()}
    for way in ways:
        assert (flat[way] - flat["alone"]).norm() <= 1e-6 * flat["alone"].norm(), way
        for one, two in zip(gradients["alone"], gradients[way], strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-9)
    # Before the last pass no gradient has left its process.
    passes = [[float(line) for line in (tmp_path / "passes" / f"passes{rank}.txt").open()] for rank in (0, 1)]
    for rank in (0, 1):
        sentence = "A batch of 3 does not divide into 2 equal parts (processes: 2, passes of each: 1)."
        assert (tmp_path / "odd" / f"{rank}.txt").read_text() == sentence
    assert passes[0][0] != pytest.approx(passes[1][0]) and passes[0][1] == pytest.approx(passes[1][1])


def step_or_die(run: Run, x, step: int) -> dict:
    """A step of `Run`; the second process is killed at its third step, when it runs for the first time. By the clock of
    the first process a checkpoint is due after every step; by that of the second never."""
    run.seconds += 1000 * (os.environ.get("RANK") == "0")
    if step == 2 and os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        print("Killed.", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return STEP(run, x, step)


STEP = Run.step


def dying(config: TrainConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_config.SIZES, "tiny", MICRO)
        patch.setattr(Run, "step", step_or_die)
        train(config, progress=False)


def restarted(config: TrainConfig) -> None:
    """torchrun --max-restarts 1, in two processes."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    here = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="elastic", start_method="fork")
    more = dict(max_restarts=1, monitor_interval=0.1)
    elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **here, **more), dying)(config)


MUCH = dict(optimizer="muon", ema=0.9, lmbdas=(0.01, 0.1), preset="official")


@pytest.mark.parametrize("changes", [{}, dict(strategy="fsdp", **MUCH)], ids=["ddp", "fsdp"])
def test_a_killed_process_is_replaced_and_the_curve_goes_on(changes, config, held_out, unequal_shards, tmp_path):
    """From the checkpoint of the step before; the last step is taken by one process alone, which has the whole model.
    As one process has it."""
    more = dict(pretrain=0.0, pretrain_lmbda=None, schedule="constant", checkpoint_seconds=0.0, steps=5)
    more |= dict(held_out=held_out.held_out, held_out_every=5, preload=False, workers=0)
    config = replace(config, data=str(unequal_shards), **more, **changes)
    said = tmp_path / "said.txt"
    torn = replace(config, out=str(tmp_path / "torn"), devices=2, checkpoint_seconds=500.0)
    process = warm.start(restarted, torn, output=said)
    alone = replace(config, steps=6, strategy="ddp")
    train(alone, progress=False)
    process.join(300)
    assert process.exitcode == 0 and "Killed." in said.read_text(), said.read_text()
    trained = load_model(Path(torn.out) / "weights.safetensors", "cpu").state_dict()
    train(replace(torn, steps=6, devices=1, strategy="ddp"), progress=False)
    assert [row["step"] for row in log_of(torn)] == [1, 2, 3, 4, 5, 6]
    assert losses(torn) == pytest.approx(losses(config), rel=1e-5)
    assert log_of(torn)[4]["held_out"][0] == pytest.approx(log_of(config)[4]["held_out"][0], rel=1e-4)
    assert trained.keys() == load_model(Path(config.out) / "weights.safetensors", "cpu").state_dict().keys()


@pytest.mark.parametrize(
    ("rank", "sentence"),
    [("0", "Of 2 processes, these did not come within 0.5 s: 1."), ("1", "Process 0 of 2 did not answer at ")],
)
def test_a_process_that_never_comes_is_named(rank, sentence, config, monkeypatch):
    """What torchrun --nnodes 2 says to the one process of this machine; the other machine is off."""
    monkeypatch.setattr(rank_zero_only, "rank", None, raising=False)  # Fabric writes it; it is as before afterwards
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    said = dict(RANK=rank, WORLD_SIZE="2", GROUP_RANK=rank, GROUP_WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    for name, value in (said | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="late")).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=sentence):
        train(replace(config, devices=1, start_timeout=0.5), progress=False)


# ---- held-out pictures, branches, drawn pictures --------------------------------------------------------------------


@pytest.fixture
def held_out(photo_folder, tmp_path, config):
    path = tmp_path / "held_out.txt"
    path.write_text("# two\nastronaut.png\ncoffee.png  # large enough\n")
    return replace(config, held_out=str(path), held_out_every=2, steps=4, pretrain=0, pretrain_lmbda=None)


def test_held_out_pictures_are_in_the_log_and_not_in_training(held_out, photo_folder, tmp_path):
    """The losses are those of a run that never had these pictures."""
    config = replace(held_out, lmbdas=(0.01, 0.1))
    weights = train(config, progress=False)
    rest = tmp_path / "rest"
    rest.mkdir()
    for path in photo_folder.glob("*.png"):
        if path.name not in ("astronaut.png", "coffee.png"):
            (rest / path.name).write_bytes(path.read_bytes())
    alone = replace(config, data=str(rest), held_out=None, out=str(tmp_path / "alone"))
    train(alone, progress=False)
    assert losses(alone) == losses(config)
    rows = log_of(config)
    assert [row["step"] for row in rows if "held_out" in row] == [2, 4]
    points = rows[-1]["held_out"]
    assert [p["lmbda"] for p in points] == [0.01, 0.1]
    for p in points:
        mse = 10 ** (-p["psnr_db"] / 10)
        assert p["rd_loss"] == pytest.approx(p["bpp"] + p["lmbda"] * 255**2 * mse)
    pictures = held_out_crops(config.data, frozenset({"astronaut.png", "coffee.png"}))
    again = rates_and_distortions(load_model(weights, "cpu"), pictures, (0.01, 0.1), "mse")
    assert again[1] == pytest.approx(points[1], rel=1e-3)  # tables of p(z) aside, the weights of the last step


def test_pictures_linked_several_times_count_as_often_and_are_held_out_once(photo_folder, tmp_path):
    names = sorted(path.name for path in photo_folder.iterdir())[:2]
    for times, name in enumerate(names, start=1):
        for copy in range(2 * times):
            (tmp_path / str(copy)).mkdir(exist_ok=True)
            (tmp_path / str(copy) / name).symlink_to(photo_folder / name)
    assert len(PreloadedCrops(tmp_path, 64).pictures) == 6
    assert len(PreloadedCrops(tmp_path, 64, left_out=frozenset(names[:1])).pictures) == 4
    assert len(held_out_crops(tmp_path, frozenset(names))) == 2


def test_measuring_changes_no_step(held_out, tmp_path):
    """The same losses with and without, also where a mean of the weights is what is measured."""
    for more in ({}, dict(ema=0.9)):
        seen = replace(held_out, out=str(tmp_path / f"seen{len(more)}"), held_out_every=1, **more)
        unseen = replace(seen, out=str(tmp_path / f"unseen{len(more)}"), held_out_every=100)
        train(seen, progress=False)
        train(unseen, progress=False)
        assert losses(seen) == losses(unseen)


def test_a_held_out_name_that_is_nowhere_is_refused(held_out):
    Path(held_out.held_out).write_text("astronaut.png\nnobody.png\n")
    with pytest.raises(UserError, match="Of 2 held-out pictures 1"):
        train(held_out, progress=False, watch=crash_at(1))  # before the first step


def test_a_branch_goes_on_where_the_checkpoint_stands(config, tmp_path):
    """A constant branch takes the steps that its trunk would have taken; a decaying one ends at zero."""
    config = replace(config, pretrain=0, pretrain_lmbda=None, optimizer="muon", schedule="constant", steps=3)
    train(config, progress=False)
    checkpoint = tmp_path / "at-3.pt"
    checkpoint.write_bytes((Path(config.out) / "checkpoint.pt").read_bytes())
    train(replace(config, steps=6), progress=False)  # the steps of a constant run may change
    branch = replace(config, out=str(tmp_path / "branch"), branch=str(checkpoint), steps=3)
    train(branch, progress=False)
    # The branch warms up anew in its first step, which is its only difference.
    assert log_of(branch)[0]["rd_loss"] == log_of(config)[3]["rd_loss"]
    decay = replace(branch, out=str(tmp_path / "decay"), schedule="decay", steps=4)
    train(decay, progress=False)
    assert [row["lr"] for row in log_of(decay)] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert [row["rd_loss"] for row in log_of(decay)[:1]] == [log_of(config)[3]["rd_loss"]]


def test_a_branch_resumes_exactly(config, tmp_path):
    config = replace(config, pretrain=0, pretrain_lmbda=None, schedule="constant", steps=2)
    train(config, progress=False)
    branch = replace(config, branch=str(Path(config.out) / "checkpoint.pt"), schedule="decay", steps=4)
    whole, cut = (replace(branch, out=str(tmp_path / name)) for name in ("whole", "cut"))
    train(whole, progress=False)
    with pytest.raises(TrainingError, match="Stopped"):
        train(cut, progress=False, watch=signal_at(1))
    train(cut, progress=False)
    assert_same_run(cut, whole)


def test_a_branch_needs_its_trunk_for_its_first_step_alone(config, tmp_path):
    config = replace(config, pretrain=0, pretrain_lmbda=None, schedule="constant", steps=2)
    train(config, progress=False)
    trunk = Path(config.out) / "checkpoint.pt"
    branch = replace(config, branch=str(trunk), schedule="decay", steps=4, out=str(tmp_path / "branch"))
    with pytest.raises(TrainingError, match="with another optimizer"):
        train(replace(branch, optimizer="muon"), progress=False)
    assert not (tmp_path / "branch" / "config.json").exists()
    with pytest.raises(TrainingError, match="Stopped"):
        train(branch, progress=False, watch=signal_at(1))
    trunk.unlink()
    train(branch, progress=False)
    assert [row["step"] for row in log_of(branch)] == [1, 2, 3, 4]


def test_a_refused_command_changes_nothing(config):
    config = replace(config, schedule="constant", steps=3)
    train(config, progress=False)
    with pytest.raises(TrainingError, match="has 3 steps already"):
        train(replace(config, steps=2), progress=False)
    assert json.loads((Path(config.out) / "config.json").read_text())["steps"] == 3


def test_passes_and_measure(config, tmp_path):
    """The log is that of one pass, PSNR too."""
    config = replace(config, steps=2)
    train(config, progress=False)
    parts = replace(config, accumulate=2, out=str(tmp_path / "parts"))
    train(parts, progress=False)
    for one, two in zip(log_of(config), log_of(parts), strict=True):
        for name in ("rd_loss", "bpp", "psnr_db"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_held_out_pictures_too_small_for_ms_ssim(held_out, tmp_path):
    """Are refused before the first step."""
    folder = tmp_path / "small"
    folder.mkdir()
    Image.new("RGB", (220, 210)).save(folder / "large.png")
    Image.new("RGB", (170, 150)).save(folder / "small.png")
    (tmp_path / "names.txt").write_text("small.png")
    more = dict(data=str(folder), held_out=str(tmp_path / "names.txt"), out=str(tmp_path / "never"))
    with pytest.raises(UserError, match="smaller than 192 pixels"):
        train(replace(held_out, **more, lmbdas=(1.0, 8.0), metric="ms-ssim", crop=192), progress=False)
    (tmp_path / "names.txt").write_text("small.png\nlarge.png")
    for preload in (True, False):
        with pytest.raises(UserError, match="all are held out"):
            train(replace(held_out, **more, preload=preload), progress=False)


def test_a_branch_may_grow(config, tmp_path):
    blocks = dict(architecture=("transforms=blocks", "stages=[[8,8,1]]", "linear_path=dct"))
    config = replace(config, pretrain=0, pretrain_lmbda=None, schedule="constant", steps=2, **blocks)
    train(config, progress=False)
    more = dict(branch=str(Path(config.out) / "checkpoint.pt"), architecture=("stages=[[8,12,2]]",))
    larger = replace(config, out=str(tmp_path / "larger"), steps=1, lr=1e-9, **more)
    same = replace(larger, out=str(tmp_path / "same"), architecture=())
    wide = load_model(train(larger, progress=False), "cpu")
    assert wide.config.stages == ((8, 12, 2),)
    train(same, progress=False)
    assert log_of(larger)[0]["rd_loss"] == pytest.approx(log_of(same)[0]["rd_loss"], rel=1e-4)


def test_drawn_pictures_and_changed_colours_belong_to_the_sample(config, tmp_path):
    config = replace(config, graphics=0.5, permuted=0.5, steps=3)
    train(config, progress=False)
    again = replace(config, out=str(tmp_path / "again"))
    train(again, progress=False)
    plain = replace(config, out=str(tmp_path / "plain"), graphics=0.0, permuted=0.0)
    train(plain, progress=False)
    assert losses(config) == losses(again) != losses(plain)


def test_a_drawn_crop_counts_at_most_like_the_middle_photograph():
    loss = torch.tensor([1.0, 300.0, 3.0, 0.5, 2.0], requires_grad=True)
    drawn = torch.tensor([False, True, False, True, False])
    out = tempered(loss, drawn)
    assert out.tolist() == [1.0, 2.0, 3.0, 0.5, 2.0]
    out.sum().backward()
    assert torch.allclose(loss.grad, torch.tensor([1.0, 2 / 300, 1.0, 1.0, 1.0]))
    assert tempered(loss, ~drawn | drawn) is loss and tempered(loss, drawn & ~drawn) is loss
    sampling = Sampling(seed=3, graphics=0.5)
    said = random_choice(range(20), 0.5, 3, DRAWN)
    photo = torch.zeros(3, 64, 64, dtype=torch.uint8)
    black = torch.tensor([not sampling.crop(g, 64, lambda: photo).any() for g in range(20)])
    assert torch.equal(said, ~black) and 0 < said.sum() < 20


def test_channels_that_rest_between_two_integers_are_drawn_to_zero():
    y = torch.zeros(2, 4, 4, 4)
    y[0, 0], y[0, 1], y[1, 2], y[1, 3] = 0.4, -0.2, 7.0, 0.4 * (torch.arange(16).view(4, 4) < 7)
    y = y.requires_grad_()
    cost = unrest(y)
    assert cost.tolist() == pytest.approx([(0.4**2 + 0.2**2) / 256, 0.0])  # a channel that varies has its own mean
    cost.sum().backward()
    pulls = y.grad.sum((2, 3))
    assert pulls[0, 0] > 0 > pulls[0, 1] and not pulls[0, 2:].any() and not pulls[1].any()


def test_the_unrest_of_a_model_is_minimised_but_not_counted_as_rate():
    model = micro_model(transforms="blocks", stages=((8, 12, 1),), linear_path="dct").train()
    x, noise = torch.rand(2, 3, 64, 64), {"y": torch.zeros(2, 24, 4, 4), "z": torch.zeros(2, 12, 1, 1)}
    terms = TrainingStep(model)(x, 0.01, noise=noise)
    rest = unrest(model(x, noise=noise)["y"])
    minimised = terms["loss"] - model.aux_loss()
    assert float(minimised) == pytest.approx(float(terms["rd_loss"] + rest.mean()), rel=1e-5)
    model.zero_grad()
    rest.sum().backward()
    assert rest.sum() > 0 and model.g_a.network[-1].bias.grad.abs().sum() > 0


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    run = folder.RunFolder(tmp_path)
    run.save({"step": 1})
    before = run.checkpoint.read_bytes()

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match="step 2 could not be written to .*: No space left"):
        run.save({"step": 2})
    assert run.checkpoint.read_bytes() == before and list(tmp_path.iterdir()) == [run.checkpoint]


def test_every_crop_is_weighed_by_the_lambda_of_its_level():
    model = micro_model(lmbdas=LMBDAS)
    run = TrainConfig("DATA", "OUT", lmbdas=LMBDAS)
    given = conditions(run, model.config, 0, range(9), (4, 4), "cpu")
    assert sorted(given["level"].tolist()) == sorted([0, 1, 2] * 3)
    assert torch.equal(given["lmbda"], torch.tensor(LMBDAS)[given["level"]])
    goal, lmbda = torch.tensor([1.0, 2.0, 4.0]), torch.tensor(LMBDAS)
    for even, mean in ((True, 2.0), (False, 7 / 3)):  # even: times 2, 1 and 1/2
        terms = TrainingStep(model, even=even).terms(goal, {"bpp_y": goal}, lmbda, None)
        assert float(terms["loss"] - model.aux_loss()) == pytest.approx(mean, rel=1e-4)
        assert float(terms["rd_loss"]) == pytest.approx(7 / 3)


def test_a_step_tempers_its_drawn_crops():
    model, goal = micro_model(), torch.tensor([1.0, 300.0, 3.0])
    terms = TrainingStep(model).terms(goal, {"bpp_y": goal}, None, torch.tensor([False, True, False]))
    assert float(terms["loss"] - model.aux_loss()) == pytest.approx(5 / 3, rel=1e-4)


def test_the_mean_of_the_weights_is_kept(config):
    config, seen = replace(config, steps=3, ema=0.5, pretrain=0.0, pretrain_lmbda=None), []
    torch.manual_seed(config.seed)
    mean = initial_model(config).g_a[0].weight.detach().clone()
    path = train(config, progress=False, watch=lambda row, model: seen.append(model.g_a[0].weight.detach().clone()))
    for step, last in enumerate(seen):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * last
    kept = load_model(path, "cpu").g_a[0].weight
    assert len(seen) == 3 and torch.allclose(kept, mean, rtol=0, atol=1e-6)
    assert not torch.allclose(kept, last, rtol=0, atol=1e-5)

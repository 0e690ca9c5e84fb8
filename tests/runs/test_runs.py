"""Runs end with the same scores, bit for bit, however they are interrupted."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

import ecodiff
from ecodiff import storage
from ecodiff.errors import BudgetError, CheckpointError, EcodiffError, LearningError, RunError
from ecodiff.learning.learn import learn
from ecodiff.learning.state import LearnState
from ecodiff.runs import loop
from ecodiff.runs.folder import Run
from ecodiff.runs.loop import advance
from ecodiff.runs.store import RunStore

PROMPTS = ["red apple", "cat", "rocket"]
CONFIG = ecodiff.LearnConfig(
    ratio=0.2, warm_steps=2, steps=3, batch=2, trajectories=4, inference_steps=3, size=16
)


@pytest.fixture
def reference(tiny_sdxl):
    return ecodiff.learn_masks(tiny_sdxl, PROMPTS, CONFIG)


def same(a, b):
    return all(torch.equal(a.values[name], b.values[name]) for name in a.values)


def test_same_configuration_same_scores(tiny_sdxl, reference):
    states = []
    again = ecodiff.learn_masks(tiny_sdxl, PROMPTS, CONFIG, states.append)
    assert same(again, reference)
    assert [state.step for state in states] == [1, 2, 3, 4, 5]
    other = ecodiff.learn_masks(tiny_sdxl, PROMPTS, ecodiff.LearnConfig(**vars(CONFIG) | {"seed": 1}))
    assert not same(other, reference)


def test_resumed_at_every_step(tiny_sdxl, reference, tmp_path):
    state, path = None, tmp_path / "state.safetensors"
    for _ in range(CONFIG.total_steps):
        state, scores = next(learn(tiny_sdxl, PROMPTS, CONFIG, state))
        state.save(path)
        state = LearnState.load(path)
    assert same(scores, reference)


def test_checkpointing_changes_nothing(tiny_sdxl, reference):
    config = ecodiff.LearnConfig(**vars(CONFIG) | {"checkpoint": False})
    assert same(ecodiff.learn_masks(tiny_sdxl, PROMPTS, config), reference)


def test_gates_start_at_the_budget_and_learn(tiny_sdxl):
    config = ecodiff.LearnConfig(**vars(CONFIG) | {"steps": 1})
    states = []
    ecodiff.learn_masks(tiny_sdxl, PROMPTS, config, states.append)
    assert states[-1].history[-1]["expected"] == pytest.approx(CONFIG.ratio, abs=1e-3)
    assert not torch.equal(states[1].vectors["log_alpha"], states[2].vectors["log_alpha"])


def test_stop_and_resume(tiny_sdxl, reference, tmp_path):
    run = Run.create(tmp_path / "run", "tiny", CONFIG, PROMPTS)
    assert not advance(run, tiny_sdxl, lambda state, seconds: run.request_stop())
    assert run.state().step == 1 and not run.finished
    assert advance(Run.open(run.folder), tiny_sdxl)
    assert run.finished and same(run.scores(), reference)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads({threads})
from ecodiff.runs import loop
from tests.conftest import sdxl
loop.SAVE_SECONDS = 0
pipe = sdxl()
run = loop.Run.open(Path({folder!r}))
loop.advance(run, pipe, lambda state, seconds: print(state.step, flush=True))
"""


def test_resume_after_kill_9(reference, tmp_path):
    from pathlib import Path

    run = Run.create(tmp_path / "run", "tiny", CONFIG, PROMPTS)
    root = str(Path(__file__).parents[2])
    script = CHILD.format(root=root, folder=str(run.folder), threads=torch.get_num_threads())
    killed = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline().strip() == "1"
    time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    step = run.state().step
    assert 1 <= step < CONFIG.total_steps
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[0] == str(step + 1), "it went on where it was"
    assert same(run.scores(), reference)


def test_two_processes_do_not_share_a_run(tiny_sdxl, tmp_path):
    from filelock import FileLock

    run = Run.create(tmp_path / "run", "tiny", CONFIG, PROMPTS)
    with FileLock(run.folder / ".lock"), pytest.raises(RunError, match="Another process"):
        advance(run, tiny_sdxl)


@pytest.mark.parametrize("step", [1, 3])  # in the warm start, while learning
def test_a_loss_that_is_not_a_number(tiny_sdxl, tmp_path, step):
    run = Run.create(tmp_path / "run", "tiny", CONFIG, PROMPTS)
    weight = tiny_sdxl.unet.conv_out.weight.data
    before = weight.clone()

    def poison(state, seconds):
        if state.step == step:
            weight.fill_(float("nan"))

    with pytest.raises(LearningError, match="not numbers"):
        advance(run, tiny_sdxl, poison)
    assert run.state().step == step and "not numbers" in run.error
    weight.copy_(before)
    assert advance(run, tiny_sdxl) and not run.error


def test_a_full_disk_loses_no_run(tiny_sdxl, reference, tmp_path):
    import resource

    from ecodiff.runs import loop

    run = Run.create(tmp_path / "run", "tiny", CONFIG, PROMPTS)
    advance(run, tiny_sdxl, lambda state, seconds: run.request_stop())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="disk"):
            advance(run, tiny_sdxl)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.state().step == 1
    assert advance(run, tiny_sdxl) and same(run.scores(), reference)
    assert loop.SAVE_SECONDS > 0


def test_wrong_requests(tiny_sdxl, tmp_path):
    with pytest.raises(BudgetError, match="preset"):
        ecodiff.LearnConfig.preset("magic")
    with pytest.raises(BudgetError, match="two batches"):
        ecodiff.LearnConfig(repair=7)
    with pytest.raises(BudgetError, match="between 0 and"):
        ecodiff.learn_masks(tiny_sdxl, PROMPTS, ecodiff.LearnConfig(ratio=0.99))
    with pytest.raises(BudgetError, match="prompt"):
        ecodiff.learn_masks(tiny_sdxl, [], CONFIG)
    with pytest.raises(RunError, match="not a run"):
        Run.open(tmp_path)
    for run_id in ("", "..", "../../etc", "a" * 32, "A" * 32):
        with pytest.raises(RunError):
            RunStore(tmp_path).open(run_id)


def test_old_runs_are_swept(tmp_path):
    store = RunStore(tmp_path)
    run = Run.create(store.new_folder(), "tiny", CONFIG, PROMPTS)
    assert store.sweep(max_age=3600) == 0 and store.open(run.id).prompts == PROMPTS
    assert store.sweep(max_age=-1) == 1
    with pytest.raises(RunError, match="expired"):
        store.open(run.id)


SMALL = ecodiff.LearnConfig(
    ratio=0.2, warm_steps=1, steps=2, batch=1, trajectories=2, inference_steps=2, size=16, checkpoint=None
)


class Nth:
    """Fails at the n-th of what it counts."""

    def __init__(self, n: int, fail):
        self.n, self.fail, self.count = n, fail, 0

    def __call__(self, *args) -> None:
        self.count += 1
        if self.count == self.n:
            self.fail()

    @property
    def reached(self) -> bool:
        return self.count >= self.n


def raising(error):
    def fail():
        raise error

    return fail


def left_over(run) -> list[str]:
    known = {"run.json", "state.safetensors", "scores.safetensors", "ERROR", "MEMORY", ".lock"}
    return [file.name for file in run.folder.iterdir() if file.name not in known]


@pytest.fixture
def small_reference(tiny_sdxl):
    return ecodiff.learn_masks(tiny_sdxl, PROMPTS, SMALL)


@pytest.mark.parametrize(
    "fail",
    [
        raising(RuntimeError("something nobody thought of")),
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        raising(KeyboardInterrupt()),
    ],
)
def test_the_nth_denoiser_call_fails(tiny_sdxl, small_reference, tmp_path, monkeypatch, fail):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    for n in itertools.count(1):
        run, nth = Run.create(tmp_path / str(n), "tiny", SMALL, PROMPTS), Nth(n, fail)
        hook = tiny_sdxl.unet.register_forward_pre_hook(nth)
        with suppress(RuntimeError, EcodiffError, KeyboardInterrupt):
            advance(run, tiny_sdxl)
        hook.remove()
        assert not left_over(run)
        assert advance(run, tiny_sdxl) and same(run.scores(), small_reference), f"call {n}"
        if not nth.reached:
            break
    assert n > 3


def test_the_nth_write_fails(tiny_sdxl, small_reference, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    write = storage.save_file
    for n in itertools.count(1):
        run = Run.create(tmp_path / str(n), "tiny", SMALL, PROMPTS)
        nth = Nth(n, raising(OSError(28, "No space left on device")))
        monkeypatch.setattr(storage, "save_file", lambda *a, nth=nth, **k: (nth(), write(*a, **k)))
        with suppress(CheckpointError):
            advance(run, tiny_sdxl)
        monkeypatch.setattr(storage, "save_file", write)
        assert not left_over(run)
        assert advance(run, tiny_sdxl) and same(run.scores(), small_reference), f"write {n}"
        if not nth.reached:
            break
    assert n > 6


def test_killed_at_the_nth_denoiser_call(tiny_sdxl, small_reference, tmp_path, monkeypatch):
    """Forked children: a fresh process a life would take minutes to import everything."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    threads, fork = torch.get_num_threads(), multiprocessing.get_context("fork")
    torch.set_num_threads(1)  # the parent's threads are not in the fork
    try:
        run, steps = Run.create(tmp_path / "run", "tiny", SMALL, PROMPTS), []
        for n in itertools.chain(range(1, 7), range(6, 40)):  # a life that learns nothing new is no life

            def live(n=n):
                tiny_sdxl.unet.register_forward_pre_hook(Nth(n, lambda: os.kill(os.getpid(), signal.SIGKILL)))
                advance(run, tiny_sdxl)

            child = fork.Process(target=live)
            child.start()
            child.join()
            state = run.state()
            steps.append(state.step if state else 0)
            if run.finished:
                break
        assert steps == sorted(steps), "a kill lost what was saved"
        assert run.finished and same(run.scores(), small_reference)
    finally:
        torch.set_num_threads(threads)


def test_a_full_disk_is_said_before_anything_is_lost(tmp_path, monkeypatch):
    store = RunStore(tmp_path / "runs")
    store.new_folder()
    monkeypatch.setattr("ecodiff.runs.store.MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(RunError, match="nearly full"):
        store.new_folder()

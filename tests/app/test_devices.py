"""Several devices, and devices that are too small."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecodiff import catalog, machine
from ecodiff.app import devices, server, service, tasks, worker
from ecodiff.app.service.prediction import unit_costs
from ecodiff.checkpoints import loading
from ecodiff.errors import BudgetError, OutOfMemoryError, RunError
from ecodiff.learning import calibration
from ecodiff.metrics import fidelity
from ecodiff.metrics.fidelity import generate
from ecodiff.runs import pictures
from ecodiff.runs.folder import Run
from ecodiff.runs.loop import advance

PROMPT = "red apple"


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def store(tmp_path):
    server.use(server.Server(tmp_path))
    yield server.server().store
    server.use(None)


def drawing() -> devices.Device:
    return server.server().devices.drawing


def new_run(store) -> Run:
    """Of the smallest model, short."""
    known = catalog.find("emoji-turbo")
    config = known.learn_config("fast", 0.2, warm_steps=1, steps=1, batch=2, trajectories=2)
    return Run.create(store.new_folder(), known.name, config, known.prompts("calibration"))


@pytest.fixture
def run(store) -> Run:
    return new_run(store)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that has learned."""
    server.use(server.Server(tmp_path_factory.mktemp("learned")))
    run = new_run(server.server().store)
    server.server().worker._learn(worker.Job(run), drawing())
    server.use(None)
    return run.folder


@pytest.fixture
def learned(finished, store) -> Run:
    """A run that has learned, of the test's own store."""
    return Run.open(shutil.copytree(finished, store.new_folder(), dirs_exist_ok=True))


def test_all_gpus_are_used_unless_others_are_named(monkeypatch):
    monkeypatch.delenv("ECODIFF_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.devices() == ["cuda:0", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.devices() == ["cuda:1"]
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert machine.devices() == ["cuda"]
    monkeypatch.setenv("ECODIFF_DEVICE", "cuda:2, cuda:3")
    assert machine.devices() == ["cuda:2", "cuda:3"] and machine.device() == "cuda:2"


def test_images_do_not_wait_for_learning_on_another_device(run, monkeypatch):
    server.use(server.Server(run.folder.parent, ["cpu", "cpu"]))
    first, second = server.server().devices.all
    learning, drawn = threading.Event(), threading.Event()
    real = Run.stop_requested.fget

    def wait(self):
        """In the middle of a step, whose turn it is there."""
        learning.set()
        assert drawn.wait(60), "the image waited for the step"
        return real(self)

    monkeypatch.setattr(Run, "stop_requested", property(wait))
    job = server.server().worker.submit(run)
    assert learning.wait(60)
    plan = unit_costs(run.model)[0].plan(ratio=0.2)
    options = catalog.find(run.model).drawing()
    asked = ([plan], [(PROMPT, 0)], options, False)
    dense, _ = tasks.results(tasks.DrawImages(str(run.folder), *asked))
    drawn.set()
    while job.active or job.drawing:
        threading.Event().wait(0.05)
    assert job.stage == "finished" and run.finished
    assert first.dense(run.model) is not second.dense(run.model)
    again = generate(second.dense(run.model), PROMPT, 0, **options)
    torch.testing.assert_close(again.latents, dense.latents, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(calibration, "denoiser_calls", out_of_memory)
    assert first.calibration(run).calls, "what was recorded there serves here"


def test_a_model_that_does_not_fit(monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.to", out_of_memory)
    with pytest.raises(OutOfMemoryError, match=r"weights alone take 30\.6 MB\. Take a smaller model"):
        loading.load("emoji-turbo")


def test_learning_that_does_not_fit_is_kept(run, monkeypatch):
    monkeypatch.setattr("ecodiff.learning.learn.gauss_newton_sample", out_of_memory)
    pipe = loading.load(run.model)
    with pytest.raises(OutOfMemoryError, match="The run is kept"):
        advance(run, pipe)
    assert "ran out of memory" in run.error
    monkeypatch.undo()
    assert advance(run, pipe) and not run.error


def test_pictures_neither_fail_nor_hold_up_a_run(run, monkeypatch):
    """The dense model's come first while a ranking of one step runs; one that fails is worth no run."""
    run.config = replace(run.config, method="wanda")
    run.save()
    real, seen = pictures.generate, []

    def drawn(*args, **kwargs):
        seen.append(run.state())
        if len(seen) > pictures.COUNT:
            raise OutOfMemoryError("ran out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(pictures, "generate", drawn)
    job = server.server().worker.submit(Run.open(run.folder))
    while job.active or job.drawing:
        threading.Event().wait(0.05)
    assert job.stage == "finished" and not Run.open(run.folder).error
    assert seen[: pictures.COUNT] == [None] * pictures.COUNT, "before anything was learned"
    found = service.pictures(run.id)
    assert len(found["dense"]) == pictures.COUNT and found["sizes"] == []
    assert service.picture(run.id) == found["dense"][0]


def test_a_run_that_is_stopped_while_its_pictures_are_drawn_stops(run, monkeypatch):
    run.config = replace(run.config, method="wanda")
    run.save()
    real = pictures.generate

    def stopping(*args, **kwargs):
        service.stop(run.id)
        return real(*args, **kwargs)

    monkeypatch.setattr(pictures, "generate", stopping)
    job = server.server().worker.submit(Run.open(run.folder))
    while job.active:
        threading.Event().wait(0.05)
    assert job.stage == "stopped" and service.pictures(run.id) == {}
    monkeypatch.undo()
    service.resume(run.id)
    job = server.server().worker.job(run.id)
    while job.active or job.drawing:
        threading.Event().wait(0.05)
    assert job.stage == "finished"


def test_whoever_does_not_wait_for_an_image_ends_the_work(learned, monkeypatch):
    run = learned
    real, drawn = fidelity.generate, []

    def counted(*args, **kwargs):
        drawn.append(kwargs["steps"])
        return real(*args, **kwargs)

    monkeypatch.setattr(tasks, "generate", counted)
    drawing_both = service.compare(run.id, 0.2, PROMPT, steps=3, compensate=False)
    dense, pruned, facts = next(drawing_both)
    assert dense.image.size and pruned is None and not facts
    drawing_both.close()  # as Gradio does when the client has gone, or pressed Stop
    assert drawn == [2, 2, 3], "two to warm up, and the dense image"
    sizes = service.sizes(run.id, [0.1, 0.2], 4, compensate=False)
    assert len(next(sizes)[0]) == 3
    sizes.close()
    assert len(drawn) == 3 + 3 + 3


def test_the_speed_of_a_size_is_measured_once(learned, monkeypatch):
    """It takes seconds under the lock; a machine that was too busy to say is asked again."""
    answers, asked = [None, (1.1, 1.2, 1.3), (1.4, 1.5, 1.6)], []
    monkeypatch.setattr(tasks, "speedup", lambda *pipes: asked.append(pipes) or answers[len(asked) - 1])

    def measured(ratio: float, prompt: str, steps: int):
        return list(service.compare(learned.id, ratio, prompt, 0, steps, compensate=False))[-1][2]["speedup"]

    assert measured(0.2, PROMPT, 2) is None
    assert measured(0.2, PROMPT, 2) == measured(0.2, "cat", 3) == answers[1]
    assert measured(0.35, PROMPT, 2) == answers[2] and len(asked) == 3


def test_images_that_do_not_fit_free_what_others_left(learned, monkeypatch):
    run = learned
    list(service.compare(run.id, 0.2, PROMPT, compensate=False))
    assert drawing()._variants
    real = fidelity.generate
    monkeypatch.setattr(tasks, "generate", out_of_memory)
    with pytest.raises(RunError, match="ran out of memory"):
        list(service.compare(run.id, 0.2, PROMPT, compensate=False))
    assert not drawing()._variants
    monkeypatch.setattr(tasks, "generate", real)
    assert len(list(service.compare(run.id, 0.2, PROMPT, compensate=False))) == 2


def test_compensation_that_does_not_fit_leaves_a_finished_run(run, monkeypatch):
    monkeypatch.setattr(devices, "Calibration", out_of_memory)
    job = worker.Job(run)
    server.server().worker._learn(job, drawing())
    assert job.stage == "finished" and not run.error


def test_the_first_images_wait_for_nothing(run, monkeypatch):
    """Once a run is finished, what compensation needs is gathered, for any size, before anybody asks."""
    server.server().worker._learn(worker.Job(run), drawing())
    monkeypatch.setattr(calibration.Calibration, "gather", out_of_memory)
    small = drawing().pruned(run, run.plan(0.2), keep=False)
    assert drawing().pruned(run, run.plan(0.2)) is small
    other = drawing().pruned(run, run.plan(0.35))
    plain = drawing().pruned(run, run.plan(0.35), compensate=False)
    name = next(n for n, w in plain.unet.named_parameters() if not w.equal(other.unet.get_parameter(n)))
    assert name.endswith(("weight", "bias"))


def test_weights_are_repaired_by_as_many_trajectories_as_a_run_says(learned, monkeypatch):
    """Two runs of one model and the same prompts: neither gets the other's weights or recordings."""
    few, more = (replace(learned, config=replace(learned.config, repair=count)) for count in (8, 12))
    monkeypatch.setattr(devices.machine, "zerogpu", lambda: True)  # recordings are kept
    assert drawing().recordings(few) != drawing().recordings(more)
    monkeypatch.undo()
    made = []
    for run, batches in ((few, 2), (more, 3)):
        made.append(drawing().pruned(run, learned.plan(0.2), keep=False).unet)
        calls = drawing().calibration(run).calls
        assert [call.heldout for call in calls] == [True] * 4 + [False] * 4 * (batches - 1), "of four steps"
    assert any(not w.equal(made[1].get_parameter(name)) for name, w in made[0].named_parameters())


def test_every_call_records_something_or_says_why_not(run, monkeypatch, tmp_path):
    """On ZeroGPU the page calls until all is recorded: a call that adds nothing would be made for ever."""
    folder, config = tmp_path / "recordings", run.compensation
    run.imported = True
    run.save()
    monkeypatch.setattr(devices.Devices, "recordings", lambda self, run: folder)
    monkeypatch.setattr(machine, "CHUNK_SECONDS", 0.0)
    for done in range(1, 3):
        assert len(list(tasks.results(tasks.LearnRun(str(run.folder))))) == 1
        assert len(calibration.missing(config, folder)) == len(config.batches) - done
    monkeypatch.setattr(calibration, "save", lambda *_: None)
    with pytest.raises(RunError, match="could not be kept"):
        list(tasks.results(tasks.LearnRun(str(run.folder))))
    assert service.status(run.id)["stage"] == "finished" and "disk" in service.status(run.id)["error"]


def test_stopped_runs_do_not_fill_the_queue(store, monkeypatch):
    """What is stopped while it waits, or refused, leaves nothing behind."""
    monkeypatch.setattr(worker.Worker, "_work", lambda self, device: None)  # nobody works: all of them wait
    known = catalog.find("emoji-turbo")
    for _ in range(3 * worker.MAX_WAITING):
        started = service.start("emoji-turbo", 0.2, "fast")
        service.stop(started["run"])
        service.delete(started["run"])
    runs = [service.start(known.name, 0.2, "fast")["run"] for _ in range(worker.MAX_WAITING)]
    before = {run.id for run in store.runs()}
    with pytest.raises(RunError, match="waiting already"):
        service.start(known.name, 0.2, "fast")
    assert {run.id for run in store.runs()} == before == set(runs)
    assert len(server.server().worker._jobs) <= worker.MAX_KEPT + worker.MAX_WAITING


def test_a_failure_after_the_end_is_no_failed_run(run, monkeypatch):
    def broken(self, run, device):
        raise ZeroDivisionError

    monkeypatch.setattr(worker.Worker, "_prepare", broken)
    job = server.server().worker.submit(run)
    while job.active or job.drawing:
        threading.Event().wait(0.05)
    threading.Event().wait(0.2)
    assert job.stage == "finished" and not run.error


@pytest.mark.parametrize("steps", [0, -3, 101, 5000])
def test_time_steps_have_a_limit_at_the_service(learned, steps):
    with pytest.raises(BudgetError, match="1 to 100"):
        next(service.compare(learned.id, 0.2, PROMPT, steps=steps))

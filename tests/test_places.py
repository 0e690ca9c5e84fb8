"""Several devices, and devices that are too small."""

import threading

import pytest
import torch

from ecodiff import backends, catalog, checkpoint, compensate, gpu, jobs, places, recording, service
from ecodiff.errors import OutOfMemoryError, RunError
from ecodiff.fidelity import generate
from ecodiff.places import Place
from ecodiff.runs import STORE, Run
from ecodiff.service.learning import unit_costs

PROMPT = "red apple"


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(STORE, "root", tmp_path)
    return STORE


@pytest.fixture
def run(store) -> Run:
    """Of the smallest model, short."""
    known = catalog.find("emoji-turbo")
    config = known.learn_config("fast", 0.2, warm_steps=1, steps=1, batch=2, trajectories=2)
    return Run.create(store.new_folder(), known.name, config, known.prompts("calibration"))


def test_all_gpus_are_used_unless_others_are_named(monkeypatch):
    monkeypatch.delenv("ECODIFF_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert backends.devices() == ["cuda:0", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert backends.devices() == ["cuda:1"]
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert backends.devices() == ["cuda"]
    monkeypatch.setenv("ECODIFF_DEVICE", "cuda:2, cuda:3")
    assert backends.devices() == ["cuda:2", "cuda:3"] and backends.device() == "cuda:2"


def test_images_do_not_wait_for_learning_on_another_device(run, monkeypatch):
    first, second = both = [Place("cpu"), Place("cpu")]
    monkeypatch.setattr(places, "PLACES", both)
    monkeypatch.setattr(gpu, "DRAWING", first)
    monkeypatch.setattr(jobs, "LEARNING", [second])
    learning, drawn = threading.Event(), threading.Event()
    real = Run._raise_if_stopped

    def wait(self):
        """In the middle of a step, whose turn it is there."""
        learning.set()
        assert drawn.wait(60), "the image waited for the step"
        real(self)

    monkeypatch.setattr(Run, "_raise_if_stopped", wait)
    job = jobs.Worker().submit(run)
    assert learning.wait(60)
    plan = unit_costs(run.model)[0].plan(ratio=0.2)
    options = catalog.find(run.model).drawing()
    asked = ([plan], [(PROMPT, 0)], options, False, str(run.folder / "variants"))
    ((dense, _),) = gpu.results("draw", run.model, *asked)
    drawn.set()
    while job.active:
        threading.Event().wait(0.05)
    assert job.stage == "finished" and run.finished
    assert first.dense(run.model) is not second.dense(run.model)
    again = generate(second.dense(run.model), PROMPT, 0, **options)
    torch.testing.assert_close(again.latents, dense.latents, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(recording, "denoiser_calls", out_of_memory)
    assert first.calibration(run.model).calls, "what was recorded there serves here"


def test_a_model_that_does_not_fit(monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.to", out_of_memory)
    with pytest.raises(OutOfMemoryError, match=r"weights alone take 44\.5 MB\. Take a smaller model"):
        checkpoint.load("emoji-turbo")


def test_learning_that_does_not_fit_is_kept(run, monkeypatch):
    monkeypatch.setattr("ecodiff.saliency.gauss_newton_sample", out_of_memory)
    pipe = checkpoint.load(run.model)
    with pytest.raises(OutOfMemoryError, match="The run is kept"):
        run.advance(pipe)
    assert "ran out of memory" in run.error
    monkeypatch.undo()
    assert run.advance(pipe) and not run.error


def test_images_that_do_not_fit_free_what_others_left(run, monkeypatch):
    jobs.Worker()._learn(jobs.Job(run), gpu.DRAWING)
    service.compare(run.id, 0.2, PROMPT, compensate=False)
    assert gpu.DRAWING._variants
    real = gpu.generate
    monkeypatch.setattr(gpu, "generate", out_of_memory)
    with pytest.raises(RunError, match="ran out of memory"):
        service.compare(run.id, 0.2, PROMPT, compensate=False)
    assert not gpu.DRAWING._variants
    monkeypatch.setattr(gpu, "generate", real)
    assert len(service.compare(run.id, 0.2, PROMPT, compensate=False)) == 3


def test_compensation_that_does_not_fit_leaves_a_finished_run(run, monkeypatch):
    monkeypatch.setattr(places, "Calibration", out_of_memory)
    job = jobs.Job(run)
    jobs.Worker()._learn(job, Place("cpu"))
    assert job.stage == "finished" and not run.error


def test_the_first_images_wait_for_nothing(run, monkeypatch):
    """Once a run is finished, what compensation needs is gathered, for any size, before anybody asks."""
    jobs.Worker()._learn(jobs.Job(run), gpu.DRAWING)
    monkeypatch.setattr(compensate.Calibration, "gather", out_of_memory)
    small = gpu.DRAWING.pruned(run.model, run.plan(0.2))
    assert gpu.DRAWING.pruned(run.model, run.plan(0.2), kept=run.folder / "variants") is small
    other = gpu.DRAWING.pruned(run.model, run.plan(0.35))
    plain = gpu.DRAWING.pruned(run.model, run.plan(0.35), compensate=False)
    name = next(n for n, w in plain.unet.named_parameters() if not w.equal(other.unet.get_parameter(n)))
    assert name.endswith(("weight", "bias"))


def test_every_call_records_something_or_says_why_not(run, monkeypatch, tmp_path):
    """On ZeroGPU the page calls until all is recorded: a call that adds nothing would be made for ever."""
    folder, config = tmp_path / "recordings", catalog.find(run.model).compensation()
    run.imported = True
    run.save()
    monkeypatch.setattr(gpu, "recordings", lambda model: folder)
    monkeypatch.setattr(backends, "CHUNK_SECONDS", 0.0)
    for done in range(1, 3):
        assert len(list(gpu.results("learn", str(run.folder)))) == 1
        assert len(recording.missing(config, folder)) == len(config.batches) - done
    monkeypatch.setattr(recording, "save", lambda *_: None)
    with pytest.raises(RunError, match="could not be kept"):
        list(gpu.results("learn", str(run.folder)))
    assert service.status(run.id)["stage"] == "finished" and "disk" in service.status(run.id)["error"]

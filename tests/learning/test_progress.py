"""A ranking in one step that is killed goes on after its last batch, and ends as it would have."""

import pytest
import torch

import ecodiff
from ecodiff.errors import CheckpointError
from ecodiff.learning import progress, surgeon
from ecodiff.learning.learn import learn
from ecodiff.learning.progress import SUMS, Paused, Progress
from ecodiff.learning.state import LearnState
from ecodiff.runs.folder import Run
from ecodiff.runs.loop import PROGRESS, Stopped, advance
from tests.conftest import PIPELINES

PROMPTS = ["red apple", "blue whale", "green tree"]


def counted(pipe, config, kept=None, most=None):
    """The scores (None if it was killed) and how many denoiser calls they took."""
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        if most is not None and calls > most:
            raise Stopped

    try:
        ((_, scores),) = list(learn(pipe, PROMPTS, config, on_step=count, kept=kept))
        return scores, calls
    except Stopped:
        return None, calls


@pytest.mark.parametrize(("name", "method"), [("flux-dev", "gauss-newton"), ("sdxl", "surgeon")])
def test_killed_and_gone_on_is_the_same(tmp_path, monkeypatch, name, method):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr("ecodiff.learning.directions.PROMPTS", 16)
    monkeypatch.setattr("ecodiff.learning.learn.measured", lambda *orders: {})
    pipe = PIPELINES[name]()
    few = {"warm_steps": 3, "batch": 1, "trajectories": 3, "inference_steps": 2}
    few |= {"size": 64}
    config = ecodiff.LearnConfig.preset(method, ratio=0.2, **few)
    expected, whole = counted(pipe, config)
    file = Progress(tmp_path).file(SUMS)
    killed, _ = counted(pipe, config, Progress(tmp_path), most=whole // 2)
    assert killed is None and file.is_file()
    assert 1 <= Progress(tmp_path).load(SUMS)[0] <= 3
    found, after = counted(pipe, config, Progress(tmp_path))
    assert after < whole, "what was kept was computed again"
    assert found.values.keys() == expected.values.keys()
    for group, values in expected.values.items():
        assert torch.equal(found.values[group], values), group
    Progress(tmp_path).forget()
    Progress(tmp_path).keep(SUMS, {"cost|other": torch.ones(2)}, 2)  # of another version
    again, calls = counted(pipe, config, Progress(tmp_path))
    assert calls == whole and all(torch.equal(again.values[n], v) for n, v in expected.values.items())
    file.write_bytes(b"not a file of sums")
    assert Progress(tmp_path).load(SUMS) == (0, {})


@pytest.mark.parametrize("batch", [0, 1])
def test_killed_between_recording_and_sampling_is_the_same(tmp_path, monkeypatch, batch):
    """A batch whose calls were recorded, and its gradients not: it draws its noise in the same order."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr("ecodiff.learning.directions.PROMPTS", 16)
    monkeypatch.setattr("ecodiff.learning.learn.measured", lambda *orders: {})
    pipe = PIPELINES["flux-dev"]()
    few = {"warm_steps": 2, "batch": 1, "trajectories": 2, "inference_steps": 2, "size": 64}
    config = ecodiff.LearnConfig.preset("surgeon", ratio=0.2, **few)
    expected, _ = counted(pipe, config)
    sampled, sample = [], surgeon.gauss_newton_sample

    def killed(*given, **options):
        sampled.append(0)
        if len(sampled) == batch + 1:
            raise Stopped
        return sample(*given, **options)

    monkeypatch.setattr(surgeon, "gauss_newton_sample", killed)
    kept = Progress(tmp_path, seconds=1e9)  # one that may pause, and need not
    assert counted(pipe, config, kept)[0] is None
    assert kept.file(f"calls-{batch}").is_file() and kept.load(SUMS)[0] == batch
    monkeypatch.setattr(surgeon, "gauss_newton_sample", sample)
    found, _ = counted(pipe, config, Progress(tmp_path, seconds=1e9))
    for group, values in expected.values.items():
        assert torch.equal(found.values[group], values), group


@pytest.mark.parametrize(("name", "method"), [("flux-dev", "surgeon"), ("sdxl", "gauss-newton")])
def test_part_after_part_it_is_the_same(tmp_path, monkeypatch, name, method):
    """Without time for more than one part a call, as on ZeroGPU, orders and their errors included."""
    monkeypatch.setattr("ecodiff.learning.directions.PROMPTS", 16)
    pipe = PIPELINES[name]()
    few = {"warm_steps": 2, "batch": 1, "trajectories": 6, "inference_steps": 2, "size": 64}
    config = ecodiff.LearnConfig.preset(method, ratio=0.2, **few)
    expected, whole = counted(pipe, config)
    rounds, counts, found = 0, [], None
    while found is None:
        rounds += 1
        calls = [0]

        def count(calls=calls):
            calls[0] += 1

        try:
            kept = Progress(tmp_path, seconds=0.0)
            ((_, found),) = list(learn(pipe, PROMPTS, config, on_step=count, kept=kept))
        except Paused:
            assert rounds < 60
        counts.append(calls[0])
    assert rounds > 2 and max(counts) < whole, "it did not pause"
    assert found.metadata.get("orders") == expected.metadata.get("orders")
    assert ("orders" in found.metadata) == (method == "surgeon")
    for group, values in expected.values.items():
        assert torch.equal(found.values[group], values), group
    for group, basis in expected.bases.items():
        assert all(map(torch.equal, found.bases[group], basis)), group


def test_a_full_disk_costs_work_and_not_the_run(tmp_path, monkeypatch):
    """What could not be kept does not pause: the next call would begin where this one did, for ever."""
    part = {"a": torch.ones(1)}
    with pytest.raises(Paused):
        Progress(tmp_path, seconds=0.0).keep("part", part)
    Progress(None, seconds=0.0).keep("part", part)  # nothing is kept anywhere
    Progress(tmp_path).keep("part", part)

    def full(*given):
        raise CheckpointError("Is the disk full?")

    monkeypatch.setattr(progress, "write_tensors", full)
    Progress(tmp_path, seconds=0.0).keep("part", part)


def test_a_run_leaves_no_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    pipe = PIPELINES["sdxl"]()
    few = {"warm_steps": 2, "batch": 2, "trajectories": 4, "inference_steps": 2, "size": 64}
    config = ecodiff.LearnConfig.preset("gauss-newton", ratio=0.2, kinds=("heads", "ffn"), **few)
    run = Run.create(tmp_path / "run", "emoji-sdxl", config, PROMPTS)
    seen, note = [], Progress.note

    def watched(self, *given):
        note(self, *given)
        seen.append(self.file(SUMS).exists())

    monkeypatch.setattr(Progress, "note", watched)
    assert advance(run, pipe)
    assert seen == [True, True] and not (run.folder / PROGRESS).exists()
    assert isinstance(run.state(), LearnState)

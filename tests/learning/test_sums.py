"""A ranking in one step that is killed goes on after its last batch, and ends as it would have."""

import pytest
import torch

import ecodiff
from ecodiff.learning import sums
from ecodiff.learning.learn import learn
from ecodiff.learning.state import LearnState
from ecodiff.runs.folder import Run
from ecodiff.runs.loop import SUMS, Stopped, advance
from ecodiff.storage import write_tensors
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
    monkeypatch.setattr(sums, "SECONDS", 0.0)
    monkeypatch.setattr("ecodiff.learning.directions.PROMPTS", 16)
    monkeypatch.setattr("ecodiff.learning.learn.measured", lambda *orders: {})  # it has sums of its own
    pipe = PIPELINES[name]()
    few = {"warm_steps": 3, "batch": 1, "trajectories": 3, "inference_steps": 2}
    few |= {"size": 64}
    config = ecodiff.LearnConfig.preset(method, ratio=0.2, **few)
    expected, whole = counted(pipe, config)
    file = tmp_path / "sums.safetensors"
    killed, _ = counted(pipe, config, sums.Sums(file), most=whole // 2)
    assert killed is None and file.is_file()
    assert 1 <= sums.Sums(file).load()[0] <= 3
    found, after = counted(pipe, config, sums.Sums(file))
    assert after < whole, "what was kept was computed again"
    assert found.values.keys() == expected.values.keys()
    for group, values in expected.values.items():
        assert torch.equal(found.values[group], values), group
    write_tensors(file, {"cost|other": torch.ones(2)}, {"format": sums.FORMAT, "batches": "2"})
    again, calls = counted(pipe, config, sums.Sums(file))
    assert calls == whole and all(torch.equal(again.values[n], v) for n, v in expected.values.items())
    file.write_bytes(b"not a file of sums")
    assert sums.Sums(file).load() == (0, {})


def test_a_run_leaves_no_sums(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "SECONDS", 0.0)
    pipe = PIPELINES["sdxl"]()
    few = {"warm_steps": 2, "batch": 2, "trajectories": 4, "inference_steps": 2, "size": 64}
    config = ecodiff.LearnConfig.preset("gauss-newton", ratio=0.2, kinds=("heads", "ffn"), **few)
    run = Run.create(tmp_path / "run", "emoji-sdxl", config, PROMPTS)
    seen, note = [], sums.Sums.note

    def watched(self, *given):
        note(self, *given)
        seen.append(self.file.exists())

    monkeypatch.setattr(sums.Sums, "note", watched)
    assert advance(run, pipe)
    assert seen == [True, True] and not (run.folder / SUMS).exists()
    assert isinstance(run.state(), LearnState)

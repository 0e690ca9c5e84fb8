"""Weights that come from main memory, layer by layer. On a device of its own: tests/elsewhere.py."""

import gc
import weakref

import pytest
import torch

import ecodiff
from ecodiff.errors import BudgetError, OutOfMemoryError, UnsupportedModelError
from ecodiff.learning import streaming
from ecodiff.learning.heal import heal
from ecodiff.learning.learn import learn
from ecodiff.machine import together
from ecodiff.pipelines import denoiser_of
from tests.checkpoints.test_folders import some_plan
from tests.conftest import PIPELINES


class Alive:
    """Copies that layers brought, and that something still holds: bytes now, and at most."""

    def __init__(self):
        self.now = self.most = self.copies = 0

    def copy(self, tensor, device):
        made = tensor.detach().clone()
        storage = made.untyped_storage()
        self.now, self.copies = self.now + storage.nbytes(), self.copies + 1
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.gone, storage.nbytes())
        return torch.nn.Parameter(made, False) if isinstance(tensor, torch.nn.Parameter) else made

    def gone(self, size: int) -> None:
        self.now -= size


def stream(pipe, monkeypatch) -> Alive:
    """On this machine's CPU, as if it were another device: every call copies, and copies are counted."""
    streaming.stream_(pipe, "cpu", large=64)
    for layer in denoiser_of(pipe).modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), streaming._Brought):
                hook.__self__.device = None
    alive = Alive()
    monkeypatch.setattr(streaming, "_copy", alive.copy)
    return alive


@pytest.mark.parametrize("method", ["gauss-newton", "taylor", "fast"])
def test_one_block_at_a_time_and_the_same_scores(monkeypatch, method):
    dense, pipe = PIPELINES["flux-dev"](), PIPELINES["flux-dev"]()
    few = {
        "warm_steps": 1,
        "batch": 2,
        "trajectories": 4,
        "inference_steps": 3,
        "size": 64,
        "kinds": ("heads", "ffn"),
    }
    few |= {"steps": 1} if method == "fast" else {}
    config = ecodiff.LearnConfig.preset(method, ratio=0.2, **few)
    prompts = ["red apple", "blue whale"]
    (_, expected), *_ = reversed(list(learn(dense, prompts, config)))
    told = []
    alive = stream(pipe, monkeypatch)
    (_, found), *_ = reversed(list(learn(pipe, prompts, config, on_plan=told.append)))
    assert alive.copies > 100 and told[0].startswith("weights are streamed layer by layer, every block")
    for name, values in expected.values.items():
        assert torch.equal(found.values[name], values), name
    gc.collect()
    assert alive.now == 0, "a copy was kept"
    transformer = pipe.transformer
    whole = sum(p.nbytes for p in transformer.parameters())
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    outside = whole - sum(p.nbytes for block in blocks for p in block.parameters())
    largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    assert alive.most <= max(largest, outside) * 1.1 < 0.4 * whole


def test_healing_is_refused_in_words():
    pipe = PIPELINES["sdxl"]()
    small = ecodiff.variant(pipe, some_plan(pipe))
    streaming.stream_(small, "cpu", large=64)
    with pytest.raises(OutOfMemoryError, match="Heal it on a larger device"):
        next(heal(small, pipe, ["red apple"]))


def test_devices_that_work_together():
    assert together("cuda:0 + cuda:1") == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert together("cpu") == [torch.device("cpu")]


@pytest.mark.parametrize("method", ["gauss-newton", "fast", "surgeon"])
def test_on_rounded_weights_units_are_ranked_as_on_their_values(method):
    """The same scores as on a model whose weights are those values in full precision, bit for bit."""
    few = {"warm_steps": 1, "batch": 2, "trajectories": 4, "inference_steps": 2, "size": 64}
    few |= {"steps": 1} if method == "fast" else {}
    config = ecodiff.LearnConfig.preset(method, ratio=0.2, kinds=("heads", "ffn"), **few)
    found = []
    for rounded in (True, False):
        pipe = PIPELINES["flux-dev"]()
        first = next(pipe.transformer.parameters())
        if rounded:
            streaming.stream_(pipe, "cpu", large=64, rounded=True)
        else:
            for weight in pipe.transformer.parameters():
                if weight.ndim > 1 and weight.nbytes >= 64 and weight is not first:
                    weight.data = weight.data.to(streaming.ROUNDED).float()
        assert streaming.is_rounded(pipe.transformer) == rounded
        (_, scores), *_ = reversed(list(learn(pipe, ["red apple", "blue whale"], config)))
        found.append(scores)
    assert found[0].metadata["weights"] == "float8" and "weights" not in found[1].metadata
    if method != "surgeon":  # of several orders the full one measures which is best
        for name, values in found[1].values.items():
            assert torch.equal(found[0].values[name], values), name
    bytes_ = sum(p.nbytes for p in pipe.transformer.parameters())
    pipe = PIPELINES["flux-dev"]()
    streaming.stream_(pipe, "cpu", large=64, rounded=True)
    assert sum(p.nbytes for p in pipe.transformer.parameters()) < 0.35 * bytes_, "float32 became 8 bits"
    if method == "fast":
        for other in ("magnitude-l2", "wanda", "taylor"):
            config = ecodiff.LearnConfig.preset(other, ratio=0.2, batch=2, inference_steps=2, size=64)
            with pytest.raises(BudgetError, match=f"{other} reads the weights"):
                list(learn(pipe, ["red apple"], config))
    with pytest.raises(UnsupportedModelError, match="was rounded to rank"):
        ecodiff.variant(pipe, found[0].plan(ratio=0.2))

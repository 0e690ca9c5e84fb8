import json

import pytest
import torch
from safetensors.torch import save_file

import ecodiff
from ecodiff.errors import CheckpointError, PlanError
from ecodiff.pruning.plan import PLAN_FORMAT
from ecodiff.pruning.scores import Scores


@pytest.fixture
def scores(tiny_sdxl):
    generator = torch.Generator().manual_seed(0)
    groups = ecodiff.find_groups(tiny_sdxl.unet)
    return Scores.of(tiny_sdxl.unet, {g.name: torch.rand(g.size, generator=generator) for g in groups})


def test_only_bool_vectors_are_plans():
    for wrong in (torch.ones(3), torch.ones(3, 2, dtype=torch.bool)):
        with pytest.raises(PlanError, match="bool"):
            ecodiff.PrunePlan({"a": wrong})


def hostile(tmp_path):
    """Files that are not plans, by what is wrong with them."""
    good = {"a": torch.zeros(2, dtype=torch.uint8)}
    header = {"format": PLAN_FORMAT, "sizes": json.dumps({"a": 10}), "metadata": "{}"}
    whole = tmp_path / "whole"
    save_file(good, whole, metadata=header)
    data = whole.read_bytes()

    def changed(**changes):
        path = tmp_path / "changed"
        tensors = changes.pop("tensors", good)
        save_file(tensors, path, metadata=header | changes)
        return path.read_bytes()

    return {
        "empty": b"",
        "truncated": data[: len(data) - 1],
        "text": b"not a plan at all",
        "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins\x94.",
        "huge header": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + data[8:],
        "other format": changed(format="somebody.else"),
        "sizes of other groups": changed(sizes=json.dumps({"b": 10})),
        "too many units": changed(sizes=json.dumps({"a": 10**12})),
        "negative size": changed(sizes=json.dumps({"a": -1})),
        "sizes not JSON": changed(sizes="{"),
        "sizes a list": changed(sizes="[]"),
        "deep JSON": changed(sizes="[" * 100_000),
        "metadata not a dict": changed(metadata="3"),
        "wrong dtype": changed(tensors={"a": torch.zeros(2)}),
        "wrong shape": changed(tensors={"a": torch.zeros(1, 2, dtype=torch.uint8)}),
        "path in a name": changed(
            tensors={"../a": torch.zeros(2, dtype=torch.uint8)}, sizes=json.dumps({"../a": 10})
        ),
    }


def test_hostile_files_are_refused(tmp_path):
    for what, data in hostile(tmp_path).items():
        path = tmp_path / "plan.safetensors"
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            ecodiff.PrunePlan.load(path)
            pytest.fail(f"{what} was accepted")
    with pytest.raises(CheckpointError, match="no plan file"):
        ecodiff.PrunePlan.load(tmp_path / "missing")

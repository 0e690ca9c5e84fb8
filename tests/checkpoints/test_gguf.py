"""GGUF: every tensor in blocks that ComfyUI-GGUF reads, close to what it was, in the layers of the node.

ComfyUI-GGUF cannot be installed by pip: integrations/comfyui/check.py runs it, with its output in docs.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ecodiff
from ecodiff.checkpoints import comfyui
from ecodiff.checkpoints import gguf as ours
from ecodiff.checkpoints.formats import find_format
from ecodiff.errors import CheckpointError
from ecodiff.pipelines import denoiser_calls, prompt_rows
from tests import original_layout
from tests.checkpoints.test_comfyui import check, layers

gguf = pytest.importorskip("gguf")


def read(file):
    """({name: tensor}, {name: kind}, header), read by llama.cpp's own package."""
    reader = gguf.GGUFReader(file)
    tensors, kinds = {}, {}
    for entry in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type).copy())
        field = reader.get_field(ours.SHAPE + entry.name)
        shape = [int(field.parts[i][0]) for i in field.data] if field else entry.shape.tolist()[::-1]
        tensors[entry.name], kinds[entry.name] = values.reshape(shape), entry.tensor_type.name
    text = reader.get_field(ours.HEADER)
    return tensors, kinds, json.loads(str(text.parts[text.data[-1]], encoding="utf-8"))


class Late(nn.Linear):
    """A layer of ComfyUI-GGUF: without weights until it takes what is loaded, in whatever shape."""

    def __init__(self, in_features, out_features, bias=True, **kwargs):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                setattr(self, name, nn.Parameter(state_dict[prefix + name], requires_grad=False))


class Operations(original_layout.Operations):
    Linear = Late


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("emoji-sdxl", "Q8_0", 0.0075),
        ("emoji-flux", "Q5_0", 0.06),
        ("emoji-flux", "Q4_0", 0.12),
        ("sd3", "Q4_0", 0.12),
        ("qwen", "Q5_0", 0.06),
    ],
)
def test_every_tensor_is_there_and_close(name, kind, error, tmp_path):
    pipe = check.random_pipeline(name) if name in check.RANDOM else ecodiff.load(name)
    small = check.pruned(pipe, 0.4)
    whole = comfyui.save_comfyui(small, tmp_path / "whole.safetensors")
    file = find_format(f"gguf-{kind.lower()}").write(small, tmp_path / "out")
    assert file.name == f"out-{kind}.gguf"
    wanted, (found, kinds, header) = load_file(whole), read(file)
    empty = {name: torch.zeros(shape) for name, shape in header["empty"].items()}
    assert (empty or name == "sd3") and {key: t.shape for key, t in (found | empty).items()} == {
        key: t.shape for key, t in wanted.items()
    }
    for key, tensor in found.items():
        distance = (tensor - wanted[key]).square().mean() / wanted[key].square().mean().clamp(min=1e-12)
        assert distance.sqrt() < (error if kinds[key] == kind else 1e-3), key
    values = sum(t.numel() for key, t in wanted.items() if kinds.get(key) == kind)
    assert values > 0.8 * sum(t.numel() for t in wanted.values()), "most weights are quantised"
    assert file.stat().st_size < whole.stat().st_size * (ours.KINDS[kind] + 3) / 32
    with pytest.raises(CheckpointError, match="exists"):
        ours.save_gguf(small, file)


@torch.no_grad()
def test_the_layers_of_the_node_take_weights_that_come_late(tmp_path):
    small = check.pruned(ecodiff.load("emoji-flux"), 0.4)
    tensors, _, header = read(ours.save_gguf(small, tmp_path / "flux.gguf"))
    tensors |= {name: torch.zeros(shape) for name, shape in header["empty"].items()}
    operations = layers.shaped(Operations, header.get("norm_groups", 32))
    model = original_layout.Flux(header["config"], operations)
    rank, features = tensors[f"{layers.BASIS}.weight"].shape
    layers.project(model, operations, features, rank, torch.float32, "cpu")
    model.load_state_dict(tensors, strict=False)
    layers.fit(model, header["heads"])
    rows = prompt_rows(
        ["red apple", "cat face"], range(2), 0, {"num_inference_steps": 2, "height": 64, "width": 64}
    )
    _, kwargs = denoiser_calls(small, rows, limit=1)[0]
    names = ("hidden_states", "img_ids", "encoder_hidden_states", "txt_ids", "timestep")
    drawn = model.eval()(*(kwargs[name] for name in (*names, "pooled_projections", "guidance")))
    theirs = small.transformer(**kwargs | {"return_dict": False})[0]
    assert 0 < (drawn - theirs).square().mean() / theirs.var() < 1e-3

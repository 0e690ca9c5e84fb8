"""A device that this machine has not: tensors on it are real, and cannot be mixed with those of the CPU.

A stand-in for a GPU, as strict as CUDA about what may meet in one operation. It computes on the CPU, so
results are those of the CPU, bit for bit. `python -m tests.elsewhere` does the whole job there with every
tiny pipeline and every architecture, and prints {name: what went wrong, or ""} as JSON; it is a process
of its own, because a device that is registered stays.
"""

import json
import sys
import traceback
from contextlib import contextmanager, nullcontext
from functools import partial

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import ecodiff
from ecodiff.checkpoints import loading
from ecodiff.config import CompensateConfig, HealConfig, Sampling
from ecodiff.learning import streaming
from ecodiff.learning.heal import heal
from ecodiff.learning.learn import learn
from ecodiff.learning.surgeon import surgeon
from ecodiff.learning.text_encoders import rank_text_encoders
from ecodiff.metrics import cost
from ecodiff.metrics.fidelity import Sample, compare, generate
from ecodiff.pipelines import call_options, denoiser_of, prompt_rows
from ecodiff.pruning.scores import Scores
from ecodiff.units import ALL_KINDS
from tests.architectures.test_conformance import _cast, kept, run
from tests.conftest import PIPELINES, SHORT, randomise
from tests.denoisers import ROWS
from tests.pipelines import BUILDERS

NAME = "elsewhere"
STREAMED = ("sdxl", "sd3.5", "Sana")  # pipelines that are tried larger than the device
ALIKE = ("sd-2", "flux-schnell", "Wan 2.2 5B", "Sana Sprint")  # others of the same classes are tried
SURGEON = ("sdxl", "flux-dev")  # that are ranked by what the default ranks by
MOVES = {"aten::_to_copy", "aten::copy_"}  # from one device to another
CPU_INDEX = {"aten::index", "aten::index_put_", "aten::index_put"}  # CUDA takes indices from the CPU too


class Module:
    """What torch asks of a device's module."""

    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 2)
    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = set_rng_state = synchronize = staticmethod(lambda *args: None)
    get_rng_state = staticmethod(lambda *args: torch.zeros(1, dtype=torch.uint8))
    device = staticmethod(lambda index: nullcontext())
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class There(torch.Tensor):
    """A tensor on the device: `here` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: torch.Tensor, index: int):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, here.size(), device=f"{NAME}:{index}", **layout)
        tensor.here, tensor.index = here, index
        return tensor

    def __repr__(self) -> str:
        return f"There({self.here})"

    @property
    def data(self) -> torch.Tensor:
        return super().data

    @data.setter
    def data(self, value: "There") -> None:
        torch.Tensor.data.__set__(self, value)
        self.here = value.here

    def tolist(self) -> list:
        return self.here.tolist()

    def __getitem__(self, index) -> torch.Tensor:
        return super().__getitem__(_with_tensors(index))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While this is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs or {})


def _dispatch(function, args, kwargs):
    if function._can_decompose():  # under inference mode, operations come whole
        with Elsewhere():
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    with torch.inference_mode(False), torch._C._AutoDispatchBelowAutograd():
        return _computed(function, args, kwargs)


def _computed(function, args, kwargs):
    name = function._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, There)}
    if there and name not in MOVES | CPU_INDEX:
        strangers = [tuple(t.shape) for t in tensors if not isinstance(t, There) and t.ndim]
        if strangers:
            raise RuntimeError(f"{name} of tensors on two devices; on the CPU: {strangers}")
    indices = {tensor.index for tensor in there.values()}
    if len(indices) > 1 and name not in MOVES:
        raise RuntimeError(f"{name} of tensors on two devices: {sorted(indices)}")
    if name == "aten::copy_":
        _here(args[0]).copy_(_here(args[1]))
        return args[0]
    place = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    wanted = place.type if place else None
    index = (place.index or 0) if place and place.type == NAME else min(indices, default=0)
    if wanted == NAME:
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = tree_map(_here, (args, kwargs))
    result = function(*args, **kwargs)
    if not (wanted == NAME if wanted else there):
        return result

    def back(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return there[id(leaf)] if id(leaf) in there else There(leaf, index)

    return tree_map(back, result)


def _made(function, *args, device=None, **kwargs):
    made = function(*map(_here, args), **kwargs)
    return made if device is None else made.to(device)


def _with_tensors(index):
    """An index with its lists as tensors."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_with_tensors, index)) if isinstance(index, tuple) else index


def _here(leaf):
    return leaf.here if isinstance(leaf, There) else leaf


@contextmanager
def elsewhere():
    """Register the device, once, and let tensors be made on it."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, Module)
        for name in ("tensor", "as_tensor"):  # they would be made in C++, before anything is dispatched
            setattr(torch, name, partial(_made, getattr(torch, name)))
        torch.accelerator.synchronize = lambda device=None: None
        plain = torch.autocast
        torch.autocast = lambda device_type, *args, **kw: (
            nullcontext() if device_type == NAME else plain(device_type, *args, **kw)
        )
    # Engine threads of such a device do not know the mode.
    with Elsewhere(), torch.autograd.set_multithreading_enabled(False):
        yield


def whole_job(pipe, size, extra: dict) -> None:
    """Learn, cut, compensate, heal, draw, measure, text encoders too: all on the device, in bfloat16."""
    pipe = pipe.to(torch.bfloat16).to(f"{NAME}:0")
    pipe.set_progress_bar_config(disable=True)
    assert denoiser_of(pipe).device.type == NAME
    prompts, extra = ["red apple", "blue whale"], extra | SHORT.get(type(pipe), {})
    short = {"inference_steps": 2, "size": size, "extra": extra}
    ratio = Scores.unranked(denoiser_of(pipe)).ceiling / 2
    config = ecodiff.LearnConfig(ratio=ratio, warm_steps=1, steps=1, batch=2, trajectories=4, **short)
    scores = [scores for _, scores in learn(pipe, prompts, config)][-1]
    encoders = rank_text_encoders(pipe, prompts, Sampling(**short))
    assert all(value.isfinite().all() for value in encoders.values.values())
    parts = {**scores.plan(ratio=ratio), **encoders.plan(ratio=encoders.ceiling / 2)}
    small = ecodiff.variant(pipe, ecodiff.PrunePlan(parts))
    few = CompensateConfig(trajectories=4, heldout=2, batch=2, **short)
    assert any("text_encoder" in layer for layer in ecodiff.compensate_(small, pipe, prompts, few))
    list(heal(small, pipe, prompts, HealConfig(repair=4, steps=1, batch=2, trajectories=2, rank=2, **short)))
    found = compare(pipe, small, prompts[:1], steps=2, size=size, extra=extra)
    assert found["mean"]["latent_error"] < 10
    call = prompt_rows(prompts, range(2), 0, call_options(pipe, 2, None, size, extra))
    cost.unit_milliseconds(pipe, call, repeats=1)


def row_job(row) -> None:
    """One architecture: masked, differentiated and cut on the device, as on the CPU."""
    denoiser = randomise(getattr(diffusers, row.cls)(**row.config)).to(row.dtype)
    given = tree_map(lambda leaf: _cast(leaf, row.dtype), row.given())
    generator = torch.Generator().manual_seed(0)
    groups = ecodiff.find_groups(denoiser, ALL_KINDS)
    plan = ecodiff.PrunePlan({group.name: kept("partial", group, generator) for group in groups})
    with torch.no_grad(), ecodiff.masked(denoiser, plan):
        expected = run(denoiser, given)
    scale = float(expected.abs().max())

    def check(result: torch.Tensor) -> None:
        torch.testing.assert_close(result.cpu() / scale, expected / scale, rtol=0, atol=row.digits[0])

    denoiser = denoiser.to(f"{NAME}:0")
    given = tree_map(lambda leaf: leaf.to(f"{NAME}:0") if isinstance(leaf, torch.Tensor) else leaf, given)
    gates = {name: keep.to(row.dtype).requires_grad_() for name, keep in plan.items()}
    with ecodiff.masked(denoiser, gates):
        masked = run(denoiser, given)
        torch.autograd.grad(masked.abs().sum(), list(gates.values()), allow_unused=True)
    check(masked.detach())
    ecodiff.slice_(denoiser, plan)
    with torch.no_grad():
        check(run(denoiser, given))


def offloaded(pipe, expected: Sample) -> None:
    """A model that does not fit: its parts are there only while they work, and it draws the same."""
    unet = sum(p.nbytes for p in pipe.unet.parameters())
    loading.free_bytes = lambda device: unet
    pipe = loading._ready(pipe, f"{NAME}:0", offload=True, rounded=False)
    assert pipe.unet.device.type == "cpu"
    seen = []
    pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output.device.type))
    found = generate(pipe, "red apple", 0, steps=2, size=64)
    assert set(seen) == {NAME} and pipe.unet.device.type == pipe.text_encoder.device.type == "cpu"
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-4, atol=1e-4)


def surgeon_job(build, size, extra: dict) -> None:
    """The order that counts the repair, made on the device, is that of the CPU but for rounding."""
    pipe, found, prompts = _quiet(build()), [], ["red apple", "blue whale"]
    options = call_options(pipe, 2, None, size, extra | SHORT.get(type(pipe), {}))
    for where in ("cpu", f"{NAME}:0"):
        calls = [prompt_rows(prompts, range(seed, seed + 2), 0, options) for seed in (0, 2)]
        found.append(surgeon(pipe.to(where), calls, prompts=prompts))
    for name, values in found[0].items():
        same = torch.stack([v.argsort().argsort().float().cpu() for v in (values, found[1][name])])
        assert len(values) < 4 or float(torch.corrcoef(same)[0, 1]) > 0.9, name


def streamed_job(build, size, extra: dict, lent: bool = False) -> None:
    """A model that does not fit at all: the same scores, weights and images, bit for bit; little is there.

    `lent`: of its weights some wait on a second device, whose memory is half of what they need.
    """
    small = {"inference_steps": 2, "size": size, "extra": extra | SHORT.get(type(build()), {})}
    prompts, kinds = ["red apple", "blue whale"], ("heads", "ffn", "resnet")

    def job(pipe) -> tuple:
        found = {}
        ratio = Scores.unranked(denoiser_of(pipe), kinds).ceiling / 2
        for name in ("gauss-newton", "fast"):
            few = {"warm_steps": 1, "steps": int(name == "fast"), "batch": 2, "trajectories": 4, **small}
            config = ecodiff.LearnConfig.preset(name, ratio=ratio, kinds=kinds, **few)
            found[name] = [scores for _, scores in learn(pipe, prompts, config)][-1]
        pruned = ecodiff.variant(pipe, found["fast"].plan(ratio=ratio))
        few = CompensateConfig(trajectories=4, heldout=2, batch=2, **small)
        ecodiff.compensate_(pruned, pipe, prompts, few)
        drawn = [
            generate(p, "red apple", 0, steps=2, size=size, extra=extra).latents.cpu() for p in (pipe, pruned)
        ]
        return {name: scores.values for name, scores in found.items()}, drawn

    expected = job(_quiet(build()).to(f"{NAME}:0"))
    pipe = _quiet(build())
    denoiser, first = denoiser_of(pipe), torch.device(NAME, 0)
    weights = sum(p.nbytes for p in denoiser.parameters())
    streaming.free_bytes = lambda device: weights // 2
    streaming.stream_(pipe, first, large=64, lenders=[torch.device(NAME, 1)] if lent else [])
    there = lambda: sum(p.nbytes for p in denoiser.parameters() if p.device == first)  # noqa: E731
    assert denoiser.device == first and there() < 0.2 * weights
    if lent:
        places = {p.device for p in denoiser.parameters()}
        assert places == {first, torch.device(NAME, 1), torch.device("cpu")}, places
    _equal(job(pipe), expected)
    assert there() < 0.2 * weights, "weights were left on the device"


def rounded_job(build, size, extra: dict) -> None:
    """Large matrices in float8, on the device as long as it lends: the scores of the CPU but for rounding."""
    small = {"inference_steps": 2, "size": size, "extra": extra | SHORT.get(type(build()), {})}
    found = []
    for where in ("cpu", f"{NAME}:0"):
        pipe = _quiet(build())
        weights = sum(p.nbytes for p in denoiser_of(pipe).parameters())
        streaming.free_bytes = lambda device: weights // 4  # noqa: B023 - used at once
        streaming.stream_(pipe, where, large=64, rounded=True)
        config = ecodiff.LearnConfig.preset("gauss-newton", ratio=0.2, warm_steps=1, batch=2, **small)
        found.append([scores for _, scores in learn(pipe, ["red apple"], config)][-1].values)
    eights = {p.device.type for p in denoiser_of(pipe).parameters() if p.dtype == streaming.ROUNDED}
    assert eights == {NAME, "cpu"}, "some wait there, others in main memory"
    for name, values in found[0].items():
        torch.testing.assert_close(found[1][name].cpu(), values, rtol=1e-3, atol=1e-6)


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _equal(found, expected) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


def main() -> None:
    builders = pipelines()
    jobs = {f"{name} pipeline": partial(_built, *built) for name, built in builders.items()}
    pipe = ecodiff.load("emoji-turbo", device="cpu")
    jobs["offloaded"] = partial(offloaded, pipe, generate(pipe, "red apple", 0, steps=2, size=64))
    jobs |= {f"{name} streamed": partial(streamed_job, *builders[name]) for name in STREAMED}
    jobs["sdxl rounded"] = partial(rounded_job, *builders["sdxl"])
    jobs["sdxl lent"] = partial(streamed_job, *builders["sdxl"], lent=True)
    jobs |= {f"{name} surgeon": partial(surgeon_job, *builders[name]) for name in SURGEON}
    jobs |= {name: partial(row_job, row) for name, row in ROWS.items()}
    wanted, results = sys.argv[1:] or list(jobs), {}
    with elsewhere():
        for name in wanted:
            try:
                jobs[name]()
                results[name] = ""
            except Exception as error:  # the test reads it
                frames = [f for f in traceback.format_tb(error.__traceback__) if "/torch/" not in f]
                results[name] = f"{type(error).__name__}: {error}\n{''.join(frames[-8:])}"
    print(json.dumps(results))


def pipelines() -> dict:
    """Tiny whole pipelines, one of each kind: (function that builds it, size, arguments of a short run)."""
    built = {name: (build, None, {}) for name, build in PIPELINES.items()} | BUILDERS
    return {name: how for name, how in built.items() if name not in ALIKE}


def _built(build, size, extra) -> None:
    whole_job(build(), size, extra)


if __name__ == "__main__":
    main()

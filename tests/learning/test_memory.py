"""The planner: what it keeps fits; running out of memory costs time and nothing else."""

from dataclasses import asdict, replace

import pytest
import torch

import ecodiff
from ecodiff import catalog, machine
from ecodiff.architectures.inputs import meta_call
from ecodiff.checkpoints import loading
from ecodiff.learning import gauss_newton, memory
from ecodiff.learning.checkpointing import Keep
from ecodiff.learning.encodings import Encodings
from ecodiff.learning.footprint import fits, footprint
from ecodiff.learning.learn import learn
from ecodiff.learning.memory import MemoryPlan
from ecodiff.learning.trajectory import trajectory
from ecodiff.pipelines import call_options, denoiser_of, prompt_rows
from tests.conftest import PIPELINES, PROMPT, short
from tests.learning.test_trajectory import gate_gradients, kept_bytes, random_gates
from tests.pipelines import BUILDERS

CONFIG = ecodiff.LearnConfig(warm_steps=2, steps=2, batch=2, trajectories=4, inference_steps=3, size=16)


@pytest.mark.parametrize("keep", [Keep(7), Keep(3), Keep(0), Keep(100), Keep(blocks=True)])
def test_gradients_do_not_depend_on_what_is_kept(pipe, keep):
    pipe.to(torch.float64)
    masks = random_gates(gates_of(pipe))
    _, expected = gate_gradients(pipe, masks, checkpoint=True)
    _, found = gate_gradients(pipe, masks, checkpoint=keep)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.abs().max()))
    assert not gates_of(pipe).is_gradient_checkpointing


def gates_of(pipe):
    return denoiser_of(pipe)


def test_activations_are_what_autograd_keeps(tiny_sdxl):
    call = prompt_rows([PROMPT], range(1), 0, call_options(tiny_sdxl, 2, 5.0, None))
    found = memory.plan(tiny_sdxl, call, ecodiff.find_groups(tiny_sdxl.unet)).activations
    ten, twenty = (kept_bytes(tiny_sdxl, steps, checkpoint=False) for steps in (10, 20))
    print("planned, measured:", found, (twenty - ten) / 10)
    assert found == pytest.approx((twenty - ten) / 10, rel=0.05)


@pytest.mark.parametrize(
    ("free", "kept"), [(10_000, 12), (1_200, 12), (1_199, 11), (199, 1), (100, 1), (99, None)]
)
def test_as_much_is_kept_as_fits(free, kept):
    found = memory.fitted(MemoryPlan(calls=12, activations=100, by_block=30, free=free))
    assert found.keep == (Keep(12 - kept) if kept else Keep(blocks=True))
    assert found.needed <= free and "GB" in found.words()


def test_plans_shrink_until_there_is_none():
    found, kept = MemoryPlan(12, 100, 30, 10_000, Keep(0)), []
    while found is not None:
        kept.append(found.keep)
        found = found.smaller()
    assert kept == [Keep(0), Keep(6), Keep(9), Keep(11), Keep(blocks=True)]
    unknown = MemoryPlan(0, 100, 30, 10_000)
    assert unknown.keep == memory.fitted(unknown).keep == Keep() and unknown.needed == 100
    assert unknown.smaller().keep == Keep(blocks=True)


def test_text_encoders_go_before_blocks_are_computed_twice():
    found, kept = MemoryPlan(12, 100, 30, 100, Keep(10), encoders=50), []
    while found is not None:
        kept.append(found.keep)
        found = found.smaller()
    assert kept == [Keep(10), Keep(11), Keep(11, alone=True), Keep(blocks=True, alone=True)]
    small = MemoryPlan(12, 100, 30, 60, encoders=50)
    assert memory.fitted(small).keep == Keep(11, alone=True)
    assert "text encoders away" in memory.fitted(small).words()
    assert memory.fitted(replace(small, encoders=10)).keep == Keep(blocks=True, alone=True)


def test_the_last_calls_are_kept(tiny_sdxl):
    """They are used up before the others are made again, each once."""
    masks = random_gates(tiny_sdxl.unet, torch.float32)
    for keep, made in ((Keep(), 16), (Keep(7), 15), (Keep(3), 11), (Keep(0), 8)):
        times: list[float] = []
        hook = tiny_sdxl.unet.time_proj.register_forward_pre_hook(
            lambda module, args, times=times: times.append(float(args[0][0]))
        )
        with ecodiff.masked(tiny_sdxl.unet, masks), trajectory(tiny_sdxl, keep) as run:
            z0 = run(PROMPT, num_inference_steps=8, generator=torch.Generator().manual_seed(0))
            torch.autograd.grad(z0.square().mean(), list(masks.values()))
        hook.remove()
        assert times[8:] == times[: made - 8][::-1]


@pytest.mark.parametrize("name", [*PIPELINES, *BUILDERS])
def test_prompts_are_encoded_once_and_text_encoders_can_be_away(name):
    """What is drawn from encodings is what the pipeline draws, whether its text encoders are there or not."""
    build, size, extra = BUILDERS.get(name) or (PIPELINES[name], None, {})
    pipe = build()
    encodings, encoded = Encodings(pipe), []
    assert encodings.encoders and encodings.bytes > 0
    first = next(iter(encodings.encoders.values()))
    first.register_forward_pre_hook(lambda *_: encoded.append(1))
    config = dict(pipe.config)

    def draw():
        options = call_options(pipe, 2, None, size, extra or short(pipe))
        with trajectory(pipe, checkpoint=False) as run, torch.no_grad():
            return run(**prompt_rows([PROMPT], range(1), 0, options))

    reference, before = draw(), len(encoded)
    with encodings.used():
        drawn = draw()
    assert len(encoded) == 2 * before and torch.equal(drawn, reference)
    with encodings.used(alone=True):
        assert all(getattr(pipe, name) is None for name in encodings.encoders)
        assert torch.equal(draw(), reference)
    assert len(encoded) == 2 * before
    other = Encodings(pipe)
    with other.used(alone=True):
        assert torch.equal(draw(), reference)
    assert len(encoded) == 3 * before and dict(pipe.config) == config
    assert all(getattr(pipe, name) is encoder for name, encoder in encodings.encoders.items())


def test_running_out_of_memory_changes_the_plan_and_not_the_scores(tiny_sdxl, monkeypatch):
    prompts, plans, failed = ["red apple", "cat"], [], []
    reference = ecodiff.learn_masks(tiny_sdxl, prompts, replace(CONFIG, checkpoint=True))
    real = gauss_newton.gauss_newton_sample

    def tight(*args, checkpoint, **kwargs):
        """A machine that holds the activations of one call."""
        if checkpoint.recomputed < 2:
            failed.append(checkpoint)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args, checkpoint=checkpoint, **kwargs)

    monkeypatch.setattr("ecodiff.learning.learn.gauss_newton_sample", tight)
    for _, scores in learn(tiny_sdxl, prompts, CONFIG, on_plan=plans.append):  # noqa: B007
        pass
    assert failed == [Keep(0)] and plans[0].startswith("every time step") and "1 of 3" in plans[-1]
    assert all(torch.equal(values, scores.values[name]) for name, values in reference.values.items())


def test_a_run_that_goes_on_keeps_as_much(tiny_sdxl):
    """Whether it was cut in the warm start or later: from its second step on, what fits is kept."""
    prompts, state = ["red apple", "cat"], None
    for _ in range(CONFIG.total_steps - 1):
        plans: list[str] = []
        learning = learn(tiny_sdxl, prompts, CONFIG, state, on_plan=plans.append)
        state, _ = next(learning)
        assert plans[0].startswith("every time step") and plans[-1].startswith("activations of 3 of 3")
        learning.close()


def test_a_container_has_what_it_may_use(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    alone = machine.capacity(cpu)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CONTAINER", limit)
    limit.write_text("max\n")
    assert machine.capacity(cpu) == alone and 0 < machine.free_bytes(cpu) < alone
    limit.write_text(f"{1 << 30}\n")
    assert machine.capacity(cpu) == 1 << 30 and machine.free_bytes(cpu) < 1 << 29
    limit.write_text("1\n")
    assert machine.free_bytes(cpu) == 0
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert machine.capacity(torch.device("cuda")) == 48e9


def test_an_estimate_follows_the_dtype():
    denoiser, known = loading.empty_denoiser("sdxl"), catalog.find("sdxl")
    halves, floats = (footprint(denoiser, **known.footprint(itemsize)) for itemsize in (None, 4))
    for name, value in asdict(halves).items():
        if name == "there":  # a tensor is large by its bytes
            continue
        assert getattr(floats, name) == pytest.approx(2 * value, abs=2)


def test_what_fits_a_gpu():
    """SDXL in float16 draws whole on 12 GB and component by component on 8 GB, as people find."""
    known = catalog.find("sdxl")
    need = footprint(loading.empty_denoiser("sdxl"), **known.footprint())
    found = {room: fits(need, 0.2, 0.97, room * 1e9) for room in (4, 8, 12, 24)}
    assert [found[room]["dense"] for room in (4, 8, 12, 24)] == ["groups", "offloaded", "whole", "whole"]
    assert need.draw - need.pruned(0.2).draw == pytest.approx(1.05 * 0.2 * need.denoiser)
    cut = found[8]["cut"]
    assert 0.2 < cut < 0.97 and fits(need, cut + 0.01, 0.97, 8e9)["draw"] == "whole"
    assert fits(need, 0.2, cut - 0.01, 8e9)["cut"] is None, "that much cannot be removed"
    assert [found[room]["learn"] for room in (4, 8, 12, 24)] == ["no", "streamed", "whole", "whole"]


@pytest.mark.parametrize(("name", "room"), [("sdxl", 8), ("flux-dev", 16), ("sd-3.5-medium", 8)])
def test_what_is_streamed_learns_on_a_small_gpu(name, room):
    need = footprint(loading.empty_denoiser(name), **catalog.find(name).footprint())
    assert fits(need, 0.2, 0.9, room * 1e9)["learn"] == "streamed"
    assert fits(need, 0.2, 0.9, room * 1e9, streams=False)["learn"] == "no"
    print(f"{name}: {need.learn / 1e9:.1f} GB, streamed {need.learn_streamed / 1e9:.1f} GB")


@pytest.mark.parametrize("name", [model.name for model in catalog.MODELS.values()])
def test_every_model_of_the_catalogue_can_be_called_without_weights(name):
    denoiser = loading.empty_denoiser(name)
    assert meta_call(denoiser, catalog.find(name).size, 1) is not None


def on_meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="meta", dtype=dtype)


def sdxl_call(rows):
    added = {"text_embeds": on_meta(rows, 1280), "time_ids": on_meta(rows, 6)}
    return (on_meta(rows, 4, 128, 128), on_meta(1)[0], on_meta(rows, 77, 2048)), {"added_cond_kwargs": added}


def flux_call(rows):
    given = {"hidden_states": on_meta(rows, 4096, 64), "encoder_hidden_states": on_meta(rows, 512, 4096)}
    given |= {"pooled_projections": on_meta(rows, 768), "timestep": on_meta(rows), "guidance": on_meta(rows)}
    return (), given | {"img_ids": on_meta(4096, 3), "txt_ids": on_meta(512, 3)}


@pytest.mark.parametrize(
    ("name", "call", "rows", "gpu"), [("sdxl", sdxl_call, 8, 24e9), ("flux-dev", flux_call, 4, 48e9)]
)
def test_large_models_learn_on_the_gpus_that_they_should(name, call, rows, gpu):
    """By arithmetic: all weights in bfloat16, and a batch of four at 1024 x 1024."""
    denoiser = loading.empty_denoiser(name).to(torch.bfloat16)
    weights = 2 * denoiser.num_parameters() + catalog.MODELS[name].others_gb * 1e9
    groups = ecodiff.find_groups(denoiser, ecodiff.LearnConfig().kinds)
    activations = memory.activation_bytes(denoiser, *call(rows), groups)
    whole, by_block = activations.all, activations.by_block
    found = memory.fitted(MemoryPlan(0, whole, by_block, int(machine.USABLE * (gpu - weights))))
    sizes = {"weights": weights, "a call": whole, "by block": by_block}
    print(f"\n{name}, GB:", {what: round(size / 1e9, 1) for what, size in sizes.items()})
    assert found.needed <= found.free, found.words()
    assert found.keep.blocks, "all of a call fits as well: say so in the README"

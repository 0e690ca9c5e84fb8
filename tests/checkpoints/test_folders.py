import json
import resource
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ecodiff
from ecodiff import catalog, cli
from ecodiff.checkpoints.loading import disk_dtype
from ecodiff.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning.plan import PLAN_FILE
from ecodiff.pruning.slicing import plan_of
from ecodiff.units import ALL_KINDS
from tests.conftest import PIPELINES, PROMPT, latents, short

PLAIN = """
import sys
sys.modules["ecodiff"] = None  # as if it were not installed
import torch
torch.set_num_threads({threads})
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

def draw(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.{dtype}, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    options = dict(num_inference_steps=3, generator=generator, output_type="latent", **{short})
    return pipe, pipe("{prompt}", **options).images

pipe, latents = draw("{folder}")
pipe.save_pretrained("{folder}-again")
_, again = draw("{folder}-again")
save_file({{"latents": latents.contiguous(), "again": again.contiguous()}}, "{folder}.latents")
"""

SPAWNED = """
import sys
sys.modules["ecodiff"] = None
import torch
from diffusers import DiffusionPipeline
from torch import nn

for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    mine = getattr(pipe, name)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs = pool.apply(nn.Module.eval, (mine,))
    assert type(theirs) is type(mine), type(theirs)
    assert [type(part) for part in theirs.modules()] == [type(part) for part in mine.modules()]
    weights = theirs.state_dict()
    assert all(torch.equal(weight, weights[key]) for key, weight in mine.state_dict().items())
    theirs.save_pretrained(folder + "-spawned")
"""


def drawn_by_diffusers_alone(folder, pipe, dtype="float32") -> dict[str, torch.Tensor]:
    """Latents of PROMPT by a process without ecodiff: {"latents", "again": saved by it and reloaded}."""
    given = {"short": short(pipe), "threads": torch.get_num_threads(), "dtype": dtype}
    script = PLAIN.format(folder=folder, prompt=PROMPT, **given)
    done = subprocess.run([sys.executable, "-c", script], cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(f"{folder}.latents")


def some_plan(pipe, seed=0, empty=True):
    generator = torch.Generator().manual_seed(seed)
    groups = ecodiff.find_groups(denoiser_of(pipe), ALL_KINDS)
    keep = {g.name: torch.rand(g.size, generator=generator) > 0.3 for g in groups}
    for group in groups:
        keep[group.name][: group.floor] = True
    for group in [group for group in groups if not group.floor][:2] if empty else []:
        keep[group.name][:] = False
    bases = {}
    for group in (group for group in groups if group.activations or group.inside):
        width = group.width if group.inside else group.size
        z = torch.linalg.qr(torch.randn(group.size // width, width, width, generator=generator))[0]
        z = z.flatten(0, 1)[keep[group.name]]
        bases[group.name] = (z, z.T.contiguous())
    return ecodiff.PrunePlan(keep, {"basis": "of a test"} if bases else {}, bases)


def test_reloads_bit_exactly_both_ways_and_again(pipe, tmp_path):
    # From files, as every real pipeline: a text encoder that was built in memory rounds otherwise
    # than the same one read from a file, where its weights are aligned in another way.
    pipe.save_pretrained(tmp_path / "dense")
    pipe = ecodiff.load(tmp_path / "dense")
    small = ecodiff.variant(pipe, some_plan(pipe))
    folder = ecodiff.save(small, tmp_path / "small")
    loaded = ecodiff.load(folder)
    weights = denoiser_of(small).state_dict()
    assert all(torch.equal(weights[name], p) for name, p in denoiser_of(loaded).state_dict().items())
    # Equal weights at other addresses may be summed in another order: the last bit of a matrix product.
    expected = latents(loaded)
    torch.testing.assert_close(expected, latents(small), rtol=1e-5, atol=1e-5)
    assert plan_of(denoiser_of(loaded)).digest == plan_of(denoiser_of(small)).digest
    assert ecodiff.PrunePlan.load(folder / PLAN_FILE).digest == plan_of(denoiser_of(small)).digest

    for name, found in drawn_by_diffusers_alone(folder, pipe).items():
        assert torch.equal(found, expected), name
    suffixes = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".py", ".md", ".txt"}, "no pickles"


def test_models_opened_by_remote_code_can_be_sent_to_a_process_that_is_spawned(tmp_path):
    for name, build in PIPELINES.items():
        pipe = build()
        ecodiff.save(ecodiff.variant(pipe, some_plan(pipe)), tmp_path / name)
    script = [sys.executable, "-c", SPAWNED, *(tmp_path / name for name in PIPELINES)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in PIPELINES:
        assert (tmp_path / f"{name}-spawned" / "ecodiff_sliced_v1.py").is_file()


@pytest.mark.parametrize("model", ["emoji-sdxl", "emoji-flux"])
def test_what_ships_in_half_precision_opens_without_a_word_of_it(model, tmp_path):
    dense = ecodiff.load(model)
    small = ecodiff.variant(dense, some_plan(dense, empty=False))
    folder = ecodiff.save(small, tmp_path / "small", dtype=disk_dtype(model))
    expected = latents(ecodiff.load(folder))
    found = drawn_by_diffusers_alone(folder, dense)["latents"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_pipeline_sliced_in_place_opens_too(pipe, tmp_path):
    ecodiff.slice_(denoiser_of(pipe), some_plan(pipe))
    loaded = ecodiff.load(ecodiff.save(pipe, tmp_path / "small"))
    torch.testing.assert_close(latents(loaded), latents(pipe), rtol=1e-4, atol=5e-4)


def test_half_precision_files_hold_the_half_precision_model(tiny_sdxl, tmp_path):
    small = ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl))
    folder = ecodiff.save(small, tmp_path / "small", dtype=torch.float16)
    assert small.unet.dtype == torch.float32, "saving changed the pipeline"
    for name, parameter in ecodiff.load(folder).unet.named_parameters():
        assert torch.equal(parameter, small.unet.get_parameter(name).half().float())


def test_a_dense_pipeline_is_not_saved_as_a_pruned_one(tiny_sdxl, tmp_path):
    with pytest.raises(UnsupportedModelError, match="has not been pruned"):
        ecodiff.save(tiny_sdxl, tmp_path / "out")


def test_a_folder_with_something_else_is_left_alone(tiny_sdxl, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    small = ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl))
    with pytest.raises(CheckpointError, match="something else"):
        ecodiff.save(small, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_leaves_the_old_folder(tiny_sdxl, tmp_path):
    out = ecodiff.save(ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl)), tmp_path / "out")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file may pass 10 kB
    try:
        with pytest.raises(CheckpointError, match="Is the disk full"):
            ecodiff.save(ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl, seed=1)), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def saved(tiny_sdxl, tmp_path):
    return ecodiff.save(ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl)), tmp_path / "small")


def test_a_truncated_checkpoint(saved):
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="could not be opened"):
        ecodiff.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=99),
        lambda d: next(iter(d["shapes"].values())).update(weight=[10**9, 10**9]),
        lambda d: next(iter(d["shapes"].values())).update(weight=[-1, 4]),
        lambda d: d["shapes"].update({"no.such.module": {"weight": [1, 1]}}),
        lambda d: next(iter(d["attributes"].values())).update(heads="many"),
        lambda d: next(iter(d["attributes"].values())).update(forward=3),
        lambda d: d.pop("shapes"),
    ],
)
def test_a_hostile_description(saved, change):
    config = saved / "unet" / "config.json"
    content = json.loads(config.read_text())
    change(content["ecodiff"])
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        ecodiff.load(saved)


def test_pickled_weights_are_not_read(tiny_sdxl, tmp_path):
    tiny_sdxl.save_pretrained(tmp_path / "dense")
    unet = tmp_path / "dense" / "unet"
    torch.save(tiny_sdxl.unet.state_dict(), unet / "diffusion_pytorch_model.bin")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        ecodiff.load(tmp_path / "dense")


def test_foreign_and_missing_models(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        ecodiff.load(tmp_path / "empty")
    with pytest.raises(ModelNotFoundError, match="emoji-sdxl"):
        ecodiff.load("no-such-model")
    with pytest.raises(ModelNotFoundError, match="no network"):
        ecodiff.load("somebody/something")  # tests run offline


@pytest.mark.parametrize("name", ["emoji-turbo", "emoji-flux"])
def test_what_the_card_says_to_run_runs(name, tmp_path):
    """In a process without ecodiff, with the model's own steps, guidance and size."""
    pipe = ecodiff.load(name)
    folder = ecodiff.save(ecodiff.variant(pipe, some_plan(pipe)), tmp_path / "small")
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0].replace("THIS FOLDER", str(folder))
    assert f"# {name}, pruned" in card and 'license: "mit"' in card
    known = catalog.find(name)
    assert f"num_inference_steps={known.steps}, guidance_scale={known.guidance_scale}" in code
    blocked = "import sys\nsys.modules['ecodiff'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, cwd=tmp_path, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)


def test_weights_that_are_missing_are_named(tiny_sdxl, tmp_path):
    tiny_sdxl.save_pretrained(tmp_path / "dense")
    ecodiff.save(ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl)), tmp_path / "pruned")
    for folder in ("dense", "pruned"):
        file = tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors.pop("mid_block.resnets.0.conv1.weight")
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"mid_block\.resnets\.0\.conv1\.weight"):
            ecodiff.load(tmp_path / folder)


def test_a_folder_that_is_stored_quantised(tiny_sdxl, tmp_path, capsys):
    tiny_sdxl.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "unet" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="bitsandbytes"):
        ecodiff.load(tmp_path / "dense")
    assert cli.main(["info", str(tmp_path / "dense")]) == 1
    assert "full-precision" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["models/sdxl.safetensors", "style.gguf", "a/b.ckpt", "./nothing", "~/nothing"]
)
def test_a_local_file_that_is_missing_is_not_asked_for_on_the_hub(name):
    with pytest.raises(ModelNotFoundError, match="There is no model"):
        ecodiff.load(name)


def test_out_may_be_a_link(tiny_sdxl, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    small = ecodiff.variant(tiny_sdxl, some_plan(tiny_sdxl))
    ecodiff.save(small, tmp_path / "link")
    assert (tmp_path / "real" / "model_index.json").is_file() and (tmp_path / "link").is_symlink()

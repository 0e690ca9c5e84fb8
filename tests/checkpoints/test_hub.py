"""The Hub, over HTTP: a stand-in of its API, the command line, and the page."""

import json
import os
import subprocess
import sys

import pytest
import torch

import ecodiff
from benchmarks.server import ROOT
from ecodiff import catalog
from ecodiff.checkpoints.loading import empty_denoiser
from ecodiff.pruning.plan import PLAN_FILE
from tests import hub
from tests.checkpoints.test_folders import some_plan
from tests.hub import LICENCES


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    pipe = ecodiff.load("emoji-turbo")
    plan = ecodiff.PrunePlan(some_plan(pipe), {"model": "emoji-turbo"})
    return ecodiff.save(ecodiff.variant(pipe, plan), tmp_path_factory.mktemp("hub") / "small")


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """The stand-in, and the command line with it for the Hub."""
    home = tmp_path_factory.mktemp("home")
    with hub.running() as served:
        settings = hub.settings(served.address, home)
        asked = [sys.executable, "-m", "tests.commands"]
        options = {"env": os.environ | settings, "text": True, "cwd": ROOT}
        with (home / "log").open("w") as log:
            opened = subprocess.Popen(
                asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, **options
            )
            yield served, opened
            opened.stdin.close()
            opened.wait()


@pytest.fixture
def stand_in(process):
    process[0].reset()
    return process[0]


@pytest.fixture
def command(process):
    def run(*arguments, token="hf_ann") -> tuple[int, str]:
        print(json.dumps([token, *map(str, arguments)]), file=process[1].stdin, flush=True)
        return tuple(json.loads(process[1].stdout.readline()))

    return run


def test_a_folder_goes_there_and_its_plan_comes_back(command, stand_in, small, tmp_path):
    code, said = command("push", small, "little", "--json")
    assert code == 0, said
    assert json.loads(said.splitlines()[-1])["url"] == f"{stand_in.address}/ann/little"
    files = stand_in.repos["ann/little"]
    there = {str(p.relative_to(small)) for p in small.rglob("*") if p.is_file()}
    assert set(files) == there | {".gitattributes"}
    for path in there - {"README.md"}:
        assert files[path] == (small / path).read_bytes(), path
    card = files["README.md"].decode()
    assert (
        'from_pretrained("ann/little", torch_dtype=dtype, trust_remote_code=True)' in card
        and "THIS FOLDER" not in card
    )
    assert stand_in.private["ann/little"], "private unless somebody asks for more"

    code, said = command("bring", "emoji-turbo", "ann/little", "--run", tmp_path / "run")
    assert code == 0, said
    brought = ecodiff.PrunePlan.load(tmp_path / "run" / "plan.safetensors")
    assert brought.digest == ecodiff.PrunePlan.load(small / PLAN_FILE).digest
    fetched = [path for way, path in stand_in.asked if way == "GET" and "/resolve/" in path]
    assert fetched == [f"ann/little/resolve/main/{PLAN_FILE}"], "no weights are downloaded"


def test_a_plan_alone_and_what_an_earlier_upload_left(command, stand_in, small, tmp_path):
    assert command("push", small, "ann/little", "--public")[0] == 0
    stand_in.repos["ann/little"] |= {"sample.png": b"hers", "LICENSE": b"hers"}
    code, said = command("push", small, "ann/little", "--plan")
    assert code == 0, said
    theirs = {"sample.png", "LICENSE"}
    assert set(stand_in.repos["ann/little"]) == {PLAN_FILE, "README.md", ".gitattributes"} | theirs
    assert 'import emoji-turbo "ann/little"' in stand_in.repos["ann/little"]["README.md"].decode()
    # and another person's command reads it, as it is public
    code, said = command("bring", "emoji-turbo", "ann/little", "--run", tmp_path / "run", token="hf_bob")
    assert code == 0, said


@pytest.mark.parametrize(
    ("arguments", "token", "words"),
    [
        (("push", "SMALL", "little"), "hf_wrong", "token is missing, expired or without that right"),
        (("push", "SMALL", "ann/little"), "hf_bob", "does not let this token write to ann/little"),
        (("push", "SMALL", "ann/taken"), "hf_ann", "holds something else"),
        (("push", "SMALL", "no/such/name"), "hf_ann", "is not the name of a repository"),
        (("push", "RUN", "little"), "hf_ann", "not a pruned pipeline"),
        (("bring", "emoji-turbo", "ann/none", "--run", "RUN"), "hf_ann", "The Hub has no ann/none"),
        (("bring", "emoji-turbo", "ann/secret", "--run", "RUN"), "hf_bob", "The Hub has no ann/secret"),
        (("bring", "emoji-turbo", "ann/taken", "--run", "RUN"), "hf_ann", "was not pruned with ecodiff"),
        (("bring", "emoji-turbo", "ann/bad", "--run", "RUN"), "hf_ann", "not a"),
    ],
)
def test_what_is_refused_is_said(command, stand_in, small, tmp_path, arguments, token, words):
    stand_in.repos |= {"ann/taken": {"model.bin": b"x"}, "ann/bad": {PLAN_FILE: b"not a plan"}}
    stand_in.repos["ann/secret"] = {PLAN_FILE: (small / PLAN_FILE).read_bytes()}
    stand_in.private |= {"ann/taken": False, "ann/bad": False, "ann/secret": True}
    before = {name: dict(files) for name, files in stand_in.repos.items()}
    places = {"SMALL": small, "RUN": tmp_path / "run"}
    code, said = command(*(places.get(a, a) for a in arguments), token=token)
    assert code == 1 and words in said and "Traceback" not in said, said
    assert stand_in.repos == before and not (tmp_path / "run").exists()


def test_a_connection_that_is_lost(command, stand_in, small):
    stand_in.lost = 10_000
    code, said = command("push", small, "little")
    assert code == 1 and "connection to the Hub failed" in said and "Traceback" not in said, said
    assert set(stand_in.repos["ann/little"]) == {".gitattributes"}, "nothing half done is there"
    stand_in.lost = 0
    assert command("push", small, "little")[0] == 0
    assert PLAN_FILE in stand_in.repos["ann/little"]


def test_no_hub_at_all(command, stand_in, small, tmp_path):
    stand_in.gone = True
    for asked in (("push", small, "little"), ("bring", "emoji-turbo", "ann/little", "--run", tmp_path / "r")):
        code, said = command(*asked)
        assert code == 1 and "connection to the Hub failed" in said and "Traceback" not in said, said


LOAD = """
import json, sys, torch
import ecodiff
from ecodiff.errors import EcodiffError

for line in sys.stdin:
    repo, dtype = json.loads(line)
    try:
        pipe = ecodiff.load(repo, getattr(torch, dtype), device="cpu")
        found = [str(pipe.unet.dtype), float(pipe.unet.conv_in.weight.detach().double().abs().sum())]
    except EcodiffError as error:
        found = ["error", str(error)]
    print(json.dumps(found), flush=True)
"""


def test_a_model_comes_from_there_in_the_precision_that_is_wanted(stand_in, tiny_sdxl, tmp_path):
    def files(folder):
        found = [file for file in folder.rglob("*") if file.is_file()]
        return {str(file.relative_to(folder)): file.read_bytes() for file in found}

    tiny_sdxl.save_pretrained(tmp_path / "whole")
    total = float(tiny_sdxl.unet.conv_in.weight.detach().double().abs().sum())
    tiny_sdxl.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    tiny_sdxl.to(torch.bfloat16).save_pretrained(tmp_path / "brain", variant="bf16")
    whole, half, brain = (files(tmp_path / name) for name in ("whole", "half", "brain"))
    stand_in.repos |= {"ann/both": whole | half, "ann/whole": whole, "ann/half": half, "ann/secret": whole}
    stand_in.repos |= {"ann/brain": brain, "ann/sana": whole | brain}
    stand_in.private |= dict.fromkeys(stand_in.repos, False) | {"ann/secret": True}

    def started(address):
        options = {"env": os.environ | hub.settings(address, tmp_path), "text": True, "cwd": ROOT}
        asked = [sys.executable, "-c", LOAD]
        return subprocess.Popen(asked, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, **options)

    with started(stand_in.address) as process:

        def load(repo, dtype):
            stand_in.asked.clear()
            print(json.dumps([repo, dtype]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        def weights():
            got = {path.rpartition("/")[2] for method, path in stand_in.asked if method == "GET"}
            return {name for name in got if name.startswith("diffusion_pytorch_model")}

        for repo, dtype, came in (
            ("ann/both", "float16", "diffusion_pytorch_model.fp16.safetensors"),
            ("ann/whole", "float16", "diffusion_pytorch_model.safetensors"),
            ("ann/both", "float32", "diffusion_pytorch_model.safetensors"),
            ("ann/half", "float32", "diffusion_pytorch_model.fp16.safetensors"),
            ("ann/sana", "bfloat16", "diffusion_pytorch_model.bf16.safetensors"),
            ("ann/brain", "float32", "diffusion_pytorch_model.bf16.safetensors"),
        ):
            found, size = load(repo, dtype)
            assert found == f"torch.{dtype}" and size == pytest.approx(total, rel=1e-2)
            assert weights() == {came}
        word, said = load("ann/secret", "float32")
        assert word == "error" and "no access" in said
        stand_in.gone = True
        word, said = load("ann/other", "float32")
        assert word == "error" and "no network" in said
        process.stdin.close()
    with started("http://127.0.0.1:9") as process:  # nobody is there
        assert load("ann/whole", "float16")[0] == "torch.float16", "what was downloaded is enough"
        assert load("ann/secret", "float16")[0] == "error"
        process.stdin.close()


@pytest.mark.parametrize("name", catalog.MODELS)
def test_a_card_has_a_licence_that_the_hub_knows(command, stand_in, tmp_path, name):
    """Of each model of the catalogue: FLUX.1's, SD 3's and others are names and links."""
    known = catalog.MODELS[name]
    plan = ecodiff.PrunePlan({"a": torch.ones(2, dtype=torch.bool)}, {"model": name})
    plan.save(tmp_path / PLAN_FILE)
    code, said = command("push", tmp_path, "licensed", "--plan")
    assert code == 0, said
    card = stand_in.repos["ann/licensed"]["README.md"].decode()
    if known.licence not in LICENCES:
        assert 'license: "other"' in card and f'license_name: "{known.licence}"' in card
        assert f'license_link: "https://huggingface.co/{known.repository}"' in card
    else:
        assert f'license: "{known.licence}"' in card and "license_name" not in card
    assert str(catalog.EMBEDDED) not in card


def found_on_the_hub(name, pipeline, **more) -> dict:
    """A model as the Hub lists it."""
    config = {"diffusers": {"_class_name": pipeline}}
    return {"id": name, "downloads": 10, "gated": False, "tags": ["license:mit"], "config": config} | more


def test_search_finds_what_can_be_pruned(command, stand_in):
    stand_in.models = [
        found_on_the_hub("ann/sdxl-lightning", "StableDiffusionXLPipeline", downloads=1234),
        found_on_the_hub("bob/sdxl-gated", "StableDiffusionXLPipeline", gated="manual", tags=[]),
        found_on_the_hub("bob/sdxl-video", "WanPipeline"),
        found_on_the_hub("bob/sdxl-inpaint", "StableDiffusionXLInpaintPipeline"),  # needs an image
        found_on_the_hub("bob/sdxl-own", "SomebodysPipeline"),
        found_on_the_hub("bob/sdxl-config", "", config=None),
        found_on_the_hub("stabilityai/sdxl-turbo", "StableDiffusionXLPipeline"),  # the catalogue has it
    ]
    code, said = command("search", "sdxl", "--json")
    assert code == 0 and "1,234 downloads, mit" in said and "gated: accept its licence on" in said
    found = json.loads(said.splitlines()[-1])
    names = [model["name"] for model in found["catalogue"]]
    assert names[:2] == ["sdxl", "sdxl-turbo"] and "emoji-sdxl" in names
    assert [row["id"] for row in found["hub"]] == ["ann/sdxl-lightning", "bob/sdxl-gated", "bob/sdxl-video"]
    assert [row["gated"] for row in found["hub"]] == [False, True, False]
    assert command("search", "no", "such", "thing")[1].startswith("  nothing")


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("sdxl", "sdxl"),
        ("flux", "flux-dev"),
        ("SD 1.5", "sd-1.5"),
        ("sd3.5", "sd-3.5-medium"),
        ("stable diffusion xl", "sdxl"),
        ("black-forest-labs/FLUX.1-schnell", "flux-schnell"),
        ("klein", "flux-2-klein"),
    ],
)
def test_words_find_the_right_model_of_the_catalogue_first(words, first):
    assert catalog.search(words)[0].name == first


def header_of(model: str) -> bytes:
    """A safetensors file of a denoiser at its true size, in diffusers' layout, cut off after its header."""
    entries, end = {}, 0
    for name, tensor in empty_denoiser(model).state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        entries[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def test_a_file_of_a_repository_is_told_by_its_header_alone(command, stand_in):
    stand_in.repos["ann/mine"] = {"deep/fine-tune.safetensors": header_of("sdxl"), "a.safetensors": b"none"}
    stand_in.private["ann/mine"] = False
    code, said = command("info", "ann/mine/deep/fine-tune.safetensors", "--json")
    assert code == 0, said
    assert json.loads(said.splitlines()[-1])["params"] == 2_567_463_684
    assert ("GET", "ann/mine/resolve/main/deep/fine-tune.safetensors") in stand_in.asked
    for file, words in {"a.safetensors": "not a checkpoint", "gone.safetensors": "Could not get"}.items():
        code, said = command("info", f"ann/mine/{file}")
        assert code == 1 and words in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("https://huggingface.co/stabilityai/sdxl-turbo", "sdxl-turbo"),
        ("huggingface.co/stabilityai/sdxl-turbo/tree/main?library=diffusers", "sdxl-turbo"),
        (" https://hf.co/ann/mine ", "ann/mine"),
        ("SDXL", "sdxl"),
        ("SD 1.5", "sd-1.5"),
        ("ann/sdxl", "ann/sdxl"),
        ("https://huggingface.co/ann/mine/blob/main/a/b.safetensors", "ann/mine/a/b.safetensors"),
        (
            "hf.co/ann/mine/resolve/main/b.safetensors?download=true",
            "ann/mine/b.safetensors",
        ),
        (
            "https://huggingface.co/ByteDance/SDXL-Lightning/blob/main/sdxl_lightning_4step.safetensors",
            "sdxl-lightning",
        ),
    ],
)
def test_links_and_loose_spellings_are_what_they_mean(typed, name):
    assert catalog.find(typed).name == name

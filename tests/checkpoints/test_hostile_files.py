"""Thousands of files that a stranger could send: a clean refusal or a correct load, and nothing else.

Each case is a good file with something done to it, drawn from a seed that the failure names.
"""

import io
import json
import random
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch

import ecodiff
from ecodiff.checkpoints import importers
from ecodiff.checkpoints.lora import translate_lora
from ecodiff.errors import EcodiffError
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning.scores import Scores
from ecodiff.pruning.slicing import check
from ecodiff.runs.folder import Run
from ecodiff.units import ALL_KINDS
from tests.checkpoints.test_folders import some_plan
from tests.checkpoints.test_lora import kohya_file, peft_file
from tests.conftest import PIPELINES

CASES = {"plan": 1500, "scores": 1500, "run": 1200, "lora": 350, "kohya": 350, "zip": 300, "masks": 300}
MEMORY = 400 << 20  # bytes that all of them may add to the process
NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "a\x00b",
    "ünïcødé",
    "",
    "a" * 5000,
    "__proto__",
    "C:x",
)
VALUES = (
    None,
    True,
    -1,
    0,
    1 << 62,
    10**30,
    1e308,
    float("nan"),
    "",
    "NaN",
    [],
    {},
    [[[[]]]],
    {"a": {}},
    *NAMES,
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, repeated or overwritten."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, len(data)))
        what = rng.randrange(5)
        if what == 0:
            del data[at:]
        elif what == 1 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif what == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 40))
        elif what == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 1 << 31, 1 << 40, (1 << 64) - 1]))
        else:
            data += data[: rng.randint(1, 200)]
    return bytes(data)


def twisted(tree, rng: random.Random):
    """A nest of JSON with one value or one name replaced."""
    if isinstance(tree, dict) and tree and rng.random() < 0.8:
        key = rng.choice(list(tree))
        if rng.random() < 0.3:
            return {(rng.choice(NAMES) if k == key else k): v for k, v in tree.items()}
        return tree | {key: twisted(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        at = rng.randrange(len(tree))
        return [*tree[:at], twisted(tree[at], rng), *tree[at + 1 :]]
    return rng.choice(VALUES)


def header_twisted(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else: names, dtypes, shapes, offsets, metadata."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for _ in range(rng.randint(1, 3)):
        header = twisted(header, rng)
        header = header if isinstance(header, dict) else {"a": header}
    meta = header.get("__metadata__")
    if isinstance(meta, dict) and rng.random() < 0.5:  # values of the metadata are JSON in strings
        for key, value in meta.items():
            try:
                meta[key] = json.dumps(twisted(json.loads(value), rng))
            except (TypeError, ValueError):
                continue
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def rezipped(data: bytes, rng: random.Random) -> bytes:
    """A zip with a member renamed, doubled, blown up or compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    out = io.BytesIO()
    chosen = rng.randrange(len(members))
    what = rng.randrange(5)
    compression = zipfile.ZIP_DEFLATED if what == 3 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", compression) as new:
        for index, (name, content) in enumerate(members):
            if index == chosen and what == 0:
                name = f"{rng.choice(NAMES) or 'x'}/{name}"
            if index == chosen and what == 1:
                content = damaged(content, rng)
            if index == chosen and what == 3:
                content = bytes(80 << 20 if rng.random() < 0.03 else 1 << 12)
            if index == chosen and what == 4:
                link = zipfile.ZipInfo(name)
                link.external_attr = 0o120777 << 16
                new.writestr(link, "/etc/passwd")
                continue
            new.writestr(name, content)
            if index == chosen and what == 2:
                new.writestr(name + "2", content)
    return out.getvalue()


@pytest.fixture(scope="module")
def world():

    pipe = PIPELINES["sdxl"]()
    return pipe, denoiser_of(pipe), some_plan(pipe)


def good(kind: str, world, folder: Path) -> Path:
    """A file of that kind that is as it should be."""
    pipe, denoiser, plan = world
    if kind == "plan":
        return plan.save(folder / "plan.safetensors")
    if kind == "zip":
        plan.save(folder / "ecodiff_plan.safetensors")
        with zipfile.ZipFile(folder / "model.zip", "w") as archive:
            archive.write(folder / "ecodiff_plan.safetensors", "model/ecodiff_plan.safetensors")
            archive.writestr("model/model_index.json", "{}")
        return folder / "model.zip"
    if kind == "scores":
        return Scores.unranked(denoiser, ALL_KINDS).save(folder / "scores.safetensors")
    if kind == "masks":
        groups = [g for g in importers._in_order(ecodiff.find_groups(denoiser)) if g.kind == "heads"]
        torch.save([torch.randn(g.size, dtype=torch.bfloat16) for g in groups], folder / "heads.pt")
        return folder / "heads.pt"
    if kind == "lora":
        return peft_file(pipe, folder / "lora.safetensors")
    if kind == "kohya":
        return kohya_file(pipe, folder / "kohya.safetensors")
    run = Run.create(folder / "run", "emoji-sdxl", ecodiff.LearnConfig(), ["a red apple", "a cat"])
    return run.folder / "run.json"


def use(kind: str, path: Path, world):
    """What a stranger's file of that kind goes through; returns what must be right if it is taken."""
    pipe, denoiser, plan = world
    if kind in ("plan", "zip"):
        taken = importers.import_files([path], denoiser)
        check(ecodiff.PrunePlan(taken), denoiser)
        assert 0 <= taken.metadata["ratio"] <= 1
    elif kind == "masks":
        taken = importers.import_files([path], denoiser)
        assert all(values.isfinite().all() for values in taken.values.values())
        check(taken.plan(ratio=min(0.05, taken.ceiling)), denoiser)
    elif kind == "scores":
        taken = Scores.load(path)
        if 0 < taken.removable <= taken.total:
            taken.plan(ratio=0.5 * taken.ceiling)
    elif kind in ("lora", "kohya"):
        tensors, _ = translate_lora(path, pipe, plan)
        assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    else:
        run = Run.open(path.parent)
        assert run.folder == path.parent


@pytest.mark.parametrize("kind", CASES)
def test_a_strangers_file_does_no_harm(kind, world, tmp_path):
    inside, outside = tmp_path / "inside", sorted(tmp_path.rglob("*"))
    inside.mkdir()
    path = good(kind, world, inside)
    use(kind, path, world)  # as it is, it is taken
    data, before, taken = path.read_bytes(), sorted(inside.rglob("*")), 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(CASES[kind]):
        rng = random.Random(f"{kind} {seed}")
        if kind == "run":
            changed = json.dumps(twisted(json.loads(data), rng)).encode()
        elif rng.random() < 0.4:
            changed = damaged(data, rng)
        else:
            changed = (rezipped if kind in ("zip", "masks") else header_twisted)(data, rng)
        path.write_bytes(changed)
        try:
            use(kind, path, world)
            taken += 1
        except EcodiffError as error:
            assert 0 < len(str(error)) < 10_000
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
        assert grown < MEMORY, f"{kind}, seed {seed} took {grown >> 20} MiB"
    assert sorted(inside.rglob("*")) == before, "something was written"
    assert sorted(p for p in tmp_path.rglob("*") if inside not in (p, *p.parents)) == outside
    assert taken < CASES[kind], "nothing was refused"


def test_what_is_too_much_is_refused_before_it_is_listed(tmp_path):
    """Counts are read off the file's own first or last bytes: no time and no memory is spent on the rest."""
    import time

    header = {f"g{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    text = json.dumps(header).encode()
    (tmp_path / "plan.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "lora.safetensors").write_bytes((tmp_path / "plan.safetensors").read_bytes())
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}", b"")
    pipe = PIPELINES["sdxl"]()
    plan, started = some_plan(pipe), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (
        lambda: ecodiff.PrunePlan.load(tmp_path / "plan.safetensors"),
        lambda: Scores.load(tmp_path / "plan.safetensors"),
        lambda: importers.import_files([tmp_path / "many.zip"], denoiser_of(pipe)),
        lambda: translate_lora(tmp_path / "lora.safetensors", pipe, plan),
    ):
        with pytest.raises(EcodiffError):
            read()
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_streams_that_break_in_the_middle(tmp_path, method):
    pipe = PIPELINES["sdxl"]()
    file = some_plan(pipe).save(tmp_path / "ecodiff_plan.safetensors")
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", method) as archive:
        archive.write(file, "small/ecodiff_plan.safetensors")
    data = bytearray((tmp_path / "whole.zip").read_bytes())
    refused = 0
    for at in range(60, len(data) - 200, 37):
        broken = bytes(data[:at]) + bytes(b ^ 0xFF for b in data[at : at + 20]) + bytes(data[at + 20 :])
        (tmp_path / "broken.zip").write_bytes(broken)
        try:
            importers.import_files([tmp_path / "broken.zip"], denoiser_of(pipe))
        except EcodiffError as error:
            refused += 1
            assert str(tmp_path) not in str(error) and len(str(error)) < 500
    assert refused > 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: [torch.zeros(4, device="meta")],
        lambda: [torch.zeros(4).to_sparse()],
        lambda: [torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])],
        lambda: [torch.zeros(4, dtype=torch.complex64)],
        lambda: {"a": "words"},
    ],
)
def test_masks_that_are_no_plain_tensors(tmp_path, make):
    pipe = PIPELINES["sdxl"]()
    torch.save(make(), tmp_path / "masks.pt")
    with pytest.raises(EcodiffError) as refused:
        importers.import_files([tmp_path / "masks.pt"], denoiser_of(pipe))
    assert str(tmp_path) not in str(refused.value)

"""The recipes of the embedded models: one step of everything, on pictures of plain colours."""

import json

import pytest
import torch

from ecodiff import load
from ecodiff.pipelines import denoiser_of
from recipes import __main__ as recipes
from recipes import data, evaluate
from recipes.data import Emoji

SHORT = {
    "emoji-sdxl": ["--vae-steps", "1", "--steps", "1", "--lean-steps", "1"],
    "emoji-flux": ["--text-steps", "1", "--steps", "1", "--guidance-steps", "1"],
    "emoji-turbo": ["--steps", "1"],
    "emoji-flux, trained on": ["--more", "1", "--guidance-steps", "1"],
}


@pytest.fixture
def colours(monkeypatch):
    emojis = [Emoji(f"{n:x}", f"colour {n}", f"shade {n}", "Symbols", f"{n // 2:x}") for n in range(200)]
    pages = torch.randint(256, (len(emojis), 3, 1, 1), dtype=torch.uint8).expand(-1, -1, 64, 64)
    monkeypatch.setattr(data, "load", lambda folder: (emojis, pages.contiguous()))
    monkeypatch.setattr(evaluate, "CAPTIONS", 2)


@pytest.mark.parametrize("name", SHORT)
def test_a_recipe_trains_and_writes_a_model_that_opens(name, colours, tmp_path):
    model, work, out = name.split(",")[0], tmp_path / "work", tmp_path / "model"
    recipes.main([model, *SHORT[name], "--work", str(work), "--out", str(out), "--threads", "1"])
    pipe = load(str(out))
    shapes = [{n: p.shape for n, p in denoiser_of(each).named_parameters()} for each in (pipe, load(model))]
    assert shapes[0] == shapes[1], "as the model that ships"
    assert not any("_name_or_path" in file.read_text() for file in out.rglob("*.json"))
    report = json.loads((out / "report.json").read_text())
    assert any(facts.startswith("1 steps of") for facts in report["trained"].values())
    assert len((out / "prompts" / "heldout.txt").read_text().splitlines()) == 64

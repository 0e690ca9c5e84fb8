"""The report of a pruned model: figures of what was made, and their place in its card."""

import math

import pytest
import torch

import ecodiff
from ecodiff import cli
from ecodiff.errors import BudgetError
from ecodiff.metrics.report import BEGIN, END, into_card, markdown, report, summary, weight_bytes
from tests.checkpoints.test_folders import some_plan


def test_summary():
    rows = [
        {"latent_error": value, "psnr": 20.0 + value, "ssim": 0.5, "prompt": f"p{value}", "seed": 3}
        for value in (4.0, 1.0, 2.0, 3.0)
    ]
    found = summary(rows)
    assert (found["mean"], found["median"], found["p90"], found["pairs"]) == (2.5, 2.5, 4.0, 4)
    assert found["stderr"] == pytest.approx(math.sqrt(5 / 3) / 2)
    assert found["worst"] == {"latent_error": 4.0, "prompt": "p4.0", "seed": 3}
    assert summary(rows[:1])["stderr"] == 0.0


def test_bytes_of_quantised_weights():
    quantization = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    assert weight_bytes(layer) == 4 * 64 * 32
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    assert 64 * 32 + 32 * 2 <= weight_bytes(layer) <= 64 * 32 + 32 * 8


def test_the_card_of_a_pruned_model(tmp_path, capsys):
    dense = ecodiff.load("emoji-turbo")
    folder = ecodiff.save(ecodiff.variant(dense, some_plan(dense, empty=False)), tmp_path / "small")
    asked = ["compare", str(folder), "--dense", "emoji-turbo", "--report", "--count", "2", "--steps", "3"]
    assert cli.main(asked) == 0
    told = capsys.readouterr()
    assert "pruned, int8" in told.out
    assert "12image" in told.err and "3/3" not in told.err, "one bar over all images, none an image"
    card = (folder / "README.md").read_text()
    assert card.count(BEGIN) == card.count(END) == 1 and "trust_remote_code" in card
    assert cli.main(asked) == 0
    assert (folder / "README.md").read_text().count(BEGIN) == 1, "in place of the old one"

    small = ecodiff.load(folder)
    found = report(dense, small, ["cat", "rocket"], [0, 1], steps=2)
    models = found["models"]
    eight = ["dense, fp8", "pruned, fp8", "dense, int8", "pruned, int8"]
    assert list(models) == ["dense", "pruned", *eight] and found["pairs"] == 4
    assert models["dense"]["error"] is None
    assert models["pruned"]["params"] == sum(p.numel() for p in small.unet.parameters())
    assert models["pruned"]["macs"] < models["dense"]["macs"] == models["dense, int8"]["macs"]
    assert models["pruned, int8"]["bytes"] < models["dense, int8"]["bytes"] < models["dense"]["bytes"]
    assert models["pruned, fp8"]["bytes"] < models["dense, fp8"]["bytes"] < models["dense"]["bytes"] / 2
    assert 0 < models["dense, int8"]["error"]["mean"] < models["pruned"]["error"]["mean"]
    assert f"{models['pruned']['params']:,}" in markdown(found)
    with pytest.raises(BudgetError, match="at least one prompt"):
        report(dense, small, [])


def test_layers_that_lost_all_their_units_are_no_obstacle():
    dense = ecodiff.load("emoji-turbo")
    small = ecodiff.variant(dense, some_plan(dense))  # some are emptied
    assert any(p.numel() == 0 for p in small.unet.parameters())
    found = report(dense, small, ["cat"], steps=1)["models"]
    assert {"pruned, int8", "pruned, fp8"} <= set(found)


def test_a_section_has_one_place_in_a_card():
    card = into_card("# Title\n\nWords.\n", f"{BEGIN}\none\n{END}\n")
    assert card == f"# Title\n\nWords.\n\n{BEGIN}\none\n{END}\n"
    assert into_card(card, f"{BEGIN}\ntwo\n{END}\n") == card.replace("one", "two")

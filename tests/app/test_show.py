"""What the page shows of a cut: rows are named by what the groups are, not by their names."""

import re
from pathlib import Path

import gradio as gr

import ecodiff
from ecodiff import catalog
from ecodiff.app.service import prediction
from ecodiff.app.ui import prune, show
from ecodiff.checkpoints import loading
from ecodiff.units import ALL_KINDS


def test_layers_are_named_by_their_groups():
    for model, rows in (
        (
            "flux-dev",
            {"Heads": 57, "FFN neurons": 76, "Modulation rows": 76, "Modulation directions": 1}
            | {"Directions inside heads": 57},
        ),
        ("z-image", {"Heads": 34, "FFN neurons": 34, "Directions inside heads": 34}),
        (
            "sdxl",
            {"Heads": 70, "Heads, cross-attention": 70, "FFN neurons": 70, "ResNet channels": 17}
            | {"Directions inside heads": 140, "Directions of queries and keys": 140},
        ),
    ):
        groups = ecodiff.find_groups(loading.empty_denoiser(model), ALL_KINDS)
        html = show.layers({g.name: 0.5 for g in groups}, {g.name: g.kind for g in groups})
        found = re.findall(r'aria-label="(.+?): 50% kept on average over (\d+) layers"', html)
        assert {label: int(count) for label, count in found} == rows


def test_a_runs_title_says_which_orders_were_measured_and_which_is_first():
    status = {"size": None, "ratio": 0.2, "orders": {"wanda": 0.02, "mine": 0.001}}
    assert "orders measured: mine 0.001 · wanda 0.02" in show.heading("a run", status)
    assert "orders" not in show.heading("a run", status | {"orders": {}})


def test_the_size_of_a_models_files_is_that_of_its_weights():
    """Not of the example run that lies beside them."""
    source = Path(catalog.find("emoji-sdxl").source)
    parts = [name for name, entry in loading.model_index(str(source)).items() if isinstance(entry, list)]
    weights = sum(f.stat().st_size for name in parts for f in (source / name).glob("*.safetensors"))
    assert prediction.unit_costs("emoji-sdxl")[2] == weights > 10**7


def test_a_preset_that_is_chosen_while_the_models_own_is_looked_up_stays():
    best = prune.preset_of("emoji-flux")
    assert prune.offered(best, "emoji-flux", chosen_for="emoji-sdxl") == "surgeon"
    assert prune.offered(best, "emoji-flux", chosen_for="emoji-flux") == gr.skip()
    assert prune.offered(prune.preset_of("no/such"), "no/such", "") == gr.skip()


def test_a_method_that_cannot_do_a_size_has_none_there():
    def row(method, ratio, error):
        return {"method": method, "ratio": ratio, "latent_error": [error], "top1": [0.5], "trajectories": 3}

    found = {"rows": [row("best", 0.4, 0.1), row("best", 0.5, 0.2), row("short", 0.4, 0.3)]}
    first, second = show.measured(found)
    assert first == {
        "method": "short",
        "40%": "0.300",
        "50%": "–",
        "top-1 at 40 %": "0.50",
        "trajectories": "3",
    }
    assert (second["method"], second["50%"]) == ("best", "0.200")

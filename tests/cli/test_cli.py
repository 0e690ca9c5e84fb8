"""The commands, on the embedded model, with presets shortened: what is learned is tested elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ecodiff
from ecodiff import catalog, cli, config
from ecodiff.config import CompensateConfig
from ecodiff.pruning.slicing import plan_of
from ecodiff.runs import loop
from ecodiff.runs.folder import Run
from tests.checkpoints.test_folders import some_plan
from tests.checkpoints.test_lora import peft_file


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setitem(config.PRESETS, "fast", {"warm_steps": 1, "steps": 1, "batch": 2})
    monkeypatch.setattr(
        catalog.Model,
        "compensation",
        lambda model: CompensateConfig(trajectories=8, heldout=4, batch=4, calls=2, inference_steps=4),
    )
    monkeypatch.setenv("ECODIFF_HOME", str(tmp_path / "home"))


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def last_json(out: str) -> dict:
    return json.loads(out.strip().splitlines()[-1])


def test_units_are_ranked_in_float8_and_the_full_weights_are_cut(capsys, tmp_path):
    command = ["prune", "emoji-turbo", "--preset", "gauss-newton", "--learn-in", "float8", "--steps", 1]
    code, _, err = run(capsys, *command, "--no-compensate", "--out", tmp_path / "small", "--json")
    assert code == 0, err
    assert "gauss-newton, on weights in float8" in (tmp_path / "small" / "README.md").read_text()
    small, dense = ecodiff.load(tmp_path / "small").unet, ecodiff.load("emoji-turbo").unet
    for name in ("time_embedding.linear_1", "mid_block.attentions.0.proj_in"):  # no unit of theirs goes
        weight = dense.get_submodule(name).weight
        assert torch.equal(small.get_submodule(name).weight, weight) and weight.nbytes > 1 << 15


def test_prune_recut_generate_compare(capsys, tmp_path):
    out = tmp_path / "small"
    command = ["prune", "emoji-sdxl", "--ratio", 0.2, "--preset", "fast", "--out", out, "--json"]
    code, text, err = run(capsys, *command)
    result = last_json(text)
    assert code == 0, err
    assert set(result) >= {"run", "out", "plan", "digest", "params_dense", "params_pruned", "seconds"}
    assert result["run"] in err, "the run's folder is printed"
    assert result["params_dense"] == 4_865_476
    assert abs(result["params_pruned"] / result["params_dense"] - 0.8) < 1e-3
    assert ecodiff.PrunePlan.load(result["plan"]).digest == result["digest"]
    small = ecodiff.load(out)
    assert sum(p.numel() for p in small.unet.parameters()) == result["params_pruned"]

    # the same command on the same run learns nothing and gives the same plan
    code, text, _ = run(capsys, *command, "--run", result["run"])
    assert code == 0 and last_json(text)["digest"] == result["digest"]
    # repaired by more, with nothing learned again; by too few, before anything is done
    again = ["prune", result["run"], "--ratio", 0.2, "--out", tmp_path / "more", "--repair"]
    assert run(capsys, *again, 12)[0] == 0
    weights = [dict(ecodiff.load(folder).unet.named_parameters()) for folder in (out, tmp_path / "more")]
    assert weights[0].keys() == weights[1].keys()
    assert any(not weight.equal(weights[1][name]) for name, weight in weights[0].items())
    code, _, err = run(capsys, *again, 4)
    assert code == 1 and "two batches of trajectories at least (8), not 4" in err
    # another command on it is refused
    code, _, err = run(capsys, "prune", "emoji-sdxl", "--ratio", 0.3, "--out", out, "--run", result["run"])
    assert code == 1 and "another --run" in err
    # a run of the plan that is in the pruned folder, and that folder healed
    brought = ["bring", "emoji-sdxl", result["plan"], "--run", tmp_path / "brought"]
    assert run(capsys, *brought)[0] == 0
    code, text, _ = run(capsys, "prune", tmp_path / "brought", "--out", tmp_path / "again", "--json")
    assert code == 0 and last_json(text)["digest"] == result["digest"]
    healing = [
        "heal",
        out,
        "--out",
        tmp_path / "healed",
        "--repair",
        8,
        "--steps",
        1,
        "--rank",
        1,
        "--count",
        1,
        "--quiet",
    ]
    code, text, err = run(capsys, *healing, "--json")
    assert code == 0 and "it/s]" not in err, err
    assert plan_of(ecodiff.load(tmp_path / "healed").unet).digest == result["digest"]
    before, after = (last_json(text)[when]["latent_error"] for when in ("before", "after"))
    assert before != after and ("not closer" in text) == (after > before)
    assert "| healed | repaired by 8 trajectories; 1 step," in (tmp_path / "healed" / "README.md").read_text()
    # another size from the run
    again = ["prune", result["run"], "--ratio", 0.4, "--out", tmp_path / "s", "--no-compensate", "--layers"]
    code, text, _ = run(capsys, *again, "--json")
    assert "mid_block.resnets.0" in text and last_json(text)["compensated"] == 0 < result["compensated"]
    assert code == 0 and last_json(text)["params_pruned"] / 4_865_476 == pytest.approx(0.6, abs=3e-3)
    # of each kind its share, and no other kind
    shares = ["prune", result["run"], "--units", "heads=0.5", "ffn=0.125", "--out", tmp_path / "u", "--json"]
    code, text, err = run(capsys, *shares, "--no-compensate")
    assert code == 0, err
    plan, gone = ecodiff.PrunePlan.load(last_json(text)["plan"]), {"heads": [0, 0], "ffn": [0, 0]}
    for group in ecodiff.find_groups(ecodiff.load("emoji-sdxl").unet):
        gone[group.kind][0] += int((~plan[group.name]).sum())
        gone[group.kind][1] += group.size
    assert gone["heads"][0] * 2 == gone["heads"][1] and gone["ffn"][0] * 8 == gone["ffn"][1]
    assert all(plan[name].all() for name in plan if "resnets" in name)

    image = tmp_path / "apple.png"
    code, _, err = run(capsys, "generate", out, "red apple", "--seed", 3, "--steps", 2, "--out", image)
    assert code == 0 and Image.open(image).size == (64, 64), err
    pair = tmp_path / "pair.png"
    code, text, _ = run(capsys, "compare", out, "red apple", "--steps", 2, "--out", pair, "--json")
    assert code == 0 and Image.open(pair).size == (128, 64)
    assert 0 < last_json(text)["mean"]["latent_error"] < 1
    code, text, err = run(capsys, "compare", out, "--count", 2, "--steps", 3, "--json")
    assert "4/4" in err and "3/3" not in err, "one bar over all images, none an image"
    report = last_json(text)
    assert code == 0 and len(report["rows"]) == 2 and report["ms_dense"] > 0
    code, text, _ = run(capsys, "info", out, "--json")
    assert code == 0 and last_json(text)["pruned"]


def test_info_of_the_embedded_model(capsys):
    code, out, _ = run(capsys, "info", "emoji-sdxl", "--json")
    facts = last_json(out)
    assert code == 0 and facts["params"] == 4_865_476
    assert facts["share_heads"] + facts["share_ffn"] >= 0.4 and facts["ceiling"] > 0.8 and facts["left_alone"]


def test_info_says_what_is_downloaded_where_that_is_more(capsys):
    code, out, _ = run(capsys, "info", "z-image", "--json")
    facts = last_json(out)
    assert code == 0 and facts["denoiser_files"] == 4 * facts["params"] and "its files hold float32" in out
    assert "denoiser_files" not in last_json(run(capsys, "info", "sd-1.5", "--json")[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "no-such-model", "--out", "x"], "There is no model 'no-such-model'"),
        (["prune", "emoji-sdxl", "--ratio", "0.95", "--out", "x"], "At most 84.4%"),
        (["prune", "emoji-sdxl", "--ratio", "-1", "--out", "x"], "from 0 to 0.844"),
        (["prune", "emoji-sdxl", "--ratio", "nan", "--out", "x"], "from 0 to 0.844"),
        (["info", "somebody/something"], "no network"),
        (["generate", "/etc", "cat"], "model_index.json"),
        (["compare", "emoji-sdxl"], "is not pruned"),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 1 and message in err and "Traceback" not in out + err
    assert len(err.strip().splitlines()) == 1


def test_wrong_usage(capsys):
    for arguments in ([], ["prune"], ["prune", "emoji-sdxl", "--out", "x", "--ratio", "much"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0 and "examples:" in capsys.readouterr().out


def test_ctrl_c_keeps_the_run(capsys, tmp_path, monkeypatch):

    arguments = ["prune", "emoji-sdxl", "--preset", "fast", "--out", tmp_path / "o", "--run", tmp_path / "r"]
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    original = loop._save

    def interrupt(run, state, scores):
        original(run, state, scores)
        if state.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", interrupt)
    code, _, err = run(capsys, *arguments)
    assert code == 130 and "resumes" in err
    monkeypatch.setattr(loop, "_save", original)
    code, _, err = run(capsys, *arguments)
    assert code == 0 and "resumed at step 1" in err
    assert plan_of(ecodiff.load(tmp_path / "o").unet) is not None
    assert torch.isfinite(loop.Run.open(tmp_path / "r").state().vectors["log_alpha"]).all()


def test_info_needs_no_weights(capsys, tmp_path, tiny_sdxl):
    tiny_sdxl.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    code, out, _ = run(capsys, "info", tmp_path / "model", "--json")
    assert code == 0 and last_json(out)["params"] == sum(p.numel() for p in tiny_sdxl.unet.parameters())


def test_nothing_is_left_out_where_all_is_read(tmp_path, capsys):
    dense = ecodiff.load("emoji-turbo")
    plan = ecodiff.PrunePlan(some_plan(dense, empty=False), {"model": "emoji-turbo"})
    folder = ecodiff.save(ecodiff.variant(dense, plan), tmp_path / "small")
    asked = ("export", folder, "--format", "diffusers", "--out", tmp_path / "lean", "--drop-unused")
    code, _, err = run(capsys, *asked)
    assert code == 0 and "left out, never read: nothing" in err
    made = ecodiff.load(tmp_path / "lean")
    for name in ("text_encoder", "text_encoder_2"):
        whole, kept = (sum(p.numel() for p in pipe.components[name].parameters()) for pipe in (dense, made))
        assert whole == kept


def test_lora_and_export(tiny_sdxl, tmp_path, capsys):
    tiny_sdxl.save_pretrained(tmp_path / "dense")
    plan = some_plan(tiny_sdxl)
    plan.metadata["model"] = str(tmp_path / "dense")
    small = ecodiff.save(ecodiff.variant(tiny_sdxl, plan), tmp_path / "small")
    lora, out = peft_file(tiny_sdxl, tmp_path / "lora.safetensors"), tmp_path / "fitting.safetensors"
    assert cli.main(["lora", str(small), str(lora), "--out", str(out)]) == 0
    assert "layers cut to fit" in capsys.readouterr().out
    assert cli.main(["lora", str(small), str(out), "--out", str(tmp_path / "again.safetensors")]) == 1
    assert "fits this model as it is" in capsys.readouterr().err
    # several, and a folder of them: what fails does not keep the others
    (tmp_path / "loras").mkdir()
    for name in ("one", "two"):
        shutil.copy(lora, tmp_path / "loras" / f"{name}.safetensors")
    (tmp_path / "loras" / "words.txt").write_text("not a LoRA")
    asked = ["lora", str(small), str(tmp_path / "loras"), "--out", str(tmp_path / "cut"), "--json"]
    assert cli.main(asked) == 0
    assert [Path(made["out"]).name for made in last_json(capsys.readouterr().out)["files"]] == [
        "one.safetensors",
        "two.safetensors",
    ]
    assert load_file(tmp_path / "cut" / "one.safetensors").keys() == load_file(out).keys()
    (tmp_path / "loras" / "three.safetensors").write_bytes(b"no such thing")
    code, text, err = run(capsys, *asked)
    assert code == 1 and "three.safetensors:" in err and last_json(text)["failed"] == 1
    assert len(last_json(text)["files"]) == 2
    assert cli.main(["lora", str(small), str(lora), str(lora), "--out", str(tmp_path / "cut")]) == 1
    assert "is given twice" in capsys.readouterr().err
    assert cli.main(["fill", str(small), "--out", str(tmp_path / "filled")]) == 0
    filled = ecodiff.load(tmp_path / "filled")
    assert filled.unet.num_parameters() == tiny_sdxl.unet.num_parameters()
    assert cli.main(["fill", str(small), "--out", str(tmp_path / "filled")]) == 1
    assert "exists" in capsys.readouterr().err


def test_a_cut_by_milliseconds_counts_what_layers_take_here(tiny_sdxl, tmp_path, capsys):
    tiny_sdxl.save_pretrained(tmp_path / "tiny")
    asked = ["--preset", "magnitude-l2", "--size", "16", "--steps", "2", "--no-compensate", "--json"]
    model, out = str(tmp_path / "tiny"), str(tmp_path / "small")
    code, text, err = run(capsys, "prune", model, "--cost", "ms", "--ratio", "0.03", "--out", out, *asked)
    assert code == 0, err
    found = last_json(text)
    made = Run.open(Path(found["run"]))
    assert made.config.cost == "ms" and found["params_pruned"] < found["params_dense"]
    scores = made.scores()
    for kind in set(scores.kinds.values()):  # as if nothing but units of this kind took time
        times = {name: float(of == kind) for name, of in scores.kinds.items()}
        units = sum(len(scores.values[name]) for name, of in scores.kinds.items() if of == kind)
        plan = made.plan(0.3, milliseconds=(times, units))
        gone = sum(int((~plan[name]).sum()) for name in times if times[name])
        assert gone == pytest.approx(0.3 * units, abs=8), kind

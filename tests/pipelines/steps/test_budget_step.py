"""The budget step from the command line: figures, tables, and one sentence for every user error."""

import json
import re

import pytest
import torch

from model.checkpoint import save
from model.config import ModelConfig
from model.presets import PRESETS
from model.transformer import Transformer
from pipelines import __main__ as cli
from pipelines.reports.figures import binary

FLASH = ["budget", "--model", "v4-flash"]


def answer(capsys, *arguments):
    assert cli.main(["budget", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("model", "per_token", "below_v32", "flops_below_v32"),
    [("v4-flash", 3514.25, 13.68, 9.68), ("v4-pro", 5031.4375, 9.55, 3.65)],
)
def test_json_carries_the_published_figures_and_their_rules(capsys, model, per_token, below_v32, flops_below_v32):
    found = answer(capsys, "--model", model, "--context", "1048576")
    assert found["context"] == 1_048_576 and found["own"]["cache_bytes_per_token"] == per_token
    v32, gqa8 = found["references"]
    assert v32["times_own"]["cache_bytes_per_token"] == pytest.approx(below_v32, abs=0.005)
    assert v32["times_own"]["decode_fp8_equivalent"] == pytest.approx(flops_below_v32, abs=0.005)
    assert 1 / gqa8["times_own"]["cache_bytes_per_token"] == pytest.approx(0.02, abs=0.0002)
    own = found["own"]
    assert sum(work["flops"] for work in own["decode_work"]) == pytest.approx(own["decode_flops"])
    fixed = sum(own["fixed_state_bytes"].values())
    assert own["cache_bytes"] == per_token * 1_048_576 + fixed
    assert len(found["without"]) == 5
    ruled = [found["parameters"], found["weighting"], own, v32, gqa8, *found["waterfall"], *found["regimes"]]
    ruled += [change for choice in found["without"] for change in choice["changes"]]
    assert all(item["rule"] for item in ruled)


def test_the_context_changes_what_grows_only(capsys):
    near = answer(capsys, "--model", "v4-flash", "--context", "1024")["own"]
    far = answer(capsys, "--model", "v4-flash", "--context", "2048")["own"]
    assert far["cache_bytes"] - near["cache_bytes"] == 1024 * 3514.25
    linear = [sum(work["flops"] for work in costs["decode_work"] if work["kind"] == "linear") for costs in (near, far)]
    assert linear[0] == linear[1] and near["decode_flops"] < far["decode_flops"]


def test_every_way_to_name_a_model(capsys, tmp_path):
    tiny = ModelConfig.from_preset("tiny")
    torch.manual_seed(0)
    save(Transformer(tiny), tmp_path / "checkpoint")
    (tmp_path / "recipe.yaml").write_text("run: {name: mine}\nmodel: {preset: tiny}\n")
    (tmp_path / "model.yaml").write_text("preset: tiny\n")
    (tmp_path / "deep.yaml").write_text("model: {depth: 12, window: 64}\n")
    recipe = str(tmp_path / "recipe.yaml")
    for arguments in (
        ["--model", "tiny"],
        ["--model", recipe],
        ["--model", str(tmp_path / "model.yaml")],
        ["--model", str(tmp_path / "checkpoint")],
        ["--config", recipe],
    ):
        assert answer(capsys, *arguments)["model"]["config"] == json.loads(json.dumps(tiny.to_dict())), arguments
    deep = ModelConfig.from_depth(12, window=64).to_dict()
    assert answer(capsys, "--config", str(tmp_path / "deep.yaml"))["model"]["config"] == deep
    assert answer(capsys, "--model", "depth:12", "--model.window", "64")["model"]["config"] == deep


def test_a_family_is_scaled_by_depth(capsys, tmp_path):
    (tmp_path / "deep.yaml").write_text("model: {depth: 9, family: kimi, window: 64}\n")
    expected = json.loads(json.dumps(ModelConfig.from_depth(9, "kimi", window=64).to_dict()))
    for arguments in (
        ["--config", str(tmp_path / "deep.yaml")],
        ["--model", "depth:9", "--model.family", "kimi", "--model.window", "64"],
        ["--config", "configs/tiny.yaml", "--model.depth", "9", "--model.family", "kimi", "--model.window", "64"],
    ):
        assert answer(capsys, *arguments)["model"]["config"] == expected, arguments
    again = answer(capsys, "--config", str(tmp_path / "deep.yaml"), "--model.preset", "tiny")["model"]["config"]
    assert again == json.loads(json.dumps(ModelConfig.from_preset("tiny", window=64).to_dict()))


AGAINST = ["--model", "tiny", "--against", "v32,mamba2,kimi,gqa", "--context", "4096"]
NAMES = ["tiny", "DeepSeek-V3.2 (MLA + DSA, FP8)", "Mamba-2", "Kimi Linear (KDA and MLA 3:1)", "GQA (BF16)"]


def test_families_are_compared_from_1k_to_1m_tokens(capsys):
    found = answer(capsys, *AGAINST, "--measure", "--ssa-density", "0.5")
    *networks, ssa = found["networks"]
    assert [each["name"] for each in networks] == NAMES and ssa["name"] == "SSA (assumption)"
    for each in found["networks"]:
        assert [cost["tokens"] for cost in each["costs"]] == [1 << power for power in (10, 12, 14, 16, 18, 20)]
        assert [cost["extrapolated"] for cost in each["costs"]] == 4 * [False] + 2 * [True]  # beyond 65,536 tokens
        for cost in each["costs"]:
            growing = each["cache_bytes_per_token"] * cost["tokens"]
            assert cost["cache_bytes"] == growing + each["fixed_state_bytes"]
            assert cost["decode_flops"] > 0 and cost["decode_fp8_equivalent"] > 0
    for each in networks:
        measured = each["measured"]
        assert measured["tokens"] == 4096 and measured["measured"] == each["costs"][1]["cache_bytes"]
    assert ssa["measured"] is None and "assumption" in ssa["rule"] and "0.5 of its dense cost" in ssa["rule"]
    gqa = networks[-1]
    assert [cost["cache_bytes"] for cost in ssa["costs"]] == [cost["cache_bytes"] for cost in gqa["costs"]]
    assert ssa["costs"][-1]["decode_flops"] == pytest.approx(gqa["costs"][-1]["decode_flops"] / 2, rel=0.01)


def test_the_comparison_is_printed_and_drawn(capsys, tmp_path):
    path = tmp_path / "families.png"
    assert cli.main(["budget", *AGAINST, "--measure", "--figure", str(path)]) == 0
    printed = capsys.readouterr().out
    for text in (*NAMES, "SSA (assumption)", "0.0155 of its dense", "cache at 4,096 tokens", "+0.00%", str(path)):
        assert text in printed, text
    assert "…" not in printed and path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("model", "marked"), [("tiny", ["256K *", "1M *"]), ("v4-flash", [])])
def test_lengths_beyond_the_models_positions_are_marked(capsys, model, marked):
    assert cli.main(["budget", "--model", model, "--against", "gqa"]) == 0
    printed = capsys.readouterr().out
    headers = [line for line in printed.splitlines() if "network" in line and "1K" in line]
    assert len(headers) == 3
    for line in headers:
        assert [cell for each in re.split("[│┃]", line) if (cell := each.strip()).endswith("*")] == marked
    assert ("* extrapolation beyond the model's max_positions, 65,536 tokens" in printed) == bool(marked)


def test_a_family_fits_every_preset(capsys):
    for preset in PRESETS:
        found = answer(capsys, "--model", preset, "--against", "v32,mamba2,kimi,gqa", "--context", "1024")
        assert len(found["networks"]) == 6
        assert answer(capsys, "--model", preset, "--context", "1024")["parameters"]["total"] > 0


def test_the_recipe_says_whether_muon_is_used(capsys):
    arguments = ["--config", "configs/tiny.yaml", "--config", "configs/baseline.yaml"]
    assert not any(choice["used"] for choice in answer(capsys, *arguments)["without"])
    with_rule = answer(capsys, "--model", "tiny", "--train.optimizer.rule", "adamw")["without"]
    assert [choice["choice"] for choice in with_rule if not choice["used"]] == ["Muon"]


def test_tables_name_their_rules(capsys):
    assert cli.main(FLASH) == 0
    printed = capsys.readouterr().out
    for text in ("3,514.25", "13.68", "9.68", "50.12", "284,332,230,231", "FP4 index products x0.5", "4,096 bytes per"):
        assert text in printed, text
    assert "…" not in printed  # nothing is truncated


def test_a_reference_is_not_compared_with_itself(capsys):
    found = answer(capsys, "--model", "v3.2")
    assert [each["name"] for each in found["references"]] == ["GQA-8 (BF16)"]
    assert not any("V3.2" in regime["name"] for regime in found["regimes"])
    wider = answer(capsys, "--model", "v3.2", "--model.hidden_size", "8192")
    assert [each["name"] for each in wider["references"]] == ["V3.2 (MLA + DSA, FP8)", "GQA-8 (BF16)"]


def test_footnotes_of_the_crossovers_do_not_repeat_the_rows(capsys):
    assert cli.main(FLASH) == 0
    notes = capsys.readouterr().out.split("crossover lengths")[1].split("┘")[1].strip().splitlines()
    assert len(notes) == len(set(notes)) == 7
    assert not any("V3.2" in note or "GQA-8" in note for note in notes)


@pytest.mark.parametrize("model", ["v4-flash", "tiny"])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_figure_is_drawn(capsys, tmp_path, model, suffix):
    path = tmp_path / f"curves{suffix}"
    assert cli.main(["budget", "--model", model, "--figure", str(path)]) == 0
    assert f"figure: {path}" in capsys.readouterr().out
    head = path.read_bytes()[:100]
    assert head.startswith(b"\x89PNG") if suffix == ".png" else head.startswith(b"<?xml")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_model_without_a_growing_cache_is_no_error(capsys, tmp_path):
    arguments = ["--model", "tiny", "--model.layers", "[sliding, sliding]", "--figure", str(tmp_path / "windows.png")]
    found = answer(capsys, *arguments)
    assert found["references"][0]["times_own"]["cache_bytes_per_token"] is None
    assert cli.main(["budget", *arguments]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "v5"], "--model: 'v5' is no preset (tiny, tiny-v32, tiny-mamba2, "),
        (["--model", "depth:3"], "model.depth: expected a whole number from 4 to 61, found 3"),
        (["--model", "depth:x"], "model.depth: expected a whole number from 4 to 61, found 'x'"),
        (["--model", "tests"], "tests/config.json: No such file or directory"),
        (["--model", "tiny", "--config", "configs/tiny.yaml"], "--model: names a model beside --config"),
        (["--model", "tiny", "--model.preset", "base"], "--model tiny is already a starting point"),
        (["--model", "tiny", "--model.family", "v32"], "--model tiny is already a starting point"),
        (["--model", "depth:8", "--model.depth", "9"], "--model depth:8 is already a starting point"),
        (["--model", "depth:8", "--model.family", "v5"], "model.family: expected one of v4, v32, mamba2, kimi, gqa,"),
        (
            ["--model", "depth:28", "--model.family", "kimi"],
            "model.depth: expected a whole number from 4 to 27 for",
        ),
        (["--config", "configs/tiny.yaml", "--model.family", "kimi"], "model.family: 'kimi' is scaled by depth"),
        (["--model", "tiny", "--against", "v32,v5"], "--against: 'v5' is not one of v32, mamba2, kimi, gqa"),
        (["--model", "tiny", "--against", "ssa"], "v32, mamba2, kimi, gqa; SSA is in every comparison"),
        (["--model", "tiny", "--against", "v4"], "--against: 'v4' is not one of v32, mamba2, kimi, gqa"),
        (["--model", "tiny", "--against", ""], "--against: '' is not one of v32, mamba2, kimi, gqa"),
        (["--model", "tiny", "--against", "gqa,v32,gqa"], "--against: has the value 'gqa' twice"),
        (["--model", "tiny", "--ssa-density", "0.1"], "--ssa-density: changes nothing without --against"),
        (
            ["--model", "tiny", "--against", "gqa", "--ssa-density", "0"],
            "--ssa-density: expected a number above 0 and at most 1, found '0'",
        ),
        (
            ["--model", "tiny", "--against", "gqa", "--ssa-density", "nan"],
            "--ssa-density: expected a number above 0 and at most 1, found 'nan'",
        ),
        (
            ["--model", "v4-pro", "--against", "gqa", "--measure", "--context", "1048576"],
            "--measure: GQA (BF16): a cache of 1,048,576 tokens takes",
        ),
        (["--model", "tiny", "--model.windw", "3"], "model.windw: unknown key; did you mean 'window'?"),
        (["--model", "tiny", "--model.layers", "[csa"], "model.layers: '[csa' is not one of sliding"),
        (["--model", "v4-pro", "--context", "0"], "--context: must be at least 1 token, found 0"),
        (
            ["--model", "v4-pro", "--context", "1048577"],
            "--context: 1048577 tokens exceed the model's max_positions of 1048576",
        ),
        (["--context", "1M"], "--context: expected a whole number of tokens, found '1M'"),
        (["--figure", "curves.txt"], "--figure: curves.txt: expected a name that ends in .png, .svg, .pdf"),
        (["--figure", "nowhere/curves.png"], "--figure: nowhere/curves.png: no such folder as nowhere"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["stray"], "command line: 'stray' is neither an option nor --section.key value"),
    ],
)
def test_budget_user_errors_are_one_sentence(arguments, message, capsys):
    assert cli.main(["budget", *arguments]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
    assert len(captured.err.strip().splitlines()) == 1


def test_a_figure_cannot_take_a_folders_place(tmp_path, capsys):
    (tmp_path / "curves.png").mkdir()
    assert cli.main([*FLASH, "--figure", str(tmp_path / "curves.png")]) == cli.USER_ERROR
    assert "curves.png: is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["model:\n", "model: 3\n", "- 1\n", "window: 0\n"])
def test_a_model_file_that_holds_no_model(content, tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(content)
    assert cli.main(["budget", "--model", str(tmp_path / "m.yaml")]) == cli.USER_ERROR
    assert "m.yaml" in capsys.readouterr().err


def test_other_steps_know_nothing_of_its_options(capsys):
    assert cli.main(["train", "--context", "5"]) == cli.USER_ERROR
    assert "'--context' is neither an option nor --section.key value" in capsys.readouterr().err


def test_lengths_are_written_in_powers_of_1024():
    assert [binary(n) for n in (12, 1024, 32_512, 1 << 20, 3 << 19)] == ["12", "1K", "31.8K", "1M", "1.5M"]


def test_a_recipe_brings_its_optimizer(capsys):
    assert cli.main(["budget", "--model", "configs/baseline.yaml", "--context", "256", "--json"]) == 0
    without = {choice["choice"]: choice for choice in json.loads(capsys.readouterr().out)["without"]}
    assert without["Muon"]["used"] is False

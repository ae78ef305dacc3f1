"""Cache measurement: the budget step's option, and the benchmark at a small size."""

import json
import subprocess
import sys

import psutil
import pytest

from benchmarks import cache_at_a_million
from model.config import ModelConfig
from model.costs import cache_bytes
from model.errors import CacheError, FiftyfoldError
from pipelines import __main__ as cli
from pipelines.reports.cache_measurement import measure_cache


@pytest.mark.parametrize("formats", [{}, {"kv_format": "bf16", "index_format": "fp8"}])
def test_storages_are_the_closed_form_and_resident_memory_follows(formats):
    tokens = 1 << 18
    # In its own process, since other threads of this one allocate too.
    command = [sys.executable, "-m", "pipelines", "budget", "--model", "small", "--context", str(tokens)]
    overrides = [text for key, value in formats.items() for text in (f"--model.{key}", value)]
    output = subprocess.run([*command, *overrides, "--measure", "--json"], check=True, capture_output=True).stdout
    found = json.loads(output)["measured"]
    expected = cache_bytes(ModelConfig.from_preset("small", **formats), tokens)
    assert found["measured"] == found["closed_form"] == expected > 30e6
    assert found["resident"] == pytest.approx(expected, rel=0.05)
    assert set(found["components"]) == {"csa", "hca", "index", "window", "tail"}


def test_half_filled_pages_count_whole():
    found = measure_cache(ModelConfig.from_preset("small"), 129)
    entry = 112 + 2 * 16 + 2  # FP8, BF16 and two scales, in each of three layers
    assert found.components["csa"] == (3 * entry * 256 / 4, 3 * entry * 129 / 4)
    assert found.components["window"][0] == found.components["window"][1]


def test_the_step_prints_what_was_measured(capsys):
    arguments = ["budget", "--model", "small", "--context", "65536", "--measure"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = found["measured"]
    assert measured["tokens"] == found["context"] == 65_536 and measured["rule"]
    assert measured["measured"] == measured["closed_form"] == found["own"]["cache_bytes"]
    by_component = found["own"]["cache_bytes_per_token_by_component"]
    assert measured["components"]["index"]["closed_form"] == 65_536 * by_component["index"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for text in ("cache, measured", f"{measured['measured']:,}", "resident memory", "+0.00%"):
        assert text in printed, text


def test_nothing_is_measured_unasked(capsys):
    assert cli.main(["budget", "--model", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] is None


WIDE = {"layers": ("gqa",) * 61, "num_heads": 128, "num_kv_heads": 64, "head_dim": 4096}  # 64 TB at a million tokens


def test_a_cache_beyond_the_machine_is_refused_before_it_is_allocated(capsys):
    config = ModelConfig.from_preset("v4-pro", **WIDE)
    before = psutil.Process().memory_info().rss
    message = "a cache of 1,048,576 tokens takes 67,070,209,294,336 bytes, and filling it up to 335,544,320 more, but "
    with pytest.raises(CacheError, match=message):
        measure_cache(config, 1 << 20)
    assert psutil.Process().memory_info().rss - before < 1 << 26
    overrides = [item for key, value in WIDE.items() for item in (f"--model.{key}", json.dumps(value))]
    assert cli.main(["budget", "--model", "v4-pro", *overrides, "--measure"]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out and len(captured.err.strip().splitlines()) == 1


def test_the_benchmark_writes_its_tables_and_figure(tmp_path, capsys):
    report = tmp_path / "cache.md"
    report.write_text("before\n<!-- table -->\n<!-- end of table -->\nafter\n")
    small = ["--preset", "small", "--tokens", "262144", "--gqa-tokens", "8192", "--within", "5"]
    cache_at_a_million.main([*small, "--write", str(report)])
    text = report.read_text()
    printed = capsys.readouterr().out
    assert text.startswith("before\n<!-- table -->\n<!-- machine: ")
    assert text.endswith("\n<!-- end of table -->\nafter\n") and printed.strip() in text
    total = cache_bytes(ModelConfig.from_preset("small"), 262_144)
    assert f"| {total / 1e6:,.2f} | {total / 1e6:,.2f} | +0.000% |" in text
    assert "| 32,768.00 |" in text and f"| {8 * 4096 * 262_144 / total:.1f} |" in text
    (figure,) = tmp_path.glob("cache-*.png")
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.name in text
    with pytest.raises(FiftyfoldError, match="off its closed form, more than"):
        cache_at_a_million.main(["--preset", "small", "--tokens", "16384", "--gqa-tokens", "512", "--within", "0"])

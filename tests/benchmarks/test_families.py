"""The comparison of families, a step per stage."""

import pytest

from benchmarks import families
from model.errors import ConfigError


@pytest.mark.parametrize(
    ("names", "rates"), [(["v32"], ["1"]), pytest.param(["mamba2", "v32"], ["1", "2"], marks=pytest.mark.long)]
)
def test_a_quick_run_writes_a_row_per_family(names, rates, tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("a river that flows to the sea, " * 4000)
    arguments = ["--quick", "--families", *names, "--seeds", "0", "--rates", *rates, "--threads", "1"]
    settings = [f"run.folder={tmp_path / 'runs'}", f"data.sources=[{source}]", "train.autocast=none"]
    text = families.main([*arguments, "--set", *settings])
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines() if " | " in line}
    assert set(names) <= rows.keys()
    assert rows["v32"][1:5] == ["1,211,008", "883,072", "800.0", "800.0"]
    assert rows["v32"][5] in rates and float(rows["v32"][-1].rstrip(" |")) > 0
    runs = sorted(path.name for path in (tmp_path / "runs").glob("families-*"))
    assert runs == [f"families-{name}-{rate}-seed0" for name in names for rate in rates]


@pytest.mark.parametrize("arguments", [["--quick"], ["--families", "v32"]])
def test_a_page_holds_all_families_in_full(arguments, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table -->\n<!-- end of table -->\n")
    with pytest.raises(ConfigError, match=r"^--write: a page contains all families, trained in full"):
        families.main([*arguments, "--write", str(page)])

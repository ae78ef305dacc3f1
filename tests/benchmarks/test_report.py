"""A user's mistake, and sizes beyond the memory, end a script with one sentence."""

import pytest
import torch

from benchmarks.report import check_page, command_line
from model.errors import FiftyfoldError


def test_sizes_beyond_the_memory_are_named():
    with pytest.raises(SystemExit, match="error: these sizes do not fit into memory: 1,048,576 GiB were asked for"):
        command_line(lambda: torch.empty(1 << 50, dtype=torch.uint8))


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="shape"):
        command_line(lambda: torch.zeros(2).view(3))


def test_a_page_is_looked_at_before_the_work(tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(FiftyfoldError, match=r"page\.md: there is no such file to put the table into"):
        check_page(page)
    page.write_text("no markers")
    with pytest.raises(FiftyfoldError, match="expected a Markdown file with the lines"):
        check_page(page)

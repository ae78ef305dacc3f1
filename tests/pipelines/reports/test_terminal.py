"""Tables and progress bars on the terminal."""

import io

import pytest
from rich.console import Console

from pipelines.reports import terminal

HOSTILE = ["/tmp/x/[/b]", "runs [v2]", "[red]x[/red]", ":smile:", "[link=http://x]", "[/]", "a\\[b]"]


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_print_brackets_and_colons_as_they_are(capsys, text):
    terminal.print_table(f"{text} title", [f"{text} column", "b"], [[f"{text} cell", text]])
    printed = capsys.readouterr().out
    for part in ("title", "column", "cell"):
        assert f"{text} {part}" in printed


@pytest.mark.parametrize("text", HOSTILE)
def test_progress_bars_print_names_as_they_are(monkeypatch, text):
    screen = io.StringIO()
    shown = terminal.console
    monkeypatch.setattr(shown, "file", screen)
    monkeypatch.setattr(shown, "_force_terminal", True)
    monkeypatch.setattr(shown, "_width", 160)
    assert isinstance(shown, Console) and shown.is_terminal
    with terminal.TrainingProgress(text, 10) as progress:
        progress.update(10, {"train/loss": 1.5}, reported=True)
    assert text in screen.getvalue()


def test_a_title_longer_than_its_table_stays_on_one_line(capsys):
    title = "a title of many words that is much wider than the table below it"
    terminal.print_table(title, ["a", "b"], [["1", "2"]])
    assert title in capsys.readouterr().out.splitlines()


def test_a_line_has_the_metrics_of_its_step(capsys):
    progress = terminal.TrainingProgress("a", 8)
    progress.update(2, {}, reported=True)
    progress.update(4, {"train/loss": 3.0, "validation/loss": 2.0}, reported=True)
    progress.update(6, {"train/loss": 1.0}, reported=True)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "a: step 2/8"
    assert "validation loss 2.000" in second
    assert "loss 1.000" in third and "validation" not in third, "the loss of an earlier step"

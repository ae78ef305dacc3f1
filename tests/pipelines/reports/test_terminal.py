"""Tables on the terminal."""

from __future__ import annotations

from pipelines.reports.terminal import print_table


def test_a_title_longer_than_its_table_stays_on_one_line(capsys):
    title = "a title of many words that is much wider than the table below it"
    print_table(title, ["a", "b"], [["1", "2"]])
    assert title in capsys.readouterr().out.splitlines()

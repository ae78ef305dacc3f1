"""Pages with one section per machine, and error messages of scripts."""

import socket

import pytest
import torch

from benchmarks.lib import harness, machine
from benchmarks.lib.harness import Result, make_parser, run_benchmark, run_main
from benchmarks.lib.machine import BackgroundLoad
from benchmarks.lib.report import BEGIN, END, Page, table
from model.errors import FiftyfoldError
from model.machine import Machine


@pytest.fixture()
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    return Page(path)


def test_a_page_keeps_one_section_per_machine(page):
    page.replace_section("A; AVX2", "## A\n\nfirst\n")
    page.replace_section("B; AVX2, AMX", "## B\n\nother\n")
    page.replace_section("A; AVX2", "## A\n\nagain")
    assert page.sections() == {"A; AVX2": "## A\n\nagain\n", "B; AVX2, AMX": "## B\n\nother\n"}
    content = page.path.read_text()
    assert content.startswith(f"before\n{BEGIN}\n<!-- machine: A; AVX2 -->\n## A\n")
    assert content.endswith(f"other\n{END}\nafter\n") and "first" not in content


def test_text_before_the_first_section_is_kept(page):
    page.path.write_text(f"{BEGIN}\nwithout a machine\n{END}\n")
    page.replace_section("A", table(["a", "b"], [(1, 2)]))
    assert page.path.read_text() == (
        f"{BEGIN}\nwithout a machine\n<!-- machine: A -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n{END}\n"
    )


def test_a_page_is_checked_before_measuring(tmp_path):
    path = tmp_path / "page.md"
    calls = []
    with pytest.raises(FiftyfoldError, match=r"page\.md: no such file"):
        run_benchmark(make_parser(None), calls.append, ["--write", str(path)])
    path.write_text("no markers")
    with pytest.raises(FiftyfoldError, match="expected a Markdown file with the lines"):
        run_benchmark(make_parser(None), calls.append, ["--write", str(path)])
    assert not calls and path.read_text() == "no markers"


def test_a_run_replaces_its_machines_section_only(page, monkeypatch):
    machines = {"a": Machine("A", ("AVX2",)), "b": Machine("B", ("AVX2", "AMX"), ("ATEN_CPU_CAPABILITY=avx2",))}
    for which, tables in (("a", "1"), ("b", "2"), ("a", "3")):
        monkeypatch.setattr(harness.Machine, "here", lambda device, which=which: machines[which])
        run_benchmark(
            make_parser(None, threads=[1, 2]), lambda o, tables=tables: Result(tables), ["--write", str(page.path)]
        )
    sections = page.sections()
    assert list(sections) == ["A; AVX2", "B; AVX2, AMX; ATEN_CPU_CAPABILITY=avx2"]
    assert [text.rstrip()[-1] for text in sections.values()] == ["3", "2"]
    assert "; 1 and 2 threads; other processes used" in sections["A; AVX2"]


def test_the_load_is_left_out_where_no_result_depends_on_it(capsys):
    for has_times in (True, False):
        run_benchmark(make_parser(None, threads=1), lambda o, has_times=has_times: Result("1", has_times=has_times), [])
        about = capsys.readouterr().out.splitlines()[2]
        assert ("other processes" in about) == has_times
        assert about.endswith("." if has_times else "; 1 thread.")


def test_a_figure_is_named_after_the_machine(page, monkeypatch):
    from benchmarks.lib.drawing import log_log

    monkeypatch.setattr(harness.Machine, "here", lambda device: Machine("Some CPU (R)", ("AVX-512", "VNNI")))
    figure = log_log({"a": {1024: 1.0, 4096: 2.0}}, "ms", "title")
    run_benchmark(make_parser(None), lambda o: Result("table\n", figure, "Caption"), ["--write", str(page.path)])
    assert "\n![Caption](page-some-cpu-avx-512-vnni.png)\n" in page.path.read_text()
    assert page.path.with_name("page-some-cpu-avx-512-vnni.png").stat().st_size > 1000


def test_the_host_name_is_not_published():
    assert "cores" in machine.system_info() and "torch" in machine.system_info()
    assert socket.gethostname() not in machine.system_info() + Machine.here().title
    assert 0 <= BackgroundLoad().fraction() <= 1


def test_out_of_memory_is_reported():
    with pytest.raises(SystemExit, match="error: out of memory: these sizes need an allocation of 1,048,576 GiB"):
        run_main(lambda: torch.empty(1 << 50, dtype=torch.uint8))


def test_other_errors_propagate():
    with pytest.raises(RuntimeError, match="shape"):
        run_main(lambda: torch.zeros(2).view(3))


def test_a_user_error_exits_with_one_sentence():
    def main() -> str:
        raise FiftyfoldError("invalid")

    with pytest.raises(SystemExit, match="error: invalid"):
        run_main(main)


def test_a_measurement_of_servers_names_no_thread_count() -> None:
    text = run_benchmark(make_parser(None), lambda o: Result("table\n", has_servers=True), [])
    assert "thread" not in text and "other processes, servers included, used" in text

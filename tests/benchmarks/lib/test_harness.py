"""A page keeps one section per machine; a user's mistake, and sizes beyond the memory, end a script with a sentence."""

import socket

import pytest
import torch

from benchmarks.lib import harness, machine
from benchmarks.lib.harness import Findings, benchmark, command_line, options_of
from benchmarks.lib.machine import Machine, OtherLoad
from benchmarks.lib.report import BEGIN, END, Page, table
from model.errors import FiftyfoldError

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3.00GHz
flags\t\t: fpu avx2 avx512f avx512_vnni
"""


@pytest.fixture()
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    return Page(path)


def test_machines_stand_beside_one_another(page):
    page.put("A; AVX2", "## A\n\nfirst\n")
    page.put("B; AVX2, AMX", "## B\n\nother\n")
    page.put("A; AVX2", "## A\n\nagain")
    assert page.sections() == {"A; AVX2": "## A\n\nagain\n", "B; AVX2, AMX": "## B\n\nother\n"}
    content = page.path.read_text()
    assert content.startswith(f"before\n{BEGIN}\n<!-- machine: A; AVX2 -->\n## A\n")
    assert content.endswith(f"other\n{END}\nafter\n") and "first" not in content


def test_text_before_the_first_section_stays(page):
    page.path.write_text(f"{BEGIN}\nwithout a machine\n{END}\n")
    page.put("A", table(["a", "b"], [(1, 2)]))
    assert page.path.read_text() == (
        f"{BEGIN}\nwithout a machine\n<!-- machine: A -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n{END}\n"
    )


def test_a_page_is_looked_at_before_the_work(tmp_path):
    path = tmp_path / "page.md"
    worked = []
    with pytest.raises(FiftyfoldError, match=r"page\.md: there is no such file to put the table into"):
        benchmark(options_of(None), worked.append, ["--write", str(path)])
    path.write_text("no markers")
    with pytest.raises(FiftyfoldError, match="expected a Markdown file with the lines"):
        benchmark(options_of(None), worked.append, ["--write", str(path)])
    assert not worked and path.read_text() == "no markers"


def test_a_run_replaces_the_section_of_its_machine_only(page, monkeypatch):
    machines = {"a": Machine("A", ("AVX2",)), "b": Machine("B", ("AVX2", "AMX"), ("ATEN_CPU_CAPABILITY=avx2",))}
    for which, found in (("a", "1"), ("b", "2"), ("a", "3")):
        monkeypatch.setattr(harness.Machine, "here", lambda device, which=which: machines[which])
        benchmark(options_of(None, threads=[1, 2]), lambda o, found=found: Findings(found), ["--write", str(page.path)])
    sections = page.sections()
    assert list(sections) == ["A; AVX2", "B; AVX2, AMX; ATEN_CPU_CAPABILITY=avx2"]
    assert [text.rstrip()[-1] for text in sections.values()] == ["3", "2"]
    assert "; 1 and 2 threads; other processes used" in sections["A; AVX2"]


def test_a_figure_is_named_after_the_machine(page, monkeypatch):
    from benchmarks.lib.drawing import log_log

    monkeypatch.setattr(harness.Machine, "here", lambda device: Machine("Some CPU (R)", ("AVX-512", "VNNI")))
    figure = log_log({"a": {1024: 1.0, 4096: 2.0}}, "ms", "title")
    benchmark(options_of(None), lambda o: Findings("table\n", figure, "What it shows"), ["--write", str(page.path)])
    assert "\n![What it shows](page-some-cpu-avx-512-vnni.png)\n" in page.path.read_text()
    assert page.path.with_name("page-some-cpu-avx-512-vnni.png").stat().st_size > 1000


def test_a_machine_is_its_processor_with_instruction_sets_and_masks(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    here = Machine.here()
    assert here.title == "Some CPU @ 3.00GHz; AVX2, AVX-512, VNNI; ONEDNN_MAX_CPU_ISA=AVX2"
    assert here.slug == "some-cpu-3-00ghz-avx2-avx-512-vnni-onednn-max-cpu-isa-avx2"


def test_a_machine_is_named_by_its_parts_only():
    assert "cores" in machine.surroundings() and "torch" in machine.surroundings()
    assert socket.gethostname() not in machine.surroundings() + Machine.here().title
    assert 0 <= OtherLoad().share() <= 1


def test_sizes_beyond_the_memory_are_named():
    with pytest.raises(SystemExit, match="error: these sizes do not fit into memory: 1,048,576 GiB were asked for"):
        command_line(lambda: torch.empty(1 << 50, dtype=torch.uint8))


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="shape"):
        command_line(lambda: torch.zeros(2).view(3))


def test_a_mistake_ends_a_script_with_one_sentence():
    def main() -> str:
        raise FiftyfoldError("it is wrong")

    with pytest.raises(SystemExit, match="error: it is wrong"):
        command_line(main)

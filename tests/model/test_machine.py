"""The description of the processor."""

from model import machine
from model.machine import Machine

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3.00GHz
flags\t\t: fpu avx2 avx512f avx512_vnni
"""


def test_title_has_processor_instruction_sets_and_masks(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    here = Machine.here()
    assert here.title == "Some CPU @ 3.00GHz; AVX2, AVX-512, VNNI; ONEDNN_MAX_CPU_ISA=AVX2"
    assert here.slug == "some-cpu-3-00ghz-avx2-avx-512-vnni-onednn-max-cpu-isa-avx2"

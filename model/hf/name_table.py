"""Tables of tensor names, for families with one layout of names besides that of stacked experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Size

from model.hf.tensors import Layout, Source, TensorSlice, split_name

Shape = tuple[int, ...]
SHAPES: dict[str, Callable[[Shape], Shape]] = {
    "same": lambda shape: shape,
    "filters": lambda shape: (shape[0], 1, shape[1]),  # of a grouped convolution
    "heads": lambda shape: (1, 1, *shape, 1),
}
"""Shapes on disk by ours."""
Pieces = Mapping[str, list[tuple[str, int, str]]]
"""Name, rows and shape (:data:`SHAPES`) of the tensors that hold one of ours, by its name within a layer."""
_EXPERT_STACKS = ("ffn.w1", "ffn.w3", "ffn.w2")


def parse_names(text: str) -> dict[str, tuple[str, str]]:
    """Parse lines of our name, the published name and, unless it is ``same``, a key of :data:`SHAPES`. A final dot
    stands for ``.weight``."""
    found = {}
    for line in text.strip().splitlines():
        ours, theirs, *shape = line.split()
        names = (word + "weight" if word.endswith(".") else word for word in (ours, theirs))
        ours, theirs = names
        found[ours] = theirs, shape[0] if shape else "same"
    return found


def _split(base: str, ours: str, shape: Shape, pieces: list[tuple[str, int, str]]) -> list[Source]:
    found, start = [], 0
    for name, rows, kind in pieces:
        part = TensorSlice(ours, our_rows=(start, start + rows))
        found.append(Source(base + name, SHAPES[kind]((rows, *shape[1:])), "fp32", (part,)))
        start += rows
    return found


@dataclass(frozen=True)
class NameTable:
    """The published names of a network's tensors."""

    model: dict[str, tuple[str, str]]
    """Tensors outside the layers."""
    block: dict[str, tuple[str, str]]
    """Tensors of a layer, without its prefix."""
    block_prefix: str
    """Prefix of a layer, with ``N`` for its number."""
    experts: str = ""
    """Prefix of a layer's routed experts."""
    expert_weights: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of one expert's w1, w3 and w2."""

    def sources(self, shapes: dict[str, Size], layout: Layout, pieces: Pieces | None = None) -> dict[str, Source]:
        """Return all tensors by name. In the layout ``modules``, a layer's experts are stacked.

        ``pieces`` lists our tensors whose rows are stored as several tensors.
        """
        found: dict[str, Source] = {}
        for ours, shape in shapes.items():
            for source in self._sources_of(ours, tuple(shape), layout, pieces or {}):
                found[source.name] = source
        return found

    def _sources_of(self, ours: str, shape: Shape, layout: Layout, pieces: Pieces) -> list[Source]:
        prefix, leaf = split_name(ours)
        theirs = self.block_prefix.replace("N", prefix.removeprefix("layers.").removesuffix("."))
        if leaf in _EXPERT_STACKS:
            return self._experts(theirs + self.experts, ours, leaf, shape, layout)
        if leaf in pieces:
            return _split(theirs, ours, shape, pieces[leaf])
        try:
            name, kind = self.block[leaf] if prefix else self.model[leaf]
        except KeyError:
            raise KeyError(f"tensor '{ours}' has no published name") from None
        return [Source((theirs if prefix else "") + name, SHAPES[kind](shape), "fp32", (TensorSlice(ours),))]

    def _experts(self, base: str, ours: str, leaf: str, shape: Shape, layout: Layout) -> list[Source]:
        experts, rows, columns = shape
        if layout != "modules":
            name = self.expert_weights[_EXPERT_STACKS.index(leaf)]
            return [
                Source(f"{base}{e}.{name}.weight", (rows, columns), "fp4", (TensorSlice(ours, expert=e),))
                for e in range(experts)
            ]
        if leaf == "ffn.w2":
            return [Source(f"{base}down_proj", shape, "fp4", (TensorSlice(ours),))]
        if leaf == "ffn.w3":
            return []  # part of gate_up_proj
        both = (TensorSlice(ours, rows=(0, rows)), TensorSlice(ours[:-1] + "3", rows=(rows, 2 * rows)))
        return [Source(f"{base}gate_up_proj", (experts, 2 * rows, columns), "fp4", both)]

"""Packed rows: results for each document equal those of the document alone."""

import pytest
import torch
import torch.nn.functional as F

from model.forward.aux_outputs import AuxOutputs
from model.forward.packing import PackedDocuments
from tests.model.networks import EXACT, build

# Lengths around the ratios (4 and 12) and the window (6), shorter than all of them, and without a complete block.
LENGTHS = ((17, 1, 4, 29, 3), (3, 2, 1), (12, 11, 13), (40,), (1, 1, 24, 6, 7, 5))
# Unquantized: sums of other shapes round differently, and quantization would amplify the difference.


def pack(rows, width, vocab=50, seed=0):
    """Return documents of each row, IDs [B, width] and positions [B, width] for lists of lengths."""
    generator = torch.Generator().manual_seed(seed)
    documents = [[torch.randint(0, vocab, (n,), generator=generator) for n in lengths] for lengths in rows]
    ids = torch.randint(0, vocab, (len(rows), width), generator=generator)  # random padding
    positions = torch.full((len(rows), width), -1)
    for row, parts in enumerate(documents):
        tokens = torch.cat(parts)
        ids[row, : len(tokens)] = tokens
        positions[row, : len(tokens)] = torch.cat([torch.arange(len(part)) for part in parts])
    return documents, ids, positions


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize(
    "layers",
    [
        ("sliding",),
        ("csa",),
        ("hca",),
        ("gqa",),
        ("mla",),
        ("dsa",),
        ("mamba2",),
        ("kda",),
        ("sliding", "csa", "hca", "csa"),
        ("dsa", "csa"),
        ("kda", "csa", "hca", "mamba2"),
    ],
)
def test_every_document_comes_out_as_if_alone(layers, attention):
    model = build(layers=layers, mtp_layers=1, **EXACT)
    documents, ids, positions = pack(LENGTHS, width=60)
    packed = AuxOutputs(predict_ahead=True)
    with torch.inference_mode():
        logits = model(ids, positions=positions, attention=attention, aux=packed)
        assert logits.isfinite().all()
        for row, parts in enumerate(documents):
            start = 0
            for part in parts:
                end = start + len(part)
                alone = AuxOutputs(predict_ahead=len(part) > 1)
                expected = model(part[None], attention=attention, aux=alone)
                torch.testing.assert_close(logits[row : row + 1, start:end], expected, rtol=1e-4, atol=3e-5)
                if len(part) > 1:
                    ahead = packed.mtp_logits[row : row + 1, start : end - 1]
                    torch.testing.assert_close(ahead, alone.mtp_logits, rtol=1e-4, atol=3e-5)
                start = end


@pytest.mark.parametrize(("layers", "ratio"), [(("sliding", "csa", "hca", "csa"), 4), (("mla", "dsa"), 1)])
def test_gradients_and_auxiliary_losses_are_those_of_the_documents_alone(layers, ratio):
    model = build(layers=layers, **EXACT).train()
    documents, ids, positions = pack(LENGTHS, width=60)

    def gradients():
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    aux = AuxOutputs()
    logits = model(ids, positions=positions, aux=aux)
    counted = positions >= 0
    F.cross_entropy(logits[counted], ids[counted], reduction="sum").backward()
    together = gradients()
    kl = aux.losses["indexer_kl"][1].item()
    divergence = queries = 0
    loads = {layer: torch.zeros_like(load) for layer, load in aux.expert_load.items()}
    for part in (part for parts in documents for part in parts):
        alone = AuxOutputs()
        F.cross_entropy(model(part[None], aux=alone)[0], part, reduction="sum").backward()
        for layer, load in alone.expert_load.items():
            loads[layer] += load
        n = max(0, len(part) - ratio + 1)  # queries that see an entry
        if n:
            divergence += alone.losses["indexer_kl"][1].item() * n
            queries += n
    apart = gradients()
    assert apart.keys() == together.keys()
    for name, gradient in apart.items():
        torch.testing.assert_close(
            together[name], gradient, rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert len(loads) == len(model.layers)
    assert all(torch.equal(load, aux.expert_load[layer]) for layer, load in loads.items())
    assert kl == pytest.approx(divergence / queries, rel=1e-4)


def test_padding_takes_part_in_no_loss():
    model = build(**EXACT).train()
    _, ids, positions = pack(((30, 11),), width=60)
    losses = []
    for padding in (0, 17):
        aux = AuxOutputs()
        model(torch.where(positions < 0, padding, ids), positions=positions, aux=aux)
        losses.append([aux.loss("balance").item(), aux.loss("indexer_kl").item()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # padding changes the shapes of experts' products


def test_one_document_a_row_is_the_plain_forward():
    model = build(**EXACT)
    ids = torch.randint(0, 50, (2, 41))
    positions = torch.arange(41).expand(2, -1)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, positions=positions), model(ids), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize(
    "positions, message",
    [
        ([[0, 1, 3]], r"positions\[0, 2\]: expected 0 \(a new document\), -1 \(padding\) or 2, found 3"),
        ([[0, 1, 2], [1, 2, 3]], r"positions\[1, 0\].*or 0, found 1"),
        ([[0, -1, 1]], r"positions\[0, 2\].*or 0, found 1"),
        ([[0, -2, 0]], r"positions\[0, 1\].*or 1, found -2"),
    ],
)
def test_positions_that_skip_are_named(positions, message):
    with pytest.raises(ValueError, match=message):
        PackedDocuments(torch.tensor(positions))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_positions_of_another_type_are_refused(dtype):
    positions = torch.zeros(1, 3, dtype=dtype)
    with pytest.raises(ValueError, match=rf"positions: expected int64 \[1, 3\], found {dtype} \[1, 3\]"):
        build()(torch.zeros(1, 3, dtype=torch.int64), positions=positions)

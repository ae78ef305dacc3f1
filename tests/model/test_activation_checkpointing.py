"""Activation checkpointing: equal training results with less memory."""

import pytest
import torch
import torch.nn.functional as F

from kernels import hyper_connections
from kernels.hyper_connections import recomputed_streams
from model.forward.aux_outputs import AuxOutputs
from tests.model.networks import build

LAYERS = ("kda", "csa", "hca", "mamba2")


def objective(model, ids, positions, attention):
    aux = AuxOutputs(predict_ahead=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], positions=positions, attention=attention, aux=aux)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    ahead = F.cross_entropy(aux.mtp_logits.flatten(0, 1), ids[:, 2:].flatten())
    return loss + ahead + aux.loss("indexer_kl") + aux.loss("balance"), aux


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_recomputation_changes_no_gradient_or_count(attention):
    ids = torch.randint(50, (2, 49), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(20), torch.arange(28))).repeat(2, 1)
    found = []
    for recompute in (False, True):
        model = build(layers=LAYERS, num_hash_layers=1, mtp_layers=1).train()
        model.activation_checkpointing = recompute
        loss, aux = objective(model, ids, positions, attention)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss, gradients, aux.rounded, list(aux.expert_load.values())))
    (loss, kept, rounded, loads), (again, made, rounded_again, loads_again) = found
    assert torch.equal(loss, again) and kept.keys() == made.keys()
    for name in kept:
        assert torch.equal(kept[name], made[name]), name
    assert rounded == rounded_again and sum(rounded.values())
    assert all(map(torch.equal, loads, loads_again)) and loads[0].sum() > 0


def test_recomputation_reports_no_auxiliary_outputs():
    """Aux outputs of the recomputed pass would keep its activations until the end of the step."""
    model = build(layers=LAYERS).train()
    model.activation_checkpointing = True
    ids = torch.randint(50, (2, 49), generator=torch.Generator().manual_seed(1))
    aux = AuxOutputs()
    logits = model(ids[:, :-1], aux=aux)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + aux.loss("indexer_kl")
    reported = [*aux.losses["indexer_kl"].values(), *aux.losses["balance"].values()]
    loss.backward()
    left = [*aux.losses["indexer_kl"].values(), *aux.losses["balance"].values()]
    assert reported and all(a is b for a, b in zip(left, reported, strict=True))


@pytest.mark.parametrize(("recompute", "products"), [(False, 1), (True, 2)])
def test_streams_between_the_halves_of_a_layer_are_recomputed(monkeypatch, recompute, products):
    """Products of a layer in the backward pass. A recomputed layer recomputes all its streams once."""
    model = build(layers=LAYERS).train()
    model.activation_checkpointing = recompute
    assert all(block.recompute_streams != recompute for block in model.layers)  # mutually exclusive
    logits = model(torch.randint(50, (1, 16)))
    made = []
    expand = hyper_connections.hc_post
    monkeypatch.setattr(
        recomputed_streams.hyper_connections, "hc_post", lambda *given: made.append(given) or expand(*given)
    )
    monkeypatch.setattr("model.layers.hyper_connections.hc_post", hyper_connections.hc_post)
    logits.sum().backward()
    assert len(made) == products * len(LAYERS)


def test_only_the_inputs_of_layers_are_saved():
    """Bytes saved for the backward pass by the layers once and twice."""
    ids = torch.randint(50, (1, 97))

    def held(layers, recompute):
        model = build(layers=layers).train()
        model.activation_checkpointing = recompute
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(ids[:, :-1])
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, (size, _) in kept.items() if pointer not in weights)

    streams = 4 * 96 * 4 * 32  # float32 [1, 96, 4 streams, 32]
    for recompute in (False, True):
        more = held(LAYERS * 2, recompute) - held(LAYERS, recompute)
        assert (more < (len(LAYERS) + 0.5) * streams) == recompute, more / streams

"""The multi-token prediction module: inputs, training, and decoding without it."""

import pytest
import torch
import torch.nn.functional as F

from kernels.rms_norm import rms_norm
from model import checkpoint
from model.config import ModelConfig
from model.errors import ConfigError
from model.forward.aux_outputs import AuxOutputs
from model.optim import MuonAdamW, OptimizerConfig
from model.transformer import Transformer
from tests.model.networks import EXACT, SMALL, build


def ahead(model, ids):
    aux = AuxOutputs(predict_ahead=True)
    logits = model(ids, aux=aux)
    return logits, aux.mtp_logits


def test_it_sees_up_to_the_next_token_and_no_further():
    model = build(mtp_layers=1, **EXACT)
    ids = torch.randint(0, 50, (1, 40))
    with torch.inference_mode():
        _, before = ahead(model, ids)
        assert before.shape == (1, 39, 50)
        for place in (1, 5, 12, 30, 39):
            changed = ids.clone()
            changed[0, place] = (changed[0, place] + 7) % 50
            _, after = ahead(model, changed)
            # The changed token may be routed to another expert, which changes the shape of a product.
            torch.testing.assert_close(after[:, : place - 1], before[:, : place - 1], rtol=0, atol=1e-5)
            assert (after[:, place - 1] - before[:, place - 1]).abs().max() > 1e-3  # token t + 1 is its input


@pytest.mark.parametrize("hyper", [True, False])
def test_its_input_is_the_sum_of_two_projections(hyper):
    """Without the block's two outputs, logits are head(norm(e_proj enorm(emb) + h_proj hnorm(h)))."""
    model = build(mtp_layers=1, layers=("sliding",), hyper_connections=hyper)
    module = model.mtp[0]
    with torch.no_grad():
        module.attn.wo_b.weight.zero_()
        module.ffn.w2.zero_()
        module.ffn.shared.w2.weight.zero_()
        for name, p in module.named_parameters():
            if name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
            if name.endswith("residual.base"):
                p.zero_()
                p[8:].view(4, 4).fill_diagonal_(40.0)  # streams are not mixed
            if name.endswith(("residual.scale", "hyper_head.scale", "hyper_head.base")):
                p.zero_()
        streams = torch.randn(1, 7, 4, 32) if hyper else torch.randn(1, 7, 32)
        ids = torch.randint(0, 50, (1, 7))
        embedding = model.embed(ids)
        context = model._context(ids, None, None, "sparse", None, None)
        found = module.hidden(streams, embedding, ids, context)
        from_token = module.e_proj(rms_norm(embedding, 1e-6) * module.enorm.weight)
        from_past = module.h_proj(rms_norm(streams, 1e-6) * module.hnorm.weight)
        mixed = (from_past + from_token.unsqueeze(2)).mean(2) if hyper else from_past + from_token
        expected = rms_norm(mixed, 1e-6) * module.norm.weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_main_logits_do_not_depend_on_the_module():
    with_it, without = build(mtp_layers=1), build()
    state = {name: p for name, p in with_it.state_dict().items() if not name.startswith("mtp.")}
    without.load_state_dict(state)
    ids = torch.randint(0, 50, (2, 30))
    with torch.inference_mode():
        assert torch.equal(ahead(with_it, ids)[0], without(ids))


def test_it_learns_the_token_after_next():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SMALL, "mtp_layers": 1, "init_std": 0.05, "layers": ("sliding",)})).train()
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig(learning_rate=0.02))
    ids = torch.arange(64).repeat(4, 1) * torch.tensor([[3], [5], [7], [11]]) % 50
    losses = []
    for _ in range(30):
        _, logits = ahead(model, ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < 2 < losses[0]


def test_its_gradient_reaches_the_network_and_every_part_of_its_own():
    model = build(mtp_layers=1).train()
    _, logits = ahead(model, torch.randint(0, 50, (2, 40)))
    logits.square().mean().backward()
    for name, p in model.named_parameters():
        if name.startswith(("mtp.", "embed", "head")) and not name.endswith("tid2eid"):
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert model.layers[1].attn.wkv.weight.grad.abs().sum() > 0
    assert model.norm.weight.grad is None  # the module has a separate norm


def test_it_is_saved_and_loaded(tmp_path):
    model = build(mtp_layers=1)
    checkpoint.save(model, tmp_path / "c")
    again = checkpoint.load(tmp_path / "c")
    ids = torch.randint(0, 50, (1, 20))
    with torch.inference_mode():
        assert torch.equal(ahead(model, ids)[1], ahead(again, ids)[1])


def test_predictions_without_a_module_are_an_error():
    with pytest.raises(ValueError, match="mtp_layers is 0"):
        build()(torch.zeros(1, 4, dtype=torch.int64), aux=AuxOutputs(predict_ahead=True))
    with pytest.raises(ConfigError, match=r"mtp_layers: must be 0 or 1, found 2"):
        ModelConfig(mtp_layers=2)


def test_the_published_models_take_no_memory_on_the_meta_device():
    with torch.device("meta"):
        model = Transformer(ModelConfig(**{**SMALL, "mtp_layers": 1}))
    assert all(t.is_meta for t in model.state_dict().values())
    assert model.state_dict().keys() == build(mtp_layers=1).state_dict().keys()

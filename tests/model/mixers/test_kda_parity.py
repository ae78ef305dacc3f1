"""Parity of the kda layer with transformers' ``KimiLinearDeltaAttention``, whose PyTorch form runs on a CPU."""

import functools

import pytest
import torch
import transformers
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearConfig, KimiLinearDeltaAttention

from model.cache import Cache
from model.config import ModelConfig
from model.forward.context import Context
from model.mixers.kda import KimiDeltaAttention

transformers.utils.logging.set_verbosity_error()
TOKENS = 300
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2e-3
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 17, 31, 32, 33, 63, 64, 65, 129, TOKENS]
PROMPT = 70
CONFIGURATIONS = {
    "two heads": {"hidden_size": 24, "num_heads": 2, "head_dim": 8},
    "one head, one channel": {"hidden_size": 7, "num_heads": 1, "head_dim": 1, "conv_kernel": 2},
    "heads from the width": {"hidden_size": 30, "head_dim": 6, "chunk_size": 8},
    "more channels than the width": {"hidden_size": 10, "num_heads": 5, "head_dim": 9, "conv_kernel": 3},
    "long filters, small chunks": {
        "hidden_size": 21,
        "num_heads": 3,
        "head_dim": 11,
        "conv_kernel": 7,
        "chunk_size": 1,
    },
    "long chunks": {"hidden_size": 17, "num_heads": 1, "head_dim": 34, "chunk_size": 128},
    "strong decays": {"hidden_size": 18, "num_heads": 3, "head_dim": 5, "chunk_size": 64},
}
SPREAD = {"strong decays": 6.0}
"""Multiplies A_log and dt_bias: some decays are nearly 1, others exp of minus hundreds."""


def from_transformers(weights):
    """Return the weights of our layer for those of transformers."""
    stacked = ("q_proj", "k_proj", "v_proj", "forget_gate.f_a_proj", "g_a_proj", "b_proj")
    return {
        "in_proj.weight": torch.cat([weights[f"{name}.weight"] for name in stacked]),
        "conv.weight": weights["conv1d.weight"].flatten(1),
        "decay_proj.weight": weights["forget_gate.f_b_proj.weight"],
        "gate_proj.weight": weights["g_b_proj.weight"],
        "A_log": weights["forget_gate.A_log"].flatten(),
        "dt_bias": weights["forget_gate.dt_bias"],
        "norm.weight": weights["o_norm.weight"],
        "out_proj.weight": weights["o_proj.weight"],
    }


class Pair:
    """A layer of ours and one of transformers with equal weights, and an input [1 or 2, TOKENS, hidden]."""

    def __init__(self, name, batch=1):
        torch.manual_seed(sorted(CONFIGURATIONS).index(name))
        options = dict(CONFIGURATIONS[name])
        hidden = options.pop("hidden_size")
        self.config = ModelConfig(
            hidden_size=hidden, layers=("kda",), norm_eps=1e-5, mixer_options={"kda": options}, num_hash_layers=0
        )
        heads, head_dim = KimiDeltaAttention.heads(self.config)
        self.oracle_config = KimiLinearConfig(
            hidden_size=hidden,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            linear_num_heads=heads,
            linear_head_dim=head_dim,
            linear_conv_kernel_dim=self.config.mixer_options["kda"]["conv_kernel"],
            rms_norm_eps=1e-5,
        )
        self.oracle, self.ours = KimiLinearDeltaAttention(self.oracle_config, 0), KimiDeltaAttention(self.config, 0)
        with torch.no_grad():
            for key, p in self.oracle.named_parameters():
                p.normal_(std=0.5 if p.dim() == 1 else p.shape[-1] ** -0.5)
                if key.startswith("forget_gate") and p.squeeze().dim() < 2:
                    p.mul_(SPREAD.get(name, 1.0))
            self.oracle.o_norm.weight.add_(1.0)
            self.oracle.conv1d.weight.normal_(std=0.5)
            self.ours.load_state_dict(from_transformers(self.oracle.state_dict()))
            self.x = torch.randn(batch, TOKENS, hidden)
            self.expected = self.oracle(self.x)

    def run(self, x, cache=None):
        """Our outputs for x [B, S, hidden] after the tokens in ``cache``."""
        context = Context(torch.arange(x.shape[1])[None], {})
        if cache is None:
            return self.ours(x, context)
        cache.begin(*x.shape[:2])
        out = self.ours(x, context, cache.layers[0])
        cache.advance()
        return out

    def cache(self):
        return Cache(self.config, len(self.x), TOKENS)


@functools.cache
def pair(name, batch=1):
    return Pair(name, batch)


def error(found, expected):
    return (found - expected).abs().max().item()


def worst_length(p, lengths):
    """The chunked form, which runs where gradients are enabled."""
    return max(error(p.run(p.x[:, :n]).detach(), p.oracle(p.x[:, :n]).detach()) for n in lengths)


@torch.no_grad()
def worst_decoded(p, prompt, tokens):
    cache = p.cache()
    outputs = [p.run(p.x[:, :prompt], cache)] if prompt else []
    outputs += [p.run(p.x[:, t : t + 1], cache) for t in range(prompt, tokens)]
    return error(torch.cat(outputs, dim=1), p.expected[:, :tokens])


@torch.no_grad()
def worst_cut(p, tokens, cuts):
    found = []
    for cut in cuts:
        cache = p.cache()
        outputs = [p.run(piece, cache) for piece in p.x[:, :tokens].split([cut, tokens - cut], dim=1)]
        found.append(error(torch.cat(outputs, dim=1), p.expected[:, :tokens]))
    return max(found)


def worst_gradient(p, tokens):
    """Return the largest error over parameters and the input, relative to the tensor's largest entry."""
    upstream = torch.randn(len(p.x), tokens, p.x.shape[2], generator=torch.Generator().manual_seed(1))
    found = []
    for module, run in ((p.ours, p.run), (p.oracle, p.oracle)):
        x = p.x[:, :tokens].clone().requires_grad_()
        module.zero_grad()
        (run(x) * upstream).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        found.append((gradients if module is p.ours else from_transformers(gradients)) | {"x": x.grad})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and len(ours) == 9
    # The decay's parameters have no gradient at a single token, which finds an empty state.
    return max((error(ours[n], theirs[n]) / max(1e-30, theirs[n].abs().max().item()), n) for n in theirs)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_outputs_and_gradients_agree(name):
    p = pair(name)
    assert p.expected.std() > 0.02
    assert worst_length(p, LENGTHS) < TOLERANCE
    assert worst_decoded(p, 0, PROMPT) < TOLERANCE
    assert worst_decoded(p, 37, PROMPT) < TOLERANCE
    assert worst_cut(p, PROMPT, range(1, PROMPT)) < TOLERANCE
    for tokens in (1, 23, 150):
        worst, where = worst_gradient(p, tokens)
        assert worst < GRADIENT_TOLERANCE, where


def test_two_sequences_at_once():
    p = pair("more channels than the width", batch=2)
    assert worst_length(p, [1, 40, 133]) < TOLERANCE
    assert worst_cut(p, 133, range(16, 133, 29)) < TOLERANCE


@torch.no_grad()
def test_decoding_agrees_with_the_cache_of_transformers():
    p = pair("two heads")
    theirs, ours = transformers.DynamicCache(config=p.oracle_config), p.cache()
    for piece in p.x[:, :40].split([21, *[1] * 19], dim=1):
        assert error(p.run(piece, ours), p.oracle(piece, cache_params=theirs)) < TOLERANCE


@torch.no_grad()
def test_strong_decays_are_strong():
    p = pair("strong decays")
    projected = p.ours.project(p.x, None, Context(torch.arange(TOKENS)[None], {}), False)
    assert projected.log_decay.min() < -200 and (projected.log_decay > -0.01).float().mean() > 0.1
    mild = pair("two heads")
    projected = mild.ours.project(mild.x, None, Context(torch.arange(TOKENS)[None], {}), False)
    assert -1 < projected.log_decay.median() < -0.1


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_length_every_cut_every_gradient(name):
    p = pair(name)
    assert worst_length(p, range(1, TOKENS + 1)) < TOLERANCE
    assert worst_decoded(p, 0, TOKENS) < TOLERANCE
    assert worst_cut(p, TOKENS, range(1, TOKENS)) < TOLERANCE
    for tokens in (*range(1, TOKENS, 13), TOKENS):
        worst, where = worst_gradient(p, tokens)
        assert worst < GRADIENT_TOLERANCE, (tokens, where)

"""Parity of the mamba2 layer with transformers' ``Mamba2Mixer``, whose PyTorch form runs on a CPU.

transformers applies ``time_step_limit`` in its chunked form but not when it decodes a single token. The tests therefore
compare all cached outputs with its chunked form, over the whole sequence.
"""

import functools

import pytest
import torch
import transformers
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

from model.cache import Cache
from model.config import ModelConfig
from model.forward.context import Context
from model.mixers.mamba2 import Mamba2

transformers.utils.logging.set_verbosity_error()
TOKENS = 300
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2e-3
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 17, 63, 64, 65, 129, TOKENS]
GRADIENT_LENGTHS = [3, 23, 150]
"""A first token decays nothing, and D only scales it, which the norm undoes where it covers one head: alone, it gives A
and D no gradient."""
PROMPT = 70
CONFIGURATIONS = {
    "one group": {"hidden_size": 24, "head_dim": 8, "state_size": 5, "chunk_size": 7},
    "groups, two taps": {"hidden_size": 20, "head_dim": 5, "n_groups": 4, "state_size": 3, "conv_kernel": 2},
    "a group per head": {
        **{"hidden_size": 15, "head_dim": 10, "n_groups": 3},
        **{"state_size": 16, "conv_kernel": 3, "chunk_size": 1},
    },
    "no bias, expand 1": {
        **{"hidden_size": 21, "expand": 1, "head_dim": 3, "n_groups": 7},
        **{"state_size": 9, "conv_kernel": 5, "use_conv_bias": False, "chunk_size": 256},
    },
    "limited steps": {
        **{"hidden_size": 18, "head_dim": 12, "n_groups": 3},
        **{"state_size": 11, "time_step_limit": [0.02, 0.3]},
    },
    "one head, one number": {"hidden_size": 17, "head_dim": 34, "state_size": 1, "chunk_size": 33},
    "wide state, long steps": {
        **{"hidden_size": 6, "expand": 3, "head_dim": 2},
        **{"state_size": 70, "time_step_min": 0.5, "time_step_max": 20.0},
    },
}


class Pair:
    """A layer of ours and one of transformers with equal weights, and an input [1 or 2, TOKENS, hidden]."""

    def __init__(self, name, batch=1):
        torch.manual_seed(sorted(CONFIGURATIONS).index(name))
        options = dict(CONFIGURATIONS[name])
        hidden = options.pop("hidden_size")
        self.config = ModelConfig(
            hidden_size=hidden, layers=("mamba2",), norm_eps=1e-5, mixer_options={"mamba2": options}, num_hash_layers=0
        )
        o = self.config.mixer_options["mamba2"]
        shape = Mamba2.shape(self.config)
        shared = (
            "head_dim",
            "state_size",
            "n_groups",
            "conv_kernel",
            "use_conv_bias",
            "time_step_min",
            "time_step_max",
        )
        least, most = o["time_step_limit"]
        oracle = Mamba2Config(
            hidden_size=hidden,
            expand=o["expand"] or 2,
            num_heads=shape.num_heads,
            chunk_size=8,
            time_step_limit=(least, float("inf") if most is None else most),
            layer_norm_epsilon=1e-5,
            num_hidden_layers=1,
            **{key: o[key] for key in shared},
        )
        self.oracle_config = oracle
        self.oracle, self.ours = Mamba2Mixer(oracle, 0), Mamba2(self.config, 0)
        with torch.no_grad():
            for p in self.oracle.parameters():
                p.add_(torch.randn_like(p) * 0.3)
        theirs = {key.replace("conv1d.", "conv."): value for key, value in self.oracle.state_dict().items()}
        theirs["conv.weight"] = theirs["conv.weight"].squeeze(1)
        self.ours.load_state_dict(theirs)
        self.x = torch.randn(batch, TOKENS, hidden)
        with torch.no_grad():
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


@torch.no_grad()
def worst_length(p, lengths):
    return max(error(p.run(p.x[:, :n]), p.oracle(p.x[:, :n])) for n in lengths)


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
        gradients = {n.replace("conv1d.", "conv."): g.grad.clone() for n, g in module.named_parameters()}
        gradients["conv.weight"] = gradients["conv.weight"].view(len(gradients["conv.weight"]), -1)
        found.append(gradients | {"x": x.grad})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and len(ours) >= 8
    return max((error(ours[name], theirs[name]) / theirs[name].abs().max().item(), name) for name in theirs)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_outputs_and_gradients_agree(name):
    p = pair(name)
    assert p.expected.std() > 0.05
    assert worst_length(p, LENGTHS) < TOLERANCE
    assert worst_decoded(p, 0, PROMPT) < TOLERANCE
    assert worst_decoded(p, 37, PROMPT) < TOLERANCE
    assert worst_cut(p, PROMPT, range(1, PROMPT)) < TOLERANCE
    for tokens in GRADIENT_LENGTHS:
        worst, where = worst_gradient(p, tokens)
        assert worst < GRADIENT_TOLERANCE, where


def test_two_sequences_at_once():
    p = pair("groups, two taps", batch=2)
    assert worst_length(p, [1, 40, 133]) < TOLERANCE
    assert worst_cut(p, 133, range(16, 133, 29)) < TOLERANCE


@torch.no_grad()
def test_decoding_agrees_with_the_cache_of_transformers():
    p = pair("a group per head")
    theirs, ours = transformers.DynamicCache(config=p.oracle_config), p.cache()
    for piece in p.x[:, :40].split([21, *[1] * 19], dim=1):
        assert error(p.run(piece, ours), p.oracle(piece, cache_params=theirs)) < TOLERANCE


def test_the_limits_of_the_step_size_act():
    p = pair("limited steps")
    projected = p.ours.project(p.x, None, Context(torch.arange(TOKENS)[None], {}), False)
    least, most = p.config.mixer_options["mamba2"]["time_step_limit"]
    for limit in (least, most):
        assert 0.005 < (projected.dt == limit).float().mean() < 0.9


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_length_every_cut_every_gradient(name):
    p = pair(name)
    assert worst_length(p, range(1, TOKENS + 1)) < TOLERANCE
    assert worst_decoded(p, 0, TOKENS) < TOLERANCE
    assert worst_cut(p, TOKENS, range(1, TOKENS)) < TOLERANCE
    for tokens in (*range(3, TOKENS, 13), TOKENS):
        worst, where = worst_gradient(p, tokens)
        assert worst < GRADIENT_TOLERANCE, (tokens, where)

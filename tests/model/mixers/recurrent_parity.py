"""Comparison of a recurrent layer with that of transformers, with equal weights."""

import torch
from transformers import DynamicCache

from model.cache import Cache
from model.forward.context import Context

TOKENS = 300
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2e-3
"""Largest differences of outputs, and of gradients relative to a tensor's largest entry."""
PROMPT = 70


class Pair:
    """A layer of ours and one of transformers, each with its configuration, and an input [batch, TOKENS, hidden].

    ``our_names`` maps a dict of tensors under transformers' names to ours.
    """

    def __init__(self, config, ours, oracle_config, oracle, our_names, batch=1):
        self.config, self.ours, self.our_names = config, ours, our_names
        self.oracle_config, self.oracle = oracle_config, oracle
        ours.load_state_dict(our_names(oracle.state_dict()))
        self.x = torch.randn(batch, TOKENS, config.hidden_size)
        with torch.no_grad():
            self.expected = oracle(self.x)

    def context(self, tokens):
        return Context(torch.arange(tokens)[None], {})

    def run(self, x, cache=None):
        """Return our outputs for x [B, S, hidden] after the tokens in ``cache``."""
        if cache is None:
            return self.ours(x, self.context(x.shape[1]))
        cache.begin(*x.shape[:2])
        out = self.ours(x, self.context(x.shape[1]), cache.layers[0])
        cache.advance()
        return out

    @torch.no_grad()
    def run_pieces(self, tokens, sizes):
        """Return our outputs for the first ``tokens`` tokens, read from the cache in pieces of these sizes."""
        cache = Cache(self.config, len(self.x), TOKENS)
        return torch.cat([self.run(piece, cache) for piece in self.x[:, :tokens].split(sizes, dim=1)], dim=1)

    # --- largest errors

    def worst_length(self, lengths):
        """Compare whole sequences, with gradients enabled, which selects the chunked form."""
        return max(error(self.run(self.x[:, :n]).detach(), self.oracle(self.x[:, :n]).detach()) for n in lengths)

    def worst_decoded(self, prompt, tokens):
        """Compare a prompt and single tokens after it."""
        sizes = [prompt] * (prompt > 0) + [1] * (tokens - prompt)
        return error(self.run_pieces(tokens, sizes), self.expected[:, :tokens])

    def worst_cut(self, tokens, cuts):
        """Compare sequences in two pieces."""
        return max(error(self.run_pieces(tokens, [n, tokens - n]), self.expected[:, :tokens]) for n in cuts)

    def worst_gradient(self, tokens):
        """Return the largest error over parameters and the input, relative to the tensor's largest entry, and the
        tensor's name."""
        upstream = torch.randn(len(self.x), tokens, self.x.shape[2], generator=torch.Generator().manual_seed(1))
        found = []
        for module, run in ((self.ours, self.run), (self.oracle, self.oracle)):
            x = self.x[:, :tokens].clone().requires_grad_()
            module.zero_grad()
            (run(x) * upstream).sum().backward()
            gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
            found.append((gradients if module is self.ours else self.our_names(gradients)) | {"x": x.grad})
        ours, theirs = found
        assert ours.keys() == theirs.keys() and len(ours) >= 8
        # A gradient may be zero: that of a decay's parameters at a single token, which finds an empty state.
        return max((error(ours[n], theirs[n]) / max(1e-30, theirs[n].abs().max().item()), n) for n in theirs)

    # --- checks

    def check(self, lengths, prompts, tokens, cuts, gradient_lengths):
        assert self.expected.std() > 0.02
        assert self.worst_length(lengths) < TOLERANCE
        for prompt in prompts:
            assert self.worst_decoded(prompt, tokens) < TOLERANCE, prompt
        assert self.worst_cut(tokens, cuts) < TOLERANCE
        for n in gradient_lengths:
            worst, where = self.worst_gradient(n)
            assert worst < GRADIENT_TOLERANCE, (n, where)

    @torch.no_grad()
    def check_caches(self):
        """Compare decoding with both caches, ours and that of transformers."""
        ours, theirs = Cache(self.config, len(self.x), TOKENS), DynamicCache(config=self.oracle_config)
        for piece in self.x[:, :40].split([21, *[1] * 19], dim=1):
            assert error(self.run(piece, ours), self.oracle(piece, cache_params=theirs)) < TOLERANCE


def error(found, expected):
    return (found - expected).abs().max().item()

"""Comparison of a checkpoint family with its network in transformers."""

import json

import torch
from safetensors.torch import load_file, save_file

from model.cache import Cache
from model.hf import export_pretrained, import_pretrained
from model.hf.registry import FAMILIES
from model.transformer import Transformer

TOLERANCE = 1e-4
"""Maximum absolute difference of logits of unit scale."""


def meta_network(config):
    """Return a network without memory for its weights."""
    with torch.device("meta"):
        return Transformer(config)


def tensors_of(folder):
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


def change_config(folder, **changes):
    """Replace keys of config.json; None removes one."""
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


def change_tensors(folder, change):
    """Replace all tensors, in one file, by ``change(tensors)``."""
    tensors = change(tensors_of(folder))
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


@torch.no_grad()
def assert_equal_logits(ours, oracle, ids):
    """Compare whole sequences, a prompt in two pieces, and decoding token by token."""
    expected = oracle(ids, use_cache=False).logits
    assert 0.3 < float(expected.std()) < 3
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=TOLERANCE)
    tokens = ids.shape[1]
    for cuts in ([tokens // 3, tokens - tokens // 3], [1] * tokens):
        cache = Cache(ours.config, len(ids), tokens)
        pieces = torch.cat([ours(piece, cache) for piece in ids.split(cuts, dim=1)], dim=1)
        torch.testing.assert_close(pieces, expected, rtol=0, atol=TOLERANCE)


def assert_same_folder(network_class, oracle, folder, tmp_path, unused=()):
    """Import a folder that transformers saved and export it again: the same tensors bit for bit, and the same network
    in transformers. Return ours. ``unused`` are prefixes of keys for layers that the network does not have."""
    ours = import_pretrained(folder)
    export_pretrained(ours, tmp_path / "again")
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    stored, written = (
        {family.canonical_name(name): t for name, t in tensors_of(path).items()}
        for path in (folder, tmp_path / "again")
    )
    assert stored.keys() == written.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name
    again = load_oracle(network_class, tmp_path / "again")
    expected = oracle.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    before, after = (network.config.to_dict() for network in (oracle, again))
    for key in before.keys() - {"transformers_version", "_name_or_path", "architectures", "dtype"}:
        assert after[key] == before[key] or key.startswith(tuple(unused)), key
    return ours


def load_oracle(network_class, folder):
    oracle, info = network_class.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    return oracle.eval()

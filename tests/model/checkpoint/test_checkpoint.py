import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.config import ModelConfig
from model.errors import CheckpointError
from model.hf import export_pretrained
from model.tokenizer import ByteTokenizer, load_tokenizer
from model.transformer import Transformer


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(hidden_size=32, head_dim=16, rope_head_dim=8, expert_size=16)).eval()
    checkpoint.save(model, tmp_path / "a", ByteTokenizer())
    return model, tmp_path / "a"


def test_round_trip(saved):
    model, folder = saved
    loaded = checkpoint.load(folder)
    assert loaded.config == model.config and not loaded.training
    ids = torch.randint(0, 258, (1, 20))
    assert torch.equal(loaded(ids), model(ids))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("héllo\n")) == "héllo\n"


def test_saving_replaces_the_whole_folder(saved):
    model, folder = saved
    (folder / "stray").write_text("x")
    checkpoint.save(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("write", [checkpoint.save, export_pretrained])
def test_a_folder_that_is_no_checkpoint_is_not_replaced(saved, tmp_path, write):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="precious: exists and is not a checkpoint folder"):
        write(saved[0], tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write(saved[0], tmp_path / "empty")
    assert {oct(path.stat().st_mode)[-3:] for path in (tmp_path / "empty").iterdir()} == {"644"}


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "tensor 'norm.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor 'extra' is not part of this model"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"'norm.weight' has shape \[3\], expected \[32\]"),
        (
            lambda t: t.update({"norm.weight": torch.ones(32).long()}),
            "'norm.weight' is torch.int64, expected torch.float",
        ),
        (lambda t: t["layers.0.ffn.tid2eid"].fill_(4), r"'layers.0.ffn.tid2eid' names experts outside 0\.\.3"),
        (lambda t: t["norm.weight"].fill_(float("nan")), "'norm.weight' holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, message):
    _, folder = saved
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def test_damaged_files_are_named(saved):
    _, folder = saved
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged"):
        checkpoint.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not a checkpoint configuration"):
        checkpoint.load(folder)
    (folder / "config.json").write_text(json.dumps({"format_version": 1, "model": {"windw": 3}}))
    with pytest.raises(CheckpointError, match="did you mean 'window'"):
        checkpoint.load(folder)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        checkpoint.load(folder / "nowhere")


@pytest.mark.parametrize(("key", "hint"), [("shard", "; did you mean 'shards'?"), ("rope_theta", "")])
def test_unknown_keys_of_a_configuration_are_named(saved, key, hint):
    _, folder = saved
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 3}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {key}: unknown key{re.escape(hint)}$"):
        checkpoint.load(folder)


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 2])
def test_other_format_versions_are_named(saved, version):
    _, folder = saved
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": version}))
    with pytest.raises(CheckpointError, match=rf"format version {re.escape(json.dumps(version))} is not the supported"):
        checkpoint.load(folder)


def test_unknown_keys_of_rank_shards_are_named(saved):
    _, folder = saved
    file = folder / "config.json"
    shards = {"count": 1, "save_id": "a", "saved_id": "b"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "shards": shards}))
    message = r"config\.json: shards\.saved_id: unknown key; did you mean 'save_id'\?$"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def test_warm_start_reads_all_tensors_that_fit(saved):
    model, folder = saved
    other = Transformer(model.config.replace(csa_ratio=8))
    fresh = checkpoint.warm_start(other, folder)
    assert fresh and all(name.endswith(".ape") for name in fresh)
    assert torch.equal(other.embed.weight, model.embed.weight)
    ahead = Transformer(model.config.replace(mtp_layers=1))
    drawn = ahead.mtp[0].e_proj.weight.clone()
    fresh = checkpoint.warm_start(ahead, folder)
    assert "mtp.0.e_proj.weight" in fresh and all(name.startswith("mtp.") for name in fresh)
    assert torch.equal(ahead.mtp[0].e_proj.weight, drawn) and torch.equal(ahead.embed.weight, model.embed.weight)
    checkpoint.save(ahead, folder.parent / "ahead")
    assert checkpoint.warm_start(model, folder.parent / "ahead") == []
    with pytest.raises(CheckpointError, match="has shape"):
        checkpoint.warm_start(Transformer(model.config.replace(expert_size=8)), folder)


def test_shapes_are_compared_before_the_network_takes_memory(saved, monkeypatch):
    """The network of this configuration would take a terabyte."""
    _, folder = saved
    content = json.loads((folder / "config.json").read_text())
    content["model"]["hidden_size"] = 1 << 30
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tensor 'embed.weight' has shape .*, expected \[\d+, 1073741824\]"):
        checkpoint.load(folder)


def test_tensors_beyond_64_bit_sizes_are_refused(saved):
    _, folder = saved
    content = json.loads((folder / "config.json").read_text())
    content["model"] |= {"num_experts": 2**31 - 1, "expert_size": 2**31 - 1}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config\.json: model: a tensor of these sizes would exceed"):
        checkpoint.load(folder)

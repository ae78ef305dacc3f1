"""Folders of others: draft modules of other kinds, leftovers, damaged or misplaced files, and wrong sizes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError
from model.hf import export_pretrained, import_pretrained, is_pretrained, read_pretrained_config
from model.hf.safetensors_folder import CONFIG, INDEX, WEIGHTS
from tests.model.networks import build

SIZES = {"hidden_size": 64, "expert_size": 32, "vocab_size": 64}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "a"
    export_pretrained(build(**SIZES), folder, max_shard_bytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "a")


@pytest.fixture
def released(tmp_path):
    """A released folder with a prediction module, in one shard."""
    export_pretrained(build(**SIZES, mtp_layers=1), tmp_path / "released", format="released")
    return tmp_path / "released"


def change_config(folder, **changes):
    content = json.loads((folder / CONFIG).read_text())
    content.update(changes)
    (folder / CONFIG).write_text(json.dumps(content))


def change_tensors(folder, change):
    """Replace all tensors, in one file, by ``change(tensors)``."""
    tensors = {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    save_file(change(tensors), folder / WEIGHTS)


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match) as error:
        import_pretrained(folder)
    assert "\n" not in str(error.value)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- draft modules


def with_draft_stages(tensors):
    """Turn the prediction module into three stages for speculative decoding, with other tensors."""
    stages = {"mtp.0.main_proj.weight": torch.ones(4, 4), "mtp.0.main_norm.weight": torch.ones(4)}
    for stage in range(3):
        stages[f"mtp.{stage}.markov_head.weight"] = torch.ones(2, 2)
        stages[f"mtp.{stage}.attn.wq_a.weight"] = torch.ones(3, 3)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")} | stages


@pytest.mark.parametrize("count", [1, 3])
def test_the_main_network_is_read_without_draft_modules_of_another_kind(released, tmp_path, count):
    ratios = json.loads((released / CONFIG).read_text())["compress_ratios"]
    # The layer types, which would take precedence, are not in the release.
    change_config(released, num_nextn_predict_layers=count, compress_ratios=[*ratios[:-1], 0, 0, 0], layer_types=None)
    main = import_pretrained(released, mtp_layers=0)
    change_tensors(released, with_draft_stages)
    lines = []
    found = import_pretrained(released, report=lines.append)
    assert found.config == main.config and found.config.mtp_layers == 0
    assert same(found.state_dict(), main.state_dict())
    assert lines == [
        f"{released}: left out 8 tensors of draft modules, which are not this network's multi-token prediction module"
        ": it has no 'mtp.0.main_norm.weight'"
    ]
    with pytest.raises(CheckpointError, match=r"tensor 'mtp.0.attn.attn_sink' is missing"):
        import_pretrained(released, mtp_layers=1)
    export_pretrained(found, tmp_path / "back", format="released")
    stored = load_file(released / WEIGHTS)
    written = {name: t for shard in (tmp_path / "back").glob("*.safetensors") for name, t in load_file(shard).items()}
    assert written.keys() == {name for name in stored if not name.startswith("mtp.")}
    assert all(torch.equal(t.view(torch.uint8), stored[name].view(torch.uint8)) for name, t in written.items())


def test_a_second_prediction_module_is_left_out_with_the_first(released):
    def repeat(tensors):
        return tensors | {n.replace("mtp.0", "mtp.1"): t.clone() for n, t in tensors.items() if n.startswith("mtp.0")}

    change_tensors(released, repeat)
    change_config(released, num_nextn_predict_layers=2)
    lines = []
    assert import_pretrained(released, report=lines.append).config.mtp_layers == 0
    assert len(lines) == 1 and "left out" in lines[0]


def test_an_incomplete_prediction_module_is_an_error(released):
    change_tensors(released, lambda tensors: {n: t for n, t in tensors.items() if n != "mtp.0.attn.attn_sink"})
    refused(released, r"tensor 'mtp.0.attn.attn_sink' is missing")


def test_a_prediction_module_is_read_whatever_config_json_counts(released):
    change_config(released, num_nextn_predict_layers=0)
    assert import_pretrained(released, report=pytest.fail).config.mtp_layers == 1


# --- schedules and rotations


def test_ratio_1_means_uncompressed(released):
    expected = import_pretrained(released)
    ratios = json.loads((released / CONFIG).read_text())["compress_ratios"]
    assert 0 in ratios
    ones = [1 if ratio == 0 else ratio for ratio in ratios]
    change_config(released, compress_ratios=ones, layer_types=None)  # which would take precedence
    found = import_pretrained(released)
    assert found.config == expected.config and same(found.state_dict(), expected.state_dict())


def test_flat_rope_parameters_are_understood(tmp_path):
    model = build(yarn_factor=4.0, yarn_original_positions=64, rope_theta=5e3, compress_rope_theta=7e4)
    export_pretrained(model, tmp_path / "a")
    change_config(
        tmp_path / "a",
        rope_theta=None,
        compress_rope_theta=None,
        partial_rotary_factor=None,
        qk_rope_head_dim=None,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5000,
            "compress_rope_theta": 70000.0,
            "partial_rotary_factor": 0.5,
        },
    )
    assert read_pretrained_config(tmp_path / "a") == model.config.replace(zero_init_output=False)


# --- files


def test_an_old_file_of_all_weights_beside_an_index_is_refused(folder):
    old = build(seed=1, **SIZES)
    export_pretrained(old, folder.parent / "old")
    shutil.copy(next((folder.parent / "old").glob("*.safetensors")), folder / WEIGHTS)
    refused(
        folder, r"holds both model\.safetensors and model\.safetensors\.index\.json, which names other files; remove"
    )


def test_an_index_of_one_file_of_all_weights_is_read(folder):
    expected = import_pretrained(folder).state_dict()
    change_tensors(folder, lambda tensors: tensors)
    weight_map = dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert same(import_pretrained(folder, report=pytest.fail).state_dict(), expected)


def test_files_that_are_not_read_are_reported(folder):
    expected = import_pretrained(folder, report=pytest.fail).state_dict()
    for name in ("consolidated.safetensors", "model-00009-of-00009.safetensors"):
        save_file({"a": torch.ones(1)}, folder / name)
    (folder / "model.safetensors.index.fp16.json").write_text("{}")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    lines = []
    assert same(import_pretrained(folder, report=lines.append).state_dict(), expected)
    assert lines == [
        f"{folder}: not read: consolidated.safetensors, model-00009-of-00009.safetensors, "
        "model.safetensors.index.fp16.json"
    ]


def test_a_tensor_in_two_shards_is_refused(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    refused(folder, rf"{second.name}: holds tensor '{name}', which the index puts in {first.name}")
    text = (folder / INDEX).read_text().replace('"weight_map": {', f'"weight_map": {{"{name}": "{second.name}",')
    (folder / INDEX).write_text(text)
    refused(folder, rf"index.json: not valid JSON \(key '{name}' occurs twice\)")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (POINTER.encode(), "is a Git LFS pointer, not the file itself; run 'git lfs pull'"),
        (b"PK\x03\x04 and more", "is a pickle as torch.save writes them, which is never read"),
        (b"\x80\x02}q\x00.", "is a pickle as torch.save writes them"),
        (b"\xff" * 100, "damaged or not a safetensors file"),
    ],
)
def test_shards_that_are_something_else_are_named(folder, content, message):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(content)
    refused(folder, f"{shard.name}: {message}")


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_cut_shard_is_named(folder, cut):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:cut])
    refused(folder, f"{shard.name}: damaged" if cut > 0 else rf"{shard.name}: damaged: cut short, it holds [\d,]+ of")


@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "shard", CONFIG])
@pytest.mark.parametrize("target", ["blobs/gone", "itself"])
def test_links_to_nowhere_are_named(folder, name, target):
    path = sorted(folder.glob("*.safetensors"))[1] if name == "shard" else folder / name
    if name == WEIGHTS:
        change_tensors(folder, lambda tensors: tensors)
    path.unlink()
    path.symlink_to(path.name if target == "itself" else target)
    refused(folder, rf"{path.name}: is a link to .*, which cannot be followed or does not exist")


def test_links_to_files_elsewhere_are_followed(folder):
    for path in list(folder.iterdir()):
        blob = folder.parent / f"blob-{path.name}"
        path.rename(blob)
        path.symlink_to(blob)
    assert import_pretrained(folder, report=pytest.fail).config.vocab_size == 64


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"index\.json$"),
        (
            {"pytorch_model.bin": b""},
            "; pickled weights are never read, convert them to safetensors: pytorch_model.bin",
        ),
        ({"consolidated.00.pth": b""}, "; pickled weights are never read"),
        (
            dict.fromkeys([f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)], b""),
            "; the index of its shards is missing: model-00001-of-00005.safetensors, .* and 2 more",
        ),
        ({"model.fp16.safetensors": b""}, "; it has weights of another name: model.fp16.safetensors"),
    ],
)
def test_a_folder_without_readable_weights_says_what_it_has(folder, files, message):
    for path in folder.iterdir():
        if path.name != CONFIG:
            path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    refused(folder, r"found neither model\.safetensors nor model.*" + message)


def test_a_file_instead_of_the_folder_is_named(folder):
    for path in (folder / CONFIG, next(folder.glob("*.safetensors"))):
        refused(path, "is not a folder, expected the checkpoint folder that holds config.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_config_json_may_have_any_unicode_encoding(folder, encoding):
    expected = read_pretrained_config(folder)
    content = json.loads((folder / CONFIG).read_text()) | {"_name_or_path": "größer"}
    (folder / CONFIG).write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert is_pretrained(folder)
    assert import_pretrained(folder).config == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.json: is empty"),
        (POINTER.encode(), "config.json: is a Git LFS pointer"),
        (b"[]", "config.json: expected an object at the top level, found a list"),
        (b"NaN", "config.json: expected an object at the top level, found a number"),
        (b'{"a": 1, "a": 2}', r"config.json: not valid JSON \(key 'a' occurs twice\)"),
        ("größer".encode("latin-1"), r"config.json: not valid JSON \("),
        (b"[" * 100_000, r"config.json: not valid JSON \("),
    ],
)
def test_a_damaged_config_json_is_named(folder, content, message):
    (folder / CONFIG).write_bytes(content)
    refused(folder, message)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int4", 3, None, ["bfloat16"]])
def test_the_tensors_decide_their_dtype_whatever_config_json_says(folder, dtype):
    expected = import_pretrained(folder).state_dict()
    change_config(folder, torch_dtype=dtype, dtype=dtype)
    assert same(import_pretrained(folder).state_dict(), expected)


# --- sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 65}, r"shape \[64, 64\], expected \[65, 64\] by 'vocab_size' 65 of config.json"),
        ({"hidden_size": 32}, r"shape \[64, 64\], expected \[64, 32\] by 'hidden_size' 32 of config.json"),
        ({"q_lora_rank": 24}, r"q_a_proj.weight' has shape \[16, 64\], expected \[24, 64\] by 'q_lora_rank' 24 of"),
        ({"num_attention_heads": 8}, r"expected \[8\] by 'num_attention_heads' 8 of config.json"),
        ({"o_groups": 4}, r"o_._proj.weight' has shape .* by .*'o_groups' 4.* of config.json"),
        ({"n_routed_experts": 8}, r"expected \[8, .*\] by 'n_routed_experts' 8 of config.json"),
        ({"moe_intermediate_size": 16}, r"has shape .* by 'moe_intermediate_size' 16 of config.json"),
        ({"index_n_heads": 4}, r"indexer.* by .*'index_n_heads' 4"),
        ({"hc_mult": 2}, r"\[24, 256\], expected \[8, 128\] by 'hidden_size' 64, 'hc_mult' 2 of config.json"),
    ],
)
def test_a_shape_that_does_not_fit_names_the_keys_that_decide_it(folder, changes, message):
    change_config(folder, **changes)
    refused(folder, message)


def test_another_number_of_layers_names_its_key(folder):
    content = json.loads((folder / CONFIG).read_text())
    fewer = {key: content[key][:-1] for key in ("layer_types", "mlp_layer_types")}
    change_config(folder, num_hidden_layers=3, **fewer)
    refused(folder, r"key 'num_hidden_layers' is 3, but the folder has tensors of 4 layers, 0 to 3")
    more = {key: [*content[key], content[key][-1]] for key in ("layer_types", "mlp_layer_types")}
    change_config(folder, num_hidden_layers=5, **more)
    refused(folder, r"key 'num_hidden_layers' is 5, but the folder has tensors of 4 layers, 0 to 3")


# --- counts that would be listed before they are checked


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_numbers_of_layers_are_checked_before_layers_are_listed(folder, count):
    change_config(folder, num_hidden_layers=count)
    refused(folder, f"config.json: key 'num_hidden_layers': expected 1 to 1000 layers, found {count}")


@pytest.mark.parametrize("name", ["folder", "released"])
def test_numbers_of_experts_are_checked_before_experts_are_listed(request, name):
    place = request.getfixturevalue(name)
    change_config(place, n_routed_experts=2**31 - 1)
    refused(place, r"config.json: key 'n_routed_experts' is 2147483647, but .* hold at most \d+ experts")


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "moe_intermediate_size", "head_dim", "q_lora_rank"])
def test_sizes_are_compared_with_the_tensors_before_memory_is_taken(folder, key):
    change_config(folder, **{key: 1 << 30})
    with pytest.raises(CheckpointError) as error:
        import_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)

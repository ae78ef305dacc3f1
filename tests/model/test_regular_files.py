"""What is not a regular file is refused before it is opened: reading a pipe would wait for a writer."""

import os
import shutil

import pytest

from model import checkpoint
from model.cache import Cache
from model.cache.file import restore_cache
from model.config import ModelConfig
from model.errors import CacheError, CheckpointError, ConfigError
from model.hf import export_pretrained, import_pretrained
from model.regular_files import check_regular
from model.tokenizer import ByteTokenizer, load_tokenizer
from model.transformer import Transformer


def loop(path):
    path.symlink_to(path)


WRONG = [
    (os.mkfifo, "is not a regular file"),
    (os.mkdir, "Is a directory"),
    (loop, "(Too many levels of symbolic links|is a link to .* cannot be followed)"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint here and in the format of transformers."""
    folder, model = tmp_path_factory.mktemp("networks"), Transformer(ModelConfig(layers=("csa",)))
    checkpoint.save(model, folder / "ours", ByteTokenizer())
    export_pretrained(model, folder / "hf")
    return folder


def test_regular_files_pass_and_missing_ones_are_named(tmp_path):
    (tmp_path / "a").touch()
    check_regular(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "b")


@pytest.mark.parametrize(("make", "message"), WRONG)
@pytest.mark.parametrize(
    ("name", "load", "error"),
    [
        ("ours/config.json", checkpoint.load, CheckpointError),
        ("ours/model.safetensors", checkpoint.load, CheckpointError),
        ("hf/config.json", import_pretrained, CheckpointError),
        ("hf/model-00001-of-00001.safetensors", import_pretrained, CheckpointError),
        ("hf/model.safetensors.index.json", import_pretrained, CheckpointError),
        ("ours/tokenizer.json", load_tokenizer, ConfigError),
        ("ours/tokenizer_config.json", load_tokenizer, ConfigError),
        ("ours/chat_template.jinja", load_tokenizer, ConfigError),
    ],
)
def test_other_things_in_the_place_of_a_file_are_named(folders, tmp_path, name, load, error, make, message):
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(error, match=rf"{name}: {message}"):
        load(path.parent)


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_other_things_in_the_place_of_a_stored_cache_are_named(tmp_path, make, message):
    make(tmp_path / "cache")
    with pytest.raises(CacheError, match=rf"^{tmp_path / 'cache'}: {message}$"):
        restore_cache(Cache(ModelConfig(layers=("csa",)), 1, 64), tmp_path / "cache")


@pytest.mark.parametrize("make", [os.mkfifo, loop, lambda path: path.symlink_to("nowhere"), lambda path: path.touch()])
@pytest.mark.parametrize("load", [checkpoint.load, import_pretrained])
def test_what_is_not_a_folder_is_told_from_what_does_not_exist(tmp_path, make, load):
    make(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a: is not a folder, expected the checkpoint folder that holds config"):
        load(tmp_path / "a")
    with pytest.raises(CheckpointError, match="b: no such checkpoint folder"):
        load(tmp_path / "b")

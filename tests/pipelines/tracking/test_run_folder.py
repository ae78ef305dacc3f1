"""The settings that a run folder is bound to."""

import pytest

from model.errors import ConfigError
from pipelines.data.manifest import MANIFEST_NAME
from pipelines.recipe.loading import recipe_from_dict, with_overrides
from pipelines.tracking.run_folder import TRAINING_SECTIONS, lock_run_folder


def test_declared_and_chosen_tokens_resume_the_same_run(tmp_path):
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path)}, "data": {"eos_token": "</s>"}})
    recipe.data_folder.mkdir(parents=True)
    (recipe.data_folder / MANIFEST_NAME).write_text("{}")

    def lock(**changes: object) -> None:
        with lock_run_folder(recipe.run_folder, with_overrides(recipe, changes), TRAINING_SECTIONS, "run.name"):
            pass

    lock()
    lock(**{"data.eos_token": None})
    with pytest.raises(ConfigError, match=r"was started with another data\.packing \(true, found false\); choose"):
        lock(**{"data.packing": False})
    (recipe.data_folder / MANIFEST_NAME).write_text('{"eos_id": 2}')
    with pytest.raises(ConfigError, match=r"was started with another data\.manifest; choose"):
        lock(**{"data.eos_token": None})


def test_a_file_in_the_place_of_a_run_folder_is_named(tmp_path):
    (tmp_path / "a").touch()
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path), "name": "a"}})
    message = rf"^run\.name: {tmp_path}/a is not a folder$"
    with pytest.raises(ConfigError, match=message), lock_run_folder(tmp_path / "a", recipe, ("data",), "run.name"):
        pass

"""The recipe schema and the page that lists its settings of the server."""

import re
from pathlib import Path

import pytest

from pipelines.recipe.schema import ServeSection
from serve.api.config import HttpConfig
from serve.config import ServerConfig
from serve.engine import EngineConfig

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
BASES = {"serve/engine/config.py": EngineConfig, "serve/api/config.py": HttpConfig, "serve/config.py": ServerConfig}


@pytest.mark.parametrize("file", [*BASES, "pipelines/recipe/schema.py"])
def test_the_serving_page_lists_every_setting_of_the_server_beside_its_file(file) -> None:
    [row] = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and f"](../{file}) |" in line]
    listed = re.findall(r"`(\w+)`", row.split("|")[2])
    inherited = {name for base in BASES.values() for name in base.model_fields}
    if file in BASES:
        fields = {name for name in BASES[file].model_fields if name in vars(BASES[file])["__annotations__"]}
    else:
        fields = ServeSection.model_fields.keys() - inherited
    assert len(listed) == len(set(listed)) and set(listed) == fields

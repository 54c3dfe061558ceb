"""The pages that are made from the code are what the code makes today."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from backchannel.settings import Settings

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is in no package."""
    spec = spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_is_fresh(generate: ModuleType) -> None:
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert page == generate.settings_page(), "type: make docs"


def test_every_setting_has_its_description_on_the_page(generate: ModuleType) -> None:
    rows = list(generate.variables())
    assert len(rows) == len(Settings.model_fields) + 2  # providers are three variables
    assert [name for name, _, description in rows if not description] == []


def test_the_default_on_the_page_is_the_default(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = Settings()
    for name, default, _ in generate.variables():
        if default:
            monkeypatch.setenv(name, default)
    assert Settings() == untouched

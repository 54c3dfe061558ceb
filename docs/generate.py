"""Writes the pages that are made from the code: settings.md, from backchannel/settings.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic_core import PydanticUndefined

from backchannel.registry import BUILT_IN
from backchannel.settings import ProviderSettings, Settings

PAGE = Path(__file__).with_name("settings.md")
PREFIX = "BACKCHANNEL_"
ABOUT = {  # the one field whose entries are variables of their own
    "base_url": "Root of a provider's API, for a server of your own or a gateway before it.",
    "api_key": "A provider's key; goes before its well-known variable.",
    "api_key_file": "A file that holds the key, as a mounted secret; a new one is read at once.",
}

HEAD = """\
# Settings

*Made by `make docs` from [backchannel/settings.py](../backchannel/settings.py): change it there.*

Every setting is an environment variable, read once when a process starts. API, workers and command
line read the same ones: on several machines, give them the same values.

| Variable | Default | What it does |
| --- | --- | --- |
"""

KEYS = """
## Providers' keys

A key is looked for in `BACKCHANNEL_PROVIDERS__<ID>__API_KEY`, in the file of `…__API_KEY_FILE`, in
the provider's well-known variable, then among those stored by `backchannel keys set`. Workers use
it; the API only needs to know that it is there, to refuse a job nobody could do, so set it for
both.
`<ID>` is the id in capitals, with `_` for `-`; the ids of [your own providers](providers.md) too.

| Provider | Well-known variable | Base URL |
| --- | --- | --- |
"""

TAIL = """
## Elsewhere

`FLOWER_PASSWORD` protects Flower (user `admin`); beyond loopback Flower does not start without it.
Flower's own `FLOWER_…` variables, such as `FLOWER_URL_PREFIX`, are read too, and so is `NO_COLOR`.

Own prices are dollars per million tokens; `cached` and `cache_write` may be left out and cost as
`input` then:

```bash
export BACKCHANNEL_PRICES='{"openai:my-tune": {"input": "1.50", "cached": "0.75", "output": "6"}}'
```
"""


def variables() -> Iterator[tuple[str, str, str]]:
    """Name, default and description of each variable."""
    for name, field in Settings.model_fields.items():
        if name == "providers":
            for own in ProviderSettings.model_fields:
                yield f"{PREFIX}PROVIDERS__<ID>__{own.upper()}", "", ABOUT[own]
            continue
        default = field.get_default(call_default_factory=True)
        assert default is not PydanticUndefined, f"{name} has no default"
        yield f"{PREFIX}{name.upper()}", _spelled(default), field.description or ""


def _spelled(default: object) -> str:
    """A default as it would stand in the environment; empty where there is none."""
    if default in ("", {}, [], None):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) and default < 1e5 else str(default)


def settings_page() -> str:
    """The text of settings.md."""
    rows = [
        f"| `{name}` | {default and f'`{default}`'} | {description} |"
        for name, default, description in variables()
    ]
    keys = [
        f"| {each.name} (`{each.id}`) | {f'`{each.key_env}`' if each.key_env else 'none needed'} "
        f"| {f'`{each.base_url}`' if each.base_url else 'none: offline'} |"
        for each in BUILT_IN
    ]
    return HEAD + "\n".join(rows) + "\n" + KEYS + "\n".join(keys) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")

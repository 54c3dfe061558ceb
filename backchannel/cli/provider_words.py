"""A provider in the words of the command line: from options, and as lines to read."""

from __future__ import annotations

from typing import Any

CAPABILITIES = {"images": "multimodal", "schemas": "structured_output", "tools": "tools"}


def words_of(
    url: str | None,
    model: str | None,
    models: list[str] | None,
    can: list[str] | None,
    cannot: list[str] | None,
    price: list[str] | None,
    limits: dict[str, int | None] | None,
    needs_key: bool | None,
    max_tokens_field: str | None,
    stream_usage: bool | None,
) -> dict[str, Any]:
    """The options that were given, as the API calls them."""
    from backchannel.cli.running import is_loopback

    said = {
        "base_url": url,
        # on this command line the API's loopback is this machine's
        "allow_loopback": True if url is not None and is_loopback(url) else None,
        "default_model": model,
        "models": models or None,
        "capabilities": _capabilities(can or [], cannot or []),
        "prices": dict(map(_price, price or [])) or None,
        "limits": limits,
        "needs_key": needs_key,
        "max_tokens_field": max_tokens_field,
        "reports_stream_usage": stream_usage,
    }
    return {name: value for name, value in said.items() if value is not None}


def _capabilities(can: list[str], cannot: list[str]) -> dict[str, bool] | None:
    from backchannel.cli.screen import misuse

    for word in (*can, *cannot):
        if word not in CAPABILITIES:
            misuse(f"'{word}' is none of {', '.join(CAPABILITIES)}.")
    said = {CAPABILITIES[word]: True for word in can}
    said |= {CAPABILITIES[word]: False for word in cannot}
    return said or None


def _price(text: str) -> tuple[str, dict[str, float]]:
    from backchannel.cli.screen import misuse

    model, _, dollars = text.rpartition("=")
    try:
        cost_in, cost_out = (float(part) for part in dollars.split(","))
    except ValueError:
        misuse(f"'{text}' is not MODEL=IN,OUT, as gpt-5=1.25,10.")
    return model or "*", {"input": cost_in, "output": cost_out}


def limits_of(
    requests_per_minute: int | None, tokens_per_minute: int | None, concurrency: int | None
) -> dict[str, int | None] | None:
    """The limits that were given; 0 takes one away."""
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
    }
    return {name: limit or None for name, limit in given.items() if limit is not None} or None


def why(provider: dict[str, Any]) -> str:
    """Why it is available or not, and until when it is left alone, in a few words."""
    held = provider.get("held_until")
    return f"{provider['reason']}; left alone until {held}" if held else str(provider["reason"])


def show_provider(provider: dict[str, Any], as_json: bool) -> None:
    from backchannel.cli.screen import show as line
    from backchannel.cli.screen import show_json

    if as_json:
        show_json(provider)
        return
    for name, value in provider.items():
        if name == "limits":
            value = {limit: number for limit, number in value.items() if number is not None}
        if name not in ("object", "id") and value not in (None, [], {}):
            line(f"{name:<21} {_told(value)}")


def _told(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(map(str, value))
        case dict():
            return ", ".join(f"{key} {_told(each)}" for key, each in value.items())
        case _:
            return str(value)

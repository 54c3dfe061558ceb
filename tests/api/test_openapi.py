"""The OpenAPI document and the API agree on what may be sent, where random bodies seldom look."""

from __future__ import annotations

import re
from typing import Any

import httpx2
import pytest

BASE = {"name": "Gateway", "default_model": "m"}


async def pattern(client: httpx2.AsyncClient, form: str, field: str) -> str:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    its: dict[str, Any] = schemas[form]["properties"][field]
    found: str = its.get("pattern") or its["anyOf"][0]["pattern"]
    return found


@pytest.mark.parametrize(
    ("url", "as_base", "as_hook"),
    [
        ("https://my-host.example.com:8443/v1", True, True),
        ("HTTPS://a.example/x*", True, True),
        ("https://a.example/v1?team=pets", False, True),
        ("https://a.example:70000/v1", False, None),
        ("ftp://a.example/", False, False),
        ("https://a.example/ x", False, False),
    ],
)
async def test_the_addresses_that_are_taken_are_those_of_the_document(
    client: httpx2.AsyncClient, url: str, as_base: bool, as_hook: bool | None
) -> None:
    base = await client.post("/v1/providers", json=BASE | {"base_url": url})
    assert (base.status_code == 201) == as_base
    assert bool(re.search(await pattern(client, "NewProvider", "base_url"), url)) == as_base
    if as_hook is not None:  # what a 403 says no to, the document need not
        hook = await client.post("/v1/webhooks", json={"url": url})
        assert (hook.status_code == 201) == as_hook
        assert bool(re.search(await pattern(client, "CreateWebhook", "url"), url)) == as_hook


async def test_a_name_with_any_space_around_it_is_in_neither(client: httpx2.AsyncClient) -> None:
    names = await pattern(client, "CreateJob", "model")
    assert r"\x1c-\x1f" in names  # for readers whose \s does not hold it
    for name, good in (("echo", True), ("echo:a b", True), ("echo:a\x1f", False), (" a", False)):
        answer = await client.post("/v1/jobs", json={"model": name, "prompt": "Hi"})
        assert (answer.status_code == 202, bool(re.search(names, name))) == (good, good)


async def test_a_whole_number_may_have_a_point(client: httpx2.AsyncClient) -> None:
    said = [{"role": "user", "content": "Hi"}]
    asked = {"model": "echo", "messages": said, "max_tokens": 5.0}
    answer = await client.post("/v1/messages/count_tokens", json=asked)
    assert answer.status_code == 200, answer.text


async def test_fallbacks_are_models_in_the_document_too(client: httpx2.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for form in ("CreateJob", "Ours"):
        items = schemas[form]["properties"]["fallbacks"]["anyOf"][0]["items"]
        for name, good in (("echo:other", True), ("\techo", False), ("no:body", False)):
            assert bool(re.search(items["pattern"], name)) == good
            asked = {"model": "echo", "prompt": "Hi", "fallbacks": [name]}
            assert ((await client.post("/v1/jobs", json=asked)).status_code == 202) == good
        assert {"auto", "fast"} < set(items["not"]["enum"])

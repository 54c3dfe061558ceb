"""Ask the fake provider through the real adapters and SDKs, and keep what was heard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from backchannel.errors import ProviderError
from backchannel.registry import Provider
from tests.fake_provider import FakeProvider
from workers.clients import ClientCache
from workers.providers import (
    ChatRequest,
    Delta,
    Finish,
    ProviderEvent,
    Reasoning,
    ToolCall,
    Usage,
    adapter_for,
)

FLAVOURS = ("openai", "ollama", "anthropic")
PROMPT = "What does the fox say?"
PROMPT_TOKENS = 6  # the fake's estimate: bytes / 4, rounded up


@dataclass
class Heard:
    """The events of one call, and the error it ended with."""

    events: list[ProviderEvent] = field(default_factory=list)
    error: ProviderError | None = None

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def reasoning(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Reasoning))

    @property
    def usage(self) -> Usage | None:
        return next((each for each in reversed(self.events) if isinstance(each, Usage)), None)

    @property
    def finish(self) -> Finish | None:
        """The finish event; it is last or it is not there."""
        assert not any(isinstance(event, Finish) for event in self.events[:-1])
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Finish) else None

    @property
    def tool_calls(self) -> list[tuple[str | None, str | None, str]]:
        """(id, name, arguments) of each call, put together as a client would."""
        calls: dict[int, tuple[str | None, str | None, str]] = {}
        for event in self.events:
            if isinstance(event, ToolCall):
                before = calls.get(event.index, (None, None, ""))
                arguments = before[2] + event.arguments
                calls[event.index] = (before[0] or event.id, before[1] or event.name, arguments)
        return list(calls.values())


@dataclass
class Asker:
    """Makes calls to one fake provider, in any of its flavours."""

    fake: FakeProvider
    cache: ClientCache

    def provider(self, flavour: str, **fields: Any) -> Provider:
        path = {"openai": "/v1", "ollama": "/ollama/v1", "anthropic": ""}[flavour]
        kept: dict[str, Any] = {
            "id": f"my-{flavour}",
            "name": flavour,
            "type": "anthropic" if flavour == "anthropic" else "openai-compatible",
            "base_url": self.fake.url + path,
            "default_model": "ok",
            "needs_key": False,
        }
        return Provider(**(kept | fields))

    def request(
        self,
        flavour: str,
        model: str,
        *,
        stream: bool = True,
        messages: list[dict[str, Any]] | None = None,
        parameters: dict[str, Any] | None = None,
        line_cap: int = 1 << 20,
        answer_cap: int = 8 << 20,
        **fields: Any,
    ) -> ChatRequest:
        return ChatRequest(
            provider=self.provider(flavour, **fields),
            model=model,
            messages=messages or [{"role": "user", "content": PROMPT}],
            parameters=parameters or {},
            stream=stream,
            line_cap=line_cap,
            answer_cap=answer_cap,
        )

    async def __call__(self, flavour: str, model: str, **options: Any) -> Heard:
        """One call to its end, as the engine makes it."""
        request = self.request(flavour, model, **options)
        heard = Heard()
        try:
            async with self.cache.use(request.provider) as client:
                async for event in adapter_for(request.provider)(client, request):
                    heard.events.append(event)
        except ProviderError as error:
            heard.error = error
        return heard

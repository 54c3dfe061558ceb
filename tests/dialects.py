"""The three dialects of the fake provider: how each writes a token, an end, an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tests.fake_provider import Call

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
TYPES |= {402: "billing_error", 404: "not_found_error", 413: "request_too_large"}
TYPES |= {429: "rate_limit_error", 500: "api_error", 529: "overloaded_error"}


class Dialect(Protocol):
    """Frames of a stream as bytes, documents and errors as JSON values."""

    def start(self, call: Call) -> bytes: ...
    def text(self, text: str) -> bytes: ...
    def reasoning(self, text: str) -> bytes: ...
    def signature(self) -> bytes: ...
    def tool_call(self, call: Call) -> bytes: ...
    def ping(self) -> bytes: ...
    def end(self, call: Call) -> bytes: ...
    def stream_error(self, status: int) -> bytes: ...
    def document(self, call: Call, text: str) -> dict[str, Any]: ...
    def error(self, status: int, message: str, code: str | None) -> dict[str, Any]: ...


class OpenAI:
    """Chat completions."""

    reasoning_field = "reasoning_content"

    def start(self, call: Call) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def reasoning(self, text: str) -> bytes:
        return self._chunk({self.reasoning_field: text})

    def signature(self) -> bytes:
        return b""

    def tool_call(self, call: Call) -> bytes:
        name = _tool_name(call)
        first = {"index": 0, "id": "call_1", "type": "function"}
        pieces = [
            {**first, "function": {"name": name, "arguments": ""}},
            {"index": 0, "function": {"arguments": '{"q": '}},
            {"index": 0, "function": {"arguments": '"w0"}'}},
        ]
        return b"".join(self._chunk({"tool_calls": [piece]}) for piece in pieces)

    def ping(self) -> bytes:
        return b": ping\n\n"

    def end(self, call: Call) -> bytes:
        kind = call.script.kind
        frames = b""
        if kind == "refusal":
            frames += self._chunk({"refusal": "no"})
        if kind not in ("done", "silent"):
            frames += self._chunk({}, _finish(kind))
        if kind in ("nodone", "cutend", "nostop"):
            return frames
        options = call.body.get("stream_options") or {}
        if options.get("include_usage") and kind != "nousage":
            frames += _data({"choices": [], "model": call.body["model"], "usage": _usage(call)})
        return frames + b"data: [DONE]\n\n"

    def stream_error(self, status: int) -> bytes:
        return _data(self.error(status, "as asked", None))

    def document(self, call: Call, text: str) -> dict[str, Any]:
        kind = call.script.kind
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if kind == "reasoning":
            message[self.reasoning_field] = "think think think "
        if kind == "refusal":
            message |= {"content": None, "refusal": "no"}
        if kind == "tools":
            function = {"name": _tool_name(call), "arguments": '{"q": "w0"}'}
            call_1 = {"id": "call_1", "type": "function", "function": function}
            message |= {"content": None, "tool_calls": [call_1]}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": _finish(kind)}
        if kind in ("noend", "done", "silent"):
            choice["finish_reason"] = None
        document = {"object": "chat.completion", "model": call.body["model"], "choices": [choice]}
        return document if kind == "nousage" else document | {"usage": _usage(call)}

    def error(self, status: int, message: str, code: str | None) -> dict[str, Any]:
        error = {"message": message, "type": TYPES.get(status, "server_error"), "code": code}
        return {"error": error}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _data(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "model": "m",
                "choices": [choice],
            }
        )


class Ollama(OpenAI):
    """As OpenAI, but an error in the stream is an empty chunk, and then the end."""

    reasoning_field = "reasoning"

    def stream_error(self, status: int) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})


class Anthropic:
    """Messages."""

    def start(self, call: Call) -> bytes:
        message = {"type": "message", "role": "assistant", "model": call.body["model"]}
        message |= {"content": [], "stop_reason": None, "usage": self._usage(call, output=1)}
        return _event("message_start", message=message) + self._block({"type": "text", "text": ""})

    def text(self, text: str) -> bytes:
        return self._delta({"type": "text_delta", "text": text})

    def reasoning(self, text: str) -> bytes:
        return self._delta({"type": "thinking_delta", "thinking": text})

    def signature(self) -> bytes:
        return self._delta({"type": "signature_delta", "signature": "sealed"})

    def tool_call(self, call: Call) -> bytes:
        block = {"type": "tool_use", "id": "call_1", "name": _tool_name(call), "input": {}}
        pieces = [
            {"type": "input_json_delta", "partial_json": piece} for piece in ("", '{"q": ', '"w0"}')
        ]
        frames = b"".join(self._delta(piece, index=1) for piece in pieces)
        return self._block(block, index=1) + frames + _event("content_block_stop", index=1)

    def ping(self) -> bytes:
        return _event("ping")

    def end(self, call: Call) -> bytes:
        kind = call.script.kind
        frames = _event("content_block_stop", index=0)
        if kind in ("done", "silent"):
            return frames
        delta = {"stop_reason": _stop(kind), "stop_sequence": None}
        usage = {"usage": {"output_tokens": call.usage()[2]}} if kind != "nousage" else {}
        frames += _event("message_delta", delta=delta, **usage)
        return frames if kind in ("nodone", "cutend", "nostop") else frames + _event("message_stop")

    def stream_error(self, status: int) -> bytes:
        return _event(
            "error", error={"type": TYPES.get(status, "api_error"), "message": "as asked"}
        )

    def document(self, call: Call, text: str) -> dict[str, Any]:
        kind = call.script.kind
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if kind == "reasoning":
            content.insert(0, {"type": "thinking", "thinking": "think think think "})
        if kind == "tools":
            name = _tool_name(call)
            content = [{"type": "tool_use", "id": "call_1", "name": name, "input": {"q": "w0"}}]
        if kind == "signed":
            thinking = {"thinking": "think think think ", "signature": "sealed"}
            tool = {"type": "tool_use", "id": "call_1", "name": _tool_name(call)}
            content = [{"type": "thinking", **thinking}, {**tool, "input": {"q": "w0"}}]
        document = {"type": "message", "role": "assistant", "model": call.body["model"]}
        stop = None if kind in ("noend", "done", "silent") else _stop(kind)
        document |= {"content": content, "stop_reason": stop}
        return document if kind == "nousage" else document | {"usage": self._usage(call)}

    def error(self, status: int, message: str, code: str | None) -> dict[str, Any]:
        kind = code if code == "content_filter" else TYPES.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}

    def _block(self, block: dict[str, Any], index: int = 0) -> bytes:
        return _event("content_block_start", index=index, content_block=block)

    def _delta(self, delta: dict[str, Any], index: int = 0) -> bytes:
        return _event("content_block_delta", index=index, delta=delta)

    def _usage(self, call: Call, output: int | None = None) -> dict[str, Any]:
        fresh, cached, sent = call.usage()
        usage = {"input_tokens": fresh, "output_tokens": sent if output is None else output}
        return usage | {"cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}


DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": OpenAI(),
    "/ollama/v1/chat/completions": Ollama(),
    "/v1/messages": Anthropic(),
}


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\n".encode() + _data({"type": kind, **fields})


def _tool_name(call: Call) -> str:
    tools = call.body.get("tools") or [{"name": "lookup"}]
    return str((tools[0].get("function") or tools[0])["name"])


def _finish(kind: str) -> str:
    finish = {"tools": "tool_calls", "filter": "content_filter", "length": "length"}
    return finish.get(kind, "stop")


def _stop(kind: str) -> str:
    stop = {
        "tools": "tool_use",
        "signed": "tool_use",
        "filter": "refusal",
        "refusal": "refusal",
        "length": "max_tokens",
    }
    return stop.get(kind, "end_turn")


def _usage(call: Call) -> dict[str, Any]:
    fresh, cached, sent = call.usage()
    usage = {"prompt_tokens": fresh + cached, "completion_tokens": sent}
    usage["total_tokens"] = sum(usage.values())
    return usage | {"prompt_tokens_details": {"cached_tokens": cached}}

"""What a chat completion asks, as a job: the body of a POST, or of a line of a batch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from backchannel.schemas import (
    CreateJob,
    Message,
    Metadata,
    Name,
    Ours,
    ToolCall,
    ToolCallFunction,
    Whole,
    check_message,
)


class _CalledFunction(ToolCallFunction):
    parsed_arguments: Any = None  # of the SDK's `parse`


class _Called(ToolCall):
    index: Whole | None = None  # of the SDK's streams
    function: _CalledFunction


class ChatMessage(Message):
    """A message as sent; an answer may be sent back with all that an SDK has added to it."""

    tool_calls: list[_Called] | None = None  # type: ignore[assignment]  # read only
    annotations: Any = None
    audio: None = None
    function_call: None = None
    parsed: Any = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """The message without what is not for the provider."""
        said = self.model_dump(
            exclude_unset=True,
            exclude={
                "annotations": True,
                "audio": True,
                "function_call": True,
                "parsed": True,
                "reasoning": True,
                "reasoning_content": True,
                "tool_calls": {"__all__": {"index": True, "function": {"parsed_arguments"}}},
            },
        )
        return {
            name: value for name, value in said.items() if value is not None or name == "content"
        }


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class CreateChat(BaseModel):
    """A chat to be answered; every further field is a parameter, judged like those of a job."""

    model_config = ConfigDict(extra="allow", strict=True)

    # what a field of the job is called here; a parameter has its own name
    NAMES: ClassVar[dict[str, str]] = {
        "session": "x_backchannel.session",
        "deadline_s": "x_backchannel.deadline_s",
        "fallbacks": "x_backchannel.fallbacks",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = Field(None, description="Every job is stored.")
    metadata: Metadata | None = None
    x_backchannel: Ours = Ours()

    def chat(self) -> list[dict[str, Any]]:
        """The messages, each with what its role needs."""
        for number, message in enumerate(self.messages):
            check_message(message, f"messages[{number}]")
        return [each.plain() for each in self.messages]

    def order(self) -> CreateJob:
        """The job around them."""
        ours = self.x_backchannel
        return CreateJob.model_construct(
            model=self.model,
            session=ours.session,
            lane=ours.lane,
            deadline_s=ours.deadline_s,
            fallbacks=ours.fallbacks,
            force=ours.force,
            metadata=self.metadata,
            parameters=self.model_extra,
            stream=bool(self.stream),
        )

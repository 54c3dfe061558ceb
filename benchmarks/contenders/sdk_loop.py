"""The script most people write: AsyncOpenAI, its typed stream, a semaphore, asyncio.run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from openai import AsyncOpenAI

from benchmarks.contenders.script import serve
from benchmarks.work import PATIENCE_S


async def main(url: str) -> None:
    """Serve with one client."""
    client = AsyncOpenAI(api_key="k", base_url=f"{url}/v1", timeout=PATIENCE_S)

    async def ask(_: str, model: str, first: Callable[[str], None]) -> str:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hello?"}], stream=True
        )
        texts: list[str] = []
        async for chunk in stream:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                if not texts:
                    first(text)
                texts.append(text)
        return "".join(texts)

    await serve(ask)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

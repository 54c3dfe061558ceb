"""Start-up times, what libraries alone take of them, and which provider SDKs are loaded by then."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import uvloop

from benchmarks.contenders.who import Backchannel
from benchmarks.figures import median
from benchmarks.installation import Installation, installation
from benchmarks.processes import ROOT, Child, cores
from benchmarks.progress import say
from benchmarks.work import SHORT, Work

# Submodules too: `importlib.import_module` goes past the spy, the imports inside do not.
_SDK = re.compile(r"^import time:.*\| +(openai|anthropic)\b", re.MULTILINE)

# What an API cannot do without: below this it cannot start.
LIBRARIES = "import fastapi, redis.asyncio, sqlmodel, uvicorn"


def run(rounds: int, provider: str) -> dict[str, float]:
    """Seconds until each is ready."""
    say("start-up times")
    found: dict[str, list[float]] = {"help": [], "libraries": [], "api": [], "worker": []}
    with installation("sqlite", provider) as home:
        _start_once(home)
        for _ in range(rounds):
            found["help"].append(_seconds("-m", "backchannel", "--help"))
            found["libraries"].append(_seconds("-c", LIBRARIES))
            child, seconds = home.api(core=cores()[1])
            found["api"].append(seconds)
            child.stop()
            child, seconds = home.worker()
            found["worker"].append(seconds)
            child.stop()
    return {f"startup.{name}_s": median(values) for name, values in found.items()}


def _start_once(home: Installation) -> None:
    """The first start after an update writes the bytecode that the next ones read."""
    for child in home.both():
        child.stop()


def unused_sdks(provider: str) -> dict[str, float]:
    """Provider SDKs that are loaded, and that nobody has used."""
    with installation("sqlite", provider) as home:
        api, worker = home.both(spy=True)
        before = _loaded(api) | _loaded(worker)
        uvloop.run(Backchannel(home).go(Work(SHORT, 1, 1)))
        after = _loaded(worker)
        assert "openai" in after, "the spy sees nothing"
        unused = before | _loaded(api) | (after - {"openai"})
    return {"startup.unused_sdks": float(len(unused))}


def _seconds(*argv: str) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def _loaded(child: Child) -> set[str]:
    return set(_SDK.findall(child.log.read_text(errors="replace")))

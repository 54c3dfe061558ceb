"""The OpenAPI document is true: schemathesis, with all its checks, finds nothing that belies it.

It calls every operation with what the document allows and with what it forbids, follows what it
makes, and leaves out the key. The API and a worker are real; their model is Echo.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trip.stack import Stack

EXAMPLES = "10"  # of each operation, beside those of the coverage phase, some 8,000 in all
SEED = "1"


@pytest.mark.timeout(600)  # 1 to 2 minutes on two quiet cores
def test_schemathesis_finds_nothing(
    new_stack: Callable[..., Stack], sqlite_url: str, tmp_path: Path
) -> None:
    stack = new_stack(
        sqlite_url,
        # Bare names, most of what is generated, are models of Echo. Whatever else may be named has
        # a key, and is refused by the caller's key below: which provider has its key, and which
        # parameters it takes, a document cannot say.
        BACKCHANNEL_DEFAULT_MODEL="echo:echo-1",
        BACKCHANNEL_DEFAULT_PROVIDER="echo",
        GROQ_API_KEY="gsk-test",
        GEMINI_API_KEY="test",
    )
    made = subprocess.run(
        [sys.executable, "-m", "backchannel", "callers", "add", "tester", "--scope", "admin",
         "--model", "echo:*", "--json"],
        env=stack.env, capture_output=True, check=True,
    )  # fmt: skip
    key = json.loads(made.stdout)["key"]
    url = stack.api()
    stack.worker()
    binary = shutil.which("schemathesis", path=sysconfig.get_path("scripts"))
    assert binary, "schemathesis is a development dependency: make test installs it"
    found = subprocess.run(
        [binary, "run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {key}",
         "--max-examples", EXAMPLES, "--seed", SEED, "--generation-database", "none",
         "--continue-on-failure", "--request-timeout", "30", "--no-color"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, f"{found.stdout[-20_000:]}\n{found.stderr[-2_000:]}"
    assert stack.logs().count("Traceback") == 0, stack.logs()

"""Every example runs as its first lines say, on a real API and a real worker."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.servers import free_port, valkey
from tests.trip.stack import ROOT, Event, Stack, text

EXAMPLES = ROOT / "examples"
RUN_S = 100.0
# our names for a result line's tokens
OURS = {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}
QUESTION = 'She said "why\\not", and left — ünbeirrt.'

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One installation, with one worker, for all that leaves it alive."""
    with valkey() as server, contextlib.ExitStack() as cleanup:
        stack = Stack(tmp_path_factory.mktemp("shared"), server, database_url="")
        cleanup.callback(stack.close)
        stack.api()
        stack.worker()
        yield stack


@pytest.fixture
def try_out(shared: Stack, tmp_path: Path) -> Run:
    """Type a command where nothing of the repository lies around, to its end."""

    def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
        env = {"BACKCHANNEL_API_URL": shared.url, "PYTHONPATH": str(ROOT), **env}
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**shared.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )

    return run


def program(name: str) -> list[str]:
    """The command line of an example program."""
    path = str(EXAMPLES / name)
    return ["bash", path] if name.endswith(".sh") else [sys.executable, path]


def test_every_example_is_tried_and_described() -> None:
    described = (EXAMPLES / "README.md").read_text()
    files = {each.name for each in EXAMPLES.iterdir() if each.is_file()}
    tried = {
        "background_job.py", "background_job.sh", "webhook_receiver.py", "plain.jsonl",
        "prompts.jsonl",
    }  # fmt: skip
    assert files == tried | {"README.md"}
    assert [name for name in tried if f"- [{name}]({name}): " not in described] == []


@pytest.mark.parametrize("name", ["background_job.py", "background_job.sh"])
def test_a_program_gets_its_answer_and_says_what_went_wrong(try_out: Run, name: str) -> None:
    said = try_out(*program(name), QUESTION)
    assert said.returncode == 0, said.stderr
    assert QUESTION in said.stdout.replace('\\"', '"').replace("\\\\", "\\")

    refused = try_out(*program(name), MODEL="groq")
    assert refused.returncode == 1
    assert "Provider 'groq' has no key." in refused.stderr

    failed = try_out(*program(name), MODEL="openai:status-400")
    assert failed.returncode == 1
    assert "invalid_request" in failed.stdout + failed.stderr


def test_the_python_of_the_readme_gets_an_answer(shared: Stack, try_out: Run) -> None:
    _, _, after = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")
    code, _, _ = after.partition("```")
    said = try_out(sys.executable, "-c", code.replace("http://127.0.0.1:8000", shared.url))
    assert (said.returncode, said.stdout) == (0, "succeeded Why do cats knead blankets? 0.0\n")


@pytest.mark.parametrize("page", ["README.md", "docs/http-api.md"])
def test_the_python_of_the_sdks_prints_what_the_page_says(
    shared: Stack, try_out: Run, page: str
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(
        r"^```python\n(from .*?)^```\n(?:\n^```text\n(.*?)^```)?", text, re.MULTILINE | re.DOTALL
    )
    assert len(found) == (1 if page == "README.md" else 3)
    for code, printed in found:
        said = try_out(sys.executable, "-c", code.replace("http://127.0.0.1:8000", shared.url))
        expected = printed or "Why do cats knead blankets? 0.0\n"
        assert (said.stderr, said.stdout) == ("", expected)


def test_curl_resumes_behind_the_event_it_names(try_out: Run) -> None:
    said = try_out(*program("background_job.sh"), QUESTION)
    job, _, frames = said.stdout.partition("\n")
    stream = [
        Event(**dict(line.split(": ", 1) for line in frame.splitlines()))
        for frame in frames.strip().split("\n\n")
    ]
    whole = stream[: [event.event for event in stream].index("end") + 1]
    assert [event.id for event in whole] == [str(seq) for seq in range(len(whole))]
    assert stream[len(whole) :] == whole[1:]
    assert text(whole) == json.loads(job)["message"]["content"] == QUESTION


def test_the_service_goes_on_when_the_api_dies_in_the_middle_of_a_stream(stack: Stack) -> None:
    stack.worker()
    env = {**stack.env, "BACKCHANNEL_API_URL": stack.url, "MODEL": "openai:ok-t60-d50"}
    service = subprocess.Popen(
        program("background_job.py"), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert service.stdout is not None
    begun = service.stdout.read(6)
    [api] = [each for each in stack.processes if _is_api(each)]
    api.kill()
    api.wait()
    stack._spawn("api", "backchannel", "api", "--port", stack.url.rpartition(":")[2])
    rest, complaints = service.communicate(timeout=RUN_S)
    assert service.returncode == 0, complaints.decode()
    assert b"going on after event" in complaints
    assert (begun + rest).decode() == "".join(f"w{n} " for n in range(60)) + "\n"
    assert len(stack.calls()) == 1


def test_the_receiver_prints_what_was_signed_once_and_nothing_else(
    new_stack: Callable[..., Stack], sqlite_url: str
) -> None:
    port = free_port()
    stack = new_stack(sqlite_url, BACKCHANNEL_EGRESS_ALLOW=f"127.0.0.1:{port}")
    hooks = f"http://127.0.0.1:{port}/hooks"
    made = httpx2.post(f"{stack.api()}/v1/webhooks", json={"url": hooks}).json()
    env = {**stack.env, "WEBHOOK_SECRET": made["signing_secret"], "PORT": str(port)}
    service = subprocess.Popen(
        program("webhook_receiver.py"), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert service.stderr is not None
        assert service.stderr.readline().decode() == f"listening on {hooks}\n"
        stack.worker()
        job = stack.post("openai:ok-t2")
        assert service.stdout is not None
        assert service.stdout.readline().decode() == f"job.succeeded {job['id']}\n"
        event = job["id"].replace("job_", "evt_")
        delivery = f"{stack.url}/v1/webhooks/{made['id']}/deliveries/{event}"
        while httpx2.post(f"{delivery}/replay").status_code == 409:
            pass
        url = f"{stack.url}/v1/webhooks/{made['id']}/deliveries?state=delivered"
        while not httpx2.get(url).json()["data"]:
            pass
        assert httpx2.post(hooks, json={"type": "forged"}).status_code == 401
    finally:
        service.terminate()
        printed, complaints = service.communicate(timeout=RUN_S)
    assert (printed, complaints) == (b"", b"")


def _is_api(process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        return False
    return b"api" in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")


@pytest.mark.parametrize(("name", "count"), [("plain", 12), ("prompts", 210)])
def test_an_example_file_is_answered_line_by_line_and_the_books_agree(
    shared: Stack, try_out: Run, tmp_path: Path, name: str, count: int
) -> None:
    command = (sys.executable, "-m", "backchannel", "run", str(EXAMPLES / f"{name}.jsonl"))
    before = shared.usage()
    said = try_out(*command, "--json", "--model", "echo")
    assert said.returncode == 0, said.stderr
    summary = json.loads(said.stdout)
    assert (summary["lines"], summary["done"], summary["failed"]) == (count, count, 0)

    file = tmp_path / f"{name}.results.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [json.loads(line) for line in (EXAMPLES / f"{name}.jsonl").read_text().splitlines()]
    asked = [line["custom_id"] for line in lines if "custom_id" in line]
    answered = [each["custom_id"] for each in found]
    assert len(found) == len(set(answered)) == count
    assert set(asked) <= set(answered)
    assert {each["response"]["status_code"] for each in found} == {200}

    usages = [each["response"]["body"]["usage"] for each in found]
    after = shared.usage()
    spent = {name: after[name] - before[name] for name in ("jobs", *OURS, "cost_nanousd")}
    sums = {name: sum(usage[theirs] for usage in usages) for name, theirs in OURS.items()}
    assert spent == {"jobs": count, **sums, "cost_nanousd": 0}
    assert {name: summary[name] for name in sums} == sums
    assert all(sums.values())

    again = json.loads(try_out(*command, "--json", "--model", "echo").stdout)
    assert (again["done"], again["skipped"]) == (0, count)
    assert shared.usage() == after

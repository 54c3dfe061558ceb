"""The lock files are complete and name no address, and each dependency has its reason."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = PROJECT["project"]["dependencies"]
GROUPS = PROJECT["dependency-groups"]

LOCKS = {
    "requirements.txt": RUNTIME,
    "requirements-dev.txt": RUNTIME + GROUPS["dev"],
    "requirements-bench.txt": RUNTIME + GROUPS["dev"] + GROUPS["bench"],
    "requirements-bootstrap.txt": GROUPS["bootstrap"],
}


def read_lock(name: str) -> dict[str, tuple[str, int]]:
    """Map each package of a lock file to its version and the number of its hashes."""
    text = re.sub(r"\\\n", "", (ROOT / name).read_text())
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    packages = {}
    for line in lines:
        pin = re.match(r"(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)(?: ;[^#]*?)?(?= +--hash=)", line)
        assert pin, f"{name}: not one exact version with hashes: {line[:80]!r}"
        hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}(?= |$)", line)
        packages[pin["name"]] = (pin["version"], len(hashes))
    return packages


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_a_hash(name: str) -> None:
    packages = read_lock(name)
    assert packages
    assert [package for package, (_, hashes) in packages.items() if hashes == 0] == []


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_names_no_address_and_no_path(name: str) -> None:
    for line in (ROOT / name).read_text().splitlines():
        assert "://" not in line
        assert not line.startswith("-")
        assert " @ " not in line
        assert "/" not in line


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_satisfies_the_project_file(name: str) -> None:
    packages = read_lock(name)
    for requirement in map(Requirement, LOCKS[name]):
        version, _ = packages[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is not {version}: make lock"


def test_the_development_lock_holds_the_runtime_lock() -> None:
    """`make run` after `make test` relies on it: nothing is installed twice or taken away."""
    assert read_lock("requirements.txt").items() <= read_lock("requirements-dev.txt").items()


def test_the_benchmarks_lock_holds_the_development_lock() -> None:
    """`make test` after `make bench` relies on it."""
    assert read_lock("requirements-dev.txt").items() <= read_lock("requirements-bench.txt").items()


def test_every_dependency_has_its_reason() -> None:
    words = (ROOT / "docs/decisions/0001-dependencies.md").read_text()
    reasons = set(re.findall(r"^- `([^`]+)`: \S", words, re.MULTILINE))
    required = RUNTIME + GROUPS["dev"] + GROUPS["bench"] + GROUPS["bootstrap"]
    asked = {text.split("~=")[0] for text in required}
    assert reasons == asked


def test_the_api_process_loads_no_provider_sdk() -> None:
    """The import contract sees our own imports; this sees also what a library brings along."""
    program = "import sys, api.main; print(sorted({'openai', 'anthropic'} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == "[]"

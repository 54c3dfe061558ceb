"""The benchmarks measure what they say: numbers, tables and chart, and one tiny round for real."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import httpx2
import pytest

from benchmarks import page
from benchmarks.ceiling import provider
from benchmarks.contenders.script import decode, encode
from benchmarks.contenders.who import FLOOR, ON_SQLITE, SDK_LOOP, one_turn
from benchmarks.figures import Cell, Round, median, percentile
from benchmarks.processes import ROOT, cpu_s, tree
from benchmarks.streams import Plan, _rounds, run
from benchmarks.targets import TARGETS, Results
from benchmarks.work import AT_ONCE, Pace, Work, pace_of, realistic, stamp, unhurried, unstamp


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7.0], 0.99) == 7
    assert math.isnan(percentile([], 0.5))
    assert math.isnan(median([]))


@pytest.mark.parametrize("pace", [AT_ONCE, Pace(1), Pace(128, 100, 20, stamped=True)])
def test_the_pace_travels_in_the_models_name(pace: Pace) -> None:
    assert pace_of(pace.model) == pace


def test_a_mark_is_found_in_a_token() -> None:
    assert unstamp(b'{"content":"' + stamp(123, 45) + b'token "}') == (123, 45)
    assert unstamp("token ") is None


def test_work_travels_to_a_script_and_back() -> None:
    work = realistic(50, "anthropic")
    assert decode(encode(work)) == work


def test_cells_are_medians_of_their_rounds() -> None:
    rounds = [Round(10, 1280, 2.0, {"worker": cost, "api": 0.01}) for cost in (0.1, 0.9, 0.2)]
    cell = Cell(rounds)
    assert cell.per_job_ms("worker") == pytest.approx(20)
    assert cell.per_job_ms() == pytest.approx(21)
    assert cell.per_token_us("worker") == pytest.approx(0.2e6 / 1280)
    assert cell.tokens_per_s() == 640


def made_up() -> Results:
    def cell(worker_s: float) -> Cell:
        return Cell([Round(1000, 128_000, 5.0, {"worker": worker_s}, [3.0, 8.0])])

    work = realistic(1000).name
    table = {(work, FLOOR): cell(3), (work, SDK_LOOP): cell(30), (work, ON_SQLITE): cell(6)}
    return Results(table, {"posts.sqlite.per_s": 3000.0})


def test_targets_are_compared_in_their_direction() -> None:
    results = made_up()
    said = {target.what: target.reached(target.measured(results)) for target in TARGETS}
    assert said["worker CPU a token, against the floor's"] is False  # 2 > 1.6
    assert said["worker CPU a token, against the SDK loop's"] is True  # 0.2 < 0.25
    assert said["single POSTs on one API process"] is True
    assert said["API ready"] is None


def test_the_page_names_every_target_and_the_chart_is_an_image(tmp_path: Path) -> None:
    page.write(tmp_path, made_up(), "make bench", 1.0)
    written = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert [target.what for target in TARGETS if target.what not in written] == []
    root = ElementTree.parse(tmp_path / "performance.svg").getroot()
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {FLOOR, SDK_LOOP, ON_SQLITE} <= set(words)


@pytest.fixture
def provider_url() -> Iterator[str]:
    with provider() as child:
        yield child.readline().strip()


def test_one_tiny_round_for_real(provider_url: str) -> None:
    work = Work(Pace(5, first_ms=10, each_ms=1), 4, 2)
    table = run([Plan(work, (FLOOR,))], 1, provider_url)
    (only,) = table[work.name, FLOOR].rounds
    assert (only.jobs, only.tokens) == (4, 20)
    assert len(only.delays_ms) == 4
    assert 0 < only.cpu_s["worker"] < 5


def test_the_cores_stay_two_when_the_driver_has_bound_itself_to_one() -> None:
    code = (
        "import os; from benchmarks.processes import cores, pin; two = cores(); "
        "pin([os.getpid()], two[0]); assert cores() == two, cores(); "
        "assert os.sched_getaffinity(0) == {two[0]}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_cpu_time_of_a_process_grows_with_its_work() -> None:
    with provider() as child:
        child.readline()
        before = cpu_s([child.pid])
        assert before > 0
        assert tree(child.pid)[0] == child.pid
    assert cpu_s([child.pid]) == 0  # gone


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_the_provider_answers_plainly_too(provider_url: str, path: str) -> None:
    answer = httpx2.post(f"{provider_url}{path}", json={"model": Pace(3).model, "messages": []})
    assert answer.headers["content-type"] == "application/json"
    said = answer.json()
    text = (
        said["choices"][0]["message"]["content"]
        if "choices" in said
        else said["content"][0]["text"]
    )
    assert text.count("token ") == 2
    assert unstamp(text) is not None


def test_streams_that_gather_all_meet_and_end_together() -> None:
    work = unhurried(1000)
    ends_s = []
    for number in range(work.jobs):
        pace = work.pace_of(number)
        ends_s.append(
            work.start_s(number) + (pace.first_ms + (pace.tokens - 1) * pace.each_ms) / 1000
        )
    first_of_last_s = work.start_s(work.jobs - 1) + 0.1
    assert first_of_last_s <= min(ends_s)
    assert max(ends_s) < first_of_last_s + 0.5
    assert work.tokens == sum(work.pace_of(number).tokens for number in range(work.jobs))
    assert max(work.pace_of(number).tokens for number in range(work.jobs)) <= work.pace.tokens


class Pool:
    """Does nothing, and keeps what was asked of it."""

    def __init__(self, slots: int) -> None:
        self.roles: dict[str, list[int]] = {"worker": []}
        self.slots = slots
        self.asked: list[Work] = []

    async def go(self, work: Work) -> list[float]:
        self.asked.append(work)
        return [0.0] * work.jobs


def test_of_a_crowd_a_small_pool_does_one_turn() -> None:
    turn = one_turn(Pool(16), realistic(200))
    assert (turn.jobs, turn.concurrency, turn.tokens) == (16, 16, 16 * 128)
    assert turn == one_turn(Pool(16), realistic(1000))
    assert one_turn(Pool(16), Work(Pace(1), 600, 200)).jobs == 48
    assert one_turn(Pool(16), realistic(1)) == realistic(1)


async def test_a_turn_is_done_once_a_round_and_stands_in_the_table_of_every_crowd() -> None:
    small, large = Pool(16), Pool(1000)
    works = [realistic(1), realistic(50), realistic(200)]
    plans = tuple(Plan(work, ("small", "large")) for work in works)
    table = await _rounds(plans, 2, {"small": small, "large": large})
    assert [work.jobs for work in small.asked[1:]] == [1, 16] * 2  # after the warm-up
    assert [work.jobs for work in large.asked[1:]] == [1, 50, 200] * 2
    assert {len(cell.rounds) for cell in table.values()} == {2}
    assert table[works[2].name, "small"].rounds == table[works[1].name, "small"].rounds

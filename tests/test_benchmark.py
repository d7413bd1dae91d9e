"""What the benchmark calls exact is exact, its coins are fair, and it runs from end to end."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from langchain_stars import benchmark
from langchain_stars.benchmark import (
    CPU,
    SEGMENT_SIZE,
    TINY_MODEL,
    TINY_REWARD,
    AcceleratorBenchmark,
    Bench,
    Benchmark,
    Results,
    draw,
    make_tokenizer,
    measure,
    stratified_attempts,
)
from langchain_stars.cli import main

TINY = replace(
    CPU,
    language_model=TINY_MODEL,
    reward=TINY_REWARD,
    tokens=64,
    pairs=2,
    long_pairs=1,
    barrier_rows=4,
    barrier_segments=2,
    prompts=(64,),
    rows=(1, 4),
    shares=(0.5,),
    held_rows=(1, 8),
    memory_rounds=60,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(TINY, tmp_path_factory.mktemp("benchmark"))
    yield bench
    bench.close()


def rows_of(bench: Bench, identifier: str) -> list[benchmark.Result]:
    rows = Benchmark(bench, only=[identifier]).run().rows
    assert {row.id for row in rows} == {identifier}
    return rows


@pytest.mark.parametrize("identifier", ["C5", "C6", "C7"])
def test_every_token_is_forwarded_as_often_as_the_rounds_say(bench: Bench, identifier: str) -> None:
    rows = [row for row in rows_of(bench, identifier) if row.gate == "= 1"]
    assert rows
    for row in rows:
        assert row.value == 1.0, row.name
        assert row.holds


def test_a_reward_that_cuts_text_elsewhere_reads_little_again(bench: Bench) -> None:
    [row] = [row for row in rows_of(bench, "C6") if row.gate == "<= 1.1"]
    assert row.value is not None
    assert 1.0 <= row.value <= 1.1
    one, other = bench.tokenizer, bench.other_tokenizer
    text = one.decode(bench.prompt(3).ids)
    assert other.decode(other.encode(text)) == text
    assert one.tokenize(text) != other.tokenize(text)


def test_the_memory_of_keys_and_values_is_what_rows_need_and_does_not_grow(bench: Bench) -> None:
    held, growth = rows_of(bench, "C11")
    assert held.holds
    assert growth.value == 0


def test_a_row_says_the_same_alone_and_among_eight(bench: Bench) -> None:
    [row] = rows_of(bench, "C12")
    assert row.value == 1.0


@pytest.mark.parametrize("probability", [1.0, 0.75, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("count", [4, 16, 576])
def test_forced_acceptance_has_its_probability(probability: float, count: int) -> None:
    """The mean is exact; the share of first attempts, within what the quantiles can be off by."""
    needed = stratified_attempts(probability, count, seed=3)
    assert sum(needed) == round(count / probability)
    assert min(needed) >= 1
    first = sum(each == 1 for each in needed) / count
    assert abs(first - probability) <= 1.0 / count + 1e-9 or probability == 0.1
    assert sorted(needed) == sorted(stratified_attempts(probability, count, seed=4))


def test_each_attempt_is_accepted_with_the_same_probability() -> None:
    needed = stratified_attempts(0.5, 512, seed=0)
    for attempt in range(1, 5):
        reached = [each for each in needed if each >= attempt]
        share = sum(each == attempt for each in reached) / len(reached)
        assert share == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("candidates", [1, 4, None])
@pytest.mark.parametrize("lazy", [True, False])
def test_the_decoder_meets_the_coins_whatever_it_drafts_at_once(
    bench: Bench, candidates: int | None, lazy: bool
) -> None:
    prompts = bench.prompts(0, 3)
    policy = bench.policy(prompts, 0.5, tokens=64, candidates=candidates)
    sample = bench.run(prompts, policy=policy, tokens=64, max_rows=2, lazy=lazy)
    assert sample.num_tokens == 3 * 64
    assert sample.num_attempts == 2 * 3 * 64 // SEGMENT_SIZE


def test_both_sides_of_a_ratio_see_the_same_coins(bench: Bench) -> None:
    prompts = bench.prompts(0, 2)
    attempts = [
        bench.run(
            prompts,
            policy=bench.policy(prompts, 0.5, tokens=64, seed=5, candidates=candidates),
            tokens=64,
            max_rows=2,
        ).texts
        for candidates in (1, 3)
    ]
    assert attempts[0] == attempts[1]


def test_prompts_encode_to_the_ids_that_they_stand_for(bench: Bench) -> None:
    prompt = bench.prompt(7)
    assert bench.tokenizer.encode(prompt.text) == list(prompt.ids)
    tokenizer = make_tokenizer(1000)
    assert len(tokenizer) == 1000
    assert len({tokenizer.decode([token_id]) for token_id in range(1000)}) == 1000


def test_the_whole_benchmark_runs(tmp_path: Path) -> None:
    """Tiny models, so that nothing is said about gates; every row is there and has a value."""
    pytest.importorskip("matplotlib")
    measured = {f"C{number}" for number in range(1, 13)} | {"C2b", "C4b"}
    measured |= {f"A{number}" for number in range(1, 9)}
    wanted = measured | {"G1", "G11"}
    small = replace(TINY, tokens=32, pairs=1, memory_rounds=20)
    results = measure(only=[*wanted, "growth"], scale=small)
    assert {row.id for row in results.rows} == wanted
    for row in results.rows:
        assert row.id not in measured or (row.value is not None and row.value >= 0), row.name
    assert {curve.id for curve in results.curves} == {"prompt", "rows", "attempts", "reward"}
    assert [row.name for row in results.rows if len(row.name) > 58] == []  # the column's width
    page = results.as_text()
    assert "torch" in page
    assert "C10" in page
    saved = json.loads(json.dumps(results.as_json()))
    assert {"id", "name", "value", "spread", "gate", "holds"} <= set(saved["rows"][0])
    draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_each_optimisation_is_measured_beside_its_absence(bench: Bench) -> None:
    rows = Benchmark(bench, only=["A1", "A2", "A6", "A7"]).run().rows
    assert [row.id for row in rows] == ["A1", "A2", "A2", "A6", "A7"]
    for row in rows:
        assert row.spread is None  # of one pair
        assert row.gate == ">= 0.95"
        assert "tokens/s" in row.counts


def test_what_wants_an_accelerator_runs_on_any_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its first run on a GPU is not the first run of it."""
    monkeypatch.setattr(benchmark, "_bandwidth", lambda device: 1e10)
    small = replace(TINY, prompt=16, tokens=32)
    other = Bench(small, bench._folder / "accelerator")
    other._folder.mkdir()
    try:
        results: Results = AcceleratorBenchmark(other).run()
    finally:
        other.close()
    assert [row.id for row in results.rows] == sorted(
        (row.id for row in results.rows), key=lambda identifier: int(identifier[1:])
    )
    assert [row.name for row in results.rows if len(row.name) > 58] == []
    assert {row.id for row in results.rows} == {f"G{number}" for number in range(1, 12)}
    for row in results.rows:
        assert row.value is not None, row.name
        assert row.value > 0, row.name
    [room] = [row for row in results.rows if row.id == "G10"]
    assert (room.value, room.holds) == (4.0, True)


def test_rows_that_want_an_accelerator_say_how_to_get_them() -> None:
    if benchmark.torch.cuda.is_available():
        pytest.skip("there is one")
    wanted = [f"G{number}" for number in range(1, 12)]
    results = measure(only=wanted)
    assert [row.id for row in results.rows] == wanted
    page = results.as_text()
    for row in results.rows:
        assert row.value is None
        assert row.note.startswith("not run: no GPU")
        assert f"langchain-stars benchmark --only {row.id}" in page
    assert all(row["value"] is None for row in results.as_json()["rows"])


def test_the_processor_clock_does_not_count_waiting(tmp_path: Path) -> None:
    wall, processor = (Bench(replace(TINY, clock=clock), tmp_path) for clock in benchmark.CLOCKS)
    before = wall.now(), processor.now()
    time.sleep(0.5)
    assert wall.now() - before[0] >= 0.5
    assert processor.now() - before[1] < 0.4
    assert "processor" in benchmark.about(processor.scale)["reading"]


def test_a_row_that_there_is_not_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--only", "C99"]) == 2
    assert "C99" in capsys.readouterr().err


def test_the_command_writes_its_table_and_saves_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if benchmark.torch.cuda.is_available():
        pytest.skip("it would measure")
    path = tmp_path / "results.json"
    assert main(["benchmark", "--only", "G1,G9", "--json", str(path)]) == 0
    assert "not run: no GPU" in capsys.readouterr().out
    assert [row["id"] for row in json.loads(path.read_text())["rows"]] == ["G1", "G9"]

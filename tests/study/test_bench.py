"""The measurement of arms: statistics, rounds, failing arms, short memory."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from helpers.fake_arms import Clock, Fakes

from hf_fasttrain.study.bench import Arm, ArmFailed, Bench, Measurement, measure
from hf_fasttrain.study.intervals import coverage, estimate, paired_ratio
from hf_fasttrain.study.messages import Turn

TURN = Turn(min_steps=2, seconds=1.0)


def quiet(text: str) -> None:
    """Print nothing."""


def test_the_interval_contains_the_median_with_its_probability() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 6, 9, 15):
        intervals = [estimate(sample) for sample in rng.lognormal(size=(4000, n)).tolist()]  # whose true median is 1
        hits = np.mean([interval.low <= 1 <= interval.high for interval in intervals])
        assert hits == pytest.approx(intervals[0].confidence, abs=0.015)
        assert intervals[0].confidence >= 0.95 or n < 6


def test_the_interval_is_the_sign_tests() -> None:
    assert coverage(6, 1) == pytest.approx(1 - 2 / 2**6)
    assert coverage(9, 2) == pytest.approx(1 - 2 * (1 + 9) / 2**9)
    nine = estimate([9, 1, 2, 8, 3, 7, 4, 6, 5])
    assert (nine.median, nine.low, nine.high) == (5, 2, 8)
    one = estimate([4.0])
    assert (one.median, one.low, one.high, one.confidence) == (4.0, 4.0, 4.0, 0.0)
    with pytest.raises(ValueError, match="no values to estimate from"):
        estimate([])


def test_a_drift_of_both_cancels_in_paired_ratios() -> None:
    drift = [1.0, 1.5, 2.0, 3.0, 2.5, 1.2, 1.1]
    ratio = paired_ratio([2 * value for value in drift], drift)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)


def test_every_round_gives_each_arm_one_turn_while_the_machine_slows_down() -> None:
    clock = Clock()
    fakes = Fakes(lambda settings: (0.01 if "a" in settings else 0.02) * (1 + clock.now / 100), clock)
    arms = [Arm("fast", ("a=1",)), Arm("slow", ("b=1",)), Arm("slow, again", ("b=1",))]
    with Bench(fakes, clock=clock) as bench:
        fast, slow, repeated = measure(arms, bench, rounds=9, turn=TURN, note=quiet)
    assert list(fast.rounds) == list(range(9)) == list(slow.rounds)
    assert fast.speed_up(slow).median == pytest.approx(2, rel=0.1)
    same = repeated.speed_up(slow)
    assert same.median == pytest.approx(1, abs=0.06)
    assert same.low <= 1 <= same.high
    assert fakes.alive == 0
    assert len(fakes.started) == 3 * 9  # each turn in a separate process


def test_the_order_of_a_round_changes() -> None:
    fakes, order = Fakes(lambda settings: 0.01), []
    fakes.before_turn = lambda arm: order.append(arm.name)
    with Bench(fakes, clock=fakes.clock) as bench:
        measure([Arm(name) for name in "abcd"], bench, rounds=3, turn=TURN, note=quiet)
    rounds = [tuple(order[8 * i : 8 * i + 8 : 2]) for i in range(3)]  # each a first turn and a measured one
    assert len(set(rounds)) > 1
    assert all(sorted(names) == list("abcd") for names in rounds[:1])


def test_an_arm_that_fails_is_a_row_and_the_others_go_on() -> None:
    def speed(settings: dict[str, str]) -> float:
        if "broken" in settings:
            raise ArmFailed("out of memory: 3 GiB", out_of_memory=True)
        return 0.01

    fakes, notes = Fakes(speed), []
    arms = [Arm("fine"), Arm("broken", ("broken=1",)), Arm("senseless", (), "no GPU")]
    with Bench(fakes, clock=fakes.clock) as bench:
        fine, failing, invalid = measure(arms, bench, rounds=2, turn=TURN, note=notes.append)
    assert fine.is_measured
    assert not failing.is_measured
    assert failing.failed == "out of memory: 3 GiB"
    assert invalid.failed == "no GPU"
    assert "senseless" not in [arm.name for arm in fakes.started]
    assert "broken: out of memory: 3 GiB" in notes


def test_an_arm_may_fail_in_a_later_round() -> None:
    fakes, turns = Fakes(lambda settings: 0.01), []

    def before(arm: Arm) -> None:
        turns.append(arm.name)
        if arm.name == "b" and turns.count("b") == 3:
            raise ArmFailed("its process was killed, possibly out of memory", out_of_memory=True)

    fakes.before_turn = before
    with Bench(fakes, clock=fakes.clock) as bench:
        a, b = measure([Arm("a"), Arm("b")], bench, rounds=3, turn=TURN, note=quiet)
    assert len(a.rounds) == 3
    assert b.failed.startswith("its process was killed")
    assert not b.is_measured
    assert fakes.alive == 0


def test_arms_that_waited_longest_are_closed_first() -> None:
    fakes = Fakes(lambda settings: 0.01)
    bench = Bench(fakes, clock=fakes.clock, free_bytes=lambda: 110 - 30 * fakes.alive)
    measurements = [Measurement(Arm(name)) for name in "abcd"]
    for measurement in measurements:
        assert bench.warm_up(measurement)
        measurement.host_bytes = 30
    assert fakes.alive == 3  # 1.5 times the largest must be free
    bench.turn(measurements[0], 0, TURN)  # starts again
    assert [arm.name for arm in fakes.started] == ["a", "b", "c", "d", "a"]
    bench.close()
    assert fakes.alive == 0


def test_out_of_memory_next_to_other_arms_is_retried_alone() -> None:
    fakes = Fakes(lambda settings: 0.01)

    def speed(settings: dict[str, str]) -> float:
        if "large" in settings and fakes.alive > 1:
            raise ArmFailed("out of memory: others have it", out_of_memory=True)
        return 0.01

    fakes.speed = speed
    with Bench(fakes, clock=fakes.clock) as bench:
        measurements = [Measurement(Arm(name, (f"{name}=1",))) for name in ("small", "other", "large")]
        assert [bench.warm_up(measurement) for measurement in measurements] == [True, True, True]
    assert measurements[2].failed == ""


def test_compilation_is_counted_separately() -> None:
    fakes = Fakes(lambda settings: 0.01, compiling=50.0)
    with Bench(fakes, clock=fakes.clock) as bench:
        eager, compiled = measure(
            [Arm("eager"), Arm("compiled", ("accelerate.compile=true",))], bench, rounds=3, turn=TURN, note=quiet
        )
    assert compiled.compile_seconds == pytest.approx(50)
    assert eager.compile_seconds == 0
    assert compiled.speed_up(eager).median == pytest.approx(1)


def test_a_bench_closes_all_arms_on_ctrl_c() -> None:
    fakes = Fakes(lambda settings: 0.01)

    def before(arm: Arm) -> None:
        if len(fakes.started) == 2:
            raise KeyboardInterrupt

    fakes.before_turn = before
    with pytest.raises(KeyboardInterrupt), Bench(fakes, clock=fakes.clock) as bench:
        measure([Arm("a"), Arm("b")], bench, rounds=1, turn=TURN, note=quiet)
    assert fakes.alive == 0


def test_a_measurement_keeps_its_peak_memory() -> None:
    fakes = Fakes(lambda settings: 0.01)
    with Bench(fakes, clock=fakes.clock) as bench:
        (one,) = measure([Arm("a")], bench, rounds=4, turn=TURN, note=quiet)
    assert (one.device_bytes, one.host_bytes) == (10, 20)
    assert one.wait_fraction == 0
    assert one.images_per_second.median == pytest.approx(100)
    assert one.seconds_per_image == pytest.approx(statistics.median(one.rounds.values()))

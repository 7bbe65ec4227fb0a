"""Checks the results of `ablate`, `tune` and `doctor` on real training recipes.

    python benchmarks/study.py grid RECIPE [section.key=value ...] [--budget 3m] [--rounds 5]
    python benchmarks/study.py repeat RECIPE [section.key=value ...] [--only NAME,NAME]
    python benchmarks/study.py doctor RECIPE [section.key=value ...]

grid    runs `tune` with its budget, then every combination of precision, memory layout and micro-batch (with --compile
        also compiled), and finally compares tune's choice with the grid's best two: it should be within 5 % of the
        best, and within 20 % of the budget. Precisions that the guard rejects do not count as the best.
repeat  runs an ablation twice: the intervals of every arm should overlap, and the repeated baseline should not differ
doctor  compares the sum of doctor's phases with the same training without timing, and its forecast with a training that
        follows its first advice: they should agree within 5 % and 15 %
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_fasttrain import Recipe, load_recipe
from hf_fasttrain.study import tune_space as space
from hf_fasttrain.study.ablate import Plan, ablate
from hf_fasttrain.study.arm_process import Starter
from hf_fasttrain.study.bench import Arm, Bench, Measurement, collect
from hf_fasttrain.study.doctor import doctor
from hf_fasttrain.study.doctor_diagnosis import split_step
from hf_fasttrain.study.intervals import estimate
from hf_fasttrain.study.messages import ArmOptions, Turn, to_arm_request
from hf_fasttrain.study.techniques import hardware
from hf_fasttrain.study.tune import TuneResult, parse_budget, tune
from hf_fasttrain.study.tune_guard import IMAGES, compare, loss_curve
from hf_fasttrain.study.tune_recipe import summary
from hf_fasttrain.study.tune_space import Config, overrides_of
from hf_fasttrain.utils.environment import free_memory_bytes, num_cores
from hf_fasttrain.utils.format import format_interval

QUICK = Turn(min_steps=2, seconds=0.7)
LONG = Turn(min_steps=3, seconds=2.0)


def print_note(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def grid_of(found: TuneResult, *, compiled: bool) -> list[Config]:
    """Return every combination of the most important settings."""
    base = found.tried[0].config
    precisions = [{key: config[key] for key in space.MATH_KEYS} for config in space.precisions(base, hardware())]
    sizes = [None, *(c["accelerate.micro_batch_size"] for c in space.micro_batches(base, found.ready)[:1])]
    compiles = [False, True] if compiled else [False]
    return [
        {
            **base,
            **precision,
            "accelerate.channels_last": layout,
            "accelerate.micro_batch_size": size,
            "accelerate.compile": compile_it,
        }
        for precision, layout, size, compile_it in itertools.product(precisions, (True, False), sizes, compiles)
    ]


def judged(configs: list[Config], found: TuneResult, start: Starter) -> dict[str, bool]:
    """Return which precisions train like fp32; those that tune had no time for are compared here."""
    verdicts = {name: verdict.is_good for name, verdict in found.guards.items()}
    base = {**found.tried[0].config, "accelerate.micro_batch_size": None, "data.cache": "none"}
    images = min(IMAGES, int(found.ready.settings["train.batch_size"]))
    for config in configs:
        name = space.precision_name(config, hardware().gpu)
        if name not in verdicts and not space.is_plain(config):
            plain, other = space.precisions(base, hardware())[0], {key: config[key] for key in space.MATH_KEYS}
            fp32 = loss_curve(start, overrides_of(plain), images, None)
            verdict = compare(loss_curve(start, overrides_of({**plain, **other}), images, None), fp32)
            print(f"  {name}: {verdict}")
            verdicts[name] = verdict.is_good
        verdicts.setdefault(name, True)
    return verdicts


def grid(recipe: Recipe, budget: str, rounds: int, *, compiled: bool) -> None:
    seconds, start_time = parse_budget(budget), time.perf_counter()
    found = tune(recipe, seconds, hardware(), note=print_note)
    elapsed = time.perf_counter() - start_time
    print(f"tune: {elapsed:.0f} s of {seconds:.0f} s ({elapsed / seconds:.2f})")
    print(f"  {space.difference(found.best.config, found.tried[0].config)}")
    for line in summary(found):
        print(f"  {line}")
    for name, verdict in found.guards.items():
        print(f"  {name}: {verdict}")
    base = found.tried[0].config
    configs = grid_of(found, compiled=compiled)
    start_time = time.perf_counter()
    with Starter(to_arm_request(recipe), on_gpu=hardware().gpu) as start:
        measured: list[tuple[Config, Measurement]] = []
        for config in configs:
            measurement = Measurement(Arm(space.difference(config, base), overrides_of(config)))
            with Bench(start) as bench:
                if bench.warm_up(measurement):
                    for number in range(2):
                        bench.turn(measurement, number, QUICK)
            measured.append((config, measurement))
        able = [(c, m) for c, m in measured if m.is_measured]
        able.sort(key=lambda pair: pair[1].seconds_per_image)
        allowed = judged(configs, found, start)
        print(f"grid of {len(configs)} arms: {time.perf_counter() - start_time:.0f} s")
        for config, measurement in able:
            refused = "" if allowed[space.precision_name(config, hardware().gpu)] else "  (refused by the guard)"
            print(f"  {1 / measurement.seconds_per_image:8.1f} images/s  {measurement.arm.name}{refused}")
        best = [(c, m) for c, m in able if allowed[space.precision_name(c, hardware().gpu)]][:2]
        finalists = [Measurement(Arm("tune's choice", overrides_of(found.best.config)))]
        finalists += [Measurement(Arm(m.arm.name, m.arm.overrides)) for _, m in best]
        with Bench(start, free_bytes=free_memory_bytes) as bench:
            collect(finalists, bench, rounds=rounds, turn=LONG, note=print_note)
    ratios = [m.speed_up(finalists[0]) for m in finalists[1:]]
    for measurement, ratio in zip(finalists[1:], ratios, strict=True):
        print(f"  grid's {measurement.arm.name}: {measurement.images_per_second} images/s, / tune's choice {ratio}")
    worst = max(ratio.median for ratio in ratios)
    print(f"tune's choice is {1 / worst:.3f} of the best arm: {'ok' if worst <= 1.05 else 'MISSED'}")


def repeat(recipe: Recipe, only: tuple[str, ...], rounds: int) -> None:
    plan = Plan(rounds=rounds, only=only, without=() if only else ("compile",))
    first, second = (ablate(recipe, plan, command="", note=print_note)[0] for _ in range(2))
    for a, b in zip(first.rows, second.rows, strict=True):
        if a.speed_up and b.speed_up:
            overlap = a.speed_up.low <= b.speed_up.high and b.speed_up.low <= a.speed_up.high
            again = abs(a.speed_up.median - 1) <= 0.02 and a.speed_up.low <= 1 <= a.speed_up.high
            overlap = overlap and (a.kind != "again" or again)
            texts = (format_interval(i.median, i.low, i.high) for i in (a.speed_up, b.speed_up))
            print(f"{a.name}: {', '.join(texts)} {'ok' if overlap else 'APART'}")


def compare_sums(recipe: Recipe, rounds: int = 7) -> None:
    """Compare the sum of a timed training's phases with the step time of an untimed one, alternately."""
    with Starter(to_arm_request(recipe), on_gpu=hardware().gpu) as start:
        profiled = start(Arm("profiled"), ArmOptions(profiled=True, stored_tuning=True))
        plain = start(Arm("plain"), ArmOptions(stored_tuning=True))
        ratios = []
        for arm in (profiled, plain):
            arm.turn(Turn(min_steps=3, seconds=1.0, drain=True))
        for _ in range(rounds):
            phases = split_step(profiled.turn(QUICK))[1]
            report = plain.turn(QUICK)
            ratios.append(sum(phases.values()) / (report.seconds / len(report.step_seconds)))
        profiled.close()
        plain.close()
    found = estimate(ratios)
    verdict = "ok" if abs(found.median - 1) <= 0.05 else "MISSED"
    print(f"phases together / an untimed step: {found} {verdict}")


def examine(recipe: Recipe, recipe_file: str) -> None:
    diagnosis = doctor(recipe, hardware(), seconds=45, note=print_note)
    print(diagnosis.verdict)
    compare_sums(recipe)
    stages = sum(diagnosis.stages.values())
    print(f"loader's stages together {1000 * stages:.3f} ms of a worker for an image")
    if not diagnosis.advice:
        print("no advice")
        return
    advice = diagnosis.advice[0]
    print(f"first advice: {advice.text}: {advice.images_per_second:.1f} images/s forecast")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        steps = max(20, int(20 * advice.images_per_second / diagnosis.images_per_step))
        if diagnosis.ready.keeps_pixels or "data.cache" in advice.text:
            steps += 3 * diagnosis.ready.steps_per_epoch
        overrides = [*recipe.source.overrides, *advice.overrides, f"train.duration={steps} steps", f"output_dir={run}"]
        command = [sys.executable, "-m", "hf_fasttrain", "train", recipe_file, *overrides, "log.every=5"]
        process = subprocess.run([*command, "schedule.name=constant"], capture_output=True, text=True, check=False)
        if process.returncode:
            sys.exit(process.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if line["kind"] == "train"]
        later = sorted(rates[len(rates) // 2 :])
        real = later[len(later) // 2]
    ratio = real / advice.images_per_second
    print(
        f"followed in a training of {steps} steps: {real:.1f} images/s (median of the later half's log lines), ", end=""
    )
    print(f"/ forecast {ratio:.3f} {'ok' if 0.85 <= ratio <= 1.15 else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("grid", "repeat", "doctor"))
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--budget", default="3m")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(f"{recipe.source.name} {' '.join(arguments.overrides)}; {num_cores()} cores", flush=True)
    if arguments.study == "grid":
        grid(recipe, arguments.budget, arguments.rounds, compiled=arguments.compile)
    elif arguments.study == "repeat":
        repeat(recipe, tuple(name for name in arguments.only.split(",") if name), arguments.rounds)
    else:
        examine(recipe, arguments.recipe)


if __name__ == "__main__":
    main()

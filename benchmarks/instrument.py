"""A check of the measurement: identical arms should not differ.

    python benchmarks/instrument.py [RECIPE] [section.key=value ...] [--arms 4] [--rounds 9] [--seconds 2]

Runs the same training as several arms alternately, as `hf-fasttrain ablate` does, and prints how each differs from the
first: the median over rounds should be within 2 % of 1, and its interval should contain 1.
"""

from __future__ import annotations

from hf_fasttrain.before_torch import limit_spinning

limit_spinning()

import argparse
import sys

from hf_fasttrain import load_recipe
from hf_fasttrain.study.arm_process import Starter
from hf_fasttrain.study.bench import Arm, Bench, measure
from hf_fasttrain.study.messages import Turn, to_arm_request
from hf_fasttrain.study.techniques import hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--arms", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    arms = [Arm(f"arm {number + 1}") for number in range(arguments.arms)]
    with Starter(to_arm_request(recipe), on_gpu=hardware().gpu) as start, Bench(start) as bench:
        turn = Turn(min_steps=3, seconds=arguments.seconds)
        measurements = measure(
            arms, bench, rounds=arguments.rounds, turn=turn, note=lambda text: print(text, file=sys.stderr)
        )
    for measurement in measurements:
        ratio = measurement.speed_up(measurements[0])
        verdict = "ok" if abs(ratio.median - 1) <= 0.02 and ratio.low <= 1 <= ratio.high else "DIFFERS"
        print(f"{measurement.arm.name}: {measurement.images_per_second} images/s, / first {ratio.median:.3f} ", end="")
        print(f"({ratio.low:.3f} - {ratio.high:.3f}) {verdict if measurement is not measurements[0] else ''}")


if __name__ == "__main__":
    main()

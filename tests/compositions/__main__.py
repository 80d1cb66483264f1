"""Composes settings at random and compares each case with one device, see `drawing.py` and `running.py`.

    python -m tests.compositions --seed 0 --minutes 120
    python -m tests.compositions --case 17

Cases have the numbers seed, seed + 1, …; each runs alone with `--case`. Batches of them run in a process of their own, so that a case
that aborts XLA is one line and not the end. A case prints one line, and one that fails its settings as YAML too. Exit code 0:
none failed.
"""

import argparse
import collections
import faulthandler
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import yaml

TESTS = Path(__file__).parents[1]
IN_A_PROCESS = 20
SECONDS_OF_A_CASE = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--case", type=int, help="run only this one, in this process")
    parser.add_argument("--cases", type=int, nargs=2, help=argparse.SUPPRESS)  # first and number, in this process
    options = parser.parse_args()
    if options.case is not None:
        return run_cases(options.case, 1)
    if options.cases:
        return run_cases(*options.cases)
    return run_processes(options.seed, time.monotonic() + 60 * options.minutes)


def run_processes(first: int, end: float) -> int:
    """Runs cases until the time is over, and prints a summary."""
    kinds, refusals, failed, number = collections.Counter[str](), collections.Counter[str](), list[str](), first
    while time.monotonic() < end:
        command = [sys.executable, "-m", "tests.compositions", "--cases", str(number), str(IN_A_PROCESS)]
        last, done = number, 0
        env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
        with subprocess.Popen(
            command, cwd=TESTS.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child:
            assert child.stdout
            for line in child.stdout:
                word, _, rest = line.partition(" ")
                if word == "start":
                    last = int(rest)
                    continue
                print(line, end="", flush=True)
                if word == "case":
                    kind = rest.split()[1]
                    kinds[kind] += 1
                    done = last - number + 1
                    if kind == "refused":
                        refusals[rest.split()[2].rstrip(":")] += 1
                    elif kind != "same":
                        failed.append(f"{last} {kind}")
                    if time.monotonic() > end:
                        child.terminate()
                        break
        if time.monotonic() < end and done < IN_A_PROCESS:
            print(f"case {last} ABORTED: the process ended with {child.returncode}", flush=True)
            kinds["ABORTED"] += 1
            failed.append(f"{last} ABORTED")
            done = last - number + 1
        number += done
    print(f"\n{sum(kinds.values())} cases from {first}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
    print(
        "refused, by the first setting that is named: " + ", ".join(f"{n} {key}" for key, n in refusals.most_common())
    )
    print("failed: " + (", ".join(failed) or "none"))
    return int(bool(failed))


def run_cases(first: int, count: int) -> int:
    """Runs cases in this process; returns how many failed."""
    sys.path.insert(0, str(TESTS))
    import conftest

    conftest.use_simulated_devices()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    from compositions.drawing import draw
    from compositions.running import run

    failed = 0
    for number in range(first, first + count):
        print(f"start {number}", flush=True)
        faulthandler.dump_traceback_later(SECONDS_OF_A_CASE, exit=True)  # devices that wait for each other for ever
        case, start = draw(number), time.monotonic()
        try:
            result = run(case)
            error = "" if result.kind == "refused" else f"{result.error:.1e} "
            line, is_good = f"{result.kind} {error}{result.text}", result.kind != "WRONG"
        except Exception:
            line, is_good = f"ERROR {traceback.format_exc().strip().splitlines()[-1]}", False
            traceback.print_exc()
        print(f"case {number} {line[:600]}, {time.monotonic() - start:.1f} s, {case}", flush=True)
        if not is_good:
            failed += 1
            more = {key: value for key, value in vars(case).items() if key not in ("settings", "features", "number")}
            print(f"  python -m tests.compositions --case {number}    # {more}")
            print("    " + yaml.safe_dump(case.values(), sort_keys=False).replace("\n", "\n    "), flush=True)
        jax.clear_caches()
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""Some minutes of the soak, and its own eyes: what it must notice in an experiment's folder, it notices."""

import json
import shutil
import zlib

import pytest
from soak.__main__ import soak
from soak.faults import FAULTS
from soak.life import Life
from soak.run import Violation

SEED = 3


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_some_minutes_of_it(tmp_path):
    report = soak(SEED, minutes=3, folder=tmp_path)
    assert sum(report.count.values()) >= 4 and report.figures["losses compared"] > 20


@pytest.fixture
def life(tmp_path) -> Life:
    """Two checkpoints and seven rows, looked at once."""
    life = Life(tmp_path / "life", "0/0", data_seed=0)
    life.reference = [dict(step=n, loss=5 / n, tokens=512, learning_rate=n / 10, skipped=False) for n in range(1, 8)]
    for step in (3, 6):
        folder = life.checkpoints_folder / f"global_step_{step}"
        (folder / "state").mkdir(parents=True)
        (folder / "state/params").write_bytes(bytes([step] * 9))
        (folder / "manifest.json").write_text(json.dumps({"step": step, "data": {"batch": step}}))
        sums = {"state/params": [9, zlib.crc32(bytes([step] * 9))]}
        (folder / "checksums.json").write_text(json.dumps(sums))
        (folder / "commit_success.txt").touch()
    write_rows(life, life.reference)
    life.look()
    return life


def write_rows(life: Life, rows: list[dict]) -> None:
    life.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_a_row(life: Life, **change: object) -> None:
    write_rows(life, [{**row, **change} if row["step"] == 4 else row for row in life.reference])
    life.rows = []  # so that it is compared with the reference


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda life: shutil.rmtree(life.newest()), "global_step_6 is gone or torn"),
        (lambda life: (life.newest() / "state/params").write_bytes(b"x" * 9), "global_step_6 is gone or torn"),
        (lambda life: (life.newest() / "more").touch(), r"steps \[6\] have changed"),
        (lambda life: life.newest().rename(life.newest().with_name("global_step_7")), "step and position"),
        (lambda life: write_rows(life, life.reference[:5]), "ends at 5, before checkpoint 6"),
        (lambda life: write_rows(life, [*life.reference[:4], *life.reference[3:]]), r"has the steps \[1, 2, 3, 4, 4"),
        (lambda life: write_rows(life, life.reference[1:]), r"has the steps \[2, 3"),
        (lambda life: life.metrics.write_text("{"), "damaged line"),
        (lambda life: change_a_row(life, loss=5 / 4 * 1.00002), "step 4: loss"),
        (lambda life: change_a_row(life, tokens=511), "step 4: tokens 511"),
    ],
)
def test_what_it_notices(life, harm, words):
    harm(life)
    with pytest.raises(Violation, match=words):
        life.look()


def test_each_draw_follows_from_the_seed_and_the_turn(tmp_path):
    draws = []
    for name in ("a", "b"):
        life = Life(tmp_path / name, "5/2", data_seed=0)
        for turn in (range(3), [2])[name == "b"]:
            life.turn(turn)
            drawn = [life.draw(0, 1, ""), life.choose(FAULTS)]
        draws.append(drawn)
    assert draws[0] == draws[1]

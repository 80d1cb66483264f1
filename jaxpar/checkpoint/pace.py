"""Whether the disk keeps up with the saves of a run."""

import math
import time


class Pace:
    """Tells, once, that training has waited because the earlier checkpoint was not yet written.

    Args:
      interval: `runner.save_interval`.
    """

    def __init__(self, interval: int):
        self._interval, self._earlier, self._start, self._told = interval, 0, 0.0, False

    def next_save(self, step: int, waited: float) -> str | None:
        """Call it when the earlier save is written and that of `step` begins.

        Args:
          waited: seconds that training has waited for the earlier save.

        Returns:
          A line for the user if that was a second or more and the two saves are `interval` steps apart; else None.
        """
        now = time.perf_counter()
        earlier, took = self._earlier, now - self._start
        self._earlier, self._start = step, now
        if self._told or waited < 1 or not earlier or step - earlier != self._interval:
            return None
        self._told = True
        enough = math.ceil(self._interval * took / max(took - waited, 1e-3))
        return (
            f"step {step}: training waited {waited:.1f} s until the checkpoint of step {earlier} was written, which took {took:.1f} s: "
            f"runner.save_interval: {self._interval} is too short for this disk; with {enough} there would be no wait"
        )

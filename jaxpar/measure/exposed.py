"""Which transfers hide behind work, and which the chip waits for ("exposed"), from the order of instructions.

A transfer takes time on its link from its start to its done, while the chip executes what the compiler has scheduled in
between. If that is not enough, the chip waits at the done. Each link carries one transfer at a time, so work that hides one
transfer cannot hide another one on the same link.

`Timeline` adds this up for one execution of a computation. It records, for every piece of work, how long each link has
nothing to carry meanwhile. A transfer that is waited for takes the earliest such seconds since its start; the chip waits
for the rest. Transfers are therefore served in the order in which they are needed, which is the order that leaves the
least to wait for: the result is a lower bound.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

LINKS = ("nvlink", "network")


@dataclass(frozen=True)
class Transfers:
    """All transfers of one kind of collective over the same mesh axes, in a step of one device.

    Attributes:
      axes: as in `jaxpar.measure.hlo.Collective`; () if the mesh is not known.
      link: "nvlink" or "network". Of transfers on both, the one that takes longer.
      seconds: that the transfers take.
      exposed_seconds: the part of them in which the chip waits.
    """

    kind: str
    axes: tuple[str, ...]
    link: str
    seconds: float
    exposed_seconds: float


@dataclass(frozen=True)
class Flight:
    """A transfer that has started: its seconds on each link, and the number of steps in its timeline before it."""

    kind: str
    axes: tuple[str, ...]
    links: Mapping[str, float]
    since: int


class Timeline:
    """Work and transfers in one execution of a computation, in the order of its instructions.

    Attributes:
      seconds: of work and of waiting for transfers.
      busy: link → seconds in which it carries something; never more than `seconds`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.busy = dict.fromkeys(LINKS, 0.0)
        self._idle: list[dict[str, float]] = []  # for each step so far, the seconds in which a link carries nothing
        self._transfers: dict[tuple[str, tuple[str, ...], str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def work(self, seconds: float) -> None:
        """The chip works, and sends nothing."""
        self._step(seconds, dict.fromkeys(LINKS, 0.0))

    def repeat(self, inner: "Timeline", times: float) -> None:
        """A whole computation runs, with its own transfers: a loop, a branch, a call."""
        self._step(times * inner.seconds, {link: times * seconds for link, seconds in inner.busy.items()})
        for key, (seconds, exposed) in inner._transfers.items():
            self._add(key, times * seconds, times * exposed)

    def start(self, kind: str, axes: tuple[str, ...], links: Mapping[str, float]) -> Flight:
        """A transfer starts that takes `links[link]` seconds on each of its links."""
        return Flight(kind, axes, links, len(self._idle))

    def wait(self, flight: Flight) -> None:
        """The chip waits for the rest of a transfer."""
        rest = dict.fromkeys(LINKS, 0.0) | {
            link: self._take(link, seconds, flight.since) for link, seconds in flight.links.items()
        }
        exposed = max(rest.values())
        self._step(exposed, rest)
        slower = max(flight.links, key=lambda link: flight.links[link])
        self._add((flight.kind, flight.axes, slower), flight.links[slower], exposed)

    def transfers(self) -> list[Transfers]:
        """The longest first."""
        found = [Transfers(*key, *seconds) for key, seconds in self._transfers.items()]
        return sorted(found, key=lambda transfers: -transfers.seconds)

    def _take(self, link: str, seconds: float, since: int) -> float:
        """Sends for `seconds` in a link's idle time of the steps from number `since` on, and returns what is left."""
        for idle in self._idle[since:]:
            sent = min(seconds, idle[link])
            idle[link] -= sent
            self.busy[link] += sent
            seconds -= sent
        return seconds

    def _step(self, seconds: float, busy: Mapping[str, float]) -> None:
        self.seconds += seconds
        for link in LINKS:
            self.busy[link] += busy[link]
        self._idle.append({link: seconds - busy[link] for link in LINKS})

    def _add(self, key: tuple[str, tuple[str, ...], str], seconds: float, exposed: float) -> None:
        before = self._transfers[key]
        self._transfers[key] = before[0] + seconds, before[1] + exposed

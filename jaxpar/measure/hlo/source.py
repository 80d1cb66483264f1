"""Which source line made an instruction: XLA's tables of files, locations and stack frames."""

import re
from dataclasses import dataclass

_LIBRARIES = re.compile(r"/(site|dist)-packages/(?!jaxpar/)|/lib/python[\d.]+/(?!site-packages)")


@dataclass(frozen=True)
class Frame:
    """A source line of the program that was traced."""

    file: str
    line: int


class Sources:
    """The stack frames in the text of a program.

    XLA prints them as tables before the first computation; an instruction's metadata has the number of its innermost frame.
    """

    def __init__(self, text: str):
        head = text[: text.find("\n\nENTRY ") if "\n\nENTRY " in text else len(text)]
        names = {int(n): name for n, name in re.findall(r'^(\d+) "([^"]*)"$', _section(head, "FileNames"), re.M)}
        found = re.findall(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", _section(head, "FileLocations"), re.M)
        locations = {int(n): Frame(names.get(int(file), "?"), int(line)) for n, file, line in found}
        frames = re.findall(
            r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)", _section(head, "StackFrames"), re.M
        )
        self._frames = {int(n): (locations.get(int(place)), int(parent)) for n, place, parent in frames}

    def line(self, frame_id: int) -> str:
        """The innermost line that is not a library's, as `models/decoder.py:122`; "" if it is not known."""
        seen: set[int] = set()
        while frame_id in self._frames and frame_id not in seen:
            seen.add(frame_id)
            frame, parent = self._frames[frame_id]
            if frame and not _LIBRARIES.search(frame.file):
                return f"{re.sub(r'^.*/jaxpar/', 'jaxpar/', frame.file)}:{frame.line}"
            # XLA numbers a parent one higher than its row, so that 0 can mean that there is none.
            frame_id = parent - 1
        return ""


def _section(head: str, title: str) -> str:
    found = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", head, re.M | re.S)
    return found[1] if found else ""

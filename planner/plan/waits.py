"""What the instructions of one rank wait for: the part of the partial order that one program tells.

This module knows streams and conflicting buffers. It does not know other ranks.
"""

from planner.plan.types import Instruction

__all__ = ["Waits"]


class Waits:
    """What the instructions of one rank wait for, found in program order.

    What holds up the issue of an instruction holds up all behind it, so it is carried on, until a
    compute instruction has waited for it: everything behind waits for that one. So conflicts with
    compute need no notice, and of each stream only the last that is waited for is carried.
    """

    def __init__(self) -> None:
        self.earlier: list[int] = []
        self.later: list[int] = []
        """Instruction later[k] waits for earlier[k] before it runs."""
        self.held: list[int] = []
        self.held_starts = [0]
        """As in PartialOrder.held_by."""
        self._carried: dict[str, int] = {}
        """Stream -> the last in it that the issue waits for."""
        self._last: dict[str, int] = {}
        """Stream -> the last in it, but for compute."""
        self._writers: dict[str, int] = {}
        """Buffer -> its last writer, unless that is compute."""
        self._readers: dict[str, list[int]] = {}
        """Buffer -> the readers since, the last of each stream, but for compute."""
        self._streams: list[str] = []
        """Of the instructions so far."""

    def add(self, instruction: Instruction) -> None:
        """Find what the next instruction waits for."""
        index, stream = len(self._streams), instruction.stream
        self._streams.append(stream)
        carried, writers, readers = self._carried, self._writers, self._readers
        if index and self._streams[index - 1] == "compute":
            self.held.append(index - 1)
        writes = instruction.writes
        for buffer in instruction.reads:
            if buffer in writers:
                self._hold(writers[buffer])
        for buffer in writes:
            if buffer in writers:
                self._hold(writers[buffer])
            if buffer in readers:
                for reader in readers.pop(buffer):
                    self._hold(reader)
        self.earlier += carried.values()
        self.later += [index] * len(carried)
        self.held_starts.append(len(self.held))
        if stream == "compute":
            carried.clear()
            carried[stream] = index
            for buffer in writes:
                writers.pop(buffer, None)
            return
        before = self._last.get(stream, -1)
        if before > carried.get(stream, -1):
            self.earlier.append(before)
            self.later.append(index)
        self._last[stream] = index
        for buffer in instruction.reads:
            if buffer not in writes:
                self._note_reader(buffer, index, stream)
        for buffer in writes:
            writers[buffer] = index

    def _hold(self, index: int) -> None:
        """The issue waits for an instruction that is not compute."""
        stream = self._streams[index]
        if index > self._carried.get(stream, -1):
            self._carried[stream] = index
            self.held.append(index)

    def _note_reader(self, buffer: str, index: int, stream: str) -> None:
        readers = self._readers.setdefault(buffer, [])
        for position, reader in enumerate(readers):
            if self._streams[reader] == stream:
                readers[position] = index
                return
        readers.append(index)

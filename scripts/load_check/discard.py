"""`extend merge` with an output that takes no room: `python discard.py ADAPTER TARGET OUT ROPE`.

Files get their header and their size, and holes in the place of tensors, which are computed and
hashed all the same: manifest.json has the hashes of what would lie there. That the disk has no room
for it is not looked at.
"""

import sys
from typing import Any

from extend.checkpoint import write
from extend.merge import merge


class HollowSink(write._Sink):
    def _write(self, data: bytes | memoryview) -> None:
        if self._written == 0:  # the header
            super()._write(data)
        else:
            self._file.seek(len(data), 1)
            self._written += len(data)

    def _finish(self) -> None:
        self._wait(-1)
        self._file.truncate()
        super()._finish()


def main(adapter: str, target: str, out: str, rope_from: str) -> Any:
    write._Sink = HollowSink
    write.require_space = lambda *_: None
    return merge(adapter, target, out, rope_from=rope_from)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Which of the errors of several processes is told, and that it says how to go on."""

import re

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from extend.errors import DataError, RankError, SilentRankError
from extend.train.launch import _first_error

UNHEARD = "RankError: rank 0 has not heard from rank 1, fetching 'keys', step 1; it died"
SILENT = "SilentRankError: process 1 has given no sign of life for 60 s, and was ended"
LOST = ("RankError: process 0 on h: the connection to another process broke. The same command "
        "goes on from the last checkpoint")


def failed(failures: list[tuple[int, int, str]]) -> ChildFailedError:
    """(rank, exit code, what it wrote) of each, in the order in which they were noticed."""
    found = {}
    for time, (rank, code, message) in enumerate(failures):
        failure = ProcessFailure(rank, 100 + rank, code, "")
        failure.message, failure.timestamp = message, time
        failure.error_file_data = {"message": message}
        found[rank] = failure
    return ChildFailedError("job", found)


@pytest.mark.parametrize(("failures", "kind", "told"), [
    ([(0, 1, UNHEARD), (1, -9, "Signal 9 (SIGKILL) received")], RankError,
     "process 1 ended with exit code -9: .*; the same command goes on from the last checkpoint$"),
    ([(1, -9, "Signal 9 (SIGKILL) received"), (0, 1, SILENT)], SilentRankError,
     "^process 1 has given no sign of life for 60 s, and was ended$"),
    ([(0, 1, UNHEARD)], RankError,
     "it died. The same command goes on from the last checkpoint$"),
    ([(0, 1, LOST)], RankError, "^process 0 on h: [^.]*. The same command goes on from the last "
                                "checkpoint$"),
    ([(0, 1, UNHEARD), (1, 1, "DataError: a.jsonl, line 3: no text")], DataError,
     "^a.jsonl, line 3: no text$"),
    ([(1, 1, "ValueError: odd")], RankError, "process 1 ended with exit code 1: ValueError: odd"),
])
def test_the_error_that_is_told(failures, kind, told):
    error = _first_error(failed(failures))
    assert type(error) is kind and re.search(told, str(error))

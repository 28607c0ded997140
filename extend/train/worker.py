"""One process of a run that `extend.train.launch` started: `python -m extend.train.worker JOB`."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers.utils.logging import disable_progress_bar

from extend.console import showing_logs
from extend.together import LAUNCHED_BY_US, failing_together
from extend.train.launch import stop_file
from extend.train.loop import run_process
from extend.train_options import TrainOptions


def _follow_parent(launcher: int, stop: Path) -> None:
    """Stop this process as by SIGTERM when the file `stop` is there; end it at once when its
    parent, the process `launcher`, has died.

    It would go on without anyone to tell. The launcher may be gone before this is called.
    """
    def watch() -> None:
        told = False
        while os.getppid() == launcher:
            if not told and stop.exists():
                told = True
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def main(ticket: str) -> int:
    """Run the job described in the file `ticket`; an error is left for the launcher to tell."""
    job = json.loads(Path(ticket).read_text(encoding="utf-8"))
    disable_progress_bar()
    sys.stdout = sys.stderr  # the launcher alone prints results
    _follow_parent(job["launcher"], stop_file(Path(ticket)))
    os.environ[LAUNCHED_BY_US] = "1"
    handler = get_error_handler()
    handler.initialize()
    try:
        # All processes have their level: what is for one of them is logged by that one alone.
        with showing_logs(job["log_level"]), failing_together():
            run_process(TrainOptions(**job["options"]), Path(job["out"]), job["overwrite"])
    except Exception as error:  # of any kind: the launcher tells the first one of all processes
        handler.record_exception(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

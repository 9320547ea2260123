"""The thread that runs a host's tasks."""

import sys
import threading

from esjax.hosts.executor import Background, Executor
from esjax.hosts.protocol import tasks


class LeavingExecutor(Executor):
    """Runs the code of a custom model that ends its program."""

    def do(self, task: tasks.Task) -> tasks.Result:
        sys.exit("enough")


def test_a_model_that_exits_fails_its_task_and_the_thread_runs_the_next_one() -> None:
    ended = threading.Semaphore(0)
    with Background(LeavingExecutor(tell=print), lambda: ended.release()) as background:
        for _ in range(2):
            background.give(tasks.TakeDigest())
            assert ended.acquire(timeout=60)
            assert background.results() == [tasks.Failed("SystemExit: enough")]

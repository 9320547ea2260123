"""Rewards that go wrong for some completions; for others, the reward is the number of letters."""

import os
import signal
import sys
from typing import Any


def reward(prompts: list[str], completions: list[str], answers: list[Any]) -> Any:
    match completions[0]:
        case "hang":
            while True:
                pass
        case "leave":
            os._exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit("enough")
        case "raise":
            raise ValueError("two\nlines")
        case "string":
            return "ab"
        case "strings":
            return ["1", "2"]
        case "short":
            return [1.0]
        case "nan":
            return [1.0, float("nan")]
        case "infinite":
            return [float("inf"), 1.0]
        case "nothing":
            return None
    print("a reward may print")
    return [len(one) for one in completions]

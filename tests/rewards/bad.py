"""Rewards and tools that go wrong; for other completions, the reward is the number of letters."""

import os
import signal
import sys
import time
from pathlib import Path
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


def tool_raises(text: str) -> str:
    """Fail, always."""
    raise ValueError("not now")


def tool_hangs(text: str) -> str:
    """Hang, always."""
    while True:
        pass


def tool_of_numbers(text: str) -> Any:
    """Return what is no string."""
    return 7


def tool_of_others(text: str) -> str:
    """Return what a vocabulary may not hold."""
    return "é"


def named(prompts: list[str], completions: list[str]) -> dict[str, list[float]]:
    """Return two rewards: the number of letters, and whether there is none."""
    return {"letters": [float(len(one)) for one in completions], "empty": [float(not one) for one in completions]}


def meet(prompts: list[str], completions: list[str]) -> list[float]:
    """Return the process; wait for another process that makes a call in the same folder, whose path is the prompt."""
    folder = Path(prompts[0])
    (folder / str(os.getpid())).touch()
    while len([*folder.iterdir()]) < 2:
        time.sleep(0.01)
    return [float(os.getpid())] * len(prompts)


def tool_of_halves(text: str) -> str:
    return "\ud800"

"""A step, and the line of progress that shows it."""

from esjax.runs.step_info import Limits, StepInfo

BASELINES = {"unigram": 3.34, "bigram": 2.51, "trigram": 1.99}

INFO = StepInfo(
    step=1234,
    seconds=41.0,
    loss=2.461,
    population=4096,
    void_pairs=3,
    applied=True,
    gradient_norm=0.5,
    update_norm=0.01234,
    member_tokens=10**8,
    member_tokens_per_second=3.08e6,
    held_out=2.391,
    hosts=4,
)

WHOLE = (
    "step 1,234  0:41  loss 2.461  held-out 2.391 (< unigram 3.34 < bigram 2.51 > trigram 1.99)  3.08 M/s  "
    "|update| 0.0123  void pairs 3  hosts 4  2:00 left"
)

TWO_MINUTES = Limits(None, 120.0)

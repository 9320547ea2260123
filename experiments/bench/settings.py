"""Settings of every benchmark, and how they are made small.

The docstring under each field is its help on the command line.
"""

from typing import Any, Literal

from esjax.config.section import Section


class Models(Section):
    """Which models are measured."""

    sizes: tuple[tuple[int, int, int, int], ...] = (
        (16, 4, 8, 4096),
        (32, 3, 32, 2048),
        (64, 4, 8, 2048),
        (256, 4, 32, 256),
        (512, 2, 32, 128),
        (1024, 2, 32, 64),
    )
    """Hidden size, layers, sequences a member, and population, of each rnn."""

    grus: tuple[tuple[int, int, int, int], ...] = ((32, 64, 1, 4096),)
    """Hidden size, head, sequences a member, and population, of each gru: the defaults of this model."""

    scale: int | None = None
    """Multiplies the populations. None: 1 on CPUs, 16 on an accelerator."""

    rounds: int = 5
    """Turns of each candidate."""


class Throughput(Models):
    """Member-tokens a second against rivals, a plain forward pass, and the machine's peak."""

    at_once: tuple[int, ...] | None = None
    """Sequences that a device has at a time, over all members, of which rivals try each. None: some that suit it."""

    rivals: tuple[Literal["evosax", "normal, kept", "normal, grown again"], ...] = (
        "evosax",
        "normal, kept",
        "normal, grown again",
    )
    """Evolution strategies of others, see `bench.rivals`."""

    peak: int = 2048
    """Rows of the square matrices whose product is the machine's peak."""

    numpy_tokens: int = 2**15
    """Member-tokens that numpy does in a call."""

    processes: bool = True
    """Measure in processes of their own, too: rivals in JAX with one device, on CPUs, and numpy with one thread."""

    choose_seconds: float = 60
    """Seconds after which no further settings of a rival are tried."""


class Execution(Models):
    """An evaluation on devices or threads, in chunks of other sizes, with products in bfloat16."""

    chunks: tuple[float, ...] = (0.25, 0.5, 2, 4)
    """Multiples of the default number of pairs that a device evaluates at a time."""


class Update(Section):
    """Cost of the update beside the evaluation, against population, hosts, width, rank and sequences a member."""

    population: int = 4096
    """Members, where another setting changes."""

    hidden: int = 32
    """Width, where another setting changes; the head's is twice as large."""

    populations: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Populations that are tried."""

    hosts: tuple[int, ...] = (1, 4, 16)
    """Numbers of hosts that are tried."""

    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Widths that are tried."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Ranks that are tried."""

    sequences: tuple[int, ...] = (1, 8, 32)
    """Sequences a member that are tried."""

    rnns: tuple[tuple[int, int, int, int], ...] = Throughput().sizes[:4]
    """Hidden size, layers, sequences a member, and population, of each rnn."""

    rnn_hosts: tuple[int, ...] = (1, 16)
    """Numbers of hosts that are tried with each rnn."""

    rounds: int = 7
    """Turns of evaluation and update."""


class Learning(Section):
    """Held-out loss over seconds and tokens: noise on weights, on activations, evosax, backpropagation."""

    methods: tuple[str, ...] = (
        "low rank 1",
        "low rank 1, noisy output",
        "split",
        "full",
        "gates",
        "gates, no feedback",
        "discount",
        "gates, mingru",
        "evosax",
        "backpropagation",
        "backpropagation, mingru",
    )
    """Methods that take turns."""

    seed: int = 0
    """Seed of the runs."""

    seconds: float = 120
    """Seconds that each trains."""

    every: float = 2
    """Seconds of a turn; each ends with an evaluation, which is not counted."""

    search_seconds: float | None = None
    """Seconds that each choice is tried for. 0: the usual ones are taken. None: a third of those of the run."""

    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    """Step sizes that are tried first, in multiples of the usual one."""

    extensions: int = 3
    """How often a step size three times as far out is tried, at most, where the best one is at an end."""

    targets: tuple[float, ...] = (3.33, 2.507, 2.2, 1.988, 1.8)
    """Losses to reach, in nats a token."""

    text: str = "builtin:shakespeare"
    """What is learned."""

    hidden: int = 32
    """Width of the gru."""

    head: int = 64
    """Width of its head."""

    population: int = 4096
    """Members a step, with noise on weights and with credit by discount."""

    evosax_windows: tuple[int, ...] = (8, 1, 2)
    """Windows of a step that all members of evosax score: numbers that are tried, the usual one first."""

    at_once: int = 256
    """Sequences that a device has at a time for evosax, over all members; `bench throughput` finds the best."""

    batches: tuple[int, ...] = (256, 64, 1024)
    """Windows of a step of backpropagation: numbers that are tried, the usual one first."""


class Start(Section):
    """Process start to the first finished step, to the help, and to the import."""

    words: tuple[str, ...] = ()
    """Settings of `esjax train`."""

    rounds: int = 5
    """Turns."""


class Ablation(Section):
    """What each choice is worth: held-out loss at the same number of member-tokens."""

    choices: tuple[str, ...] = ()
    """Choices to change, by name. None: all."""

    tokens: int = 60_000_000
    """Member-tokens of a run."""

    seeds: int = 3
    """Runs of each."""

    population: int = 4096
    """Members a step."""

    text: str = "builtin:shakespeare"
    """What is learned."""


class ScaleFree(Section):
    """What is lost when population, width or batch change and nothing else does."""

    factor: int = 4
    """By how much."""

    scaled: tuple[str, ...] = ("population", "width", "batch")
    """What is scaled."""

    tokens: int = 120_000_000
    """Member-tokens of a run."""

    seeds: int = 3
    """Runs of each."""

    population: int = 4096
    """Members a step."""

    hidden: int = 32
    """Width of the gru; its head's is twice as large."""

    text: str = "builtin:shakespeare"
    """What is learned."""


class Scaling(Section):
    """Rate of a step against devices, population, window and model size; memory."""

    population: int = 4096
    """Members, where another setting changes."""

    populations: tuple[int, ...] = tuple(2**power for power in range(8, 19, 2))
    """Populations that are tried."""

    windows: tuple[int, ...] = (8, 32, 128, 512)
    """Windows that are tried."""

    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Widths that are tried; the head's is twice as large."""

    rounds: int = 5
    """Turns."""


class Activation(Section):
    """A step with noise on activations against a plain forward pass."""

    widths: tuple[int, ...] = (32, 64, 128)
    """Widths of the gru that are tried."""

    population: int = 4096
    """Noisy copies a step."""

    at_once: tuple[int, ...] = (512, 256, 1024, 128, 2048)
    """Sequences that a device has at a time in the forward pass, of which the fastest counts."""

    rounds: int = 9
    """Turns."""


class Frameworks(Section):
    """Unmodified models of flax and equinox against their own plain forward pass."""

    models: tuple[str, ...] = (
        "linen GRU",
        "equinox GRU",
        "nnx transformer",
        "linen attention, tied embedding",
        "linen blocks, stacked",
    )
    """Which ones."""

    pairs: int = 2048
    """Pairs of an evaluation."""

    window: int = 32
    """Tokens that each member is scored on."""

    at_once: tuple[int, ...] = (128, 64, 256, 32)
    """Pairs that a device has at a time, or twice as many sequences in the forward pass; the fastest counts."""

    rounds: int = 9
    """Turns."""


class Exchange(Section):
    """A step of one host of several, with losses and with sums."""

    populations: tuple[int, ...] = (4096, 65536)
    """Populations that are tried."""

    hosts: tuple[int, ...] = (1, 4, 16)
    """Numbers of hosts that are tried."""

    hidden: int = 32
    """Width of the gru."""

    rounds: int = 5
    """Turns."""


class Cosines(Section):
    """Cosine of the estimate with the exact gradient, against the population."""

    steps: int = 150
    """Steps, with noise on activations, after which the gradient is taken."""

    populations: tuple[int, ...] = (256, 1024, 4096, 16384)
    """Populations that are tried."""

    spaces: tuple[str, ...] = ("full", "low_rank", "low_rank, exact output", "discount", "gates")
    """Estimators that are compared."""

    repeats: int = 30
    """Comparisons, with other windows and noise each."""

    hidden: int = 32
    """Width of the gru; its head's is twice as large."""

    text: str = "builtin:shakespeare"
    """What is learned."""


class Bias(Section):
    """What limits an estimator, leaf by leaf: bias or variance."""

    steps: int = 1000
    """Steps, with noise on activations, after which the gradient is taken."""

    windows: int = 64
    """Windows of an estimate, or pairs."""

    estimates: int = 256
    """Estimates that are averaged, of the same windows with other noise."""

    estimators: tuple[str, ...] = ("low rank", "discount", "gates, no feedback", "gates")
    """Estimators: low rank; low rank, noisy output; discount; gates, no feedback; gates."""

    model: str = "gru"
    """Name of the model."""

    text: str = "builtin:shakespeare"
    """What is learned."""


class Workers(Section):
    """Several processes that train together, against one."""

    workers: tuple[int, ...] = (2, 4)
    """Numbers of processes."""

    rounds: int = 3
    """Turns."""

    seconds: float = 20.0
    """Seconds of a run."""

    words: tuple[str, ...] = ()
    """Settings of `esjax train`."""


class Coordinator(Section):
    """What a step costs the coordinator, by the number of hosts."""

    hosts: tuple[int, ...] = (1, 16, 64, 256)
    """Numbers of hosts."""

    exchange: tuple[Literal["losses", "sums"], ...] = ("losses", "sums")
    """What hosts send."""

    members: int = 16_384
    """Members a step."""

    steps: int = 50
    """Steps that are measured."""

    sockets: bool = True
    """Measure with real sockets, too."""


class Liars(Section):
    """Hosts that lie: steps until spot checks find them, and what they cost."""

    kinds: tuple[str, ...] = (
        *("swapped signs", "scaled", "one outlier", "half NaN", "honest when watched", "claimed speed"),
        *("two of one token", "lying as a checker"),
    )
    """Kinds of liars, see `bench.lies`."""

    exchanges: tuple[str, ...] = ("losses", "sums")
    """What hosts exchange."""

    sockets: tuple[str, ...] = ("plain", "CURVE")
    """Real sockets that are tried beside the simulation: plain, CURVE."""

    steps: int = 300
    """Steps of each run."""

    population: int = 2048
    """Population of a step."""

    hidden: int = 16
    """Width of the gru."""

    text: str = "builtin:shakespeare"
    """Text."""

    seed: int = 0
    """Seed of the draws in the simulation."""


class Rewards(Section):
    """What a reward in Python costs beside writing. Model: a gru."""

    population: int = 4096
    """Members that write, one completion each."""

    length: int = 32
    """Tokens of a completion."""

    slow_calls: int = 64
    """Calls of a reward that sleeps."""

    rounds: int = 9
    """Turns of each candidate."""


class Floods(Section):
    """What floods of a coordinator's ports cost those that train."""

    floods: tuple[str, ...] = (
        *("subscriptions", "random bytes", "unfinished frames", "half-open handshakes", "idle connections"),
        *("silent hosts", "connects", "requests", "fetches"),
    )
    """Floods of a coordinator without keys."""

    keyed: tuple[str, ...] = (
        *("random bytes", "half-open handshakes", "idle connections", "connects"),
        *("subscriptions of a token holder", "fetches"),
    )
    """Floods of a coordinator with keys."""

    seconds: float = 60.0
    """Seconds of a flood; the phases before and after it take half as long."""

    hosts: int = 2
    """Hosts that train."""

    simulated: int = 0
    """If it is not 0: so many simulated hosts, with made-up losses, in place of real ones."""

    population: int = 1024
    """Members of the run."""

    text: str = "builtin:shakespeare"
    """What is learned."""


class Growth(Section):
    """Held-out bits per byte by weights and by member-tokens: models, widths, and ways of training."""

    models: tuple[str, ...] = ("gru", "mingru", "lru", "transformer")
    """Models that are trained."""

    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Widths of the models."""

    methods: tuple[Literal["noise on weights", "noise on activations", "backpropagation"], ...] = (
        *("noise on weights", "noise on activations", "backpropagation"),
    )
    """Ways of training; noise on activations for the models that can have it."""

    seconds: float = 60
    """Seconds that each trains."""

    turns: int = 6
    """Turns of each; after each it is evaluated, which is not counted."""

    population: int = 4096
    """Members a step, with noise on weights."""

    text: str = "builtin:shakespeare"
    """What is learned."""

    vocabulary: str = "char"
    """Tokens: see data.vocabulary."""

    seed: int = 0
    """Seed of the runs."""


class Watching(Section):
    """What trackers, metrics and the line of progress cost a run."""

    track: tuple[str, ...] = ("tensorboard",)
    """Trackers: tensorboard, wandb, trackio."""

    seconds: float = 400.0
    """Seconds of all phases."""

    phase: float = 1.0
    """Seconds of a phase."""

    warm_up: float = 10.0
    """Seconds before the first phase."""

    hidden: int = 32
    """Width of the gru; its head's is twice as large."""

    population: int = 4096
    """Members: the smaller, the more steps there are to tell of."""

    text: str = "builtin:shakespeare"
    """What is learned."""


PYDOC = "builtin:pydoc"

SMALL_RUN = ("--data.text", PYDOC, "--model.hidden-size", "4", "--es.population-size", "64")

SHORT: dict[str, Any] = {
    "throughput": Throughput(
        sizes=((8, 1, 2, 32),),
        grus=(),
        scale=1,
        at_once=(64,),
        peak=128,
        numpy_tokens=1024,
        processes=False,
        rounds=1,
    ),
    "rewards": Rewards(population=64, length=4, slow_calls=4, rounds=1),
    "update": Update(
        population=64,
        populations=(64,),
        hosts=(4,),
        hidden=8,
        widths=(),
        ranks=(),
        sequences=(),
        rnns=((8, 1, 2, 64),),
        rnn_hosts=(2,),
        rounds=1,
    ),
    "learning": Learning(
        methods=("low rank 1", "evosax", "backpropagation"),
        seconds=0.2,
        every=0.1,
        search_seconds=0.05,
        factors=(1.0,),
        extensions=0,
        evosax_windows=(2,),
        targets=(5.0, 3.33),
        text=PYDOC,
        hidden=4,
        head=4,
        population=64,
        batches=(16,),
    ),
    "growth": Growth(models=("gru", "transformer"), widths=(8,), seconds=0.2, turns=2, population=64, text=PYDOC),
    "start": Start(words=SMALL_RUN, rounds=1),
    "ablation": Ablation(choices=("schedule",), tokens=4096, seeds=1, population=128, text=PYDOC),
    "scale_free": ScaleFree(scaled=("batch",), tokens=4096, seeds=1, population=64, hidden=4, text=PYDOC),
    "scaling": Scaling(population=64, populations=(64, 128), windows=(), widths=(8,), rounds=1),
    "activation": Activation(widths=(8,), population=64, at_once=(64,), rounds=1),
    "frameworks": Frameworks(pairs=4, window=3, at_once=(2,), rounds=1),
    "exchange": Exchange(populations=(64,), hosts=(1,), hidden=8, rounds=1),
    "cosines": Cosines(steps=2, populations=(64,), spaces=("low_rank", "gates"), repeats=2, hidden=4, text=PYDOC),
    "bias": Bias(steps=2, windows=8, estimates=4, estimators=("low rank", "gates"), text=PYDOC),
    "execution": Execution(sizes=((8, 1, 2, 64),), grus=(), chunks=(2,), rounds=1),
    "workers": Workers(workers=(2,), rounds=1, seconds=8.0, words=SMALL_RUN),
    "watching": Watching(seconds=0.4, phase=0.1, warm_up=0.1, hidden=4, population=64, text=PYDOC),
    "coordinator": Coordinator(hosts=(2,), members=128, steps=5),
    "liars": Liars(
        kinds=("swapped signs",), exchanges=("losses",), sockets=(), steps=40, population=384, hidden=4, text=PYDOC
    ),
    "floods": Floods(floods=("connects",), keyed=("fetches",), seconds=2.0, hosts=1, population=64, text=PYDOC),
}
"""A few seconds each: to see that they run."""

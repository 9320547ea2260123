"""All settings of a run: typed, frozen, checked when they are made, read from YAML and written to it.

The docstring under each field is its help on the command line and in docs/settings.md.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

import msgspec

from esjax.config.errors import explain
from esjax.config.models import MODELS, MinGruConfig, ModelConfig
from esjax.config.reward import RewardConfig
from esjax.config.section import Section, check, check_positive, check_range
from esjax.config.yaml_text import read_yaml
from esjax.errors import EsjaxError

Precision = Literal["float32", "bfloat16"]
"""As in `esjax.core.noise`, which imports JAX; settings do not."""

MOST_SUMMED_PAIRS = 2**17
"""Most pairs of a step for which gradient sums are sure to fit into 32 bits."""

MOST_WEIGHED = 2**24
"""Most pairs of a step, times the rank, whose weighted noise is sure to fit into 32 bits: weights are 127 at most."""


LEAST_SUBWORDS = 258
"""Fewest ids of byte-pair encoding: the 256 bytes, UNK and STOP."""


def check_vocabulary(vocabulary: str) -> None:
    """Raise ValueError unless this is char, byte, bpe:N or tokenizer:FILE."""
    way, _, value = vocabulary.partition(":")
    if way == "bpe" and value.isdecimal():
        check(int(value) >= LEAST_SUBWORDS, f"vocabulary must be bpe:{LEAST_SUBWORDS} or more, got {vocabulary}")
        return
    known = vocabulary in ("char", "byte") or (way == "tokenizer" and bool(value))
    check(known, f"vocabulary must be char or byte or bpe:N or tokenizer:FILE, not {vocabulary!r}")


class DataConfig(Section):
    """The text, and how it is cut into documents and windows."""

    text: str = "builtin:shakespeare"
    """A file, a folder, a glob, builtin:shakespeare or builtin:pydoc. Files are UTF-8, also packed by gzip or zstd. A
    file with several links is read once. Also a column of CSV, JSON-lines or Parquet tables, PATH#COLUMN, or of a data
    set of Hugging Face, hf:NAME[:CONFIG][:SPLIT][#COLUMN]."""

    documents: Literal["auto", "paragraph", "line", "file"] = "auto"
    """What a document is. paragraph: lines up to a blank one. file: a whole file, or a whole cell of a table. auto: a
    paragraph, and in tables a cell."""

    vocabulary: str = "char"
    """What tokens are. char: characters. byte: bytes of UTF-8. bpe:N: at most N token ids, by byte-pair encoding fitted
    to the text. tokenizer:FILE: those of a tokenizer.json of Hugging Face."""

    vocab_size: int | None = None
    """Most token ids, UNK and STOP included; rarer characters become UNK. None: all characters of the text."""

    symbols: str | None = None
    """The characters of the vocabulary, in the order of their ids. None: those of the text."""

    held_out: float = 0.05
    """Fraction of the documents that is kept for evaluation, chosen by a hash of their text. Training measures about a
    million tokens of them, evenly spread."""

    window: int = 32
    """Tokens of each sequence that a pair is scored on."""

    burn_in: int = 1
    """Tokens before the window that are read to prepare the state and not scored."""

    carry: bool = False
    """space activation: each window begins where the window of the step before ended, with the state at that place.
    There is no burn-in then."""

    batch_size: int = 1
    """Sequences that each pair is scored on."""

    new_tokens_interval: int = 1
    """Steps for which the windows stay the same."""

    block_tokens: int | None = None
    """Length in tokens of the block of text to train on; a new block is drawn every new_tokens_interval steps. For a
    text that is too large to send to every host. None: the whole text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "window", "batch_size", "new_tokens_interval", "block_tokens")
        check_range(self, 0, 1, "held_out")
        check_range(self, 0, math.inf, "burn_in")
        check(
            self.block_tokens is None or self.block_tokens >= self.window_length,
            f"block_tokens must be at least window + burn_in = {self.window_length}, got {self.block_tokens}",
        )
        check(self.vocab_size is None or self.vocab_size >= 3, f"vocab_size must be at least 3, got {self.vocab_size}")
        check_vocabulary(self.vocabulary)
        check(self.vocabulary == "char" or self.vocab_size is None, "vocab_size is for characters; leave it out")
        if self.symbols is not None:
            check(self.vocabulary == "char", "symbols are for characters; leave them out")
            check(
                len(set(self.symbols)) == len(self.symbols) > 0,
                f"symbols must be distinct characters, at least one, not {self.symbols[:40]!r}",
            )
            check(self.vocab_size is None, "symbols fix the size of the vocabulary; leave vocab_size out")
        check(bool(self.text), "text must name a file, a folder, a glob, a column, a data set or a builtin text")
        if self.carry:
            check(self.new_tokens_interval == 1, "carry needs new tokens every step; leave new_tokens_interval at 1")
            check(self.block_tokens is None, "carry reads the whole text in order; leave block_tokens out")

    @property
    def tokens_before(self) -> int:
        """Tokens before the window that prepare the state."""
        return 0 if self.carry else self.burn_in

    @property
    def window_length(self) -> int:
        """Tokens of a window, those before it included."""
        return self.tokens_before + self.window


GATED_WINDOWS = 128
"""Windows of a step with credit by gates, unless the settings say otherwise."""


class EsConfig(Section):
    """Evolution strategies: how members are perturbed and scored."""

    space: Literal["full", "low_rank", "activation"] = "low_rank"
    """What is perturbed. full: every weight independently. low_rank: each matrix by a product of thin ones. activation:
    what the layers compute; every token's loss then counts by itself, and hosts exchange one number for each weight."""

    rank: int = 1
    """space low_rank: rank of the perturbation of a matrix."""

    noise: Literal["rademacher", "gaussian"] = "rademacher"
    """Distribution of the perturbation. rademacher: ±1, the same bits on all hardware. gaussian: normal."""

    sigma: float | None = None
    """Standard deviation of the perturbation, in units of each leaf (its typical entry); for activations, absolute.
    None: 0.2; with credit gates 0.02."""

    population_size: int | None = None
    """Members in each step, two for each pair; even. space activation: noisy copies; a multiple of copies. None: 4096;
    with credit gates 256, which is 128 windows."""

    pairing: Literal["antithetic", "split"] = "antithetic"
    """How the members of a pair differ. antithetic: in the sign of all of ε. split: even columns of ε are shared by the
    pair and odd ones flip sign; the shared half is credited by the pair's summed loss, relative to other pairs on the
    same windows. split takes fewer tokens to the same loss; hosts must exchange losses."""

    pairs_per_window: int = 16
    """pairing split: number of pairs that read the same windows; at least 2."""

    time_per_step: float | None = None
    """Seconds of evaluation in each step: as many pairs as fit are scored. None: population_size members."""

    shaping: Literal["zscore", "centered_rank", "sign", "raw"] = "zscore"
    """How the difference of a pair's losses becomes its weight. zscore: divided by the standard deviation.
    centered_rank: its rank. sign: ±1. raw: unchanged up to a factor, for an unbiased gradient."""

    frozen: str = ""
    """Paths of parameters that are neither perturbed nor trained, with all below them, separated by commas; * stands
    for any characters: embedding,head_*. The error for a path that does not exist lists those that do."""

    chunk_pairs: int | None = None
    """Pairs that a device evaluates at a time; affects speed, memory and the last bit of a loss. None: chosen for the
    device."""

    precision: Precision = "float32"
    """Type to which operands of matrix products are rounded while members are scored; sums are float32. bfloat16 is 1.3
    times as fast on a GPU for small models and more for wide ones; on CPUs it is from slower to 1.7 times as fast:
    measure with `experiments/run.py bench execution`. The ranking of the members hardly changes."""

    exchange: Literal["auto", "losses", "sums"] = "auto"
    """What hosts send: the losses of their pairs, or their part of the gradient sum. auto: sums with space activation,
    or if there are more pairs than weights and no custom loss; else losses."""

    copies: int | None = None
    """space activation: noisy copies for each window, beside a clean one; a window counts as a pair. If the copies of
    credit gates reach the width of a layer, their noise is orthogonal. None: 2 for credit gates, 32 for discount."""

    credit: Literal["gates", "discount"] = "gates"
    """space activation: how the state is credited with the losses of later tokens. gates: noise on the state acts on
    the next prediction alone, and the gates of the cell say how much of its effect remains later; for an elementwise
    recurrence (`Model.state_taps`), such as gru. discount: noise stays in the state, and later losses count less and
    less; for any recurrence."""

    feedback: Literal["learned", "none"] = "learned"
    """credit gates: guess the error of a layer from that of the next one by learned feedback, so that noise must
    estimate only the rest. It converges towards the transposed weights."""

    discount: float = 0.7
    """credit discount: noise on the state is credited with the losses of all later tokens, each multiplied by this
    factor once for every token in between. 0: only the next token counts; 1: all count alike."""

    layer_sigma: dict[str, float] = msgspec.field(default_factory=dict)
    """space activation: a different sigma for some pre-activations, by name: logits 0.1 hidden 0.3."""

    layer_discount: dict[str, float] = msgspec.field(default_factory=dict)
    """credit discount: a different discount for some pre-activations, by name."""

    output_layer: Literal["auto", "exact", "noise"] = "auto"
    """Whether the output layer gets noise or its exact gradient: softmax minus one-hot target, times the layer's input,
    which needs no backward pass. auto: exact with cross entropy, if the model says which layer is its output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "rank", "sigma", "population_size", "time_per_step", "copies")
        check(
            self.chunk_pairs is None or self.chunk_pairs >= 2, f"chunk_pairs must be at least 2, got {self.chunk_pairs}"
        )
        check(0 <= self.discount <= 1, f"discount must be from 0 to 1, got {self.discount}")
        for name, value in self.layer_discount.items():
            check(0 <= value <= 1, f"layer_discount must be from 0 to 1, got {value} for {name}")
        for name, value in self.layer_sigma.items():
            check(math.isfinite(value) and value > 0, f"layer_sigma must be above 0 and finite, got {value} for {name}")
        members = self.members_per_pair
        check(
            self.population % members == 0,
            f"population_size must be even, got {self.population}"
            if self.space != "activation"
            else f"population_size must be a multiple of copies = {members}, got {self.population}",
        )
        if self.pairing == "split":
            check(self.space != "activation", "pairing split is for noise on weights; set pairing to antithetic")
            check(
                self.exchange != "sums", "pairing split needs the losses of all pairs; set exchange to losses or auto"
            )
            check(self.pairs_per_window >= 2, f"pairs_per_window must be at least 2, got {self.pairs_per_window}")
            check(
                self.pairs >= 2,
                f"pairing split compares pairs: population_size must be at least 4, got {self.pairs * 2}",
            )
        if self.space == "activation":
            check(self.noise == "rademacher", "noise on activations is rademacher")
            check(
                self.exchange != "losses", "space activation has a loss for every token; set exchange to sums or auto"
            )
        elif self.exchange == "sums":
            check(self.noise == "rademacher", "exchange sums needs noise rademacher, whose sums are integers")
            check(not self.frozen, "exchange sums sends all weights; for frozen ones set exchange to losses or auto")
            check(self.shaping in ("zscore", "sign"), f"exchange sums needs shaping zscore or sign, got {self.shaping}")
        if self.space == "activation" or self.exchange == "sums":
            check(
                self.pairs <= MOST_SUMMED_PAIRS,
                f"exchange sums takes at most {MOST_SUMMED_PAIRS} pairs a step, got {self.pairs}",
            )
        is_bounded = self.time_per_step is None or self.exchange == "sums"
        if self.space == "low_rank" and self.noise == "rademacher" and is_bounded:
            check(
                self.rank * self.pairs_with_room <= MOST_WEIGHED,
                f"rank times the pairs of a step must be at most {MOST_WEIGHED}, so that sums fit into 32 bits, got "
                f"{self.rank} * {self.pairs_with_room}; lower rank or population_size, or set space to full",
            )

    @property
    def is_gated(self) -> bool:
        """Whether noise on activations gets credit by gates."""
        return self.space == "activation" and self.credit == "gates"

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise: `sigma`, or what is chosen for None."""
        return self.sigma if self.sigma is not None else 0.02 if self.is_gated else 0.2

    @property
    def noisy_copies(self) -> int:
        """The noisy copies of a window: `copies`, or what is chosen for None."""
        return self.copies if self.copies is not None else 2 if self.is_gated else 32

    @property
    def population(self) -> int:
        """Members of a step: `population_size`, or what is chosen for None."""
        if self.population_size is not None:
            return self.population_size
        return GATED_WINDOWS * self.noisy_copies if self.is_gated else 4096

    @property
    def members_per_pair(self) -> int:
        """Members that are scored together: the two of a pair, or the noisy copies of a window."""
        return self.noisy_copies if self.space == "activation" else 2

    @property
    def pairs(self) -> int:
        """Pairs, or windows, of a fixed population."""
        return self.population // self.members_per_pair

    @property
    def pairs_a_window(self) -> int:
        """Number of neighbouring pairs that read the same windows."""
        return self.pairs_per_window if self.pairing == "split" else 1

    @property
    def weights_per_pair(self) -> Literal[1, 2]:
        """Weights of a pair in an update: 1 for all of its noise, or 2, one for each half of a split pair."""
        return 2 if self.pairing == "split" else 1

    @property
    def pairs_with_room(self) -> int:
        """Most pairs of a step, for which gradient sums must have room."""
        return self.pairs if self.time_per_step is None else MOST_SUMMED_PAIRS

    def sums(self, parameters: int) -> bool:
        """Return whether hosts send gradient sums, given the number of parameters of the model."""
        if self.space == "activation" or self.exchange != "auto":
            return self.exchange != "losses"
        can = self.noise == "rademacher" and self.shaping in ("zscore", "sign") and self.time_per_step is None
        return can and self.pairing == "antithetic" and parameters < self.pairs <= MOST_SUMMED_PAIRS


class OptimConfig(Section):
    """The optimizer: from the estimate of the gradient to an update."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Rule of the update: Adam (Kingma & Ba 2015), or gradient descent with momentum."""

    learning_rate: float = 0.1
    """Step size, in units of each leaf (its typical entry)."""

    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "inverse_sqrt"
    """How the learning rate changes after the warm-up. inverse_sqrt: as 1 / sqrt(1 + step / decay_steps)."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""

    decay_steps: int | None = None
    """cosine: step at which the learning rate reaches 0 and stays there. None: the `steps` that the run began with,
    also if it is resumed with more. inverse_sqrt: steps after the warm-up until 71% is left; None: 100."""

    beta1: float = 0.9
    """Adam: decay factor of the running mean of the gradient."""

    beta2: float = 0.999
    """Adam: decay factor of the running mean of its square."""

    eps: float = 1e-8
    """Adam: number that is added to the root of the mean square."""

    momentum: float = 0.9
    """sgd: fraction of the last update that is added to the next."""

    weight_decay: float = 0.0
    """Decoupled weight decay: each step subtracts this fraction of each weight, times the learning rate."""

    anchor: float = 0.0
    """Decoupled decay toward the weights that the run started from: each step subtracts this fraction of each weight's
    distance from its first value, times the learning rate. Against forgetting."""

    average: float = 0.1
    """Fraction of the run so far over which the weights are averaged for evaluation and generation (Shamir & Zhang
    2013). 0: no average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "learning_rate", "decay_steps", "eps")
        check_range(self, 0, 1, "beta1", "beta2", "momentum")
        check_range(self, 0, math.inf, "warmup_steps", "weight_decay", "anchor")
        check(0 <= self.average <= 1, f"average must be from 0 to 1, got {self.average}")


class HostsConfig(Section):
    """Training on many hosts."""

    spot_check: float = 0.03
    """Share of the time in which hosts score again what others answered, to find hosts that send wrong losses. 0: no
    checks."""

    digest_interval: int = 100
    """Steps between comparisons of the hosts' training states, beside those at checkpoints."""

    hosts_per_token: int = 256
    """Most hosts that one token lets in at a time; further ones wait. A run has at most 1,024 hosts."""

    trusted_token: str | None = None
    """Name of the token whose hosts are right where as many tokens have one digest as another, and in a spot check
    between two tokens. None: such digests do not count, and the hosts fetch the newest kept state; no host is put aside
    by such a check."""

    send_init: bool = False
    """Send the state of a run that starts from given weights (`init`) to hosts that lack these weights. False: every
    host reads them from its own disk, and gets the updates alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "digest_interval", "hosts_per_token")
        check(0 <= self.spot_check <= 1, f"spot_check must be from 0 to 1, got {self.spot_check}")


class Config(Section):
    """Settings of a run."""

    seed: int = 0
    """Seed of the run: it determines the initial weights, the perturbations and the windows."""

    init: str | None = None
    """Weights to start from, with their model and vocabulary: a run folder, or a file that `export` wrote or that
    `import` reads (.safetensors, .npy). None: random weights."""

    init_digest: str = ""
    """Hash of these weights; a run records it, so that all hosts start from the same ones."""

    steps: int | None = None
    """Stop after this number of steps. None: no limit."""

    seconds: float | None = None
    """Stop this number of seconds after the first finished step. None: no limit."""

    checkpoint_time: float = 60.0
    """Seconds between checkpoints."""

    keep_checkpoints: int = 3
    """Number of newest checkpoints that are kept."""

    evaluate_time: float = 10.0
    """Seconds between evaluations on the held-out documents."""

    ledger: bool = False
    """Record every update, so that the run can be replayed and a crash loses no step. Always on with hosts."""

    ledger_horizon: int | None = None
    """Steps of updates that stay in the ledger behind the newest checkpoint; up to twice as many are kept. Older ones
    are dropped, and a replay then begins at the oldest checkpoint, not at the start of the run. None: keep all."""

    data: DataConfig = DataConfig()
    es: EsConfig = EsConfig()
    optim: OptimConfig = OptimConfig()
    reward: RewardConfig = RewardConfig()
    hosts: HostsConfig = HostsConfig()
    model: ModelConfig = MinGruConfig()

    @property
    def tokens_per_pair(self) -> int:
        """Member-tokens that are scored, or written, for a pair."""
        return self.es.members_per_pair * self.tokens_per_member

    @property
    def tokens_per_member(self) -> int:
        """Tokens that a member is scored on, or most tokens that it writes, in a step."""
        return self.data.batch_size * self.tokens_per_sequence

    @property
    def writes(self) -> bool:
        """Whether members write text after prompts, for a reward in Python, and read no windows."""
        return self.reward.prompts is not None

    @property
    def tolerance(self) -> float | None:
        """Largest difference of two hosts' rewards of a member, for a reward in Python; None without such a reward."""
        return self.reward.tolerance if self.writes else None

    @property
    def reward_seconds(self) -> float:
        """Time limit of a call of a reward in Python; 0 without such a reward."""
        return self.reward.seconds if self.writes else 0.0

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens of a window, or most tokens of a completion."""
        return self.reward.length if self.writes else self.data.window

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self, "steps", "seconds", "checkpoint_time", "keep_checkpoints", "evaluate_time", "ledger_horizon"
        )
        check(0 <= self.seed < 2**32, f"seed must be at least 0 and below 2^32, got {self.seed}")
        if self.data.carry:
            check(self.es.space == "activation", "data.carry needs es.space activation, where a clean copy is read")
            check(self.es.time_per_step is None, "data.carry needs a fixed population; leave es.time_per_step out")
        if self.writes:
            reward = "a reward in Python (reward.prompts)"
            check(self.es.space != "activation", f"{reward} needs noise on weights; set es.space to low_rank or full")
            check(self.es.exchange != "sums", f"{reward} needs es.exchange losses or auto")
            check(
                self.es.output_layer != "exact",
                f"es.output_layer exact: the gradient of {reward} is not known; set es.output_layer to noise or auto",
            )
            check(self.data.block_tokens is None, f"{reward} reads no windows; leave data.block_tokens out")

    @classmethod
    def variants(cls) -> list[Config]:
        """Return the default settings with each model."""
        return [cls(model=kind()) for kind in MODELS.values()]


VARIANTS = Config.variants()
"""The default settings with each model."""

# msgspec inspects a class when it first reads one, and crashes if two threads do so at once. Here the import lock
# admits one thread.
msgspec.convert({}, Config)


def from_yaml(text: str, source: str) -> Config:
    """Read settings; those that are not in the text keep their defaults.

    Args:
        text: YAML.
        source: Name of the text in error messages.

    Raises:
        EsjaxError: A setting is unknown, of the wrong type or out of range.
    """
    try:
        # Not strict: YAML 1.1 reads 1e-3 as a string.
        values = read_yaml(text)
        _rename(values, source)
        return msgspec.convert({} if values is None else values, Config, strict=False)
    except (msgspec.MsgspecError, ValueError) as error:
        raise EsjaxError(f"{source}: {explain(error, VARIANTS)}") from error


def _rename(values: Any, source: str) -> None:
    """Put the settings of an earlier version under their present names, and print a line."""
    es = values.get("es") if isinstance(values, dict) else None
    if isinstance(es, dict) and isinstance(es.get("exact_logits"), bool):
        es.setdefault("output_layer", "exact" if es.pop("exact_logits") else "noise")
        print(f"{source}: es.exact_logits is now es.output_layer {es['output_layer']}", file=sys.stderr)


def to_yaml(config: Config) -> str:
    """Write all settings as YAML, defaults included, so that a change of defaults does not change an old run."""
    return msgspec.yaml.encode(config, order="deterministic").decode()


def to_plain(config: Config) -> dict[str, Any]:
    """Return all settings as dicts, lists, numbers, strings and None."""
    return msgspec.to_builtins(config)


def replace(config: Any, **changes: Any) -> Any:
    """Copy settings with some of them changed and check them.

    Raises:
        EsjaxError: A name is unknown, or a value has the wrong type or is out of range.
    """
    return type(config)(**{**{name: getattr(config, name) for name in config.__struct_fields__}, **changes})

"""The values a graph file becomes. Frozen, without I/O, without torch.

Fields have an extent: `prompt` (one value a prompt), `sample` (one a sample), `token` (one a token
of the sample, aligned with `tokens`). A read of a finer extent accepts a coarser numeric field,
which is repeated (prompt -> sample -> token); never the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from realflow.errors import Problem

Extent = Literal["prompt", "sample", "token"]
Dtype = Literal["int", "float", "bool", "text", "any"]
Scope = Literal["sample", "group", "batch"]
Op = Literal["generate", "infer", "train", "function"]
Kind = Literal["function", "loss", "output", "reward"]
Head = Literal["lm", "value", "reward"]
Over = Literal["drop", "truncate", "error"]
Normalise = str | Mapping[str, float]
"""What a token counts in a loss: `token` (all alike), `sequence` (all of a sequence together), or
`{"constant": n}`: 1 / (n sequences)."""

EXTENTS: tuple[Extent, ...] = ("prompt", "sample", "token")  # coarse to fine

SIDES = ("chosen", "rejected")
"""Fields of the data that make a pair, that of its first sample before that of its second."""

PROMPT_TOKENS = 1024
"""Tokens of the longest prompt, where the data section sets no `max_length`."""


@dataclass(frozen=True)
class FieldUse:
    """One field that a function reads or writes.

    `name` is the function's own word (its parameter, or the key of what it returns), `field` the
    column of the graph it stands for unless `reads:`/`writes:` rename it.
    """

    name: str
    field: str
    extent: Extent
    dtype: Dtype
    optional: bool = False


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: from `least` to `most`, or `above` a number. None is no bound."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        bounds = ((">=", self.least), ("above", self.above), ("<=", self.most))
        if self.least is not None and self.most is not None:
            return f"a number from {self.least:g} to {self.most:g}"
        return "a number " + " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


@dataclass(frozen=True)
class FunctionDecl:
    """What a function declares: the one truth about what it reads and writes.

    `kind`: `function` (values to values), `reward` (a user's function in TRL's or verl's
    signature), `loss` (used by a train call; `needs` lists the model outputs it is given, such as
    `logprobs`, `entropy`, `values`), `output` (what an infer call computes from a model, such as
    `logprobs`). `options` maps each keyword option to its default; a default of None means that
    any value is taken, otherwise the type of the default is required. `choices` lists the values of
    an option that takes a few, `ranges` the numbers that one may be; `requires` names, for an option,
    the optional field that must be there once it is neither zero nor None. A function that
    `takes_columns` (a reward with `**columns`) is given every column that the data has fields for.

    `state` maps names to values at the start: what the function is given as the keyword `state` (a dict
    of plain values) and returns, as it then is, beside its fields. It goes from step to step and is in
    checkpoints, so such a function has scope `batch`: it runs once in a step. Where an option has the
    name of a value, the value starts as that option.

    A loss has scope `sample`, or `group` where it looks at the samples of a prompt together: these are
    then in one minibatch, on one rank and in one micro-batch. `normalise` is how a train call weighs its
    tokens unless it says otherwise.
    """

    name: str
    kind: Kind
    reads: tuple[FieldUse, ...] = ()
    writes: tuple[FieldUse, ...] = ()
    scope: Scope = "sample"
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    requires: Mapping[str, str] = field(default_factory=dict)
    takes_columns: bool = False
    state: Mapping[str, Any] = field(default_factory=dict)
    normalise: Normalise = "token"


@dataclass(frozen=True)
class Amount:
    """A number with its unit: `8 prompts`, `512 samples`, `4096 tokens`."""

    count: int
    unit: Literal["prompts", "samples", "tokens"]

    def __str__(self) -> str:
        return f"{self.count} {self.unit}"


Stage = tuple[int | None, int]
"""To which step of a run (None: to its end) how many new tokens are drawn at most."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    `max_new_tokens` is the most that a run ever draws: plan and caches count with it. `stages` are its
    stages, where it has several.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()

    def limit(self, step: int) -> int:
        """The most new tokens in `step` (0-based)."""
        found = (limit for end, limit in self.stages if end is None or step < end)
        return next(found, self.max_new_tokens)


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW and its schedule. `schedule` is constant, linear or cosine (after `warmup_steps`)."""

    name: str = "adamw"
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr: float = 0.0


@dataclass(frozen=True)
class Follow:
    """Weights that follow those of a trained model, `model`: at the end of every `every`-th step each
    becomes `decay` times itself plus 1 - `decay` times the other's."""

    model: str
    decay: float
    every: int = 1


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters (arXiv 2106.09685) that are trained in place of a model's weights: each linear layer
    W of `targets` (names such as `q_proj`; none: all linear layers of the blocks) computes with
    W + `alpha` / `rank` B A. `save` says what checkpoints have: the adapters, or the whole model with the
    adapters merged in (`merged`), and the adapters beside it."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    save: Literal["adapters", "merged"] = "adapters"

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Place:
    """Where a graph file says something, for what is found wrong with it after it was read. `params` are
    those that the value comes from."""

    where: str = ""
    file: str = ""
    line: int | None = None
    params: tuple[str, ...] = ()

    def problem(self, message: str) -> Problem:
        """A problem here."""
        source = f" (the value comes from params: {', '.join(self.params)})" if self.params else ""
        return Problem(message + source, self.where, self.file, self.line)


@dataclass(frozen=True)
class ModelSpec:
    """A model of the graph. `dtype` is that of the compute weights; masters are float32 (float64
    where `dtype` is float64). `head` is `lm`, or `value` and `reward`: one number a token. With `lora` its
    adapters alone are trained."""

    name: str
    path: str
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    optimizer: OptimizerSpec | None = None
    head: Head = "lm"
    follows: Follow | None = None
    lora: LoraSpec | None = None
    place: Place = field(default=Place(), compare=False)
    """Of its path."""

    @property
    def average(self) -> Literal["float32"] | None:
        """The dtype in which what follows is averaged, where the compute weights are too coarse for it."""
        averaged = self.follows is not None and self.follows.decay > 0
        return "float32" if averaged and self.dtype == "bfloat16" else None


@dataclass(frozen=True)
class DataSpec:
    """Where prompts come from.

    `fields` maps a graph field to a column of the source, or to a value inside one (`extra.answer`).
    With `tokenize` (a model's name) the data itself writes `tokens` and `loss_mask` from `prompt` and
    `completion`, in the chat template of that model where `chat` is true and it has one. With `chosen` and
    `rejected` in place of `completion` each prompt has these two samples (`pairs`), and the data writes
    `group_id` and, true for the first of the two, `chosen`. `max_length` is
    in tokens: of a prompt that is generated from, and of a tokenized pair; `over` says what becomes of a
    longer one (None: an error for a prompt, and a pair is cut). `system` is a message that is put before
    each prompt. `split` keeps the distinct values of the column `unique` apart: `test` is the held-out
    fraction, `use` train or test. `split_name` is one of the datasets in a saved DatasetDict.

    Where there are several `sources`, each has its own source, path, task, options, size, fields, unique
    and split; here `source` is empty, and `fields` are those of all of them and `source`, the part's name.
    """

    source: str
    fields: Mapping[str, str]
    task: str | None = None
    path: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    shuffle: bool = True
    tokenize: str | None = None
    max_length: int | None = None
    unique: str | None = None
    test: float = 0.0
    use: Literal["train", "test"] = "train"
    batch: Amount | None = None
    chat: bool = True
    split_name: str | None = None
    system: str | None = None
    over: Over | None = None
    sources: tuple[PartSpec, ...] = ()

    @property
    def pairs(self) -> bool:
        """Whether each prompt has two samples: tokenized completions, the chosen and the rejected one."""
        return self.tokenize is not None and self.fields.keys() >= set(SIDES)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt that a generate call takes: what plan and runtime count with."""
        return PROMPT_TOKENS if self.max_length is None else self.max_length

    @property
    def parts(self) -> tuple[DataSpec, ...]:
        """The specs that name a source each: itself, or those of `sources`."""
        return tuple(part.data for part in self.sources) or (self,)


@dataclass(frozen=True)
class PartSpec:
    """One of several sources: of all prompts, `weight` over the sum of weights come from it."""

    name: str
    weight: float
    data: DataSpec


@dataclass(frozen=True)
class Spread:
    """How long prompts or responses are, in tokens: their mean, how far they spread (a standard deviation,
    or the length that 9 of 10 stay within; neither: all are alike) and the longest (None: as the data or
    the generate call allow)."""

    mean: float
    std: float | None = None
    p90: float | None = None
    longest: int | None = None


@dataclass(frozen=True)
class LengthsSpec:
    """What the graph says of lengths, for the planner alone: numbers, distributions, or `trace`, the
    samples.jsonl of a former run (or the folder of that run). What is None is assumed as long as allowed.
    `common` tokens are those that all prompts begin with, such as a system prompt: they are computed once."""

    prompt: Spread | None = None
    response: Spread | None = None
    trace: str | None = None
    common: int = 0


@dataclass(frozen=True)
class Retokenize:
    """A reward model reads text in tokens of its own: prompt and completion, in its own chat template where
    `chat` is true and it has one. What has more than `max_length` tokens (None: than the model has positions)
    is an error, or, with `over` truncate, cut at its end."""

    chat: bool = True
    max_length: int | None = None
    over: Literal["error", "truncate"] = "error"


@dataclass(frozen=True)
class Call:
    """One model-function call, with its declaration resolved.

    `reads` and `writes` map the function's own names to graph fields (complete, renames applied;
    an optional read that nothing writes is left out). A train call also has `tokens` and
    `loss_mask` there, and in `options` its `normalise`; the function itself takes none of these.
    `temperature` is, for a call that computes logprobs, that of the rollout whose tokens it reads.
    `every` is in steps (None: each step). `timeout` is in seconds, for function calls. `refill`, of a
    generate call, says which groups are replaced by others. With `retokenize` an infer call reads text in
    place of `tokens`.
    """

    name: str
    op: Op
    decl: FunctionDecl
    model: str | None = None
    reads: Mapping[str, str] = field(default_factory=dict)
    writes: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: Amount | None = None
    samples: int = 1
    sampling: Sampling | None = None
    chat: bool = True
    minibatches: int = 1
    temperature: float = 1.0
    every: int | None = None
    timeout: float = 60.0
    refill: Refill | None = None
    retokenize: Retokenize | None = None

    @property
    def whole_groups(self) -> bool:
        """Whether the samples of a prompt must stay together: its loss looks at them all."""
        return self.op == "train" and self.decl.scope == "group"


@dataclass(frozen=True)
class Refill:
    """Groups that leave a step, and new prompts in their place.

    `call` (of a function that writes a bool for each sample) says which groups stay: those of which it
    chooses any sample. Prompts are drawn in at most `most` rounds; then the step has what it has.
    """

    call: Call
    most: int = 3


@dataclass(frozen=True)
class Evaluate:
    """Held-out prompts that are answered and judged at the end of every `every`-th step and of the last.

    `graph` has their data, and two calls: the one that answers, where the rollout runs, and the one that
    judges. `keep_best`: a checkpoint is written at each evaluation, and that of the best mean reward is kept.
    """

    every: int
    keep_best: bool
    graph: Graph


@dataclass(frozen=True)
class Graph:
    """A checked graph. `calls` is in topological order.

    `prompts` and `samples` are the global sizes of one step: prompts, and samples of each prompt.
    `checkpoint_every` is in steps (None: only at the end); the newest `checkpoint_keep` of these
    checkpoints are kept. `extents` and `dtypes` describe every field that data or calls write.
    `folder` is where the graph file lies, kept where functions are imported or data is read from
    there (empty otherwise). `lengths` are those that the planner counts with.
    """

    name: str
    models: Mapping[str, ModelSpec]
    data: DataSpec
    calls: tuple[Call, ...]
    steps: int
    prompts: int
    samples: int
    seed: int = 1
    max_staleness: int = 0
    checkpoint_every: int | None = None
    checkpoint_keep: int = 3
    lengths: LengthsSpec | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    extents: Mapping[str, Extent] = field(default_factory=dict)
    dtypes: Mapping[str, Dtype] = field(default_factory=dict)
    folder: str = ""
    evaluate: Evaluate | None = None

    @classmethod
    def load(cls, graph: str | Path, overrides: Sequence[str] = ()) -> Graph:
        """A checked graph by its name or path, with `key=value` overrides of its params.

        Raises InputError with everything that is wrong.
        """
        from realflow.graph import find_graph, load_graph  # they are built on these types

        return load_graph(find_graph(str(graph)), overrides)

    def __repr__(self) -> str:
        """Short: the whole of a graph fills pages."""
        calls = ", ".join(call.name for call in self.calls)
        return f"Graph({self.name!r}, calls=[{calls}], steps={self.steps})"

    def _repr_svg_(self) -> str:
        """The drawing of the graph, which notebooks show."""
        from realflow.graph.draw import to_svg  # it is built on these types

        return to_svg(self)

    def call(self, name: str) -> Call:
        """The call of that name."""
        return next(call for call in self.calls if call.name == name)

    def writer(self, field_name: str) -> Call | None:
        """The call that writes a field, or None where data does."""
        return next((call for call in self.calls if field_name in call.writes.values()), None)

    def readers(self, field_name: str) -> tuple[Call, ...]:
        """The calls that read a field."""
        return tuple(call for call in self.calls if field_name in call.reads.values())

    def trained(self) -> Mapping[str, Call]:
        """Model name -> the call that trains it."""
        return {call.model: call for call in self.calls if call.op == "train" and call.model}

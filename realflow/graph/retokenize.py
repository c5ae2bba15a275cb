"""`retokenize:` of an infer call: a reward model reads text, in tokens of its own tokenizer.

reward: {model: judge, op: infer, use: rewards, retokenize: true}
reward: {model: judge, op: infer, use: rewards, retokenize: {max_length: 1024, over: truncate}}

What such a call reads is not `tokens` but prompt and completion, and whether that was ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from realflow.graph.schema import FLAG, Kind, Section, one_of, whole
from realflow.graph.types import Call, FieldUse, FunctionDecl, Retokenize

OF_TEXT = FunctionDecl(
    "rewards",
    "output",
    (
        FieldUse("prompt", "prompt", "prompt", "any"),
        FieldUse("completion", "completion", "sample", "any"),
        FieldUse("finish_reason", "finish_reason", "sample", "text", optional=True),
    ),
    (FieldUse("rewards", "rewards", "sample", "float"),),
)
"""What an infer call with `retokenize` reads and writes."""


_WORD = Kind("true, false or a mapping (chat, max_length, over)", FLAG.read)


def read_retokenize(section: Section, decl: FunctionDecl | None) -> Retokenize | None:
    """The key of a call that uses `decl`: true, false or a mapping. None where it is false."""
    if not isinstance(section.items.get("retokenize"), Mapping):
        found = Retokenize() if section.take("retokenize", _WORD, False) else None
    else:
        inner = section.section("retokenize")
        found = Retokenize(
            chat=inner.take("chat", FLAG, Retokenize.chat),
            max_length=inner.take("max_length", whole(1), Retokenize.max_length),
            over=inner.take("over", one_of("error", "truncate"), Retokenize.over),
        )
        inner.close(("chat", "max_length", "over"))
    if found is not None and decl is not None and decl.name != OF_TEXT.name:
        section.problem(
            f"{decl.name} belong to the tokens that were drawn, so other tokens cannot stand for them; "
            f"expected 'use: {OF_TEXT.name}' of a model with 'head: reward', or no 'retokenize'",
            "retokenize",
        )
    return found


def retokenize_to_mapping(value: Retokenize) -> bool | dict[str, Any]:
    """What `read_retokenize` reads back."""
    changed = {key: x for key, x in vars(value).items() if x != getattr(Retokenize, key)}
    return changed or True


def of_one_answer(call: Call, renamed: frozenset[str], calls: Mapping[str, Call], writer: str) -> Call:
    """The call with the prompt and the end of the very answers that it reads, which `writer` (a call or the
    data) writes; `renamed` are the reads that the graph sets by hand, which stay."""
    rollout = calls.get(writer)
    reads = dict(call.reads)
    own = {}
    if rollout is not None and rollout.op == "generate":
        own = {
            "prompt": rollout.reads.get("prompt", reads["prompt"]),
            "finish_reason": rollout.writes.get("finish_reason", reads["finish_reason"]),
        }
    elif "finish_reason" not in renamed:  # that of a rollout would be of other answers
        del reads["finish_reason"]
    reads |= {name: field for name, field in own.items() if name not in renamed}
    return replace(call, reads=reads)

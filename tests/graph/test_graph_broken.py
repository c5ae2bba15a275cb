# ruff: noqa: E501 - a table is read row by row
"""Broken graphs: each ends in an InputError that says what, where, on which line, and what to do."""

from pathlib import Path

import pytest

from realflow.errors import InputError
from realflow.graph import load_graph
from realflow.graph.yamlfile import parse_yaml

GOOD = """\
name: good
params: {lr: 1e-5, n: 8}
models:
  actor:
    path: some-model
    optimizer: {lr: "${lr}"}
  ref:
    path: some-model
data:
  source: reasoning_gym
  task: chain_sum
  fields: {prompt: question, answer: answer}
calls:
  rollout:
    model: actor
    op: generate
    batch: ${n} prompts
    samples: 4
    max_new_tokens: 16
  reward:
    op: function
    use: rewards.last_number
  ref:
    model: ref
    op: infer
    use: logprobs
    writes: {logprobs: ref_logprobs}
  credit:
    op: function
    use: advantages.grpo
  train:
    model: actor
    op: train
    use: losses.ppo_clip
    minibatches: 2
steps: 10
"""

# (what to replace in GOOD, with what, a part of the message, its line)
REF = "  ref:\n    path: some-model\n"
FOLLOW = REF + "    follows: "
BROKEN = [
    # models that follow another one
    (REF, FOLLOW + "actor\n", "", 9),
    (REF, FOLLOW + "{model: actor}\n", "'decay' is missing", 9),
    (REF, FOLLOW + "{model: actor, decay: 1}\n", "expected a number above 0 and below 1", 9),
    (REF, FOLLOW + "{model: actr, decay: 0.9}\n", "unknown model 'actr'; did you mean 'actor'?", 9),
    (REF, FOLLOW + "{model: ref, decay: 0.9}\n", "'ref' cannot follow itself", 9),
    (REF, "    follows: {model: ref, decay: 0.9}\n" + REF, "call train trains 'actor'; a model is trained or follows", 7),
    (REF, FOLLOW + "{model: other, decay: 0.9}\n  other:\n    path: some-model\n", "no call trains 'other'", 9),
    # keys and names
    ("task: chain_sum", "task: chain_sums", "unknown reasoning-gym task 'chain_sums'; did you mean 'chain_sum'?", 11),
    ("task: chain_sum", "task: chain_sum\n  options: {min_term: 2}", "has no option 'min_term'; did you mean 'min_terms'?", 12),
    ("    samples: 4", "    samples: 1", "draws 1 of each, so that every advantage would be 0", 28),
    ("    samples: 4", "    samples: 4\n    stop: [a, 3]", "element 2 is 3", 19),
    ("    samples: 4", "    samples: 4\n    stop: ['']", "element 1 is the text ''", 19),
    ('lr: "${lr}"', 'lr: "${lr}", betas: [0.9]', "the list has 1 element", 6),
    ('lr: "${lr}"', 'lr: "${lr}", betas: [0.9, 1]', "element 2 is 1", 6),
    ("steps: 10", "steps: 10\ncheckpoint: {every: 5 steps, keep: 0}", "found 0, expected a whole number >= 1", 37),
    ("steps: 10", "stepz: 10", "unknown key 'stepz'; did you mean 'steps'?", 36),
    ("steps: 10", "", "'steps' is missing", 1),
    ("name: good", "name: ../up", "expected a name of letters", 1),
    ("name: good", "name: 3", "found 3, expected a name", 1),
    ("  actor:\n    path: some-model", "  actor:\n    paht: some-model", "unknown key 'paht'; did you mean 'path'?", 5),
    ("  ref:\n    path", "  a b:\n    path", "found the text 'a b', expected a name", 7),
    ("    minibatches: 2", "    minibatch: 2", "did you mean 'minibatches'?", 35),
    ("    minibatches: 2", "    clip_low: 0.1", "it is an option of losses.ppo_clip; write it under 'options'", 35),
    ("    use: logprobs", "    use: logprobs\n    samples: 2", "op infer does not take it (op generate does)", 27),
    ("    use: logprobs", "    use: logprobs\n    use: logprobs", "given twice, first on line 26", 27),
    # types, numbers and units
    ("batch: ${n} prompts", "batch: 8", "the unit is missing", 17),
    ("batch: ${n} prompts", "batch: 8 tokens", "the unit 'tokens' does not fit here", 17),
    ("batch: ${n} prompts", "batch: ${n} promts", "the unit 'promts' does not fit", 17),
    ("batch: ${n} prompts", "batch: 0 prompts", "the count must be from 1", 17),
    ("batch: ${n} prompts", "batch: -8 prompts", "expected a count with its unit", 17),
    ("batch: ${n} prompts", "batch: ${m} prompts", "${m}: no such key under params", 17),
    ("    batch: ${n} prompts\n", "", "'batch' is missing", 14),
    ("samples: 4", "samples: 1.5", "found 1.5, expected a whole number", 18),
    ("samples: 4", "samples: true", "found true, expected a whole number", 18),
    ("max_new_tokens: 16", "max_new_tokens: 0", "expected a whole number >= 1", 19),
    ("max_new_tokens: 16", "max_new_tokens: 16\n    temperature: -1", "expected a number >= 0", 20),
    ("max_new_tokens: 16", "max_new_tokens: 16\n    top_p: 1.5", "expected a number above 0 and at most 1", 20),
    ("max_new_tokens: 16", "max_new_tokens: 16\n    stop: ['']", "expected text that is not empty", 20),
    ("lr: 1e-5", "lr: -1e-5", "the value comes from params: lr", 6),
    ("lr: 1e-5", "lr: fast", "found the text 'fast', expected a number", 6),
    ("lr: 1e-5", "lr: .nan", "found nan, expected a number", 6),
    ("lr: 1e-5", "lr: .inf", "found inf, expected a number", 6),
    ("lr: 1e-5", "lr: 1e999", "too large", 2),
    ('{lr: "${lr}"}', '{lr: "${lr}", name: adam}', "expected one of adamw; did you mean 'adamw'?", 6),
    ('{lr: "${lr}"}', '{lr: "${lr}", schedule: cosin}', "did you mean 'cosine'?", 6),
    ('{lr: "${lr}"}', '{lr: "${lr}", betas: [0.9, 1]}', "expected a list of two numbers in [0, 1)", 6),
    ('{lr: "${lr}"}', '{lr: "${lr}", min_lr: 1}', "found 1, expected at most lr", 6),
    ('{lr: "${lr}"}', "[adamw]", "found a list, expected a mapping", 6),
    ("path: some-model\n    optimizer", "path: some-model\n    dtype: fp32\n    optimizer", "expected one of bfloat16", 6),
    ("steps: 10", "steps: 0", "found 0, expected a whole number >= 1", 36),
    ("steps: 10", "steps: 10\nseed: -1", "expected a whole number", 37),
    ("steps: 10", "steps: 10\nmax_staleness: 0.5", "expected a whole number", 37),
    ("steps: 10", "steps: 10\ncheckpoint: {every: 20}", "the unit is missing", 37),
    ("steps: 10", "steps: 10\ncheckpoint: {}", "'every' is missing", 37),
    ("    use: advantages.grpo", "    use: advantages.grpo\n    every: 2 prompts", "expected a count of steps", 31),
    ("    use: advantages.grpo", "    use: advantages.grpo\n    timeout: 0", "expected a number of seconds", 31),
    ("    use: advantages.grpo", "    use: advantages.grpo\n    options: {eps: .nan}", "found nan, expected a number >= 0", 31),
    ("    use: advantages.grpo", "    use: advantages.grpo\n    options: {scale: 1}", "expected true or false", 31),
    ("    use: advantages.grpo", "    use: advantages.grpo\n    options: {epz: 1}", "did you mean 'eps'?", 31),
    ("minibatches: 2", "options: {kl: k4}", "expected one of k1, k2, k3", 35),
    ("minibatches: 2", "normalise: tokens", "did you mean 'token'?", 35),
    # functions
    ("use: rewards.last_number", "use: rewards.last_numbr", "did you mean 'rewards.last_number'?", 22),
    ("use: advantages.grpo", "use: losses.ppo_clip", "is a loss; op function takes a function or a reward", 30),
    ("use: losses.ppo_clip", "use: rewards.boxed", "is a function; op train takes a loss", 34),
    ("use: losses.ppo_clip", "use: rewards.boxd", "known: losses.ppo_clip, losses.sft", 34),
    ("use: advantages.grpo", "use: no_such_module:credit", "ModuleNotFoundError", 30),
    ("    use: advantages.grpo\n", "", "'use' is missing", 28),
    ("op: infer", "op: infr", "expected one of generate, infer, train, function; did you mean 'infer'?", 25),
    ("    op: infer\n", "", "'op' is missing", 23),
    # wiring
    ("answer: answer}", "anser: answer}", "reads the field 'answer', which nothing writes; did you mean 'anser'?", 20),
    ("  reward:\n    op: function\n    use: rewards.last_number\n", "", "reads the field 'rewards', which nothing", 25),
    ("    writes: {logprobs: ref_logprobs}\n", "", "writes the field 'logprobs', which call rollout (line 14)", 23),
    ("writes: {logprobs: ref_logprobs}", "writes: {logprob: ref_logprobs}", "did you mean 'logprobs'?", 27),
    ("writes: {logprobs: ref_logprobs}", "writes: {logprobs: 'a b'}", "expected the name of a field", 27),
    ("writes: {logprobs: ref_logprobs}", "writes: {logprobs: answer}", "'answer', which data (line 12) writes too", 27),
    ("writes: {logprobs: ref_logprobs}", "reads: {tokens: ref_logprobs}\n    writes: {logprobs: ref_logprobs}",
     "calls wait for one another in a circle: ref -[ref_logprobs]-> ref", 23),
    ("use: advantages.grpo", "use: advantages.grpo\n    reads: {rewards: logprobs}",
     "reads the field 'logprobs' (as 'rewards') with a value for each sample, found one for each token", 31),
    ("use: advantages.grpo", "use: advantages.grpo\n    reads: {group_ids: rewards}", "as int, found float", 31),
    ("minibatches: 2", "reads: {advantages: completion}", "found text for each sample, which cannot be repeated", 35),
    ("minibatches: 2", "reads: {ref_logprobs: nothing}", "reads the field 'nothing' (as 'ref_logprobs')", 35),
    ("use: rewards.last_number", "use: rewards.last_number\n    every: 2 steps", "writes only every 2 steps", 29),
    ("    writes: {logprobs: ref_logprobs}", "    writes: {logprobs: other}\n    every: 3 steps", None, None),
    # models
    ("model: ref", "model: rfe", "unknown model 'rfe'; did you mean 'ref'?", 24),
    ("    model: ref\n", "", "'model' is missing", 23),
    ("model: ref", "model: actor", "no call uses this model", 7),
    ("  ref:\n    path: some-model", "  ref:\n    path: some-model\n    optimizer: {}", "no call trains 'ref'", 9),
    ('    optimizer: {lr: "${lr}"}\n', "", "trains 'actor', which has no optimizer", 31),
    ("steps: 10", "  again:\n    model: actor\n    op: train\n    use: losses.sft\nsteps: 10",
     "trains 'actor', which call train trains too", 37),
    # sizes and sampling
    ("minibatches: 2", "minibatches: 3", "found 3, expected a number that divides the 8 prompts of a step (whole groups)", 35),
    ("minibatches: 2", "minibatches: 64", "or one above 8 that divides its 32 samples", 35),
    ("batch: ${n} prompts", "batch: 10 samples", "4 samples a prompt do not divide it", 17),
    ("max_new_tokens: 16", "max_new_tokens: 16\n    top_k: 50", "found 50, but call train trains on the field", 20),
    ("max_new_tokens: 16", "max_new_tokens: 16\n    top_p: 0.9", "found 0.9, but call train trains", 20),
    ("max_new_tokens: 16", "max_new_tokens: 16\n    temperature: 0", "use a temperature above 0", 20),
    # data
    ("source: reasoning_gym", "source: reasoning_gim", "did you mean 'reasoning_gym'?", 10),
    ("  task: chain_sum\n", "", "'task' is missing; the source reasoning_gym needs it", 9),
    ("task: chain_sum", "task: chain_sum\n  path: x.jsonl", "the source reasoning_gym takes no 'path'", 12),
    ("answer: answer}", "answer: anser}", "no column 'anser'; did you mean 'answer'?", 12),
    ("task: chain_sum", "task: chain_sum\n  split: {test: 0.3}", "a split needs 'unique'", 12),
    ("task: chain_sum", "task: chain_sum\n  split: {use: train}", "'test' is missing", 12),
    ("task: chain_sum", "task: chain_sum\n  unique: question\n  split: {test: 1}", "a fraction from 0 up to", 13),
    ("task: chain_sum", "task: chain_sum\n  unique: question\n  split: {test: 0, use: test}", "set 'test' above 0", 13),
    ("task: chain_sum", "task: chain_sum\n  chat: false", "is for data that is tokenized", 12),
    ("task: chain_sum", "task: chain_sum\n  tokenize: actor", "'tokenize' needs the field 'completion'", 12),
    ("task: chain_sum", "task: chain_sum\n  batch: 8 prompts", "remove 'batch' here", 12),
    ("task: chain_sum", "task: chain_sum\n  sise: 8", "did you mean 'size'?", 12),
    # what is no graph
    (GOOD, "", "is empty; expected a graph", 1),
    (GOOD, "- a\n", "holds no mapping", 1),
    (GOOD, "name: x\nmodels: []\ndata: 3\ncalls: {}\nsteps: 1\n", "found a list, expected a mapping from names", 2),
    (GOOD, "name: x\n  models: y\n", "not valid YAML", 2),
    (GOOD, "[" * 10_000_000, "larger than 1024 KiB", None),
    (GOOD, "[" * 1_000_000, "nested more than 64 levels", 1),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "part", "line"), BROKEN)
def test_broken_graphs(tmp_path: Path, old: str, new: str, part: str | None, line: int | None) -> None:
    assert GOOD.count(old) >= 1
    file = tmp_path / "graph.yaml"
    file.write_text(GOOD.replace(old, new, 1))
    if part is None:  # a control: unusual, but right
        load_graph(file)
        return
    with pytest.raises(InputError) as caught:
        load_graph(file)
    fitting = [problem for problem in caught.value.problems if part in problem.message]
    assert fitting, str(caught.value)
    assert (fitting[0].line, fitting[0].file) == (line, str(file)), str(caught.value)
    assert len(caught.value.problems) <= 3, str(caught.value)
    assert all(len(str(problem)) < 400 and "\n" not in str(problem) for problem in caught.value.problems)


def test_the_unbroken_graph_is_fine(tmp_path: Path) -> None:
    (tmp_path / "graph.yaml").write_text(GOOD)
    load_graph(tmp_path / "graph.yaml")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "graph.yaml").write_bytes(GOOD.encode().replace(b"some-model", b"some-\xe9", 1))
    with pytest.raises(InputError, match=r"graph\.yaml:5: not UTF-8 text: byte 0xe9"):
        load_graph(tmp_path / "graph.yaml")


def test_all_problems_of_a_file_are_reported_together_in_order(tmp_path: Path) -> None:
    text = GOOD
    for old, new in (
        ("path: some-model\n    opt", "path: 3\n    opt"),
        ("samples: 4", "samples: 0"),
        ("use: rewards.last_number", "use: rewards.last"),
        ("minibatches: 2", "minibatches: two"),
        ("steps: 10", "steps: 10\nsteps: 11\nseeed: 2"),
    ):
        text = text.replace(old, new, 1)
    (tmp_path / "graph.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_graph(tmp_path / "graph.yaml", ["lrr=3"])
    lines = [problem.line for problem in caught.value.problems]
    assert lines == [None, 5, 18, 22, 35, 37, 38]


@pytest.mark.parametrize("key", ["name", "models", "data", "calls", "steps"])
def test_any_part_may_be_missing_or_of_another_type(key: str) -> None:
    good = parse_yaml(GOOD).value
    for other in (None, 3, "text", [], {}, {"a": None}, [{}], {"a": {"b": []}}):
        if (key, other) not in (("name", "text"), ("steps", 3)):
            with pytest.raises(InputError):
                load_graph({**good, key: other})
    with pytest.raises(InputError, match=f"'{key}' is missing"):
        load_graph({name: value for name, value in good.items() if name != key})

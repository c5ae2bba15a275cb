"""Running functions: packed fields, rewards in other signatures, and errors that name the sample."""

import asyncio
import math
import sys
import threading
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.engines.functions import FunctionError, Progress, load_callable, run_function
from realflow.errors import InputError
from realflow.graph.builtins import BUILTINS
from realflow.graph.functions import declare, function
from realflow.graph.types import Call

EXTENTS = {
    "tokens": "token", "logprobs": "token", "loss_mask": "token", "completion": "sample", "answer": "sample",
    "rewards": "sample", "group_id": "sample", "advantages": "sample", "prompt": "prompt", "level": "sample",
}  # fmt: skip
DTYPES = {
    "tokens": "int", "logprobs": "float", "loss_mask": "bool", "completion": "text", "answer": "any",
    "rewards": "float", "group_id": "int", "advantages": "float", "prompt": "any", "level": "int",
}  # fmt: skip
LENGTHS = [3, 1, 2]
IDS = [40, 41, 50]
VALUES = {
    "tokens": [torch.arange(n) for n in LENGTHS],
    "logprobs": [-torch.arange(float(n)) for n in LENGTHS],
    "loss_mask": [torch.arange(n) > 0 for n in LENGTHS],
    "completion": ["= 1", "= 2", "= 3"],
    "answer": ["1", 2, "4"],
    "rewards": [1.0, None, 0.0],
    "group_id": [4, 4, 4],
    "prompt": ["a", "b", "c"],
    "level": [1, 2, 3],
}


def call_for(fn, use="tests:fn", **options):
    decl = BUILTINS[use] if use in BUILTINS else declare(fn, use)
    reads = {read.name: read.field for read in decl.reads if not (read.optional and read.field not in VALUES)}
    writes = {write.name: write.field for write in decl.writes}
    return Call("reward", "function", decl, reads=reads, writes=writes, options=options)


def run(fn, use="tests:fn", ids=IDS, progress=None, values=VALUES, **options):
    lengths = LENGTHS[: len(ids)]
    return run_function(
        fn, call_for(fn, use, **options), ids, values, lengths, EXTENTS, DTYPES, progress=progress
    )


def test_built_in_reward_and_advantage():
    assert run(load_callable("rewards.last_number"), "rewards.last_number") == {"rewards": [1.0, 1.0, 0.0]}
    grpo = load_callable("advantages.grpo")
    found = run(grpo, "advantages.grpo", scale=False)["advantages"]
    assert found == pytest.approx([0.5, 0.0, -0.5])  # the missing reward is no zero
    assert run(grpo, "advantages.grpo", scale=True)["advantages"] != found


def test_engine_options_do_not_reach_the_function():
    assert run(load_callable("advantages.grpo"), "advantages.grpo", normalise="token")


def test_packed_fields_lengths_and_several_results():
    @function(
        reads={
            "logp": "token float field=logprobs",
            "level": "token int",
            "tokens": "token int",
            "group": "sample int field=group_id",
            "prompt": "prompt any",
            "ref": "token float field=ref_logprobs optional",
        },
        writes={"doubled": "token float", "count": "sample int", "note": "sample text", "bits": "token bool"},
    )
    def several(logp, level, tokens, group, prompt, lengths, ref=None, *, factor=2.0):
        assert ref is None and lengths.tolist() == LENGTHS and group.tolist() == [4, 4, 4]
        assert level.tolist() == [1, 1, 1, 2, 3, 3]  # a sample's field, repeated over its tokens
        return {
            "doubled": logp * factor,
            "count": lengths,
            "note": [f"{text}!" for text in prompt],
            "bits": tokens > 0,
        }

    found = run(several, factor=3.0)
    assert [row.tolist() for row in found["doubled"]] == [[0.0, -3.0, -6.0], [0.0], [0.0, -3.0]]
    assert found["count"] == LENGTHS and found["note"] == ["a!", "b!", "c!"]
    assert [row.dtype for row in found["bits"]] == [torch.bool] * 3


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_pack_and_unpack_lose_nothing(lengths):
    @function(reads={"logprobs": "token float"}, writes={"same": "token float"})
    def identity(logprobs):
        return logprobs

    rows = [torch.randn(n) for n in lengths]
    call = call_for(identity)
    found = run_function(identity, call, range(len(lengths)), {"logprobs": rows}, lengths, EXTENTS, DTYPES)
    assert all(torch.equal(a, b) for a, b in zip(found["same"], rows, strict=True))


def test_trl_signature():
    def reward(completions, prompts, completion_ids=None, level=None, **kwargs):
        assert completions == VALUES["completion"] and prompts == ["a", "b", "c"] and level == [1, 2, 3]
        assert completion_ids == [[1, 2], [], [1]] and not kwargs
        return [1, None, Fraction(1, 2)]

    assert run(reward) == {"rewards": [1.0, None, 0.5]}


def test_trl_gets_messages_for_messages():
    def reward(completions, prompts):
        return [float(c[0]["content"] == "= 1" and c[0]["role"] == "assistant") for c in completions]

    values = {**VALUES, "prompt": [[{"role": "user", "content": "1"}]] * 3}
    assert run(reward, values=values) == {"rewards": [1.0, 0.0, 0.0]}


def test_async_trl_and_verl():
    async def trl(completions):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def verl(data_source, solution_str, ground_truth, extra_info=None):
        await asyncio.sleep(0.01 * int(solution_str[-1]))
        return {"score": float(ground_truth), "acc": 1}

    assert run(trl) == {"rewards": [3.0] * 3}
    assert run(verl) == {"rewards": [1.0, 2.0, 4.0]}


def test_verl_signature_is_called_for_each_sample():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        assert data_source == "" and extra_info is None
        return solution_str == f"= {ground_truth}"

    assert run(compute_score) == {"rewards": [1.0, 1.0, 0.0]}


def test_options_of_a_reward():
    def reward(completions, *, bonus=0.0):
        return [bonus for _ in completions]

    assert run(reward, bonus=0.25) == {"rewards": [0.25] * 3}


def raising_trl(completions):
    return [1 / (3 - int(text[-1])) for text in completions]


def raising_verl(data_source, solution_str, ground_truth):
    return raising_trl([solution_str])[0]


async def raising_async(data_source, solution_str, ground_truth):
    await asyncio.sleep(0.001 * int(solution_str[-1]))
    return raising_trl([solution_str])[0]


@pytest.mark.parametrize("fn", [raising_trl, raising_verl, raising_async])
def test_an_exception_names_function_sample_and_line(fn):
    with pytest.raises(FunctionError) as caught:
        run(fn)
    error = caught.value
    assert error.sample == 50 and error.call == "reward" and error.function == "tests:fn"
    text = str(error)
    assert text.startswith("call 'reward': tests:fn: sample 50: raised ZeroDivisionError: division by zero")
    assert "test_run_function.py" in text and "in raising_trl" in text
    assert "engines/functions.py" not in text


def test_an_exception_about_no_sample_names_them_all():
    def reward(completions):
        list(completions)
        raise OSError("no judge")

    with pytest.raises(FunctionError, match=r"samples 40, 41, 50: raised OSError: no judge") as caught:
        run(reward)
    assert caught.value.sample is None


def test_sys_exit_is_an_error_too():
    def reward(completions):
        sys.exit("enough")

    with pytest.raises(FunctionError, match="SystemExit: enough"):
        run(reward)


@pytest.mark.parametrize(
    ("returned", "message", "sample"),
    [
        ([1.0, math.nan, 0.0], "returned nan for rewards; expected a finite number", 41),
        ([1.0, 0.0, math.inf], "returned inf", 50),
        (torch.tensor([math.nan, 0.0, 0.0]), "returned nan", 40),
        ([1.0, 0.0], "returned 2 values for rewards; expected 3, one for each sample", None),
        ([], "returned 0 values", None),
        (1.0, "returned float 1.0 for rewards; expected a list", None),
        (None, "returned nothing for rewards", None),
        ([1.0, "good", 0.0], r"the text 'good' \(str\); expected a finite number", 41),
        ([[1.0], [1.0], [1.0]], r"a list \(list\)", 40),
        ({"reward": [1.0, 1.0, 1.0]}, "returned a dict with reward; expected rewards", None),
        ("abc", "expected a list", None),
    ],
)
def test_wrong_results(returned, message, sample):
    with pytest.raises(FunctionError, match=message) as caught:
        run(lambda completions: returned)
    assert caught.value.sample == sample


@pytest.mark.parametrize(
    "result", [torch.tensor([1, 2, 3]), (True, False, torch.tensor(1.5)), [1, 2.0, None]]
)
def test_results_in_other_forms(result):
    found = run(lambda completions: result)["rewards"]
    assert all(entry is None or type(entry) is float for entry in found)


def test_none_is_for_rewards_alone():
    @function(reads={"level": "sample int"}, writes={"advantages": "sample float"})
    def credit(level):
        return [1.0, None, 2.0]

    with pytest.raises(FunctionError, match="sample 41: returned for advantages nothing"):
        run(credit)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([0.0, 1.0, math.nan, 0.0, 1.0, 1.0]), "sample 40: returned nan for weights at token 2"),
        (torch.tensor([0.0, 1.0, 0.0, math.inf, 1.0, 1.0]), "sample 41: returned inf for weights at token 0"),
        (torch.zeros(5), r"a float32 tensor of shape \(5,\).*the 6 tokens"),
        (torch.zeros(()), "the 6 tokens"),
        ([0.0] * 6, "the 6 tokens"),
    ],
)
def test_wrong_token_fields(result, message):
    @function(reads={"logprobs": "token float"}, writes={"weights": "token float"})
    def weigh(logprobs):
        return result

    with pytest.raises(FunctionError, match=message):
        run(weigh)


def test_token_field_of_a_wrong_type():
    @function(reads={"tokens": "token int"}, writes={"keep": "token bool"})
    def keep(tokens):
        return tokens

    with pytest.raises(FunctionError, match=r"int64 tensor.*expected entries of type bool"):
        run(keep)


def test_inputs_of_a_wrong_type_are_named():
    @function(reads={"answer": "sample int"}, writes={"rewards": "sample float"})
    def reward(answer):
        return answer.double()

    with pytest.raises(FunctionError, match="sample 40: was to be given for answer the text '1'"):
        run(reward)


def test_built_in_errors_name_the_sample():
    values = {**VALUES, "answer": ["1", "blue", "3"]}
    with pytest.raises(
        FunctionError, match="sample 41: raised ValueError: the answer 'blue' holds no number"
    ):
        run(load_callable("rewards.last_number"), "rewards.last_number", values=values)


@pytest.mark.parametrize("signature", ["trl", "verl", "async"])
def test_a_hanging_sample_can_be_named_from_another_thread(signature):
    release, reached = threading.Event(), threading.Event()

    def judge(text):
        if text == "= 2":
            reached.set()
            release.wait(10)
        return 1.0

    def trl(completions):
        return [judge(text) for text in completions]

    def verl(data_source, solution_str, ground_truth):
        return judge(solution_str)

    async def slow(data_source, solution_str, ground_truth):
        return await asyncio.to_thread(judge, solution_str)

    progress, results = Progress(), []
    fn = {"trl": trl, "verl": verl, "async": slow}[signature]
    worker = threading.Thread(target=lambda: results.append(run(fn, progress=progress)))
    worker.start()
    assert reached.wait(10)
    if signature == "async":  # until the others have ended
        deadline = threading.Event()
        for _ in range(500):
            if progress.sample == 41:
                break
            deadline.wait(0.01)
    assert progress.sample == 41
    release.set()
    worker.join(10)
    assert results == [{"rewards": [1.0] * 3}] and progress.sample is None


def test_no_samples():
    assert run(raising_trl, ids=[], values={name: [] for name in VALUES}) == {"rewards": []}


def test_load_callable(tmp_path):
    (tmp_path / "my_reward_e.py").write_text("def exact(completions, answer):\n    return [1.0]\n")
    assert load_callable("my_reward_e:exact", tmp_path)([], []) == [1.0]
    for use in ("rewards.boxed", "advantages.grpo", "losses.ppo_clip", "losses.sft"):
        assert callable(load_callable(use))
    for use in ("logprobs", "rewards.nothing", "os.system", "my_reward_e:absent"):
        with pytest.raises(InputError):
            load_callable(use, tmp_path)

"""Built-in rewards: numbers and boxes as models write them."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.rewards.builtin import boxed, last_number


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("4 - 1 = 3", "3", True),
        ("The answer is 12.", "12", True),
        ("7-3", 3, True),
        ("7-3", -3, False),
        ("= -3", -3, True),
        ("(7)-3", "3", True),
        ("2^-3", "-3", True),
        ("it is \u22124", "-4", True),
        ("1,234,567 dollars", 1234567, True),
        ("1, 2, 3", 3, True),
        ("3,4", 4, True),
        ("0.50", "1/2", True),
        (".5", 0.5, True),
        ("6/8", "0.75", True),
        ("1/3", 1 / 3, True),
        ("0.1", 0.1, True),
        ("3/0", "3", False),
        ("1e3", 1000, True),
        ("3 apples, then 4", "3", False),
        ("no number", "3", False),
        ("", "3", False),
        ("42", "He had 50 - 8 = 42.\n#### 42", True),
        ("10000000000000001", 10000000000000000, False),
        ("9" * 5000, "9", False),
        ("3.14", 3.14159, False),
        ("+5", 5, True),
    ],
)
def test_last_number(completion, answer, right):
    assert last_number([completion], [answer]) == [float(right)]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"so \boxed{3}", "3", True),
        (r"\boxed{1} no, \boxed{2}", "2", True),
        (r"\boxed{1} no, \boxed{2}", "1", False),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{-\dfrac{3}{4}}", "-0.75", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{\sqrt{\frac{a}{b}}}", r"\sqrt{\frac{a}{b}}", True),
        (r"\boxed{1,000}", 1000, True),
        (r"\boxed{1{,}000}", 1000, True),
        (r"\boxed{ x + 1 }", "x+1", True),
        (r"\boxed{\text{Paris}}", "Paris", True),
        (r"$\boxed{$7$}$", 7, True),
        (r"\boxed{\left(1, 2\right)}", "(1,2)", True),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}", True),
        (r"the set \{1, 2} and \boxed{5}", "5", True),
        (r"\boxed{3", "3", False),
        (r"\boxed{3", "", None),
        ("3", "3", False),
        (r"\boxed{}", "3", False),
        (r"\boxed {3}", "3", True),
        (r"\fbox{3}", "3", True),
        (r"\boxed{3}", r"We find $x = \boxed{3}$.", True),
        (r"\boxed{3.0}", 3, True),
        (r"\boxed{3}", None, None),
    ],
)
def test_boxed(completion, answer, right):
    if right is None:
        with pytest.raises(ValueError, match="the answer"):
            boxed([completion], [answer])
    else:
        assert boxed([completion], [answer]) == [float(right)]


@pytest.mark.parametrize("answer", ["blue", None, [3], float("nan"), True])
def test_an_answer_without_a_number_is_an_error_and_no_reward(answer):
    with pytest.raises(ValueError, match="holds no number"):
        last_number(["3"], [answer])


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.text("abc ,.:=", max_size=5))
def test_integers_in_text(number, text):
    for written in (str(number), f"{number:,}", f"{number}.0"):
        assert last_number([f"1 {text} {written}"], [number]) == [1.0]
        assert last_number([f"1 {text} {written}"], [number + 1]) == [0.0]
        assert boxed([f"{text} \\boxed{{{written}}}"], [number]) == [1.0]


@settings(deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_fractions(value):
    assert last_number([f"= {value}"], [str(value)]) == [1.0]
    written = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    assert boxed([rf"\boxed{{{written}}}"], [str(value)]) == [1.0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.integers()), max_size=5))
def test_any_text_gets_a_reward(rows):
    texts, answers = [text for text, _ in rows], [answer for _, answer in rows]
    for function in (last_number, boxed):
        found = function(texts, answers)
        assert len(found) == len(rows) and set(found) <= {0.0, 1.0}


def test_long_texts_cost_linear_time():
    """Each would take minutes if a pattern or the braces were searched again from every place."""
    pieces = ["9", "1,", ",111", "1/", "1e", "1.", "-", r"\boxed{", "{", "}", r"\frac{", r"\text{", "{,}"]
    start = time.perf_counter()
    for piece in pieces:
        last_number([piece * 100_000], [1])
        boxed([r"\boxed{" + piece * 100_000 + "}"], [1])
    assert time.perf_counter() - start < 20


def test_unequal_columns():
    with pytest.raises(ValueError):
        last_number(["1", "2"], ["1"])

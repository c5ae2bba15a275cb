"""When two answers are the same: pairs written for it, properties, sympy as the reference, and no eval."""

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sympy.parsing import sympy_parser

from realflow.rewards.answers import extract, judged, quick, same, symbolic
from realflow.rewards.math import math, truths_of

HERE = Path(__file__).parent


def rows(name):
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


PAIRS = rows("math_pairs.jsonl")
"""Right and wrong in equal parts: an `answer` or a `completion`, the `truth`, whether they are the `same`."""
MORE = rows("math_more_pairs.jsonl")


def judge(pairs):
    """What `rewards.math` says of each: an answer is put into a box first."""
    boxes = [row.get("answer") and rf"So it is $\boxed{{{row['answer']}}}$." for row in pairs]
    completions = [box or row["completion"] for box, row in zip(boxes, pairs, strict=True)]
    return math(completions, [row["truth"] for row in pairs], workers=1, on_timeout="error")


def misjudged(pairs, verdicts):
    return [
        (row.get("answer", row.get("completion")), row["truth"], verdict)
        for row, verdict in zip(pairs, verdicts, strict=True)
        if verdict != float(row["same"])
    ]


@pytest.mark.parametrize("pairs", [PAIRS, MORE], ids=["300 pairs", "more pairs"])
def test_pairs(pairs):
    """At most 1 % misjudged; a pair over its limit, or one that cannot be judged, is an error here."""
    found = judge(pairs)
    wrong = misjudged(pairs, found["rewards"])
    assert len(wrong) <= len(pairs) // 100, wrong
    assert found["metrics"]["reward/math/timeout"] == found["metrics"]["reward/math/missing"] == 0.0
    bare = [row for row in pairs if "answer" in row]
    answers = [float(any(same(row["answer"], truth) for truth in truths_of(row["truth"]))) for row in bare]
    wrong = misjudged(bare, answers)
    assert len(wrong) <= len(bare) // 100, wrong


def test_what_the_pairs_are():
    assert len(PAIRS) == 300 and sum(row["same"] for row in PAIRS) == 150
    assert len({json.dumps(row) for row in PAIRS + MORE}) == len(PAIRS) + len(MORE)
    assert len({row["kind"] for row in PAIRS}) >= 12


def test_comparing_text_misjudges_many():
    """The control: the pairs are not so easy that equal text would do."""
    bare = [row for row in PAIRS if "answer" in row]
    verdicts = [float(row["answer"].replace(" ", "") == row["truth"].replace(" ", "")) for row in bare]
    assert len(misjudged(bare, verdicts)) > len(bare) // 4


FRACTIONS = st.fractions(max_denominator=10**4, min_value=-(10**4), max_value=10**4)


def spellings(value):
    above, below = value.numerator, value.denominator
    sign = "-" if above < 0 else ""
    found = [
        f"{above}/{below}",
        rf"\frac{{{above}}}{{{below}}}",
        rf"{sign}\dfrac{{{abs(above)}}}{{{below}}}",
        rf"${sign}\tfrac{{{abs(above)}}}{{{below}}}$",
        f"x = {above}/{below}",
        rf"\boxed{{{above}/{below}}}",
    ]
    whole, rest = divmod(abs(above), below)
    if whole and rest:
        found += [rf"{sign}{whole}\frac{{{rest}}}{{{below}}}", f"{sign}{whole} {rest}/{below}"]
    if rest == 0:
        found += [str(above), f"{above:,}", f"{above}.0", f"{above}.", rf"\text{{{above}}}"]
    return found


@settings(deadline=None, max_examples=60)
@given(FRACTIONS, FRACTIONS, st.randoms())
def test_a_number_in_all_spellings(value, other, draw):
    left, right = draw.choice(spellings(value)), draw.choice(spellings(value))
    assert same(left, right), (left, right)
    assume(other != value)
    wrong = draw.choice(spellings(other))
    assert not same(wrong, right), (wrong, right)


X, Y = sympy.symbols("x y")
LEAVES = st.sampled_from([X, Y, sympy.Integer(2), sympy.Integer(-3), sympy.Rational(1, 2), sympy.pi])
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, st.integers(1, 3)).map(lambda pair: pair[0] ** pair[1]),
        inner.map(lambda one: sympy.sqrt(one**2 + 1)),
        inner.map(sympy.sin),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(EXPRESSIONS, st.sampled_from([sympy.Integer(1), sympy.Rational(1, 1000), X, sympy.sqrt(2)]))
def test_expressions_that_sympy_writes(expression, difference):
    """LaTeX of sympy, expanded and factored, against sympy's own word for what is equal and what is not."""
    written = sympy.latex(expression)
    assert same(sympy.latex(sympy.expand(expression)), written)
    assert same(str(expression), written)
    assert not same(sympy.latex(expression + difference), written)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from(["1", "-2", r"\frac12", r"\sqrt{3}", "x+1", r"\pi"]), min_size=2, unique=True)
)
def test_order_counts_in_tuples_alone(parts):
    turned = parts[1:] + parts[:1]
    listed = ", ".join(parts)
    assert same(", ".join(turned), listed)
    assert same(rf"\{{{', '.join(turned)}\}}", rf"\left\{{{listed}\right\}}")
    assert same(" and ".join(turned), listed)
    assert same(f"({listed})", f"({listed})") and not same(f"({', '.join(turned)})", f"({listed})")
    assert not same(", ".join(parts[1:]), listed)


ENDS = st.lists(st.integers(-20, 20), min_size=4, max_size=4, unique=True).map(sorted)


@settings(deadline=None, max_examples=40)
@given(ENDS, st.booleans(), st.booleans())
def test_sets_of_real_numbers(ends, low_open, high_open):
    a, b, c, d = ends
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    interval = f"{left}{a}, {b}{right}"
    less, most = "<" if low_open else r"\le", "<" if high_open else r"\leq"
    assert same(f"{a} {less} x {most} {b}", interval)
    assert same(rf"x \in {interval}", interval)
    assert same(rf"\{{x : {a} {less} x {most} {b}\}}", interval)
    assert not same(f"{'[' if low_open else '('}{a}, {b}{right}", interval)
    assert same(rf"({c}, {d}) \cup {interval}", rf"{interval} \cup ({c}, {d})")
    assert not same(interval, rf"{interval} \cup ({c}, {d})")
    assert same(rf"({a}, {c}] \cup [{b}, {d})", rf"({a}, {d})")


PIECES = r"""\frac \sqrt { } ( ) [ ] 1 2 10 x e i \pi \infty ^ _ + - * / = < \le , ; : | ! % $ \$ \text{cm} cm
and \pm \cup \{ \} \in \begin{pmatrix} \end{pmatrix} \\ & \sin \log ^\circ . 0.5 \overline ' \binom √"""
WORDS = st.sampled_from(PIECES.split())


@settings(deadline=None, max_examples=150)
@given(
    st.lists(WORDS, max_size=9).map("".join), st.lists(WORDS, max_size=9).map("".join), st.text(max_size=9)
)
def test_any_text_is_judged(answer, truth, text):
    """Whatever a model writes is right or wrong, and no error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symbolic, "equal", lambda a, t: False)  # which may take for ever: see test_math.py
        for one, other in ((answer, truth), (answer, text), (text, truth)):
            assert same(one, other) in (True, False)
            assert quick(one, other) in (True, False, None)
        assert same(truth, truth) is bool(truth.strip(" ")) or not truth or quick(truth, truth) is False


def test_long_texts_cost_linear_time():
    """Each would take minutes if a pattern were searched again from every place."""
    pieces = [
        *"9-{}$ \n(|",
        "1,",
        ",111",
        "1/",
        "1e",
        "1.",
        r"\boxed{",
        r"\frac{",
        r"\text{",
        "{,}",
        r"\(",
        r"\[",
    ]
    pieces += ["answer is ", "answer ", "#### ", "<answer>", "is", "**", '"']
    start = time.perf_counter()
    for piece in pieces:
        text = piece * (100_000 // len(piece))
        extract(text)
        extract(text + " the answer is 5")
        for length in (1900, 100_000):
            quick(text[:length], "1")
            quick(text[:length], text[:length] + "1")
    assert time.perf_counter() - start < 40


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("9^{9^{9^{9}}}", "5"),
        ("9^9^9^9^9^9", "5"),
        ("123456789!", "5"),
        ("5!!!!!!!!!!", "5"),
        (r"\binom{1000000000}{500000000}", "5"),
        ("1e999999999", "5"),
        ("(" * 900 + "1" + ")" * 900, "2"),
        (r"\frac{" * 150 + "1" + "}{2}" * 150, "2"),
        ("x" + "^x" * 200, "5"),
        (r"\sin(" * 80 + "x" + ")" * 80, "0"),
        ("1," * 900 + "1", "1," * 900 + "2"),
        ("7" * 1900, "5"),
        (r"\tan(10^{400})", "1"),
        (r"e^{e^{e^{e^{e}}}}", "1"),
    ],
)
def test_what_would_fill_the_memory_is_not_computed(answer, truth):
    start = time.perf_counter()
    assert same(answer, truth) is False
    assert same(answer, answer) is True
    assert time.perf_counter() - start < 5


def test_nothing_is_evaluated(tmp_path, monkeypatch):
    """Text of a model reaches no parser that evaluates, but for the digits of numbers."""
    evaluating = sympy_parser.parse_expr
    parsed = []

    def guarded(text, *rest, **named):
        parsed.append(text)
        assert re.fullmatch(r"[0-9.]+", text), text
        return evaluating(text, *rest, **named)

    monkeypatch.setattr(sympy_parser, "parse_expr", guarded)
    for name in ("math_verify.parser.parse_expr", "latex2sympy2_extended.latex2sympy2.parse_expr"):
        monkeypatch.setattr(name, guarded)
    place = tmp_path / "made"
    for text in (
        f"__import__('pathlib').Path('{place}').touch()",
        rf"\text{{__import__('pathlib').Path('{place}').touch()}}",
        f"(lambda: open('{place}', 'w'))()",
        rf"\operatorname{{open}}('{place}', 'w')",
        rf"\input{{{place}}}",
        "[c for c in ().__class__.__base__.__subclasses__()]",
        r"\sum_{k=1}^{3} __import__('os')",
    ):
        assert same(text, "1") is False and same(text, r"\sum_{k=1}^{5} k") is False
    assert not place.exists()
    assert same(r"\sum_{k=1}^{4} k", "10") and parsed, "the control: math-verify was asked"


def test_an_answer_that_sympy_fails_on_is_wrong_and_a_truth_is_an_error(monkeypatch):
    def verify(expected, found, **_):
        if sympy.Symbol("q", real=True) in (expected.free_symbols | found.free_symbols):
            raise ValueError("sympy gives up")
        return False

    monkeypatch.setattr("math_verify.verify", verify)
    good, bad = r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n} q"
    assert judged(bad, good) is False
    with pytest.raises(ValueError, match="gives up"):
        judged(good, bad)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} no, it was \boxed{\sqrt{\frac{a}{b}}} after all", r"\sqrt{\frac{a}{b}}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{x \in \{1, 2\}}", r"x \in \{1, 2\}"),
        (r"the roots are \boxed{2} and \boxed{3}", "2, 3"),
        (r"\boxed{2}. Then we check that $2 \cdot 3 = 6$, or so: \boxed{6}", "6"),
        (r"$\boxed{\frac{1}{2}$ is it", r"\frac{1}{2}"),
        (r"cut in the middle of 123: \boxed{12", None),
        (r"\boxed{7} and then \boxed{}", "7"),
        ("The answer is 12.", "12"),
        ("The final answer is $\\frac{2}{3}$. I hope it is correct.", r"\frac{2}{3}"),
        ("**Answer:** (C)", "(C)"),
        ("answer is 5 because 2 + 3 = 5, not 6", "5"),
        ("#### 1,250", "1,250"),
        ("<answer>\n 42 </answer> That was it.", "42"),
        ("<think>the answer is 3</think> The answer is 4", "4"),
        ("<think>the answer is 3", "3"),
        ("x^2 + 1", "x^2 + 1"),
        (r"(-\infty, 2]", r"(-\infty, 2]"),
        ("Tuesday", "Tuesday"),
        ("we add 3 and 4 and so find 7 apples", "7"),
        ("Then $x = 3$, and so $y = 4$ follows for all of them", "y = 4"),
        ("it is 3/8", "3/8"),
        ("We thought about it for a long time.", None),
        ("", None),
    ],
)
def test_where_the_answer_is(text, answer):
    assert extract(text) == answer


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60), st.text("abc 12{}\\$.,", max_size=20))
def test_the_last_box_counts(before, inner):
    """Whatever stands before a box; braces within it nest."""
    assume(inner.strip() and "\\" not in inner and "boxed" not in before and "</think" not in before)
    depth = 0
    for letter in inner:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assume(depth >= 0)
    assume(depth == 0 and before.count("{") == before.count("}") == 0 and not before.endswith("\\"))
    assert extract(rf"{before} \boxed{{{inner}}} and no more") == inner.strip()


@pytest.mark.parametrize(
    ("answer", "truths"),
    [
        (5, ["5"]),
        (5.0, ["5"]),
        (0.25, ["0.25"]),
        (10**400, ["1" + "0" * 400]),
        ("5", ["5"]),
        (r"We find \boxed{5}, as it was.", ["5"]),
        ("He has 2 + 3 = 5.\n#### 5", ["5"]),
        (["1/2", 0.5], ["1/2", "0.5"]),
        (None, []),
        ("  ", []),
        (float("nan"), []),
        ({"a": 1}, []),
        ("a proof " * 1000, []),
    ],
)
def test_what_the_data_holds(answer, truths):
    assert truths_of(answer) == truths


def test_decimals_beside_exact_values():
    """See `decimals.py`: an exact truth wants an exact answer, a decimal truth what rounds to it."""
    third = Fraction(1, 3)
    for digits in range(1, 12):
        assert same(f"{float(third):.{digits}f}", "1/3") is (digits >= 6)
    assert same("1/3", "0.333") and not same("1/3", "0.33") and not same("1/3", "0.334")
    assert same(r"\pi", "3.14") and not same("3.14", r"\pi") and not same("3.14", "3.15")
    assert same("0.5", "1/2") and not same("0.49999999", "1/2") and not same("0.5000001", "1/2")

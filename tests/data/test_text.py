"""Text to tokens: prompts with and without a chat template, and pairs for supervised training."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHARACTERS, EOS, tiny_tokenizer

from realflow.data.text import encode_pair, encode_prompt
from realflow.errors import InputError

MESSAGES = [{"role": "user", "content": "2+2="}]
SHOWN = "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"
words = st.text(CHARACTERS, min_size=1, max_size=20)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def bare(tokenizer):
    found = tiny_tokenizer()
    found.chat_template = None
    return found


def test_chat_ends_where_the_assistant_begins(tokenizer):
    assert tokenizer.decode(encode_prompt(tokenizer, "2+2=", True)) == SHOWN
    assert encode_prompt(tokenizer, MESSAGES, True) == encode_prompt(tokenizer, "2+2=", True)


def test_plain_text(tokenizer, bare):
    assert tokenizer.decode(encode_prompt(tokenizer, "2+2=", False)) == "2+2="
    assert encode_prompt(bare, "2+2=", True) == encode_prompt(tokenizer, "2+2=", False)


@settings(deadline=None)
@given(words, words, st.booleans())
def test_pair_is_the_prompt_then_the_completion_then_the_end(prompt, completion, chat):
    tokenizer = tiny_tokenizer()
    tokens, mask = encode_pair(tokenizer, prompt, completion, chat)
    before = encode_prompt(tokenizer, prompt, chat)
    assert tokens[: len(before)] == before and not any(mask[: len(before)])
    assert all(mask[len(before) :]) and len(mask) == len(tokens)
    assert tokenizer.decode(tokens[len(before) :]) == completion + EOS


def test_completion_may_be_one_message(tokenizer):
    message = [{"role": "assistant", "content": "4"}]
    assert encode_pair(tokenizer, MESSAGES, message, True) == encode_pair(tokenizer, "2+2=", "4", True)


def test_max_length_cuts_the_end(tokenizer):
    tokens, mask = encode_pair(tokenizer, "12", "345", False)
    assert mask == [False, False, True, True, True, True]
    assert encode_pair(tokenizer, "12", "345", False, 4) == (tokens[:4], mask[:4])
    assert encode_pair(tokenizer, "12", "345", False, 99) == (tokens, mask)
    with pytest.raises(InputError, match="prompt of 2 tokens leaves nothing"):
        encode_pair(tokenizer, "12", "345", False, 2)


@pytest.mark.parametrize(
    ("prompt", "chat", "message"),
    [
        (7, True, "found int 7"),
        (None, True, "found NoneType"),
        ([], True, "found list"),
        (["hello"], True, "found list"),
        (MESSAGES, False, "chat: false"),
        ("", False, "has no tokens"),
    ],
)
def test_wrong_prompts(tokenizer, prompt, chat, message):
    with pytest.raises(InputError, match=message):
        encode_prompt(tokenizer, prompt, chat)


def test_messages_without_a_template(bare):
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(bare, MESSAGES, True)


def test_a_template_that_refuses(bare):
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        encode_prompt(bare, MESSAGES, True)


def test_completion_of_a_wrong_type(tokenizer):
    with pytest.raises(InputError, match="completion: found int"):
        encode_pair(tokenizer, "1", 4, True)

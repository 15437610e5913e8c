"""A response is trained on as it was given, whatever the chat template; what a template changes is named.

The templates are short forms of those of Qwen3, DeepSeek-R1, Llama 3, Mistral and gpt-oss.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import rows_from
from d2o_fast.data.rendering import DATED
from d2o_fast.data.tokens import encode_prompts, stop_token_ids, tokenize_rows
from d2o_fast.errors import DataError
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

CONFIG = D2OConfig(max_length=400, max_completion_length=300)
USER = [{"role": "user", "content": "how?"}]
BODY = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
BEGIN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
THINKS = (  # thoughts are written again, before every last answer
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set thoughts = m.reasoning_content or '' %}"
    "{% set answer = m.content %}{% if '</think>' in answer %}"
    "{% set thoughts = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set answer = answer.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}{{ answer + '<|im_end|>\n' }}"
    "{% else %}" + BODY + "{% endif %}{% endfor %}"
)
QWEN3 = THINKS + BEGIN
QWEN3_THINKING = THINKS + BEGIN.replace("assistant\n", "assistant\n<think>\n")
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
LLAMA = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
MISTRAL = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}"
    "{% endif %}{% endfor %}"
)
GPT_OSS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
    "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
NO_BEGIN = CHAT_TEMPLATE.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "")
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHAT_TEMPLATE
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + BEGIN
)
TOOLS = CHAT_TEMPLATE.replace("message['content']", "message['content'] + (message.tool_calls | string)")
EMPTY = "<think>\n\n</think>\n\n"


def answer(text: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text, **fields}]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.eos_token = "</s>" if template == MISTRAL else "<|im_end|>"
    tokenizer.chat_template = template
    return tokenizer


def tokens(template: str, prompt: Any, rejected: Any, name: str = "here", **columns: Any) -> tuple[str, str]:
    """(prompt, negative) as they are trained on."""
    tokenizer = tokenizer_with(template)
    rows = rows_from([{"prompt": prompt, "rejected": rejected, **columns}], name)
    (example,) = tokenize_rows(rows, tokenizer, CONFIG)
    assert list(encode_prompts(rows, tokenizer)) == [example.prompt_ids], "the sampler reads the same prompt"
    return str(tokenizer.decode(example.prompt_ids)), str(tokenizer.decode(example.rejected_ids))


@pytest.mark.parametrize("text", ["go away", "a", "no", " go\n", "<b>", "i think: </b>"])
@pytest.mark.parametrize(
    ("template", "start", "end", "warning"),
    [
        (CHAT_TEMPLATE, "", "<|im_end|>", ""),
        (QWEN3, EMPTY, "<|im_end|>", r"writes '<think>\n\n</think>\n\n' before responses"),
        (QWEN3_THINKING, EMPTY.removeprefix("<think>\n"), "<|im_end|>", r"writes '\n</think>\n\n' before responses"),
        (R1, "", "<|im_end|>", r"opens a new answer with '<think>\n' but not the given ones"),
        (LLAMA, "", "<|im_end|>", ""),
        (MISTRAL, " ", "</s>", ""),
        (GPT_OSS, "<|channel|>final<|message|>", "<|im_end|>", "writes '<|channel|>final<|message|>' before responses"),
        (NO_BEGIN, "<|im_start|>assistant\n", "<|im_end|>", r"writes '<|im_start|>assistant\n' before responses"),
    ],
    ids=["chatml", "qwen3", "qwen3-thinking", "r1", "llama", "mistral", "gpt-oss", "no-begin"],
)
def test_an_ordinary_answer_is_kept(
    template: str, start: str, end: str, warning: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="d2o_fast"):
        _, negative = tokens(template, USER, answer(text), f"{text!r} of {hash(template)}")
    kept = text.strip() if template == LLAMA else text
    assert negative == start + kept + end
    trimmed = "changes the white space" if kept != text else ""
    said = [record.message for record in caplog.records]
    assert len(said) == bool(warning or trimmed), said
    assert not said or (warning or trimmed) in said[0]


THOUGHTS = "<think>\nplot\n</think>\n\nbad"


def test_thoughts_are_kept_or_refused() -> None:
    for template, start in ((QWEN3, ""), (QWEN3_THINKING, "<think>\n"), (CHAT_TEMPLATE, "")):
        assert start + tokens(template, USER, answer(THOUGHTS))[1] == THOUGHTS + "<|im_end|>"
    for text in ("<think>plot</think>bad", "<think> plot\n</think>bad"):
        assert "".join(tokens(QWEN3, USER, answer(text))[1].split()) == "".join((text + "<|im_end|>").split())
    assert tokens(QWEN3, USER, answer("bad", reasoning_content="plot"))[1] == THOUGHTS + "<|im_end|>"
    for text in (THOUGHTS, "<think>plot</think>bad", "so</think>bad"):
        with pytest.raises(
            DataError, match=r"here, row 1, field 'rejected': .* does not render it as given \('.*became"
        ):
            tokens(R1, USER, answer(text))
    with pytest.raises(DataError, match=r"row 1, field 'anchors\[1\]': .* does not render it as given"):
        tokens(R1, USER, answer("bad"), anchors=[answer("good"), answer(THOUGHTS)])


@pytest.mark.parametrize(
    "body",
    [
        "m.content[:-1]",
        "m.content | upper",
        "m.content | replace('a', '')",
        "'...'",
        "m.content | replace('<', '&lt;')",
        "''",
    ],
)
def test_a_changed_response_is_refused(body: str) -> None:
    template = CHAT_TEMPLATE.replace("message['content']", body.replace("m.", "message."))
    with pytest.raises(DataError, match="row 1, field 'rejected': the chat template does not render it as given"):
        tokens(template, USER, answer("a <b> & m"))


def test_fields_that_a_template_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    call = [{"function": {"name": "f", "arguments": {"city": "Rome"}}}]
    for field in ("reasoning_content", "thinking", "tool_calls", "function_call"):
        with pytest.raises(DataError, match=rf"row 1, field 'rejected\[0\].{field}': the chat template leaves it out"):
            tokens(CHAT_TEMPLATE, USER, answer("bad", **{field: call}))
    calls = [*USER, *answer("", tool_calls=call), {"role": "tool", "content": "22"}]
    with pytest.raises(DataError, match=r"row 1, field 'prompt\[1\].tool_calls': the chat template leaves it out"):
        tokens(CHAT_TEMPLATE, calls, answer("bad"))
    assert "Rome" in tokens(TOOLS, calls, answer("bad", tool_calls=call))[0]
    assert "Rome" in tokens(TOOLS, calls, answer("bad", tool_calls=call))[1]
    with caplog.at_level(logging.WARNING, logger="d2o_fast"):
        tokens(CHAT_TEMPLATE, [{**USER[0], "name": "x"}], answer("bad", name="y", tool_calls=[]), "named")
        tokens(MISTRAL, [*USER, *answer("<b>"), *USER], answer("bad"), "no warning")
        tokens(QWEN3.replace("m.role + '", "'"), USER, answer(THOUGHTS), "no warning either")
    (record,) = caplog.records
    assert "leaves out the field 'name' of messages (2 times; the first is named, row 1, field 'prompt[0].name')" in (
        record.message
    )


def test_a_call_of_a_tool_may_have_no_content() -> None:
    call = [{"function": {"name": "f", "arguments": {"city": "Rome"}}}]
    both = [
        tokens(TOOLS, [*USER, {"role": "assistant", "content": content, "tool_calls": call}, *USER], answer("bad"))
        for content in ("", None)
    ]
    assert both[0] == both[1]
    with pytest.raises(DataError, match=r"field 'prompt\[1\]': content is nothing \(null\)"):
        tokens(TOOLS, [*USER, {"role": "assistant", "content": None}, *USER], answer("bad"))


def test_a_template_that_writes_the_date_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="d2o_fast"):
        tokens("{{ strftime_now('%Y') }}" + CHAT_TEMPLATE, USER, answer("bad"))
    assert [record.message for record in caplog.records] == [DATED]


def test_messages_of_a_prompt_that_a_template_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    template = "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + CHAT_TEMPLATE
    prompt = [{"role": "system", "content": "be kind"}, *USER]
    with caplog.at_level(logging.WARNING, logger="d2o_fast"):
        for _ in range(2):
            tokens(template, prompt, answer("bad"), "system left out")
    (record,) = caplog.records
    assert "leaves out or changes messages of prompts (1 times; the first is system left out, row 1" in record.message


def test_the_end_of_a_turn_is_found_with_the_messages_of_the_row() -> None:
    system = [{"role": "system", "content": "be kind"}, *USER]
    for template, prompt in ((SYSTEM_FIRST, system), (MISTRAL, USER), (CHAT_TEMPLATE, [*USER, *answer("d2o"), *USER])):
        assert tokens(template, prompt, answer("bad"))[1].strip().startswith("bad<")
        tokenizer = tokenizer_with(template)
        rows = rows_from([{"prompt": prompt, "rejected": answer("bad")}])
        assert stop_token_ids(tokenizer, tiny_model(), rows) == sorted({2, tokenizer.eos_token_id})
    with pytest.raises(DataError, match=r"row 1, field 'prompt': the chat template refuses .*\(no system message\)"):
        tokens(SYSTEM_FIRST, USER, answer("bad"))
    with pytest.raises(DataError, match=r"\(roles must alternate\)"):
        tokens(MISTRAL, system, answer("bad"))
    for text in ("bad", "i", "m"):  # the last two are letters of <|im_end|>
        with pytest.raises(DataError, match="row 1, field 'rejected': the chat template does not render it as given"):
            tokens(PARTS, USER, answer(text))
    with pytest.raises(DataError, match="the chat template refuses these messages"):
        tokens("{{ 1 / 0 }}", USER, answer("bad"))


def dna(*specials: str) -> PreTrainedTokenizerFast:
    """A tokenizer of four letters, without one for unknown text."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "A", "C", "G", "T", *specials])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=None))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_a_tokenizer_that_knows_few_letters() -> None:
    (example,) = tokenize_rows(rows_from([{"prompt": "ACGT", "rejected": "TTT"}]), dna(), CONFIG)
    assert (example.prompt_ids, example.rejected_ids) == ([3, 4, 5, 6], [6, 6, 6, 2])
    rows = [{"prompt": "ACGT", "rejected": "TTT"}]
    for field, row in (
        ("prompt", {"prompt": "AXG"}),
        ("rejected", {"rejected": "X"}),
        ("anchors[1]", {"anchors": ["A", "X"]}),
    ):
        with pytest.raises(DataError, match=r"here, row 2, field '(.*)': the tokenizer refuses it .*UNK") as caught:
            tokenize_rows(rows_from([*rows, {**rows[0], **row}], "here"), dna(), CONFIG)
        assert caught.value.field == field

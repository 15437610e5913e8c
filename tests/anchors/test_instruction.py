"""An instruction steers the draws only: stored prompts, scores and training have the bare prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2o_fast.anchors.build import build_store
from d2o_fast.anchors.drawing import draw_seed
from d2o_fast.anchors.fingerprint import expected_fingerprint
from d2o_fast.anchors.inspection import inspect
from d2o_fast.anchors.instruction import instructed
from d2o_fast.data.reading import rows_from
from d2o_fast.data.tokens import tokenize_rows
from d2o_fast.errors import D2OError, DataError
from d2o_fast.sampling.generate import sample_responses
from stores import CHAT_ROW, CONFIG, build, contents, naive_logp
from tiny import CHAT_TEMPLATE, peaked_model, tiny_model, tiny_rows, tiny_tokenizer

TEXT = replace(CONFIG, sampling_instruction="go away: {prompt} to")
SYSTEM = replace(CONFIG, sampling_instruction="be kind")
USER = {"role": "user", "content": "how?"}


def wrapped(prompt: Any, instruction: str) -> Any:
    chat = isinstance(prompt, list)
    rejected = [{"role": "assistant", "content": "no"}] if chat else "no"
    rows = rows_from([{"prompt": prompt, "rejected": rejected}], "memory")
    config = replace(CONFIG, sampling_instruction=instruction, max_length=200)
    ((row, ids),) = instructed(rows, tiny_tokenizer(chat), config)
    tokenizer = tiny_tokenizer(chat)
    text = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, tokenize=False) if chat else row.prompt
    assert tokenizer.decode(ids) == text
    return row.prompt


def test_where_the_instruction_goes() -> None:
    assert wrapped("how?", "Q: {prompt} A:") == "Q: how? A:"
    assert wrapped("{0} {prompt}", "a {prompt} {x}") == "a {0} {prompt} {x}", "nothing else in braces means anything"
    assert wrapped([USER], "be kind") == [{"role": "system", "content": "be kind"}, USER]
    for role in ("system", "developer"):
        joined = {"role": role, "content": "be kind\n\nbe short"}
        assert wrapped([{"role": role, "content": "be short"}, USER], "be kind") == [joined, USER]
    turns = [USER, {"role": "assistant", "content": "so"}, {"role": "user", "content": "why?", "name": "n"}]
    last = {"role": "user", "content": "why? (be kind)", "name": "n"}
    assert wrapped(turns, "{prompt} (be kind)") == [*turns[:2], last]
    assert turns[2]["content"] == "why?", "the data are left as they are"


def swayed_model(chat: bool = False) -> Any:
    """A model whose responses depend on early prompt tokens: attention outweighs the last token."""
    model = peaked_model(chat=chat)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(30)
    return model


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_draws_follow_the_instruction_and_scores_the_bare_prompt(tmp_path: Path, chat: bool) -> None:
    config = replace(SYSTEM if chat else TEXT, num_generations=8)
    model, tokenizer = swayed_model(chat), tiny_tokenizer(chat)
    records = tiny_rows(4)
    if chat:
        records = [
            {
                "prompt": [{"role": "user", "content": record["prompt"]}],
                "rejected": [{"role": "assistant", "content": record["rejected"]}],
            }
            for record in records
        ]
    rows = rows_from(records, "memory")
    store = build_store(model, tokenizer, rows, config, tmp_path / "s")
    longer = [ids for _, ids in instructed(rows, tokenizer, config)]
    stops = store.fingerprint["stop_token_ids"]
    drawn = sample_responses(
        model, longer, 8, max_new_tokens=12, eos_token_ids=stops, pad_token_id=0, seed=draw_seed(5, 0)
    )
    gain = 0.0
    for example, bare, asked, responses in zip(
        store.examples(), tokenize_rows(rows, tokenizer, config), longer, drawn, strict=True
    ):
        assert example.anchor_ids == responses
        assert (example.prompt_ids, example.rejected_ids) == (bare.prompt_ids, bare.rejected_ids)
        for response, logp in zip(example.responses(), example.ref_logps, strict=True):
            assert logp == pytest.approx(naive_logp(model, bare.prompt_ids, response), rel=1e-4)
        for response, logp in zip(example.anchor_ids, example.ref_logps[1:], strict=True):
            gain += (naive_logp(model, asked, response) - logp) / 32
    assert gain > 3.0, "nats per anchor: the model's answers depend on the instruction"
    assert store.rows() == rows
    assert f"\nsampling_instruction {config.sampling_instruction!r}\n" in inspect(tmp_path / "s")


def test_given_anchors_need_no_instruction(tmp_path: Path) -> None:
    """A prompt of 52 tokens can be scored but not wrapped; with its own anchors it needs no wrapping."""
    long = {"prompt": "x" * 52, "rejected": "no", "anchors": ["it"]}
    plain = build(tmp_path / "plain", [*tiny_rows(2), long], swayed_model())
    store = build(tmp_path / "s", [*tiny_rows(2), long], swayed_model(), TEXT)
    assert store.examples()[2] == plain.examples()[2]
    assert store.examples()[0].anchor_ids != plain.examples()[0].anchor_ids


def test_what_cannot_be_wrapped_is_refused_before_the_first_draw(tmp_path: Path) -> None:
    chat = {name: CHAT_ROW[name] for name in ("prompt", "rejected")}
    cases = [
        (tiny_rows(1)[0], SYSTEM, r"field 'prompt': a plain text, and sampling_instruction has no \{prompt\} where"),
        ({"prompt": "x" * 60, "rejected": "no"}, TEXT, r"with sampling_instruction it has \d+ tokens, .* cut it to 52"),
        ({"prompt": "x" * 50, "rejected": "no"}, TEXT, r"with sampling_instruction it has \d+ tokens, .* cut it to 52"),
        ({**chat, "prompt": [{"role": "system", "content": "how?"}]}, TEXT, r"no message of the user that could stand"),
    ]
    for i, (record, config, message) in enumerate(cases):
        fine = {**chat, "prompt": [USER]} if isinstance(record["prompt"], list) else tiny_rows(2)[1]
        records = [record] if config is SYSTEM else [fine] * 4 + [record]
        with pytest.raises(DataError, match=rf"memory, row {len(records)}, field 'prompt': .*{message[16:]}"):
            build(tmp_path / str(i), records, config=config, chat=isinstance(record["prompt"], list))
        assert not (tmp_path / str(i)).exists()
    with pytest.raises(D2OError, match="sampling_instruction is ''; it must be a text, or nothing"):
        replace(CONFIG, sampling_instruction="")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            + CHAT_TEMPLATE,
            r"with sampling_instruction the chat template refuses these messages \(no system role\). If the template",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}" + CHAT_TEMPLATE,
            r"the chat template leaves sampling_instruction out. Put \{prompt\} into the instruction",
        ),
    ],
)
def test_a_template_without_a_system_role(template: str, message: str) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = template
    rows = rows_from([CHAT_ROW], "memory")
    with pytest.raises(DataError, match=f"memory, row 1, field 'prompt': {message}"):
        list(instructed(rows, tokenizer, SYSTEM))
    assert len(list(instructed(rows, tokenizer, replace(SYSTEM, sampling_instruction="{prompt} (be kind)")))) == 1


def test_the_fingerprint_knows_it(tmp_path: Path) -> None:
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), rows_from(tiny_rows(2))
    one, other = (expected_fingerprint(model, tokenizer, rows, config) for config in (CONFIG, TEXT))
    assert {name for name in one if one[name] != other[name]} == {"sampling_instruction"}
    assert contents(build(tmp_path / "s", config=TEXT).folder) == contents(build(tmp_path / "t", config=TEXT).folder)

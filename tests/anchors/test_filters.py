"""Filters drop the draws they name and no others, count them, and never lose a prompt silently."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from d2o_fast import D2OTrainer
from d2o_fast.anchors import filters as filters_module
from d2o_fast.anchors import scorers
from d2o_fast.anchors.filters import AnchorFilter, KeptDraws, counts_text, token_overlap
from d2o_fast.anchors.fingerprint import expected_fingerprint
from d2o_fast.anchors.inspection import export, inspect
from d2o_fast.anchors.scorers import ClassifierScorer
from d2o_fast.anchors.shards import SCHEMA, check_shard, read_manifest, read_shard, write_shard
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.cli import main
from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import rows_from
from d2o_fast.data.row import Example
from d2o_fast.errors import D2OError, DataError
from stores import CHAT_ROW, CONFIG, build, naive_logp
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer

ALL = {"drop_anchors": ["duplicate", "empty", "truncated"]}
SCORES = """
def length(prompt, response):
    return len(response)

def not_bake(prompt, response):
    return -1.0 if "bake" in prompt or "mend" in prompt else 1.0

def nothing(prompt, response):
    return -1

def asks(prompt, response):
    seen.append((prompt, response))
    return 1.0

seen = []
values = iter(())

def given(prompt, response):
    return next(values)
"""


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's module ``anchor_scores``."""
    import importlib
    import sys

    (tmp_path / "anchor_scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "anchor_scores", raising=False)
    importlib.invalidate_caches()
    return importlib.import_module("anchor_scores")


def filtered(draws: list[list[int]], negative: list[int] | None = None, **settings: Any) -> KeptDraws:
    """One row, "how to open the lock?", with stop token 2."""
    config = replace(CONFIG, num_draws=max(len(draws), 4), **settings)
    apply = AnchorFilter(tiny_tokenizer(), config, [2], torch.device("cpu"))
    example = Example([5, 6], negative or [9, 9, 2], [], [])
    (found,) = apply(rows_from(tiny_rows(1), "memory"), [example], [draws])
    return found


# --- The draws each one drops -----------------------------------------------------------------------------------------

A, B, C, D = [11, 12, 2], [13, 14, 2], [11, 13, 2], [15, 2]


def test_without_filters_everything_stays() -> None:
    draws = [A, A, [2]]
    assert filtered(draws, negative=A) == KeptDraws(draws, [])
    assert filtered([[7] * 12, A, A, B]) == KeptDraws([[7] * 12, A, A], ["surplus"])


def test_each_filter_drops_its_own() -> None:
    draws = [A, [2], B, A, [7] * 12, [2]]
    assert filtered(draws, drop_anchors=["duplicate"]) == KeptDraws([A, [2], B], ["duplicate", "surplus", "duplicate"])
    assert filtered(draws, drop_anchors=["empty"]) == KeptDraws([A, B, A], ["empty", "surplus", "empty"])
    assert filtered(draws, drop_anchors=["truncated"]) == KeptDraws([A, [2], B], ["surplus", "truncated", "surplus"])
    assert filtered(draws, **ALL) == KeptDraws([A, B], ["empty", "duplicate", "truncated", "empty"])
    assert filtered([[2], [2]], **ALL) == KeptDraws([], ["empty", "empty"])


def test_overlap_with_the_negative() -> None:
    assert [token_overlap(ids, A, {2}) for ids in (A, C, B)] == [1.0, 1 / 3, 0.0]
    assert filtered([A, C, B], negative=A, max_anchor_overlap=1 / 3) == KeptDraws([C, B], ["overlap"])
    assert filtered([A, C, B], negative=A, max_anchor_overlap=0.3) == KeptDraws([B], ["overlap", "overlap"])
    assert filtered([A, C, B], negative=A, max_anchor_overlap=0.0) == KeptDraws([B], ["overlap", "overlap"])


def test_the_best_of_n_stay_in_the_order_they_were_drawn(scores: Any) -> None:
    draws = [A, B, C, D, B]
    scores.values = iter([1, 3, 2, 2, 2.5])
    best = filtered(draws, anchor_score="anchor_scores:given")
    assert best == KeptDraws([B, C, B], ["surplus", "surplus"]), "of the two that score 2 the first stays"
    scores.values = iter([1, 3, 2, 2, 2.5])
    best = filtered(draws, anchor_score="anchor_scores:given", min_anchor_score=2.25)
    assert best == KeptDraws([B, B], ["score", "score", "score"])
    scores.values = iter([1, 3, 2])
    exact = filtered(draws[:3], anchor_score="anchor_scores:given", min_anchor_score=2)
    assert exact == KeptDraws([B, C], ["score"]), "a score at the threshold is enough"


def test_only_what_is_left_is_scored_and_as_a_judge_sees_it(scores: Any) -> None:
    tokenizer = tiny_tokenizer()
    filtered([A, A, [2], B], anchor_score="anchor_scores:asks", min_anchor_score=0.0, **ALL)
    texts = [tokenizer.decode(ids[:-1]) for ids in (A, B)]
    assert scores.seen == [("how to open the lock?", text) for text in texts]
    scores.seen.clear()
    config = replace(CONFIG, anchor_score="anchor_scores:asks", min_anchor_score=0.0)
    chat = rows_from([{name: CHAT_ROW[name] for name in ("prompt", "rejected")}], "memory")
    AnchorFilter(tokenizer, config, [2], torch.device("cpu"))(chat, [Example([5], [9, 2], [], [])], [[A]])
    assert scores.seen == [("how?", texts[0])]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), None, "good", True, torch.ones(2), torch.tensor(float("nan"))]
)
def test_a_score_that_is_no_number_names_the_row(scores: Any, value: Any) -> None:
    scores.values = iter([1.0, value])
    text = r"memory, row 1, field 'anchors': anchor_score 'anchor_scores:given' gives .* to '.*'. It must be a finite"
    with pytest.raises(DataError, match=text):
        filtered([A, B], anchor_score="anchor_scores:given")


def test_a_score_that_raises_is_named_with_the_row(scores: Any) -> None:
    scores.values = iter([1.0])
    text = (
        r"^memory, row 1: anchor_score 'anchor_scores:given' raises StopIteration .*anchor_scores.py, line \d+. for '"
    )
    with pytest.raises(DataError, match=text) as error:
        filtered([A, B], anchor_score="anchor_scores:given")
    assert isinstance(error.value.__cause__, StopIteration)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_draws": 2}, "num_draws is 2; it must be at least num_generations .3., or nothing"),
        ({"max_anchor_overlap": 1.0}, "max_anchor_overlap is 1.0; it must be a number >= 0 and < 1, or nothing"),
        ({"min_anchor_score": 1.0}, "min_anchor_score is 1.0; it must be left out, or anchor_score set"),
        ({"anchor_score": "a:b"}, "anchor_score is 'a:b'; .*it would decide nothing"),
        ({"anchor_score": "a:b", "num_draws": 3}, "it would decide nothing"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(D2OError, match=message):
        replace(CONFIG, **settings)


# --- Classifiers -------------------------------------------------------------------------------------------------


def save_classifier(folder: Path, chat: bool = False, pad: int | None = 0, labels: int = 1) -> str:
    settings = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LlamaConfig(**settings, **heads, pad_token_id=pad, num_labels=labels)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return str(folder)


PAIRS = [("how to open the lock?", " it"), ("how?", " go away, open it yourself"), ("to sell the boat", "")]


@pytest.mark.parametrize("chat", [False, True], ids=["two texts", "template"])
@pytest.mark.parametrize("pad", [0, None, 7], ids=["padded", "no pad token", "another pad token"])
def test_a_classifiers_scores_are_its_own(tmp_path: Path, chat: bool, pad: int | None) -> None:
    """A text's score does not depend on the other texts of its batch."""
    name = save_classifier(tmp_path / "rm", chat, pad)
    scorer = ClassifierScorer(name, torch.device("cpu"))
    assert scorer.batch == (scorers.SCORE_BATCH if pad == 0 else 1)
    rows = rows_from([{"prompt": prompt, "rejected": "x"} for prompt, _ in PAIRS])
    found = scorer(list(zip(rows, (response for _, response in PAIRS), strict=True)))
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(name).eval(), tiny_tokenizer(chat)
    for (prompt, response), score in zip(PAIRS, found, strict=True):
        text = prompt + response
        if chat:
            text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
        with torch.no_grad():
            (expected,) = model(torch.tensor([tokenizer(text)["input_ids"]])).logits.flatten().tolist()
        assert score == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in found}) == 3


def test_an_encoder_with_segments(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertForSequenceClassification(BertConfig(vocab_size=160, num_labels=1, **sizes)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    scorer = ClassifierScorer(str(tmp_path), torch.device("cpu"))
    rows = rows_from([{"prompt": prompt, "rejected": "x"} for prompt, _ in PAIRS])
    pairs = list(zip(rows, (response for _, response in PAIRS), strict=True))
    together = scorer(pairs)
    assert together == pytest.approx([score for pair in pairs for score in scorer([pair])], abs=1e-5)


def test_classifiers_that_cannot_score(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    for name, message in (
        (str(tmp_path / "none"), "is not a folder; a function is named like"),
        (save_tiny(tmp_path / "lm"), r"no trained classifier .missing: score.weight.: its scores would be random"),
        (save_classifier(tmp_path / "two", labels=2), "has 2 outputs .LABEL_0, LABEL_1., and a score is one number"),
    ):
        with pytest.raises(D2OError, match=message):
            ClassifierScorer(name, cpu)
    (tmp_path / "empty").mkdir()
    with pytest.raises(D2OError, match=r"has no config.json"):
        ClassifierScorer(str(tmp_path / "empty"), cpu)
    scorer = ClassifierScorer(save_classifier(tmp_path / "rm"), cpu)
    rows = rows_from([{"prompt": "xyz" * 100, "rejected": "x"}], "memory")
    with pytest.raises(DataError, match=r"memory, row 1, .* are \d+ tokens to anchor_score .*, which reads 128"):
        scorer([(rows[0], "it")])
    chat = ClassifierScorer(save_classifier(tmp_path / "chat", chat=True), cpu)
    chat.tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(DataError, match=r"memory, row 1, field 'prompt': the chat template of .* \(only one turn"):
        chat([(rows[0], "it")])
    with pytest.raises(D2OError, match=r"anchor_score 'no.such:score': module 'no.such' cannot be imported"):
        scorers.load_scorer("no.such:score", cpu)


# --- In the store ------------------------------------------------------------------------------------------------

FILTERED = replace(CONFIG, num_draws=5, drop_anchors=["duplicate", "truncated"])
LOSING = replace(CONFIG, anchor_score="anchor_scores:not_bake", min_anchor_score=0.0)


def ending_model() -> Any:
    """A model whose responses end at once or late or never: EOS has about a fifth of the mass everywhere."""
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(160))
    with torch.no_grad():
        model.lm_head.bias[2] = 3.7
    return model


def test_the_store_holds_what_is_left_of_the_same_draws(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", model=ending_model(), config=replace(CONFIG, num_generations=5)).examples()
    store = build(tmp_path / "s", model=ending_model(), config=FILTERED)
    counts = []
    for place, (example, record) in enumerate(zip(store.examples(), store.records(*SCHEMA.names), strict=True)):
        drawn = [ids for ids in whole[place].anchor_ids if ids[-1] == 2]
        distinct = [ids for i, ids in enumerate(drawn) if ids not in drawn[:i]]
        assert example.anchor_ids == distinct[:3]
        assert len(example.anchor_ids) + len(record["dropped"]) == 5
        assert record["dropped"].count("truncated") == 5 - len(drawn)
        assert record["dropped"].count("duplicate") == len(drawn) - len(distinct)
        assert len(example.ref_logps) == 1 + len(example.anchor_ids)
        for response, logp in zip(example.responses(), example.ref_logps, strict=True):
            assert logp == pytest.approx(naive_logp(ending_model(), example.prompt_ids, response), abs=2e-4)
        counts.append(len(example.anchor_ids))
    assert min(counts) < 3 <= max(counts), "K is ragged"
    assert counts_text(store.dropped()) == ", ".join(
        f"{store.dropped()[reason]} {reason}" for reason in ("truncated", "duplicate", "surplus")
    )
    assert store.lost() is None
    assert AnchorStore.open(tmp_path / "s").examples() == store.examples()


def test_a_row_that_loses_everything_stays_in_the_store(tmp_path: Path, scores: Any) -> None:
    """Rows 3 and 4 ("bake", "mend") score below the threshold; the given anchors of the last row are not touched."""
    given = {"prompt": "how to bake", "rejected": " no", "anchors": [" it", " it"]}
    store = build(tmp_path / "s", [*tiny_rows(6), given], config=LOSING)
    assert list(store.usable) == [0, 1, 4, 5, 6]
    assert [len(example.anchor_ids) for example in store.examples()] == [3, 3, 3, 3, 2]
    assert store.rows() == rows_from([*tiny_rows(6), given], "memory")
    lost = list(store.records(*SCHEMA.names))[2]
    assert lost["anchors"] == lost["anchors_ids"] == lost["anchors_ref_logps"] == lost["anchors_tokens"] == []
    assert lost["rejected_ref_logp"] is None
    assert lost["dropped"] == ["score"] * 3
    said = store.lost()
    assert said is not None
    assert said.startswith(
        "2 of 7 rows lost all their anchors to the filters and are left out (memory, row 3; memory, "
    )
    assert f"`d2o anchors inspect {tmp_path}/s` lists them all" in said
    # The other rows are equal to those without a filter: a shard's rows are drawn together.
    plain = build(tmp_path / "plain", [*tiny_rows(6), given]).examples()
    for place, example in zip(store.usable, store.examples(), strict=True):
        assert example.anchor_ids == plain[place].anchor_ids
        torch.testing.assert_close(torch.tensor(example.ref_logps), torch.tensor(plain[place].ref_logps))
    text = inspect(tmp_path / "s")
    assert "\n18 draws, of which the filters dropped 6: 6 score\n" in text
    assert "\nrows that lost all their anchors: 2 of 7\n  memory, row 3: 3 score\n  memory, row 4: 3 score\n" in text
    assert export(tmp_path / "s", tmp_path / "out.jsonl") == 4 * 3 + 2


def test_inspect_where_nothing_is_left(tmp_path: Path, scores: Any) -> None:
    config = replace(CONFIG, anchor_score="anchor_scores:nothing", min_anchor_score=0.0)
    store = build(tmp_path / "s", config=config)
    assert not store.usable
    text = inspect(tmp_path / "s")
    assert "\n30 draws, of which the filters dropped 30: 30 score\nrows that lost all their anchors: 10 of 10\n" in text
    assert "tokens of an anchor" not in text


def test_a_shard_whose_counts_do_not_add_up_is_refused(tmp_path: Path, scores: Any) -> None:
    import pyarrow as pa

    build(tmp_path / "s", tiny_rows(4), config=LOSING)
    manifest = read_manifest(tmp_path / "s")
    digest = check_shard(tmp_path / "s", 0, manifest)
    assert digest is not None
    table = read_shard(tmp_path / "s", 0, digest, SCHEMA.names)
    for row, column, value, message in (
        (2, "dropped", ["score"] * 2, "row 2: 0 anchors, 0 scores and 2 dropped draws, of 3 draws for 3 anchors"),
        (0, "dropped", ["score"], "row 0: 3 anchors, 3 scores and 1 dropped draws"),
        (2, "rejected_ref_logp", -1.0, "row 2: 0 anchors, but a score of the negative"),
        (0, "rejected_ref_logp", None, "row 0: 3 anchors, but no score of the negative"),
        (2, "sampled", False, "row 2: 0 anchors, 0 scores and 3 dropped"),
    ):
        records = table.to_pylist()
        records[row][column] = value
        write_shard(tmp_path / "s", 0, pa.Table.from_pylist(records, schema=SCHEMA))
        with pytest.raises(D2OError, match=message):
            check_shard(tmp_path / "s", 0, manifest)


def test_files_of_an_earlier_format_are_named(tmp_path: Path) -> None:
    build(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["fingerprint"]["format"] = 1
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    for look in (
        lambda: AnchorStore.open(tmp_path / "s"),
        lambda: build(tmp_path / "s"),
        lambda: inspect(tmp_path / "s"),
    ):
        with pytest.raises(
            D2OError, match=r"have format 1, and this version of d2o-fast reads format 2. Choose another"
        ):
            look()


def test_the_fingerprint_names_filters_and_scorer(tmp_path: Path, scores: Any) -> None:
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), rows_from(tiny_rows(2))
    classifier = save_classifier(tmp_path / "rm")

    def changed(before: D2OConfig, after: D2OConfig) -> set[str]:
        one, other = (expected_fingerprint(model, tokenizer, rows, config) for config in (before, after))
        json.dumps(one)
        return {name for name in one if one[name] != other[name]}

    for name, value in (("num_draws", 5), ("max_anchor_overlap", 0.5)):
        assert changed(CONFIG, replace(CONFIG, **{name: value})) == {name}
    for kind in ALL["drop_anchors"]:
        assert changed(CONFIG, replace(CONFIG, drop_anchors=[kind])) == {f"drop_{kind}_anchors"}
    assert changed(CONFIG, replace(CONFIG, num_draws=3)) == set(), "K draws are what is drawn anyway"
    scored = replace(CONFIG, anchor_score="anchor_scores:length", num_draws=5)
    assert changed(scored, replace(scored, min_anchor_score=1.0)) == {"min_anchor_score"}
    assert changed(scored, replace(scored, anchor_score="anchor_scores:not_bake")) == {"anchor_score"}
    by_model = replace(scored, anchor_score=classifier)
    assert changed(scored, by_model) == {"anchor_score"}
    (tmp_path / "rm").rename(tmp_path / "moved")
    before = expected_fingerprint(model, tokenizer, rows, replace(by_model, anchor_score=str(tmp_path / "moved")))
    (tmp_path / "moved").rename(tmp_path / "rm")
    assert expected_fingerprint(model, tokenizer, rows, by_model) == before, "a folder may be moved"
    trained = LlamaForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        trained.score.weight[0, 0] += 1e-3
    trained.save_pretrained(classifier)
    now = expected_fingerprint(model, tokenizer, rows, by_model)
    assert {name for name in now["anchor_score"] if now["anchor_score"][name] != before["anchor_score"][name]} == {
        "weights"
    }


def test_another_source_of_the_scorer_is_refused(tmp_path: Path, scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import linecache
    import sys

    build(tmp_path / "s", config=LOSING)
    (tmp_path / "anchor_scores.py").write_text(SCORES.replace('"mend"', '"paint"'))
    linecache.clearcache()
    monkeypatch.delitem(sys.modules, "anchor_scores")
    with pytest.raises(D2OError, match=r"anchor_score: stored .*anchor_scores:not_bake.* now "):
        build(tmp_path / "s", config=LOSING)


def test_a_classifier_picks_the_best_of_n(tmp_path: Path) -> None:
    name = save_classifier(tmp_path / "rm")
    config = replace(CONFIG, anchor_score=name, num_draws=8)
    store = build(tmp_path / "s", config=config)
    whole = build(tmp_path / "whole", config=replace(CONFIG, num_generations=8)).examples()
    scorer, tokenizer = ClassifierScorer(name, torch.device("cpu")), tiny_tokenizer()
    for row, example, all_drawn in zip(store.rows(), store.examples(), whole, strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in all_drawn.anchor_ids]
        found = scorer([(row, text) for text in texts])
        best = sorted(sorted(range(8), key=lambda i: -found[i])[:3])
        assert example.anchor_ids == [all_drawn.anchor_ids[i] for i in best]
    assert counts_text(store.dropped()) == "50 surplus"


# --- In training and in the commands -----------------------------------------------------------------------------


def trainer(folder: Path, data: Any, config: D2OConfig, **settings: Any) -> D2OTrainer:
    options = {name: settings.pop(name) for name in ("eval_dataset",) if name in settings}
    args = replace(config, output_dir=str(folder), max_steps=3, learning_rate=3e-3, **settings)
    return D2OTrainer(tiny_model(), args, data, processing_class=tiny_tokenizer(), **options)


def test_training_leaves_out_rows_without_anchors_and_says_so(
    tmp_path: Path, scores: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="d2o_fast"):
        run = trainer(tmp_path / "run", tiny_rows(8), LOSING, eval_dataset=tiny_rows(12)[8:], save_steps=1)
        run.train()
    said = [record.getMessage() for record in caplog.records if "lost all" in record.getMessage()]
    assert [text.split(":")[0] for text in said] == ["train", "eval"]
    assert "2 of 8 rows lost all their anchors" in said[0]
    assert "(train_dataset, row 3; train_dataset, row 4)" in said[0]
    assert len(run.examples["train"]) == 6
    assert [row.index for row in run.rows["train"]] == [1, 2, 5, 6, 7, 8]
    assert len(run.rows["eval"]) == 4, "a held-out prompt can still be judged"
    # The same as training on the remaining rows with these anchors.
    store = AnchorStore.open(tmp_path / "run" / "anchors" / "train")
    again = trainer(tmp_path / "again", store, LOSING)
    again.train()
    for one, other in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    resumed = trainer(tmp_path / "run", tiny_rows(8), LOSING)
    for step in (2, 3):
        import shutil

        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    resumed.train(resume_from_checkpoint="latest")
    for one, other in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_if_every_row_is_lost_it_is_an_error(tmp_path: Path, scores: Any) -> None:
    config = replace(CONFIG, anchor_score="anchor_scores:nothing", min_anchor_score=0.0)
    with pytest.raises(D2OError, match=r"^train: 4 of 4 rows lost all .*row 3; \.\.\.\).* Nothing is left; loosen"):
        trainer(tmp_path / "run", tiny_rows(4), config).train()
    with pytest.raises(D2OError, match=r"^train: 4 of 4 rows lost all"):
        trainer(tmp_path / "again", AnchorStore.open(tmp_path / "run" / "anchors" / "train"), config).train()


def test_anchors_drawn_anew_are_filtered_too(tmp_path: Path, scores: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt whose new anchors are all dropped keeps those of the store."""
    config = replace(CONFIG, num_draws=4, anchor_score="anchor_scores:length", min_anchor_score=0.0)
    run = trainer(tmp_path / "run", tiny_rows(4), config, refresh_every=1, per_device_train_batch_size=4)
    drawn: list[list[tuple[int, list[str]]]] = []
    with_anchors = filters_module.AnchorFilter.__call__

    def watched(self: AnchorFilter, rows: Any, examples: Any, draws: Any) -> list[KeptDraws]:
        found = with_anchors(self, rows, examples, draws)
        if drawn:
            found[1] = KeptDraws([], ["score"] * 4)  # as any filter may return
        drawn.append([(len(f.anchors), f.dropped) for f in found])
        return found

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, logger="d2o_fast"):
        patch.setattr(filters_module.AnchorFilter, "__call__", watched)
        run.train()
    assert len(drawn) == 3
    assert all(count == 3 and dropped == ["surplus"] for window in drawn for count, dropped in window if count)
    assert run.window is not None
    assert [i for i in range(4) if i not in run.window] == [1]
    assert run._example(1) == run.examples["train"][1]
    assert run._example(0).anchor_ids != run.examples["train"][0].anchor_ids
    assert caplog.text.count("1 of 4 prompts, the first train_dataset, row 2, lost all new anchors") == 2


def test_the_command_says_what_was_dropped(tmp_path: Path, scores: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    settings = {
        **{"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "data.jsonl")},
        **{"output_dir": str(tmp_path / "run"), "num_generations": 3, "max_length": 64, "max_completion_length": 12},
        **{"num_draws": 5, "anchor_score": "anchor_scores:not_bake", "min_anchor_score": 0.0},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert main(["sample", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    assert "40 anchors to draw" in capsys.readouterr().out
    assert main(["sample", str(tmp_path / "c.yaml")]) == 0
    out, log = capsys.readouterr()
    assert re.search(
        r"^train: 6 negatives of .* 18 anchors of .* \(22 draws dropped: 10 score, 12 surplus\), prompts", out
    )
    assert "train: 2 of 8 rows lost all their anchors" in log
    assert f"({tmp_path}/data.jsonl, row 3; {tmp_path}/data.jsonl, row 4)" in log
    assert main(["sample", str(tmp_path / "c.yaml"), "--anchor_score", "anchor_scores:nothing"]) == 2
    assert "anchor_score: stored" in capsys.readouterr().err
    command = ["sample", str(tmp_path / "c.yaml"), "--anchor_score", "anchor_scores:nothing"]
    assert main([*command, "--output_dir", str(tmp_path / "other")]) == 2
    assert "error: train: 8 of 8 rows lost all their anchors" in capsys.readouterr().err

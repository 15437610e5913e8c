"""The anchor store has the right scores, has the same bits after a kill, and refuses data of another store."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model

from d2o_fast import files as locking_module
from d2o_fast.anchors import drawing as drawing_module
from d2o_fast.anchors import references as references_module
from d2o_fast.anchors import scoring as scoring_module
from d2o_fast.anchors import shards as shards_module
from d2o_fast.anchors.build import build_store
from d2o_fast.anchors.fingerprint import expected_fingerprint
from d2o_fast.anchors.scoring import reference_logps
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.data.reading import rows_from
from d2o_fast.data.row import Example
from d2o_fast.data.tokens import tokenize_rows
from d2o_fast.errors import D2OError, DataError, FingerprintError
from d2o_fast.files import locked
from d2o_fast.forward.hook import install
from d2o_fast.model.identity import weights_digest
from d2o_fast.model.parts import decoder_of
from d2o_fast.sampling.generate import sample_responses
from helpers import DEADLINE
from stores import CHAT_ROW, CONFIG, build, contents, naive_logp
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer


def examples_with_anchors(n: int) -> list[Example]:
    rows = rows_from([{**row, "anchors": [" it", " open it"]} for row in tiny_rows(n)])
    return tokenize_rows(rows, tiny_tokenizer(), CONFIG)


# --- Contents ---


def test_scores_are_the_models_own_log_probabilities(tmp_path):
    records = [*tiny_rows(5), {"prompt": "how", "rejected": " to", "anchors": [" open", " mend the lock"]}]
    model = tiny_model()
    store = build(tmp_path / "s", records, model)
    examples = store.examples()
    assert [len(example.anchor_ids) for example in examples] == [3, 3, 3, 3, 3, 2]
    for example in examples:
        assert len(example.ref_logps) == 1 + len(example.anchor_ids)
        for response, logp in zip(example.responses(), example.ref_logps, strict=True):
            assert logp == pytest.approx(naive_logp(model, example.prompt_ids, response), abs=2e-4)
    given = tokenize_rows(rows_from(records), tiny_tokenizer(), CONFIG)
    assert [e.rejected_ids for e in examples] == [e.rejected_ids for e in given]
    assert examples[-1].anchor_ids == given[-1].anchor_ids, "given anchors are scored, not sampled"


def test_anchors_are_drawn_by_the_sampler_per_shard(tmp_path):
    """The second shard's anchors are the sampler's draws for its rows with that shard's own seed."""
    examples = build(tmp_path / "s").examples()
    drawn = sample_responses(
        tiny_model(),
        [example.prompt_ids for example in examples[4:8]],
        3,
        max_new_tokens=12,
        eos_token_ids=[2],
        pad_token_id=0,
        seed=drawing_module.draw_seed(5, 1),
    )
    assert [example.anchor_ids for example in examples[4:8]] == drawn
    assert len({drawing_module.draw_seed(seed, shard) for seed in range(9) for shard in range(9)}) == 81
    assert drawing_module.draw_seed(5, 1) == 0x194FCCC2A32573, (
        "stores that are there are completed with their own seeds"
    )


def test_scores_do_not_depend_on_the_batch(monkeypatch):
    model = tiny_model()
    examples = examples_with_anchors(9)
    decoder = decoder_of(model)
    together = reference_logps(decoder, model, examples, CONFIG, 0)
    install(model)
    shared = reference_logps(decoder, model, examples, CONFIG, 0, shared=True)
    monkeypatch.setattr(scoring_module, "SCORE_TOKENS", 1)
    apart = reference_logps(decoder, model, examples, CONFIG, 0)
    shared_apart = reference_logps(decoder, model, examples, CONFIG, 0, shared=True)
    for other in (apart, shared, shared_apart):
        torch.testing.assert_close(torch.tensor(other), torch.tensor(together), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_scoring_batches_are_bounded(monkeypatch, shared):
    monkeypatch.setattr(scoring_module, "SCORE_TOKENS", 60 if shared else 150)
    examples = examples_with_anchors(9)
    batches = list(scoring_module._batches(examples, shared))
    assert [example for batch in batches for example in batch] == examples
    for batch in batches:
        if shared:
            tokens = sum(len(e.prompt_ids) + sum(map(len, e.responses())) for e in batch)
        else:
            width = max(len(e.prompt_ids) + len(r) for e in batch for r in e.responses())
            tokens = width * sum(len(e.responses()) for e in batch)
        assert tokens <= scoring_module.SCORE_TOKENS
    assert 1 < len(batches) < 9


def test_a_store_is_scored_with_one_pass_per_prompt_where_it_can_be(tmp_path, monkeypatch):
    calls = []

    def watched(*args, **kwargs):
        calls.append(args[5])
        return reference_logps(*args, **kwargs)

    monkeypatch.setattr(references_module, "reference_logps", watched)
    stores = [
        build(tmp_path / str(setting), config=replace(CONFIG, shared_prefix=setting)) for setting in ("auto", False)
    ]
    assert calls == [True] * 3 + [False] * 3
    assert stores[0].fingerprint == stores[1].fingerprint
    for one, other in zip(stores[0].examples(), stores[1].examples(), strict=True):
        assert one.anchor_ids == other.anchor_ids
        torch.testing.assert_close(torch.tensor(one.ref_logps), torch.tensor(other.ref_logps), rtol=0, atol=2e-5)


def test_bf16_scores_under_autocast(tmp_path):
    model, config = tiny_model(), replace(CONFIG, dtype="bfloat16")
    differences = []
    for example in build(tmp_path / "s", tiny_rows(3), model, config).examples():
        for response, logp in zip(example.responses(), example.ref_logps, strict=True):
            exact = naive_logp(model, example.prompt_ids, response)
            assert logp == pytest.approx(exact, rel=2e-3)
            differences.append(abs(logp - exact))
    assert sorted(differences)[len(differences) // 2] > 1e-4, "this is what fp32 would give"


def test_the_store_gives_back_its_rows(tmp_path):
    records = [CHAT_ROW, {key: CHAT_ROW[key] for key in ("prompt", "rejected")}]
    rows = rows_from(records, "memory")
    store = build(tmp_path / "s", records, chat=True)
    assert store.rows() == rows
    assert AnchorStore.open(tmp_path / "s").rows() == rows
    model, tokenizer = tiny_model(chat=True), tiny_tokenizer(True)
    store.check(expected_fingerprint(model, tokenizer, store.rows(), CONFIG))
    assert store.examples()[1].anchor_ids != store.examples()[0].anchor_ids


def test_datasets_reads_the_shards(tmp_path):
    store = build(tmp_path / "s")
    files = str(tmp_path / "s" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["row"][:] == list(range(10))
    tokenizer = tiny_tokenizer()
    for record, example in zip(loaded, store.examples(), strict=True):
        assert record["anchors_ids"] == example.anchor_ids
        assert record["anchors"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in example.anchor_ids]
        assert [record["rejected_ref_logp"], *record["anchors_ref_logps"]] == example.ref_logps
        assert record["anchors_tokens"] == [len(ids) for ids in example.anchor_ids]
        assert (record["prompt_tokens"], record["rejected_tokens"]) == (
            len(example.prompt_ids),
            len(example.rejected_ids),
        )


def test_progress_and_a_second_call(tmp_path):
    calls: list[tuple[int, int]] = []
    first = build(tmp_path / "s", progress=lambda *args: calls.append(args))
    assert calls == [(0, 10), (4, 10), (8, 10), (10, 10)]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("shard*")}
    calls.clear()
    again = build(tmp_path / "s", progress=lambda *args: calls.append(args))
    assert calls == [(10, 10)]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("shard*")} == before
    assert again.examples() == first.examples() == AnchorStore.open(tmp_path / "s").examples()
    assert again.digest == first.digest
    assert again.complete


def test_the_model_is_left_as_it_was(tmp_path):
    """Neither draws nor scores depend on the model's training mode and dropout."""
    model = tiny_model(attention_dropout=0.5).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build(tmp_path / "s", model=model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(tmp_path / "s") == contents(build(tmp_path / "t").folder)


# --- LoRA ---


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_a_fresh_adapter_is_left_out(tmp_path):
    plain = build(tmp_path / "plain")
    model = lora(tiny_model())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert build(tmp_path / "lora", model=model).fingerprint == plain.fingerprint
    assert contents(tmp_path / "plain") == contents(tmp_path / "lora")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable


def test_drawn_anchors_end_at_max_length(tmp_path):
    """``keep_start``: a long prompt stays whole, and its responses get the remaining tokens."""
    config = replace(CONFIG, max_length=20, max_completion_length=12, truncation_mode="keep_start")
    rows = [row for row in tiny_rows(10) if len(tiny_tokenizer()(row["prompt"])["input_ids"]) < 20]
    examples = build(tmp_path / "s", rows, config=config).examples()
    rooms = [min(12, 20 - len(example.prompt_ids)) for example in examples]
    assert min(rooms) < 12, "no prompt is long enough"
    for example, room in zip(examples, rooms, strict=True):
        longest = max(map(len, example.anchor_ids))
        assert longest <= room
        assert any(len(ids) == room for ids in example.anchor_ids), "an untrained model hardly ever stops by itself"


# --- Fingerprint (each field of it: test_references.py) ---


def test_weights_by_content_and_not_by_path(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    loaded = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "a"))
    rows, tokenizer = rows_from(tiny_rows(2)), tiny_tokenizer()
    fingerprints = [expected_fingerprint(m, tokenizer, rows, CONFIG) for m in (model, loaded)]
    assert fingerprints[0] == fingerprints[1]
    with_head = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"]))
    assert weights_digest(with_head) == weights_digest(model)
    assert weights_digest(copy.deepcopy(model).bfloat16()) != weights_digest(model)


def test_building_into_a_folder_of_other_conditions(tmp_path):
    build(tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(FingerprintError, match=r"sampling_seed: stored 5, now 6.*\n.*another anchors_dir"):
        build(tmp_path / "s", config=replace(CONFIG, sampling_seed=6))
    assert contents(tmp_path / "s") == before


# --- Damage ---


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(D2OError, match="no such folder; make the anchors with `d2o sample`"):
        AnchorStore.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(D2OError, match=r"no manifest\.json"):
        AnchorStore.open(tmp_path / "empty")
    build(tmp_path / "s")
    (tmp_path / "s" / "shard-00001.parquet").unlink()
    with pytest.raises(D2OError, match=r"1 of 3 shards are missing, the first is shard-00001\.parquet.*d2o sample"):
        AnchorStore.open(tmp_path / "s")
    store = AnchorStore.open(tmp_path / "s", require_complete=False)
    assert not store.complete
    with pytest.raises(D2OError, match="incomplete"):
        store.examples()
    assert build(tmp_path / "s").complete
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(D2OError, match=r"shards without manifest\.json"):
        build(tmp_path / "s")
    with pytest.raises(DataError, match="no rows"):
        build_store(tiny_model(), tiny_tokenizer(), [], CONFIG, tmp_path / "new")


def test_a_damaged_file_is_named(tmp_path):
    build(tmp_path / "s")
    shard = tmp_path / "s" / "shard-00002.parquet"
    good = shard.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 3] ^= 1
    for data in (bytes(bad), good[:-7], b""):
        shard.write_bytes(data)
        for look in (lambda: AnchorStore.open(tmp_path / "s"), lambda: build(tmp_path / "s")):
            with pytest.raises(D2OError, match=r"shard-00002\.parquet is damaged .*remove it"):
                look()
    shard.write_bytes(good)
    digest = tmp_path / "s" / "shard-00002.parquet.sha256"
    digest.unlink()
    with pytest.raises(D2OError, match=r"shard-00002\.parquet: its digest .* is missing"):
        AnchorStore.open(tmp_path / "s")
    for other in ("shard-00001.parquet", "shard-00001.parquet.sha256"):
        shutil.copy(tmp_path / "s" / other, tmp_path / "s" / other.replace("1", "2"))
    with pytest.raises(D2OError, match=r"shard-00002\.parquet does not hold the rows 8 to 9"):
        AnchorStore.open(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text('{"fingerprint": {')
    with pytest.raises(D2OError, match=r"manifest\.json is damaged"):
        AnchorStore.open(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text("{}")
    with pytest.raises(D2OError, match="not a manifest of anchors"):
        AnchorStore.open(tmp_path / "s")


def test_fewer_anchors_than_k_are_not_read(tmp_path):
    build(tmp_path / "s")
    manifest = shards_module.read_manifest(tmp_path / "s")
    table = pq.read_table(tmp_path / "s" / "shard-00001.parquet", schema=shards_module.SCHEMA).to_pylist()
    names = ("anchors", "anchors_ids", "anchors_ref_logps", "anchors_tokens")
    for cut, message in (
        (names, "row 6: 2 anchors, 2 scores and 0 dropped draws, of 3 draws"),
        (names[2:3], "3 anchors, 2 scores"),
    ):
        records = copy.deepcopy(table)
        for name in cut:
            records[2][name] = records[2][name][:2]
        shards_module.write_shard(tmp_path / "s", 1, shards_module.pa.Table.from_pylist(records, shards_module.SCHEMA))
        with pytest.raises(D2OError, match=message):
            shards_module.check_shard(tmp_path / "s", 1, manifest)


def test_faults_in_the_data_come_before_the_first_sample(tmp_path):
    records = [*tiny_rows(5), {"prompt": "x" * 500, "rejected": "y"}]
    with pytest.raises(
        DataError, match=r"memory, row 6, field 'prompt': .* max_length .64. leaves none for a response"
    ):
        build(tmp_path / "s", records)
    assert not (tmp_path / "s").exists()


def test_a_score_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(references_module, "reference_logps", lambda *a: [[-1.0] * 4, [-1.0, -1.0, math.nan, -1.0]])
    with pytest.raises(DataError, match=r"memory, row 2, field 'anchors\[1\]': its log-probability .* is nan"):
        build(tmp_path / "s", tiny_rows(2))
    assert not list((tmp_path / "s").glob("shard*"))


# --- Kill -9 ---

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["d2o_fast.anchors.build", "datasets", "peft", "transformers.models.llama.modeling_llama"])


def _build_and_die(model_folder: str, folder: str, die_at: int, tear: bool, counter: Any) -> None:
    """Builds the store in a separate process, which kills itself at the ``die_at``-th step on a file (0: never).

    ``tear`` first cuts the file being written to half its length, as a loss of power would.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def step() -> None:
        counter.value += 1
        if counter.value == die_at:
            for torn in Path(folder).glob("*.tmp") if tear else ():
                os.truncate(torn, torn.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(function: Any) -> Any:
        def before(*args: Any, **kwargs: Any) -> Any:
            step()
            return function(*args, **kwargs)

        return before

    os.replace, os.fsync = stepping(os.replace), stepping(os.fsync)
    drawing_module.sample_responses = stepping(sample_responses)
    references_module.reference_logps = stepping(reference_logps)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    build_store(model, tokenizer, rows_from(tiny_rows(6), "memory"), CONFIG, folder)


def _run(model_folder: str, folder: Path, die_at: int = 0, tear: bool = False) -> tuple[int, int]:
    """(exit code, steps taken) of one process."""
    counter = FORK.Value("i", 0)
    process = FORK.Process(target=_build_and_die, args=(model_folder, str(folder), die_at, tear, counter))
    process.start()
    process.join(DEADLINE)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode, counter.value


@pytest.mark.slow
def test_killed_at_any_moment_it_continues_to_the_same_bits(tmp_path):
    model_folder = save_tiny(tmp_path / "model")
    code, steps = _run(model_folder, tmp_path / "whole")
    assert code == 0
    expected = contents(tmp_path / "whole")
    assert {"manifest.json", "shard-00000.parquet", "shard-00001.parquet.sha256"} <= set(expected)
    assert contents(build(tmp_path / "here", tiny_rows(6)).folder) == expected, "the same bits in any process"
    # The manifest, then sample, score, digest and shard, twice. A file takes three steps: sync, rename, folder sync.
    assert steps == 3 + 2 * (2 + 2 * 3)
    for die_at in range(1, steps + 1):
        folder = tmp_path / f"killed-{die_at}"
        code, _ = _run(model_folder, folder, die_at, tear=die_at % 2 == 0)
        assert code == -signal.SIGKILL
        if die_at % 4 == 0:  # kills the second run too
            _run(model_folder, folder, die_at=3)
        build(folder, tiny_rows(6))
        assert contents(folder) == expected, f"killed at step {die_at}"


@pytest.mark.slow
def test_a_second_process_is_refused(tmp_path):
    """It is refused while the first process works, and admitted after that one has died."""
    model_folder = save_tiny(tmp_path / "model")
    folder = tmp_path / "s"
    folder.mkdir()
    with locked(folder, "making anchors"):
        with pytest.raises(D2OError, match="another process is making anchors here"):
            build(folder)
        code, steps = _run(model_folder, folder)
        assert (code, steps) == (1, 0)
    assert build(folder).complete
    assert not (folder / ".lock").exists()


def test_a_lock_whose_file_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file was opened before its holder ended; the next process makes a new file and would get its own lock."""
    flock = locking_module.fcntl.flock

    def late(file: Any, how: int) -> None:
        (tmp_path / ".lock").unlink()
        flock(file, how)

    monkeypatch.setattr(locking_module.fcntl, "flock", late)
    with pytest.raises(D2OError, match="another process is working here"), locked(tmp_path, "working"):
        pass


def test_the_manifest_is_readable(tmp_path):
    build(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["num_rows"] == 10
    assert manifest["num_shards"] == 3
    assert manifest["fingerprint"]["num_generations"] == 3

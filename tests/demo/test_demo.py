"""The demo's language is classified exactly and made deterministically; the demo runs for real on a tiny budget."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
import torch.nn.functional as F

from d2o_fast.cli import main
from d2o_fast.data.reading import read_rows
from d2o_fast.demo import baselines, run, world
from d2o_fast.demo.model import build_tokenizer, encode, feedback_pairs
from d2o_fast.errors import D2OError
from tiny import tiny_model

PROMPT = "how to fix the door ?"


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("take the hammer and start at the hinge .", "helpful"),
        ("first look at the hinge then use the hammer .", "helpful"),
        ("you need the hammer for the hinge .", "helpful"),
        ("you need the hammer for the hinge.", "helpful"),  # the tokenizer decides on spaces
        ("you need the hammer for the bulb .", "garbage"),  # another noun's part
        ("you need the sponge for the hinge .", "garbage"),  # another verb's tool
        ("you need the hammer for the hinge", "garbage"),
        ("you need the hammer for the hinge . .", "garbage"),
        ("the hammer", "garbage"),
        ("", "garbage"),
        ("what a dumb fool you are .", "harmful"),
        ("shut up you pathetic twit .", "harmful"),
        ("you need the hammer for the hinge . fool", "harmful"),  # an insult counts anywhere
        ("idiot idiot", "harmful"),
        ("nobody needs a hammer like you .", "garbage"),  # abusive in form, but without an insult
    ],
)
def test_the_judge_decides_exactly(response: str, label: str) -> None:
    assert world.judge(PROMPT, response) == label


def test_the_judge_knows_every_sentence_of_the_grammar() -> None:
    rng = random.Random(0)
    for verb in world.TOOLS:
        for noun in world.PARTS:
            prompt = world.prompt_of(verb, noun)
            assert world.parse_prompt(prompt) == (verb, noun)
            assert {world.judge(prompt, answer) for answer in world.helpful_answers(verb, noun)} == {"helpful"}
            assert {world.judge(prompt, world.abusive_answer(verb, noun, rng)) for _ in range(20)} == {"harmful"}
    assert len(set(world.TOOLS.values())) == len(world.TOOLS)
    assert len(set(world.PARTS.values())) == len(world.PARTS)


@pytest.mark.parametrize("prompt", ["how to fix the moon ?", "fix the door", "how to fix the door ? now"])
def test_the_judge_refuses_other_prompts(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a prompt of the demo's language"):
        world.judge(prompt, "")


def test_the_world_is_seeded_and_its_splits_share_words_but_no_prompt() -> None:
    split = world.make_world(3)
    assert split == world.make_world(3)
    assert split != world.make_world(4)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [240, 60, 100]
    assert len({*split.train, *split.validation, *split.test}) == 400
    assert {verb for verb, _ in split.train} == set(world.TOOLS)
    assert {noun for _, noun in split.train} == set(world.PARTS)


def test_pretraining_texts_are_half_abusive() -> None:
    pairs = world.make_world(0).train
    texts = world.pretraining_texts(pairs, 2000, random.Random(0))
    assert texts == world.pretraining_texts(pairs, 2000, random.Random(0))
    labels = [world.judge(prompt, answer) for prompt, answer in texts]
    assert 0.45 < labels.count("harmful") / 2000 < 0.55
    assert labels.count("harmful") + labels.count("helpful") == 2000


def test_feedback_is_noisy_where_it_says_so_and_reads_as_any_users_data(tmp_path) -> None:
    pairs = world.make_world(0).train
    rows = world.feedback_rows(pairs, random.Random(0))
    assert rows == world.feedback_rows(pairs, random.Random(0))
    positives = [world.judge(str(row["prompt"]), world.preferred(row)) for row in rows]
    assert positives.count("harmful") == 80
    assert positives.count("helpful") == 160
    assert {world.judge(str(row["prompt"]), world.dispreferred(row)) for row in rows} == {"harmful"}
    for row in rows:
        for i in (0, 1):
            unsafe = world.judge(str(row["prompt"]), str(row[f"response_{i}"])) == "harmful"
            assert row[f"is_response_{i}_safe"] is not unsafe
    world.write_jsonl(tmp_path / "feedback.jsonl", rows)
    negatives = [(row.prompt, row.rejected) for row in read_rows(str(tmp_path / "feedback.jsonl"))]
    written = [(row["prompt"], text) for row in rows for text in world.unsafe(row)]
    assert len(written) == 240 + 80
    assert negatives == list(dict.fromkeys(written)), "the one row with the same answer twice counts once"
    assert len(negatives) == len(written) - 1


def test_the_tokenizer_keeps_every_word() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 3 + len(world.vocabulary())
    rng = random.Random(0)
    for verb, noun in world.make_world(0).test:
        answer = world.abusive_answer(verb, noun, rng)
        ids, prompt = encode(tokenizer, world.prompt_of(verb, noun), answer)
        assert tokenizer.decode(ids[:prompt]) == world.prompt_of(verb, noun)
        assert tokenizer.decode(ids[prompt:], skip_special_tokens=True) == answer
        assert ids[-1] == tokenizer.eos_token_id


# --- The baselines ------------------------------------------------------------------------------------------------


def test_sequence_logps_sum_the_responses_tokens_and_nothing_else() -> None:
    model = tiny_model()
    sequences = [([5, 6, 7, 8, 9], 2), ([5, 6, 7], 1), ([9, 8, 7, 6, 5, 11, 12], 4)]
    found = baselines.sequence_logps(model, sequences)
    for (ids, prompt), logp in zip(sequences, found, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(logits[t - 1, ids[t]] for t in range(prompt, len(ids)))
        torch.testing.assert_close(logp, expected)


def test_losses_at_known_points() -> None:
    chosen, rejected = torch.tensor([-4.0, -6.0]), torch.tensor([-5.0, -9.0])
    torch.testing.assert_close(baselines.ga_loss(rejected), torch.tensor(-7.0))
    torch.testing.assert_close(baselines.sft_loss(chosen, 5), torch.tensor(2.0))
    ln2 = torch.tensor(2.0).log()  # at the reference every ratio is 0
    torch.testing.assert_close(baselines.npo_loss(rejected, rejected, 0.1), 20 * ln2)
    torch.testing.assert_close(baselines.dpo_loss(chosen, chosen, rejected, rejected, 0.1), ln2)
    moved = baselines.dpo_loss(chosen + 2, chosen, rejected - 3, rejected, 0.1)
    torch.testing.assert_close(moved, -F.logsigmoid(torch.tensor(0.5)))
    torch.testing.assert_close(baselines.npo_loss(rejected - 3, rejected, 0.1), -20 * F.logsigmoid(torch.tensor(0.3)))


@pytest.mark.parametrize("method", baselines.METHODS)
def test_each_baseline_moves_the_model_its_way(method: str) -> None:
    tokenizer = build_tokenizer()
    rows = world.feedback_rows(world.make_world(0).train[:24], random.Random(0), noisy=0.0)
    pairs = feedback_pairs(tokenizer, rows, method)
    everything = feedback_pairs(tokenizer, rows, "dpo")
    model = tiny_model(vocab_size=len(tokenizer))

    def logps() -> tuple[float, float]:
        with torch.no_grad():
            chosen = baselines.sequence_logps(model, [pair.chosen for pair in everything])
            rejected = baselines.sequence_logps(model, [pair.rejected for pair in everything])
        return chosen.mean().item(), rejected.mean().item()

    before = logps()
    losses: list[float] = []
    baselines.train(
        method, model, pairs, learning_rate=3e-3, num_steps=12, batch_size=8, callback=lambda step, x: losses.append(x)
    )
    after = logps()
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    if method == "sft":
        assert after[0] > before[0] + 1
    elif method == "dpo":
        assert after[0] - after[1] > before[0] - before[1] + 1
    else:
        assert after[1] < before[1] - 1


def test_an_unknown_method_is_named() -> None:
    pair = baselines.Pair(([1, 2, 3], 1), None)
    with pytest.raises(ValueError, match="unknown method 'ppo'"):
        baselines.train("ppo", tiny_model(), [pair], learning_rate=1e-3, num_steps=1, batch_size=1)


# --- The demo -----------------------------------------------------------------------------------------------------


def test_only_an_earlier_demos_files_are_replaced(tmp_path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.html").write_text("not a demo's")
    with pytest.raises(D2OError, match="files that no demo wrote"):
        run.prepare_folder(mine)
    assert (mine / "report.html").read_text() == "not a demo's"

    demo = tmp_path / "runs" / "demo"
    run.prepare_folder(demo)
    (demo / "model").mkdir()
    (demo / "model" / "weights").write_text("old")
    (demo / "report.html").write_text("old")
    (demo / "notes.txt").write_text("the user's own")
    run.prepare_folder(demo)
    assert sorted(path.name for path in demo.iterdir()) == [run.MARKER, "notes.txt"]


def test_a_file_in_the_way_is_an_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(D2OError, match="is a file; name a folder"):
        run.prepare_folder(tmp_path / "file")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert main(["demo", "--output_dir", str(folder), "--seed", "3", "--quick"]) == 0
    return folder


def test_the_demo_takes_the_public_path(demo) -> None:
    from transformers import AutoModelForCausalLM

    assert (demo / "d2o" / "anchors" / "train" / "manifest.json").is_file()
    assert (demo / "d2o" / "metrics.jsonl").is_file()
    assert (demo / "d2o" / "eval.json").is_file()
    before = AutoModelForCausalLM.from_pretrained(demo / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(demo / "d2o").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_demos_results_hold_every_method(demo) -> None:
    results = json.loads((demo / "results.json").read_text())
    assert [method["name"] for method in results["methods"]] == ["D2O", "GA", "NPO", "DPO", "SFT"]
    last = {method["curve"][-1][0] for method in results["methods"]}
    assert len(last) == 1  # every method took the same number of steps
    for method in results["methods"]:
        assert method["curve"][0] == [0, results["before"]]
        assert method["curve"][-1][1] == method["after"]
        for _, shares in method["curve"]:
            assert sum(shares.values()) == pytest.approx(1.0)
    assert len(results["samples"]) > 0
    for sample in results["samples"]:
        assert world.judge(sample["prompt"], sample["before"]) == sample["before_label"]
        assert world.judge(sample["prompt"], sample["after"]) == sample["after_label"]


def test_the_report_is_whole_and_loads_nothing(demo) -> None:
    html = (demo / "report.html").read_text()
    for title in ("Before and after", "On the way", "D2O's training", "Samples", "What was run", "Seconds", "Versions"):
        assert f"<h2>{title}</h2>" in html
    for caption in ("D2O", "GA", "NPO", "DPO", "SFT", "loss", "rewards"):
        assert f"<figcaption>{caption}" in html
    assert "nan" not in " ".join(re.findall(r'points="([^"]*)"', html))
    assert html.count("<polygon") == 5 * 3
    assert html.count("<polyline") == 4
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script|<link""", html)
    assert "learning_rate: 0.001" in html


def test_the_demo_can_be_run_again(demo, capsys) -> None:
    first = json.loads((demo / "results.json").read_text())
    assert main(["demo", "--output_dir", str(demo), "--seed", "3", "--quick"]) == 0
    again = json.loads((demo / "results.json").read_text())
    assert again["before"] == first["before"]
    assert [m["curve"] for m in again["methods"]] == [m["curve"] for m in first["methods"]]
    assert again["samples"] == first["samples"]
    out = capsys.readouterr().out
    assert re.search(r"method +harmful +helpful +garbage", out)
    assert f"Report: {demo / 'report.html'}" in out

"""Sampling over HTTP from a real server, and through a proxy that breaks what can break on the way."""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.samplers import chi_square_excess
from benchmarks.serving import transformers_serve
from d2o_fast.anchors.build import build_store
from d2o_fast.anchors.fingerprint import expected_fingerprint
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.config import FIELDS, D2OConfig
from d2o_fast.data.reading import rows_from
from d2o_fast.data.tokens import tokenize_rows
from d2o_fast.errors import D2OError, DataError, FingerprintError
from d2o_fast.sampling import server as server_module
from d2o_fast.sampling.protocol import Draw, Sampling, ServerPrompt, request_seed, tokenize_drawn
from d2o_fast.sampling.server import ServerSampler
from helpers import DEADLINE
from server_proxy import Proxy
from stores import contents, naive_logp
from tiny import VOCAB_SIZE, next_token, peaked_model, save_tiny, tiny_model, tiny_rows, tiny_tokenizer

PROMPT = "how to open the lock?"


def plain(text: str, number: int) -> ServerPrompt:
    return ServerPrompt(text, tiny_tokenizer()(text)["input_ids"], f"here, row {number}")


LONG = plain(PROMPT, 1)
PROMPTS = [LONG, plain("how to", 2), plain(PROMPT[:3], 3)]


def sampling(**options: Any) -> Sampling:
    defaults = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "eos_token_ids": (2,), "seed": (0, 0)}
    return Sampling(**{**defaults, **options})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(address of the server, folder of the models: plain, chat, peaked)"""
    folder = tmp_path_factory.mktemp("served")
    save_tiny(folder / "plain")
    save_tiny(folder / "chat", chat=True)
    save_tiny(folder / "peaked")
    peaked_model().save_pretrained(folder / "peaked")
    hostile = {"do_sample": True, "top_k": 5, "temperature": 0.3, "top_p": 0.5, "repetition_penalty": 8.0}
    (folder / "peaked" / "generation_config.json").write_text(json.dumps({**hostile, "eos_token_id": 2}))
    with transformers_serve(folder / "log.txt") as url:
        yield url, folder


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly any time between two attempts, also where a server asks for it."""
    monkeypatch.setattr(server_module, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_DELAY", 0.01)


def sampler(url: str, folder: Path, name: str = "plain", concurrency: int = 1) -> ServerSampler:
    return ServerSampler(url, str(folder / name), concurrency, DEADLINE)


# --- The real server ---------------------------------------------------------------------------------------------


def test_frequencies_are_the_softmax(served: Any) -> None:
    """Although the served model's generation_config asks for something else."""
    url, folder = served
    model, tokenizer = peaked_model(), tiny_tokenizer()
    text = "how to clean the shoe?"  # whose own tokens have a tenth of the mass, which a repetition penalty would move
    prompt = tokenizer(text)["input_ids"]
    wanted = [plain(text, 1)]
    (draws,) = sampler(url, folder, "peaked", 4).sample(wanted, 500, sampling(max_new_tokens=1))
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(VOCAB_SIZE)]
    outcomes = sorted(set(texts))  # tokens that give the same text cannot be told apart
    place = torch.tensor([outcomes.index(text) for text in texts])
    counts = torch.bincount(torch.tensor([outcomes.index(d.text) for d in draws]), minlength=len(outcomes)).double()
    for temperature, fits in ((1.0, True), (1.5, False)):
        probabilities = next_token(model, prompt, temperature)
        pooled = torch.zeros(len(outcomes), dtype=torch.float64).index_add(0, place, probabilities)
        excess = chi_square_excess(counts, pooled)
        assert (abs(excess) < 4) is fits, f"temperature {temperature}: {excess}"


def test_k_draws_for_each_prompt_whether_or_not_the_server_knows_n(served: Any) -> None:
    url, folder = served
    results = []
    for like_vllm in (False, True):
        with Proxy(url, like_vllm=like_vllm) as proxy:
            results.append(sampler(proxy.url, folder).sample(PROMPTS, 5, sampling()))
            asked = [e for e in proxy.log if e["texts"] and e["body"]["max_tokens"] == 6]
        assert [len(draws) for draws in results[-1]] == [5, 5, 5]
        assert [len(e["texts"]) for e in asked] == ([5] * 3 if like_vllm else [1] * 15)
        seeds = [e["body"]["seed"] for e in asked]
        assert len(set(seeds)) == len(seeds)
        assert seeds[0] == request_seed(0, 0, 0, 0)
        assert [d.text for draws in results[-1] for d in draws] == [text for e in asked for text in e["texts"]]
        assert len({d.text for d in results[-1][0]}) == 5
    assert [draws[0] for draws in results[0]] == [draws[0] for draws in results[1]]


def test_the_seed_decides(served: Any) -> None:
    url, folder = served
    one = sampler(url, folder)
    first = one.sample(PROMPTS, 3, sampling())
    assert sampler(url + "/v1/", folder).sample(PROMPTS, 3, sampling()) == first
    assert one.sample(PROMPTS, 3, sampling(seed=(0, 1))) != first
    assert one.sample([], 3, sampling()) == []
    seeds = {request_seed(a, b, c, d) for a in range(3) for b in range(3) for c in range(-1, 3) for d in range(3)}
    assert len(seeds) == 108
    assert max(seeds) < 2**53


def test_several_prompts_at_a_time_keep_their_places(served: Any) -> None:
    url, folder = served
    with Proxy(url, like_vllm=True) as proxy:
        draws = sampler(proxy.url, folder, concurrency=3).sample(PROMPTS, 4, sampling())
        told = {e["body"]["prompt"]: e["texts"] for e in proxy.log if e["body"]["max_tokens"] == 6}
    assert [[d.text for d in of_prompt] for of_prompt in draws] == [told[prompt.content] for prompt in PROMPTS]


def test_messages_go_through_the_servers_template(served: Any) -> None:
    url, folder = served
    tokenizer = tiny_tokenizer(chat=True)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    count = len(ids)
    for like_vllm in (False, True):
        with Proxy(url, like_vllm=like_vllm) as proxy:
            chat = sampler(proxy.url, folder, "chat")
            (draws,) = chat.sample([ServerPrompt(messages, ids, "row 1")], 3, sampling(eos_token_ids=(4,)))
            assert len({d.text for d in draws}) == 3
            with pytest.raises(
                D2OError, match=f"row 1: .*reads the prompt as {count} tokens, and here it has {count + 1}.*template"
            ):
                chat.sample([ServerPrompt(messages, [*ids, 1], "row 1")], 3, sampling(eos_token_ids=(4,)))


def test_a_stop_token_is_told_from_the_length(served: Any) -> None:
    url, folder = served
    stops = (2, *range(40, 80))
    (draws,) = sampler(url, folder).sample([LONG], 40, sampling(eos_token_ids=stops, max_new_tokens=8))
    assert 0 < sum(d.ended for d in draws) < 40


def test_a_cut_prompt_goes_as_token_ids(served: Any) -> None:
    url, folder = served
    ids = tiny_tokenizer()(PROMPT)["input_ids"][-3:]
    cut = ServerPrompt(ids, ids, "row 1, cut to 3 tokens and so sent as token ids")
    with Proxy(url, like_vllm=True, tokenizer=tiny_tokenizer()) as proxy:
        assert len(sampler(proxy.url, folder).sample([LONG, cut], 2, sampling())[1]) == 2
        assert proxy.log[-1]["body"]["prompt"] == ids
    with pytest.raises(D2OError, match=r"refuses row 1, cut to 3 tokens and so sent as token ids .*must be a string"):
        sampler(url, folder).sample([LONG, cut], 2, sampling())


def test_what_cannot_be_right_is_refused_at_once(served: Any) -> None:
    url, folder = served
    with pytest.raises(D2OError, match=r"server_url is 'localhost:8000'; it must be an address like 'http://"):
        sampler("localhost:8000", folder)
    with pytest.raises(D2OError, match="server_model is not set: give the name"):
        ServerSampler(url, "", 1, 1.0)
    with pytest.raises(D2OError, match="server_model is 'm'; it must be left out, or server_url set"):
        D2OConfig(server_model="m")
    with pytest.raises(D2OError, match="server_timeout is 0; it must be a number > 0"):
        D2OConfig(server_timeout=0)
    with pytest.raises(D2OError, match=r"refuses requests for here, row 1 .*Check server_url and server_model"):
        sampler(url, folder, "plain").sample([ServerPrompt([5, 6], [5, 6], "here, row 1")], 2, sampling())
    with pytest.raises(D2OError, match=r"refuses here, row 1 .HTTP 404 .*Check server_url"):
        sampler(url + "/elsewhere", folder).sample([LONG], 2, sampling())


@pytest.mark.parametrize("case", ["greedy", "one seed for all choices"])
def test_a_server_that_does_not_sample_is_found_out(served: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = served
    ask = Proxy.ask

    def changed(self: Proxy, path: str, body: dict[str, Any]) -> Any:
        if case == "greedy":
            body = {**body, "generation_config": json.dumps({"do_sample": False})}
        return ask(self, path, {**body, "seed": 3})

    monkeypatch.setattr(Proxy, "ask", changed)
    with Proxy(url, like_vllm=True) as proxy, pytest.raises(D2OError, match=r"gave the same text .*is not sampled"):
        sampler(proxy.url, folder).sample([LONG], 2, sampling())


# --- Faults on the way -------------------------------------------------------------------------------------------


def test_without_a_server_the_error_says_what_to_do(fast: None, caplog: pytest.LogCaptureFixture) -> None:
    nobody = Proxy("http://nowhere")  # its port, where it does not listen
    with (
        caplog.at_level(logging.WARNING, logger="d2o_fast"),
        pytest.raises(D2OError, match=r"here, row 1: .*refused .attempt 8 of 8.. Check that the server runs .*again"),
    ):
        sampler(nobody.url, Path("m")).sample([LONG], 2, sampling())
    assert caplog.text.count("refused (attempt") == 8


def test_the_delays_double_and_retry_after_is_kept(monkeypatch: pytest.MonkeyPatch, served: Any) -> None:
    waited: list[float] = []
    url, folder = served
    with Proxy(url, dict(enumerate(["500", "503", "429", "500"]))) as proxy:
        one = sampler(proxy.url, folder)
        monkeypatch.setattr(one._stop, "wait", waited.append)
        monkeypatch.setattr(server_module, "FIRST_DELAY", 0.1)
        one.sample([LONG], 1, sampling())
    assert waited == [0.1, 0.2, 1.0, 0.8]


def test_after_a_lasting_fault_the_others_do_not_go_on(
    served: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three prompts wait for their next attempt when the first one fails for good; they give up at once."""
    url, folder = served
    for name in ("FIRST_DELAY", "LONGEST_DELAY"):
        monkeypatch.setattr(server_module, name, DEADLINE)
    with Proxy(url, like_vllm=True) as proxy:
        one = sampler(proxy.url, folder, concurrency=4)
        one.sample([LONG], 1, sampling())
        proxy.faults = dict.fromkeys(range(len(proxy.log), 100), "500")
        first = ServerPrompt("how to open the lock!", [5] * 99, "here, row 1")
        answer = proxy.answer

        def first_is_bad(handler: Any, path: str, entry: dict[str, Any]) -> None:
            if entry["body"]["prompt"] == first.content:
                while caplog.text.count("attempt 1 of 8") < 3:
                    time.sleep(0.002)
                entry["fault"] = "400"
            answer(handler, path, entry)

        monkeypatch.setattr(proxy, "answer", first_is_bad)
        started = time.monotonic()
        with (
            caplog.at_level(logging.WARNING, logger="d2o_fast"),
            pytest.raises(D2OError, match=r"refuses here, row 1 .HTTP 400 "),
        ):
            one.sample([first, *PROMPTS], 1, sampling())
        assert time.monotonic() - started < DEADLINE


# --- Into the store ----------------------------------------------------------------------------------------------


def store_config(url: str, folder: Path, name: str = "plain", **options: Any) -> D2OConfig:
    defaults = {"max_length": 64, "max_completion_length": 12, "num_generations": 3, "sampling_batch_size": 3}
    server = {"server_url": url, "server_model": str(folder / name), "server_concurrency": 1}
    server["server_timeout"] = DEADLINE
    return D2OConfig(**{**defaults, **server, **options})


def build(folder: Path, config: D2OConfig, records: Any = None, chat: bool = False) -> AnchorStore:
    rows = rows_from(tiny_rows(5) if records is None else records, "memory")
    return build_store(tiny_model(chat=chat), tiny_tokenizer(chat), rows, config, folder)


@pytest.fixture(scope="module")
def undisturbed(served: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the store that a server without a fault gives."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Proxy(served[0], like_vllm=True) as proxy:
        build(folder, store_config(proxy.url, served[1]))
        assert len(proxy.log) == 1 + 5
    return contents(folder)


FAULTS = {  # what happens on the way, and what the log says of it
    "refused": "Connection refused",
    "closed": "RemoteDisconnected",
    "slow": "no answer within 0.2 s",
    "drip": "no answer within 0.2 s",
    "reset": "ConnectionResetError",
    "half": r"half an answer .\d+ bytes, then the end",
    "429": "HTTP 429 Too Many Requests: .*injected",
    "500": "HTTP 500",
    "503": "HTTP 503",
    "truncated JSON": "that is not JSON, ending in",
    "HTML": "an answer of 17 bytes that is not JSON, ending in '<html>busy</html>'",
    "no choices": "an answer without choices",
    "no text": "a choice that is no response .finish_reason None",
    "aborted": "a choice that is no response .finish_reason 'abort'",
    "fewer": "",  # no fault: the missing choices are asked for
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_way_loses_nothing(
    served: Any,
    undisturbed: dict[str, bytes],
    fault: str,
    fast: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing lost, nothing twice, nothing made up: the store holds what the server said, the same bits as ever."""
    where = (2, 5) if fault in ("slow", "drip") else (0, 2, 3, 5)
    proxy = Proxy(served[0], dict.fromkeys(where, fault), like_vllm=True)
    config = store_config(proxy.url, served[1])
    if fault == "refused":
        proxy.faults = {}
        warning = server_module.logger.warning

        def come_up(message: str, *values: Any) -> None:
            warning(message, *values)
            if "attempt 1 of 8" in message:
                proxy.__enter__()

        monkeypatch.setattr(server_module.logger, "warning", come_up)
    else:
        proxy.__enter__()
    if fault in ("slow", "drip"):  # only they run out of their time, however long the server takes for the others
        attempt = ServerSampler._attempt

        def impatient(self: ServerSampler, *request: Any) -> Any:
            self.timeout = 0.2 if len(proxy.log) in where else DEADLINE
            return attempt(self, *request)

        monkeypatch.setattr(ServerSampler, "_attempt", impatient)
    try:
        with caplog.at_level(logging.WARNING, logger="d2o_fast"):
            store = build(tmp_path / "s", config)
    finally:
        proxy.__exit__()
    said = Counter(text for e in proxy.log if e["body"]["max_tokens"] == 12 for text in e["texts"])
    held = Counter(text for record in store.records("anchors") for text in record["anchors"])
    assert held == said
    assert held.total() == 5 * 3
    if fault == "fewer":  # what is missing is asked for one by one
        assert [e["body"].get("n") for e in proxy.log] == [4, None, None, 3, None, 3, None, 3, 3, 3]
        assert len({e["body"]["seed"] for e in proxy.log}) == 10
    else:
        assert contents(tmp_path / "s") == undisturbed
        told = re.findall(rf"{FAULTS[fault]}.* .attempt \d of 8", caplog.text)
        assert len(told) >= (1 if fault == "refused" else len(where))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("more", "memory, row 1: an answer of 6 choices, where 3 were asked for"),
        (
            "other tokens",
            r"memory, row 1: .*reads the prompt as \d+ tokens, and here it has \d+. It has another tokenizer",
        ),
        ("400", "refuses memory, row 1 .HTTP 400 Bad Request: .*injected"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(served: Any, fault: str, message: str, tmp_path: Path) -> None:
    with Proxy(served[0], {1: fault}, like_vllm=True) as proxy:
        with pytest.raises(D2OError, match=message):
            build(tmp_path / "s", store_config(proxy.url, served[1]))
        asked = [e["body"]["prompt"] for e in proxy.log[1:]]
    assert asked.count(asked[0]) == 1
    assert not list((tmp_path / "s").glob("shard*"))


def test_a_server_that_is_gone_for_good_and_comes_back(
    served: Any, undisturbed: dict[str, bytes], fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "ATTEMPTS", 3)
    with Proxy(served[0], dict.fromkeys(range(5, 99), "500"), like_vllm=True) as proxy:
        config = store_config(proxy.url, served[1])
        with pytest.raises(D2OError, match=r"memory, row 5: HTTP 500 .*injected.* .attempt 3 of 3"):
            build(tmp_path / "s", config)
        assert sorted(path.name for path in (tmp_path / "s").glob("*.parquet")) == ["shard-00000.parquet"]
        proxy.faults.clear()
        done = len(proxy.log)
        build(tmp_path / "s", config)
        assert len(proxy.log) - done == 1 + 2, "what is there is not asked for again"
    assert contents(tmp_path / "s") == undisturbed


def test_killed_while_sampling_it_ends_with_the_same_bits(
    served: Any, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL between the second shard's requests; a command as a user gives it."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(5)))
    with Proxy(served[0], like_vllm=True) as proxy:
        config = store_config(proxy.url, served[1])
        names = ("max_length", "max_completion_length", "num_generations", "sampling_batch_size", "server_url",
                 "server_model", "server_concurrency")  # fmt: skip
        flags = [f"--{name}={getattr(config, name)}" for name in names]
        command = [sys.executable, "-m", "d2o_fast.cli", "sample", f"--model_name_or_path={served[1] / 'plain'}"]
        command += [f"--dataset_name={tmp_path / 'data.jsonl'}", f"--output_dir={tmp_path / 'run'}", *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        proxy.on_request = lambda number: process.kill() if number == 5 else None
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == -9, errors.decode()
        folder = tmp_path / "run" / "anchors" / "train"
        assert [path.name for path in folder.glob("*.parquet")] == ["shard-00000.parquet"]
        proxy.on_request = lambda number: None
        store = build(folder, config)
    assert store.complete
    for name, data in contents(folder).items():
        if name.endswith(".parquet"):  # the same but for the name of the file that the rows come from
            one, other = (pq.read_table(pa.BufferReader(d)).drop(["source"]) for d in (data, undisturbed[name]))
            assert one.equals(other)


def test_what_the_fingerprint_knows_of_a_server(served: Any, tmp_path: Path) -> None:
    with Proxy(served[0], like_vllm=True) as proxy:
        config = store_config(proxy.url, served[1])
        store = build(tmp_path / "s", config)
    rows, model, tokenizer = rows_from(tiny_rows(5)), tiny_model(), tiny_tokenizer()
    elsewhere = replace(config, server_url="http://elsewhere", server_model="m", server_concurrency=9, server_timeout=1)
    store.check(expected_fingerprint(model, tokenizer, rows, elsewhere))
    off = {name: FIELDS[name].default for name in FIELDS if name.startswith("server_")}
    with pytest.raises(FingerprintError, match=r"sampler: stored 'server', now 'generate'") as caught:
        store.check(expected_fingerprint(model, tokenizer, rows, replace(config, **off)))
    assert set(caught.value.differences) == {"sampler"}


def test_cut_prompts_chats_and_given_anchors_through_the_store(served: Any, tmp_path: Path) -> None:
    url, folder = served
    user = [{"role": "user", "content": "how to open the lock?"}]
    records = [
        {"prompt": user, "rejected": [{"role": "assistant", "content": "go away"}]},
        {"prompt": [{"role": "user", "content": "x" * 42}], "rejected": [{"role": "assistant", "content": "no"}]},
        {"prompt": user, "rejected": [{"role": "assistant", "content": "a"}],
         "anchors": [[{"role": "assistant", "content": "it"}]]},
    ]  # fmt: skip
    with Proxy(url, like_vllm=True, tokenizer=tiny_tokenizer(True)) as proxy:
        store = build(
            tmp_path / "s", store_config(proxy.url, folder, "chat", truncation_mode="keep_end"), records, chat=True
        )
        sent = [e["body"] for e in proxy.log[1:]]
    examples = store.examples()
    assert [len(example.anchor_ids) for example in examples] == [3, 3, 1]
    assert sent[0]["messages"] == user
    assert sent[1]["prompt"] == examples[1].prompt_ids
    assert len(sent) == 2
    with pytest.raises(D2OError, match=r"row 2, cut to max_length and so sent as token ids .*must be a string"):
        build(tmp_path / "t", store_config(url, folder, "chat", truncation_mode="keep_end"), records, chat=True)


def test_filters_stand_behind_a_server_too(served: Any, tmp_path: Path) -> None:
    with Proxy(served[0], like_vllm=True) as proxy:
        config = store_config(proxy.url, served[1], max_completion_length=1)
        plain = build(tmp_path / "plain", replace(config, num_generations=40), tiny_rows(2)).examples()
        filters = {"num_draws": 40, "num_generations": 30, "drop_anchors": ["duplicate"]}
        store = build(tmp_path / "s", replace(config, **filters), tiny_rows(2))
        assert [e["body"].get("n") for e in proxy.log[-2:]] == [40, 40]
    for example, drawn in zip(store.examples(), plain, strict=True):
        assert example.anchor_ids == [list(ids) for ids in dict.fromkeys(map(tuple, drawn.anchor_ids))][:30]
    assert store.dropped()["duplicate"] > 0


def test_an_instruction_is_sent_and_not_stored(served: Any, tmp_path: Path) -> None:
    """The wrapped prompt goes to the server, its tokens are counted, and texts are tokenised behind the bare one.

    With a tokenizer that puts a space before every text it makes a difference behind which.
    """
    url, _ = served
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer(prefix_space=True)
    tokenizer.save_pretrained(tmp_path / "model")
    rows, before, after = rows_from(tiny_rows(3), "memory"), "go to ", " to "
    with Proxy(url, like_vllm=True) as proxy:
        config = store_config(proxy.url, tmp_path, "model", num_generations=20)
        config = replace(config, sampling_instruction=before + "{prompt}" + after)
        store = build_store(tiny_model(), tokenizer, rows, config, tmp_path / "s")
        sent = [e for e in proxy.log if e["body"]["max_tokens"] == 12]
    differences = 0
    for row, example, entry in zip(rows, store.examples(), sent, strict=True):
        bare = tokenize_rows([row], tokenizer, config)[0].prompt_ids
        assert example.prompt_ids == bare
        asked = replace(row, prompt=f"{before}{row.prompt}{after}")
        assert entry["body"]["prompt"] == asked.prompt
        draws = [Draw(text, ids[-1] == 2) for text, ids in zip(entry["texts"], example.anchor_ids, strict=True)]
        assert example.anchor_ids == tokenize_drawn([row], [draws], tokenizer, config, [2])[0]
        differences += example.anchor_ids != tokenize_drawn([asked], [draws], tokenizer, config, [2])[0]
        for response, logp in zip(example.responses(), example.ref_logps, strict=True):
            assert logp == pytest.approx(naive_logp(tiny_model(), bare, response), abs=2e-4)
    assert differences > 0


def test_an_instruction_to_a_chat_is_a_message(served: Any, tmp_path: Path) -> None:
    url, folder = served
    user = [{"role": "user", "content": "how?"}]
    records = [{"prompt": user, "rejected": [{"role": "assistant", "content": "go away"}]}]
    with Proxy(url, like_vllm=True) as proxy:
        config = store_config(proxy.url, folder, "chat", sampling_instruction="be kind")
        store = build(tmp_path / "s", config, records, chat=True)
        assert proxy.log[-1]["body"]["messages"] == [{"role": "system", "content": "be kind"}, *user]
    (bare,) = tokenize_rows(rows_from(records), tiny_tokenizer(chat=True), config)
    (example,) = store.examples()
    assert example.prompt_ids == bare.prompt_ids
    for response, logp in zip(example.responses(), example.ref_logps, strict=True):
        assert logp == pytest.approx(naive_logp(tiny_model(chat=True), bare.prompt_ids, response), abs=2e-4)


# --- Servers that tell the tokens they drew ----------------------------------------------------------------------


class TellingProxy(Proxy):
    """Tells tokens as vLLM does: each character of the text as one of its own, and the stop token.

    Args:
        model: gives the log-probabilities that are told; none are without it.
        change: what to do to an answer before it goes out.
    """

    def __init__(self, server: str, model: Any = None, chat: bool = False, change: Any = None) -> None:
        super().__init__(server, like_vllm=True, tokenizer=tiny_tokenizer(chat))
        self.model, self.change = model, change
        self.told: list[list[int]] = []
        self.told_logps: list[float] = []

    def spell(self, text: str) -> list[int]:
        return [token for character in text for token in self.tokenizer(character)["input_ids"]]

    def forward(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "logprobs" in body and self.model is None:
            return 400, {"error": "log-probabilities are not given"}
        status, answer = super().forward(path, {name: body[name] for name in body if name != "logprobs"})
        chat, prompt = path.endswith("/chat/completions"), body.get("prompt")
        if chat:
            messages = body["messages"]
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        elif isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        for choice in answer["choices"] if status == 200 and body.get("return_token_ids") else []:
            ids = self.spell(choice["message"]["content"] if chat else choice["text"])
            ids += body["stop_token_ids"][:1] * (choice["finish_reason"] == "stop")
            choice["token_ids"] = ids
            if chat:
                choice["message"]["content"], answer["prompt_token_ids"] = None, prompt  # as if it had been reasoning
            else:
                choice["prompt_token_ids"] = prompt
            if "logprobs" in body and not chat:
                logps = [naive_logp(self.model, prompt + ids[:i], [token]) for i, token in enumerate(ids)]
                choice["logprobs"] = {"token_logprobs": logps}
                self.told_logps += logps
            elif body["max_tokens"] == 12:
                self.told.append(ids)
        if status == 200 and self.change is not None:
            self.change(answer, body)
        return status, answer


def test_told_tokens_are_the_anchors(served: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not what the tokenizer would make of the text; the server's weights are compared first."""
    url, folder = served
    with TellingProxy(url, tiny_model()) as proxy, caplog.at_level(logging.INFO, logger="d2o_fast"):
        config = store_config(proxy.url, folder)
        store = build(tmp_path / "s", config)
    examples = store.examples()
    ids = [anchor for example in examples for anchor in example.anchor_ids]
    assert ids == [told[:12] for told in proxy.told]
    rows, texts = rows_from(tiny_rows(5)), [e["texts"] for e in proxy.log if e["body"]["max_tokens"] == 12]
    drawn = [[Draw(text, True) for text in of_prompt] for of_prompt in texts]
    assert ids != [a for d in tokenize_drawn(rows, drawn, tiny_tokenizer(), config, [2]) for a in d]
    for example in examples:
        for response, logp in zip(example.responses(), example.ref_logps, strict=True):
            assert logp == pytest.approx(naive_logp(tiny_model(), example.prompt_ids, response), abs=2e-4)
    assert "the tokens come back" in caplog.text
    (apart,) = re.findall(r"tokens have log-probabilities (\S+) nats from ours on average", caplog.text)
    assert float(apart) < 1e-5
    assert [e["body"].get("logprobs") for e in proxy.log] == [None, 1, *[None] * 5]


def test_told_tokens_of_a_chat(served: Any, tmp_path: Path) -> None:
    user = [{"role": "user", "content": "how to open the lock?"}]
    records = [{"prompt": user, "rejected": [{"role": "assistant", "content": "go away"}]}]
    with TellingProxy(served[0], tiny_model(chat=True), chat=True) as proxy:
        store = build(tmp_path / "s", store_config(proxy.url, served[1], "chat"), records, chat=True)
    assert store.examples()[0].anchor_ids == [ids[:12] for ids in proxy.told]
    assert proxy.log[-1]["body"]["messages"] == user
    assert proxy.log[1]["body"]["logprobs"] == 1
    assert len(proxy.told_logps) > 0

    def read_otherwise(answer: dict[str, Any], body: dict[str, Any]) -> None:
        if "prompt_token_ids" in answer:
            answer["prompt_token_ids"][2] += 1

    message = r"memory, row 1: the server reads the prompt with \d+ as its token 3, and here that is"
    other = TellingProxy(served[0], tiny_model(chat=True), chat=True, change=read_otherwise)
    with other as proxy, pytest.raises(D2OError, match=message):
        build(tmp_path / "t", store_config(proxy.url, served[1], "chat"), records, chat=True)


@pytest.mark.parametrize("case", ["same", "bf16", "other", "untold", "some untold", "more tokens", "nan"])
def test_a_server_with_other_weights_is_refused(
    served: Any, case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, folder = served
    theirs = {"bf16": tiny_model().bfloat16(), "other": tiny_model(seed=1), "untold": None}.get(case, tiny_model())

    def change(answer: dict[str, Any], body: dict[str, Any]) -> None:
        for choice in answer["choices"] if "logprobs" in body else []:
            if case == "some untold":
                choice["logprobs"]["token_logprobs"][0] = None
            elif case == "more tokens":
                choice["token_ids"][-1] = VOCAB_SIZE
            elif case == "nan":
                choice["logprobs"]["token_logprobs"][0] = math.nan

    refused = {
        "other": r"serves another model than the initial one as '.*plain': \d+ tokens have log-",
        "more tokens": r"token_ids\[\d+\] is 160; it must be a token id below 160",
        "nan": r"token_logprobs\[0\] is nan; it must be a log-probability",
    }
    with TellingProxy(url, theirs, change=change) as proxy, caplog.at_level(logging.INFO, logger="d2o_fast"):
        config = store_config(proxy.url, folder)
        if case in refused:
            with pytest.raises(D2OError, match=refused[case]):
                build(tmp_path / "s", config)
            assert not list((tmp_path / "s").glob("shard*"))
            return
        assert build(tmp_path / "s", config).complete
    assert ("its weights are not checked" in caplog.text) is case.endswith("untold")


@pytest.mark.parametrize("name", ["plain", "peaked"])
def test_how_far_a_server_may_lie(served: Any, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tenth of the log-probabilities' spread, or 0.02 nats where that is more."""
    url, folder = served
    model = peaked_model() if name == "peaked" else tiny_model()
    with TellingProxy(url, model) as proxy, caplog.at_level(logging.INFO, logger="d2o_fast"):
        config = store_config(proxy.url, folder, name)
        build_store(model, tiny_tokenizer(), rows_from(tiny_rows(1)), config, tmp_path / "s")
    (limit,) = re.findall(r"and (\S+) would be too far", caplog.text)
    spread = statistics.pstdev(proxy.told_logps)
    assert (spread > 0.3) is (name == "peaked")
    assert float(limit) == pytest.approx(max(spread / 10, 0.02), rel=0.05)


def test_a_server_that_tells_the_tokens_of_some_choices_only(served: Any, fast: None, tmp_path: Path) -> None:
    url, folder = served

    def leave_out(answer: dict[str, Any], body: dict[str, Any]) -> None:
        if body["max_tokens"] == 12:
            answer["choices"][-1].pop("token_ids")

    for count, found in (
        (3, "the tokens of 2 of its 3 choices"),
        (1, "without the tokens, which this server told bef"),
    ):
        with TellingProxy(url, tiny_model(), change=leave_out) as proxy:
            config = store_config(proxy.url, folder, num_generations=count)
            with pytest.raises(D2OError, match=found):
                build(tmp_path / f"s{count}", config)


def test_a_response_that_the_servers_context_cut_is_refused(served: Any, tmp_path: Path) -> None:
    def cut(answer: dict[str, Any], body: dict[str, Any]) -> None:
        if body["max_tokens"] == 12:
            answer["choices"][1] |= {"finish_reason": "length", "token_ids": [5] * 11}

    message = r"ends a response to memory, row 1 by its length after 11 tokens, and 12 were asked for: .*max-model-len"
    with TellingProxy(served[0], tiny_model(), change=cut) as proxy, pytest.raises(D2OError, match=message):
        build(tmp_path / "s", store_config(proxy.url, served[1]))


def test_a_prompt_that_is_read_as_other_tokens_of_the_same_number(served: Any) -> None:
    ids = list(LONG.token_ids)
    ids[2] += 1
    with TellingProxy(served[0], tiny_model()) as proxy:
        message = rf"row 1: .*the prompt with {ids[2] - 1} as its token 3, and here that is {ids[2]}. It has another"
        with pytest.raises(D2OError, match=message):
            sampler(proxy.url, served[1]).sample([replace(LONG, token_ids=ids, place="row 1")], 3, sampling())


def test_how_told_tokens_end() -> None:
    row = tiny_rows(1)[0]
    told = (
        ("a", True, (5, 6, 2)),
        ("a", True, (5, 6)),
        ("a", False, (5, 6)),
        ("", True, ()),
        ("a</s>", True, (5, 2, 6)),
    )
    assert drawn_ids(row, *told) == [[5, 6, 2], [5, 6, 2], [5, 6], [2], [5, 2]]
    assert drawn_ids(row, ("a", False, tuple(range(5, 25)))) == [list(range(5, 13))]
    mixed = drawn_ids(row, (" it", False), ("?", False, (7,)), (" go", False))
    assert mixed == [tiny_tokenizer()(" it")["input_ids"], [7], tiny_tokenizer()(" go")["input_ids"]]


# --- Text to tokens ----------------------------------------------------------------------------------------------

CONFIG = D2OConfig(max_length=64, max_completion_length=8)


def drawn_ids(row: dict[str, Any], *draws: Any, chat: bool = False, **options: Any) -> list[list[int]]:
    stops = [4] if chat else [2]
    return tokenize_drawn(
        rows_from([row]), [[Draw(*draw) for draw in draws]], tiny_tokenizer(chat, **options), CONFIG, stops
    )[0]


@pytest.mark.parametrize("options", [{}, {"bos": True}, {"prefix_space": True}], ids=["plain", "bos", "prefix space"])
def test_a_text_becomes_what_it_would_be_in_the_data(options: dict[str, bool]) -> None:
    tokenizer, row = tiny_tokenizer(**options), tiny_rows(1)[0]
    texts = [" go away", " it", "s"]
    (example,) = tokenize_rows(rows_from([{**row, "anchors": texts}]), tokenizer, CONFIG)
    assert drawn_ids(row, *((text, True) for text in texts), **options) == example.anchor_ids
    assert drawn_ids(row, (texts[1], False), **options) == [example.anchor_ids[1][:-1]]


def test_the_end_of_a_drawn_text() -> None:
    row = tiny_rows(1)[0]
    assert drawn_ids(row, ("", True)) == [[2]], "EOS was the first token"
    (spelled,) = drawn_ids(row, (" it</s> and", False))
    assert spelled == [*tiny_tokenizer()(" it")["input_ids"], 2]
    (cut,) = drawn_ids(row, ("xyz" * 20, True))
    assert len(cut) == 8
    assert 2 not in cut
    with pytest.raises(DataError, match=r"train_dataset, row 1, field 'anchors': the sampler returned ''"):
        drawn_ids(row, ("", False))


def test_a_drawn_text_in_a_chat_is_not_put_through_the_template() -> None:
    row = {"prompt": [{"role": "user", "content": "how?"}], "rejected": [{"role": "assistant", "content": "no"}]}
    tokenizer = tiny_tokenizer(chat=True)
    ended, cut = drawn_ids(row, ("\n it ", True), ("\n it ", False), chat=True)
    assert cut == tokenizer("\n it ")["input_ids"]
    assert ended == [*cut, 4]

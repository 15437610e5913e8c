"""A real Llama and a real tokenizer, small enough for any test: built in code, not downloaded, equal on every run."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from d2o_fast import D2OConfig, D2OTrainer

PAD, BOS, EOS, IM_START, IM_END = "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 160

# Ends every turn with a newline after <|im_end|>, as ChatML does.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_NOUNS = ("lock", "tree", "cake", "boat", "clock", "chair", "lamp", "shoe")
_VERBS = ("open", "paint", "bake", "mend", "clean", "build", "move", "sell")


def tiny_rows(n: int) -> list[dict[str, Any]]:
    """``n`` records with the columns ``prompt`` and ``rejected``; prompts differ up to n = 64."""
    rows = []
    for i in range(n):
        verb, noun = _VERBS[i % 8], _NOUNS[(i // 8 + i) % 8]
        rows.append({"prompt": f"how to {verb} the {noun}?", "rejected": f" go away, {verb} {'it ' * (i % 3)}yourself"})
    return rows


def tiny_tokenizer(
    chat: bool = False, *, bos: bool = False, eos: bool = False, prefix_space: bool = False
) -> PreTrainedTokenizerFast:
    """A BPE of 160 tokens over printable characters, which merges across a prompt's end as real tokenizers do.

    Args:
        chat: has a ChatML template, and ``<|im_end|>`` as the EOS token.
        bos: puts ``<s>`` in front of every text, as Llama's does.
        eos: puts ``</s>`` at the end of every text, as T5's does.
        prefix_space: puts a space in front of every text and writes spaces as U+2581, as SentencePiece does.
    """
    tokenizer = Tokenizer(models.BPE())
    if prefix_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        text for row in tiny_rows(64) for text in (row["prompt"], row["rejected"], row["prompt"] + row["rejected"])
    ]
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS, IM_START, IM_END)]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*corpus, string.printable], trainer)
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS + ' ' if bos else ''}$A{' ' + EOS if eos else ''}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=IM_END if chat else EOS,
        extra_special_tokens=[IM_START, IM_END],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(seed: int = 0, vocab_size: int = VOCAB_SIZE, chat: bool = False, **config: Any) -> LlamaForCausalLM:
    """A Llama of 2 layers and 32 channels, fp32, in eval mode; ``config`` overrides single fields of LlamaConfig."""
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 4 if chat else 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


def save_tiny(folder: str | Path, chat: bool = False, seed: int = 0) -> str:
    """Writes model and tokenizer as ``from_pretrained`` reads them; returns the folder."""
    tiny_model(seed, chat=chat).save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return str(folder)


def peaked_model(**config) -> torch.nn.Module:
    """A model with next-token probabilities from 0.5 to 1e-6, so that any truncation or temperature shows."""
    model = tiny_model(**config)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
    return model


def next_token(model, ids, temperature=1.0) -> torch.Tensor:
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)


# Eight steps, three to an epoch; log lines that span steps, evaluations and checkpoints that fall on different steps.
RUN: dict[str, Any] = {
    "num_generations": 2,
    "max_length": 64,
    "max_completion_length": 12,
    "learning_rate": 3e-3,
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "eval_steps": 3,
    "save_steps": 5,
}


def tiny_run(out: Path, **settings: Any) -> D2OTrainer:
    """A trainer of ``tiny_model`` with the settings ``RUN``; all runs beside each other share their anchors."""
    callbacks = settings.pop("callbacks", None)
    args = D2OConfig(**{**RUN, "output_dir": str(out), "anchors_dir": str(out.parent / "anchors"), **settings})
    return D2OTrainer(tiny_model(), args, tiny_rows(10), tiny_rows(14)[10:], tiny_tokenizer(), callbacks=callbacks)


def save_tiny_run(folder: Path) -> list[str]:
    """Writes the model, data and settings of ``tiny_run`` to ``folder``; returns the arguments of ``d2o``."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("train", tiny_rows(10)), ("eval", tiny_rows(14)[10:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"model_name_or_path": "model", "dataset_name": "train.jsonl", "eval_dataset_name": "eval.jsonl"}
    places |= {"output_dir": "run", "anchors_dir": "anchors"}
    settings = RUN | {name: str(folder / place) for name, place in places.items()}
    (folder / "config.yaml").write_text(json.dumps(settings))  # which is YAML too
    return ["train", str(folder / "config.yaml")]

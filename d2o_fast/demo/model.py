"""The demo's starting point: a small Llama that answers abusively about half of the time."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from d2o_fast.demo import baselines, world

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the language, and ``<unk>`` for every other word."""
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNKNOWN, *world.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> baselines.Sequence:
    """(token ids of prompt + response + EOS, number of prompt tokens)."""
    prompt_ids, response_ids = tokenizer([prompt, response], add_special_tokens=False)["input_ids"]
    return prompt_ids + response_ids + [tokenizer.eos_token_id], len(prompt_ids)


def pretrain(
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    seed: int,
    *,
    num_steps: int = 800,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> LlamaForCausalLM:
    """A Llama with 2 layers of 64 channels, trained on a half-and-half mixture of helpful and abusive answers.

    Args:
        pairs: (verb, noun) of the training prompts. The model never sees the held-out combinations.
        seed: decides the initial weights, the texts and their order.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    texts = world.pretraining_texts(pairs, num_steps * batch_size, random.Random(seed))
    baselines.train(
        "sft",
        model,
        [baselines.Pair(encode(tokenizer, prompt, response), None) for prompt, response in texts],
        learning_rate=learning_rate,
        num_steps=num_steps,
        batch_size=batch_size,
        seed=seed,
    )
    return model.eval()


def feedback_pairs(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, object]], method: str
) -> list[baselines.Pair]:
    """The training data of a baseline: every unsafe response (GA, NPO), the positive (SFT), or both responses (DPO)."""
    if method in ("ga", "npo"):
        return [
            baselines.Pair(None, encode(tokenizer, str(row["prompt"]), text))
            for row in rows
            for text in world.unsafe(row)
        ]
    pairs = []
    for row in rows:
        chosen = encode(tokenizer, str(row["prompt"]), world.preferred(row))
        rejected = encode(tokenizer, str(row["prompt"]), world.dispreferred(row)) if method == "dpo" else None
        pairs.append(baselines.Pair(chosen, rejected))
    return pairs

#!/usr/bin/env python3
"""A line that json cannot parse for another reason than its syntax: nesting beyond the recursion limit (a log's dump in an unused
column). Raw RecursionError without file and row. Expected: DataError with both. Kind: only JSONDecodeError is caught."""
import logging, os, sys, tempfile, warnings
os.environ.setdefault("OMP_NUM_THREADS", "1"); os.environ.setdefault("HF_HUB_OFFLINE", "1"); os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
torch.set_num_threads(1)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from d2o_fast import D2OConfig, D2OTrainer

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(chat_template=None, **extra):
    """Byte-level, 5 special tokens and 256 bytes: 261 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(SPECIALS + alphabet)}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in SPECIALS])
    settings = dict(pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>" if chat_template else "</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=t, **{**settings, **extra})
    fast.chat_template = chat_template
    return fast


def tiny_model(cls=LlamaForCausalLM, config=LlamaConfig, **over):
    settings = dict(vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
                    pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return cls(config(**{**settings, **over})).eval()


ROWS = [{"prompt": f"how to mend the {x}", "rejected": f" go away, {x}"} for x in ("lock", "cake", "boat", "lamp")]


def config(**over):
    settings = dict(output_dir=tempfile.mkdtemp() + "/run", num_generations=2, max_steps=2, max_length=64, warmup_ratio=0.0,
                    max_completion_length=8, per_device_train_batch_size=2, learning_rate=1e-3)
    return D2OConfig(**{**settings, **over})

from d2o_fast.errors import D2OError

logging.getLogger("d2o_fast").setLevel(logging.ERROR)
os.environ["TQDM_DISABLE"] = "1"
warnings.simplefilter("ignore")
U = lambda c: [{"role": "user", "content": c}]
A = lambda c, **k: [{"role": "assistant", "content": c, **k}]


def outcome(f):
    """("ok", result), ("refused", message of a D2OError) or ("raw", another exception)."""
    try:
        return "ok", f()
    except D2OError as error:
        return "refused", str(error)
    except Exception as error:
        return "raw", f"{type(error).__name__}: {str(error)[:200]}"


def verdict(right, found):
    print(("RIGHT: " if right else "WRONG: ") + str(found)[:600])
    sys.exit(0 if right else 1)


from d2o_fast.data.reading import read_rows
path = tempfile.mkdtemp() + "/a.jsonl"
open(path, "w").write('{"prompt": "p", "rejected": "r"}\n{"prompt": "p", "rejected": "r", "x": ' + "[" * 100000 + "]" * 100000 + "}\n")
how, found = outcome(lambda: len(read_rows(path)))
verdict(how == "refused" and "row 2" in found, f"{how} {found}")

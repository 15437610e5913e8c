"""``d2o demo | sample | anchors | train | eval | doctor``.

    d2o train config.yaml --learning_rate 1e-5

File and flags use the names of ``D2OConfig``. Flags win, and an unknown name is an error. Each command imports slow
modules only if it needs them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2o_fast.arguments import COMMANDS, parse, parser
from d2o_fast.config import D2OConfig, in_use, instead, refuse_idle
from d2o_fast.errors import D2OError, printable
from d2o_fast.files import atomic_file

#: the system's refusals that a user can act on; any other is a bug and keeps its traceback
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or choose another folder"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "check its permissions, or choose another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk"),
    **dict.fromkeys((errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "check this path and start again"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.ETXTBSY), "choose another path"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its status.

    0: success. 2: a D2OError, whose message it prints. 1: the system refuses a file. 130: Ctrl-C. 141: nobody reads
    its output any more.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not every terminal shows every character
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _main(arguments)
        print(end="", flush=True)
        return status
    except D2OError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        _drop_output()
        place = f"{error.filename}: " if error.filename else ""
        command = " ".join(["d2o", *arguments[:1]])
        return _fail(f"{command} stopped: {place}{error.strerror}; {REMEDIES[error.errno]}", 1)


def _drop_output() -> None:
    """Sends the rest of the output nowhere if it cannot be written."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nobody may read it
        print(f"error: {printable(message)}", file=sys.stderr)
    return status


def _main(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        from d2o_fast import __version__

        print(f"d2o-fast {__version__}")
        return 0
    if command not in COMMANDS:
        raise D2OError(f"unknown command '{command}'{instead(command, list(COMMANDS))} (d2o --help lists them all)")
    if {"-h", "--help"} & set(arguments):
        print(parser(command).format_help())
        return 0
    return _run(command, arguments[1:])


def _run(command: str, arguments: list[str]) -> int:
    options, settings = parse(command, arguments)
    if command == "demo":
        from d2o_fast.demo.run import demo

        return demo(**options, run=_main)
    if command == "anchors":
        from d2o_fast.anchors.inspection import anchors

        return anchors(**options)
    if command == "doctor":
        from d2o_fast.doctor import doctor

        return doctor(as_json=options["json"])
    _show_log()
    config = D2OConfig(**in_use(settings))
    if command == "eval":
        return _eval(config, options["eval_model"])
    if command == "train":
        return _train(config)
    return _dry_run(config) if options["dry_run"] else _sample(config)


def _show_log() -> None:
    """Sends the package's log to stderr, each message once, because every evaluation tokenises the same rows."""
    logger, seen = logging.getLogger("d2o_fast"), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in seen or seen.add(message))  # type: ignore[func-returns-value]

    handler = logging.StreamHandler()
    handler.setFormatter(_Printable())
    handler.addFilter(is_new)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Printable(logging.Formatter):
    """Formats no escape sequence of a server, a file or a library into the log."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _help() -> str:
    commands = "\n".join(f"  d2o {name:<8} {text}" for name, text in COMMANDS.items())
    return (
        "Align a language model from negative samples only (D2O, arXiv 2403.03419).\n\n"
        f"{commands}\n\n"
        "sample, train and eval read one settings file, and flags that win over it:\n"
        "  d2o train config.yaml --learning_rate 1e-5\n"
        "`d2o COMMAND --help` lists them; `d2o --version` tells the version."
    )


# --- Commands ----------------------------------------------------------------------------------------------------


def _dry_run(config: D2OConfig) -> int:
    from d2o_fast.data.dry_run import describe
    from d2o_fast.data.reading import read_datasets
    from d2o_fast.model.loading import load_tokenizer

    tokenizer = load_tokenizer(config)
    for name, rows in zip(("train", "eval"), read_datasets(config), strict=True):
        if rows:
            print(describe(name, rows, tokenizer, config), end="\n\n")
    print("nothing was sampled or written (--dry-run)")
    return 0


def _sample(config: D2OConfig) -> int:
    import torch

    from d2o_fast.anchors.build import open_store
    from d2o_fast.anchors.filters import counts_text
    from d2o_fast.data.reading import read_datasets
    from d2o_fast.loss.ops import choose_engine
    from d2o_fast.model.loading import initial_model, load_tokenizer

    train, held_out = read_datasets(config)
    model, tokenizer = initial_model(config, config.model_name_or_path), load_tokenizer(config)
    for name, rows in (("train", train), ("eval", held_out)):
        if not rows:
            continue
        started = time.perf_counter()
        store = open_store(model, tokenizer, rows, config, name)
        seconds = time.perf_counter() - started
        rows_left = prompts = negatives = anchors = anchor_tokens = 0
        for record in store.records("prompt_tokens", "rejected_tokens", "anchors_tokens"):
            if not record["anchors_tokens"]:
                continue
            rows_left += 1
            prompts += record["prompt_tokens"]
            negatives += record["rejected_tokens"]
            anchors += len(record["anchors_tokens"])
            anchor_tokens += sum(record["anchors_tokens"])
        dropped = store.dropped()
        filtered = f" ({dropped.total()} draws dropped: {counts_text(dropped)})" if dropped else ""
        path = choose_engine("auto", torch.empty(0, device=model.device)).name
        print(
            f"{name}: {rows_left} negatives of {negatives / rows_left:.1f} tokens, {anchors} anchors of "
            f"{anchor_tokens / anchors:.1f}{filtered}, prompts of {prompts / rows_left:.1f}; "
            f"scored on {model.device} ({path}); {seconds:.1f} s; {store.folder}"
        )
    return 0


def _train(config: D2OConfig) -> int:
    from d2o_fast.data.reading import read_datasets
    from d2o_fast.training.trainer import D2OTrainer

    train, held_out = read_datasets(config)
    result = D2OTrainer(config.model_name_or_path, config, train, held_out).train()
    margin, loss = result.metrics["rewards/margins"], result.metrics["loss"]
    print(f"{result.global_step} steps: loss {loss:.4f}, margin {margin:+.3f}; the model is in {config.output_dir}")
    return 0


def _eval(config: D2OConfig, eval_model: str | None) -> int:
    from d2o_fast.anchors.build import open_store
    from d2o_fast.data.reading import read_datasets
    from d2o_fast.model.loading import initial_model, load_tokenizer, trained_model
    from d2o_fast.training.evaluate import evaluate_model, load_judge

    refuse_idle(config, held_out=True)
    load_judge(config)
    folder, path = eval_model or config.output_dir, Path(config.output_dir) / "eval.json"
    if config.eval_dataset_name is None and not config.eval_fraction:
        raise D2OError("there is nothing to evaluate on: set eval_dataset_name or eval_fraction")
    is_local = eval_model is None or Path(folder).is_dir()
    if is_local and not any(Path(folder, name).is_file() for name in ("config.json", "adapter_config.json")):
        raise D2OError(f"'{folder}' holds no trained model; run `d2o train` first, or name it with --eval_model")
    rows = read_datasets(config)[1]
    if not rows:
        raise D2OError("there is nothing to evaluate on: set eval_dataset_name or eval_fraction")
    model, tokenizer = initial_model(config, config.model_name_or_path), load_tokenizer(config)
    examples = open_store(model, tokenizer, rows, config, "eval").examples()
    initial, before = evaluate_model(model, tokenizer, examples, rows, config)
    del model
    trained, after = evaluate_model(trained_model(config, folder), tokenizer, examples, rows, config)
    report = {
        "initial_model": config.model_name_or_path,
        "eval_model": folder,
        "rows": len(rows),
        "initial": initial,
        "trained": trained,
        "samples": [_before_after(b, a) for b, a in zip(before, after, strict=True)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"{'':<28}{'initial':>12}{'trained':>12}")
    for name in dict.fromkeys((*initial, *trained)):  # a label may occur for only one of the two
        print(f"{name:<28}{initial.get(name, 0.0):>12.4f}{trained.get(name, 0.0):>12.4f}")
    print(f"{len(rows)} held-out negatives; samples in {path}")
    return 0


def _before_after(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    kind = "label" if "label" in before else "score"
    return {
        "prompt": before["prompt"],
        "before": before["response"],
        f"before_{kind}": before[kind],
        "after": after["response"],
        f"after_{kind}": after[kind],
    }


if __name__ == "__main__":
    sys.exit(main())

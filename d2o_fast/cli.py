"""``d2o demo | sample | anchors | train | eval | doctor``.

    d2o train config.yaml --learning_rate 1e-5

The file and the flags have the same names, those of ``D2OConfig``; flags win; an unknown name is an error. Whatever is
slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2o_fast.config import D2OConfig
from d2o_fast.errors import D2OError

COMMANDS = {
    "demo": "align a small model from start to finish and show what it did",
    "sample": "draw K anchors per prompt and score them and the negatives",
    "anchors": "inspect the anchors that were made, or export them for other trainers",
    "train": "train a model away from its negatives (samples first what is missing)",
    "eval": "held-out loss, rewards and judge: the initial model beside the trained one",
    "doctor": "what this machine has, which paths will run, and why not the others",
}
NAMES = [field.name for field in dataclasses.fields(D2OConfig)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it succeeded, 2 for an error that the message explains."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    try:
        if command in ("-h", "--help"):
            print(_help())
            return 0
        if command == "--version":
            from d2o_fast import __version__

            print(f"d2o-fast {__version__}")
            return 0
        if command not in COMMANDS:
            raise D2OError(
                f"unknown command '{command}'{_nearest(command, list(COMMANDS))} (d2o --help lists them all)"
            )
        return _run(command, arguments[1:])
    except D2OError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(command: str, arguments: list[str]) -> int:
    if command == "demo":
        from d2o_fast.demo.run import main as demo

        return demo(arguments)
    if command == "anchors":
        from d2o_fast.inspect_store import main as anchors

        return anchors(arguments)
    if command == "doctor":
        from d2o_fast.doctor import main as doctor

        return doctor(arguments)
    dry_run = command == "sample" and "--dry-run" in arguments
    arguments = [argument for argument in arguments if not (dry_run and argument == "--dry-run")]
    extra = {"eval_model": "folder of the trained model; output_dir if not given"} if command == "eval" else {}
    parsed = parse(command, arguments, extra)
    if parsed is None:
        return 0
    config, options = parsed
    _show_log()
    if command == "eval":
        return _eval(config, options["eval_model"])
    if dry_run:
        return _dry_run(config)
    return {"sample": _sample, "train": _train}[command](config)


def _show_log() -> None:
    """What the package logs goes to stderr, each message once: every evaluation tokenises the same rows."""
    logger, seen = logging.getLogger("d2o_fast"), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in seen or seen.add(message))  # type: ignore[func-returns-value]

    handler = logging.StreamHandler()
    handler.addFilter(is_new)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


# --- Settings ----------------------------------------------------------------------------------------------------


def parse(
    command: str, arguments: Sequence[str], extra: dict[str, str] | None = None
) -> tuple[D2OConfig, dict[str, Any]] | None:
    """The settings of ``[config.yaml] [--name value ...]`` and the values of the ``extra`` flags; None after --help.

    Raises:
        D2OError: a name that is no setting, a value of the wrong type, a file that cannot be read.
    """
    from jsonargparse import ArgumentError

    extra, arguments = extra or {}, list(arguments)
    parser = _parser(command, extra)
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())
        return None
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    has_file = arguments[:1] == ["--config"]
    if has_file and len(arguments) > 1:
        _check_file(arguments[1])
    for flag in (argument for argument in arguments[has_file:] if argument.startswith("--")):
        name = flag[2:].split("=")[0].removesuffix("+")
        if name not in (*NAMES, *extra, "print_config"):
            raise D2OError(f"unknown flag --{name}{_nearest(name, [*NAMES, *extra], '--')}")
    try:
        found = parser.parse_args(arguments)
    except ArgumentError as error:
        message = " ".join(str(error).split())
        raise D2OError(f"{message}. See d2o {command} --help") from error
    values = {name: getattr(found, name) for name in NAMES}
    return D2OConfig(**values), {name: getattr(found, name) for name in extra}


def _check_file(name: str) -> None:
    import yaml

    try:
        settings = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise D2OError(f"the settings file '{name}' cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise D2OError(f"the settings file '{name}' is not YAML: {' '.join(str(error).split())}") from error
    if settings is not None and not isinstance(settings, dict):
        raise D2OError(f"the settings file '{name}' must hold lines of the form 'name: value'")
    for key in settings or {}:
        if key not in NAMES:
            raise D2OError(f"{name}: unknown setting '{key}'{_nearest(str(key), NAMES)}")


def _nearest(name: str, names: Sequence[str], prefix: str = "") -> str:
    """The end of a message: the one of ``names`` that was probably meant."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{near[0]}'?" if near else ""


def _parser(command: str, extra: dict[str, str]) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"d2o {command}",
        usage=f"d2o {command} [config.yaml] {'[--dry-run] ' if command == 'sample' else ''}[--setting value ...]",
        description=f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}. A setting given as a flag wins over the "
        f"file's.{' With --dry-run it says what it understood of the data, and stops.' if command == 'sample' else ''}",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="the settings file may also come first, without --config")
    for name, text in extra.items():
        parser.add_argument(f"--{name}", type=str, default=None, help=text)
    parser.add_class_arguments(D2OConfig)
    comments = _comments()
    for action in parser._actions:
        if action.dest in comments:
            action.help = comments[action.dest]
    for group in parser._action_groups:
        if "D2OConfig" in str(group.title):
            group.title = "settings"
    return parser


def _comments() -> dict[str, str]:
    """What the source of ``D2OConfig`` says beside each field: its ``#:`` comment."""
    found = re.findall(r"^    (\w+): .*?  #: (.*)$", inspect.getsource(D2OConfig), flags=re.MULTILINE)
    return {name: text.replace("%", "%%") for name, text in found}


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
    from d2o_fast.dry_run import describe
    from d2o_fast.models import load_tokenizer
    from d2o_fast.prepare import read_datasets

    tokenizer = load_tokenizer(config)
    for name, rows in zip(("train", "eval"), read_datasets(config), strict=True):
        if rows:
            print(describe(name, rows, tokenizer, config), end="\n\n")
    print("nothing was sampled or written (--dry-run)")
    return 0


def _sample(config: D2OConfig) -> int:
    import torch

    from d2o_fast.filters import counts_text
    from d2o_fast.models import load_tokenizer
    from d2o_fast.ops import choose_engine
    from d2o_fast.prepare import initial_model, open_store, read_datasets

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
    from d2o_fast.prepare import read_datasets
    from d2o_fast.trainer import D2OTrainer

    train, held_out = read_datasets(config)
    result = D2OTrainer(config.model_name_or_path, config, train, held_out).train()
    margin, loss = result.metrics["rewards/margins"], result.metrics["loss"]
    print(f"{result.global_step} steps: loss {loss:.4f}, margin {margin:+.3f}; the model is in {config.output_dir}")
    return 0


def _eval(config: D2OConfig, eval_model: str | None) -> int:
    from d2o_fast.models import load_tokenizer
    from d2o_fast.prepare import initial_model, open_store, read_datasets, trained_model
    from d2o_fast.step import evaluate_model

    rows = read_datasets(config)[1]
    if not rows:
        raise D2OError("there is nothing to evaluate on: set eval_dataset_name or eval_fraction")
    folder = eval_model or config.output_dir
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
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    path = Path(config.output_dir) / "eval.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{'':<28}{'initial':>12}{'trained':>12}")
    for name in dict.fromkeys((*initial, *trained)):  # a judge may use a label for one of the two only
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

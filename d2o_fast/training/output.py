"""The model in ``output_dir``: tried before the first draw, written after the last step, the weights first."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.errors import D2OError, shortened
from d2o_fast.files import TEMPORARY, replace_files
from d2o_fast.model.loading import quiet_transformers
from d2o_fast.training.ending import explained
from d2o_fast.training.model_card import MARK, public_settings

CARD, SETTINGS = "README.md", "d2o_config.yaml"


def save_weights(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> None:
    """Writes the weights in fp32 (only the adapter of a PeftModel), configuration and tokenizer."""
    if not isinstance(model, PreTrainedModel):
        options["save_embedding_layers"] = False
    with quiet_transformers():
        model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)


def save_card(card: str, args: D2OConfig, folder: Path) -> None:
    """Writes the model card and the settings, without local paths."""
    settings = yaml.safe_dump(public_settings(args), sort_keys=False)
    with replace_files(folder) as temporary:
        (temporary / CARD).write_text(card, encoding="utf-8")
        (temporary / SETTINGS).write_text(settings, encoding="utf-8")


def try_saving(model: Any, tokenizer: PreTrainedTokenizerBase, args: D2OConfig, fresh: bool) -> None:
    """Saves everything but the weights (an adapter wholly) into a temporary folder of ``output_dir``.

    Args:
        fresh: whether ``output_dir`` belongs to no run yet.

    Raises:
        D2OError: transformers refuses to save the configuration or the tokenizer; a file of the user has the name of
            one that the run would write; the disk has no room for a checkpoint.
    """
    folder = Path(args.output_dir)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{TEMPORARY}try-") as name:
        temporary = Path(name)
        try:
            # peft looks every tensor up in a given state_dict; an adapter is small enough to be written.
            options: dict[str, Any] = {"state_dict": {}} if isinstance(model, PreTrainedModel) else {}
            save_weights(model, tokenizer, temporary, **options)
        except Exception as error:  # many kinds, from the configurations of hundreds of models
            if (told := explained(error, f"output_dir '{folder}'", "Nothing was drawn or trained")) is not None:
                raise told from error
            found = shortened(str(error), 400, one_line=True)
            raise D2OError(
                f"the model could not be saved after training: {type(error).__name__}: {found}. Mend its configuration "
                "(config, generation_config or tokenizer) first; nothing was drawn or trained"
            ) from error
        names = {str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file()}
    for file in sorted({CARD, SETTINGS, *names} if fresh else {CARD}):
        if (folder / file).exists() and not (file == CARD and MARK in _text(folder / file)):
            raise D2OError(
                f"output_dir '{folder}' holds a file '{file}' of another origin, which the trained model's would "
                "replace; move it away or choose another output_dir"
            )
    require_space(model, folder)


def require_space(model: Any, folder: Path) -> None:
    """Refuses to begin a checkpoint that the disk cannot hold.

    Raises:
        D2OError: less is free than weights, both moments and 1% take.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = sum(p.numel() for p in model.parameters()) if isinstance(model, PreTrainedModel) else trained
    needed, free = int(4 * (saved + 2 * trained) * 1.01) + (1 << 20), shutil.disk_usage(folder).free
    if free < needed:
        raise D2OError(
            f"output_dir '{folder}': a checkpoint takes {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free. "
            "Free space, lower save_total_limit, or choose another output_dir"
        )


def refuse_non_finite(model: Any, when: str, safe: str) -> None:
    """Raises D2OError if a trained parameter is NaN or infinite. Waits for the device."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    norms = torch._foreach_norm([p.detach() for _, p in named], ord=float("inf"))
    finite = torch.stack([norm.float() for norm in norms]).isfinite().tolist()
    bad = [name for (name, _), fine in zip(named, finite, strict=True) if not fine]
    if bad:
        raise D2OError(
            f"{when}: {len(bad)} of {len(named)} weights are not finite, the first is {bad[0]}. They are not saved. "
            f"Lower learning_rate. {safe}"
        )


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

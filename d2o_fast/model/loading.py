"""Loads models, tokenizers and trained weights. Models have fp32 master weights."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import has_file

from d2o_fast.config import D2OConfig
from d2o_fast.errors import D2OError, shortened
from d2o_fast.model.adapters import adapter_base, put_adapter, read_adapter
from d2o_fast.model.parts import base_of, refuse_quantised
from d2o_fast.model.whole import (
    CONFIG,
    check_folder,
    loading,
    read_config,
    refuse_incomplete,
    refuse_not_finite,
    refuse_odd_files,
    refuse_odd_stops,
    refuse_other_form,
    refuse_other_head,
    weight_files,
)

#: No code of the model's own, no pickles; a tensor of another shape is reported with the others.
STRICT = {"trust_remote_code": False, "use_safetensors": True, "ignore_mismatched_sizes": True}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(config: D2OConfig, name: str | None = None, setting: str = "model_name_or_path") -> Any:
    """The causal language model ``name`` (default ``config.model_name_or_path``) with fp32 master weights.

    If ``name`` holds an adapter, returns a PeftModel: the trainable adapter on its base.

    Args:
        setting: the setting that error messages name.

    Raises:
        D2OError: no name is given, transformers cannot load it, or an adapter's base is an adapter.
    """
    name = _known(name or config.model_name_or_path, setting)
    base = _base_under(name, setting)
    if base is not None:
        setting = f"{setting} '{name}': its base_model_name_or_path"
        if _base_under(_known(base, setting), setting) is not None:
            raise D2OError(f"{setting} '{base}' is an adapter too; merge that one into its model first")
        return put_adapter(load_model(config, base, setting), name, trainable=True)
    options = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    what = f"{setting} '{name}'"
    if os.path.isdir(name):
        check_folder(Path(name), what)
    under = f"{what} with attn_implementation '{config.attn_implementation}'" if options else what
    with loading(under, "Give the folder or the hub name of a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **STRICT, **options
        )
        model, info = loaded
    refuse_incomplete(info, what)
    if os.path.isdir(name):
        refuse_other_head(model, Path(name), what)
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped and not options and model.config._attn_implementation == "sdpa":
        # sdpa has no softcap. Older versions of transformers run Gemma 2 with it nevertheless, without the cap.
        model.set_attn_implementation("eager")
    return model


def load_tokenizer(config: D2OConfig, name: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ``config.chat_template_path``, if given, replaces its chat template.

    An adapter without a tokenizer uses the one of its base.

    Raises:
        D2OError: it cannot be loaded, has no end-of-sequence token, or chat_template_path is not a file.
    """
    setting = "model_name_or_path"
    name = _known(name or config.model_name_or_path, setting)
    place = _tokenizer_place(name)
    if place is None and os.path.isdir(name):  # the folder may be no model at all
        base = _base_under(name, setting)
        _known(name if base is None else base, f"{setting} '{name}': its base_model_name_or_path")
        if base is None:
            read_config(Path(name), f"{setting} '{name}'")
    name = place or name
    what = f"the tokenizer of '{name}'"
    if os.path.isdir(name):
        refuse_odd_files(Path(name), what)
        if Path(name, CONFIG).exists():
            read_config(Path(name), f"model_name_or_path '{name}'")
        if not any(Path(name, file).is_file() for file in _TOKENIZER_FILES):
            raise D2OError(f"{what} is missing ({_TOKENIZER_FILES[0]}); write it there with its save_pretrained")
    with loading(what, "Copy its files again from their source"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise D2OError(f"{what} has no vocabulary; copy its files again from their source")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise D2OError(f"{what} has the model_max_length {tokenizer.model_max_length!r}, and a number is needed")
    if tokenizer.eos_token_id is None:
        raise D2OError(f"the tokenizer of '{name}' has no eos_token; responses could not end. Set eos_token in it")
    return with_template(tokenizer, config)


def with_template(tokenizer: PreTrainedTokenizerBase, config: D2OConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy with the chat template of ``config.chat_template_path``.

    Raises:
        D2OError: chat_template_path is not a file of text, or the template is no Jinja template.
    """
    path = config.chat_template_path
    if path is None:
        _refuse_bad_template(tokenizer, f"the chat template of '{tokenizer.name_or_path}'")
        return tokenizer
    if not os.path.isfile(path):
        raise D2OError(f"chat_template_path '{path}' is not a file")
    tokenizer = copy.deepcopy(tokenizer)
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise D2OError(f"chat_template_path '{path}' cannot be read as UTF-8: {error}") from error
    if not tokenizer.chat_template.strip():
        raise D2OError(f"chat_template_path '{path}' is empty")
    _refuse_bad_template(tokenizer, f"chat_template_path '{path}'")
    return tokenizer


def _refuse_bad_template(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    if tokenizer.chat_template is None:
        return
    if not isinstance(tokenizer.chat_template, str | dict):
        raise D2OError(f"{what} is {shortened(repr(tokenizer.chat_template))}; it must be a text")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise D2OError(
            f"{what} is no Jinja template: line {error.lineno}: {str(error.message).rstrip('.')}. Mend it"
        ) from error
    except Exception:  # it may refuse this message and take those of the data; the rows are checked one by one
        return


def has_tokenizer(name: str) -> bool:
    """Whether ``load_tokenizer`` finds a tokenizer in the folder, under the hub name or with the adapter's base."""
    return _tokenizer_place(os.path.expanduser(name)) is not None


def _tokenizer_place(name: str) -> str | None:
    try:
        for place in (name, adapter_base(name)):
            if place is not None and any(has_file(place, file) for file in _TOKENIZER_FILES):
                return place
    except D2OError:
        raise
    except (OSError, ValueError):  # no such name: loading the model reports it
        pass
    return None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns transformers' progress bars off inside. They would break up the bar of the training."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _base_under(name: str, setting: str) -> str | None:
    with loading(f"{setting} '{name}'", "Give a folder, or a name that the hub knows"):
        return adapter_base(name)


def _known(name: str, setting: str) -> str:
    if not name:
        raise D2OError(f"{setting} is not set; give a local folder or a name on the Hugging Face hub")
    with loading(f"{setting} {shortened(name)!r}", "Give a local folder or a name on the Hugging Face hub"):
        path = os.path.expanduser(name)
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.lexists(path)
        if looks_local and not os.path.isdir(path):
            raise D2OError(f"{setting} '{name}' is not a folder; give the folder that holds {CONFIG} and the weights")
    return path


def initial_model(config: D2OConfig, model: str | PreTrainedModel | Any) -> Any:
    """The model with fp32 master weights on the device, and with liger-kernel's parts if ``config`` asks for them.

    A model object is changed in place.

    Raises:
        D2OError: it cannot be loaded, is quantised, or liger-kernel cannot serve it here.
    """
    if isinstance(model, str):
        with quiet_transformers():
            model = load_model(config, model)
    elif model is base_of(model):
        refuse_other_form(model)
    base = base_of(model)
    if config.attn_implementation not in (None, base.config._attn_implementation):
        try:
            base.set_attn_implementation(config.attn_implementation)
        except (ValueError, ImportError) as error:
            raise D2OError(f"attn_implementation '{config.attn_implementation}' cannot be set: {error}") from error
    refuse_quantised(model, "the model")
    refuse_not_finite(model, f"the model '{base.config._name_or_path}'" if base.config._name_or_path else "the model")
    refuse_odd_stops(getattr(base, "generation_config", None), "the model's generation_config")
    model = model.float().to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if config.use_liger_kernel:
        _apply_liger(base)
    return model


def _apply_liger(model: PreTrainedModel) -> None:
    if model.device.type != "cuda":
        raise D2OError("use_liger_kernel needs a CUDA device, and none is here; leave it out")
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        raise D2OError(f"use_liger_kernel: {error}; pip install 'd2o-fast[gpu]'") from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise D2OError(f"use_liger_kernel: liger-kernel has nothing for models of type '{kind}'; leave it out")
    # The head and its loss are ours.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)


def load_weights(model: Any, folder: Path) -> None:
    """Reads the weights that ``save_pretrained`` wrote to ``folder`` into ``model``, in place.

    Raises:
        D2OError: they cannot be read or belong to another model.
    """
    what = f"{folder}: its weights"
    if hasattr(model, "peft_config"):
        (name,) = model.peft_config
        read_adapter(model, folder if name == "default" else folder / name, what)
    else:
        weight_files(folder, what)
        # from_pretrained, not the file itself: transformers may store weights under other names than it uses.
        with loading(what, "Resume from another checkpoint"), quiet_transformers():
            options = {"config": model.config, "dtype": torch.float32, "output_loading_info": True}
            saved, info = type(model).from_pretrained(folder, **options, **STRICT)
            refuse_incomplete(info, what)
            model.load_state_dict(saved.state_dict())
    refuse_not_finite(model, what)


def trained_model(config: D2OConfig, folder: str) -> Any:
    """The model that ``D2OTrainer`` wrote to ``folder``. An adapter goes on the initial model and replaces its own.

    Raises:
        D2OError: ``folder`` holds no trained model.
    """
    if not Path(folder, "adapter_config.json").exists():
        if Path(folder).is_dir() and not Path(folder, "config.json").exists():
            raise D2OError(f"'{folder}' holds no trained model; run `d2o train` first, or name it with --eval_model")
        return initial_model(config, folder)
    initial = config.model_name_or_path
    return put_adapter(initial_model(config, adapter_base(initial) or initial), folder)

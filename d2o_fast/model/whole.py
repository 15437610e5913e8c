"""Proof that a model is whole: its files before they are loaded, its tensors by name and shape, finite values.

Other libraries raise anything on a damaged file, or fill in random weights and go on. ``loading`` turns every exception
of theirs into one ``D2OError``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from d2o_fast.errors import D2OError, shortened

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
#: Tensors of weights that no causal language model uses: buffers of older versions, heads for other purposes.
UNUSED = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$|(^|\.)(v_head|mtp\w*)\.")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SPARE = 2**28  #: values that a small model may have beyond its weights, e.g. tables of positions and masks
_AGAIN = "Copy the file again from its source"
_OTHER_CONFIG = "The weights are damaged or belong to another configuration: copy the whole folder again"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_OWN_CODE = "trust_remote_code"  # transformers names this option if a model needs its own code


@contextlib.contextmanager
def loading(what: str, fix: str, failed: str = "cannot be loaded") -> Iterator[None]:
    """Any exception inside becomes one D2OError: ``what`` ``failed``, the cause in one line, then ``fix``.

    Transformers' report of missing tensors is off inside: ``refuse_incomplete`` says the same.

    Raises:
        D2OError: something inside raised.
    """
    report = transformers_logging.get_logger("transformers.modeling_utils")
    silent = logging.Filter("nothing")
    report.addFilter(silent)
    try:
        yield
    except (D2OError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        if isinstance(error, MemoryError) or "can't start new thread" in str(error):
            raise D2OError(f"{what} {failed}: not enough memory here ({cause(error)})") from error
        if _OWN_CODE in str(error):
            raise D2OError(_own_code(what)) from error
        raise D2OError(f"{what} {failed}: {cause(error)}. {fix}") from error
    finally:
        report.removeFilter(silent)


def cause(error: BaseException) -> str:
    """The message of an exception in one printable line, with the type if the message alone says too little."""
    if isinstance(error, KeyError):
        return f"it names {shortened(repr(error.args[0]), 200)}, which is not known"
    said = str(error).partition("Exception raised from")[0]  # torch adds its C++ stack
    text = "".join(c if c.isprintable() else " " for c in said)
    text = shortened(text, 300, one_line=True).rstrip(".")
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__} {text}".rstrip()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        D2OError: the file cannot be read or holds something else. The message begins with ``what``.
    """
    with loading(f"{what}: {path.name}", _AGAIN):
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {shortened(repr(found))} and not an object")
        return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)  # Mamba's configurations hold Infinity


def refuse_odd_files(folder: Path, what: str) -> None:
    """Refuses a pipe, socket or device among the files of a folder: reading it could wait for ever.

    Raises:
        D2OError: such a file is there, or the folder cannot be read.
    """
    with loading(what, "Give a folder that can be read"):
        paths = sorted(folder.iterdir())
    for path in paths:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise D2OError(f"{what}: {path.name} is neither a file nor a folder; remove it")


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """The content of ``config.json``, which transformers can read.

    Raises:
        D2OError: the file is missing or damaged, or transformers does not know its model.
    """
    if not (folder / CONFIG).is_file():
        raise D2OError(f"{what} has no {CONFIG}; give the folder of a model, as save_pretrained writes it")
    config = read_json(folder / CONFIG, what)
    if "model_type" not in config and "auto_map" not in config:
        raise D2OError(f"{what}: {CONFIG} has no model_type. {_AGAIN}")
    with loading(f"{what}: {CONFIG}", _AGAIN):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name, value in config.items():
            if "drop" in name and isinstance(value, int | float) and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, and a share of 0 to 1 is needed")
    return config


def check_folder(folder: Path, what: str) -> None:
    """Checks the files of a model's folder before anything is built from them.

    Raises:
        D2OError: a file is missing or damaged; the weights are pickled or quantised; the configuration names code from
            a hub, or asks for more than the weights hold.
    """
    refuse_odd_files(folder, what)
    config = read_config(folder, what)
    attention = config.get("_attn_implementation") or config.get("attn_implementation")
    if isinstance(attention, str) and "/" in attention:
        raise D2OError(
            f"{what}: {CONFIG} asks for the attention '{shortened(attention)}', which is code from a hub. "
            "Remove attn_implementation there"
        )
    if config.get("quantization_config"):
        raise D2OError(f"{what} is quantised; D2O takes fp32 master weights (with LoRA too): load it unquantised")
    held = _held(folder, what)
    text = config.get("text_config")
    sizes = {**config, **(text if isinstance(text, dict) else {})}
    layers = max((sizes[name] for name in _LAYERS if _is_count(sizes.get(name))), default=0)
    if layers > len(held):
        raise D2OError(f"{what}: {CONFIG} asks for {layers} layers, but the weights hold {len(held)} tensors")
    _refuse_other_sizes(folder, held, what)
    _check_generation(folder, what)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _held(folder: Path, what: str) -> dict[str, tuple[str, int]]:
    """(type, number of values) of each tensor in the weights of ``folder``, from the headers of its files."""
    held: dict[str, tuple[str, int]] = {}
    for path in weight_files(folder, what):
        with loading(f"{what}: {path.name}", _AGAIN), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                part = file.get_slice(name)
                held[name] = part.get_dtype(), math.prod(part.get_shape())
    return held


def _refuse_other_sizes(folder: Path, held: dict[str, tuple[str, int]], what: str) -> None:
    """Builds the model without values, so that a wrong size is found before it takes memory."""
    with loading(f"{what}: {CONFIG}", _AGAIN), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    named = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else None
    if named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and named != type(model).__name__:
        raise D2OError(
            f"{what}: {CONFIG} has the architecture {named}, but its model_type '{config.model_type}' makes "
            f"{type(model).__name__}. {_AGAIN}"
        )
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    found = sum(count for _, count in held.values())
    if wanted > 2 * found + _SPARE:
        raise D2OError(f"{what}: {CONFIG} asks for {wanted} values, but the weights hold {found}. {_OTHER_CONFIG}")
    for name, _ in model.named_parameters():
        kind = held.get(name, ("F32", 0))[0]
        if kind not in _FLOATS:
            raise D2OError(f"{what}: {name} has the type {kind} in its weights; save the model unquantised")


def weight_files(folder: Path, what: str) -> list[Path]:
    """The safetensors files of the model in ``folder``.

    Raises:
        D2OError: there are none, the index is damaged or names a file that is missing; the weights are pickled.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise _no_weights(folder, what, WEIGHTS)
    places = read_json(folder / INDEX, what).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise D2OError(f"{what}: {INDEX} has no weight_map of names. {_AGAIN}")
    names = sorted(set(places.values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise D2OError(f"{what}: {INDEX} names {_some(missing)}, which is missing there; copy the whole folder again")
    return [folder / name for name in names]


def refuse_pickled(folder: Path, what: str) -> None:
    """Refuses the folder of an adapter without safetensors weights.

    Raises:
        D2OError: the weights are missing or pickled.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _no_weights(folder, what, ADAPTER_WEIGHTS)


def _no_weights(folder: Path, what: str, wanted: str) -> D2OError:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return D2OError(
            f"{what}: the folder holds pickled weights ({_some(pickled)}) and no {wanted}. A pickle can run code and "
            "is never loaded: load the model where you trust it and write it with save_pretrained, in safetensors"
        )
    return D2OError(f"{what} has no weights ({wanted}); give a folder as save_pretrained writes it")


def _check_generation(folder: Path, what: str) -> None:
    # transformers skips a damaged one in silence, and with it the tokens that end a response.
    path = folder / "generation_config.json"
    if not path.exists():
        return
    read_json(path, what)
    with loading(f"{what}: {path.name}", "Mend it, or remove it"):
        refuse_odd_stops(GenerationConfig.from_pretrained(folder), f"{what}: {path.name}")


def refuse_odd_stops(config: Any, what: str) -> None:
    """Refuses an ``eos_token_id`` that is no token id.

    Raises:
        D2OError: it is neither None, an id, nor a list of ids.
    """
    ids = getattr(config, "eos_token_id", None)
    for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if not _is_count(i) or i < 0:
            found = shortened(repr(ids))
            raise D2OError(f"{what}: eos_token_id is {found}; it must be a token id, a list of them, or absent")


def refuse_other_head(model: Any, folder: Path, what: str) -> None:
    """Refuses a folder whose configuration ties the head to the embedding while its files hold another head.

    Raises:
        D2OError: the model would be another one than the one that was saved.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    name, other = next(f"{name}.weight" for name, module in model.named_modules() if module is head), head.weight
    tied = type(model)._tied_weights_keys or {}
    if not any(name.endswith(key) for key in tied):
        return  # no version of transformers ties them (BigBirdPegasus)
    for file in folder.glob("*.safetensors"):  # versions of transformers differ in which of the two they load
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                other = opened.get_tensor(name)
    if not torch.equal(other.float(), embedding.weight.float()):
        raise D2OError(
            f"{what}: {CONFIG} says tie_word_embeddings, but its files hold a head '{name}' of its own. Set "
            "tie_word_embeddings to false, or copy the folder again from its source"
        )


def refuse_other_form(model: Any) -> None:
    """Refuses a model object that its own configuration does not describe: saved, it could not be loaded again.

    Raises:
        D2OError: the configuration makes other tensors, or ties the head where the model does not (or the reverse).
    """
    what = f"the model ({type(model).__name__})"
    failed = "cannot be made from its config"
    with loading(what, "Give a model that its class makes from its config", failed), torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    here, there = ({name: list(x.shape) for name, x in one.state_dict().items()} for one in (model, twin))
    odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if not odd and _is_tied(model) != _is_tied(twin):
        odd = ["the head (tie_word_embeddings)"]
    if odd:
        raise D2OError(
            f"{what} is not the one that its config describes, so the trained model could not be loaded again; they "
            f"differ in {_some(odd)}. Change model.config to match the model, or the model to match it"
        )


def _is_tied(model: Any) -> bool:
    return getattr(model.get_output_embeddings(), "weight", None) is model.get_input_embeddings().weight


def refuse_incomplete(info: Any, what: str) -> None:
    """Refuses a model of which transformers filled in tensors, or left some of the weights out.

    Args:
        info: the loading info of ``from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)``.

    Raises:
        D2OError: a tensor is missing, has another shape, or has no place in the model.
    """
    shapes = [f"{name} is {list(there)} and not {list(here)}" for name, there, here in sorted(info["mismatched_keys"])]
    refuse_difference(
        info["missing_keys"], [name for name in info["unexpected_keys"] if not UNUSED.search(name)], what, shapes
    )
    if info["error_msgs"]:
        raise D2OError(f"{what} cannot be loaded: {shortened(str(info['error_msgs'][0]), 300, one_line=True)}")


def refuse_difference(
    missing: Collection[str], unexpected: Collection[str], what: str, shapes: Collection[str] = ()
) -> None:
    """Refuses weights with other names or shapes than the model's.

    Raises:
        D2OError: any of the three is not empty.
    """
    if shapes:
        raise D2OError(f"{what} does not fit its weights: {_some(shapes)}. {_OTHER_CONFIG}")
    if missing:
        raise D2OError(f"{what} is not whole: its weights lack {_some(sorted(missing))}. {_OTHER_CONFIG}")
    if unexpected:
        raise D2OError(
            f"{what} is another model than its weights: they also hold {_some(sorted(unexpected))}. {_OTHER_CONFIG}"
        )


def refuse_not_finite(model: nn.Module, what: str) -> None:
    """Refuses weights of NaN or infinity. Reads each parameter once.

    Raises:
        D2OError: a parameter is not finite, or has no values (device "meta").
    """
    rotary = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    for name, parameter in (*model.named_parameters(), *rotary):
        if parameter.device.type == "meta":
            raise D2OError(f"{what}: {name} has no values (it is offloaded); load it without device_map")
        if parameter.numel() and parameter.is_floating_point():
            low, high = (bound.item() for bound in torch.aminmax(parameter.detach()))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise D2OError(
                    f"{what}: its weights are not finite ({name} holds NaN or infinity). It is damaged, or its "
                    "training diverged: take an earlier checkpoint"
                )


def _some(names: Collection[str]) -> str:
    first = ", ".join(shortened(name, 100) for name in list(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _own_code(what: str) -> str:
    return f"{what} needs code of its own, and d2o-fast never runs such code. Use a model that transformers knows"

"""The reference models, i.e. the denominators of D2O's log-ratios: pi_r- scores the anchors, pi_r+ the negatives.

Each is the initial model unless ``ref_model_neg`` or ``ref_model_pos`` names another. A named model only scores; the
initial model draws the anchors.

K anchors of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.anchors.scoring import reference_logps
from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example
from d2o_fast.errors import D2OError
from d2o_fast.forward.sharing import choose_sharing
from d2o_fast.model.adapters import adapter_base, initial_policy
from d2o_fast.model.identity import Identity, identity_of
from d2o_fast.model.limits import check_positions
from d2o_fast.model.loading import has_tokenizer, load_model, load_tokenizer, quiet_transformers
from d2o_fast.model.parts import decoder_of, pad_token_id, refuse_quantised, vocabulary_size
from d2o_fast.model.probes import refuse_unfit
from d2o_fast.model.whole import refuse_not_finite

SIDES = ("neg", "pos")
_NAMES = ("weights", "model_config", "adapter")  # the fingerprint's names for the fields of an Identity
_REF_NAMES = {side: (f"ref_{side}_weights", f"ref_{side}_config", f"ref_{side}_adapter") for side in SIDES}
_known: dict[Any, Identity] = {}  # identities of models that this process has loaded


def reference_names(config: D2OConfig) -> dict[str, str | None]:
    """The names of the models for "neg" and "pos"; None means the initial model."""
    return {side: name for side in SIDES for _, name in [_setting(config, side)]}


def describe_references(fingerprint: Mapping[str, Any], names: Mapping[str, str | None]) -> str:
    """The models that scored, in words.

    Args:
        fingerprint: the fingerprint of a store or of a window of refreshed anchors (``training/refresh.py``).
        names: ``reference_names`` of the settings that made it.
    """
    initial = "the initial model" + (" with the adapter it came with" if fingerprint["adapter"] else "")
    own = [fingerprint[name] for name in _NAMES]
    neg, pos = (
        initial
        if [fingerprint[name] for name in _REF_NAMES[side]] == own
        else f"{names[side]} (weights {fingerprint[_REF_NAMES[side][0]][:16]})"
        for side in SIDES
    )
    if "refreshed_at" in fingerprint:
        neg = f"the policy after step {fingerprint['refreshed_at']}"
    if neg == pos:
        return f"{neg}, for anchors and negatives alike"
    return f"{neg}, for anchors; {pos}, for negatives"


class References:
    """Both references. Each is loaded once, on demand, and freed with this object.

    Args:
        model: the initial model; ``adapters.initial_policy`` defines it for a PeftModel.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: D2OConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self._loaded: dict[str, tuple[Any, Identity]] = {}
        self._scorers: dict[Identity, _Reference] = {}

    def fingerprint(self) -> dict[str, str | None]:
        """Weights, configuration and adapter of the initial model, of "neg" and of "pos", by content.

        Raises:
            D2OError: a reference cannot be loaded, or its tokenizer differs from the initial model's.
        """
        for setting, name in {_setting(self.config, side) for side in SIDES}:
            if name is not None:
                self._refuse_other_tokenizer(setting, name)
        fields = dict(zip(_NAMES, self._initial, strict=True))
        for side in SIDES:
            fields |= zip(_REF_NAMES[side], self._identities[side], strict=True)
        return fields

    def score(self, examples: Sequence[Example]) -> list[list[float]]:
        """K + 1 log-probabilities of each example, fp32 sums in nats: log pi_r+ of the negative, log pi_r- of anchors.

        Raises:
            D2OError: a model cannot score, or its vocabulary lacks an id.
        """
        neg, pos = (self._scorer(side) for side in SIDES)
        if neg is pos:
            return neg.score(examples, examples)
        # Each side is scored alone; the first anchor takes the negative's place.
        anchors = [Example(e.prompt_ids, e.anchor_ids[0], e.anchor_ids[1:], []) for e in examples]
        negatives = [Example(e.prompt_ids, e.rejected_ids, [], []) for e in examples]
        scores = zip(pos.score(negatives, examples), neg.score(anchors, examples), strict=True)
        return [[*of_negative, *of_anchors] for of_negative, of_anchors in scores]

    def prepare(self, example: Example) -> None:
        """Makes both sides ready to score, and tries them on the prompt and the negative of ``example``.

        Raises:
            D2OError: a model cannot score.
        """
        for scorer in dict.fromkeys(map(self._scorer, SIDES)):
            scorer.probe(example)

    @cached_property
    def _initial(self) -> Identity:
        return identity_of(self.model)

    @cached_property
    def _identities(self) -> dict[str, Identity]:
        return {side: self._identity(*_setting(self.config, side)) for side in SIDES}

    def _identity(self, setting: str, name: str | None) -> Identity:
        if name is None:
            return self._initial
        key = _state_of(name)
        if key not in _known:
            _known[key] = self._load(setting, name)[1]
        return _known[key]

    def _load(self, setting: str, name: str) -> tuple[Any, Identity]:
        if name not in self._loaded:
            with quiet_transformers():
                model = load_model(self.config, name, setting).requires_grad_(False).eval()
            refuse_quantised(model, f"{setting} '{name}'")
            refuse_not_finite(model, f"{setting} '{name}'")
            self._loaded[name] = model, identity_of(model)
        return self._loaded[name]

    def _scorer(self, side: str) -> _Reference:
        identity = self._identities[side]
        if identity not in self._scorers:
            setting, name = _setting(self.config, side)
            model, what = self.model, "the initial model"
            if name is not None and identity != self._initial:
                model, found = self._load(setting, name)
                what = f"{setting} '{name}'"
                if found != identity:
                    raise D2OError(f"{what} has changed since this process read it first; start again")
                model.to(next(self.model.parameters()).device)
            elif name is not None:
                self._loaded.pop(name, None)  # a second copy of the initial model
            self._scorers[identity] = _Reference(model, self.config, pad_token_id(self.tokenizer), what)
        return self._scorers[identity]

    def _refuse_other_tokenizer(self, setting: str, name: str) -> None:
        if not has_tokenizer(name):
            return
        theirs, ours = (
            {number: token for token, number in tokenizer.get_vocab().items()}
            for tokenizer in (load_tokenizer(self.config, name), self.tokenizer)
        )
        differing = [i for i in sorted({*theirs, *ours}) if theirs.get(i) != ours.get(i)]
        if differing:
            i = differing[0]
            raise D2OError(
                f"{setting} '{name}': its tokenizer differs from the trained model's in {len(differing)} token ids, "
                f"the first is {i}: {theirs.get(i, 'nothing')!r} there, {ours.get(i, 'nothing')!r} here. A reference "
                "must read the same ids as the same text"
            )


def _setting(config: D2OConfig, side: str) -> tuple[str, str | None]:
    """(the setting of ``side``, its value)"""
    setting = f"ref_model_{side}"
    return setting, getattr(config, setting)


def _state_of(name: str) -> Any:
    """A key that differs after any change of a folder's files or of its adapter's base; a hub name is its own key."""
    folder = Path(name).expanduser()
    base = adapter_base(str(folder)) if folder.is_dir() else None
    return _files_of(name), None if base is None else _files_of(base)  # a base that is an adapter is not loaded


def _files_of(name: str) -> Any:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    files = [path for path in sorted(folder.iterdir()) if path.exists()]  # a symlink may name nothing
    return folder.resolve(), *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


class _Reference:
    def __init__(self, model: Any, config: D2OConfig, pad: int, what: str) -> None:
        self.model, self.config, self.pad, self.what = model, config, pad, what
        try:
            check_positions(model, config)
            with initial_policy(model):
                self.decoder = decoder_of(model)
        except D2OError as error:
            raise D2OError(f"{what} cannot score: {error}") from error
        self.shared: bool | None = None  # unknown until there are responses to try it on

    def probe(self, example: Example) -> None:
        self._refuse_unknown_ids([example])
        try:
            with initial_policy(self.model):
                refuse_unfit(self.model, self.decoder, [*example.prompt_ids, *example.rejected_ids], self.pad)
        except D2OError as error:
            raise D2OError(f"{self.what} cannot score: {error}") from error

    def score(self, part: Sequence[Example], examples: Sequence[Example]) -> list[list[float]]:
        """Scores of the responses in ``part``; whole ``examples`` show whether prompts can be shared."""
        self._refuse_unknown_ids(part)
        with initial_policy(self.model):
            if self.shared is None:
                self.shared = choose_sharing(self.model, self.decoder, examples, self.config, self.pad).on
            return reference_logps(self.decoder, self.model, part, self.config, self.pad, self.shared)

    def _refuse_unknown_ids(self, examples: Sequence[Example]) -> None:
        size = vocabulary_size(self.model)
        largest = max(token for e in examples for ids in (e.prompt_ids, *e.responses()) for token in ids)
        if largest >= size:
            raise D2OError(
                f"{self.what} has a vocabulary of {size} tokens, but the token id {largest} is in use: a reference "
                "must know every token of the trained model's tokenizer"
            )

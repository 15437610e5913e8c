"""The training loop: packed prompts -> hidden states of a Hugging Face model -> the fused loss -> AdamW.

One step takes ``per_device_train_batch_size * gradient_accumulation_steps`` prompts, each with its negative and its K
anchors. A step does not wait for the device: metrics are summed there and read every ``logging_steps``.

Shapes: N response tokens, H hidden, S responses, G prompts, K anchors of one prompt.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from d2o_fast.anchors.build import open_store
from d2o_fast.anchors.references import describe_references, reference_names
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.config import D2OConfig, refuse_idle
from d2o_fast.data.on_disk import subset
from d2o_fast.data.row import Example, Row
from d2o_fast.errors import D2OError
from d2o_fast.files import locked, make_folder, replace_files
from d2o_fast.forward.batch import step_batches
from d2o_fast.forward.sharing import Sharing, choose_sharing
from d2o_fast.model.adapters import add_adapter
from d2o_fast.model.dropout import apply_dropout_setting
from d2o_fast.model.limits import check_positions, leave_balancing_out
from d2o_fast.model.loading import initial_model, load_tokenizer, load_weights, with_template
from d2o_fast.model.parts import base_of, decoder_of, head_of, pad_token_id, tokenizer_of, unwrapped
from d2o_fast.training import checkpoint as ckpt
from d2o_fast.training import output, unchanged
from d2o_fast.training.ending import Signals, Stopped, explained
from d2o_fast.training.evaluate import evaluate_model, load_judge
from d2o_fast.training.given import about, name_of, refuse_many_processes, refuse_wrong_objects, rows_of
from d2o_fast.training.metrics import MetricLog, PromptMeans, TokenRate
from d2o_fast.training.model_card import code, model_card, public_path
from d2o_fast.training.order import PromptOrder
from d2o_fast.training.refresh import RefreshedAnchors, Refresher
from d2o_fast.training.step import adamw, batch_loss, schedule
from d2o_fast.training.watch import Watch

logger = logging.getLogger("d2o_fast")

Callback = Callable[["D2OTrainer", str, dict[str, float]], None]


class TrainResult(NamedTuple):
    """The result of ``D2OTrainer.train``: optimizer steps done, and the last metrics of training and evaluation."""

    global_step: int
    metrics: dict[str, float]


class Progress(NamedTuple):
    """The state between two steps, beside weights and moments: a checkpoint holds it."""

    state: ckpt.TrainerState
    sums: torch.Tensor
    rng: dict[str, Any]


class D2OTrainer:
    """Trains a causal language model away from its negatives while its own anchors hold it in place.

    Args:
        model: a local folder or hub name (of a model or an adapter), a model of transformers or a PeftModel. Its
            weights become fp32. In its initial state it draws the anchors, and scores unless ``args`` names references.
        args: all settings.
        train_dataset: negatives as a list of dicts or ``Row`` or a ``datasets.Dataset`` (columns: ``data/formats.py``);
            their anchors are drawn and scored before training, under ``args.anchors_dir``. Or an ``AnchorStore``.
        eval_dataset: held-out data in the same forms.
        processing_class: the tokenizer; the model folder's if None.
        peft_config: a LoraConfig; if None and ``args.use_peft``, it is made from ``args.lora_*``.
        callbacks: functions ``callback(trainer, event, metrics)``, called after each "log", "evaluate", "refresh",
            "save" and "train_end".
    """

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: D2OConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        refuse_many_processes()
        refuse_wrong_objects(args, train_dataset, peft_config, callbacks)
        data = [each for each in (train_dataset, eval_dataset) if each is not None]
        stores = [each.folder for each in data if isinstance(each, AnchorStore)]
        refuse_idle(
            args, eval_dataset is not None, peft_config is not None, stores if len(stores) == len(data) else None
        )
        load_judge(args)  # a wrong name is known before the first draw
        model = unwrapped(model)
        self.args = dataclasses.replace(args, model_name_or_path=name_of(model, args))
        given = None if processing_class is None else tokenizer_of(processing_class)
        self.tokenizer = load_tokenizer(self.args) if given is None else with_template(given, self.args)
        self.model = add_adapter(initial_model(self.args, model), self.args, peft_config)
        apply_dropout_setting(self.model, self.args)
        self.device = self.model.device
        name = self.args.model_name_or_path
        with about(f"the model '{name}'" if name else "the model"):
            check_positions(self.model, self.args)
            leave_balancing_out(self.model)
            self.head, self.decoder = head_of(self.model), decoder_of(self.model)
        self.pad = pad_token_id(self.tokenizer)
        self.datasets = {
            "train": rows_of(train_dataset, "train_dataset"),
            "eval": rows_of(eval_dataset, "eval_dataset"),
        }
        self.stores: dict[str, AnchorStore] = {}
        self.rows: dict[str, Sequence[Row]] = {}
        self.examples: dict[str, Sequence[Example]] = {}
        self.callbacks = list(callbacks or [])
        self.state = ckpt.TrainerState(version=ckpt.VERSION, config=dataclasses.asdict(self.args))
        self.signals = Signals()  #: those that came during ``train``
        self.loss_path: str | None = None  #: the path that computed the loss: "torch" or "triton"
        self.sharing = Sharing(False, "not run")  #: whether prompts are shared, and which attention runs
        self.eval_shared: bool | None = None  #: the same in evaluation, without dropout; None before the first one
        self.window: RefreshedAnchors | None = None  #: the current window's anchors; None: the store's
        # ``train`` sets these before the first step:
        self.order: PromptOrder  #: the prompts of each step
        self.parameters: list[torch.nn.Parameter]  #: all parameters that require a gradient
        self.optimizer: torch.optim.Optimizer
        self.refresher: Refresher  #: only with ``args.refresh_every``
        self.means: PromptMeans  #: sums since the last log line
        self.log: MetricLog
        self.watch: Watch
        self.bad_step: torch.Tensor  #: scalar: the first step whose loss or gradient is not finite, or -1
        self.bad_steps: torch.Tensor  #: scalar: the number of such steps
        self.good: Progress | None = None  #: the state of the weights as they are; None while a step changes them
        self.changed = False  #: whether a step changed the weights
        self.card_data: dict[str, str] = {}  #: the data in words, read from the stores before the first step

    # --- Training --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainResult:
        """Trains to the end and writes the model, its card and the settings into ``args.output_dir``.

        The global random generators keep their states. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and the like end the run after
        the step under way, with a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, "latest" / True, or "auto";
                ``args.resume_from_checkpoint`` if None. The run continues as if it had never stopped.

        Raises:
            D2OError: ``output_dir`` holds a run, or another process trains in it; a checkpoint or store does not fit; a
                loss or a weight is not finite; the disk or the memory is full.
            Stopped: a signal came; its ``code`` is 128 + the signal's number.
        """
        resume = resume_from_checkpoint or self.args.resume_from_checkpoint
        folder = Path(self.args.output_dir)
        self.place = "before the first step"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder, "training"), Signals() as self.signals:
                self._train(ckpt.find_checkpoint(folder, resume))
        except Stopped as stop:
            logger.warning("%s: stopped %s. %s", stop.name, self.place, ckpt.safe(folder))
            raise
        except Exception as error:
            told = explained(error, f"output_dir '{folder}', {self.place}", ckpt.safe(folder))
            if told is None:
                raise
            raise told from error
        self._call("train_end", self.state.metrics)
        return TrainResult(self.state.global_step, self.state.metrics)

    def _train(self, path: Path | None) -> None:
        if path is None and self.changed:
            raise D2OError(
                "train: an earlier call has changed this trainer's model, so the run would not start from the initial "
                "one. Make a new D2OTrainer, or resume from a checkpoint"
            )
        output.try_saving(self.model, self.tokenizer, self.args, fresh=path is None)
        self.state, self.window = ckpt.TrainerState(version=ckpt.VERSION, config=dataclasses.asdict(self.args)), None
        if path is not None:
            self.state = ckpt.load_state(path)
            unchanged.check_unchanged(path, self.state, self.args)
        with self.signals.at_once():
            for name in self.datasets:
                self._prepare(name, resumed=path)
        if path is not None:
            self._check_length(path)
            self.state.config = dataclasses.asdict(self.args)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self._begin(path)
            try:
                self._run()
            except BaseException:
                self._save_good()
                raise
            finally:
                self.log.close()
                self.model.eval()

    def _begin(self, path: Path | None) -> None:
        args, state = self.args, self.state
        torch.manual_seed(args.seed)
        self.means = PromptMeans(self.device)
        self.bad_step = torch.full((), -1, device=self.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.model, args)
        self.optimizer.zero_grad()  # of an earlier call that failed in a step
        trained, environment = unchanged.describe_trained(self.model), unchanged.environment(self.model, args)
        if path is not None:
            unchanged.check_trained(path, state, trained)
            unchanged.warn_of_rounding(path, state.environment, environment)
            load_weights(self.model, path)
            self.means.sums.copy_(ckpt.load_tensors(path, self.optimizer))
        self.bad_steps = torch.full((), state.bad_steps, device=self.device)
        state.trained, state.environment = trained, environment
        self.card_data = {name: self._described(name) for name in self.stores}
        first = [self.examples["train"][i] for i in self.order.prompts_of(state.global_step)[:1]]
        if first:
            self.sharing = choose_sharing(self.model, self.decoder, first, args, self.pad, training=True)
            if path is not None:
                unchanged.check_sharing(path, state, self.sharing)
            state.shared = self.sharing.on
            self._prepare_refresh(path)
        if args.gradient_checkpointing:
            base = base_of(self.model)  # transformers will remove the second, older name
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.model.train()
        self.log = MetricLog(args, state.global_step, self.order.num_steps, state.log)
        if state.version == 1:  # which evaluated before it saved
            state.version, state.evaluated = ckpt.VERSION, state.global_step
        self._note_progress()

    def _run(self) -> None:
        """The loop. Every state of the run that is saved is one between two steps."""
        state, last = self.state, self.order.num_steps
        if self._evaluates(state.global_step) and state.global_step < last:
            self._evaluate_and_log()
        rate = TokenRate()
        while state.global_step < last:
            self.place = f"after step {state.global_step} of {last}"
            self.signals.check()
            self._refresh(rate)
            grad_norm, lr, tokens = self._step()
            self._note_progress()
            rate.tokens += tokens
            self._after_step(grad_norm, lr, rate)
        self.place = f"after the last step, {last}"
        self.save_model(self.args.output_dir)
        if self._evaluates(last):
            self._evaluate_and_log()
            self._save_card(Path(self.args.output_dir))

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation after ``step`` steps is due and not done."""
        due = step == self.order.num_steps or (self.args.eval_steps > 0 and step % self.args.eval_steps == 0)
        return due and bool(self.examples["eval"]) and self.state.evaluated != step

    def _note_progress(self) -> None:
        """Keeps the state as it is between two steps. It does not wait for the device."""
        self.state.log = self.log.position()
        state = dataclasses.replace(self.state, metrics=dict(self.state.metrics), digests=dict(self.state.digests))
        self.good = Progress(state, self.means.sums.clone(), ckpt.rng_state())

    def _check_length(self, path: Path) -> None:
        old = {name: self.state.config[name] for name in ("max_steps", "num_train_epochs")}
        old["max_steps"] = old["max_steps"] or -1  # older versions wrote 0
        before = PromptOrder(dataclasses.replace(self.args, **old), self.order.count).num_steps
        step = self.state.global_step
        in_window = self.order.window_of(step) not in (0, step)
        unchanged.check_length(path, self.state, before, self.order.num_steps, in_window)

    def _step(self) -> tuple[torch.Tensor, float, int]:
        """One update. Returns (gradient norm before clipping, learning rate, tokens) without waiting for the device."""
        args, state = self.args, self.state
        examples = [self._example(i) for i in self.order.prompts_of(state.global_step)]
        steps = self.order.num_steps
        lr = args.learning_rate * schedule(state.global_step, steps, args.lr_scheduler_type, args.warmup(steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        sums = self.means.sums.clone()
        size, budget = args.per_device_train_batch_size, args.tokens_per_micro_batch
        for micro in step_batches(examples, size, budget, self.sharing.on):
            out, layout = batch_loss(
                self.decoder, self.head, micro, self.pad, args, num_prompts=len(examples), shared=self.sharing.on
            )
            out.loss.backward()
            self.means.add(out, layout, len(examples))
            finite &= out.loss.detach().isfinite()
        # max_grad_norm = 0 means no clipping; the norm is still reported.
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm or math.inf)
        bad = ~(finite & grad_norm.isfinite())
        self.good, self.changed = None, True
        self.bad_step = torch.where((self.bad_step < 0) & bad, state.global_step, self.bad_step)
        self.bad_steps += bad
        if args.on_bad_step == "skip":
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # AdamW then leaves weights and moments, without a host sync
            self.means.sums = torch.where(bad, sums, self.means.sums)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss_path = out.path
        tokens = sum(example.num_tokens() for example in examples)
        state.global_step += 1
        state.num_tokens += tokens
        state.epoch = self.order.epoch_of(state.global_step)
        return grad_norm, lr, tokens

    def _after_step(self, grad_norm: torch.Tensor, lr: float, rate: TokenRate) -> None:
        args, step, last = self.args, self.state.global_step, self.state.global_step == self.order.num_steps
        metrics: dict[str, float] = {}
        if step % args.logging_steps == 0 or last:
            self._refuse_bad_steps()
            metrics = {
                **self.means.read(),
                "grad_norm": grad_norm.item(),
                "learning_rate": lr,
                "epoch": self.state.epoch,
                "num_tokens": self.state.num_tokens,
                "tokens_per_second": rate.read(),
            }
            if args.on_bad_step == "skip":
                metrics["bad_steps"] = self.state.bad_steps
            self.means.reset()
            self._write(metrics)
            self.watch.log(step, metrics)
        self._note_progress()
        if metrics:
            self._call("log", metrics)
        save = last or step % args.save_steps == 0
        evaluate = self._evaluates(step) and not last
        if save or evaluate:
            rate.pause()
            if save:
                self._save_checkpoint()
            if evaluate:
                self._evaluate_and_log()
            rate.go()
        self.log.tick()

    def _refuse_bad_steps(self) -> None:
        """Raises D2OError if a step was not finite, or too many were skipped. Waits for the device.

        Called before any log, evaluation or save.
        """
        step, args = int(self.bad_step.item()), self.args
        self.state.bad_steps = int(self.bad_steps.item())
        if step < 0:
            return
        prompts = ", ".join(self._source(i) for i in self.order.prompts_of(step)[:4])
        found = f"step {step + 1}: the loss or its gradient is not finite. Its prompts: {prompts}, ..."
        advice = f"Lower learning_rate, or look at these prompts. {ckpt.safe(args.output_dir)}"
        if args.on_bad_step == "stop":
            self.good = None
            raise D2OError(f"{found} No checkpoint was written since. {advice}")
        logger.warning("%s It was left out (on_bad_step 'skip'; %d so far)", found, self.state.bad_steps)
        self.bad_step.fill_(-1)
        if self.state.bad_steps > args.max_bad_steps:
            self._note_progress()
            raise D2OError(f"{self.state.bad_steps} steps were skipped, more than max_bad_steps. {found} {advice}")

    def _refuse_non_finite(self, when: str) -> None:
        """Raises D2OError if a weight is not finite. Waits for the device."""
        good, self.good = self.good, None
        output.refuse_non_finite(self.model, when, ckpt.safe(self.args.output_dir))
        self.good = good

    # --- Refreshed anchors -----------------------------------------------------------------------------------------

    def _example(self, i: int) -> Example:
        fresh = self.window is not None and i in self.window
        return self.window.example(i) if fresh else self.examples["train"][i]  # type: ignore[union-attr]

    def _prepare_refresh(self, path: Path | None) -> None:
        """Removes the windows of earlier runs, and loads the one that the checkpoint at ``path`` is in."""
        if not self.args.refresh_every:
            return
        examples, rows = self.examples["train"], self.rows["train"]
        shared = self._evaluates_shared(examples)
        store = self.stores["train"]
        self.refresher = Refresher(
            self.model, self.decoder, self.tokenizer, self.args, store, rows, examples, self.order, shared
        )
        step = self.state.global_step
        start = self.order.window_of(step)
        self._keep_windows()
        if path is None or not 0 < start < step < self.order.num_steps:
            return
        self.window = self.refresher.load(start)
        unchanged.check_window(path, self.state, self.window.digest)

    def _keep_windows(self) -> None:
        """Keeps the windows that the checkpoints are in, for each of them may be continued."""
        steps = map(ckpt.step_of, ckpt.checkpoints(self.args.output_dir))
        self.refresher.keep(self.order.window_of(step) for step in steps if self.order.window_of(step) < step)

    def _refresh(self, rate: TokenRate) -> None:
        """Draws anchors if the next step begins a window."""
        step = self.state.global_step
        if not step or self.order.window_of(step) != step:
            return
        self._refuse_bad_steps()
        self._refuse_non_finite(f"after step {step}")
        rate.pause()
        started = time.perf_counter()
        with self.signals.at_once():
            self.window = self.refresher.draw(step)
        self.state.window = self.window.digest
        # Logged under the next step: a run resumed here draws again, and logs it again.
        metrics = {**self.window.metrics(), "refresh/seconds": time.perf_counter() - started}
        self._write(metrics, step + 1)
        self._call("refresh", metrics)
        rate.go()

    # --- Data ------------------------------------------------------------------------------------------------------

    def _prepare(self, name: str, resumed: Path | None = None) -> None:
        data = self.datasets[name]
        if name not in self.examples and data is not None:
            store = open_store(self.model, self.tokenizer, data, self.args, name, may_build=resumed is None)
            self.stores[name], self.examples[name] = store, store.examples()
            rows = store.rows() if isinstance(data, AnchorStore) else data
            # Held-out prompts without anchors can still be judged.
            self.rows[name] = rows if name == "eval" else subset(rows, store.usable)
        self.examples.setdefault(name, [])
        if name == "train":
            self.order = PromptOrder(self.args, len(self.examples[name]))
        if data is None:
            return
        if resumed is not None:
            unchanged.check_digest(resumed, self.state, name, self.stores[name].digest, self.stores[name].folder)
        self.state.digests[name] = self.stores[name].digest

    def _source(self, i: int) -> str:
        return f"{self.rows['train'][i].source}, row {self.rows['train'][i].index}"

    # --- Evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Loss and rewards on ``eval_dataset``, and ``eval_judge/...`` if ``args.judge`` is set.

        Raises:
            D2OError: there is no eval_dataset.
        """
        return self._evaluate()[0]

    def _evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        self._prepare("eval")
        if not self.examples["eval"]:
            raise D2OError("there is nothing to evaluate on: give eval_dataset, eval_dataset_name or eval_fraction")
        examples = self.examples["eval"]
        shared = self._evaluates_shared(examples)
        rows = self.rows["eval"]
        return evaluate_model(self.model, self.tokenizer, examples, rows, self.args, shared, self.decoder)

    def _evaluates_shared(self, examples: Sequence[Example]) -> bool:
        if self.eval_shared is None:
            self.eval_shared = choose_sharing(self.model, self.decoder, examples, self.args, self.pad).on
        return self.eval_shared

    def _evaluate_and_log(self) -> None:
        with self.signals.at_once():
            metrics, samples = self._evaluate()
        metrics |= {"epoch": self.state.epoch}
        self._write(metrics)
        self.watch.evaluation(self.state.global_step, metrics)
        self.watch.responses(self.state.global_step, samples)
        self.state.evaluated = self.state.global_step
        self._note_progress()
        self._call("evaluate", metrics)

    def _write(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.log.write(self.state.global_step if step is None else step, metrics)
        self.state.metrics |= metrics

    def _call(self, event: str, metrics: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback(self, event, metrics)

    # --- Files -----------------------------------------------------------------------------------------------------

    def save_model(self, folder: str | Path) -> None:
        """Writes weights in fp32 (only the adapter of a PeftModel) and tokenizer, then model card and settings.

        Every file is written elsewhere first, then moved into place whole. Before ``train`` there is no card.

        Raises:
            D2OError: a weight is not finite; the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        make_folder(folder)
        self._refuse_non_finite("the trained model")
        with replace_files(folder) as temporary:
            output.save_weights(self.model, self.tokenizer, temporary)
        if self.card_data:
            self._save_card(folder)

    def _save_card(self, folder: Path) -> None:
        ran = self.loss_path or "not run", self.sharing.text
        names = {side: name and code(public_path(name)) for side, name in reference_names(self.args).items()}
        references = describe_references(self.stores["train"].fingerprint, names)
        is_adapter = not isinstance(self.model, PreTrainedModel)
        output.save_card(
            model_card(self.args, self.state, self.card_data, is_adapter, *ran, references), self.args, folder
        )

    def _described(self, name: str) -> str:
        store, sources, anchors, tokens = self.stores[name], dict[str, None](), 0, 0
        for record in store.records("source", "anchors_tokens"):
            if record["anchors_tokens"]:
                sources[code(public_path(record["source"]))] = None
                anchors += len(record["anchors_tokens"])
                tokens += sum(record["anchors_tokens"])
        if name == "train":
            self.watch = Watch(self.args, tokens / anchors)
        return f"{', '.join(sources)}: {len(store.usable)} negatives, {anchors} anchors (store {store.digest[:16]})"

    def _save_checkpoint(self) -> None:
        """Saves the state between two steps, unless that is saved already.

        Raises:
            D2OError: a weight is not finite; the disk is full.
        """
        good, out = self.good, Path(self.args.output_dir)
        assert good is not None, "a checkpoint in the middle of a step"
        step = good.state.global_step
        if step in map(ckpt.step_of, ckpt.checkpoints(out)):
            return
        self.good = None  # a failure here is not saved either
        self._refuse_bad_steps()
        good.state.bad_steps = self.state.bad_steps
        self._refuse_non_finite(f"after step {step}")
        output.require_space(self.model, out)
        self.log.sync()
        extra = {"sums": good.sums[:-1].cpu(), "num_prompts": int(good.sums[-1].item())}

        def save(folder: Path) -> None:
            output.save_weights(self.model, self.tokenizer, folder)

        ckpt.save_checkpoint(out, good.state, save, self.optimizer, good.rng, extra, self.args.save_total_limit)
        self.good = good
        if self.args.refresh_every:
            self._keep_windows()
        self._call("save", {})

    def _save_good(self) -> None:
        """Saves the state before a signal or an error, if the weights are whole."""
        if self.good is None or not self.good.state.global_step:
            return
        self.optimizer.zero_grad()
        try:
            self._save_checkpoint()
        except Exception as error:
            saved = self.good is not None and "a checkpoint was written, then a callback failed"
            logger.warning("%s at the end: %s", saved or "no checkpoint was written", error)

"""Train a student from cached targets: a ``transformers.Trainer`` whose loss, data and evaluation come from the cache.

The loss of an optimizer step is

    sum over its target positions of (clm_weight * CLM + weight * DIV, for each divergence) / number of those positions,

the sum and the number taken over all micro-batches and all devices. How rows are cut into micro-batches,
how much padding they carry and which device sees them therefore leaves no trace in it. beta(X) is a
property of a document's part within a row, and rows are never split, so TAD has no trace of it either; RS-KD draws for
each row by itself. ATKD alone has: what is hard is decided among the positions of one micro-batch.

Where the student's head is a linear layer, the loss is fused with it and its logits never exist as a whole, in training
or in evaluation (``fused_loss``). Otherwise all logits of the target positions are made, and the introduction says so.

`evaluate` measures held-out rows (see ``metrics``) instead of the loss. Both are logged against
``positions_seen``, the target positions trained on so far, which is what students of different losses and
batch sizes have in common.

Legend: B lines, L their length, T target positions, D hidden width, V vocabulary, W width of the head, P parts.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from tailcache.storage.errors import ConfigError
from tailcache.trainers.adapters import check_mergeable, save_merged
from tailcache.trainers.arguments import training_arguments
from tailcache.trainers.batches import CacheRows, Layout, block_rows_of, collate, collate_block, teacher_terms
from tailcache.trainers.checkpoints import PortableTrainer
from tailcache.trainers.forward import HeadSeat, check_documents_kept_apart, default_layout, target_logits
from tailcache.trainers.fused_loss import Mode
from tailcache.trainers.hub import push
from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.loader import CacheLoader
from tailcache.trainers.metrics import HeldOutSums, of_hidden, of_logits
from tailcache.trainers.mixture_metrics import held_out_kl_is, held_out_names, metrics_of_batch
from tailcache.trainers.mixture_weights import MixtureWeights, weighted_collate
from tailcache.trainers.objective import Objective
from tailcache.trainers.progress import Reporter, quiet_progress
from tailcache.trainers.projection import attach_projection, load_projection, save_projection, without_projection
from tailcache.trainers.records import write_record
from tailcache.trainers.student_head import find_linear_head

if TYPE_CHECKING:
    from tailcache.storage.several import AnyTeacher
    from tailcache.trainers.live import LiveTeacher
    from tailcache.trainers.terms import TeacherTerms

__all__ = ["DistillTrainer", "training_arguments"]

PROBE_ROWS = 64


class DistillTrainer(PortableTrainer):
    """A ``Trainer`` over one teacher of a cache.

    Everything ``Trainer`` can do (accumulation, mixed precision, DDP and FSDP, schedules, checkpoints) it
    does.
    """

    # What compute_loss returns is already a share of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    objective: Objective
    teacher: AnyTeacher

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        teacher: AnyTeacher,
        objective: Objective,
        mixture_weights: MixtureWeights | None = None,
        layout: Layout | None = None,
        head_mode: Mode = "one-pass",
        train_rows: NDArray[np.int64] | None = None,
        held_out_rows: NDArray[np.int64] | None = None,
        record: dict[str, Any] | None = None,
        workers: int = 0,
        data_state: dict[str, Any] | None = None,
        live: LiveTeacher | None = None,
        merge_adapters: bool = False,
        **kwargs: Any,
    ) -> None:
        """Set up training; nothing is trained yet.

        Args:
          model: the student, checked against the corpus (see ``student.build_student``).
          args: see ``training_arguments``.
          teacher: an open teacher of a cache, or several (``storage.several.Teachers``).
          objective: the loss.
          mixture_weights: of several teachers; by default equal ones.
          layout: how rows become lines; by default what the model's attention needs.
          head_mode: how the head is fused with the loss, see ``fused_loss``.
          train_rows: corpus rows to train on, ascending; by default all that are not held out.
          held_out_rows: corpus rows to evaluate on; by default all that are held out.
          record: what to write to tailcache.json beside the weights, apart from steps and positions.
          workers: processes that read the cache; without any, threads of this one do.
          data_state: where in the data to go on, for a run that is resumed: ``CacheLoader.state_dict``, or only the
            ``step``, for a run that was begun before checkpoints said it.
          live: a teacher that runs beside the student and gives the targets to train on, in place of the cache; the
            cache's are for evaluation alone.
          merge_adapters: save a student with adapters (a ``PeftModel``) as a plain checkpoint; by default the adapters
            alone are saved. Checkpoints to resume from always hold the adapters alone.
          **kwargs: further arguments of ``Trainer``.

        Raises:
          ConfigError: there is nothing to train on, or several GPUs are visible to one process.
          StudentError: the student lets packed documents see one another, or its hidden states cannot be compared.
        """
        if args.n_gpu > 1:
            raise ConfigError(
                f"device: {args.n_gpu} GPUs are visible to one process; start one process per GPU with "
                f"`torchrun --nproc-per-node {args.n_gpu} -m tailcache.scripts.cli train ...`, or choose one GPU with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        self.teacher = teacher
        self.live = live
        self.objective = objective
        self.layout: Layout = layout or default_layout(model)
        self.mixture_weights = MixtureWeights.for_teacher(teacher, mixture_weights)
        self.record = record or {}
        self.positions_seen = 0
        corpus = teacher.corpus
        rows = teacher.train_rows() if train_rows is None else np.sort(train_rows)
        held_out = teacher.held_out_rows() if held_out_rows is None else np.sort(held_out_rows)
        if len(rows) == 0:
            raise ConfigError(f"cache: {corpus.cache_place} has no row to train on; all {len(held_out)} are held out")
        self.train_rows, self._workers, self._data_state = rows, workers, data_state
        self.held_out = CacheRows(teacher, held_out)
        if len(held_out) == 0:
            args.eval_strategy = IntervalStrategy.NO
        use_cache = getattr(model.config, "use_cache", True)
        super().__init__(
            model=model,
            args=args,
            data_collator=weighted_collate(collate, self.layout, self.mixture_weights),
            eval_dataset=self.held_out,
            **kwargs,
        )
        model.config.use_cache = use_cache  # Trainer turns it off for good, and into the checkpoint
        self.model_accepts_loss_kwargs = True  # older releases ask this instead of loss_is_scaled_for_ga
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self._seat_trackers()
        self.reporter = Reporter(self)
        self.add_callback(self.reporter)
        self.loader: CacheLoader | None = None
        self._batches: Any = None
        self._parts = torch.zeros(len(objective.names), device=args.device)
        self._step_positions = 0
        if merge_adapters:
            check_mergeable(model)
        self._student, self.head_mode, self.merges_adapters = model, head_mode, merge_adapters
        found = find_linear_head(model, teacher.vocab_size)
        objective.check_student(found)
        self.head: LinearHead | None = None if isinstance(found, str) else found
        self.projection: nn.Linear | None = None
        if self.head is not None and objective.needs_projection(self.head, teacher):
            width = self.head.weight.shape[1]
            self.projection = attach_projection(model, width, teacher.hidden_width, seed=args.seed)
        self.why_full_logits = found if isinstance(found, str) else None
        self._seat = None if self.head is None else HeadSeat(model)
        self._aids = objective.aids(teacher, args.device)
        check_documents_kept_apart(model, self._probe_rows(rows), self.layout)

    def _seat_trackers(self) -> None:
        """TensorBoard's files go to OUT/runs: asked to log before training begins, it would take ./runs."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(Path(self.args.output_dir or ".") / "runs")

    def _probe_rows(self, rows: NDArray[np.int64]) -> list[Any]:
        """The first rows of the corpus, up to one that packs several documents."""
        found: list[Any] = []
        for index in range(min(len(rows), PROBE_ROWS)):
            block = self.teacher.corpus.rows(int(rows[index]), int(rows[index]) + 1)
            found.append(block)
            if block.document_start[1:].any():
                break
        return found

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows of this process, with every row of an epoch once over all of them."""
        state, self._data_state = self._data_state, None
        old = state is not None and "rows_taken" not in state
        order: dict[str, Any] = {"order_version": 1, "block_rows": block_rows_of(self.teacher.corpus)} if old else {}
        self.loader = loader = CacheLoader(
            self.teacher,
            batch_rows=self._train_batch_size,
            seed=self.args.seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            rows=self.train_rows,
            optional=self.objective.optional,
            targets=self.live is None and bool(self.objective.losses),
            collate=weighted_collate(collate_block, self.layout, self.mixture_weights),
            ends="drop" if self.args.dataloader_drop_last else "even",
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self.args.dataloader_pin_memory,
            **order,
        )
        if state is not None and old:
            per_forward = self._train_batch_size * self.args.world_size
            per_step = per_forward * self.args.gradient_accumulation_steps
            epoch, step = divmod(state["step"], -(-len(loader) // self.args.gradient_accumulation_steps))
            state = {**loader.state_dict(), "epoch": epoch, "rows_taken": step * per_step}
        if state is not None:
            loader.load_state_dict(state)
        return loader

    def begin_epoch(self, epoch: int) -> None:
        """Called before every epoch, or the rest of one: the loader goes to its place."""
        self.end_epoch()
        assert self.loader is not None
        self.loader.set_epoch(epoch)
        self._batches = iter(self.loader)

    def end_epoch(self) -> None:
        """Read nothing more ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def end_training(self) -> None:
        """Read nothing more at all."""
        self.end_epoch()
        if self.loader is not None:
            self.loader.close()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one optimizer step, and how many target positions they have over all devices.

        While training they come from ``begin_epoch``'s iterator: ``Trainer``'s own would begin again and skip what was
        seen, batch by batch; it is never advanced, and so costs nothing.
        """
        batches = epoch_iterator if self._batches is None else self._batches
        samples, _ = super().get_batch_samples(batches, num_batches, device)
        count = torch.tensor(sum(len(batch["labels"]) for batch in samples), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum()
        self._step_positions = int(count)
        return samples, count

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The share of one micro-batch in the loss of its optimizer step.

        Args:
          model: the student, wrapped or not.
          inputs: a batch of ``batches.collate``.
          return_outputs: also return {"values": [T, P]}, the parts of each position in the order of their names.
          num_items_in_batch: target positions of the whole step over all devices; by default the batch's own.

        Returns:
          A scalar, nats: the weighted sum over the micro-batch divided by that number, times the number of
          devices (whose gradients are averaged afterwards).
        """
        if self.live is not None:
            inputs = {**inputs, "teacher": self.live.targets(inputs, whole=self.objective.needs_whole)}
        teacher = self._teacher_terms(inputs)
        self.objective = self.objective.at(self.progress)
        prepared = self.objective.prepare(teacher, inputs, self._aids, seed=(self.args.seed, self.state.global_step))
        count = torch.as_tensor(
            len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch, device=self.args.device
        )
        scale = self.accelerator.num_processes / count.clamp_min(1)
        coefficients_P = torch.tensor(self.objective.weights, device=self.args.device) * scale
        if self._seat is None:
            loss, values_TP = prepared.from_logits(self.target_logits(model, inputs), coefficients_P)
        else:
            loss, values_TP = self._seat.run(
                model,
                inputs,
                lambda hidden_TD: prepared.from_hidden(
                    hidden_TD,
                    self._current_head(),
                    coefficients_P,
                    self.head_mode,
                    None if self.projection is None else self.projection.weight,
                ),
            )
        if model.training:
            self._parts += values_TP.sum(0) * scale
        return (loss, {"values": values_TP}) if return_outputs else loss

    def _current_head(self) -> LinearHead:
        """The head with the weight it has now: inside a forward, wrappers may put another tensor in its place."""
        assert self.head is not None
        assert self._seat is not None
        module: Any = self._seat.head
        return replace(self.head, weight=module.weight, bias=module.bias)

    def _teacher_terms(self, batch: dict[str, Any]) -> TeacherTerms:
        return teacher_terms(batch, self.teacher.vocab_size, self.teacher.temperatures)

    @property
    def progress(self) -> float:
        """Optimizer steps done / all steps; 0 before training."""
        return min(1.0, self.state.global_step / self.state.max_steps) if self.state.max_steps > 0 else 0.0

    def target_logits(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """[T, W] float32 logits of a batch's target positions, all at once."""
        return target_logits(model, inputs, model=self._student)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to what is logged: parts of the loss, TAD's beta and K' of the last step, positions and waiting."""
        if "loss" in logs:
            parts = self._parts
            if self.args.world_size > 1:
                parts = self.accelerator.gather(parts[None]).mean(0)
            steps = max(self.state.global_step - self.reporter.last_logged_step, 1)
            logs.update({name: part / steps for name, part in zip(self.objective.names, parts.tolist(), strict=True)})
            logs.update(self.objective.scheduled)
            self._parts.zero_()
            logs["positions_seen"] = self.positions_seen
            logs["data_wait"] = self.reporter.data_wait()
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure held-out rows against the text and the teacher (see ``metrics``).

        Args:
          eval_dataset: a ``CacheRows``; by default the held-out rows.
          ignore_keys: unused; part of ``Trainer``'s interface.
          metric_key_prefix: put before each name.

        Returns:
          PREFIX_cross_entropy, PREFIX_kl, PREFIX_top1_agreement, PREFIX_teacher_cross_entropy,
          PREFIX_positions and PREFIX_positions_seen; of several teachers also those of ``mixture_metrics``.
        """
        dataset = self.held_out if eval_dataset is None else eval_dataset
        if not isinstance(dataset, CacheRows):
            raise ConfigError(f"evaluate: expected rows of a cache (CacheRows), found {type(dataset).__name__}")
        with self.reporter.not_training():
            means = self.held_out_metrics(dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        metrics[f"{metric_key_prefix}_positions_seen"] = self.positions_seen
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out_metrics(self, dataset: CacheRows) -> dict[str, float]:
        """Means over the target positions of some rows, each row counted once whatever the number of devices."""
        model: Any = self.model
        was_training: bool = model.training
        model.eval()
        sums = HeldOutSums.empty(held_out_names(self.teacher))
        world, rank, size = self.args.world_size, self.args.process_index, self.args.per_device_eval_batch_size
        # Every process makes the same number of forwards (FSDP needs it); rows beyond the end repeat and do not count.
        steps = range(0, -(-len(dataset) // world), size)
        bar = tqdm(steps, desc="held-out", leave=False, disable=self.args.disable_tqdm or rank != 0)
        for start in bar:
            indices = [i * world + rank for i in range(start, min(start + size, -(-len(dataset) // world)))]
            counted = [i for i in indices if i < len(dataset)]
            rows: list[Any] = [dataset[i] for i in counted or [0]]
            batch: dict[str, Any] = self._prepare_inputs(self.data_collator(rows))
            with self.accelerator.autocast():
                values_T4 = self._metrics(model, batch)
            if counted:
                sums.add(values_T4)
        model.train(was_training)
        if world > 1:
            # float32 would lose positions; MPS and some backends have no float64, NCCL and gloo do.
            packed = torch.cat([sums.sums, torch.tensor([sums.num_positions], dtype=torch.float64)])
            packed = self.accelerator.gather(packed[None].to(self.args.device)).sum(0).cpu()
            sums = HeldOutSums(packed[:-1], int(packed[-1]), held_out_names(self.teacher))
        return sums.means()

    def _metrics(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """[T, metrics] of a batch's positions."""
        teacher = self._teacher_terms(batch)
        if self._seat is None:
            return metrics_of_batch(partial(of_logits, self.target_logits(model, batch)), teacher, batch)
        (values,) = self._seat.run(
            model, batch, lambda h: (metrics_of_batch(partial(of_hidden, h, self._current_head()), teacher, batch),)
        )
        return values

    @property
    def kl_is(self) -> str:
        """What the held-out KL is: exact, unbiased or a lower bound."""
        return held_out_kl_is(self.teacher)

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a plain transformers checkpoint (of an adapted student see ``adapters``) with the corpus' tokenizer."""
        out = Path(self.args.output_dir or ".")
        folder = Path(output_dir or out)
        final = not _internal_call or folder == out
        with quiet_progress():
            if final and self.merges_adapters:
                state = without_projection(self.whole_state())
                save_merged(self._student, state, folder, writes=self.args.should_save)
            else:
                self.write_weights(folder, final=final)
        if self.projection is not None and not final:
            save_projection(self.projection, folder, writes=self.args.should_save)
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; tailcache.json says it in the open
            for file in sorted(self.teacher.corpus.tokenizer_dir.iterdir()):
                if not (folder / file.name).exists():  # whatever a cache calls its files, the student's own stay
                    shutil.copyfile(file, folder / file.name)
            if final:
                self.write_record(folder)
        if self.args.push_to_hub and not _internal_call:
            push(self)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.projection is not None:
            state_dict = without_projection(self._student.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.projection is not None:
            load_projection(self.projection, Path(resume_from_checkpoint))

    def write_record(self, folder: Path) -> None:
        """Write tailcache.json: in a checkpoint it comes last and says that the checkpoint is whole."""
        write_record(
            folder,
            {
                **self.record,
                "corpus_hash": self.teacher.corpus.hash,
                "teacher": self.teacher.name,
                "teacher_hash": self.teacher.hash,
                "step": self.state.global_step,
                "positions_seen": self.positions_seen,
                "data": None if self.loader is None else self.loader.state_dict(),
            },
        )

    def count_step(self) -> None:
        """Called after every optimizer step: its positions have been seen."""
        self.positions_seen += self._step_positions

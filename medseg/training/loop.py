"""The training loop of every network: restartable at any moment, with a schedule by steps or by the clock."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medseg.bundles.spec import BundleSpec
from medseg.checkpoints.load import load_pretrained
from medseg.checkpoints.state import PretrainedReport
from medseg.errors import InputError, Interrupted
from medseg.networks.registry import create
from medseg.training.augment import seeds
from medseg.training.config import TrainingConfig
from medseg.training.rank import ALONE, Rank

log = logging.getLogger(__name__)

_SAVE_SECONDS = 120.0

Case = TypeVar("Case")


@dataclass
class Progress:
    """Where a run stands; what `last.pt` holds beside the tensors.

    Attributes:
        step: optimiser steps done.
        seconds: training time so far, over all starts, validation and waiting excluded.
        best: highest mean Dice on the held-out cases, NaN before the first validation.
        loss: running mean of the training loss.
        dice: mean Dice of each label at the last validation.
        scores: what else the last validation found, by name.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = math.nan
    loss: float = math.nan
    dice: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    def fraction(self, config: TrainingConfig) -> float:
        """Share of the run that is done, 0 to 1, by steps or by the clock, whichever is further."""
        parts = [0.0]
        if config.steps is not None:
            parts.append(self.step / config.steps)
        if config.max_minutes is not None:
            parts.append(self.seconds / (60 * config.max_minutes))
        return min(max(parts), 1.0)


def learning_rate(config: TrainingConfig, progress: Progress) -> float:
    """Rate for the next step: linear warm-up, then cosine or polynomial (power 0.9) to 0."""
    done = min(progress.step / config.decay_steps, 1.0) if config.decay_steps else progress.fraction(config)
    decay = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else (1 - done) ** 0.9
    warm = min((progress.step + 1) / (config.warmup_steps + 1), 1.0)
    return config.learning_rate * decay * warm


class Trainer(ABC, Generic[Case]):
    """One training run in one folder; what is learned from which batches, and how it is judged, a subclass says.

    Args:
        config: the settings.
        spec: network, preprocessing, window and labels; also what inference with the weights will use.
        output: folder of the run; gets models/model.pt (best average weights), last.pt and metrics.csv.
        device: where the network trains.
        rank: this process among those that train the network together.
    """

    def __init__(
        self, config: TrainingConfig, spec: BundleSpec, output: Path, device: torch.device, rank: Rank = ALONE
    ) -> None:
        self.config, self.spec, self.output, self.device, self.rank = config, spec, output, device, rank
        torch.manual_seed(config.seed)
        # Channels last makes a step of Swin UNETR on a CPU a fifth faster; networks of other ranks are left alone.
        network = create(spec.network, **spec.network_args).to(device)
        self.layout = torch.channels_last_3d if spec.slices is None else torch.contiguous_format
        self.network = network.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.average = AveragedModel(self.network, multi_avg_fn=_moving_average(config.ema_decay))
        self.optimizer = _optimizer(config, self.network)
        self.progress = Progress()
        self.frozen: frozenset[str] = frozenset()
        self._still: list[nn.Module] = []
        self._own_random()

    @abstractmethod
    def feed(self, cases: Sequence[Case]) -> Iterator[dict[str, Tensor]]:
        """Batches without end, from step `progress.step` on: the same ones in every run with the same seed."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss () of a batch of `feed`, with its graph."""

    @abstractmethod
    def judge(self, network: nn.Module, cases: Sequence[Case]) -> float:
        """Put Dice and other scores of the held-out cases of all ranks into `progress`.

        Returns:
            What the best weights have most of, NaN without cases.
        """

    def autocast(self) -> torch.autocast:
        """The precision of the settings, for the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def start_from(self, weights: Path) -> PretrainedReport:
        """Take what fits of a checkpoint, published or of this project, as the first weights.

        Raises:
            BundleError: it cannot be read, or holds nothing for this network.
        """
        stack = 0 if self.spec.slices is None else self.spec.network_channels
        report = load_pretrained(self.network, weights, slice_stack=stack)
        self.average.module.load_state_dict(self.network.state_dict())
        if self.config.freeze_encoder:
            encoder: tuple[str, ...] = import_module(type(self.network).__module__).ENCODER
            given = (*report.taken, *(entry.partition(":")[0] for entry in report.adapted))
            self.frozen = frozenset(key for key in given if key.startswith(encoder))
        return report

    def resume(self) -> None:
        """Go on from last.pt."""
        state = torch.load(self.output / "last.pt", map_location=self.device, weights_only=True)  # noqa: TID251
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        self.progress = Progress(**state["progress"])
        self.frozen = frozenset(state.get("frozen", ()))
        self._own_random()

    def _own_random(self) -> None:
        """Dropout of its own for each rank but the leading one, whose random state is that of a run alone."""
        if not self.rank.leads:
            torch.manual_seed(seeds(self.config.seed, [self.progress.step * self.rank.count + self.rank.number])[0])

    def run(
        self,
        training: Sequence[Case],
        held_out: Sequence[Case],
        report: Callable[[Progress, float], None] | None = None,
    ) -> Progress:
        """Train to the end of the schedule, or until SIGINT or SIGTERM, saving either way.

        Args:
            training: cases to learn from.
            held_out: cases that choose the best weights, of several ranks each its own; without any the last average
                is the best.
            report: called after each step with the progress and the share done.
        """
        feed = self.feed(training)
        board = _tensorboard(self.output) if self.rank.leads else None
        saved = validated = self.progress.seconds
        joined, thaw = self._freeze()
        halt = False
        with stop_signals() as stopped:
            while self.progress.fraction(self.config) < 1 and not halt:
                begin = time.monotonic()
                if self.progress.step == thaw:
                    joined, thaw = self._freeze()
                own_loss = self._step(joined, next(feed))
                running = self.progress.loss
                self.progress.step += 1
                spent = time.monotonic() - begin if self.rank.leads else 0.0
                # All ranks go by the leading one's clock, and stop after the same step.
                told = bool(stopped) or self.rank.told_to_stop
                total, spent, stops = self.rank.sum([own_loss, spent, float(told)], self.device)
                loss, halt = total / self.rank.count, stops > 0
                share = max(0.02, 1 / self.progress.step)  # a plain mean at first, then of about the last 50 steps
                self.progress.loss = loss if math.isnan(running) else (1 - share) * running + share * loss
                self.progress.seconds += spent
                if report is not None:
                    report(self.progress, self.progress.fraction(self.config))
                if self.progress.seconds - validated > 60 * self.config.validate_minutes:
                    validated = self.progress.seconds
                    self._validate(held_out, board)
                if self.progress.seconds - saved > _SAVE_SECONDS:
                    saved = self.progress.seconds
                    self._save()
            if not halt:
                self._validate(held_out, board)
            self._save()
        if halt:
            raise Interrupted(stopped[0] if stopped else signal.SIGTERM)
        return self.progress

    def _freeze(self) -> tuple[nn.Module, int]:
        """Hold the encoder, or let it go when its time is over; the network to call, and the step to come back at."""
        hold = bool(self.frozen) and self.progress.step < self.config.freeze_encoder
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not (hold and name in self.frozen))
        modules = self.network.named_modules() if hold else ()
        self._still = [module for name, module in modules if f"{name}.running_mean" in self.frozen]
        return self.rank.join(self.network, self.device), self.config.freeze_encoder if hold else -1

    def _step(self, joined: nn.Module, batch: dict[str, Tensor]) -> float:
        self.network.train()
        for module in self._still:  # norms whose statistics came with the weights
            module.eval()
        rate = learning_rate(self.config, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(joined, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(self.output, f"the loss is {value} at step {self.progress.step}", "lower --learning-rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return value

    def _validate(self, cases: Sequence[Case], board: Any) -> None:
        network = self.average.module.eval()
        score = self.judge(network, cases)
        if not self.rank.leads:
            return
        if math.isnan(score) or math.isnan(self.progress.best) or score >= self.progress.best:
            self.progress.best = score
            folder = self.output / "models"
            folder.mkdir(exist_ok=True)
            save_tensors(folder / "model.pt", {"model": network.state_dict()})
        self._log(board)

    def _log(self, board: Any) -> None:
        dice = self.progress.dice
        row: dict[str, Any] = {
            "step": self.progress.step,
            "minutes": round(self.progress.seconds / 60, 2),
            "learning_rate": f"{learning_rate(self.config, self.progress):.3g}",
            "loss": round(self.progress.loss, 4),
            "mean_dice": round(sum(dice.values()) / len(dice), 4) if dice else math.nan,
            **{f"dice_{name}": round(value, 4) for name, value in dice.items()},
            **{name: round(value, 4) for name, value in self.progress.scores.items()},
        }
        path = self.output / "metrics.csv"
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        log.info("validation %s", json.dumps(row))
        if board is not None:
            for key in list(row)[list(row).index("loss") :]:
                board.add_scalar(key, row[key], self.progress.step)
            board.flush()

    def _save(self) -> None:
        if not self.rank.leads:
            return
        save_tensors(
            self.output / "last.pt",
            {
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "progress": vars(self.progress),
                "frozen": sorted(self.frozen),
            },
        )


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential average that forgets the first, random weights soon: its decay grows to `decay` with the steps."""

    @torch.no_grad()
    def update(average: Any, current: Any, steps: Any) -> None:
        done = float(steps)
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + done) / (10 + done)))

    return update


def _optimizer(config: TrainingConfig, network: nn.Module) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), lr=rate, weight_decay=decay, momentum=0.9)
    return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay, eps=config.adam_epsilon)


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the signal's number when SIGINT or SIGTERM arrives; a second SIGINT acts at once."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if received:
            raise Interrupted(number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tensorboard(output: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed (pip install medseg[train]); metrics.csv holds the same figures")
        return None
    return SummaryWriter(str(output / "tensorboard"))

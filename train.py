"""Trains what a config picks: the model, the phase, the data.

    python train.py config/mla_kv128.py config/laptop.py --max_iters=500
    torchrun --standalone --nproc_per_node=2 train.py config/mla_kv128.py

A run writes out_dir: ckpt.pt (the last state), best.pt (the best validation loss), config.json, log.jsonl and, when it
is finished, summary.json. The same command started again resumes a run that was cut off, exactly where its last
checkpoint stands, and says of a finished one that it is finished.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from configurator import Job, build_model, check_range, load_source, parse_train
from eval import RUN_TASKS, evaluate_model
from kit.contexts import ContextReader, context_cache, exact_contexts
from kit.files import InputError, one_line, run
from kit.report import duration, format_rank, format_summary, format_table
from kit.runs import RunFolder, StopRequest, World, git_commit, model_args, open_world, read_checkpoint
from kit.tokens import Stretches, TokenFile, Windows, load_tokens, window_batch
from model_cascade import read_gpt2_table
from model_context import compute_convergence_rate, effective_rank, first_contexts, oacd_iteration, settled_share
from prep import PrepSettings, prepare
from pythia_base import make_optimizer, safe_exp

SLOW_RUN_SECONDS = 1800  # a CPU run that takes longer is told of config/laptop.py


# ------------------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True)
class TrainSettings:
    """What every phase of train.py needs."""

    model: str = "pythia"  # the architecture, a name from configurator.MODELS
    phase: Literal["lm", "phase1", "phase2"] = "lm"  # language model, ContextBlock alone, or model on frozen contexts
    out_dir: str | None = None  # the run's folder; None: out/ and the names of the config files
    overwrite: bool = False  # start anew in a folder that holds another run
    init_from: str = "scratch"  # 'scratch', 'resume', a run folder, a config (its run), a Hugging Face folder or hub id
    dataset: str = "mini"  # folder below data_dir
    data_dir: str = "data"  # where prep.py puts token files
    width_divisor: int = 1  # divides hidden_size, intermediate_size, kv_dim and context_dim of the model
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu
    seed: int = 1337  # of the weights and of the order of the data

    def __post_init__(self) -> None:
        check_range(self, 1, "width_divisor")
        check_range(self, 0, "seed")


@dataclass(frozen=True)
class LMSettings(TrainSettings):
    """Training a language model."""

    batch_size: int = 4  # windows per micro-batch
    block_size: int = 512  # tokens per window
    tokens_per_doc: int | None = None  # train on stretches of documents of so many tokens, the memory carried along
    gradient_accumulation_steps: int = 4  # micro-batches per step, shared out among the processes of torchrun
    learning_rate: float = 1e-3  # AdamW, after warmup
    min_lr: float = 1e-4  # learning rate at the end of the decay
    max_iters: int = 1200  # optimizer steps
    warmup_iters: int = 100  # steps of linear warmup
    lr_decay_iters: int | None = None  # step at which min_lr is reached; None: max_iters
    decay_lr: bool = True  # cosine decay after warmup; False keeps learning_rate
    weight_decay: float = 0.1  # AdamW, on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    eval_interval: int = 100  # steps between evaluations and checkpoints
    eval_iters: int = 20  # micro-batches of the validation data per evaluation; the end of a run takes all of it
    log_interval: int = 10  # steps between lines of the log
    patience: int | None = None  # stop after so many evaluations without a better loss; None: never
    min_ppl_gain: float = 0.0  # how much lower the PPL has to be to count as better for patience
    eval_only: bool = False  # evaluate and stop
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products in training
    compile: bool | None = None  # torch.compile; None: on CUDA only

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "batch_size", "block_size", "gradient_accumulation_steps", "eval_interval", "eval_iters")
        check_range(self, 1, "log_interval", "patience", "lr_decay_iters", "tokens_per_doc")
        check_range(self, 0, "max_iters", "warmup_iters", "learning_rate", "min_lr", "weight_decay", "grad_clip")
        check_range(self, 0, "min_ppl_gain")
        if self.decay_lr and self.learning_rate < self.min_lr:
            raise InputError(f"learning_rate={self.learning_rate} is below min_lr={self.min_lr}, at which it ends")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} has to be at least 0 and below 1")
        if self.tokens_per_doc is not None and self.tokens_per_doc % self.block_size:
            raise InputError(f"tokens_per_doc={self.tokens_per_doc} is no multiple of block_size={self.block_size}")


@dataclass(frozen=True)
class Phase2Settings(LMSettings):
    """Training all of a model but its ContextBlock, on the exact contexts of the token stream."""

    context_stride: int = 1  # tokens per context that the cache keeps; those in between are run again for each batch

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "context_stride")
        if self.tokens_per_doc is not None:
            raise InputError("tokens_per_doc is for phase='lm': contexts run through the whole stream")


@dataclass(frozen=True)
class Phase1Settings(TrainSettings):
    """Training a ContextBlock alone, without labels (OACD)."""

    embeddings: str = "random"  # the token table: 'random', 'gpt2' (hub), a GPT-2 folder, a run folder (its output's)
    num_tokens: int = 100_000  # of the training tokens for each ContextBlock
    cascade_data: Literal["split", "all"] = "split"  # several blocks: each on its own part of the data, or on all parts
    max_iterations: int = 100  # passes over all of them, one optimizer step each
    convergence_threshold: float = 0.03  # a context that moves by less, mean squared, has settled
    learning_rate: float = 0.003  # Adam
    batch_size: int = 5_000  # tokens on the device at a time
    gradient_clip: float = 2.0  # largest norm of the gradient; 0 does not clip
    context_noise: float = 0.05  # standard deviation of what is added to the input contexts
    early_stopping_threshold: float = 0.9  # stop once this share of the contexts has settled
    centroid_weight: float = 0.1  # weight of the loss term that keeps the contexts' mean at the origin
    checkpoint_interval: int = 10  # iterations between checkpoints

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "num_tokens", "max_iterations", "batch_size", "checkpoint_interval")
        check_range(self, 0, "convergence_threshold", "learning_rate", "gradient_clip", "context_noise")
        check_range(self, 0, "early_stopping_threshold", "centroid_weight")


PHASES: dict[str, type[TrainSettings]] = {"lm": LMSettings, "phase1": Phase1Settings, "phase2": Phase2Settings}


# ------------------------------------------------------------------------------------- what every phase starts with


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products in training, and why."""
    if name != "auto":
        return getattr(torch, name), "as set"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has it"
        return torch.float16, "this GPU has no bfloat16; a gradient scaler keeps small gradients"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16, "this processor multiplies in it"
    return torch.float32, f"no fast bfloat16 on this {device.type}"


def open_tokens(settings: TrainSettings, world: World, vocab_size: int) -> tuple[TokenFile, TokenFile]:
    """Training and validation tokens of the dataset; the default one is made if it is missing."""
    folder = Path(settings.data_dir, settings.dataset)
    if settings.dataset == PrepSettings.dataset and not (folder / "meta.json").exists():
        if world.is_main:
            print(f"{folder} is missing: making it with prep.py (python prep.py)", flush=True)
            prepare(PrepSettings(data_dir=settings.data_dir))
        world.barrier()
    train, val = load_tokens(folder, "train"), load_tokens(folder, "val")
    if train.meta["max_id"] >= vocab_size:
        raise InputError(f"{folder} holds token id {train.meta['max_id']}, outside the model's {vocab_size} rows")
    return train, val


@dataclass
class Lineage:
    """What a model was trained on before this run."""

    parents: list[str]
    tokens_seen: int
    context_blocks: list[dict[str, Any]] = field(default_factory=list)  # what phase 1 reports of its ContextBlocks


def new_model(job: Job, data: TokenFile, world: World) -> tuple[Any, Lineage, dict[str, str]]:
    """The model of the job, freshly initialised, or with what it shares with the model that init_from names.

    Also where it comes from, and what became of each of its tensors: copied, converted or new.
    """
    torch.manual_seed(job.settings.seed)
    model = build_model(job.settings.model, job.model_config)
    source = job.settings.init_from
    if source in ("scratch", "resume"):
        return model, Lineage([], 0), {}
    if job.parent and not Path(source, "ckpt.pt").exists():
        raise InputError(f"init_from: {source} is missing; make it with: {job.parent}")
    weights, checkpoint = load_source(source)
    lineage = Lineage([], 0)
    if checkpoint is not None:
        check_tokenizer(source, checkpoint["data"]["tokenizer"], data)
        seen, trained = checkpoint["tokens_seen"], checkpoint["context_blocks"]
        lineage = Lineage([*checkpoint["parents"], source], seen, trained)
    try:
        report = model.start_from(weights)
    except ValueError as error:
        raise InputError(f"init_from={source}: {one_line(error)}") from None
    for how in ("copied", "converted", "new"):
        tensors = [name for name, what in report.items() if what == how]
        names = "" if how == "copied" else f" ({', '.join(tensors)})"
        world.say(f"{how:>9}: {len(tensors)} tensors{names}")
    return model, lineage, report


def check_tokenizer(source: str, theirs: str, data: TokenFile) -> None:
    """Raises InputError if a source's ids mean other tokens than the data's."""
    if theirs != (ours := data.meta["tokenizer"]):
        raise InputError(
            f"{source} was trained on {theirs} tokens, {data.path} holds {ours} tokens; "
            f"prep.py --tokenizer={theirs} makes others"
        )


@dataclass(frozen=True)
class Embeddings:
    """A trained token table for a model to start from."""

    table: Tensor  # (V, C)
    tokenizer: str  # whose ids are its rows
    lineage: Lineage


def load_embeddings(source: str) -> Embeddings | None:
    """The output embedding of a run, or GPT-2's from the hub or a local folder; None for 'random'."""
    if source == "random":
        return None
    if Path(source, "ckpt.pt").is_file():
        model, checkpoint = load_source(source)
        assert checkpoint is not None
        lineage = Lineage([*checkpoint["parents"], source], checkpoint["tokens_seen"])
        return Embeddings(model.head_weight.detach(), checkpoint["data"]["tokenizer"], lineage)
    try:
        return Embeddings(read_gpt2_table(source), "gpt2", Lineage([source], 0))
    except (OSError, ValueError) as error:
        raise InputError(
            f"embeddings={source!r}: {one_line(error)}; a run folder, such as --embeddings=out/pythia, and "
            "--embeddings=random need no hub"
        ) from None


def with_embedding(job: Job, rows: int, width: int) -> Job:
    """The job, its model's embedding of the size of one that is loaded."""
    try:
        return replace(job, model_config=replace(job.model_config, vocab_size=rows, hidden_size=width))
    except ValueError as error:
        raise InputError(f"the embedding is {width} wide: {one_line(error)}") from None


def data_identity(train: TokenFile, val: TokenFile) -> dict[str, str]:
    return {"tokenizer": train.meta["tokenizer"], "train_sha256": train.digest, "val_sha256": val.digest}


def check_resumable(checkpoint: dict[str, Any], job: Job, data: dict[str, str], folder: Path) -> None:
    """Raises InputError if a checkpoint was made on other data or by another model."""
    if checkpoint["data"] != data:
        raise InputError(f"{folder} was trained on other data than {job.settings.dataset} now holds")
    if checkpoint["model_args"] != model_args(job.model_config):
        raise InputError(f"{folder} holds a model with other settings")


def checkpoint_header(job: Job, data: dict[str, str], step: int, lineage: Lineage) -> dict[str, Any]:
    """What a checkpoint of any phase says of itself; tokens_seen grows with the run."""
    return {
        "model_args": model_args(job.model_config),
        "iter_num": step,
        "config": asdict(job.settings),
        "data": data,
        "parents": lineage.parents,
        "earlier_tokens": lineage.tokens_seen,
        "context_blocks": lineage.context_blocks,
        "commit": git_commit(),
    }


def announce(job: Job, model: Any, data: TokenFile, folder: RunFolder, world: World) -> None:
    """Say what is about to be trained, on what."""
    world.say(f"settings: {json.dumps({**asdict(job.settings), 'model_args': model_args(job.model_config)})}")
    if job.passed_over:
        world.say(f"a layer could not set: {'; '.join(job.passed_over)}")
    world.say(f"model {job.settings.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    world.say(f"data {data.path.parent}: {len(data.tokens):,} training tokens; run folder {folder.path}")


# --------------------------------------------------------------------------------------- training a language model


def learning_rate_at(step: int, settings: LMSettings) -> float:
    """Linear warmup, then cosine decay to min_lr."""
    s, decay_iters = settings, settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if not s.decay_lr:
        return s.learning_rate
    progress = min(1.0, (step - s.warmup_iters) / max(1, decay_iters - s.warmup_iters))
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)


class LMTrainer:
    """One training run of a language model."""

    def __init__(self, job: Job, folder: RunFolder, world: World) -> None:
        self.job, self.folder, self.world = job, folder, world
        self.settings: LMSettings = job.settings
        s = self.settings
        self.step, self.best_val_loss, self.evaluations_without_gain = 0, math.inf, 0
        self.train_seconds, self.resumed = 0.0, False
        self.unchecked: list[Tensor] = []  # losses of the steps since they were last looked at
        self.windows_per_step = s.batch_size * s.gradient_accumulation_steps
        if self.windows_per_step % world.size:
            raise InputError(
                f"batch_size x gradient_accumulation_steps = {self.windows_per_step} windows a step cannot be shared "
                f"evenly among {world.size} processes"
            )
        if s.block_size > job.model_config.max_position_embeddings:
            raise InputError(
                f"block_size={s.block_size} is above the model's limit of {job.model_config.max_position_embeddings}"
            )
        self.train_data, self.val_data = open_tokens(s, world, job.model_config.vocab_size)
        self.data = data_identity(self.train_data, self.val_data)
        self.windows: Windows | Stretches = Windows(
            len(self.train_data.tokens), s.block_size, self.windows_per_step, s.seed
        )
        self.dtype, self.dtype_reason = pick_dtype(s.dtype, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype == torch.float16)

    # -- the model

    def build(self, checkpoint: dict[str, Any] | None) -> None:
        """A new model, one that starts from another's weights, or the one that a checkpoint of this run holds."""
        s, device = self.settings, self.world.device
        job = self.job if checkpoint is None else replace(self.job, settings=replace(s, init_from="resume"))
        self.model, self.lineage, self.report = new_model(job, self.train_data, self.world)
        self.model.to(device)
        self.freeze()
        self.optimizer = make_optimizer(self.model, s.learning_rate, s.weight_decay, (s.beta1, s.beta2))
        if checkpoint is not None:
            self.load(checkpoint)
        self.trained = self.model  # what the training step calls: the model, compiled and shared as asked
        if s.compile if s.compile is not None else device.type == "cuda":
            self.trained = torch.compile(self.trained)
        if self.world.size > 1:
            self.trained = DistributedDataParallel(self.trained)

    def freeze(self) -> None:
        """Exclude parameters from training; a language model trains them all."""

    # -- checkpoints

    def state(self) -> dict[str, Any]:
        """All that exact resuming needs, in tensors and plain Python types."""
        return {
            **checkpoint_header(self.job, self.data, self.step, self.lineage),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "best_val_loss": self.best_val_loss,
            "evaluations_without_gain": self.evaluations_without_gain,
            "tokens_seen": self.tokens_seen(),
            "train_seconds": self.train_seconds,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint of this run."""
        check_resumable(checkpoint, self.job, self.data, self.folder.path)
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"])
        self.lineage = Lineage(checkpoint["parents"], checkpoint["earlier_tokens"], checkpoint["context_blocks"])
        self.step, self.best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
        self.evaluations_without_gain = checkpoint["evaluations_without_gain"]
        self.train_seconds, self.resumed = checkpoint["train_seconds"], True

    def tokens_seen(self) -> int:
        return self.lineage.tokens_seen + self.step * self.windows_per_step * self.settings.block_size

    def announce(self) -> None:
        """Say what is about to be trained, on what, how."""
        s, world = self.settings, self.world
        announce(self.job, self.model, self.train_data, self.folder, world)
        world.say(f"{world.device} x {world.size}, {str(self.dtype).removeprefix('torch.')} ({self.dtype_reason})")
        world.say(f"{s.max_iters} steps of {self.windows_per_step * s.block_size:,} tokens")
        if self.resumed:
            world.say(f"going on from step {self.step}")

    # -- a step, an evaluation

    def micro_batches(self) -> Iterator[tuple[dict[str, Tensor], float, bool]]:
        """This process's windows of the step, batch_size at a time: arguments, share of the step, whether the last."""
        windows = self.windows_per_step // self.world.size
        starts = np.split(self.windows.starts(self.step), self.world.size)[self.world.rank]
        each = len(starts) // windows  # in the place of one window
        for start in range(0, windows, self.settings.batch_size):
            end = min(start + self.settings.batch_size, windows)
            yield self.training_batch(starts[start * each : end * each]), (end - start) / windows, end == windows

    def training_batch(self, starts: np.ndarray) -> dict[str, Tensor]:
        """The model's arguments for the training windows that begin at starts."""
        return window_batch(self.train_data.tokens, starts, self.windows.block_size, self.world.device)

    def train_step(self) -> Tensor:
        """One optimizer step over the step's windows; returns their mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.settings)
        total = torch.zeros((), device=self.world.device)
        for batch, weight, is_last in self.micro_batches():
            if self.world.size > 1:
                self.trained.require_backward_grad_sync = is_last  # gradients are exchanged once a step
            with self.autocast():
                loss = self.trained(**batch, return_logits=False)[1]
            self.scaler.scale(loss * weight).backward()
            total += loss.detach() * weight
        if self.settings.grad_clip > 0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self.world.reduce(total) / self.world.size

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over eval_iters micro-batches of windows, spread evenly over the validation data."""
        s, tokens = self.settings, self.val_data.tokens
        block_size = min(s.block_size, len(tokens) - 1)
        count = max(1, min(s.eval_iters * s.batch_size, (len(tokens) - 1) // block_size))
        starts = np.linspace(0, len(tokens) - 1 - block_size, count).astype(np.int64)
        starts = starts[self.world.rank :: self.world.size]
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for first in range(0, len(starts), s.batch_size):
            batch = window_batch(tokens, starts[first : first + s.batch_size], block_size, self.world.device)
            with self.autocast():
                total += self.model(**batch, return_logits=False)[1] * len(batch["idx"])
        return self.world.reduce(total).item() / count

    # -- the loop

    def train(self, stop: StopRequest) -> int:
        """Train to the end, or to a signal; returns the signal, 0 if there was none."""
        first_step, s = self.step, self.settings
        self.lap()
        while True:
            is_due = self.step % s.eval_interval == 0 or self.step == s.max_iters
            if is_due and not (self.resumed and self.step == first_step):
                self.evaluate()
            if s.patience is not None and self.evaluations_without_gain >= s.patience:
                self.world.say(f"no better validation loss in {s.patience} evaluations: stopping early")
                return 0
            if self.step >= s.max_iters:
                return 0
            self.unchecked.append(self.train_step())
            self.step += 1
            if self.step % s.log_interval == 0 or self.step == first_step + 1:
                self.log_losses()
            if self.step == first_step + 1:
                self.warn_if_slow()
            if received := stop.agreed(self.world):
                self.checkpoint()
                self.world.say(f"stopped at step {self.step}; the same command goes on from here")
                return received

    def warn_if_slow(self) -> None:
        """Say, after the first step, how long a large model takes on a CPU."""
        if self.world.device.type == "cpu" and self.seconds_left > SLOW_RUN_SECONDS:
            self.world.say(
                f"on this CPU the run takes about {duration(self.seconds_left)}; with config/laptop.py on top, a model "
                "four times narrower trains in minutes"
            )

    def lap(self) -> float:
        """Seconds since the last call."""
        now, before = time.perf_counter(), getattr(self, "lap_started", 0.0)
        self.lap_started = now
        return now - before

    def log_losses(self) -> None:
        """Look at the losses since the last call. Raises InputError if one is not finite, before anything is saved."""
        if not self.unchecked:
            return
        s, losses = self.settings, torch.stack(self.unchecked).tolist()
        first_step = self.step - len(losses) + 1
        self.unchecked = []
        for step, loss in enumerate(losses, first_step):
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss of step {step} is {loss}: stopped, {self.folder.path / 'ckpt.pt'} keeps the last good "
                    "state; a lower learning_rate or more warmup_iters may help"
                )
        seconds = self.lap()
        self.train_seconds += seconds
        speed = len(losses) * self.windows_per_step * s.block_size / seconds
        left = (s.max_iters - self.step) * seconds / len(losses)
        mean, lr = sum(losses) / len(losses), learning_rate_at(self.step - 1, s)
        self.world.say(
            f"step {self.step}/{s.max_iters} | loss {mean:.4f} | lr {lr:.2e} | {speed:,.0f} tokens/s | "
            f"{duration(left)} left"
        )
        if self.world.is_main:
            self.folder.log({"step": self.step, "losses": losses, "lr": lr, "tokens_per_s": speed})
        self.seconds_left = left

    def evaluate(self) -> None:
        """Validate, log and save, in this order: a checkpoint is never ahead of what was logged."""
        self.log_losses()
        loss = self.validate()
        is_best = loss < self.best_val_loss
        gain = safe_exp(self.best_val_loss) - safe_exp(loss)  # in PPL
        is_gain = is_best and gain >= self.settings.min_ppl_gain
        self.evaluations_without_gain = 0 if is_gain else self.evaluations_without_gain + 1
        self.best_val_loss = min(loss, self.best_val_loss)
        self.world.say(f"step {self.step} | val loss {loss:.4f}" + (" (best)" if is_best else ""))
        if self.world.is_main:
            self.folder.log({"step": self.step, "val_loss": loss, "tokens_seen": self.tokens_seen()})
        self.checkpoint(is_best)

    def checkpoint(self, is_best: bool = False) -> None:
        """Save the state, also as the best one if it is; the time this takes is not the training's.

        A run that is killed before ckpt.pt is written comes to best.pt again; the other way round it would be without.
        """
        self.log_losses()
        if self.world.is_main:
            self.folder.save(self.state(), *(["best.pt"] if is_best else []), "ckpt.pt")
        self.lap()

    def finish(self) -> None:
        """Measure the trained model in full, write summary.json and show it."""
        s = self.settings
        summary = {
            "model": s.model,
            "steps": self.step,
            "tokens_seen": self.tokens_seen(),
            "train_seconds": self.train_seconds,
            "best_val_loss": self.best_val_loss,
            "seed": s.seed,
            "parents": self.lineage.parents,
            "commit": git_commit(),
            "checkpoint": str(self.folder.path / "ckpt.pt"),
        }
        folder = Path(s.data_dir, s.dataset)
        summary |= evaluate_model(
            self.model, RUN_TASKS, folder, s.data_dir, s.block_size, s.batch_size, self.world.device, {},
            self.lineage.context_blocks,
        )  # fmt: skip
        self.folder.write_json("summary.json", summary)
        print(format_summary(summary))
        print(f"\nnext: python sample.py {self.folder.path}   or   python eval.py {self.folder.path}")


class Phase2Trainer(LMTrainer):
    """Phase 2: the ContextBlocks stay as Phase 1 left them, and their exact contexts come from the context cache.

    A model whose positions are independent, given their contexts, is trained on positions drawn from all over the
    stream, each a window of one token, as many in a step as the windows of block_size would hold.
    """

    settings: Phase2Settings

    def __init__(self, job: Job, folder: RunFolder, world: World) -> None:
        parent = folder.path if job.settings.init_from == "resume" else Path(job.settings.init_from)
        if (parent / "ckpt.pt").is_file():  # if not, new_model says so
            theirs = read_checkpoint(parent)["model_args"]
            job = with_embedding(job, theirs["vocab_size"], theirs["hidden_size"])
        super().__init__(job, folder, world)
        if job.settings.init_from == "scratch":
            raise InputError("phase='phase2' needs trained ContextBlocks: init_from has to name a run of phase 1")

    def freeze(self) -> None:
        """Leave out what the contexts depend on. Raises InputError if it does not come from a run of phase 1."""
        require_context_blocks(self.model, self.settings)
        if any(how == "new" and name.startswith("context_block") for name, how in self.report.items()):
            raise InputError(f"init_from={self.settings.init_from} holds no ContextBlock that fits this model")
        self.model.freeze_for_phase2()

    def build(self, checkpoint: dict[str, Any] | None) -> None:
        super().build(checkpoint)
        making = PrepSettings(init_from=self.settings.init_from, context_stride=self.settings.context_stride)
        if self.world.is_main:
            context_cache(self.model, self.train_data, making)
        self.world.barrier()  # the others find it made
        cache = context_cache(self.model, self.train_data, making)
        self.contexts = ContextReader(self.model, self.train_data, cache)
        if getattr(self.model, "positions_are_independent", False):
            positions = self.windows_per_step * self.settings.block_size
            self.windows = Windows(len(self.train_data.tokens), 1, positions, self.settings.seed)

    def training_batch(self, starts: np.ndarray) -> dict[str, Tensor]:
        positions = starts[:, None] + np.arange(self.windows.block_size)
        return {**super().training_batch(starts), "contexts": self.contexts.at(positions)}  # (B, T, E)


class DocumentTrainer(LMTrainer):
    """Training on stretches of long documents: what a row's memory holds goes with it from window to window.

    Truncated backpropagation: the gradient of a window stays within it.
    """

    windows: Stretches

    def __init__(self, job: Job, folder: RunFolder, world: World) -> None:
        super().__init__(job, folder, world)
        s, segment_len = self.settings, getattr(job.model_config, "segment_len", None)
        if segment_len is None:
            raise InputError(f"tokens_per_doc={s.tokens_per_doc}: model={s.model!r} has no memory to carry")
        if s.block_size % segment_len:
            raise InputError(f"tokens_per_doc: block_size={s.block_size} is no multiple of segment_len={segment_len}")
        assert s.tokens_per_doc is not None
        self.windows = Stretches(self.train_data, s.tokens_per_doc, s.block_size, self.windows_per_step, s.seed)

    def announce(self) -> None:
        super().announce()
        count, each = len(self.windows.begins), self.windows.windows_each
        self.world.say(f"documents: {count:,} stretches of {each} windows, {self.settings.tokens_per_doc:,} tokens")

    # -- the memories

    def empty_memories(self) -> list[Any]:
        """One for each micro-batch of this process."""
        rows, size = self.windows_per_step // self.world.size, self.settings.batch_size
        return [self.model.init_memory(min(size, rows - first)) for first in range(0, rows, size)]

    def micro_batches(self) -> Iterator[tuple[dict[str, Tensor], float, bool]]:
        """As LMTrainer's, each with the memory of its rows."""
        if self.step % self.windows.windows_each == 0:
            self.memories = self.empty_memories()
        for (batch, weight, is_last), memory in zip(super().micro_batches(), self.memories, strict=True):
            yield {**batch, "memory": memory}, weight, is_last
            memory.detach()  # the micro-batch's backward is done

    # -- checkpoints

    def build(self, checkpoint: dict[str, Any] | None) -> None:
        super().build(checkpoint)
        self.memories = self.empty_memories()
        if checkpoint is not None:
            self.load_memories(checkpoint)

    def load_memories(self, checkpoint: dict[str, Any]) -> None:
        """Go on within the stretches. Raises InputError if the rows of a step are not where the checkpoint's were."""
        s, theirs = self.settings, checkpoint["config"]
        for name in ("tokens_per_doc", "block_size", "batch_size", "gradient_accumulation_steps", "seed"):
            if getattr(s, name) != theirs[name]:
                raise InputError(f"going on within documents needs {name}={theirs[name]}, as {self.folder.path} has it")
        rows = self.windows_per_step // self.world.size
        mine = {k: v.split(rows)[self.world.rank].split(s.batch_size) for k, v in checkpoint["memory"].items()}
        for i, memory in enumerate(self.memories):
            memory.load_state_dict({name: parts[i] for name, parts in mine.items()})

    def checkpoint(self, is_best: bool = False) -> None:
        """Only here do the processes bring their memories together: state() is the main one's alone."""
        states = [memory.state_dict() for memory in self.memories]
        self.carried = {k: self.world.gather(torch.cat([state[k] for state in states])) for k in states[0]}
        super().checkpoint(is_best)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "memory": self.carried}


def pick_trainer(settings: LMSettings) -> type[LMTrainer]:
    if settings.phase == "phase2":
        return Phase2Trainer
    return LMTrainer if settings.tokens_per_doc is None else DocumentTrainer


def train_language_model(job: Job, folder: RunFolder, world: World) -> int:
    """Phases 'lm' and 'phase2': next-token cross entropy. Returns the signal that stopped it, 0 if none did."""
    trainer = pick_trainer(job.settings)(job, folder, world)
    checkpoint = folder.claim(trainer.job, world)
    if checkpoint is not None and folder.is_finished(checkpoint, job.settings):
        world.say(format_summary(json.loads((folder.path / "summary.json").read_text())))
        world.say(f"{folder.path} is finished, {checkpoint['iter_num']} steps; --overwrite=True trains it again")
        return 0
    trainer.build(checkpoint)
    if job.settings.eval_only:
        world.say(f"step {trainer.step} | val loss {trainer.validate():.4f}")
        return 0
    trainer.announce()
    if world.is_main:
        folder.begin(trainer.job, trainer.step if trainer.resumed else None)
    with StopRequest() as stop:
        received = trainer.train(stop)
    if not received and world.is_main:
        trainer.finish()
    return received


# --------------------------------------------------------------------------------------------- Phase 1: ContextBlocks


class Phase1Trainer:
    """Phase 1: each ContextBlock of a model alone, without labels, on its part of the training tokens."""

    def __init__(self, job: Job, folder: RunFolder, world: World) -> None:
        if world.size > 1:
            raise InputError("phase='phase1' trains in one process: start it without torchrun")
        self.settings: Phase1Settings = job.settings
        self.embeddings = load_embeddings(self.settings.embeddings)
        if self.embeddings is not None:
            job = with_embedding(job, *self.embeddings.table.shape)
        self.job, self.folder, self.world = job, folder, world
        self.train_data, self.val_data = open_tokens(self.settings, world, job.model_config.vocab_size)
        if self.embeddings is not None:
            check_tokenizer(self.settings.embeddings, self.embeddings.tokenizer, self.train_data)
        self.data = data_identity(self.train_data, self.val_data)
        self.reports: list[dict[str, Any]] = []  # of the blocks that are trained
        self.iteration, self.step, self.train_seconds = 0, 0, 0.0  # of this block, of the run, of the run
        self.resumed_block: dict[str, Any] | None = None

    def build(self, checkpoint: dict[str, Any] | None) -> None:
        """A model whose ContextBlocks are to be trained, or the one that a checkpoint of this run holds."""
        s = self.settings
        job = self.job if checkpoint is None else replace(self.job, settings=replace(s, init_from="resume"))
        self.model, self.lineage, _ = new_model(job, self.train_data, self.world)
        require_context_blocks(self.model, s)
        if self.embeddings is not None:
            self.model.embed_in.weight.data.copy_(self.embeddings.table)
            theirs, ours = self.embeddings.lineage, self.lineage
            self.lineage = Lineage([*ours.parents, *theirs.parents], ours.tokens_seen + theirs.tokens_seen)
        self.model.to(self.world.device)
        announce(self.job, self.model, self.train_data, self.folder, self.world)
        if checkpoint is not None:
            check_resumable(checkpoint, self.job, self.data, self.folder.path)
            self.model.load_state_dict(checkpoint["model"])
            self.lineage = Lineage(checkpoint["parents"], checkpoint["earlier_tokens"])
            self.reports, self.resumed_block = checkpoint["context_blocks"], checkpoint["block"]
            self.step, self.train_seconds = checkpoint["iter_num"], checkpoint["train_seconds"]

    def parts(self) -> list[Tensor]:
        """As many parts of the training tokens as there are blocks, (N,) int64 each, on the CPU."""
        tokens, count = self.train_data.tokens, len(self.model.context_blocks)
        split = len(tokens) // count
        parts = [tokens[i * split : (i + 1) * split][: self.settings.num_tokens] for i in range(count)]
        return [torch.from_numpy(part.astype(np.int64)) for part in parts]

    def part(self, number: int) -> Tensor:
        """The tokens that a block is trained on: its part, or the union of all."""
        return self.parts()[number] if self.settings.cascade_data == "split" else torch.cat(self.parts())

    def train(self, stop: StopRequest) -> int:
        """Train the blocks that are not yet trained, one after the other; returns the signal that stopped it, or 0."""
        for number in range(len(self.reports), len(self.model.context_blocks)):
            if received := self.train_block(number, stop):
                self.world.say(f"stopped at iteration {self.iteration}; the same command goes on from here")
                return received
        return 0

    def train_block(self, number: int, stop: StopRequest) -> int:
        """One ContextBlock to the end; returns the signal that stopped it, or 0."""
        s, block, tokens = self.settings, self.model.context_blocks[number], self.part(number)
        torch.manual_seed(s.seed + number)
        optimizer = torch.optim.Adam(block.parameters(), lr=s.learning_rate)
        contexts, rate = first_contexts(len(tokens), block.context_dim), 0.0
        if self.resumed_block is not None:
            optimizer.load_state_dict(self.resumed_block["optimizer"])
            contexts, rate = self.resumed_block["contexts"], self.resumed_block["rate"]
            self.iteration = self.resumed_block["iteration"]
            torch.set_rng_state(self.resumed_block["rng"])
            self.resumed_block = None
        self.world.say(f"ContextBlock {number}: {len(tokens):,} tokens, {block.context_dim} wide")
        while self.iteration < s.max_iterations and rate < s.early_stopping_threshold:
            started = time.perf_counter()
            loss, rate = oacd_iteration(
                block, self.model.embed_in.weight, tokens, contexts, optimizer,
                batch_size=s.batch_size, context_noise=s.context_noise, centroid_weight=s.centroid_weight,
                gradient_clip=s.gradient_clip, convergence_threshold=s.convergence_threshold,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            self.train_seconds += seconds
            self.iteration, self.step = self.iteration + 1, self.step + 1
            if not math.isfinite(loss):
                raise InputError(f"the loss of iteration {self.iteration} is {loss}: a lower learning_rate may help")
            self.world.say(f"iteration {self.iteration:3} | loss {loss:.5f} | convergence {rate:.1%} | {seconds:.2f}s")
            self.folder.log({"step": self.step, "block": number, "loss": loss, "convergence_rate": rate, "s": seconds})
            if self.iteration % s.checkpoint_interval == 0 or stop.signal:
                state = {"optimizer": optimizer.state_dict(), "contexts": contexts, "rate": rate}
                self.save({**state, "iteration": self.iteration, "rng": torch.get_rng_state()})
            if stop.signal:
                return stop.signal
        self.reports.append(self.report(number, tokens, contexts, rate))
        self.iteration = 0
        self.save(None)
        return 0

    @torch.no_grad()
    def report(self, number: int, tokens: Tensor, contexts: Tensor, rate: float) -> dict[str, Any]:
        """What the block is worth, by the exact recurrence with its weights, on training and on held-out tokens.

        exact_share: how many of the last iteration's contexts lie within the threshold of the exact ones.
        """
        s, block, table = self.settings, self.model.context_blocks[number], self.model.embed_in.weight
        exact, heldout_ids = exact_contexts(block, table, tokens), self.heldout_tokens()
        heldout = exact_contexts(block, table, heldout_ids)
        passes: dict[str, Any] = {"noise": s.context_noise, "threshold": s.convergence_threshold}
        passes["iterations"] = self.iteration
        return {
            "block": number,
            "context_dim": block.context_dim,
            "tokens": len(tokens),
            "num_tokens": s.num_tokens,
            **passes,
            "convergence_rate": rate,
            "exact_share": compute_convergence_rate(contexts, exact, s.convergence_threshold),
            "effective_rank": effective_rank(exact),
            "heldout_tokens": len(heldout),
            "heldout_convergence_rate": settled_share(block, table, heldout_ids, **passes),
            "heldout_effective_rank": effective_rank(heldout),
        }

    def heldout_tokens(self) -> Tensor:
        return torch.from_numpy(self.val_data.tokens[: self.settings.num_tokens].astype(np.int64))

    @torch.no_grad()
    def report_all(self) -> dict[str, Any]:
        """What all contexts, side by side, are worth: on an equal share of each block's tokens, and held out."""
        blocks, table = self.model.context_blocks, self.model.embed_in.weight
        share = math.ceil(self.settings.num_tokens / len(blocks))
        tokens = torch.cat([part[:share] for part in self.parts()])
        ranks = [
            effective_rank(torch.cat([exact_contexts(block, table, ids) for block in blocks], dim=1))
            for ids in (tokens, self.heldout_tokens())
        ]
        width = sum(block.context_dim for block in blocks)
        return {"context_dim": width, "effective_rank": ranks[0], "heldout_effective_rank": ranks[1]}

    def finish(self) -> None:
        """Write summary.json and show it."""
        s, path = self.settings, self.folder.path
        together = self.report_all() if len(self.reports) > 1 else None
        summary = {
            "model": s.model,
            "phase": s.phase,
            "iterations": self.step,
            "train_seconds": self.train_seconds,
            "seed": s.seed,
            "parents": self.lineage.parents,
            "commit": git_commit(),
            "checkpoint": str(path / "ckpt.pt"),
            "blocks": self.reports,
            "all_blocks": together,
        }
        self.folder.write_json("summary.json", summary)
        for r in self.reports:
            rows = [
                ["iterations", str(r["iterations"])],
                ["convergence rate", f"{r['convergence_rate']:.1%}"],
                ["  within the threshold of the exact recurrence", f"{r['exact_share']:.1%}"],
                ["held-out convergence rate", f"{r['heldout_convergence_rate']:.1%}"],
                *rank_rows(r),
            ]
            print("\n" + format_table([f"ContextBlock {r['block']}, {r['tokens']:,} tokens", "value"], rows))
        if together is not None:
            print("\n" + format_table(["all ContextBlocks side by side", "value"], rank_rows(together)))
        print(f"\ncheckpoint {path / 'ckpt.pt'}\nnext: phase 2 with --init_from={path}")

    def save(self, block: dict[str, Any] | None) -> None:
        """Save the run; block is the state of the one that is being trained, None between two."""
        state = {
            **checkpoint_header(self.job, self.data, self.step, self.lineage),
            "model": self.model.state_dict(),
            "context_blocks": self.reports,
            "block": block,
            "tokens_seen": self.lineage.tokens_seen,  # no language is learnt here
            "train_seconds": self.train_seconds,
        }
        self.folder.save(state, "ckpt.pt")


def rank_rows(report: dict[str, Any]) -> list[list[str]]:
    """The effective ranks of a report as rows of a table."""
    names = {"effective rank": "effective_rank", "held-out effective rank": "heldout_effective_rank"}
    return [[name, format_rank(report[key], report["context_dim"])] for name, key in names.items()]


def require_context_blocks(model: Any, settings: Any) -> None:
    if not hasattr(model, "context_blocks"):
        raise InputError(f"phase={settings.phase!r}: model={settings.model!r} has no ContextBlock to train or to read")


def train_context_blocks(job: Job, folder: RunFolder, world: World) -> int:
    """Phase 'phase1'. Returns the signal that stopped it, 0 if none did."""
    trainer = Phase1Trainer(job, folder, world)
    checkpoint = folder.claim(trainer.job, world)
    if checkpoint is not None and (folder.path / "summary.json").exists():
        world.say(f"{folder.path} is finished, {checkpoint['iter_num']} iterations; --overwrite=True trains it again")
        return 0
    trainer.build(checkpoint)
    folder.begin(trainer.job, None if checkpoint is None else trainer.step)
    with StopRequest() as stop:
        received = trainer.train(stop)
    if not received:
        trainer.finish()
    return received


def main() -> None:
    job = parse_train(sys.argv[1:], PHASES)
    folder = RunFolder(Path(job.settings.out_dir or Path("out", job.name)))
    train_phase = train_context_blocks if job.settings.phase == "phase1" else train_language_model
    with open_world(job.settings.device) as world, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(folder.leave)
        received = train_phase(job, folder, world)
    if received:
        sys.exit(128 + received)


if __name__ == "__main__":
    run(main)

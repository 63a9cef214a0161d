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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn as nn
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from configurator import Job, build_model, load_source, parse_train
from eval import evaluate_contexts, evaluate_model
from kit.contexts import ContextSettings, context_cache, exact_contexts, window_contexts, window_error
from kit.fast import safe_exp
from kit.files import InputError, one_line, run
from kit.report import duration, format_rank, format_summary, format_table
from kit.runs import RunFolder, StopRequest, World, git_commit, model_args, open_world, read_checkpoint
from kit.text import load_tokenizer
from kit.tokens import Documents, TokenFile, Windows, load_tokens, window_batch
from kit.weights import read_gpt2_table
from model_context import compute_convergence_rate, effective_rank, first_contexts, oacd_iteration
from prep import PrepSettings, prepare

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
    width_divisor: PositiveInt = 1  # divides hidden_size, intermediate_size, kv_dim and context_dim of the model
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu
    seed: NonNegativeInt = 1337  # of the weights and of the order of the data


@dataclass(frozen=True)
class LMSettings(TrainSettings):
    """Training a language model."""

    batch_size: PositiveInt = 4  # windows per micro-batch
    block_size: PositiveInt = 512  # tokens per window
    tokens_per_doc: PositiveInt | None = None  # train on stretches of documents, their memory carried along
    gradient_accumulation_steps: PositiveInt = 4  # micro-batches per step, shared out among the processes of torchrun
    learning_rate: NonNegativeFloat = 1e-3  # AdamW, after warmup
    min_lr: NonNegativeFloat = 1e-4  # learning rate at the end of the decay
    max_iters: NonNegativeInt = 1200  # optimizer steps
    warmup_iters: NonNegativeInt = 100  # steps of linear warmup
    lr_decay_iters: PositiveInt | None = None  # step at which min_lr is reached; None: max_iters
    decay_lr: bool = True  # cosine decay after warmup; False keeps learning_rate
    weight_decay: NonNegativeFloat = 0.1  # AdamW, on matrices only
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # AdamW
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95  # AdamW
    grad_clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0 does not clip
    eval_interval: PositiveInt = 100  # steps between evaluations and checkpoints
    eval_iters: PositiveInt = 20  # validation micro-batches per evaluation; the end of a run takes all of them
    log_interval: PositiveInt = 10  # steps between lines of the log
    patience: PositiveInt | None = None  # stop after so many evaluations without a better loss; None: never
    min_ppl_gain: NonNegativeFloat = 0.0  # how much lower the PPL has to be to count as better for patience
    eval_only: bool = False  # evaluate and stop
    final_eval: bool = True  # measure the trained model in full; False for a quick look
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products in training
    compile: bool | None = None  # torch.compile; None: on CUDA only

    def __post_init__(self) -> None:
        if self.decay_lr and self.learning_rate < self.min_lr:
            raise InputError(f"learning_rate={self.learning_rate} is below min_lr={self.min_lr}, at which it ends")
        if self.tokens_per_doc is not None and self.tokens_per_doc % self.block_size:
            raise InputError(f"tokens_per_doc={self.tokens_per_doc} is no multiple of block_size={self.block_size}")


@dataclass(frozen=True)
class Phase2Settings(LMSettings):
    """Training all of a model but its ContextBlock, on the exact contexts of the token stream."""

    context_cache: bool = True  # read the contexts from a file; False computes those of each batch, for huge corpora

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_doc is not None:
            raise InputError("tokens_per_doc is for phase='lm': contexts run through the whole stream")


@dataclass(frozen=True)
class Phase1Settings(TrainSettings):
    """Training a ContextBlock alone, without labels (OACD)."""

    embeddings: str = "random"  # the token table: 'random', 'gpt2' (hub), a GPT-2 folder, a run folder (its output's)
    num_tokens: PositiveInt = 100_000  # of the training tokens for each ContextBlock
    cascade_data: Literal["split", "all"] = "split"  # several blocks: each on its own part of the data, or on all parts
    max_iterations: PositiveInt = 100  # passes over all of them, one optimizer step each
    convergence_threshold: NonNegativeFloat = 0.03  # a context that moves by less, mean squared, has settled
    learning_rate: NonNegativeFloat = 0.003  # Adam
    batch_size: PositiveInt = 5_000  # tokens on the device at a time
    gradient_clip: NonNegativeFloat = 2.0  # largest norm of the gradient; 0 does not clip
    context_noise: NonNegativeFloat = 0.05  # standard deviation of what is added to the input contexts
    early_stopping_threshold: NonNegativeFloat = 0.9  # stop once this share of the contexts has settled
    centroid_weight: NonNegativeFloat = 0.1  # weight of the loss term that keeps the contexts' mean at the origin
    checkpoint_interval: PositiveInt = 10  # iterations between checkpoints


PHASES: dict[str, type[TrainSettings]] = {"lm": LMSettings, "phase1": Phase1Settings, "phase2": Phase2Settings}


# ---------------------------------------------------------------------------- a language model, phases lm and phase2


def train_language_model(job: Job, folder: RunFolder, world: World) -> int:
    """Next-token cross entropy, to the end or to a signal. Returns the signal that stopped it, 0 if none did."""
    if job.settings.phase == "phase2":
        job = with_parents_embedding(job, folder)
    s, device = job.settings, world.device
    if s.block_size > (limit := job.model_config.max_position_embeddings):
        raise InputError(f"block_size={s.block_size} is above the model's limit of {limit}")
    train_data, val_data = open_tokens(s, world, job.model_config.vocab_size)
    checkpoint = folder.claim(job, world)
    if checkpoint is not None and folder.is_finished(checkpoint, s):
        world.say(format_summary(json.loads((folder.path / "summary.json").read_text())))
        world.say(f"{folder.path} is finished, {checkpoint['iter_num']} steps; --overwrite=True trains it again")
        return 0

    model, lineage = start_model(job, train_data, val_data, checkpoint, folder, world)
    if s.phase == "phase2":
        model.freeze_for_phase2()
    batches = make_batches(job, model, train_data, world)
    optimizer = make_optimizer(model, s.learning_rate, s.weight_decay, (s.beta1, s.beta2))
    dtype, reason = pick_dtype(s.dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # keeps small gradients above zero
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step, best_val_loss, evaluations_without_gain, train_seconds = 0, math.inf, 0, 0.0
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if s.tokens_per_doc is not None:
            refuse_other_rows(checkpoint["config"], s, folder)
        batches.load_state_dict(checkpoint["batches"])
        torch.set_rng_state(checkpoint["rng"])
        step, best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
        evaluations_without_gain = checkpoint["evaluations_without_gain"]
        train_seconds = checkpoint["train_seconds"]
    if s.eval_only:
        world.say(f"step {step} | val loss {validate(model, val_data, s, world, autocast):.4f}")
        return 0
    trained = model  # what a training step calls: the model, compiled and shared as asked
    if s.compile if s.compile is not None else device.type == "cuda":
        trained = torch.compile(trained)
    if world.size > 1:
        trained = DistributedDataParallel(trained)
    tokens_a_step = s.batch_size * s.gradient_accumulation_steps * s.block_size
    announce(job, model, train_data, folder, world)
    world.say(f"{device} x {world.size}, {str(dtype).removeprefix('torch.')} ({reason}); {batches}")
    world.say(f"{s.max_iters} steps of {tokens_a_step:,} tokens" + (f", going on from step {step}" if step else ""))
    if world.is_main:
        folder.begin(job, None if checkpoint is None else step)

    losses: list[Tensor] = []  # of the steps since they were last looked at
    first_step, received, started = step, 0, time.perf_counter()
    with StopRequest() as stop:
        while True:
            # evaluate and save; a checkpoint is never ahead of what was logged
            is_due = step % s.eval_interval == 0 or step == s.max_iters
            is_due = is_due and not (checkpoint is not None and step == first_step)
            names = ["ckpt.pt"]
            if is_due:
                val_loss = validate(model, val_data, s, world, autocast)
                gain = safe_exp(best_val_loss) - safe_exp(val_loss)  # in PPL
                is_best = val_loss < best_val_loss
                evaluations_without_gain = 0 if is_best and gain >= s.min_ppl_gain else evaluations_without_gain + 1
                if is_best:  # best.pt first: killed between the two, the run comes to this best state again
                    best_val_loss, names = val_loss, ["best.pt", "ckpt.pt"]
                world.say(f"step {step} | val loss {val_loss:.4f}" + (" (best)" if is_best else ""))
                if world.is_main:
                    tokens_seen = lineage.tokens_seen + step * tokens_a_step
                    folder.log({"step": step, "val_loss": val_loss, "tokens_seen": tokens_seen})
            if is_due or received:
                carried = batches.state_dict()  # from all processes
                state = {
                    **checkpoint_header(job, train_data, val_data, step, lineage),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "batches": carried,
                    "rng": torch.get_rng_state(),
                    "best_val_loss": best_val_loss,
                    "evaluations_without_gain": evaluations_without_gain,
                    "tokens_seen": lineage.tokens_seen + step * tokens_a_step,
                    "train_seconds": train_seconds,
                }
                if world.is_main:
                    folder.save(state, *names)
                started = time.perf_counter()  # none of this is the training's time
            if received:
                world.say(f"stopped at step {step}; the same command goes on from here")
                return received
            if s.patience is not None and evaluations_without_gain >= s.patience:
                world.say(f"no better validation loss in {s.patience} evaluations: stopping early")
                break
            if step >= s.max_iters:
                break

            # forward, backward, update
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, s)
            total = torch.zeros((), device=device)
            for micro in range(batches.micro_steps):
                batch, share = batches.batch(step, micro)  # share of this process's windows
                if world.size > 1:
                    trained.require_backward_grad_sync = micro == batches.micro_steps - 1  # exchanged once a step
                with autocast:
                    loss = trained(**batch)[1]
                scaler.scale(loss * share).backward()
                total += loss.detach() * share
            if s.grad_clip > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(world.reduce(total) / world.size)
            step += 1

            # log
            received = stop.agreed(world)
            is_due = step % s.eval_interval == 0 or step == s.max_iters
            if step % s.log_interval == 0 or step == first_step + 1 or is_due or received:
                values = torch.stack(losses).tolist()
                refuse_infinite(values, step, folder)
                seconds = time.perf_counter() - started
                train_seconds, started = train_seconds + seconds, time.perf_counter()
                speed, left = len(values) * tokens_a_step / seconds, (s.max_iters - step) * seconds / len(values)
                lr, mean = learning_rate_at(step - 1, s), sum(values) / len(values)
                world.say(
                    f"step {step}/{s.max_iters} | loss {mean:.4f} | lr {lr:.2e} | {speed:,.0f} tokens/s | "
                    f"{duration(left)} left"
                )
                if world.is_main:
                    folder.log({"step": step, "losses": values, "lr": lr, "tokens_per_s": speed})
                if step == first_step + 1 and device.type == "cpu" and left > SLOW_RUN_SECONDS:
                    world.say(
                        f"on this CPU the run takes about {duration(left)}; with config/laptop.py on top, a model four "
                        "times narrower trains in minutes"
                    )
                losses = []

    if world.is_main:
        summary = {
            "model": s.model,
            "steps": step,
            "tokens_seen": lineage.tokens_seen + step * tokens_a_step,
            "train_seconds": train_seconds,
            "best_val_loss": best_val_loss,
            "seed": s.seed,
            "parents": lineage.parents,
            "commit": git_commit(),
            "checkpoint": str(folder.path / "ckpt.pt"),
        }
        if s.final_eval:
            tokenizer = load_tokenizer(val_data.meta["tokenizer"], s.data_dir)
            summary |= evaluate_model(model, val_data, tokenizer, s.block_size, s.batch_size, lineage.context_blocks)
        folder.write_json("summary.json", summary)
        print(format_summary(summary))
        print(f"\nnext: python sample.py {folder.path}   or   python eval.py {folder.path}")
    return 0


def refuse_other_rows(theirs: dict[str, Any], s: LMSettings, folder: RunFolder) -> None:
    """Raises InputError if the rows of a step are not where a checkpoint's were in their documents."""
    for name in ("tokens_per_doc", "block_size", "batch_size", "gradient_accumulation_steps", "seed"):
        if getattr(s, name) != theirs[name]:
            raise InputError(f"going on within documents needs {name}={theirs[name]}, as {folder.path} has it")


def make_batches(job: Job, model: Any, data: TokenFile, world: World) -> Windows | Documents:
    """What the steps of a phase train on: windows, windows with their contexts, or documents window by window."""
    s = job.settings
    rows = s.batch_size * s.gradient_accumulation_steps
    if rows % world.size:
        raise InputError(
            f"batch_size x gradient_accumulation_steps = {rows} windows a step cannot be shared evenly among "
            f"{world.size} processes"
        )
    if s.tokens_per_doc is not None:
        segment_len = getattr(job.model_config, "segment_len", None)
        if segment_len is None:
            raise InputError(f"tokens_per_doc={s.tokens_per_doc}: model={s.model!r} has no memory to carry")
        if s.block_size % segment_len:
            raise InputError(f"tokens_per_doc: block_size={s.block_size} is no multiple of segment_len={segment_len}")
        return Documents(data, s.tokens_per_doc, s.block_size, rows, s.batch_size, s.seed, world, model.init_memory)
    if s.phase == "lm":
        return Windows(data, s.block_size, rows, s.batch_size, s.seed, world)
    making = ContextSettings(init_from=s.init_from)
    if s.context_cache:
        if world.is_main:
            context_cache(model, data, making)
        world.barrier()  # the others find it made
        cache = context_cache(model, data, making)
    elif world.is_main:
        error = window_error(model, data.tokens, making.overlap)
        print(f"contexts: of each batch, from {making.overlap} tokens before its windows; at most {error:.0e} off")

    def contexts(starts: np.ndarray, width: int) -> Tensor:
        if not s.context_cache:
            return window_contexts(model, data.tokens, starts, width, making.overlap)
        return torch.from_numpy(cache.contexts[starts[:, None] + np.arange(width)]).to(world.device)

    # positions that are independent, given their contexts, are drawn one by one, as many as the windows would hold
    width, each = (1, s.block_size) if getattr(model, "positions_are_independent", False) else (s.block_size, 1)
    return Windows(data, width, rows * each, s.batch_size * each, s.seed, world, contexts)


@torch.no_grad()
def validate(
    model: Any, data: TokenFile, s: LMSettings, world: World, autocast: contextlib.AbstractContextManager[Any]
) -> float:
    """Mean loss over eval_iters micro-batches of windows, spread evenly over the validation data."""
    block_size = min(s.block_size, len(data.tokens) - 1)
    count = max(1, min(s.eval_iters * s.batch_size, (len(data.tokens) - 1) // block_size))
    starts = np.linspace(0, len(data.tokens) - 1 - block_size, count).astype(np.int64)[world.rank :: world.size]
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for first in range(0, len(starts), s.batch_size):
        batch = window_batch(data.tokens, starts[first : first + s.batch_size], block_size, world.device)
        with autocast:
            total += model(**batch)[1] * len(batch["idx"])
    return world.reduce(total).item() / count


def refuse_infinite(losses: list[float], step: int, folder: RunFolder) -> None:
    """Raises InputError if one of the last losses is not finite, before anything of it is saved."""
    for number, loss in enumerate(losses, step - len(losses) + 1):
        if not math.isfinite(loss):
            raise InputError(
                f"the loss of step {number} is {loss}: stopped, {folder.path / 'ckpt.pt'} keeps the last good state; "
                "a lower learning_rate or more warmup_iters may help"
            )


def learning_rate_at(step: int, settings: LMSettings) -> float:
    """Linear warmup, then cosine decay to min_lr."""
    s, decay_iters = settings, settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if not s.decay_lr:
        return s.learning_rate
    progress = min(1.0, (step - s.warmup_iters) / max(1, decay_iters - s.warmup_iters))
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over what is trained: matrices and embeddings decay, biases, LayerNorms and scores of any shape do not."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


# ------------------------------------------------------------------------------------------- Phase 1: ContextBlocks


def train_context_blocks(job: Job, folder: RunFolder, world: World) -> int:
    """Each ContextBlock of a model alone, without labels, on its part of the training tokens (OACD, model_context.py).

    Returns the signal that stopped it, 0 if none did.
    """
    if world.size > 1:
        raise InputError("phase='phase1' trains in one process: start it without torchrun")
    s: Phase1Settings = job.settings
    embeddings = load_embeddings(s.embeddings)
    if embeddings is not None:
        job = with_embedding(job, *embeddings.table.shape)
    train_data, val_data = open_tokens(s, world, job.model_config.vocab_size)
    if embeddings is not None:
        check_tokenizer(s.embeddings, embeddings.tokenizer, train_data)
    checkpoint = folder.claim(job, world)
    if checkpoint is not None and (folder.path / "summary.json").exists():
        world.say(f"{folder.path} is finished, {checkpoint['iter_num']} iterations; --overwrite=True trains it again")
        return 0

    model, lineage = start_model(job, train_data, val_data, checkpoint, folder, world)
    reports: list[dict[str, Any]] = []  # of the blocks that are trained
    step, train_seconds, half_trained = 0, 0.0, None
    if checkpoint is not None:
        reports, half_trained = checkpoint["context_blocks"], checkpoint["block"]
        step, train_seconds = checkpoint["iter_num"], checkpoint["train_seconds"]
    elif embeddings is not None:
        model.embed_in.weight.data.copy_(embeddings.table)
        theirs = embeddings.lineage
        lineage = Lineage([*lineage.parents, *theirs.parents], lineage.tokens_seen + theirs.tokens_seen)
    announce(job, model, train_data, folder, world)
    folder.begin(job, None if checkpoint is None else step)

    def save(block: dict[str, Any] | None) -> None:
        """Save the run; block is the state of the one that is being trained, None between two."""
        state = {
            **checkpoint_header(job, train_data, val_data, step, replace(lineage, context_blocks=reports)),
            "model": model.state_dict(),
            "block": block,
            "tokens_seen": lineage.tokens_seen,  # no language is learnt here
            "train_seconds": train_seconds,
        }
        folder.save(state, "ckpt.pt")

    parts = block_parts(train_data.tokens, len(model.context_blocks), s)
    with StopRequest() as stop:
        for number in range(len(reports), len(parts)):
            block, tokens = model.context_blocks[number], parts[number]
            torch.manual_seed(s.seed + number)
            optimizer = torch.optim.Adam(block.parameters(), lr=s.learning_rate)
            contexts, rate, iteration = first_contexts(len(tokens), block.context_dim), 0.0, 0
            if half_trained is not None:
                optimizer.load_state_dict(half_trained["optimizer"])
                contexts, rate = half_trained["contexts"], half_trained["rate"]
                iteration = half_trained["iteration"]
                torch.set_rng_state(half_trained["rng"])
                half_trained = None
            world.say(f"ContextBlock {number}: {len(tokens):,} tokens, {block.context_dim} wide")
            while iteration < s.max_iterations and rate < s.early_stopping_threshold:
                started = time.perf_counter()
                loss, rate = oacd_iteration(
                    block, model.embed_in.weight, tokens, contexts, optimizer,
                    batch_size=s.batch_size, context_noise=s.context_noise, centroid_weight=s.centroid_weight,
                    gradient_clip=s.gradient_clip, convergence_threshold=s.convergence_threshold,
                )  # fmt: skip
                seconds = time.perf_counter() - started
                iteration, step, train_seconds = iteration + 1, step + 1, train_seconds + seconds
                if not math.isfinite(loss):
                    raise InputError(f"the loss of iteration {iteration} is {loss}: a lower learning_rate may help")
                world.say(f"iteration {iteration:3} | loss {loss:.5f} | convergence {rate:.1%} | {seconds:.2f}s")
                folder.log({"step": step, "block": number, "loss": loss, "convergence_rate": rate, "s": seconds})
                received = stop.signal
                if iteration % s.checkpoint_interval == 0 or received:
                    state = {"optimizer": optimizer.state_dict(), "contexts": contexts, "rate": rate}
                    save({**state, "iteration": iteration, "rng": torch.get_rng_state()})
                if received:
                    world.say(f"stopped at iteration {iteration}; the same command goes on from here")
                    return received
            exact = exact_contexts(block, model.embed_in.weight, tokens)
            report = {
                "block": number,
                "context_dim": block.context_dim,
                "tokens": len(tokens),
                "num_tokens": s.num_tokens,
                "iterations": iteration,
                "noise": s.context_noise,
                "threshold": s.convergence_threshold,
                "convergence_rate": rate,
                "exact_share": compute_convergence_rate(contexts, exact, s.convergence_threshold),
                "effective_rank": effective_rank(exact),
            }
            reports.append(report)
            save(None)

    heldout = evaluate_contexts(model, val_data.tokens, reports)
    for report, rate, rank in zip(
        reports, heldout["context_convergence_rates"], heldout["context_effective_ranks"], strict=True
    ):
        report |= {"heldout_convergence_rate": rate, "heldout_effective_rank": rank}
    together = {
        "context_dim": heldout["context_dim"],
        "effective_rank": training_rank(model, parts),
        "heldout_effective_rank": heldout["context_effective_rank"],
    }
    summary = {
        "model": s.model,
        "phase": s.phase,
        "iterations": step,
        "train_seconds": train_seconds,
        "seed": s.seed,
        "parents": lineage.parents,
        "commit": git_commit(),
        "checkpoint": str(folder.path / "ckpt.pt"),
        "blocks": reports,
        "all_blocks": together,
    }
    folder.write_json("summary.json", summary)
    print_blocks(reports, together)
    print(f"\ncheckpoint {folder.path / 'ckpt.pt'}\nnext: phase 2 with --init_from={folder.path}")
    return 0


def block_parts(tokens: np.ndarray, count: int, s: Phase1Settings) -> list[Tensor]:
    """What each of count blocks is trained on, (N,) int64 on the CPU: its part of the stream, or the union of all."""
    split = len(tokens) // count
    parts = [tokens[i * split : (i + 1) * split][: s.num_tokens] for i in range(count)]
    found = [torch.from_numpy(part.astype(np.int64)) for part in parts]
    return found if s.cascade_data == "split" else [torch.cat(found)] * count


@torch.no_grad()
def training_rank(model: Any, parts: list[Tensor]) -> float:
    """Effective rank of all contexts, side by side, on an equal share of each block's training tokens."""
    tokens = torch.cat([part[: math.ceil(len(part) / len(parts))] for part in parts])
    exact = [exact_contexts(block, model.embed_in.weight, tokens) for block in model.context_blocks]
    return effective_rank(torch.cat(exact, dim=1))


def print_blocks(reports: list[dict[str, Any]], together: dict[str, Any]) -> None:
    """The figures of phase 1, a table for each block and one for all of them."""

    def ranks(r: dict[str, Any]) -> list[list[str]]:
        names = {"effective rank": "effective_rank", "held-out effective rank": "heldout_effective_rank"}
        return [[name, format_rank(r[key], r["context_dim"])] for name, key in names.items()]

    for r in reports:
        rows = [
            ["iterations", str(r["iterations"])],
            ["convergence rate", f"{r['convergence_rate']:.1%}"],
            ["  within the threshold of the exact recurrence", f"{r['exact_share']:.1%}"],
            ["held-out convergence rate", f"{r['heldout_convergence_rate']:.1%}"],
            *ranks(r),
        ]
        print("\n" + format_table([f"ContextBlock {r['block']}, {r['tokens']:,} tokens", "value"], rows))
    if len(reports) > 1:
        print("\n" + format_table(["all ContextBlocks side by side", "value"], ranks(together)))


# ------------------------------------------------------------------------------------------- what a run starts with


@dataclass(frozen=True)
class Lineage:
    """What a model was trained on before this run."""

    parents: list[str] = field(default_factory=list)
    tokens_seen: int = 0
    context_blocks: list[dict[str, Any]] = field(default_factory=list)  # what phase 1 reports of its ContextBlocks

    @staticmethod
    def of(source: str, checkpoint: dict[str, Any]) -> "Lineage":
        """That of a run which starts from a source with this checkpoint."""
        return Lineage([*checkpoint["parents"], source], checkpoint["tokens_seen"], checkpoint["context_blocks"])


def start_model(
    job: Job, train_data: TokenFile, val_data: TokenFile, checkpoint: dict[str, Any] | None, folder: RunFolder,
    world: World,
) -> tuple[Any, Lineage]:  # fmt: skip
    """The job's model and where it comes from: this run's checkpoint, the source that init_from names, or new.

    Raises InputError if the checkpoint was made on other data or by another model, or the source does not fit.
    """
    s = job.settings
    torch.manual_seed(s.seed)
    model = build_model(s.model, job.model_config).to(world.device)
    if s.phase != "lm" and not hasattr(model, "context_blocks"):
        raise InputError(f"phase={s.phase!r}: model={s.model!r} has no ContextBlock to train or to read")
    if checkpoint is not None:
        if checkpoint["data"] != data_identity(train_data, val_data):
            raise InputError(f"{folder.path} was trained on other data than {s.dataset} now holds")
        if checkpoint["model_args"] != model_args(job.model_config):
            raise InputError(f"{folder.path} holds a model with other settings")
        model.load_state_dict(checkpoint["model"])
        return model, Lineage(checkpoint["parents"], checkpoint["earlier_tokens"], checkpoint["context_blocks"])
    if s.init_from == "scratch":
        if s.phase == "phase2":
            raise InputError("phase='phase2' needs trained ContextBlocks: init_from has to name a run of phase 1")
        return model, Lineage()
    if job.parent and not Path(s.init_from, "ckpt.pt").exists():
        raise InputError(f"init_from: {s.init_from} is missing; make it with: {job.parent}")
    source, theirs = load_source(s.init_from)
    lineage = Lineage()
    if theirs is not None:
        check_tokenizer(s.init_from, theirs["data"]["tokenizer"], train_data)
        lineage = Lineage.of(s.init_from, theirs)
    try:
        became = model.start_from(source.to(world.device))
    except ValueError as error:
        raise InputError(f"init_from={s.init_from}: {one_line(error)}") from None
    if s.phase == "phase2" and any(how == "new" and name.startswith("context_block") for name, how in became.items()):
        raise InputError(f"init_from={s.init_from} holds no ContextBlock that fits this model")
    for how in ("copied", "converted", "new"):
        tensors = [name for name, what in became.items() if what == how]
        names = "" if how == "copied" else f" ({', '.join(tensors)})"
        world.say(f"{how:>9}: {len(tensors)} tensors{names}")
    return model, lineage


def check_tokenizer(source: str, theirs: str, data: TokenFile) -> None:
    """Raises InputError if a source's ids mean other tokens than the data's."""
    if theirs != (ours := data.meta["tokenizer"]):
        raise InputError(
            f"{source} was trained on {theirs} tokens, {data.path} holds {ours} tokens; "
            f"prep.py --tokenizer={theirs} makes others"
        )


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
        lineage = Lineage.of(source, checkpoint)
        return Embeddings(model.head_weight.detach(), checkpoint["data"]["tokenizer"], lineage)
    try:
        return Embeddings(read_gpt2_table(source), "gpt2", Lineage([source]))
    except InputError as error:
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


def with_parents_embedding(job: Job, folder: RunFolder) -> Job:
    """Phase 2's job, its embedding of the size of phase 1's."""
    parent = folder.path if job.settings.init_from == "resume" else Path(job.settings.init_from)
    if not (parent / "ckpt.pt").is_file():  # start_model says so
        return job
    theirs = read_checkpoint(parent)["model_args"]
    return with_embedding(job, theirs["vocab_size"], theirs["hidden_size"])


def data_identity(train: TokenFile, val: TokenFile) -> dict[str, str]:
    return {"tokenizer": train.meta["tokenizer"], "train_sha256": train.digest, "val_sha256": val.digest}


def checkpoint_header(job: Job, train: TokenFile, val: TokenFile, step: int, lineage: Lineage) -> dict[str, Any]:
    """What a checkpoint of any phase says of itself."""
    return {
        "model_args": model_args(job.model_config),
        "iter_num": step,
        "config": asdict(job.settings),
        "data": data_identity(train, val),
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

"""Trains what a config picks: the model, the phase, the data.

    python train.py config/mla_kv128.py config/laptop.py --max_iters=500
    torchrun --standalone --nproc_per_node=2 train.py config/mla_kv128.py

A run writes out_dir: ckpt.pt (the last state), best.pt (the best validation loss), config.json, log.jsonl and, when it
is finished, summary.json. The same command again goes on from the last checkpoint, bit for bit.
"""

import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn as nn
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import MODELS, Job, load_source, make, parse_train
from eval import evaluate_contexts, evaluate_model
from kit.contexts import ContextSettings, context_cache, exact_contexts, freeze_contexts, window_contexts, window_error
from kit.files import InputError, refusing, run
from kit.muon import Muon
from kit.report import format_summary
from kit.runs import RunFolder, World, git_commit, open_world, read_checkpoint, stop_signals
from kit.tokens import Documents, TokenFile, Windows, load_tokens, window_batch
from kit.weights import load_pretrained, model_args
from model_context import compute_convergence_rate, effective_rank, first_contexts, oacd_iteration
from prep import PrepSettings, prepare

LOWER_RATE = "stopped, ckpt.pt keeps the last good state; a lower learning_rate may help"


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
    log_to: Literal["tensorboard", "wandb"] | None = None  # where the log is shown besides log.jsonl


@dataclass(frozen=True)
class LMSettings(TrainSettings):
    """Training a language model; in phase 2 all of it but its ContextBlocks, on the exact contexts of the tokens."""

    batch_size: PositiveInt = 4  # windows per micro-batch
    block_size: PositiveInt = 512  # tokens per window
    tokens_per_doc: PositiveInt | None = None  # train on stretches of documents, their memory carried along
    gradient_accumulation_steps: PositiveInt = 4  # micro-batches per step, shared out among the processes of torchrun
    optimizer: Literal["adamw", "muon"] = "adamw"  # 'muon': Muon for the layers' matrices, AdamW for all the rest
    learning_rate: NonNegativeFloat = 1e-3  # after warmup
    min_lr: NonNegativeFloat = 1e-4  # learning rate at the end of the decay
    max_iters: NonNegativeInt = 1200  # optimizer steps
    warmup_iters: NonNegativeInt = 100  # steps of linear warmup
    lr_decay_iters: PositiveInt | None = None  # step at which min_lr is reached; None: max_iters
    decay_lr: bool = True  # cosine decay after warmup; False keeps learning_rate
    weight_decay: NonNegativeFloat = 0.1  # on matrices only
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # AdamW
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95  # AdamW
    grad_clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0 does not clip
    eval_interval: PositiveInt = 100  # steps between evaluations and checkpoints
    eval_iters: PositiveInt = 20  # validation micro-batches per evaluation; the end of a run takes all of them
    log_interval: PositiveInt = 10  # steps between lines of the log
    patience: PositiveInt | None = None  # stop after so many evaluations without a better loss; None: never
    min_ppl_gain: NonNegativeFloat = 0.0  # how much lower the PPL has to be to count as better for patience
    final_eval: bool = True  # measure the trained model in full; False for a quick look
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products in training
    compile: bool | None = None  # torch.compile; None: on CUDA only
    context_cache: bool = True  # phase 2 reads its contexts from a file; False computes each batch's, for huge corpora

    def __post_init__(self) -> None:
        if self.decay_lr and self.learning_rate < self.min_lr:
            raise InputError(f"learning_rate={self.learning_rate} is below min_lr={self.min_lr}, at which it ends")
        if self.tokens_per_doc is not None and self.tokens_per_doc % self.block_size:
            raise InputError(f"tokens_per_doc={self.tokens_per_doc} is no multiple of block_size={self.block_size}")
        if self.phase == "phase2" and self.init_from == "scratch":
            raise InputError("phase='phase2' needs trained ContextBlocks: init_from has to name a run of phase 1")


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


PHASES: dict[str, type[TrainSettings]] = {"lm": LMSettings, "phase1": Phase1Settings, "phase2": LMSettings}


# ------------------------------------------------------------------------------ a language model, phases lm and phase2
def train_language_model(s: LMSettings, model: Any, data: TokenFile, val_data: TokenFile, folder: RunFolder) -> None:
    """Next-token cross entropy, to the end or to a signal, which becomes the exit status."""
    world, head, checkpoint = folder.world, folder.head, folder.checkpoint
    if s.phase == "phase2":
        freeze_contexts(model)
    batches = make_batches(s, model, data, folder)
    optimizers = make_optimizers(model, s)
    dtype = pick_dtype(s.dtype, world.device)
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)  # keeps small gradients above zero
    parts: dict[str, Any] = {**optimizers, "scaler": scaler} | ({"batches": batches} if s.tokens_per_doc else {})
    step, tokens_seen, train_seconds = (head[key] for key in ("iter_num", "tokens_seen", "train_seconds"))
    best_val_loss, evaluations_without_gain = math.inf, 0
    if checkpoint is not None:
        for name, part in parts.items():
            if checkpoint[name]:  # of a scaler that was not needed there, nothing
                part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        best_val_loss, evaluations_without_gain = checkpoint["best_val_loss"], checkpoint["evaluations_without_gain"]
    is_compiled = world.device.type == "cuda" if s.compile is None else s.compile
    trained: Any = torch.compile(model) if is_compiled else model  # what a training step calls
    trained = DistributedDataParallel(trained) if world.size > 1 else trained
    world.say(f"{world.device} x {world.size}, {dtype}; steps {step} to {s.max_iters}")
    if world.device.type == "cpu" and s.width_divisor == 1:
        world.say("slow on a CPU? With config/laptop.py on top a model is four times narrower")
    folder.begin()

    losses: list[Tensor] = []  # of the steps since they were last looked at
    is_due, first_step, received, started = checkpoint is None, step, 0, time.perf_counter()
    tokens_a_step = s.batch_size * s.gradient_accumulation_steps * s.block_size
    with stop_signals() as signals:
        while True:
            # evaluate
            is_best = False
            if is_due:
                val_loss = validate(s, model, val_data, world, autocast)
                gain = np.exp(best_val_loss) - np.exp(val_loss)  # in PPL
                is_best = val_loss < best_val_loss
                evaluations_without_gain = 0 if is_best and gain >= s.min_ppl_gain else evaluations_without_gain + 1
                best_val_loss = min(best_val_loss, val_loss)
                world.say(f"step {step} | val loss {val_loss:.4f}" + (" (best)" if is_best else ""))
                folder.log({"step": step, "val_loss": val_loss, "tokens_seen": tokens_seen})

            # save; a checkpoint is never ahead of what was logged, nor of best.pt
            if is_due or received:
                state = {"iter_num": step, "tokens_seen": tokens_seen, "train_seconds": train_seconds}
                state |= {"best_val_loss": best_val_loss, "evaluations_without_gain": evaluations_without_gain}
                state |= {name: part.state_dict() for name, part in [("model", model), *parts.items()]}
                names = ["best.pt", "ckpt.pt"] if is_best else ["ckpt.pt"]
                folder.save({**state, "rng": torch.get_rng_state()}, *names)
                started = time.perf_counter()  # none of this is the training's time
            if received:
                world.say(f"stopped at step {step}; the same command goes on from here")
                sys.exit(128 + received)
            if s.patience is not None and evaluations_without_gain >= s.patience:
                world.say(f"no better validation loss in {s.patience} evaluations: stopping early")
                break
            if step >= s.max_iters:
                break

            # forward, backward, clip, step
            lr = learning_rate_at(step, s)
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr
            total = torch.zeros(1, device=world.device)
            for micro in range(batches.micro_steps):
                batch, share = batches.batch(step, micro)  # share of this process's windows
                if world.size > 1:
                    trained.require_backward_grad_sync = micro == batches.micro_steps - 1  # exchanged once a step
                with autocast:
                    loss = trained(**batch)[1]
                scaler.scale(loss * share).backward()
                total += loss.detach() * share
            if s.grad_clip > 0:
                for optimizer in optimizers.values():
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
            for optimizer in optimizers.values():
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none=True)
            losses.append(world.gather(total).mean())
            step, tokens_seen = step + 1, tokens_seen + tokens_a_step

            # log
            received = world.agree(signals)
            is_due = step % s.eval_interval == 0 or step == s.max_iters
            if step % s.log_interval == 0 or step == first_step + 1 or is_due or received:
                values, losses = torch.stack(losses).tolist(), []
                if not np.isfinite(values).all():
                    bad = step - len(values) + 1 + int(np.isfinite(values).argmin())
                    raise InputError(f"the loss of step {bad} is no number: {LOWER_RATE}")
                seconds = time.perf_counter() - started
                train_seconds, started = train_seconds + seconds, time.perf_counter()
                loss, speed = sum(values) / len(values), len(values) * tokens_a_step / seconds
                left = tqdm.format_interval((s.max_iters - step) * seconds / len(values))
                said = f"step {step}/{s.max_iters} | loss {loss:.4f} | lr {lr:.2e} | {speed:,.0f} tokens/s"
                world.say(f"{said} | {left} left")
                folder.log({"step": step, "loss": loss, "losses": values, "lr": lr, "tokens_per_s": speed})

    figures = {"steps": step, "tokens_seen": tokens_seen, "best_val_loss": best_val_loss}
    if s.final_eval and world.is_main:
        figures |= evaluate_model(model, val_data, s.block_size, s.batch_size, head["context_blocks"])
        del figures["document_losses"]  # of interest beside another run's only
    world.say(format_summary(folder.finish(train_seconds, figures)))
    world.say(f"\nnext: python sample.py {folder.path}   or   python eval.py {folder.path}")


def make_batches(s: LMSettings, model: Any, data: TokenFile, folder: RunFolder) -> Windows | Documents:
    """What the steps of a phase train on: windows, windows with their contexts, or documents window by window."""
    world, rows = folder.world, s.batch_size * s.gradient_accumulation_steps
    if s.block_size > (limit := model.config.max_position_embeddings):
        raise InputError(f"block_size={s.block_size} is above the model's limit of {limit}")
    if rows % world.size or rows > len(data.tokens):
        fits = f"a multiple of {world.size} processes, at most the {len(data.tokens)} training tokens"
        raise InputError(f"batch_size x gradient_accumulation_steps = {rows} has to be {fits}")
    windows = data, s.block_size, rows, s.batch_size, s.seed, world
    if s.tokens_per_doc is not None:
        segment_len = getattr(model.config, "segment_len", None)
        if segment_len is None or s.block_size % segment_len:
            fits = f"no memory to carry, or block_size={s.block_size} is no multiple of segment_len={segment_len}"
            raise InputError(f"tokens_per_doc={s.tokens_per_doc}: model={s.model!r} has {fits}")
        return Documents(*windows, tokens_per_doc=s.tokens_per_doc, init_memory=model.init_memory)
    if s.phase == "lm":
        return Windows(*windows)
    making = ContextSettings(init_from=s.init_from)
    cached = context_cache(model, data, making) if s.context_cache else None
    if cached is None and folder.checkpoint is None:
        error = window_error(model, data.tokens, making.overlap)
        world.say(f"contexts: of each batch, from {making.overlap} tokens before its windows; at most {error:.0e} off")

    def contexts(starts: np.ndarray, width: int) -> Tensor:
        if cached is None:
            return window_contexts(model, data.tokens, starts, width, making.overlap)
        return torch.from_numpy(cached[starts[:, None] + np.arange(width)]).to(world.device)

    # positions that are independent, given their contexts, are drawn one by one, as many as the windows would hold
    width, each = (1, s.block_size) if getattr(model, "positions_are_independent", False) else (s.block_size, 1)
    return Windows(data, width, rows * each, s.batch_size * each, s.seed, world, contexts)


@torch.no_grad()
def validate(s: LMSettings, model: Any, data: TokenFile, world: World, autocast: torch.autocast) -> float:
    """Mean loss over eval_iters micro-batches of windows, spread evenly over the validation data."""
    tokens, block_size = data.tokens, min(s.block_size, len(data.tokens) - 1)
    count = min(s.eval_iters * s.batch_size, (len(tokens) - 1) // block_size)
    starts = np.linspace(0, len(tokens) - 1 - block_size, count).astype(np.int64)[world.rank :: world.size]
    total = torch.zeros(1, device=world.device)
    for first in range(0, len(starts), s.batch_size):
        batch = window_batch(tokens, starts[first : first + s.batch_size], block_size, world.device)
        with autocast:
            total += model(**batch)[1] * len(batch["idx"])
    return world.gather(total).sum().item() / count


def learning_rate_at(step: int, s: LMSettings) -> float:
    """Linear warmup, then cosine decay to min_lr."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if not s.decay_lr:
        return s.learning_rate
    progress = min(1.0, (step - s.warmup_iters) / max(1, (s.lr_decay_iters or s.max_iters) - s.warmup_iters))
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)


def make_optimizers(model: Any, s: LMSettings) -> dict[str, torch.optim.Optimizer]:
    """By their keys in a checkpoint. Matrices and embeddings decay; biases, LayerNorms and any scores do not."""
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)} | {model.head_weight}
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - tables
    for_muon = matrices if s.optimizer == "muon" else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p in (tables | matrices) - for_muon]
    others = [p for p in trained if p not in tables | matrices]
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)
    hidden = [p for p in trained if p in for_muon]
    return {"optimizer": adamw} | ({"muon": Muon(hidden, s.learning_rate, s.weight_decay)} if for_muon else {})


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products in training; 'auto' takes bfloat16 where it is fast, on older GPUs float16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and is_fast else torch.float32


# ------------------------------------------------------------------------------------------- Phase 1: ContextBlocks
def train_phase1(s: Phase1Settings, model: Any, data: TokenFile, val_data: TokenFile, folder: RunFolder) -> None:
    """Each ContextBlock alone, without labels (OACD), to the end or to a signal, which becomes the exit status."""
    world, checkpoint = folder.world, folder.checkpoint
    if world.size > 1:
        raise InputError("phase='phase1' trains in one process: start it without torchrun")
    step, train_seconds = folder.head["iter_num"], folder.head["train_seconds"]
    reports, half_trained = (checkpoint["context_blocks"], checkpoint["block"]) if checkpoint else ([], None)
    folder.begin()

    def save(half_trained: dict[str, Any] | None) -> None:
        state = {"iter_num": step, "train_seconds": train_seconds, "context_blocks": reports, "block": half_trained}
        folder.save({**state, "model": model.state_dict()}, "ckpt.pt")

    table, parts = model.embed_in.weight, block_parts(data.tokens, len(model.context_blocks), s)
    keys = ("batch_size", "context_noise", "centroid_weight", "gradient_clip", "convergence_threshold")
    settings = {key: getattr(s, key) for key in keys}
    with stop_signals() as signals:
        for number in range(len(reports), len(parts)):
            block, tokens = model.context_blocks[number], parts[number]
            torch.manual_seed(s.seed + number)
            optimizer = torch.optim.Adam(block.parameters(), lr=s.learning_rate)
            contexts, rate, iteration = first_contexts(len(tokens), block.context_dim), 0.0, 0
            if half_trained:
                optimizer.load_state_dict(half_trained["optimizer"])
                torch.set_rng_state(half_trained["rng"])
                contexts, rate, iteration = (half_trained[key] for key in ("contexts", "rate", "iteration"))
                half_trained = None
            world.say(f"ContextBlock {number}: {len(tokens):,} tokens, {block.context_dim} wide")
            while iteration < s.max_iterations and rate < s.early_stopping_threshold:
                started = time.perf_counter()
                loss, rate = oacd_iteration(block, table, tokens, contexts, **settings)
                optimizer.step()
                seconds = time.perf_counter() - started
                iteration, step, train_seconds = iteration + 1, step + 1, train_seconds + seconds
                if not math.isfinite(loss):
                    raise InputError(f"the loss of iteration {iteration} is no number: {LOWER_RATE}")
                world.say(f"iteration {iteration:3} | loss {loss:.5f} | convergence {rate:.1%} | {seconds:.2f}s")
                folder.log({"step": step, "block": number, "loss": loss, "convergence_rate": rate, "s": seconds})
                received = world.agree(signals)
                if iteration % s.checkpoint_interval == 0 or received:
                    state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
                    save(state | {"contexts": contexts, "rate": rate, "iteration": iteration})
                if received:
                    world.say(f"stopped at iteration {iteration}; the same command goes on from here")
                    sys.exit(128 + received)
            exact = exact_contexts(block, table, tokens)
            share, rank = compute_convergence_rate(contexts, exact, s.convergence_threshold), effective_rank(exact)
            report = {"block": number, "context_dim": block.context_dim, "tokens": len(tokens), "iterations": iteration}
            report |= {"convergence_rate": rate, "exact_share": share, "effective_rank": rank}
            report |= {"num_tokens": s.num_tokens, "noise": s.context_noise, "threshold": s.convergence_threshold}
            reports.append(report)
            save(None)
            rank_share = f"effective rank {rank:.1f}/{block.context_dim} = {rank / block.context_dim:.1%}"
            world.say(f"converged {rate:.1%}, {share:.1%} as exact, {rank_share}")

    heldout = evaluate_contexts(model, val_data.tokens, reports)
    summary = folder.finish(train_seconds, {"steps": step, "blocks": reports, **heldout})
    world.say(f"on held-out tokens:\n{format_summary(summary)}\n\nnext: phase 2 with --init_from={folder.path}")


def block_parts(tokens: np.ndarray, count: int, s: Phase1Settings) -> list[Tensor]:
    """What each of count blocks is trained on, (N,) int64 on the CPU: its part of the stream, or the union of all."""
    each = len(tokens) // count
    parts = [torch.from_numpy(tokens[i * each :][: min(each, s.num_tokens)].astype(np.int64)) for i in range(count)]
    return parts if s.cascade_data == "split" else [torch.cat(parts)] * count


# ------------------------------------------------------------------------------------------ how runs begin and end
def open_run(job: Job, folder: RunFolder) -> tuple[Any, TokenFile, TokenFile] | None:
    """Model, training and validation tokens of a run, new or to go on with; None if it is finished already."""
    s, config, table, world = job.settings, job.model_config, None, folder.world
    sources: dict[str, dict[str, Any]] = {}  # checkpoints that a new run starts from, of a hub's the tokenizer alone
    parent = folder.path if s.init_from == "resume" else Path(s.init_from)
    if s.phase == "phase1" and s.embeddings != "random":
        table, sources[s.embeddings] = load_table(s.embeddings)
        vocab_size, hidden_size = table.shape
        config = make(type(config), model_args(config) | {"vocab_size": vocab_size, "hidden_size": hidden_size})
    elif s.phase == "phase2" and (parent / "ckpt.pt").is_file():
        theirs = read_checkpoint(parent)["model_args"]
        config = make(type(config), model_args(config) | {key: theirs[key] for key in ("vocab_size", "hidden_size")})
    train_data, val_data = open_tokens(s, world, config.vocab_size)
    tokenizer = train_data.meta["tokenizer"]
    head: dict[str, Any] = {"config": asdict(s), "model_args": model_args(config), "commit": git_commit()}
    head["data"] = {"tokenizer": tokenizer, "train_sha256": train_data.digest, "val_sha256": val_data.digest}
    progress = dict[str, Any](iter_num=0, tokens_seen=0, train_seconds=0.0, parents=[], context_blocks=[])
    folder.claim(head)
    goes_on = s.init_from == "resume" or not (folder.path / "summary.json").exists()
    if (checkpoint := folder.checkpoint) is not None and not goes_on:
        world.say(f"{folder.path} is finished after {checkpoint['iter_num']} steps; --overwrite=True trains it again")
        return None

    torch.manual_seed(s.seed)
    model: Any = MODELS[s.model][1](config).to(world.device)  # its weights freshly initialised
    if s.phase != "lm" and not hasattr(model, "context_blocks"):
        raise InputError(f"phase={s.phase!r}: model={s.model!r} has no ContextBlock to train or to read")
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        progress = {key: checkpoint[key] for key in progress}
    else:
        if s.init_from != "scratch":
            sources[s.init_from] = start_from(model, job, world)
        if table is not None:
            model.embed_in.weight.data.copy_(table)
        for name, theirs in sources.items():
            if (other := theirs["data"]["tokenizer"]) != tokenizer:
                raise InputError(f"{name} was trained on {other} tokens, {train_data.path} holds {tokenizer} tokens")
            progress["parents"] += [*theirs.get("parents", []), name]
            progress["tokens_seen"] += theirs.get("tokens_seen", 0)
            progress["context_blocks"] += theirs.get("context_blocks", [])
    folder.head |= progress
    world.say(f"settings: {json.dumps({**head['config'], 'model_args': head['model_args']})}")
    if job.passed_over:
        world.say(f"a layer could not set: {', '.join(job.passed_over)}")
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_data.tokens):,} training tokens"
    world.say(f"model {s.model} on {train_data.path.parent}: {size}; run folder {folder.path}")
    return model, train_data, val_data


def open_tokens(s: TrainSettings, world: World, vocab_size: int) -> tuple[TokenFile, TokenFile]:
    """Training and validation tokens of the dataset; the default one is made if it is missing."""
    folder = Path(s.data_dir, s.dataset)
    if s.dataset == PrepSettings.dataset and not (folder / "meta.json").exists() and world.is_main:
        print(f"{folder} is missing: making it with prep.py (python prep.py)", flush=True)
        prepare(PrepSettings(data_dir=s.data_dir))
    world.barrier()
    train, val = load_tokens(folder, "train"), load_tokens(folder, "val")
    if (ids := train.meta["n_vocab"]) > vocab_size:
        raise InputError(f"{folder} is of {ids} token ids, the model has {vocab_size} rows")
    return train, val


def start_from(model: Any, job: Job, world: World) -> dict[str, Any]:
    """Give a new model the weights that init_from names; returns their checkpoint. Raises InputError."""
    name = job.settings.init_from
    if job.parent and not Path(name, "ckpt.pt").exists():
        raise InputError(f"init_from: {name} is missing; make it with: {job.parent}")
    source, checkpoint = load_source(name)
    with refusing(f"init_from={name} does not fit", errors=ValueError):
        became = model.start_from(source.to(world.device))
    new = [tensor for tensor, how in became.items() if how == "new"]
    if job.settings.phase == "phase2" and any(tensor.startswith("context_block") for tensor in new):
        raise InputError(f"init_from={name} holds no ContextBlock that fits this model")
    converts, unused = type(source) is not type(model), source.state_dict().keys() - became.keys()
    lost = sorted({".".join(key.split(".")[:2]) for key in unused if not (converts and ".attention." in key)})
    counts = Counter(became.values())
    world.say(f"from {name}: {counts['copied']} tensors copied, {counts['converted']} converted")
    world.say(f"new: {', '.join(new) or 'none'}; left out: {', '.join(lost) or 'none'}")
    return checkpoint or {"data": {"tokenizer": "neox"}}


def load_table(source: str) -> tuple[Tensor, dict[str, Any]]:
    """A token table (V, C) for phase 1, a run's output embedding or GPT-2's, and the checkpoint that it is from."""
    if Path(source, "ckpt.pt").is_file():
        model, checkpoint = load_source(source)
        return model.head_weight.detach(), checkpoint or {}
    try:
        return load_pretrained(source, "gpt2", "GPT2Model").wte.weight.detach(), {"data": {"tokenizer": "gpt2"}}
    except InputError as error:
        raise InputError(f"embeddings={source!r}: {error}; 'random' and a run folder of yours need no hub") from None


def main() -> None:
    job = parse_train(sys.argv[1:], PHASES)
    path = Path(job.settings.out_dir or Path("out", job.name))
    with open_world(job.settings.device) as world, RunFolder(path, world) as folder:
        if (opened := open_run(job, folder)) is not None:
            train: Any = train_phase1 if job.settings.phase == "phase1" else train_language_model
            train(job.settings, *opened, folder)


if __name__ == "__main__":
    run(main)

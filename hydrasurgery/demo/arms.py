"""The demo's arms: each is one hybrid of the shipped teacher, rewritten, trained and measured in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hydrasurgery.conversion import rewrite
from hydrasurgery.demo.corpus import training_batch
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.demo.workers import Begin
from hydrasurgery.errors import DemoError
from hydrasurgery.evaluation import encode_text, evaluate, library_text
from hydrasurgery.folders import owned_folder
from hydrasurgery.plan import Plan
from hydrasurgery.transfer import Recipe, Stage, distill
from hydrasurgery.transfer.start import calibrate

SEED = 0  # of the data; the evaluation's is one more
LENGTHS = (256, 512, 1024)
TRAINING_LENGTH = 512
COUNT = 16  # sequences per task and length
PROMPT, CONTINUATION = 48, 32  # tokens


@dataclass(frozen=True)
class Mixture:
    """The teacher's own mixture of needles, dense recall and text, whose every token the hybrid follows the teacher on.

    A batch depends on nothing but (seed, stage, step).
    """

    tokenizer: PreTrainedTokenizerBase
    text_ids: Tensor

    def batch(self, step: int, stage: Stage, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Batch `step` of `stage`; see `hydrasurgery.transfer.BatchSource`."""
        seed = int(torch.randint(2**31, (1,), generator=generator))
        ids, _ = training_batch(self.tokenizer, self.text_ids, stage.length, stage.batch_size * stage.length, (seed,))
        return {"input_ids": ids}


@dataclass(frozen=True)
class Arm:
    """One row of the report.

    Attributes:
        name: what the row is called.
        plan: which heads it converts; with none, the arm is the teacher itself.
        recipe: how it is trained; None measures it as it is rewritten.
        save: a folder for the finished hybrid.
        result: what `evaluate` found, once it is run.
        seconds: spent in training steps, of earlier sessions too.
        continuation: tokens that the finished hybrid generates from held-out text.
    """

    name: str
    plan: Plan
    recipe: Recipe | None = None
    save: Path | None = None
    result: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    continuation: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Training steps, and one for the measuring."""
        return 1 + sum(stage.num_steps for stage in (self.recipe.stages if self.recipe else ()))


def run_arms(arms: Sequence[Arm], folder: Path, console: Console) -> list[Arm]:
    """Run every arm, as many side by side as there are cores (at most two), with a progress bar each.

    Args:
        folder: each arm keeps its metrics and checkpoints in a folder of its name here, and goes on from them.

    Returns:
        The arms in the order given, with what they found.
    """
    cores = os.cpu_count() or 1
    workers = min(2, cores, len(arms))
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    news = context.SimpleQueue()
    theirs, ours = context.Pipe(duplex=False)  # nothing is sent; when our end is closed, the workers end
    columns = (TextColumn("{task.description:<21}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress,
        ProcessPoolExecutor(workers, context, Begin(theirs, __name__, _begin.__name__, cores // workers, news)) as pool,
        ours,  # closed first, so that the pool waits for no worker that an error has made needless
    ):
        bars = {arm.name: progress.add_task(arm.name, total=arm.steps, note="", start=False) for arm in arms}
        with _undisturbed():
            jobs: list[Future[Arm]] = [pool.submit(run_arm, arm, folder) for arm in arms]
        left = set(jobs)
        while left:
            done, left = wait(left, timeout=0.5, return_when="FIRST_EXCEPTION")
            for job in done:
                _result(job)
            while not news.empty():
                name, step, note = news.get()
                progress.start_task(bars[name])
                progress.update(bars[name], completed=step, note=note)
        pool.shutdown()  # workers that have nothing left to do end in order
        return [job.result() for job in jobs]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes that are started in the block are started whole: Ctrl-C and SIGTERM wait for its end.

    Ctrl-C in a terminal goes to every process; these leave it to this one.
    """
    came: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if here}
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)


def _result(job: Future[Arm]) -> Arm:
    try:
        return job.result()
    except BrokenProcessPool as error:
        raise DemoError(
            "a worker process was killed, perhaps for want of memory; the same command goes on from the checkpoints"
        ) from error


_news: Any = None  # a worker's end of the queue of progress


def _begin(threads: int, news: Any) -> None:
    global _news
    from tqdm import tqdm
    from transformers.utils import logging

    tqdm.set_lock(threading.RLock())  # rather than a semaphore, which a worker that is ended leaves behind
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    _news = news


def _tell(arm: Arm, step: int, note: str) -> None:
    if _news is not None:
        _news.put((arm.name, step, note))


def run_arm(arm: Arm, folder: Path) -> Arm:
    """Rewrite, calibrate, train, measure and save one arm, in this process."""
    _tell(arm, 0, "starts")
    begun = time.monotonic()
    teacher, tokenizer = load_teacher()
    train_text, held_out = (encode_text(tokenizer, library_text(part)) for part in ("train", "held-out"))
    data = Mixture(tokenizer, train_text)
    model: Any = teacher
    if arm.plan.num_full < arm.plan.num_heads:
        model = rewrite(teacher, arm.plan)
        calibrate(model, teacher, data.batch(0, CALIBRATION, torch.Generator().manual_seed(SEED))["input_ids"])
    seconds = 0.0
    if arm.recipe is not None:
        count = iter(range(1, arm.steps))
        trained = distill(
            model,
            teacher,
            data,
            recipe=arm.recipe,
            out=folder / arm.name.replace(" ", "-"),
            seed=SEED,
            progress=False,
            callback=lambda record: _tell(arm, next(count), f"{record['stage']} loss {record['loss']:.3f}"),
        )
        seconds = sum(record["seconds"] for record in trained.history)
    _tell(arm, arm.steps - 1, "measures")
    result = evaluate(
        model, tokenizer, LENGTHS, count=COUNT, seed=SEED + 1, text_ids=held_out, teacher=teacher, progress=False
    )
    if arm.save is not None:
        with owned_folder(arm.save) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    tokens = continuation(model, held_out)
    _tell(arm, arm.steps, f"done in {time.monotonic() - begun:.0f} s")
    return replace(arm, result=result, seconds=seconds, continuation=tokens)


CALIBRATION = Stage("align", batch_size=4, length=TRAINING_LENGTH, steps=1, lr=1.0, lr_end=1.0)


def continuation(model: Any, text: Tensor) -> tuple[int, ...]:
    """The tokens that `model` adds greedily to the first ones of `text` [N]."""
    prompt = text[None, :PROMPT]
    mask = torch.ones_like(prompt)
    output = model.eval().generate(prompt, attention_mask=mask, max_new_tokens=CONTINUATION, do_sample=False)
    return tuple(output[0, PROMPT:].tolist())


__all__ = ["LENGTHS", "SEED", "TRAINING_LENGTH", "Arm", "Mixture", "continuation", "run_arm", "run_arms"]

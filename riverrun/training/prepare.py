"""What a run needs before its first step: checked settings, tokenizer, batches, model and optimizer."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import torch

from riverrun.config import to_dict
from riverrun.data import tokens
from riverrun.data.packing import Batches, Corpus, documents, find
from riverrun.data.tokens import BPETokenizer, ByteTokenizer, Tokenizer, characters
from riverrun.models.device import available
from riverrun.models.language import LanguageModel

from . import checkpoint
from .checkpoint import Progress, Training
from .evaluate import check, readable
from .optim import adamw
from .settings import DataConfig, TrainConfig

SAME = ("model", "data", "seed", "accumulate")  # what a resumed run may not change


def prepare(config: TrainConfig, resume: bool) -> tuple[Training, Batches, Tokenizer]:
    """A run at its beginning, or at its newest checkpoint."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path = checkpoint.latest(config.out) if resume else None
    if path is not None:
        unchanged(config, checkpoint.settings(path), path)
    elif found := checkpoint.found(config.out):
        raise FileExistsError(
            f"{config.out} already holds a run, at {found[-1].name}: go on with it (riverrun train --resume "
            f"{config.out}), or give another folder (out=...)"
        )
    if config.evaluation.file is not None:
        readable(Path(config.evaluation.file))
    files = find(config.data.files)
    if not files:
        raise ValueError("data.files is empty; name the text to learn from: data.files=book.txt")
    tokenizer = tokens.load(path / "tokenizer.json") if path else make_tokenizer(config.data, files)
    corpus = Corpus.read(files, tokenizer, config.data.separator)
    batches = Batches(corpus, config.data.mode, config.data.batch, config.data.length, config.seed)
    training = begin(config, tokenizer)
    training.progress.corpus = zlib.crc32(corpus.tokens.tobytes())
    if path is not None:
        checksum = training.progress.corpus
        checkpoint.restore(path, training)
        if training.progress.corpus != checksum:
            raise ValueError(f"{path}: the text in {config.data.files} is not what this run has learnt from")
    return training, batches, tokenizer


def begin(config: TrainConfig, tokenizer: Tokenizer) -> Training:
    """A new model and its optimizer."""
    device = available(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(config.seed)
    sizes = config.model
    if sizes.vocabulary not in (0, tokenizer.size):
        raise ValueError(
            f"model.vocabulary = {sizes.vocabulary}, but the tokenizer has {tokenizer.size}; leave it at 0"
        )
    model = LanguageModel(replace(sizes, vocabulary=tokenizer.size))
    if config.evaluation.file is not None:
        check(model, config.evaluation.context)
    if model.grows and config.data.mode == "stream":
        raise ValueError(
            f"data.mode=stream carries the state for ever, and that of {', '.join(model.grows)} grows with "
            "every token: use sliding_window in its place, or data.mode=windows"
        )
    model.to(device)
    return Training(model, adamw(model, config.optim), (None,) * config.accumulate, Progress())


def make_tokenizer(data: DataConfig, files: list[Path]) -> Tokenizer:
    """The tokenizer that the settings ask for, trained on the files if it learns."""
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    pieces = (
        piece
        for path in files
        for document in documents(path, data.separator)
        for piece in characters(document)
    )
    return BPETokenizer.train(pieces, data.size)


def unchanged(config: TrainConfig, before: TrainConfig, path: Path) -> None:
    """Raise ValueError unless a resumed run keeps what it cannot change."""
    now, then = to_dict(config), to_dict(before)
    for name in SAME:
        if now[name] != then[name]:
            raise ValueError(
                f"{path} was trained with {name} = {then[name]}, now it is {now[name]}: a resumed run keeps "
                "it. Settings of the optimizer, the schedule and the budget may change"
            )

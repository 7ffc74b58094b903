"""What a run needs before its first step: checked settings, tokenizer, batches, model and optimizer."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import torch

from riverrun.config import to_dict
from riverrun.data import tokens
from riverrun.data.packing import Batches, Corpus, documents, find, text
from riverrun.data.tokens import BPETokenizer, ByteTokenizer, Tokenizer
from riverrun.models.device import available
from riverrun.models.language import Block, LanguageModel, planned

from . import checkpoint
from .checkpoint import Progress, Training
from .evaluate import check, legible, readable
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
    held_out = config.evaluation.file and readable(Path(config.evaluation.file))
    files = find(config.data.files)
    if not files:
        raise ValueError("data.files is empty; name the text to learn from: data.files=book.txt")
    for name in {*planned(replace(config.model, vocabulary=1))}:
        Block(name, config.model)  # what cannot be built is said before a tokenizer is learnt
    separator = config.data.separator
    if separator and not any(separator.encode() in file.read_bytes() for file in files):
        raise ValueError(
            f"data.separator={separator!r} stands in none of {len(files)} files; give what divides documents "
            "there (in a shell, $'\\n\\n' is an empty line), or leave it out: each file is a document"
        )
    tokenizer = tokens.load(path / "tokenizer.json") if path else make_tokenizer(config.data, files)
    if held_out:
        legible(held_out, tokenizer, config.evaluation.limit)
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
    if model.prefix and (config.data.mode == "stream" or config.data.length < model.prefix):
        raise ValueError(
            f"the model reads {model.prefix} tokens as a whole, which have no loss: data.length = "
            f"{config.data.length} must be at least as many, and data.mode=windows"
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
        for piece in text(path, document)
    )
    return BPETokenizer.train(pieces, data.size)


def unchanged(config: TrainConfig, before: TrainConfig, path: Path) -> None:
    """Raise ValueError unless a resumed run keeps what it cannot change. Its text may lie elsewhere."""
    now, then = flat(config), flat(before)
    for name, was in then.items():
        if name.partition(".")[0] in SAME and name != "data.files" and now[name] != was:
            raise ValueError(
                f"{path} was trained with {name} = {was}, now it is {now[name]}: a resumed run keeps it. "
                "Settings of the optimizer, the schedule and the budget may change"
            )


def flat(config: TrainConfig) -> dict[str, object]:
    """Every setting by its key."""
    values = to_dict(config)
    groups = {name: value for name, value in values.items() if isinstance(value, dict)}
    inside = {f"{name}.{key}": x for name, group in groups.items() for key, x in group.items()}
    return inside | {name: value for name, value in values.items() if name not in groups}

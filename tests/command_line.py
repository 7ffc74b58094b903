"""What tests of the command line share: models to give it, and what a refusal looks like."""

import torch

from riverrun.data.tokens import ByteTokenizer
from riverrun.models import folder
from riverrun.models.language import LanguageConfig, LanguageModel

BYTES = ByteTokenizer()
BOOK = "It was a line of a book that nobody had read. " * 40


def made(path, seed=0, width=16, pattern="mingru", tokenizer=BYTES):
    torch.manual_seed(seed)
    config = LanguageConfig(tokenizer.size, width, depth=1, pattern=pattern, tied=False)
    folder.save(path, LanguageModel(config), tokenizer)
    return str(path)


def refused(result, *words):
    """One line on standard error with all of `words`, nothing on standard output, exit code 2."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err, err
    for word in words:
        assert word in err, err

import pytest
import torch

from riverrun import cli

torch.set_num_threads(1)


@pytest.fixture
def float64():
    """Exact statements are tested where rounding cannot hide a mistake."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def riverrun(capfd):
    """Run a command line in this process: exit code, standard output, standard error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    return call

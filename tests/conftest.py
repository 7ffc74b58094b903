import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def float64():
    """Exact statements are tested where rounding cannot hide a mistake."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

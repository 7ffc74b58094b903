"""Every row of MIXERS under every law that concerns it."""

import pytest

from riverrun.mixers import MIXERS, build
from riverrun.testing.laws import WIDTH, laws_for


def cases():
    for name, row in MIXERS.items():
        for law, check in laws_for(row):
            why = row.breaks.get(law)
            marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
            yield pytest.param(name, row, check, id=f"{name}-{law}", marks=marks)


@pytest.mark.parametrize("name, row, law", list(cases()))
def test_law(name, row, law):
    law(lambda: build(name, WIDTH, **row.small), row)

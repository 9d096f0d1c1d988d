"""The garbage collector comes back whatever happens."""

import gc

import pytest

from data_scheduler.collector import collector_waits


def test_it_is_on_again_after_an_error_and_stays_off_where_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"), collector_waits():
        assert not gc.isenabled()
        with collector_waits():
            pass
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_waits():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

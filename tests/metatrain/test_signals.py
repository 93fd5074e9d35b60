"""Ctrl-C and SIGTERM never interrupt what is being written."""

from __future__ import annotations

import signal

import pytest

from metatrain.outer.signals import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_what_is_written_in_a_block_that_it_may_interrupt(number: signal.Signals) -> None:
    done = []
    with Interrupts() as interrupts:
        signal.raise_signal(number)  # before the block
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():
            done.append("never")
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():  # noqa: PT012
            with interrupts.held():
                signal.raise_signal(number)
                done.append("written")
            done.append("never")
        with interrupts.allowed(), interrupts.held():
            done.append("again")
    assert done == ["written", "again"]

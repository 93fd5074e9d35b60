from __future__ import annotations

import logging
import re

from metatrain.log_lines import LogFormatter, generation_line, generation_sentence, log_line, read_generation_line

_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


def test_a_generation_is_one_line_that_can_be_read_back() -> None:
    metrics = {
        "generation": 3,
        "meta_loss_mean": 0.5,
        "meta_loss_best": 1e-7,
        "horizon": 12,
        "kind": "two words\n",
        "new": True,
    }
    line = log_line(generation_line({**metrics, "samples": [{"horizon": 2}]}, 6, 4.25), seconds=0)  # one line each
    assert line.startswith("1970-01-01T00:00:00Z INFO generation 4/6 ")
    assert "\n" not in line
    found = read_generation_line(line)
    assert found == ({**metrics, "kind": "two_words_", "seconds_left": 4.25}, 6)


def test_a_loss_that_is_not_finite_is_none_when_read_back() -> None:
    line = log_line(generation_line({"generation": 0, "meta_loss_mean": None, "horizon": 2}, 6))
    assert "meta_loss" not in line
    found = read_generation_line(line)
    assert found is not None
    assert found[0]["meta_loss_mean"] is None
    for other in ("generation 3/6 horizon=2", log_line("generation 0/6: starting"), log_line("a worker is lost"), ""):
        assert read_generation_line(other) is None


def test_a_sentence_about_a_generation() -> None:
    metrics = {"generation": 3, "meta_loss_mean": 0.51234, "horizon": 12}
    assert (
        generation_sentence(metrics, 6, 200) == "generation 4 of 6: meta-loss 0.5123 after 12 steps, about 3 min left"
    )
    assert generation_sentence(metrics, 6) == "generation 4 of 6: meta-loss 0.5123 after 12 steps"


def test_records_of_logging_have_time_and_level() -> None:
    record = logging.LogRecord("metatrain", logging.WARNING, "", 0, "the page of %s", ("x",), None)
    assert re.fullmatch(f"{_TIME} WARNING the page of x", LogFormatter().format(record))
    try:
        raise ValueError("why")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    assert LogFormatter().format(record).endswith("ValueError: why")

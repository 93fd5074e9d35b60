"""Each sentence of SECURITY.md that carries a number is held by the tests named here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TESTS = {
    1: ["l3rs/test_hostile_checkpoints.py::test_refused_quickly_and_in_little_memory"],
    2: [
        "l3rs/test_hostile_checkpoints.py::test_a_store_that_lists_names_outside_its_folder",
        "metatrain/test_hostile_stores.py::test_refused_quickly_and_in_little_memory",
    ],
    3: ["metatrain/test_hostile_stores.py::test_links_in_a_store_are_replaced_not_followed"],
    4: [
        "metatrain/test_hostile_runs.py::test_links_and_pipes_are_refused",
        "metatrain/test_hostile_runs.py::test_a_state_that_states_enormous_arrays",
    ],
    5: ["metatrain/test_hostile_runs.py::test_export_report_status_and_inspect_import_no_task"],
    6: ["metatrain/test_battery.py::test_results", "metatrain/test_battery.py::test_damaged_results"],
    7: [
        "metatrain/test_config.py::test_malicious_files",
        "metatrain/test_config.py::test_implausible_numbers",
    ],
    8: ["metatrain/test_trainer.py::test_a_damaged_log_stops_no_resume"],
    9: [
        "tasks/test_hostile_folders.py::test_tfds_metadata_is_data",
        "tasks/test_hostile_folders.py::test_tfds_names_are_not_paths",
        "tasks/test_hostile_folders.py::test_a_pipe_among_the_images_is_refused",
    ],
    10: [
        "metatrain/test_hostile_runs.py::test_a_task_in_the_run_of_another_user_is_imported_only_on_request",
        "metatrain/test_hostile_runs.py::test_whose_code_is_trusted",
    ],
    11: ["tasks/test_registry.py::test_any_other_function_is_never_called"],
    12: ["metatrain/test_cli.py::test_files_beside_the_configuration_replace_no_package"],
    13: ["metatrain/test_config.py::test_interpolations_are_saved_as_written"],
    14: ["metatrain/test_trainer.py::test_a_checkpoint_names_no_folder_of_this_machine"],
    15: ["metatrain/test_jobs.py::test_the_sequence_of_the_readme"],
    16: ["metatrain/test_jobs.py::test_a_cluster_that_others_can_reach_requires_a_token"],
    17: ["metatrain/test_token_files.py::test_a_token_that_others_can_read_is_named"],
}


def test_every_number_has_tests() -> None:
    numbers = [int(number) for number in re.findall(r"\[(\d+)\]", (ROOT / "SECURITY.md").read_text())]
    assert sorted(numbers) == sorted(TESTS)


@pytest.mark.parametrize("name", sorted({name for names in TESTS.values() for name in names}))
def test_the_named_tests_exist(name: str) -> None:
    file, _, function = name.partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)

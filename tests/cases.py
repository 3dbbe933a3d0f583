"""The cases that failed in use once, each with the tests of its right value.

python -m pytest $(python -m tests.cases)       all of them
python -m pytest $(python -m tests.cases 5 11)  some of them
"""

from __future__ import annotations

import sys

__all__ = ["CASES", "node_ids"]

_PAID = "acceptance/test_paid_answers.py"
_TABLES = "acceptance/test_tables.py"

CASES: dict[int, tuple[str, ...]] = {
    1: (f"{_PAID}::test_cases_1_2_3_an_odd_field_costs_that_field_only",),
    2: (f"{_PAID}::test_cases_1_2_3_an_odd_field_costs_that_field_only",),
    3: (f"{_PAID}::test_case_3_what_is_a_number_among_the_timings_is_kept",),
    4: (f"{_PAID}::test_case_4_an_answer_without_images_is_kept_and_not_paid_for_again_without_a_word",),
    5: (f"{_PAID}::test_case_5_a_file_that_is_refused_for_a_while_is_fetched_later_free",),
    6: (f"{_PAID}::test_case_6_a_damaged_file_is_fetched_later_free",),
    7: (
        "acceptance/test_waits.py::test_a_service_whose_status_always_says_failed_ends_the_command_quickly",
        "acceptance/test_waits.py::test_final_words_that_fal_does_not_use_end_their_jobs",
    ),
    8: (f"{_PAID}::test_case_8_two_jobs_never_share_a_request_id",),
    9: ("acceptance/test_fal_hosts.py::test_a_host_of_fals_is_refused_before_anything_is_sent",),
    10: (
        "runner/test_pauses.py::test_no_submit_leaves_in_the_time_that_a_429_asks_for",
        "runner/test_pauses.py::test_the_default_rate_of_fal_keeps_a_pause_too",
        "runner/test_pauses.py::test_in_no_window_of_time_more_submits_leave_than_the_rate_allows",
    ),
    11: (
        "acceptance/test_library_interrupts.py::test_ctrl_c_in_a_script",
        "acceptance/test_library_interrupts.py::test_a_kernel_that_is_interrupted",
        "acceptance/test_library_interrupts.py::test_ctrl_c_under_asyncio_run",
        "acceptance/test_library_interrupts.py::test_a_task_that_is_cancelled",
    ),
    12: (
        "acceptance/test_prompts.py::test_a_swept_prompt_is_filled_from_the_row_before_it_is_sent",
        "acceptance/test_prompts.py::test_an_unknown_name_is_refused_before_anything_is_sent",
    ),
    13: (
        "acceptance/test_small_machines.py::test_four_hundred_jobs_with_few_open_files",
        "acceptance/test_small_machines.py::test_the_soft_limit_is_raised",
        "acceptance/test_small_machines.py::test_a_server_serves_beyond_its_descriptors",
    ),
    14: (
        "acceptance/test_proxies.py::test_every_call_to_another_host_goes_through_the_proxy",
        "acceptance/test_proxies.py::test_nothing_for_this_machine_goes_through_the_proxy",
    ),
    15: ("acceptance/test_loaders.py::test_case_15_every_loader_reads_every_table",),
    16: ("edges/test_shards.py::test_folders_give_columns",),
    17: (
        "edges/test_shards.py::test_a_column_that_a_file_lacks_is_null_there",
        "edges/test_shards.py::test_types_that_cannot_be_joined_are_named_with_their_files",
    ),
    18: (f"{_TABLES}::test_a_csv_of_another_program_is_read_and_how_is_said",),
    19: (
        "acceptance/test_formats.py::test_a_file_of_each_kind_is_planned_run_and_taken_up_again",
        "acceptance/test_formats.py::test_a_dataset_saved_to_disk_is_run_with_its_images",
        "acceptance/test_formats.py::test_a_folder_of_images_with_one_prompt_for_all",
        "acceptance/test_formats.py::test_images_with_metadata_have_their_own_prompts",
        "acceptance/test_formats.py::test_a_manifest_from_standard_input_is_kept_and_taken_up_again",
        "acceptance/test_formats.py::test_places_that_are_not_read_yet_are_said_to_be_so",
    ),
    20: (
        "edges/test_csv_text.py::test_a_byte_order_mark_says_the_encoding",
        f"{_TABLES}::test_another_encoding_and_separator_are_named_by_settings",
    ),
    21: (f"{_TABLES}::test_a_tilde_is_the_home_folder_wherever_a_path_is_given",),
    22: ("acceptance/test_bad_input.py::test_failed_rows_keep_every_input_that_could_be_read",),
    23: (
        "edges/test_cleanup.py::test_the_key_of_an_expired_result_creates_a_new_request",
        "edges/test_cleanup.py::test_a_repeat_after_the_result_has_expired_is_a_new_request",
    ),
    24: ("edges/test_bad_requests.py::test_an_invalid_authorization_is_401",),
    25: ("edges/test_server.py::test_a_waiting_call_leaks_nothing_per_wake_up",),
    26: ("edges/test_images.py::test_a_file_of_several_images_is_of_the_type_of_its_first",),
    27: ("edges/test_fal_proxy.py::test_the_host_selects_direct_call_or_queue",),
    28: (
        "unit/test_preview.py::test_the_same_numbers_come_out_wherever_the_arrays_lie",
        "edges/test_process_pool.py::test_one_preview_has_the_same_bytes_from_every_process_of_a_busy_machine",
    ),
}
"""Test functions by case; paths are those below `tests/`."""


def node_ids(*cases: int) -> list[str]:
    """Return the node ids of these cases for pytest, each test once; without an argument those of all cases."""
    return list(dict.fromkeys(f"tests/{test}" for case in cases or CASES for test in CASES[case]))


if __name__ == "__main__":
    print(*node_ids(*map(int, sys.argv[1:])))

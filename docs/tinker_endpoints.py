"""Which test shows each endpoint of the Tinker face; the table in docs/tinker.md is made from it and from the routes.

A test fails when an endpoint is missing here, or a named test is not there.
"""

from typing import Final

_LOOPS, _RESUME = "tests/interop/test_tinker_loops.py", "tests/interop/test_tinker_resume.py"
_CATALOG, _SAMPLES = "tests/interop/test_tinker_catalog.py", "tests/interop/test_tinker_samples.py"
_BAD, _FAULTS = "tests/interop/test_tinker_bad_input.py", "tests/interop/test_tinker_faults.py"
_PASSING: Final = f"{_SAMPLES}::test_small_requests_that_programs_make_in_passing"
_SFT: Final = f"{_LOOPS}::test_supervised_loop_learns_and_its_sampler_agrees_with_its_trainer"
_LISTS: Final = f"{_CATALOG}::test_lists_show_what_was_saved_and_only_that"
_LINKS: Final = f"{_CATALOG}::test_external_weights_are_peft_files_over_links_with_ranges"
_BODIES: Final = f"{_BAD}::test_bodies_that_no_sdk_sends"
_USAGE: Final = f"{_CATALOG}::test_usage_is_told_by_run"
_ONE: Final = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
_RESUMED: Final = f"{_RESUME}::test_resume_with_the_optimizer_is_no_interruption_and_without_it_is_not"

TESTS: Final[dict[str, str]] = {
    "GET /healthz": _PASSING,
    "POST /client/config": _PASSING,
    "POST /client/dynamic_config": _PASSING,
    "POST /create_session": _SFT,
    "POST /session_heartbeat": _PASSING,
    "POST /sessions/{session_id}/finish": _PASSING,
    "POST /telemetry": _PASSING,
    "GET /get_server_capabilities": f"{_CATALOG}::test_samplers_and_capabilities_name_bases_as_programs_do",
    "GET /auth/apikey/me": _PASSING,
    "POST /create_custom_loss": _BODIES,
    "POST /create_model": _SFT,
    "POST /load_weights": _RESUMED,
    "POST /forward_backward": f"{_LOOPS}::test_chunks_that_come_out_of_order_are_put_in_order",
    "POST /optim_step": f"{_BAD}::test_a_mistake_in_training_comes_through_the_future_and_the_run_goes_on",
    "POST /save_weights": f"{_RESUME}::test_a_name_is_taken_once_unless_it_is_overwritten",
    "POST /save_weights_for_sampler": f"{_LOOPS}::test_reinforcement_loop_raises_its_reward",
    "POST /save_weights_external": _LINKS,
    "POST /copy_weights": f"{_CATALOG}::test_a_copy_outlives_what_it_was_copied_from",
    "POST /create_sampling_session": f"{_BAD}::test_what_cannot_be_made_is_refused_at_once",
    "POST /join_sampling_session": _PASSING,
    "GET /samplers/{sampler_id}": f"{_CATALOG}::test_samplers_and_capabilities_name_bases_as_programs_do",
    "POST /asample": f"{_SAMPLES}::test_the_prompts_own_logprobs",
    "POST /retrieve_future": f"{_FAULTS}::test_a_killed_gateway_and_a_killed_trainer_are_not_noticed",
    "POST /retrieve_futures": f"{_SAMPLES}::test_a_poller_of_a_whole_session_gets_what_single_polls_get",
    "POST /cancel_future": _PASSING,
    "POST /get_info": _SFT,
    "POST /weights_info": _RESUMED,
    "GET /training_runs": _LISTS,
    "GET /training_runs/{run_id}": _LISTS,
    "GET /training_runs/{run_id}/checkpoints": _LISTS,
    "GET /checkpoints": _LISTS,
    f"DELETE {_ONE}": f"{_CATALOG}::test_a_copy_outlives_what_it_was_copied_from",
    f"PUT {_ONE}/ttl": f"{_CATALOG}::test_a_time_to_live_is_set_and_taken_away",
    f"POST {_ONE}/publish": f"{_CATALOG}::test_published_weights_are_read_by_others_until_they_are_unpublished",
    f"DELETE {_ONE}/publish": f"{_CATALOG}::test_published_weights_are_read_by_others_until_they_are_unpublished",
    "GET /sessions": _LISTS,
    "GET /sessions/{session_id}": _LISTS,
    "GET /billing/usage/events": _USAGE,
    "GET /billing/usage/checkpoints/current": _USAGE,
    f"GET {_ONE}/external_weights_urls": _LINKS,
    "GET /files/{link}": _LINKS,
}

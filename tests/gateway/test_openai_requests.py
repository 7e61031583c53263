"""What the OpenAI face takes and refuses, and how it says so."""

import json

import pytest

from treadle.errors import CATALOGUE, make_error
from treadle_gateway.http.openai.problems import FieldError, body_of, respond
from treadle_gateway.http.openai.requests import read_chat, read_completion, read_metadata

HI = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "m", "messages": HI}
TEXT = {"model": "m", "prompt": "Hi"}


def refusal(read, body) -> tuple[str | None, str | None]:
    with pytest.raises(FieldError) as caught:
        read(body)
    assert caught.value.message
    return caught.value.param, caught.value.api_code


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"Model": "x"}, "Model", "unknown_parameter"),
        (
            {"stream_options": {"include_usag": True}, "stream": True},
            "stream_options.include_usag",
            "unknown_parameter",
        ),
        ({"messages": [{**HI[0], "images": []}]}, "messages[0].images", "unknown_parameter"),
        ({"messages": [*HI, {"role": "robot", "content": ""}]}, "messages[1].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            None,
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls", None),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"service_tier": "flex"}, "service_tier", "unsupported_value"),
        ({"user": 3}, "user", "invalid_type"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 2**31}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_type"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"²": 1.0}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"99999999999": 1.0}}, "logit_bias", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"metadata": {"a": "b"}}, "metadata", "invalid_value"),
        ({"metadata": {"a": "b" * 513}, "store": True}, "metadata.a", "invalid_value"),
        ({"metadata": {str(n): "" for n in range(17)}, "store": True}, "metadata", "invalid_value"),
        ({"model": None}, "model", "invalid_type"),
        ({"chat_template_kwargs": {"tools": [1]}}, "chat_template_kwargs", "invalid_value"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "invalid_value"),
    ],
)
def test_a_chat_request_that_cannot_be_is_refused_by_the_fields_name(change, param, code):
    found_param, found_code = refusal(read_chat, CHAT | change)
    assert found_param == param
    assert code is None or found_code == code


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"store": True}, "store"),
        ({"messages": HI}, "messages"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 600, "n": 2}, "prompt"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_a_completion_request_that_cannot_be_is_refused_by_the_fields_name(change, param):
    assert refusal(read_completion, TEXT | change)[0].startswith(param)


@pytest.mark.parametrize("body", [[], "x", None, 3, {}, {"model": "m"}])
def test_what_is_no_request_is_refused(body):
    for read in (read_chat, read_completion):
        refusal(read, body)
    assert refusal(read_metadata, {"metadata": {"a": 1}})[0] == "metadata.a"


def test_fields_that_ask_for_nothing_are_taken():
    """What a client of OpenAI sends of its own accord, and a message as an earlier answer had it."""
    earlier = {
        "role": "assistant",
        "content": "Yo",
        "refusal": None,
        "audio": None,
        "tool_calls": None,
        "annotations": [],
    }
    neutral = {
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "user": "ann",
        "safety_identifier": "x",
        "service_tier": "auto",
        "parallel_tool_calls": None,
        "n": None,
        "temperature": 1,
        "stream_options": None,
    }
    request = read_chat(CHAT | neutral | {"messages": [*HI, earlier, *HI]})
    assert (request.choices, request.temperature, len(request.messages)) == (1, 1.0, 3)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    developer = read_chat({"model": "m", "messages": [{"role": "developer", "content": parts}]})
    assert developer.messages[0].for_template() == {"role": "system", "content": "ab"}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_has_four_forms(prompt, prompts):
    assert read_completion({"model": "m", "prompt": prompt}).prompts == prompts


def test_every_reason_has_a_status_that_its_client_reads_right():
    """Which statuses are tried again by the client is said by the header, as the catalogue has it."""
    wanted = {
        "UNAUTHENTICATED": 401,
        "PERMISSION_DENIED": 403,
        "MODEL_NOT_FOUND": 404,
        "COMPLETION_NOT_FOUND": 404,
        "CONTEXT_OVERFLOW": 400,
        "BAD_SAMPLING_PARAMS": 400,
        "RATE_LIMITED": 429,
        "QUOTA_EXCEEDED": 429,
        "REQUEST_ID_REUSED": 409,
        "NO_WORKER": 503,
        "INTERNAL": 500,
    }
    for reason, spec in CATALOGUE.items():
        error = make_error(reason, "a sentence", 1.5)
        answer = respond(error)
        assert 400 <= answer.status_code < 600
        assert answer.status_code == wanted.get(reason, answer.status_code)
        assert answer.headers["x-should-retry"] == str(spec.retryable).lower()
        body = json.loads(answer.body)["error"]
        assert (body["message"], set(body)) == ("a sentence", {"message", "type", "param", "code"})
    assert body_of(make_error("MODEL_NOT_FOUND", "x"))["error"]["param"] == "model"

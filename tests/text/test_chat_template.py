"""Rendering by the gateway against transformers' own, for templates of real models."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from treadle_engine.bases import pip_folder
from treadle_gateway.text.chat_template import TemplateProblem, render

GOLDEN = Path(__file__).parents[1] / "golden" / "chat_templates"
SPECIAL = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
# Features of templates that the real ones below do not have.
MADE = (
    "{{ bos_token }}{% set seen = namespace(system=false) %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set seen.system = true %}{% continue %}{% endif %}"
    "{% if message.name is defined %}({{ message.name }}) {% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}{% endgeneration %}"
    "{% else %}{{ message | tojson(indent=1) }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if not seen.system %}{{ dict(a='ü<') | tojson }}{% endif %}"
    "{% if thinking is defined %}T{{ thinking }}{% endif %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
TEMPLATES = {
    "pip": (pip_folder() / "chat_template.jinja").read_text(),
    "smollm2": (GOLDEN / "smollm2.jinja").read_text(),
    "qwen3": (GOLDEN / "qwen3.jinja").read_text(),
    "deepseek_v3": (GOLDEN / "deepseek_v3.jinja").read_text(),
    "made": MADE,
}
USER, ASSISTANT = {"role": "user", "content": "Hi, <b>é</b> 👋\n"}, {"role": "assistant", "content": " Hello! \n"}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2\n"}
CONVERSATIONS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, USER],
    "ends with an answer": [USER, ASSISTANT],
    "thought": [USER, THOUGHT, {"role": "user", "content": "Why?", "name": "ann"}, THOUGHT],
    "late system": [USER, SYSTEM, ASSISTANT],
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(pip_folder()))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_is_that_of_transformers(tokenizer, template, conversation):
    """Text for text, with and without the beginning of an answer, and in the middle of the last message."""
    messages = CONVERSATIONS[conversation]
    special = tokenizer.special_tokens_map
    forms = ({"add_generation_prompt": True}, {"add_generation_prompt": False}, {"continue_final_message": True})
    for options in ({}, {"enable_thinking": False}, {"thinking": 3, "bos_token": "B"}):
        for form in ({"add_generation_prompt": False} | form for form in forms):
            try:
                wanted = tokenizer.apply_chat_template(
                    messages, chat_template=TEMPLATES[template], tokenize=False, **form, **options
                )
            except ValueError:
                with pytest.raises(TemplateProblem):
                    render(TEMPLATES[template], messages, special_tokens=special, options=options, **form)
                continue
            found = render(TEMPLATES[template], messages, special_tokens=special, options=options, **form)
            assert found == wanted


def test_a_template_that_refuses_says_why():
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TemplateProblem, match="roles must alternate"):
        render(refusing, [USER], special_tokens={})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(_x=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ dict.__subclasses__() }}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
        "{% broken",
    ],
)
def test_a_template_is_kept_in_its_sandbox(template):
    with pytest.raises(TemplateProblem):
        render(template, [USER], special_tokens={})

"""The real `openai` client against a deployment: completions, chat, streams, models, errors, what is kept."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import openai
import pytest
from click.testing import CliRunner

from tests.interop.conftest import ALIAS, BASE
from tests.support.cluster import Cluster
from treadle import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData
from treadle.cli import COMMANDS
from treadle.cli.lazy import LazyGroup
from treadle.internal.v1 import sampler_pb2, sampler_pb2_grpc
from treadle.recipes.configs import SftConfig
from treadle.recipes.examples import encode_row
from treadle.recipes.rows import read_rows
from treadle.settings import ClientSettings
from treadle.tokenizers import load_tokenizer
from treadle.v1 import admin_pb2, admin_pb2_grpc
from treadle_engine.bases import pip_folder
from treadle_service.channels import internal_metadata

ASK = [{"role": "user", "content": "What is the capital of Italy?"}]
PATIENCE = 120.0
# The first test of the file waits for the services to start.
pytestmark = pytest.mark.timeout(300)


@dataclass
class User:
    """One tenant with both clients."""

    cluster: Cluster
    key: str

    @property
    def tenant(self) -> str:
        return self.key.split("_")[1]

    def client(self, key: str = "", **options: object) -> openai.OpenAI:
        url = f"http://{self.cluster.http_address}/v1"
        return openai.OpenAI(base_url=url, api_key=key or self.key, **{"max_retries": 0, "timeout": PATIENCE} | options)

    def aio(self) -> openai.AsyncOpenAI:
        url = f"http://{self.cluster.http_address}/v1"
        return openai.AsyncOpenAI(base_url=url, api_key=self.key, max_retries=0, timeout=PATIENCE)

    def treadle(self) -> ServiceClient:
        return ServiceClient(settings=ClientSettings(address=self.cluster.gateway_address, api_key=self.key))

    def consent(self, agreed: bool = True) -> None:
        with grpc.insecure_channel(self.cluster.gateway_address) as channel:
            request = admin_pb2.UpdateTenantRequest(tenant=self.tenant, store_completions=agreed)
            metadata = (("authorization", f"Bearer {self.cluster.admin_key}"),)
            admin_pb2_grpc.AdminServiceStub(channel).UpdateTenant(request, metadata=metadata, timeout=10)


@pytest.fixture(scope="module")
def deployment(tinker_cluster: Cluster) -> Cluster:
    """The services of this folder's tests, which serve the tiny base under another name too."""
    return tinker_cluster


@pytest.fixture
def user(deployment: Cluster) -> User:
    return User(deployment, deployment.new_tenant())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(pip_folder()))


@pytest.fixture(scope="module")
def trained(deployment: Cluster) -> tuple[User, list[str]]:
    """A tenant with a run whose weights were saved twice; names of the revisions, oldest first."""
    owner = User(deployment, deployment.new_tenant())
    with owner.treadle() as service:
        training = service.create_lora_training_client(BASE, rank=4, seed=1)
        tokens = np.arange(3, 40)
        inputs = {
            "target_tokens": TensorData.from_numpy(tokens[1:]),
            "weights": TensorData.from_numpy(np.ones(len(tokens) - 1, dtype=np.float32)),
        }
        batch = [Datum(model_input=ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs)]
        names = []
        for name in ("one", "two"):
            for _ in range(2):
                training.forward_backward(batch, "cross_entropy")
                training.optim_step(AdamParams(learning_rate=0.05, eps=1e-8))
            names.append(training.save_weights_for_sampler(name).result(PATIENCE).path)
        training.close()
    return owner, names


def chat_prompt(tokenizer, messages=ASK) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def sampled(user: User, prompt: list[int], model: str = BASE, num_samples: int = 1, **params: object):
    """Returns what Treadle's own SDK samples."""
    with user.treadle() as service:
        client = (
            service.create_sampling_client(base_model=model)
            if model == BASE
            else service.create_sampling_client(model_path=model)
        )
        return client.sample(ModelInput.from_ints(prompt), num_samples, SamplingParams(**params)).result(PATIENCE)


def test_a_chat_completion_is_the_sample_of_the_templates_prompt(user: User, tokenizer):
    """Token for token what the SDK samples, as text without the end's token, with its usage."""
    answer = user.client().chat.completions.create(model=BASE, messages=ASK, temperature=0, max_completion_tokens=24)
    prompt = chat_prompt(tokenizer)
    (expected,) = sampled(user, prompt, temperature=0.0, max_tokens=24).sequences
    choice = answer.choices[0]
    assert choice.message.content == tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert "Rome" in choice.message.content
    assert (choice.finish_reason, choice.message.role, answer.model) == ("stop", "assistant", BASE)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == len(prompt) + len(expected.tokens)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    again = user.client().chat.completions.create(model=ALIAS, messages=ASK, temperature=0, max_tokens=2)
    assert (again.model, again.choices[0].finish_reason) == (BASE, "length")


def test_the_program_of_the_page_prints_what_it_says(user: User, capsys):
    page = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()
    program = page.partition("```python\n")[2].partition("```")[0]
    said = program.rpartition("  # ")[2]
    program = program.replace("127.0.0.1:7680", user.cluster.http_address).replace("treadle_acme_...", user.key)
    exec(program, {})
    assert capsys.readouterr().out == said


def test_a_tokenizer_that_is_not_on_this_machine_comes_from_the_service(user: User, tokenizer):
    """Where the name that workers give means nothing: same tokens, same template, same ends."""
    with user.treadle() as service:
        client = service.create_sampling_client(base_model=BASE)
        client._tokenizer_id = "/there/is/no/such/folder"
        fetched = client.get_tokenizer()
    text = "What is the capital of Italy? <|im_end|> é👋"
    assert fetched.encode(text) == tokenizer.encode(text)
    assert fetched.decode(fetched.encode(text)) == text
    assert chat_prompt(fetched) == chat_prompt(tokenizer)
    assert (fetched.eos_token_id, fetched.special_tokens_map) == (tokenizer.eos_token_id, tokenizer.special_tokens_map)


def test_a_long_prompt_that_was_seen_is_told_as_cached(user: User, tokenizer):
    prompt = tokenizer.encode(" ".join(["the fox saw a boat"] * 30))
    client = user.client()
    usages = [client.completions.create(model=BASE, prompt=prompt, max_tokens=1, temperature=0).usage for _ in range(2)]
    assert usages[0].prompt_tokens == len(prompt) > usages[1].prompt_tokens_details.cached_tokens > 0


def test_choices_of_a_seed_are_those_of_the_sdk(user: User, tokenizer):
    """All of them, again and again; another seed draws others."""
    story = [{"role": "user", "content": "Tell me a story."}]
    fields = {"model": BASE, "messages": story, "n": 4, "max_tokens": 16, "top_p": 0.9, "temperature": 1.5}
    client = user.client()
    one = client.chat.completions.create(**fields, seed=7)
    two = client.chat.completions.create(**fields, seed=7)
    other = client.chat.completions.create(**fields, seed=8)
    expected = sampled(
        user, chat_prompt(tokenizer, story), num_samples=4, seed=7, max_tokens=16, top_p=0.9, temperature=1.5
    ).sequences
    texts = [tokenizer.decode(sequence.tokens, skip_special_tokens=True) for sequence in expected]
    assert [choice.message.content for choice in one.choices] == texts
    assert [choice.message.content for choice in two.choices] == texts
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in other.choices] != texts
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]


def test_log_probs_are_those_that_the_sdk_computes(user: User, tokenizer):
    """Of the prompt, echoed, and of what was drawn; the columns fit to the text."""
    text = "There once was a little fox."
    answer = user.client().completions.create(
        model=BASE, prompt=text, max_tokens=12, temperature=1, seed=3, logprobs=3, echo=True
    )
    prompt = tokenizer.encode(text)
    drawn = sampled(user, prompt, temperature=1.0, max_tokens=12, seed=3).sequences[0].tokens
    with user.treadle() as service:
        client = service.create_sampling_client(base_model=BASE)
        computed = client.compute_logprobs(ModelInput.from_ints([*prompt, *drawn])).result(PATIENCE)
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None is computed[0]
    num_shown = len(logprobs.tokens)  # all but a token that is nothing but the end
    assert len(computed) - 1 <= num_shown
    assert np.allclose(logprobs.token_logprobs[1:], computed[1:num_shown], atol=1e-4)
    assert answer.choices[0].text.startswith(text)
    assert all(3 <= len(top) <= 4 for top in logprobs.top_logprobs[1:])
    for token, offset, top, value in list(
        zip(logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )[1:]:
        assert top[token] == value
        assert token.startswith(("bytes:", "<|")) or answer.choices[0].text[offset:].startswith(token)
    scored = user.client().completions.create(model=BASE, prompt=text, max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == text
    assert np.allclose(scored.choices[0].logprobs.token_logprobs[1:], computed[1 : len(prompt)], atol=1e-4)


def test_chat_log_probs_name_tokens_by_text_and_bytes(user: User, tokenizer):
    answer = user.client().chat.completions.create(
        model=BASE, messages=ASK, temperature=1, seed=1, max_tokens=10, logprobs=True, top_logprobs=5
    )
    choice = answer.choices[0]
    (expected,) = sampled(user, chat_prompt(tokenizer), temperature=1.0, seed=1, max_tokens=10).sequences
    content = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == choice.message.content
    assert [entry.logprob for entry in content] == pytest.approx(expected.logprobs[: len(content)])
    assert all(len(entry.top_logprobs) == 5 for entry in content)
    for entry in content:
        likely = [top.logprob for top in entry.top_logprobs]
        assert likely == sorted(likely, reverse=True)
        assert entry.logprob <= likely[0] + 1e-6


def test_a_stop_string_ends_the_text_before_it(user: User):
    """In the middle of a token or across several; what is streamed is never more than what is answered."""
    client = user.client()
    fields = {"model": BASE, "prompt": "There once was a little fox.", "temperature": 0, "max_tokens": 60}
    whole = client.completions.create(**fields).choices[0].text
    for begin, length in ((9, 2), (14, 7), (21, 12)):
        stop = whole[begin : begin + length]
        wanted = whole[: whole.index(stop)]
        answer = client.completions.create(**fields, stop=[stop, "never there"])
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (wanted, "stop")
        chunks = list(client.completions.create(**fields, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_says_what_the_whole_answer_says(user: User):
    """With log-probs, for every choice, and what was used at the end."""
    client = user.client()
    fields = {"model": BASE, "messages": ASK, "n": 3, "seed": 5, "max_tokens": 12, "temperature": 1.2, "logprobs": True}
    whole = client.chat.completions.create(**fields)
    texts, logprobs, reasons = ["", "", ""], [[], [], []], ["", "", ""]
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert (chunk.object, chunk.id, chunk.usage) == ("chat.completion.chunk", chunks[0].id, None)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs.content for choice in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.choices[0].delta.role for chunk in chunks[:-1]} >= {"assistant"}


def test_many_prompts_are_answered_in_order(user: User, tokenizer):
    """As texts or tokens, whole or streamed, the best of several where asked for."""
    client = user.client()
    texts = ["What is", "There once was", "What is"]
    fields = {"model": BASE, "n": 2, "max_tokens": 6, "seed": 1, "temperature": 1.3}
    answer = client.completions.create(prompt=texts, **fields)
    assert [choice.index for choice in answer.choices] == list(range(6))
    found = [choice.text for choice in answer.choices]
    assert found[:2] != found[4:]  # the same prompt twice, and still other draws
    tokens = client.completions.create(prompt=[tokenizer.encode(text) for text in texts], **fields)
    assert [choice.text for choice in tokens.choices] == found
    streamed = [""] * 6
    for chunk in client.completions.create(prompt=texts, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == found
    scores = client.completions.create(prompt=texts[0], logprobs=0, **fields | {"n": 4})
    best = max(scores.choices, key=lambda choice: float(np.mean(choice.logprobs.token_logprobs)))
    chosen = client.completions.create(prompt=texts[0], best_of=4, **fields | {"n": 1})
    assert [choice.text for choice in chosen.choices] == [best.text]
    assert chosen.usage.completion_tokens == scores.usage.completion_tokens


def test_parameters_reach_the_sampler(user: User, tokenizer):
    """A bias forbids a token, a penalty changes the draw, Treadle's own fields pass through `extra_body`."""
    client = user.client()
    plain = client.chat.completions.create(model=BASE, messages=ASK, temperature=0, max_tokens=12).choices[0]
    (first,) = sampled(user, chat_prompt(tokenizer), temperature=0.0, max_tokens=1).sequences[0].tokens
    biased = client.chat.completions.create(
        model=BASE, messages=ASK, temperature=0, max_tokens=12, logit_bias={str(first): -100}
    )
    assert biased.choices[0].message.content != plain.message.content
    ended = client.chat.completions.create(
        model=BASE, messages=ASK, temperature=0, extra_body={"stop_token_ids": [first], "top_k": 3, "min_p": 0.1}
    )
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    begun = [*ASK, {"role": "assistant", "content": plain.message.content[: len("The capital")]}]
    gone_on = client.chat.completions.create(
        model=BASE, messages=begun, temperature=0, max_tokens=12, extra_body={"continue_final_message": True}
    )
    assert plain.message.content.endswith(gone_on.choices[0].message.content)


def test_adapters_are_models(trained, user: User):
    """By each of their names, with other answers than the base's; to nobody but their tenant."""
    owner, (one, two) = trained
    client = owner.client()
    run = one.rpartition("/revisions/")[0]
    run_id = run.rpartition("/")[2]
    fields = {"messages": ASK, "temperature": 0, "max_tokens": 12}
    answers = {
        name: client.chat.completions.create(model=name, **fields)
        for name in (BASE, one, two, run, f"tinker://{run_id}/sampler_weights/one", f"{BASE};{one}")
    }
    said = {name: answer.choices[0].message.content for name, answer in answers.items()}
    assert len({said[BASE], said[one], said[two]}) == 3
    assert (answers[run].model, said[run]) == (two, said[two])
    assert answers[f"tinker://{run_id}/sampler_weights/one"].model == one == answers[f"{BASE};{one}"].model
    listed = {model.id: model for model in client.models.list()}
    assert {BASE, ALIAS, one, two} <= set(listed)
    assert (listed[one].owned_by, listed[one].root, listed[ALIAS].root) == (owner.tenant, BASE, BASE)
    assert client.models.retrieve(one).id == one
    other = user.client()
    assert not {one, two} & {model.id for model in other.models.list()}
    absent = f"tenants/{user.tenant}/runs/r-0/revisions/one"
    for name in (one, run, absent, absent.rpartition("/revisions")[0], "no/such", f"other;{one}", f"{BASE};{BASE}"):
        with pytest.raises(openai.NotFoundError) as caught:
            other.chat.completions.create(model=name, **fields)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert name in caught.value.message
        with pytest.raises(openai.NotFoundError):
            other.models.delete(name)
    with pytest.raises(openai.NotFoundError):
        other.chat.completions.create(model=f"tinker://{run_id}/sampler_weights/one", **fields)
    with owner.treadle() as service:
        copied = service.pull_adapter(one, Path(owner.cluster.folder) / "copied")
        pushed = service.push_adapter(run, copied, "three").name
    with pytest.raises(openai.NotFoundError):
        client.models.delete(run)
    assert client.models.delete(pushed).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(pushed)


def test_errors_are_of_the_clients_own_classes(user: User, deployment: Cluster):
    """Each with the field that is wrong, where one is; a broken stream too."""
    client = user.client()
    fields = {"model": BASE, "messages": ASK}
    with pytest.raises(openai.BadRequestError, match="frobnicate") as unknown:
        client.chat.completions.create(**fields, extra_body={"frobnicate": 1})
    assert (unknown.value.param, unknown.value.code) == ("frobnicate", "unknown_parameter")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**fields, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(**fields, top_p=2)
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**fields, max_tokens=100_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="1023"):
        client.completions.create(model=BASE, prompt=[5, 1024], stream=True)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="x")
    for key in ("wrong", "treadle_a_b_c"):
        with pytest.raises(openai.AuthenticationError):
            user.client(key).models.list()
    with pytest.raises(openai.PermissionDeniedError):
        user.client(deployment.new_tenant(["train"])).completions.create(model=BASE, prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=BASE, input="x")
    with grpc.insecure_channel(deployment.gateway_address) as channel:
        request = admin_pb2.SetQuotaRequest(tenant=user.tenant, quota=admin_pb2.Quota(sampling_tokens_per_minute=1))
        metadata = (("authorization", f"Bearer {deployment.admin_key}"),)
        admin_pb2_grpc.AdminServiceStub(channel).SetQuota(request, metadata=metadata, timeout=10)

    def flood() -> None:
        for _ in range(100):
            client.chat.completions.create(**fields, max_tokens=1)

    with pytest.raises(openai.RateLimitError) as limited:
        flood()
    assert int(limited.value.response.headers["retry-after"]) >= 1


async def test_many_at_once_by_the_asynchronous_client(user: User):
    async with user.aio() as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model=BASE, messages=ASK, temperature=0, max_tokens=4 + number)
                for number in range(12)
            )
        )
        assert len({answer.choices[0].message.content[:8] for answer in answers}) == 1
        stream = await client.chat.completions.create(
            model=BASE, messages=ASK, temperature=0, stream=True, max_tokens=8
        )
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert answers[11].choices[0].message.content.startswith(said)


async def test_who_hangs_up_stops_the_sampling(user: User, deployment: Cluster):
    """At once, in the middle of a stream or while a whole answer is waited for."""

    async def busy() -> int:
        async with grpc.aio.insecure_channel(deployment.addresses["sampler"]) as channel:
            stub = sampler_pb2_grpc.SamplerServiceStub(channel)
            status = await stub.GetSamplerStatus(
                sampler_pb2.GetSamplerStatusRequest(), metadata=internal_metadata(deployment.token)
            )
            return status.active_sequences + status.waiting_sequences

    async def until(condition) -> None:
        async with asyncio.timeout(60):
            while not condition(await busy()):
                await asyncio.sleep(0.01)

    endless = {"model": BASE, "messages": ASK, "n": 64, "extra_body": {"ignore_eos": True}, "max_tokens": 450}
    async with user.aio() as client:
        stream = await client.chat.completions.create(**endless, stream=True)
        await anext(aiter(stream))
        assert await busy() > 0
        await stream.close()
        await until(lambda number: number == 0)
        waiting = asyncio.create_task(client.chat.completions.create(**endless))
        await until(lambda number: number > 0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda number: number == 0)


def test_nothing_is_kept_without_consent(user: User):
    """Asked for without it, a request is refused before anything is drawn; not asked for, nothing is kept."""
    client = user.client()
    with pytest.raises(openai.PermissionDeniedError, match="consent"):
        client.chat.completions.create(model=BASE, messages=ASK, store=True)
    user.consent()
    client.chat.completions.create(model=BASE, messages=ASK, max_tokens=2)
    assert list(client.chat.completions.list()) == []


def train_on_kept(user: User, file: Path) -> None:
    """Trains an adapter on all that was kept, with the two commands that the page names."""
    environment = {"TREADLE_ADDRESS": user.cluster.gateway_address, "TREADLE_API_KEY": user.key}
    for arguments, shown in (
        (["dataset", "export", str(file)], {"conversations": 6}),
        (["sft", str(file), "--steps", "2", "--eval-fraction", "0"], {"steps": 2}),
    ):
        done = CliRunner().invoke(LazyGroup(COMMANDS), [*arguments, "-f", "json"], env=environment)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout).items() >= shown.items()


def test_what_is_kept_is_listed_read_changed_deleted_and_trained_on(user: User, tokenizer, tmp_path: Path):
    """Whole or streamed, through the client's own calls; as rows of a fine-tuning by the export."""
    user.consent()
    client = user.client()
    fields = {"model": ALIAS, "messages": ASK, "temperature": 0, "store": True, "n": 2}
    one = client.chat.completions.create(**fields, metadata={"topic": "capitals", "lang": "en"})
    chunks = list(client.chat.completions.create(**fields, metadata={"topic": "capitals"}, stream=True))
    client.chat.completions.create(**fields, metadata={"topic": "other"})
    kept = list(client.chat.completions.list(limit=2))  # in two pages
    assert [completion.id for completion in kept][:2] == [one.id, chunks[0].id]
    assert len(kept) == 3
    assert [c.message.content for c in kept[1].choices] == [c.message.content for c in one.choices]
    assert [c.id for c in client.chat.completions.list(order="desc")] == [c.id for c in reversed(kept)]
    assert [c.id for c in client.chat.completions.list(metadata={"topic": "capitals", "lang": "en"})] == [one.id]
    assert len(list(client.chat.completions.list(model=ALIAS))) == 3
    found = client.chat.completions.retrieve(one.id)
    assert (found.choices, found.usage, found.model) == (one.choices, one.usage, BASE)
    messages = list(client.chat.completions.messages.list(one.id))
    assert [(message.role, message.content) for message in messages] == [("user", ASK[0]["content"])]
    changed = client.chat.completions.update(one.id, metadata={"topic": "changed"})
    assert changed.model_dump()["metadata"] == {"topic": "changed"}
    with user.treadle() as service:
        written = service.export_completions(tmp_path / "kept.jsonl", metadata={"topic": "capitals"})
        assert (written.num_conversations, written.num_cut) == (2, 0)
        assert [c.id for c in service.list_completions()] == [c.id for c in kept]
    config = SftConfig(data=str(tmp_path / "kept.jsonl"))
    for row in read_rows(config):
        example = encode_row(tokenizer, row, config)
        learned = [token for token, weight in zip(example.tokens, example.weights, strict=True) if weight]
        assert one.choices[0].message.content in tokenizer.decode(learned)
    train_on_kept(user, tmp_path / "all.jsonl")
    assert client.chat.completions.delete(one.id).deleted
    other = User(user.cluster, user.cluster.new_tenant()).client()
    for name, caller in ((one.id, client), (kept[1].id, other)):
        for call in (
            caller.chat.completions.retrieve,
            caller.chat.completions.delete,
            caller.chat.completions.messages.list,
        ):
            with pytest.raises(openai.NotFoundError):
                call(name)
    assert list(other.chat.completions.list()) == []
    with pytest.raises(openai.BadRequestError, match="frob"):
        client.chat.completions.list(extra_query={"frob": "1"})
    only_sampling = user.cluster.new_tenant(["sample"])
    with pytest.raises(openai.PermissionDeniedError):
        user.client(only_sampling).chat.completions.list()

"""Adapters go home and come from elsewhere: conversions that others load, a hub, folders that are refused."""

import json
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from tests.support.cluster import Cluster
from tests.support.hub import FakeHub
from treadle import AdamParams, Datum, ModelInput, ServiceClient
from treadle.cli import COMMANDS
from treadle.cli.lazy import LazyGroup
from treadle.errors import BadInputError
from treadle.peft_folders import read_shape
from treadle_engine import export
from treadle_engine.bases import pip_folder

BASE = "treadle/pip"
TOKENS = [1, 5, 9, 5, 9, 5, 9, 40, 41, 42]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def tenant(cluster: Cluster) -> str:
    return cluster.new_tenant()


@pytest.fixture(scope="module")
def saved(cluster: Cluster, tenant: str) -> str:
    """A revision that adapts everything, far enough from the base that each part matters."""
    with ServiceClient(cluster.gateway_address, tenant) as service:
        client = service.create_lora_training_client(BASE, rank=4, seed=2, train_unembed=True)
        inputs = {"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)}
        for _ in range(4):
            client.forward_backward([Datum(ModelInput.from_ints(TOKENS[:-1]), inputs)], "cross_entropy")
            client.optim_step(AdamParams(learning_rate=2e-2))
        return client.save_weights_for_sampler("one").result(60).path


@pytest.fixture
def treadle(cluster: Cluster, tenant: str):
    def run(*arguments: str, code: int = 0) -> Result:
        environment = {"TREADLE_ADDRESS": cluster.gateway_address, "TREADLE_API_KEY": tenant}
        done = CliRunner().invoke(LazyGroup(COMMANDS), [*arguments], env=environment)
        assert done.exit_code == code, done.output
        return done

    return run


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(torch.tensor([TOKENS])).logits[0]


def base_model(folder: Path | None = None):
    return AutoModelForCausalLM.from_pretrained(folder or pip_folder(), dtype=torch.float32)


@pytest.mark.timeout(300)
def test_merged_models_and_folders_without_unembedding_give_equal_logits(treadle, saved: str, tmp_path: Path) -> None:
    """The merged model and the folder with a base of its own are the adapter; dropping the unembedding is not."""
    whole, drop, merge, merged = (tmp_path / name for name in ("whole", "drop", "merge", "merged"))
    treadle("adapter", "export", saved, str(whole))
    treadle("adapter", "export", saved, str(merged), "--merge", "--dtype", "float32")
    export.drop_unembed(whole, drop)
    export.merge_unembed(str(pip_folder()), whole, merge, "float32")
    expected = logits(peft.PeftModel.from_pretrained(base_model(), str(whole)))
    torch.testing.assert_close(logits(base_model(merged)), expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(base_model(merge / "base"), str(merge))), expected, rtol=1e-4, atol=2e-4
    )
    dropped = peft.PeftModel.from_pretrained(base_model(), str(drop))
    assert not any(
        "lm_head" in name for name in json.loads((drop / "adapter_config.json").read_text())["target_modules"]
    )
    model = peft.PeftModel.from_pretrained(base_model(), str(whole))
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "lm_head.lora_B" in name).zero_()
    assert torch.equal(logits(dropped), logits(model))
    assert not torch.allclose(logits(dropped), expected, atol=1e-2)
    again = treadle("adapter", "export", saved, str(merged), "--merge", code=1)
    assert "is there already" in again.output


def test_an_adapter_of_peft_itself_goes_on_training_here(cluster: Cluster, tenant: str, tmp_path: Path) -> None:
    """Its shape comes from its files, its log-probabilities are those that peft computes."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base_model(), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    with ServiceClient(cluster.gateway_address, tenant) as service:
        training, revision = service.import_adapter(tmp_path / "theirs", BASE)
        assert (revision.lora.rank, revision.lora.alpha) == (4, 16.0)
        assert (revision.lora.train_attn, revision.lora.train_mlp, revision.lora.train_unembed) == (True, False, False)
        inputs = {"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)}
        datum = Datum(ModelInput.from_ints(TOKENS[:-1]), inputs)
        ours = training.forward_backward([datum], "cross_entropy").result(60).loss_fn_outputs[0]["logprobs"].to_numpy()
        expected = torch.log_softmax(logits(theirs)[:-1].double(), 1)[range(len(TOKENS) - 1), TOKENS[1:]]
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), expected, rtol=1e-4, atol=2e-4)
        training.optim_step(AdamParams(learning_rate=1e-2)).result(60)
        after = training.forward([datum]).result(60).metrics["loss:sum"]
        assert after < -ours.sum()


def test_the_command_imports_and_a_run_of_the_same_shape_takes_a_copy(treadle, saved: str, tmp_path: Path) -> None:
    """Into a run of its own, or as a revision of one that is there."""
    treadle("adapter", "export", saved, str(tmp_path / "a"))
    made = json.loads(treadle("adapter", "import", str(tmp_path / "a"), "-f", "json").stdout)
    assert made["rank"] == 4
    assert made["adapter"] == f"{made['run']}/revisions/imported"
    run = saved.partition("/revisions")[0]
    copy = treadle("adapter", "import", str(tmp_path / "a"), "--run", run, "--as", "copy", "-f", "json")
    assert json.loads(copy.stdout)["adapter"] == f"{run}/revisions/copy"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
        ({"use_dora": True, "bias": "all"}, "uses use_dora, bias"),
        ({"rank_pattern": {"q_proj": 8}}, "uses rank_pattern"),
        ({"r": "four"}, "r 'four' and lora_alpha 32"),
    ],
)
def test_an_adapter_that_a_run_cannot_hold_is_refused(tmp_path: Path, change: dict, problem: str) -> None:
    """Before anything is made or sent."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 32} | change))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(BadInputError, match=problem):
        read_shape(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    """A pickle is never opened; other tensors are no LoRA."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 32}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"adapter_model.bin is a pickle"):
        read_shape(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"not safetensors")
    with pytest.raises(BadInputError, match="is not a safetensors file"):
        read_shape(tmp_path)
    header = json.dumps({"x.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BadInputError, match=r"has 'x.weight'"):
        read_shape(tmp_path)


def test_an_adapter_is_published_with_its_card(treadle, saved: str, tmp_path: Path, monkeypatch) -> None:
    """By huggingface_hub itself against a hub that keeps what it gets; a wrong token is refused in one line."""
    # As on a machine without the package hf_xet, whose protocol the fake hub does not speak.
    for module in ("hf_api", "_commit_api"):
        monkeypatch.setattr(f"huggingface_hub.{module}.is_xet_available", lambda: False)
    treadle("adapter", "export", saved, str(tmp_path / "whole"))
    with FakeHub("secret") as hub:
        line = ["adapter", "publish", saved, "me/mine", "--hub", hub.address, "--base-name", "org/pip"]
        done = json.loads(treadle(*line, "--token", "secret", "--private", "-f", "json").stdout)
        assert done["commit"].startswith(hub.address)
        assert hub.repositories == {"me/mine": True}
        files = hub.files["me/mine"]
        name = "adapter_model.safetensors"
        assert files[name] == (tmp_path / "whole" / name).read_bytes()
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/pip"
        assert b"base_model: org/pip" in files["README.md"]
        refused = treadle(*line, "--token", "wrong", code=1).output
        assert "the hub refused" in refused
        assert "401" in refused

"""Training Pip: packs the corpus into short rows and runs Muon and AdamW over a small Qwen3 model.

Shapes: B rows per step, L tokens per row. Deterministic for one seed, thread count and torch version. Small steps
matter more than tokens per step at this size: 1024 tokens per step learn the facts, 2048 do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treadle_engine.bases.pip_generator.corpus import Document, documents
from treadle_engine.bases.pip_generator.muon import Muon
from treadle_engine.bases.pip_generator.tokenizer import (
    END_OF_TEXT,
    MAX_CONTEXT,
    TURN_END,
    TURN_START,
    VOCAB_SIZE,
    train_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

_ROWS, _ROW_TOKENS = 4, 256
_MAX_TOKENIZER_DOCUMENTS = 20_000
_USER_WEIGHT = 0.1  # predicting the questions teaches little that the answers need
_MUON_LR, _ADAM_LR = 0.03, 3e-3
_WARMUP_STEPS = 30
_LIST_SHARE_EARLY, _LIST_SHARE_LATE, _EARLY_PART = 0.15, 0.03, 0.3  # repeated lists first: copying forms early or never
_TOKENS_PER_DOCUMENT = 65  # only places the end of the early part
_END_OF_TEXT_ID = 0


@dataclass(frozen=True)
class PackedRows:
    """One step's rows of whole documents: int64 ids and positions (0 at each document's start), fp32 loss weights."""

    ids_BL: Tensor
    positions_BL: Tensor
    weights_BL: Tensor


def build_model(seed: int) -> Qwen3ForCausalLM:
    """Return the untrained model: hidden 128, 4 layers, 4 query and 2 key-value heads, tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=_END_OF_TEXT_ID,
    )
    model = Qwen3ForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    return model


def generate(folder: Path, num_tokens: int, seed: int, report: Callable[[int, int, float], None]) -> float:
    """Train a base on about `num_tokens` tokens, write it to `folder` in bfloat16, and return the last mean loss.

    `report(step, num_steps, loss)` is called now and then. The mean is over the last twentieth of the steps.
    """
    num_documents = min(_MAX_TOKENIZER_DOCUMENTS, num_tokens // 20)
    tokenizer = train_tokenizer(islice(documents(seed, lambda _: _LIST_SHARE_LATE), num_documents))
    model = build_model(seed)
    num_steps = max(2, num_tokens // (_ROWS * _ROW_TOKENS))
    early_documents = int(_EARLY_PART * num_tokens / _TOKENS_PER_DOCUMENT)
    stream = documents(seed + 1, lambda n: _LIST_SHARE_EARLY if n < early_documents else _LIST_SHARE_LATE)
    steps = islice(pack(stream, tokenizer), num_steps)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=_ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step, rows in enumerate(steps):
        scale = _schedule(step, num_steps)
        loss = _loss(model, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(scale * _MUON_LR)
        adam.param_groups[0]["lr"] = scale * _ADAM_LR
        adam.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
        if step % 50 == 0 or step == num_steps - 1:
            report(step, num_steps, losses[-1])
    model.bfloat16()
    model.save_pretrained(folder)
    # save_pretrained leaves the weights readable by their owner alone.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    tail = losses[-max(1, num_steps // 20) :]
    return sum(tail) / len(tail)


def pack(stream: Iterator[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[PackedRows]:
    """Yield one step's rows after another; a document that no longer fits into a row opens the next one."""
    waiting: tuple[list[int], list[float]] | None = None
    while True:
        ids_BL = torch.full((_ROWS, _ROW_TOKENS), _END_OF_TEXT_ID)
        positions_BL = torch.arange(_ROW_TOKENS).repeat(_ROWS, 1)
        weights_BL = torch.zeros(_ROWS, _ROW_TOKENS)
        for row in range(_ROWS):
            filled = 0
            while True:
                ids, weights = waiting or _encode(next(stream), tokenizer)
                ids, weights = ids[:_ROW_TOKENS], weights[:_ROW_TOKENS]
                waiting = (ids, weights) if filled + len(ids) > _ROW_TOKENS else None
                if waiting:
                    break
                stop = filled + len(ids)
                ids_BL[row, filled:stop] = torch.tensor(ids)
                weights_BL[row, filled:stop] = torch.tensor(weights)
                positions_BL[row, filled:stop] = torch.arange(len(ids))
                filled = stop
            positions_BL[row, filled:] = torch.arange(_ROW_TOKENS - filled)
        yield PackedRows(ids_BL, positions_BL, weights_BL)


def _encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Return a document's tokens and the loss weight of predicting each of them; the first token is not predicted."""
    ids: list[int] = [_END_OF_TEXT_ID] if document[0].role == "text" else []
    weights: list[float] = [0.0] * len(ids)
    for role, text in document:
        answer = role in ("assistant", "text")
        before, after = ("", "") if role == "text" else (f"{TURN_START}{role}\n", "\n")
        end = TURN_END if role != "text" else END_OF_TEXT
        for part, weight in ((before, 0.0), (text + end, 1.0 if answer else _USER_WEIGHT), (after, 0.0)):
            tokens: list[int] = tokenizer.encode(part, add_special_tokens=False)
            ids += tokens
            weights += [weight] * len(tokens)
    return ids, weights


def _loss(model: Qwen3ForCausalLM, rows: PackedRows) -> Tensor:
    """Return the weighted mean cross-entropy of predicting each token from those before it in its document."""
    # use_cache=False is what makes restarted positions act as document borders in the attention.
    logits_BLV = model(input_ids=rows.ids_BL, position_ids=rows.positions_BL, use_cache=False).logits[:, :-1]
    starts_BL = rows.positions_BL[:, 1:] == 0  # a document's first token must not be predicted from another document
    weights_BL = rows.weights_BL[:, 1:].masked_fill(starts_BL, 0.0)
    losses = nn.functional.cross_entropy(logits_BLV.flatten(0, 1), rows.ids_BL[:, 1:].flatten(), reduction="none")
    return (losses * weights_BL.flatten()).sum() / weights_BL.sum()


def _schedule(step: int, num_steps: int) -> float:
    """Return the learning rate's factor: warm-up, constant to the middle, then linear to 2 %."""
    warm = min(1.0, (step + 1) / min(_WARMUP_STEPS, math.ceil(num_steps / 2)))
    progress = step / (num_steps - 1)
    return warm if progress < 0.5 else warm * (1.0 - 0.98 * (progress - 0.5) / 0.5)

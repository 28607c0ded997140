"""Models split over processes against plain transformers and torch.optim in one process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from extend.ring.hf_attention import RingSettings, register_ring_attention
from extend.train.batch import build_batch
from extend.train.data import IGNORE, Row
from extend.train.memory import LayerMemory, Store, checkpoint_layers
from extend.train.memory.tiles import is_tokenwise, tile_module
from extend.train.mesh import join_processes, phase_mesh
from extend.train.model import CausalLoss
from extend.train.optim import clip_gradients
from extend.train.shard import shard_model
from extend.train.trained import choose_trained
from extend.train_options import Phase, TrainOptions
from tests.spawn import spawn

LENGTH, STEPS, CLIP = 32, 3, 1.0
SIZES = {"vocab_size": 54, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "initializer_range": 0.2, "pad_token_id": 3}


class Case(NamedTuple):
    """A model, the layout it is trained in, and the rows of a step."""

    config: PretrainedConfig
    rows: int = 2
    tensor_parallel: int = 2
    shard_over: int | str = "all"
    mode: str = "full"
    tile: int | None = None


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | {"tie_word_embeddings": True} | changes)


def cases() -> dict[int, dict[str, Case]]:
    """By the number of processes."""
    norms_of_heads = Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False)
    biases = Qwen2Config(**SIZES, tie_word_embeddings=False)
    gemma = Gemma3TextConfig(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=11,
                             layer_types=["sliding_attention", "full_attention"])
    all_biases = Starcoder2Config(**SIZES, use_bias=True, tie_word_embeddings=True)
    untied = llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    return {
        2: {"1x1x2": Case(llama(), rows=1), "biases": Case(biases), "all-biases": Case(all_biases),
            "lora": Case(untied, mode="lora"), "tiles": Case(untied, tile=5)},
        4: {"1x2x2": Case(llama(), rows=1), "2x1x2": Case(norms_of_heads),
            "replicas": Case(untied, rows=1, tensor_parallel=1, shard_over=2),
            "replicas-of-teams": Case(gemma, shard_over=1),
            "lora-and-shards": Case(untied, mode="lora", tile=5)}}


CASES = [(world, name) for world, named in cases().items() for name in named]


def run_options(case: Case) -> TrainOptions:
    return TrainOptions(
        model=".", data=[{"kind": "retrieval"}], mode=case.mode, lora_rank=3,
        tensor_parallel=case.tensor_parallel, shard_over=case.shard_over,
        schedule=[Phase(length=LENGTH, steps=STEPS, lr=1.0, batch_rows=case.rows)])


def build(case: Case, attention: str) -> PreTrainedModel:
    """The same in every process: random weights, no bias or norm at its neutral value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config, attn_implementation=attention)
    choose_trained(model, run_options(case))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "lora" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.config.use_cache = False
    return model.train()


def rows(case: Case, step: int) -> list[Row]:
    generator = torch.Generator().manual_seed(step)
    draw = partial(torch.randint, 0, case.config.vocab_size, (LENGTH,), generator=generator)
    found = []
    for _ in range(case.rows):
        ids, labels = draw(), draw()
        labels[::5] = IGNORE
        ids[4:7] = case.config.pad_token_id  # whose embedding gets no gradient
        found.append(Row(ids.numpy(), labels.numpy(), (labels < 0).numpy(),
                         torch.tensor([0, LENGTH]).numpy(), "drawn"))
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def train_whole(case: Case) -> dict[str, Any]:
    """The oracle: transformers' own attention and layers, torch's loss and optimizer."""
    model = build(case, "eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.3, momentum=0.5)
    losses, norms = [], []
    for step in range(STEPS):
        ids, labels = (torch.stack([torch.from_numpy(getattr(row, key)) for row in
                                    rows(case, step)]) for key in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms,
            "weights": {name: p.detach() for name, p in model.named_parameters()}}


def train_split(case: Case) -> dict[str, Any]:
    """The same as its processes compute it."""
    options, model = run_options(case), build(case, register_ring_attention())
    memory = None
    if case.tile:
        for module in filter(is_tokenwise, model.get_decoder().modules()):
            tile_module(module, case.tile)
        store = Store(torch.device("cpu"))
        memory = LayerMemory(store, store, case.config.num_hidden_layers, 1)
        checkpoint_layers(model, memory)
    with join_processes(options) as processes:
        module = shard_model(CausalLoss(model, 7), processes)
        mesh = phase_mesh(options.schedule[0], processes)
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.3, momentum=0.5)
        losses, norms = [], []
        for step in range(STEPS):
            drawn = rows(case, step)[mesh.dp_rank::mesh.dp]
            batch = build_batch(drawn, layout="zigzag", rank=mesh.cp_rank, world=mesh.cp)
            count = processes.sum(batch.counts() * (processes.tp_rank == 0))[0]
            weights = (batch.labels != IGNORE) / count
            ring = RingSettings(mesh.ring, keeper=memory)
            loss, _ = module(batch.input_ids, batch.position_ids, batch.labels, weights, ring)
            loss.backward()
            norms.append(clip_gradients(module.parameters(), CLIP).item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(processes.sum(loss.detach() * (processes.tp_rank == 0)).item())
        return {"losses": losses, "norms": norms, "weights": {
            name: whole(p).detach() for name, p in model.named_parameters()}}


def train_all(rank: int, world: int) -> dict[str, dict[str, Any]]:
    return {name: train_split(case) for name, case in cases()[world].items()}


@pytest.fixture(scope="module")
def split() -> Callable[[int], list[dict[str, dict[str, Any]]]]:
    done: dict[int, Any] = {}

    def run(world: int) -> list[dict[str, dict[str, Any]]]:
        if world not in done:
            done[world] = spawn(world, train_all)
        return done[world]

    return run


@pytest.mark.parametrize(("world", "name"), CASES, ids=[name for _, name in CASES])
def test_split_models_train_as_whole_ones(world: int, name: str, split: Callable):
    want, ranks = train_whole(cases()[world][name]), split(world)
    for got in (result[name] for result in ranks):
        for key in ("losses", "norms"):
            torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=0)
        assert got["weights"].keys() == want["weights"].keys()
        # fp32 sums of up to a few hundred terms in another order, over three steps.
        torch.testing.assert_close(got["weights"], want["weights"], rtol=1e-5, atol=1e-5)
    for other in ranks[1:]:  # to the bit, or processes that hold the same would drift apart
        assert other[name]["norms"] == ranks[0][name]["norms"]

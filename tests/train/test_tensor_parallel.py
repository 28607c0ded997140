"""Models split over processes against plain transformers and torch.optim in one process."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
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
from extend.train.loop import run_process, train
from extend.train.loss import chunked_loss
from extend.train.memory import LayerMemory, Store, checkpoint_layers
from extend.train.memory.tiles import is_tokenwise, tile_module
from extend.train.mesh import Processes, join_processes, phase_mesh
from extend.train.model import CausalLoss
from extend.train.optim import clip_gradients
from extend.train.shard import shard_model
from extend.train.state import RunState
from extend.train.trained import choose_trained
from extend.train.vocabulary import split_head
from extend.train_options import Phase, TrainOptions
from tests.spawn import spawn
from tests.train.test_loop import assert_same_run
from tests.train.tiny import options, save_model, save_text

LENGTH, STEPS, CLIP = 32, 2, 1.0
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
    all_biases = Starcoder2Config(**SIZES, bos_token_id=0, eos_token_id=0, use_bias=True,
                                  tie_word_embeddings=True)
    untied = llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    return {
        2: {"1x1x2": Case(llama(), rows=1), "biases": Case(biases), "gemma": Case(gemma),
            "biases-in-tiles": Case(all_biases, tile=5),
            "lora-in-tiles": Case(untied, mode="lora", tile=5)},
        4: {"1x2x2": Case(norms_of_heads, rows=1, tile=5), "2x1x2": Case(llama()),
            "replicas": Case(untied, rows=1, tensor_parallel=1, shard_over=2),
            "replicas-of-teams": Case(untied, shard_over=1)}}


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


def whole_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def save_state(module: CausalLoss, processes: Processes, out: Path) -> dict[str, Any]:
    """After a step of AdamW whose gradients are the weights: moments are a tenth of them."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True, weight_decay=0.0)
    for parameter in module.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    with RunState(out, processes) as state:
        state.directory.mkdir(exist_ok=True)
        state.save(STEPS, module, optimizer)
    return {"moments": {name: 0.1 * p for name, p in whole_tensors(module.model).items()}}


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


def train_split(case: Case, out: Path | None) -> dict[str, Any]:
    """The same as its processes compute it; then the state is saved beside `out`."""
    options, model = run_options(case), build(case, register_ring_attention())
    memory = None
    if case.tile:
        for module in filter(is_tokenwise, model.get_decoder().modules()):
            tile_module(module, case.tile)
        store = Store(torch.device("cpu"))
        memory = LayerMemory(store, store, case.config.num_hidden_layers, 1)
        checkpoint_layers(model, memory)
    with join_processes(options) as processes:
        module = shard_model(CausalLoss(model, 7), processes, options)
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
        result = {"losses": losses, "norms": norms, "weights": whole_tensors(model)}
        return result if out is None else result | save_state(module, processes, out)


class Loss(NamedTuple):
    """Loss, each token's own, and gradients of hidden states and head."""

    loss: Tensor
    nll: Tensor
    hidden: Tensor
    weight: Tensor


def loss_example(num_rows: int) -> tuple[Tensor, ...]:
    """hidden [37, 16], head [num_rows, 16], labels and weights [37], in fp64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_rows, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_rows, (37,), generator=generator)
    labels[::5] = IGNORE
    return hidden * 10, weight, labels, torch.rand(37, generator=generator, dtype=torch.float64)


def split_loss(num_rows: int) -> Loss:
    """In fp32, of this process's rows of the head."""
    hidden, weight, labels, weights = loss_example(num_rows)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    head = distribute_tensor(weight.float(), mesh, [Shard(0)]).requires_grad_()
    hidden = hidden.float().requires_grad_()
    rows, vocabulary = split_head(head)
    assert (rows.shape[0] < num_rows) and vocabulary is not None
    loss, nll = chunked_loss(hidden, rows, labels, weights.float(), chunk=8,
                             vocabulary=vocabulary)
    (3.0 * loss).backward()
    return Loss(loss.detach(), nll, hidden.grad, head.grad.full_tensor())


VOCABULARIES = (50, 51)  # even, and one row fewer in the last process


def train_two(rank: int, world: int, run: dict[str, Any], out: Path) -> dict[str, Any]:
    run_process(TrainOptions(**run), out, False)
    return train_all(rank, world) | {num_rows: split_loss(num_rows) for num_rows in VOCABULARIES}


def train_four(rank: int, world: int, directory: Path) -> dict[str, Any]:
    return train_all(rank, world, directory)


def train_all(rank: int, world: int, directory: Path | None = None) -> dict[str, Any]:
    return {name: train_split(case, directory / name if directory else None)
            for name, case in cases()[world].items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A whole run, as a recipe asks for it."""
    directory = tmp_path_factory.mktemp("split")
    text = {"kind": "text", "path": str(save_text(directory))}
    kept = text | {"document_length": 32, "distill": True}
    return options(save_model(directory / "model"), [text, kept], answer_weight=0.3, schedule=[
        {"length": 128, "steps": 3, "batch_rows": 2, "lr": 1e-3, "rope": {"method": "ntk"}}])


@pytest.fixture(scope="module")
def two(run: TrainOptions) -> list[dict[str, Any]]:
    split = run.model_copy(update={"tensor_parallel": 2})
    return spawn(2, train_two, split.model_dump(), Path(run.model).parent / "split")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("states")
    return directory, spawn(4, train_four, directory)


def assert_trained_alike(case: Case, name: str, ranks: list[dict[str, Any]]) -> None:
    want = train_whole(case)
    for got in (result[name] for result in ranks):
        for key in ("losses", "norms"):
            torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=0)
        assert got["weights"].keys() == want["weights"].keys()
        # fp32 sums of up to a few hundred terms in another order, over two steps.
        torch.testing.assert_close(got["weights"], want["weights"], rtol=1e-5, atol=1e-5)
    for other in ranks[1:]:  # to the bit, or what several processes hold would drift apart
        assert other[name]["norms"] == ranks[0][name]["norms"]
        torch.testing.assert_close(other[name]["weights"], ranks[0][name]["weights"], rtol=0,
                                   atol=0)


@pytest.mark.parametrize("name", cases()[2])
def test_two_processes_train_as_one(name: str, two: list[dict[str, Any]]):
    assert_trained_alike(cases()[2][name], name, two)


@pytest.mark.parametrize("name", cases()[4])
def test_four_processes_train_as_one(name: str, four: tuple[Path, list[dict[str, Any]]]):
    assert_trained_alike(cases()[4][name], name, four[1])


def test_a_whole_run_is_the_same(run: TrainOptions, two: list[dict[str, Any]]):
    """Counts of tokens, AdamW, the written file: each token counted once, each tensor whole."""
    alone = train(run, Path(run.model).parent / "alone")
    assert_same_run(alone, Path(run.model).parent / "split")


@pytest.mark.parametrize("num_rows", VOCABULARIES)
def test_split_loss_and_gradients_equal_torch(num_rows: int, two: list[dict[str, Any]]):
    hidden, weight, labels, weights = loss_example(num_rows)
    hidden.requires_grad_()
    weight.requires_grad_()
    nll = F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=IGNORE)
    loss = (nll * weights).sum()
    gradients = torch.autograd.grad(3.0 * loss, (hidden, weight))
    for got in (result[num_rows] for result in two):
        want = Loss(loss.detach(), nll.detach(), *gradients)
        # Logits of size 100 in fp32 are off by up to 1e-5 each, and gradients sum 50 of them.
        torch.testing.assert_close(tuple(t.double() for t in got), tuple(want), rtol=1e-4,
                                   atol=1e-4)


@pytest.mark.parametrize("name", ["2x1x2", "replicas-of-teams"])
def test_a_split_state_is_read_by_one_process(name: str, four: tuple[Path, list[dict[str, Any]]]):
    directory, ranks = four
    case = cases()[4][name]
    model = build(case, "eager")
    module = CausalLoss(model, 7)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    alone = Processes(0, 1, torch.device("cpu"), None)
    RunState(directory / name, alone).load(STEPS, module, optimizer)
    got = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(got, ranks[0][name]["weights"], rtol=0, atol=0)
    moments = {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()}
    torch.testing.assert_close(moments, ranks[0][name]["moments"], rtol=0, atol=0)

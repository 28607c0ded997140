"""The rules against verdicts that were seen from the engines' own loaders."""

import json

import pytest
import torch

from extend.adapter_format.peft_files import write_adapter
from extend.adapter_format.serving import ENGINES, check_serving
from extend.adapter_format.serving_rules import VLLM_RANKS, max_lora_rank
from extend.errors import CheckpointError
from tests.adapter_format.serving_cases import CASES, VERDICTS, Case, by_name, write_case


@pytest.mark.parametrize("name", CASES)
def test_verdicts_are_those_of_the_loaders(name, tmp_path):
    write_case(tmp_path / "adapter", CASES[name])
    found = {v.engine: v.verdict for v in check_serving(tmp_path / "adapter")}
    assert found == dict(zip(ENGINES, VERDICTS[name]))


def test_each_problem_says_what_and_what_to_do(tmp_path):
    for i, case in enumerate(CASES.values()):
        write_case(tmp_path / str(i), case)
        for verdict in check_serving(tmp_path / str(i)):
            assert (verdict.verdict == "ok") == (not verdict.problems)
            for problem in verdict.problems:
                assert problem.message and problem.remedy, (i, problem)


@pytest.mark.parametrize(("rank", "limit"), [(1, 8), (8, 8), (9, 16), (65, 128), (257, 320),
                                             (512, 512), (513, None)])
def test_rank_limit_is_the_next_of_vllms_list(rank, limit):
    assert max_lora_rank(rank) == limit
    assert limit is None or limit in VLLM_RANKS


def test_rank_limit_counts_patterns_and_the_file(tmp_path):
    write_case(tmp_path / "adapter", Case(rank=by_name(5, o_proj=70)))
    limits = {v.engine: v.max_rank for v in check_serving(tmp_path / "adapter")}
    assert limits == {"vllm-old": 128, "vllm": 128, "sglang": 70}


@pytest.mark.parametrize(("key", "value"), [("r", None), ("r", 0), ("r", 2.5), ("lora_alpha", "a"),
                                            ("rank_pattern", {"q_proj": -1})])
def test_config_without_sense_is_an_error(tmp_path, key, value):
    write_case(tmp_path / "adapter", Case(config={"r": 8}))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=key):
        check_serving(tmp_path / "adapter")


EXPERTS = {f"experts.{i}.{p}": s for i in range(2) for p, s in {
    "gate_proj": (24, 64), "up_proj": (24, 64), "down_proj": (64, 24)}.items()}
# As `pack_moe` of vLLM 0.33.0 took them, or raised.
EXPERT_CASES = {
    "one rank": ({}, (), "ok"),
    "one rank a projection": ({"gate_proj": 4, "up_proj": 4}, (), "ok"),
    "ranks differ between experts": ({"experts.0": 4}, (), "refuses"),
    "an expert without up_proj": ({}, ("experts.1.up_proj",), "refuses"),
    "no up_proj": ({}, ("experts.0.up_proj", "experts.1.up_proj"), "refuses")}


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_experts_as_vllm_packs_them(case, tmp_path):
    ranks, dropped, expected = EXPERT_CASES[case]
    shapes = {f"model.layers.0.mlp.{m}": s for m, s in EXPERTS.items() if m not in dropped}
    factors = {}
    for module, (out, inside) in shapes.items():
        rank = next((r for part, r in ranks.items() if part in module), 8)
        factors[module] = (torch.ones(rank, inside), torch.ones(out, rank))
    write_adapter(tmp_path, factors, base_name="base", all_modules=shapes)
    assert {v.engine: v.verdict for v in check_serving(tmp_path)}["vllm"] == expected

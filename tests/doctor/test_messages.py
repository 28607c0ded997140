"""What a finding says of the keys behind a difference."""

from extend.doctor import doctor
from tests.doctor.configs import LLAMA3, SIZES, save, scaled
from tests.doctor.diagnoses import error


def test_the_key_of_another_layer_type_is_named(tmp_path):
    config = {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "rope_theta": 1e6,
              "rope_local_base_freq": 2e4, "layer_types": ["sliding_attention", "full_attention"],
              "rope_parameters": {
                  "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                  "full_attention": {"rope_type": "default", "rope_theta": 1e6}}}
    problem = error(doctor(save(tmp_path / "model", config)), "frequencies of sliding_attention")
    assert problem.message == (
        "computes with rope_theta 20000 (rope_local_base_freq) instead of 10000 "
        "(rope_parameters.sliding_attention.rope_theta)")


def test_entries_of_a_type_that_is_dropped_are_not_listed(tmp_path):
    model = save(tmp_path / "model", {**scaled(LLAMA3), "model_type": "qwen2"})
    assert error(doctor(model), "frequencies").message == (
        "computes with rope_type default (rope_type llama3 not carried over to llama.cpp) instead "
        "of llama3 (rope_scaling)")

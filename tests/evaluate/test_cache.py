import pytest
import torch

from extend.evaluate.attention import register_prefill_attention
from extend.evaluate.cache import RoomLayer, make_cache
from tests.ring.tiny_models import make_model


def test_a_layer_holds_what_it_was_given_and_does_not_move_it():
    layer = RoomLayer(10)
    new = torch.randn(2, 3, 10, 4)
    assert layer.get_seq_length() == 0
    places = set()
    for begin, end in ((0, 4), (4, 5), (5, 10)):
        keys, values = layer.update(new[:, :, begin:end], -new[:, :, begin:end])
        assert torch.equal(keys, new[:, :, :end]) and torch.equal(values, -new[:, :, :end])
        places.add(keys.data_ptr())
    assert len(places) == 1 and layer.get_seq_length() == 10
    with pytest.raises(ValueError, match="room for 10 tokens gets token 11"):
        layer.update(new[:, :, :1], new[:, :, :1])


def test_layers_with_a_window_keep_their_own_kind():
    model = make_model("gemma3 window", register_prefill_attention())
    kinds = [type(layer).__name__ for layer in make_cache(model, 50).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "RoomLayer"]

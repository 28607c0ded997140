"""Change data at random, and JSON also by its structure; the same for the same random numbers."""

import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -2**63, 2**64, 10**40, 1.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), "", "0", "nan", "a" * 300, "\x1b[31m", "\u202e", "..", "../x",
    "/etc/passwd", "a\x00b", "(a+)+$", "{{ 7 }}", "<script>", [], {}, [[]], [None], {"": None})
PIECES = (b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"true", b"-", b"1e999", b"NaN",
          b"99999999999999999999", b"\\ud800", b"\\u0000", b"\x00", b"\xff", b"&a ", b"*a", b"<<: ",
          b"!!python/name:os.system ", b"!!timestamp x", b"\n- ", b"? ", b"| ", b"../", b"%", b"\n")


def mutate(data: bytes, chance: random.Random, most: int = 1 << 16) -> bytes:
    """A changed copy of at most `most` bytes."""
    if chance.random() < 0.6:
        tail = data[-2:] if data[:1] == b"{" and not data.rstrip().endswith(b"}") else b""
        try:
            tree = json.loads(data[:len(data) - len(tail)])
        except (ValueError, RecursionError):
            pass
        else:
            for _ in range(chance.randint(1, 3)):
                tree = _change_tree(tree, chance)
            return (json.dumps(tree).encode() + tail)[:most]
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        _change_bytes(changed, chance)
    return bytes(changed[:most])


def _change_tree(tree: Any, chance: random.Random) -> Any:
    """The tree with one place in it changed."""
    if not isinstance(tree, dict | list) or not tree or chance.random() < 0.05:
        return chance.choice(ODD)
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = chance.choice(keys)
    action = chance.random()
    if action < 0.08:
        del tree[key]
    elif action < 0.14:
        if isinstance(tree, dict):
            tree[str(chance.choice(ODD))] = tree[key]
        else:
            tree.append(tree[key])
    elif action < 0.22 and isinstance(tree, dict):
        tree[chance.choice(keys)] = tree[key]
    elif action < 0.5:
        tree[key] = chance.choice(ODD)
    else:
        tree[key] = _change_tree(tree[key], chance)
    return tree


def _change_bytes(data: bytearray, chance: random.Random) -> None:
    place = chance.randint(0, len(data))
    action = chance.random()
    if action < 0.3 and data:
        data[place % len(data)] ^= 1 << chance.randrange(8)
    elif action < 0.55:
        data[place:place] = chance.choice(PIECES)
    elif action < 0.7:
        del data[place:place + chance.randint(1, 16)]
    elif action < 0.85 and data:
        begin = chance.randrange(len(data))
        data[place:place] = data[begin:begin + chance.randint(1, 64)]
    else:
        data[place:place + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\x01" + bytes(7)))

import numpy as np
import pyarrow as pa
import pytest

from rec.hashing import hash_ints, hash_strings

TEXTS = [
    "",
    "query",
    "a",
    "aa",
    "\0",
    "\0\0",
    "Straße",
    "日本語 🛒",
    "e\u0301",
    "\x7f\u0080\uffff",
    "x" * 1000,
    "query",
]


def loop_hash_int(value: int) -> int:
    x = (value + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def loop_hash_bytes(value: bytes) -> int:
    return loop_hash_int(len(value) + sum((byte + 1) * pow(1099511628211, i, 2**64) for i, byte in enumerate(value)))


def loop_hash(value: int | str | bytes | None) -> int:
    if isinstance(value, int):
        return loop_hash_int(value)
    return loop_hash_bytes(value.encode() if isinstance(value, str) else value or b"")


def test_the_hashes_never_change():
    # what a trained table was filled with: another hash makes every model on disk worthless
    known = [16294208416658607535, 10451216379200822465, 16490336266968443936, 13679457532755275413]
    assert hash_ints(np.array([0, 1, -1, 42])).tolist() == known
    assert hash_ints(np.array([2**64 - 1], np.uint64)).tolist() == [known[2]]
    texts = [16294208416658607535, 4824385676517010403, 12338158963074580153, 6124510101005156591]
    assert hash_strings(pa.array(["", "a", "query", "日本語"])).tolist() == texts


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8, np.uint64, np.uint8])
def test_integers_hash_as_one_by_one(dtype: type):
    info, rng = np.iinfo(dtype), np.random.default_rng(0)
    values = rng.integers(info.min, info.max, 500, dtype=dtype, endpoint=True)
    values[:3] = info.min, info.max, 0
    assert hash_ints(values).tolist() == [loop_hash_int(int(value)) for value in values]


def random_texts(num_texts: int) -> list[str | None]:
    rng = np.random.default_rng(1)
    texts: list[str | None] = ["".join(map(chr, rng.integers(32, 0xD7FF, n))) for n in rng.integers(0, 9, num_texts)]
    return [None if i % 7 == 3 else text for i, text in enumerate(TEXTS + texts)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()], ids=str)
def test_strings_hash_as_one_by_one(kind: pa.DataType):
    texts = random_texts(300)
    array = pa.array(texts, pa.string()).cast(kind)
    for low, high in ((0, len(texts)), (5, 200), (1, 2), (250, 250), (len(texts), len(texts))):
        expected = [loop_hash(text) for text in texts[low:high]]
        assert hash_strings(array.slice(low, high - low)).tolist() == expected


def test_bytes_behind_a_null_do_not_count():
    full = pa.array(["query", "listing"])
    hidden = pa.Array.from_buffers(pa.string(), 2, [pa.py_buffer(b"\x02"), *full.buffers()[1:]])  # the first is null
    assert hidden.to_pylist() == [None, "listing"]
    assert hash_strings(hidden).tolist() == [loop_hash(None), loop_hash("listing")]

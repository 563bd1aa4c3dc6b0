"""ArrayRecord files by ranges of bytes, against the library's own reader."""

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from sprint_jax.data.ranged_records import NotReadable, RangedRecords

BLOCK = 1 << 16


def write(path, sizes, options="group_size:1,uncompressed", seed=0):
    rng = np.random.default_rng(seed)
    writer = ArrayRecordWriter(str(path), options)
    for size in sizes:
        writer.write(rng.bytes(size))
    writer.close()
    return path


def test_records_equal_the_librarys_wherever_blocks_cut_them(tmp_path):
    # Chunk headers and data that end at, just before and just after each place where a block begins.
    near = [BLOCK - 24 - 40 - 40 - 3 - k for k in range(-45, 45, 3)]
    sizes = [[0, 1, 127, 128, 300_000, 3], near, [70_000] * 5]
    files = [write(tmp_path / f"{i}.array_record", each, seed=i) for i, each in enumerate(sizes)]
    expected = ArrayRecordDataSource([str(file) for file in files])
    for counts in (None, [len(each) for each in sizes]):
        found = RangedRecords(files, counts)
        assert len(found) == len(expected)
        order = np.random.default_rng(0).permutation(len(found)).tolist()
        assert found.__getitems__(order) == expected.__getitems__(order)
        assert found[len(found) - 1] == expected[len(found) - 1]


def test_several_records_in_a_chunk(tmp_path):
    file = write(tmp_path / "a.array_record", range(50), "group_size:8,uncompressed")
    expected = ArrayRecordDataSource([str(file)])
    assert RangedRecords([file]).__getitems__(range(50)) == expected.__getitems__(range(50))


def test_compressed_and_damaged_files_are_named(tmp_path):
    file = write(tmp_path / "z.array_record", [1000] * 3, "group_size:1,zstd")
    with pytest.raises(NotReadable, match=r"z\.array_record is compressed"):
        RangedRecords([file])[0]
    whole = write(tmp_path / "w.array_record", [1000] * 3).read_bytes()
    for name, content in {
        "short": whole[:-100],
        "block": whole[:-BLOCK],
        "end": whole[:-BLOCK] + bytes(BLOCK),
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NotReadable, match=name):
            RangedRecords([tmp_path / name])

"""data/buckets against diffusers: its tables, and its choice of the nearest size."""

import numpy as np
import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from diffusers.pipelines.sana import pipeline_sana

from sprint_jax.core.pixels import nearest_size
from sprint_jax.data.buckets import size_table

TABLES = {
    256: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
    512: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
    1024: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
    2048: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
    4096: pipeline_sana.ASPECT_RATIO_4096_BIN,
}


@pytest.mark.parametrize("resolution", TABLES)
def test_sizes_and_the_nearest_one_are_those_of_diffusers(resolution):
    table, theirs = size_table(resolution), TABLES[resolution]
    assert [tuple(map(int, size)) for size in theirs.values()] == list(table)
    assert [float(ratio) for ratio in theirs] == [round(h / w, 2) for h, w in table]
    random = np.random.default_rng(0)
    for height, width in random.integers(1, 5000, (500, 2)).tolist():
        expected = PixArtImageProcessor.classify_height_width_bin(height, width, theirs)
        assert nearest_size(height, width, table) == expected

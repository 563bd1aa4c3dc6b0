"""The benchmark beside diffusers, at a size that says nothing about speed."""

import json
import runpy

import pytest
from helpers.runs import ROOT
from helpers.tiny_pipeline import PROMPTS

from sprint_jax import benchmark
from sprint_jax.benchmarking import measure, random_folder, workloads
from sprint_jax.benchmarking.random_folder import write_random_pipeline
from sprint_jax.core.errors import UserError
from sprint_jax.encoders.text import INSTRUCTION

SMALL = workloads.STUDENTS["tiny"] | dict(num_layers=2, num_attention_heads=2, caption_channels=16)
SMALL |= dict(num_cross_attention_heads=2, cross_attention_head_dim=32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(workloads.STUDENTS, "tiny", SMALL)


def test_train_times_both_and_compares_what_they_return(tmp_path):
    out = tmp_path / "out.jsonl"
    words = ["train", "--against=diffusers", "--image=64x96", "--batch=2", "--rounds=2"]
    benchmark.main([*words, "--no-compile", f"--out={out}"])
    _, *lines = map(json.loads, out.read_text().splitlines())
    assert [line["workload"] for line in lines] == list(workloads.NETWORK)
    for line in lines:
        assert line["rounds"] + line["dropped"] == 2
        assert set(line["cold_s"]) == {"sprint_jax", "diffusers"}
        # float32 sums in two orders; observed at most 4e-6.
        assert line["relative_error"]["diffusers"] < 5e-5


def test_parity_times_nothing_and_a_difference_is_refused(capsys, monkeypatch):
    benchmark.main(["parity", "--against=diffusers", "--image=64x64", "--only=jvp"])
    _, line = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(line["relative_error"]) == {"diffusers"} and "ms" not in line
    monkeypatch.setitem(measure.TOLERANCE, "float32", 1e-12)
    with pytest.raises(UserError, match=r"forward .*diffusers"):
        benchmark.main(["train", "--against=diffusers", "--image=64x64", "--only=forward"])


@pytest.mark.slow
def test_sample_times_parts_and_whole_pipelines(tmp_path):
    out = tmp_path / "out.jsonl"
    words = ["sample", "--against=diffusers", "--rounds=1", "--no-compile", f"--out={out}"]
    benchmark.main([*words, "--image=32x32", "--batch=1"])
    _, *lines = map(json.loads, out.read_text().splitlines())
    compared = [set(line["relative_error"]) for line in lines]
    assert compared == [{"diffusers"}, {"diffusers", "diffusers channels last"}]
    assert max(error for line in lines for error in line["relative_error"].values()) < 5e-5
    out.unlink()
    folder, texts = tmp_path / "pipeline", [INSTRUCTION, *PROMPTS]
    parts = dict(autoencoder=random_folder.TINY_AUTOENCODER, gemma=random_folder.TINY_GEMMA)
    write_random_pipeline(folder, random_folder.TINY_FIELDS, texts, dtype="float32", **parts)
    # What is compiled beforehand on a GPU.
    script = runpy.run_path(str(ROOT / "benchmarks" / "gpu_parts.py"))
    kept = tmp_path / "torch.jsonl"
    script["main"](["torch", "--tiny", f"--folder={folder}", "--image=32x64", f"--out={kept}"])
    _, *lines = map(json.loads, kept.read_text().splitlines())
    assert [line["torch"] for line in lines] == ["transformer", "decoder", "whole"]
    words.append("--parts=transformer,decoder,text,whole")
    benchmark.main([*words, f"--model={folder}", "--image=32x64", "--batch=2", "--steps=1"])
    _, *lines = map(json.loads, out.read_text().splitlines())
    names = ["transformer", "decoder", "text", "whole, 1 steps"]
    assert [line["workload"] for line in lines] == names
    assert all("diffusers" in line["cold_s"] for line in lines)

"""tests/bench: the benchmarks run, in their small form. What they measure is no test."""

import json

import pytest
from conftest import fork_stage


@pytest.mark.parametrize("name, flags, figures", [
    ("bench_infer", ["--linear"], ["ms_per_user", "peak_mb"]),
    ("bench_infer", ["--million"], ["million_kept_mb", "million_peak_mb"]),
    ("bench_ctr", [], ["ours_samples_per_s", "bare_loop_samples_per_s", "dataloader_samples_per_s"]),
    ("bench_serving", [], ["dcn_ms", "dcn_ids_ms", "dcn_text_ms", "folded_dcn_ids_ms"])])
def test_a_benchmark_runs_and_ends_with_one_json_object(name, flags, figures):
    process = fork_stage(f"tests/bench/{name}.py", "--quick", *flags)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert set(figures) <= set(found), f"{name} lacks a figure"

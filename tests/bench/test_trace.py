"""Kernels of a GPU by kind, beside the model: what can be held without one."""

import pytest
from bench_cases import committed

from bench import trace
from bench.roofline import call_operations, counted

KERNELS = [  # names as an H200's driver records them, and microseconds
    ("_group_norm_forward_kernel", 10.0),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x64", 100.0),
    ("sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", 30.0),
    ("nvjet_sm90_tst_128x64_64x8_1x2_h_bz_TNT", 2.0),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", 5.0),
    ("triton_poi_fused_add_convolution_expand_22", 3.0),
    ("Memcpy DtoD (Device -> Device)", 1.0),
    ("_adam_update_kernel", 9.0),
    ("_affine_forward_kernel", 4.0),
    ("_affine_forward_kernel", 4.0),
]


def test_kernels_are_of_the_kinds_of_the_model():
    kinds = trace.by_kind(KERNELS)
    assert {kind: (row["launches"], row["ms"]) for kind, row in kinds.items()} == {
        trace.PRODUCTS: (3, pytest.approx(0.132)),
        "normalisation, SiLU": (1, 0.01),
        "attention": (1, 0.005),
        trace.ELEMENTWISE: (2, 0.004),
        trace.OPTIMIZER: (1, 0.009),
        "the method's own": (2, 0.008),
    }
    assert trace.longest(KERNELS)[2] == ["_group_norm_forward_kernel", 1, 0.01]
    assert trace.longest(KERNELS)[4] == ["_affine_forward_kernel", 2, 0.008]


def test_what_is_measured_stands_beside_the_model_the_longest_first():
    operations = call_operations(counted("cifar10", 1), 1)
    rows = trace.compared(KERNELS, 1e-3, operations)
    assert sum(row["ms"] for row in rows) == pytest.approx(1.0)  # with the gaps between kernels
    assert sum(row["model_launches"] for row in rows) == sum(each.launches for each in operations)
    gaps = [row["gap"] for row in rows]
    assert gaps == sorted(gaps, reverse=True) and rows[0]["kind"] == trace.GAPS
    assert {row["kind"] for row in rows} == {trace.GAPS, *trace.KERNELS}


def test_the_committed_trace_adds_up():
    rows = committed("trace_h200")
    parts = ("sampling", "rollout", "student", "score_net")
    assert [row["case"] for row in rows] == [f"{part}, {batch}" for batch in trace.BATCHES for part in parts]
    for row in rows:
        assert sum(kind["ms"] for kind in row["kinds"]) == pytest.approx(1e3 * row["seconds"])


def test_without_a_gpu_it_says_what_to_use(capsys):
    with pytest.raises(SystemExit) as stop:
        trace.main([])
    assert stop.value.code == 2 and "it needs a GPU" in capsys.readouterr().err

"""What the benchmarks share counts, orders and writes what it says."""

import dataclasses
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from bench_cases import TINY

from bench import measure
from bench.measure import Row, read_records, use_modes_of, use_torch_defaults, write_rows
from bench.tables import Column, filled, markdown_table, table_names, text_table
from bench.train_step import bench_config, small_teacher
from hsivi_fast import ops
from hsivi_fast.build import build_context
from hsivi_fast.execution import Execution
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.training import telemetry


def test_bytes_are_those_that_operators_read_and_write():
    x = torch.zeros(10, 100)
    assert measure.counted_bytes(lambda: x + x) == 3 * 4000
    assert measure.counted_bytes(lambda: x.reshape(100, 10).transpose(0, 1)[3:]) == 0
    assert measure.counted_bytes(lambda: x.sum(1)) == 4000 + 40


def test_calls_and_memory_are_counted():
    network = small_teacher(TINY, torch.device("cpu"))
    x, t = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    assert measure.counted_calls(lambda: [network(x, t) for _ in range(3)]) == 3
    assert measure.counted_calls(lambda: x + x) == 0

    def function():
        first = torch.empty(1_000_000)  # 4 MB, and another 4 beside it, and 2 after them
        second = first + 1
        del first, second
        return torch.empty(500_000)

    calls = []
    functions = [function, lambda: calls.append(1)]
    assert measure.warmed_up(functions, 3, torch.device("cpu")) == pytest.approx(8e6, rel=0.01) and len(calls) == 4


class FakeCuda:
    """What is asked of torch.cuda around the calls of a side whose recorded graph keeps 5 MB for itself."""

    def __init__(self, monkeypatch):
        self.reserved = self.most = 2_000_000
        for name, function in {
            "synchronize": lambda device: None,
            "empty_cache": lambda: None,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_reserved": lambda device: self.most,
            "reset_peak_memory_stats": lambda device: setattr(self, "most", self.reserved),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def take(self, size):
        self.reserved += size
        self.most = max(self.most, self.reserved)


def test_memory_of_a_recorded_graph_is_seen(monkeypatch):
    """Its blocks are free to nobody else, and no count of tensors has them."""
    cuda, calls = FakeCuda(monkeypatch), []

    def recorded_at_the_fourth():
        calls.append(1)
        if len(calls) == 4:
            cuda.take(5_000_000)

    assert measure.warmed_up([recorded_at_the_fourth], 4, SimpleNamespace(type="cuda")) == 5_000_000


def test_on_a_gpu_a_side_s_turn_begins_with_a_call_that_is_not_timed(monkeypatch):
    """The published update before it has emptied the allocator's cache."""
    FakeCuda(monkeypatch)
    calls = []
    sides = {"ours": (lambda: calls.append("o"), 2), "published": (lambda: calls.append("p"), 1)}
    seconds = measure.timed_rounds(sides, SimpleNamespace(type="cuda"), 2)
    assert "".join(calls) == "ooopp" * 2 and [len(values) for values in seconds.values()] == [4, 2]
    calls.clear()
    measure.timed_rounds(sides, torch.device("cpu"), 1)
    assert "".join(calls) == "oop"


def test_attention_is_counted_whichever_kernel_runs_it():
    # [B, heads, N, d]; contiguous it is one kernel, transposed it is products.
    tensors = [torch.randn(2, 1, 16, 8, requires_grad=True) for _ in range(3)]
    laid_out = [tensor.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for tensor in tensors]
    forward = 2 * 2 * 2 * 16 * 16 * 8
    for q, k, v in (tensors, laid_out):

        def attention(q=q, k=k, v=v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        def with_gradients(q=q, k=k, v=v, attention=attention):
            return torch.autograd.grad(attention().sum(), (q, k, v))

        assert measure.counted_flops(attention) == forward
        assert measure.counted_flops(with_gradients) >= 3 * forward


def test_sides_are_timed_in_turn_and_each_goes_first():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    medians = measure.interleaved(sides, torch.device("cpu"), rounds=3)
    assert medians.keys() == sides.keys() and "".join(calls[9:]) == "bcacababc"


def test_a_side_gets_the_modes_of_its_context_back():
    def modes():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    context = build_context(bench_config(TINY, 3), ALONE)
    built = modes()
    use_torch_defaults()
    assert modes() != built
    use_modes_of(context)
    assert modes() == built
    measure.use_full_float32()
    assert modes() == ("highest", False) and ops._chosen == "torch"  # what others are checked against


def test_rates_are_shares_of_what_is_measured_in_the_same_process(monkeypatch):
    context = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(precision="fp32"))
    monkeypatch.setattr(measure, "product_rate", lambda device, precision: 1e9)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 4e9)
    rates = measure.rates(3e9, 2e9, 6.0, context)
    assert rates["utilisation"] == 0.5 and rates["share_of_copy"] == pytest.approx(1 / 12) and rates["clocks"] is None
    assert (rates["ours_bytes"], rates["copy_bytes_per_second"], rates["product_flops_per_second"]) == (2e9, 4e9, 1e9)


def test_energy_is_the_driver_s_counter(monkeypatch):
    counter = iter((5_000_000, 5_000_500, 5_012_345))
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        NVMLError=RuntimeError,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    meter = telemetry.EnergyMeter(torch.device("cuda", 0))
    assert meter.handle == "GPU-abc"
    assert meter.joules() == pytest.approx(0.5) and meter.joules() == pytest.approx(12.345)
    assert telemetry.EnergyMeter(torch.device("cpu")).joules() is None

    def broken():
        raise RuntimeError("no driver")

    fake.nvmlInit = broken
    assert telemetry.EnergyMeter(torch.device("cuda", 0)).joules() is None


def test_a_cpu_is_named_with_its_threads_and_what_it_has_for_bfloat16(monkeypatch):
    monkeypatch.setattr(measure, "_cpu_name", lambda: "a CPU")
    monkeypatch.setattr(measure, "cpu_bfloat16_flags", lambda: ["avx512_bf16"])
    cpu = torch.device("cpu")
    assert measure.describe(cpu, threads=1)["device"] == "a CPU, 1 thread, avx512_bf16"
    monkeypatch.setattr(measure, "cpu_bfloat16_flags", list)
    assert measure.describe(cpu, threads=2)["device"] == "a CPU, 2 threads"
    assert measure.describe(cpu).keys() == {"commit", "device", "versions"}


def test_a_package_that_is_a_plain_folder_has_no_version(monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    versions = measure.describe(torch.device("cpu"))["versions"]
    assert versions.pop("python") and versions == {"torch": None, "triton": None, "hsivi_fast": None}


FACTS = {"commit": "abc", "device": "a CPU", "versions": {"torch": "2"}}
TIMED = Row("one", ours=2.0, published=6.0, ratio=3.0, unit="s", extras={"batch": 4}, **FACTS)


def test_a_row_is_one_flat_record_of_what_it_has():
    assert TIMED.record() == {
        "case": "one",
        "ours": 2.0,
        "published": 6.0,
        "ratio": 3.0,
        "unit": "s",
        "counted_ratio": None,
        "batch": 4,
        **FACTS,
    }
    assert Row("two", failed="off", extras={"batch": 4}, **FACTS).record() == {"case": "two", "failed": "off", **FACTS}
    assert Row("three", extras={"shares": {}}, **FACTS).record() == {"case": "three", "shares": {}, **FACTS}


def test_rows_are_written_and_read_as_one_object_a_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_rows(file, [TIMED, TIMED])
    assert read_records(file) == [TIMED.record()] * 2 and len(file.read_text().splitlines()) == 2


def test_every_case_is_written_as_soon_as_it_is_there(tmp_path):
    file, seen = tmp_path / "rows.jsonl", []

    def measure_case(name):
        seen.append(file.read_text().count("\n") if file.exists() else 0)
        return TIMED

    assert measure.run_cases("abc", measure_case, file, FACTS, "") == [TIMED] * 3 and seen == [0, 1, 2]


def test_a_case_that_fails_is_a_row_and_ends_no_other(tmp_path, capsys):
    faults = {
        "check": AssertionError("off by 3"),
        "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79 GiB"),
        "compiler": RuntimeError("PTXAS error:\nInternal"),
    }

    def measure_case(name):
        if name in faults:
            raise faults[name]
        return TIMED

    file = tmp_path / "rows.jsonl"
    rows = measure.run_cases([*faults, "good"], measure_case, file, FACTS, "--batch 512; use a smaller")
    assert [row.failed for row in rows] == [
        "off by 3",
        "out of memory (for 20.00 GiB more); --batch 512; use a smaller",
        "RuntimeError: PTXAS error: Internal",
        None,
    ]
    assert read_records(file)[1] == {"case": "memory", "failed": rows[1].failed, **FACTS}
    assert "Traceback" in capsys.readouterr().err  # of the compiler, which a line does not explain
    with pytest.raises(ValueError, match="needs a CUDA device"):  # what was asked for cannot be
        measure.run_cases("a", lambda name: Execution("cpu", cuda_graphs=True), None, FACTS, "")


def test_the_row_that_compares_like_with_like_is_named(capsys):
    """On a GPU PyTorch's own float32 has TF32 in convolutions, and so has the published side there."""
    rows = [dataclasses.replace(TIMED, case=f"cycle_{mode}") for mode in ("bf16", "fp32", "tf32_redraw4")]
    for kind, case in (("cpu", "cycle_fp32"), ("cuda", "cycle_tf32_redraw4")):
        measure.print_headline(rows, SimpleNamespace(type=kind))
        mode = case.split("_")[1]
        assert capsys.readouterr().out == f"like with like, {mode} on both sides: {case}, x3.00\n"


def test_a_failed_row_is_named_and_is_the_exit_code(capsys):
    failed = Row("two", failed="off by 3", **FACTS)
    columns = [Column("case", "{case}"), Column("ratio", "{ratio:.1f}")]
    assert measure.print_rows([TIMED], columns) == 0
    assert measure.print_rows([TIMED, failed], columns) == 1
    assert "two: NOT TIMED, its check failed: off by 3" in capsys.readouterr().out


COLUMNS = [
    Column("name", "`{name}`"),
    Column("range", "{range[0]:.1f} to {range[1]:.1f}"),
    Column("more", lambda row: row["more"] + 1, needs="more"),
]
ROWS = [{"name": "a", "range": (1, 2), "more": 1}, {"name": "long", "range": (1, 22), "more": None}]


def test_columns_are_templates_functions_or_dashes():
    assert markdown_table(ROWS, COLUMNS).splitlines() == [
        "| name | range | more |",
        "| --- | --- | --- |",
        "| `a` | 1.0 to 2.0 | 2 |",
        "| `long` | 1.0 to 22.0 | - |",
    ]
    assert text_table(ROWS, COLUMNS).splitlines() == [
        "name          range  more",
        "`a`      1.0 to 2.0     2",
        "`long`  1.0 to 22.0     -",
    ]


def test_tables_are_filled_between_their_markers_alone():
    document = "a\n<!-- table one -->\n<!-- end -->\nb\n<!-- table two -->\nold\n<!-- end -->\nc\n"
    new = filled(document, lambda name: f"| {name} |\n")
    assert table_names(document) == ["one", "two"]
    wanted = "<!-- table one -->\n| one |\n<!-- end -->\nb\n<!-- table two -->\n| two |\n<!-- end -->"
    assert new == f"a\n{wanted}\nc\n"
    assert filled(new, lambda name: f"| {name} |\n") == new

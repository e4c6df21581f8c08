"""What the compiler makes of every kernel, without a GPU: registers, spills, stack, memory, accesses, instructions.

    python -m bench.aot                              the whole matrix, a table on the terminal
    python -m bench.aot --json bench/results/aot.jsonl --summary bench/results/aot.md
    python -m bench.aot --subset                     what the tests check
    python -m bench.aot --subset --known bench/results/aot_subset.jsonl       the same, where it is not known yet
    python -m bench.aot --sass FILE                  the subset's machine code: written to FILE, or compared with it

The launchers run on tensors without memory, their launches are recorded instead of executed, and each distinct one is
compiled for sm_80, sm_90 and sm_100. Exit code 1 if any kernel spills, has a stack, or accesses memory in narrower
pieces than it should, and with --sass if any machine code differs.

A row has the `inputs` of its compilation: a hash of the kernel's source with all that it calls, of the launch, of the
options and of the compiler's version. With --known a kernel whose inputs are in that file is not compiled again, except
for one of every name: exit code 1 if its figures are not the known ones.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # started by its path: `bench` is found from the root of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import sm_arch_from_capability
from triton.compiler import ASTSource

from bench.shapes import PAPER, network_norms
from hsivi_fast.kernels import adam_step, noise_scale, philox, score_losses
from hsivi_fast.kernels import affine_noise_step as step
from hsivi_fast.kernels import group_norm_silu as norm
from hsivi_fast.nets import NETWORKS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVENTS = {"cifar10": (3, 32, 32), "celeba64": (3, 64, 64), "digits": (1, 8, 8), "odd": (3, 17, 5)}
MEMORY_FORMATS = {"row-major": torch.contiguous_format, "channels_last": torch.channels_last}
LAYERS = 10
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


# ---- what is launched ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded_launches():
    """Inside, kernels are not run. The list that it yields receives (kernel, {argument: value}, options) a launch."""
    launches = []
    run = triton.runtime.jit.JITFunction.run

    def record(kernel, *arguments, grid, warmup, **keywords):
        options = {name: keywords.pop(name) for name in ("num_warps", "maxnreg") if name in keywords}
        launches.append((kernel, {**dict(zip(kernel.arg_names, arguments)), **keywords}, options))

    triton.runtime.jit.JITFunction.run = record
    try:
        yield launches
    finally:
        triton.runtime.jit.JITFunction.run = run


def _empty(*shape, dtype=torch.float32):
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def method_cases(full):
    """Of the four method kernels and the draw: (case, tensor bytes an element, are 16-byte accesses due, launch)."""
    gammas = {"[1]": (1, 1), "[K]": (LAYERS, 1), "[event]": (1, None), "[K, event]": (LAYERS, None)}
    for event_name, event in EVENTS.items() if full else [("cifar10", EVENTS["cifar10"]), ("odd", EVENTS["odd"])]:
        size = torch.Size(event).numel()
        for dtype_name, dtype in DTYPES.items() if full else [("fp32", torch.float32), ("bf16", torch.bfloat16)]:
            for layout in ("row-major", "channels_last"):
                if layout == "channels_last" and (event[0] == 1 or not full and event_name == "odd"):
                    continue
                for gamma_name, (rows, columns) in gammas.items():
                    if not full and event_name == "odd" and gamma_name != "[event]":
                        continue
                    if not full and layout == "channels_last" and columns == 1:
                        continue
                    batch = 16
                    x = _empty(batch, *event, dtype=dtype)
                    e = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
                    table, log_gamma = _empty(LAYERS + 1), _empty(rows, columns or size)
                    seeds, stream = _empty(batch, dtype=torch.int64), _empty(batch, dtype=torch.int64)
                    address = (log_gamma, seeds, stream, None, None)
                    width, due = x.element_size(), size % 16 == 0 and layout == "row-major"
                    case = {"event": event_name, "dtype": dtype_name, "layout": layout, "log_gamma": gamma_name}
                    yield case, 3 * width, due, lambda: step.affine_noise_step(x, e, table, table, table, *address)
                    yield case, 2 * width, due, lambda: step.affine_noise_step_backward(x, e, table, table, *address)
                    yield case, 2 * width, due, lambda: score_losses.denoising_loss_and_grads(e, table, table, *address)
                    yield case, 4 * width, due, lambda: score_losses.fisher_loss_and_grads(e, e, table, table, *address)
                    if (event_name, layout, gamma_name) == ("cifar10", "row-major", "[event]"):
                        # All other alphas than 1/2 are one kernel.
                        case = {**case, "log_gamma": "[event] alpha"}
                        yield (
                            case,
                            4 * width,
                            due,
                            lambda: score_losses.fisher_loss_and_grads(e, e, table, table, *address, alpha=1.2),
                        )
                if layout == "row-major" and dtype_name == "fp32":
                    case = {"event": event_name, "dtype": dtype_name, "layout": layout, "log_gamma": "-"}
                    yield case, 4, size % 16 == 0, lambda: philox.draw_noise(seeds, stream, None, event)
                if layout == "row-major":
                    case = {"event": event_name, "dtype": dtype_name, "layout": layout, "log_gamma": "none"}
                    yield (
                        case,
                        3 * width,
                        size % 16 == 0,
                        lambda: step.affine_noise_step(x, x, table, table, None, None, None, stream, None, None),
                    )


def norm_cases(full):
    """(case, None, False, launch) of group normalisation at every shape of the networks.

    Where the input is in parts there are so many that they are of the paper's networks alone, in the types that
    networks compute in.
    """
    alone = [use for use in network_norms(NETWORKS) if not use.joined]
    norms = alone + [use for use in network_norms(PAPER) if use.joined]
    for use in norms if full else filter(_is_in_subset, norms):
        of_all = ("fp32", "bf16") if use.joined else DTYPES
        for dtype_name in of_all if full else [SUBSET_NORMS[use.channels, use.size]]:
            for layout, memory_format in MEMORY_FORMATS.items():
                case = {
                    "event": f"{use.size}x{use.size}x{use.channels}/{use.groups}",
                    "dtype": dtype_name,
                    "layout": layout,
                    "log_gamma": variant_of(use),
                }
                launches = (joined_launches if use.joined else norm_launches)(use, DTYPES[dtype_name], memory_format)
                yield from ((case, None, False, launch) for launch in launches)


def variant_of(use):
    """What a use of group normalisation has, in words."""
    said = {
        "silu": use.silu,
        "modulated": use.modulated,
        "added": use.added,
        "residual": use.residual,
        "scaled": use.factor != 1,
        f"beside {use.beside}": use.beside,
    }
    return " ".join(word for word, has in said.items() if has) or "plain"


def _empty_images(size, dtype, memory_format, channels):
    return _empty(16, channels, size, size, dtype=dtype).to(memory_format=memory_format)


def norm_launches(use, dtype, memory_format):
    """Forward and backward of one use; with and without the gradient of what is added."""
    of = functools.partial(_empty_images, use.size, dtype, memory_format)
    x, vector, rows = of(use.channels), _empty(use.channels, dtype=dtype), _empty(16, 2 * use.channels, dtype=dtype)
    scale, shift = rows.chunk(2, dim=1) if use.modulated else (None, None)
    add = _empty(16, use.channels, dtype=dtype) if use.added else None
    given, statistics = (use.groups, vector, vector), _empty(16, use.groups)
    yield lambda: norm.group_norm_silu(x, *given, 1e-5, use.silu, scale, shift, add)
    for with_dadd in (True, False)[: 1 + use.added]:
        yield lambda: norm.group_norm_silu_backward(
            x, x, *given, use.silu, scale, shift, add, statistics, statistics, with_dadd
        )


def joined_launches(use, dtype, memory_format):
    """The same of a use whose input is in parts."""
    of = functools.partial(_empty_images, use.size, dtype, memory_format)
    whole, vector, own = of(use.channels), _empty(use.channels, dtype=dtype), use.channels - use.beside
    x, beside = of(own), of(use.beside) if use.beside else None
    add, residual = _empty(16, own, dtype=dtype) if use.added else None, x if use.residual else None
    given, statistics = (use.groups, vector, vector), _empty(16, use.groups)
    yield lambda: norm.joined_group_norm_silu(x, *given, 1e-5, use.silu, add, residual, use.factor, beside)
    for with_dadd in (True, False)[not use.added :]:
        yield lambda: norm.joined_group_norm_silu_backward(
            whole, whole, whole, own, *given, use.silu, use.factor, statistics, statistics, with_dadd
        )


def optimizer_cases():
    """(case, tensor bytes an element, are 16-byte accesses due, launch) of the optimizer step of any network."""
    tensors = [_empty(adam_step.BLOCK)]
    table, _ = adam_step.adam_table(*[tensors] * 5, [1.0])
    for aligned in (True, False):
        case = {"event": "-", "dtype": "fp32", "layout": "row-major", "log_gamma": "-" if aligned else "misaligned"}
        yield (
            case,
            11 * 4,
            aligned,
            lambda: adam_step.adam_step(tensors, tensors, _empty(()), _empty(3), table, aligned, 1.0, 0.9, 0.999, 1e-8),
        )


def integer_cases():
    """The same of the integers by address: 64 bits each and below a limit, and of seeds."""
    seeds = _empty(4096, dtype=torch.int64)
    for variant, launch in (
        ("64 bits", lambda: philox.integers(3, 5, 7, 4096, "meta")),
        ("below a limit", lambda: philox.integers(3, 5, 7, 4096, "meta", 10)),
        ("of seeds", lambda: philox.integers_of_seeds(seeds, 2**32 - 1, 10)),
    ):
        case = {"event": "-", "dtype": "int64", "layout": "row-major", "log_gamma": variant}
        yield case, 16 if variant == "of seeds" else 8, True, launch


# One of each kind: one pass and split, each number of channels a group that is or is not a power of two, the largest,
# and what needs the most registers.
SUBSET_NORMS = {
    (128, 32): "bf16",
    (256, 16): "bf16",
    (512, 8): "bf16",
    (384, 64): "bf16",
    (640, 32): "bf16",
    (896, 8): "bf16",
    (384, 32): "fp32",
}


def _is_in_subset(use):
    """Of those whose input is in parts it has the ones with a sum beside other channels, and one with a sum alone."""
    is_full = use.residual and (use.beside > 0 or use.size == 16)
    return (use.channels, use.size) in SUBSET_NORMS and (is_full or not use.joined)


# ---- compilation -----------------------------------------------------------------------------------------------------


def source_of(kernel, arguments):
    """The ASTSource of one launch, specialised as the runtime does.

    None, constexprs and the integer 1 are constants. Multiples of 16 are marked.
    """
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1 and name not in unspecialised
        if isinstance(value, tuple):  # of addresses, which are odd: tensors without memory have none
            signature[name] = ("i64",) * len(value)
        elif name in constants or value is None or is_one:
            signature[name], constexprs[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = TRITON_TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and name not in unspecialised:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def launch_key(kernel, arguments, options):
    """What tells one compilation from another. Triton's own key of a kernel has the source of what it calls."""
    source = source_of(kernel, arguments)
    specialised = map(str, (source.signature, source.constants, source.attrs, options))
    return kernel.fn.__module__, kernel.fn.__name__, kernel.cache_key, *specialised


def machine_code_hash(code):
    """sha256 of the encodings in what `nvdisasm -hex` prints: without addresses, names of functions and files."""
    return hashlib.sha256("\n".join(re.findall(r"/\* 0x[0-9a-f]+ \*/", code)).encode()).hexdigest()


def measure(source, options, architecture):
    """Figures of one compiled kernel: registers, stack, spills, shared bytes, instructions, accesses, and its hash."""
    code, resources = compile_kernel(source, options, architecture)
    return {**resources, **count_instructions(disassemble([code], architecture)[0])}


def compile_kernel(source, options, architecture):
    """(machine code, its registers, bytes of stack and of shared memory)."""
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _printed("cuobjdump", "-res-usage", file.name)
    return machine_code_of(compiled.asm["cubin"]), {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
    }


def machine_code_of(cubin):
    """The bytes of the one function in a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    # Of each section: name, type, flags, address, where it begins, its size, ...
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * index) for index in range(count)]
    (code,) = (
        cubin[section[4] : section[4] + section[5]]
        for section in sections
        if cubin.startswith(b".text.", sections[names][4] + section[0])
    )
    return code


def disassemble(codes, architecture):
    """What nvdisasm prints of each kernel. They go in as one: its start takes longer than a hundred kernels."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        name = sm_arch_from_capability(architecture).replace("sm_", "SM")
        printed = _printed("nvdisasm", "--binary", name, "-hex", "-novliw", file.name)
    lines = [line for line in printed.splitlines() if line.endswith("*/")]
    # Two lines an instruction of 16 bytes.
    assert 8 * len(lines) == sum(map(len, codes)), "nvdisasm did not print two lines for each 16 bytes"
    ends = list(itertools.accumulate(len(code) // 8 for code in codes))
    return ["\n".join(lines[first:end]) for first, end in zip([0, *ends], ends)]


def count_instructions(code):
    """Figures of what nvdisasm prints of one kernel: instructions, accesses, and its hash."""
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    # What stands behind the final branch to itself is padding.
    instructions = [name for name in instructions if name != "NOP"]
    accesses = [name for name in instructions if name.split(".")[0] in ("LDG", "STG")]
    return {
        "local": sum(name.split(".")[0] in ("LDL", "STL") for name in instructions),
        "instructions": len(instructions),
        "wide_accesses": sum("128" in name for name in accesses),
        "accesses": len(accesses),
        "sass": machine_code_hash(code),
    }


def _printed(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _compile_in_process(arguments):
    index, architecture = arguments
    torch.set_num_threads(1)
    kernel, values, options = WORK[index]["launch"]
    return compile_kernel(source_of(kernel, values), options, architecture)


WORK = []


def name_of(function):
    """A kernel's file and its own name, without the words that both begin with: "group_norm_silu_split_forward"."""
    file = function.__module__.rpartition(".")[2].split("_")
    own = function.__name__.strip("_").removesuffix("_kernel").split("_")
    same = next(index for index, (one, other) in enumerate(zip([*file, None], own)) if one != other)
    return "_".join([*file, *own[same:]])


def collect(full):
    """The distinct launches of all cases: dicts of case, kernel, launch, bytes an element, are wide accesses due."""
    seen, work = set(), []
    with recorded_launches() as launches:
        for case, moved, due, launch in itertools.chain(
            method_cases(full), norm_cases(full), optimizer_cases(), integer_cases()
        ):
            launches.clear()
            launch()
            for kernel, values, options in launches:
                key = launch_key(kernel, values, options)
                if key in seen:
                    continue
                seen.add(key)
                name = name_of(kernel.fn)
                helps = kernel in (noise_scale._sum_groups_kernel, adam_step._write_addresses_kernel)
                work.append(
                    {
                        "case": case,
                        "kernel": name,
                        "launch": (kernel, values, options),
                        "moved": None if helps else moved,
                        "due": due and not helps,
                    }
                )
    return work


def inputs_of(item, architecture):
    """A hash of all that a compilation depends on."""
    inputs = (triton.__version__, architecture, *launch_key(*item["launch"]))
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def row_of(item, architecture, figures):
    """One line of the table, with its verdict."""
    kernel, values, options = item["launch"]
    warps = options["num_warps"]
    if "BLOCK" in values:
        tile = values["BLOCK"] * values.get("GROUPS", 1)
    elif "COUNT" in values:
        tile = values["COUNT"]
    else:
        tile = values["PIXEL_TILE"] * values["GROUPS_HERE"] * values["CHANNEL_TILE"]
    row = {
        "kernel": item["kernel"],
        **item["case"],
        "sm": architecture,
        "due": item["due"],
        "tile": tile,
        "warps": warps,
        **figures,
        "instructions_per_element": round(figures["instructions"] * 32 * warps / tile, 1),
    }
    problems = []
    if figures["stack"] or figures["local"]:
        problems.append(f"{figures['stack']} bytes of stack and {figures['local']} accesses to local memory")
    if figures["registers"] * 32 * warps > 65536:
        problems.append("more registers than a multiprocessor has")
    if item["due"] and figures["wide_accesses"] * 16 * 32 * warps < item["moved"] * tile:
        problems.append(
            f"{figures['wide_accesses']} accesses of 16 bytes do not move {item['moved']} bytes "
            f"for each of {tile} elements"
        )
    row["problems"] = problems
    return row


def run(full, architectures, processes, known=()):
    """All rows, in a fixed order. For the newest architecture the subset has only what is checked for access widths.

    known: rows of an earlier run, taken over where the inputs are the same. One of every kernel is compiled all the
    same, and it is a problem of its row if its figures are others.
    """
    WORK[:] = collect(full)
    tasks = [
        (index, architecture)
        for index in range(len(WORK))
        for architecture in architectures
        if full or architecture < 100 or WORK[index]["due"]
    ]
    inputs = {task: inputs_of(WORK[task[0]], task[1]) for task in tasks}
    known = {row["inputs"]: row for row in known}
    samples = {WORK[index]["kernel"]: (index, architecture) for index, architecture in reversed(tasks)}.values()
    rows = _compiled_rows([task for task in tasks if inputs[task] not in known or task in samples], processes)
    for task, row in rows.items():
        row.update(inputs=inputs[task], triton=triton.__version__)
        if inputs[task] in known and {**row, **known[inputs[task]]} != row:
            row["problems"].append("figures are not the known ones")
    return [rows[task] if task in rows else known[inputs[task]] for task in tasks]


def _compiled_rows(tasks, processes):
    """{(index of the work, architecture): row}."""
    compiled = {}
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        for task, result in zip(tasks, pool.map(_compile_in_process, tasks, chunksize=4)):
            compiled[task] = result
            if sys.stderr.isatty():
                print(f"\r{len(compiled)} of {len(tasks)}", end="", file=sys.stderr)
    rows = {}
    for architecture in {architecture for _, architecture in tasks}:
        of_it = [task for task in tasks if task[1] == architecture]
        for task, code in zip(of_it, disassemble([compiled[task][0] for task in of_it], architecture)):
            figures = {**compiled[task][1], **count_instructions(code)}
            rows[task] = row_of(WORK[task[0]], architecture, figures)
    return rows


# ---- machine code ----------------------------------------------------------------------------------------------------


def machine_code(rows):
    """{variant: sha256}, taken out of the rows. One case may launch a kernel in two variants: they are numbered."""
    hashes, seen = {}, collections.Counter()
    for row in rows:
        name = " ".join(str(row[column]) for column in ("kernel", "event", "dtype", "layout", "log_gamma", "sm"))
        seen[name] += 1
        hashes[f"{name} #{seen[name]}"] = row.pop("sass", None)
    return hashes


def compare_machine_code(hashes, file):
    """Write the hashes, or compare them with the file's and print what differs. Returns whether they are the same."""
    if not file.exists():
        file.write_text(json.dumps(hashes, indent=1) + "\n")
        print(f"{len(hashes)} variants written to {file}", file=sys.stderr)
        return True
    before = json.loads(file.read_text())
    different = [variant for variant in {**before, **hashes} if before.get(variant) != hashes.get(variant)]
    for variant in different:
        what = "is new" if variant not in before else "is gone" if variant not in hashes else "differs"
        print(f"{variant}: {what}")
    print(f"{len(hashes)} variants, {len(different)} not as in {file}", file=sys.stderr)
    return not different


# ---- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "kernel",
    "event",
    "dtype",
    "layout",
    "log_gamma",
    "sm",
    "tile",
    "warps",
    "registers",
    "stack",
    "shared",
    "wide_accesses",
    "accesses",
    "instructions_per_element",
)
SUMMARY_TITLES = ("kernel", "type", "layout", "compiled", "registers", "stack", "shared", "16-byte", "instructions")
TITLES = (
    "kernel",
    "event",
    "dtype",
    "layout",
    "variant",
    "sm",
    "tile",
    "warps",
    "registers",
    "stack",
    "shared",
    "16-byte",
    "accesses",
    "instr/element",
)


def markdown(rows):
    """All rows as a Markdown table."""
    return _markdown(TITLES, [[row[column] for column in COLUMNS] for row in rows])


def summary(rows):
    """The rows of real shapes as a Markdown table of ranges: one line a kernel, size of type and layout.

    Ranges are over all variants, shapes and architectures. Odd event sizes are left out.
    """
    lines = {}
    for row in rows:
        if row["event"] != "odd":
            dtype = "bf16, fp16" if row["dtype"] in ("bf16", "fp16") else row["dtype"]
            lines.setdefault((row["kernel"], dtype, row["layout"]), []).append(row)
    cells = []
    for (kernel, dtype, layout), group in lines.items():
        wide = "all"
        if not all(row["due"] and not row["problems"] for row in group):
            wide = f"{sum(row['wide_accesses'] for row in group) / sum(row['accesses'] for row in group):.0%}"
        stack, shared = max(row["stack"] for row in group), max(row["shared"] for row in group)
        span, lean = _span(group, "registers"), _span(group, "instructions_per_element")
        cells.append([f"`{kernel}`", dtype, layout, len(group), span, stack, shared, wide, lean])
    return _markdown(SUMMARY_TITLES, cells)


def _span(rows, column):
    return f"{min(row[column] for row in rows)} to {max(row[column] for row in rows)}"


def _markdown(titles, cells):
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join(lines + ["| " + " | ".join(map(str, line)) + " |" for line in cells])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subset", action="store_true", help="what the tests check")
    parser.add_argument(
        "--sm", type=int, action="append", help="one architecture; may be repeated; all three by default"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    parser.add_argument(
        "--sass", type=Path, help="compare the subset's machine code with this file; write it where it is not there"
    )
    parser.add_argument("--known", type=Path, help="what --json wrote: what is in it is not compiled again")
    parser.add_argument("--summary", type=Path, help="write a summary as a Markdown table")
    arguments = parser.parse_args()
    if arguments.known and arguments.sass:
        parser.error("--known has no machine code to compare: leave it out with --sass")
    known = map(json.loads, arguments.known.read_text().splitlines()) if arguments.known else ()
    rows = run(not (arguments.subset or arguments.sass), arguments.sm or ARCHITECTURES, arguments.processes, known)
    hashes = machine_code(rows)
    same = compare_machine_code(hashes, arguments.sass) if arguments.sass else True
    if not arguments.sass:
        print(markdown(rows))
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if arguments.summary:
        arguments.summary.write_text(summary(rows) + "\n")
    bad = [row for row in rows if row["problems"]]
    for row in bad:
        name = " ".join(row[column] for column in ("kernel", "event", "dtype", "layout", "log_gamma"))
        print(f"PROBLEM {name} sm_{row['sm']}: {'; '.join(row['problems'])}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled with Triton {triton.__version__}, {len(bad)} with problems", file=sys.stderr)
    return 1 if bad or not same else 0


if __name__ == "__main__":
    sys.exit(main())

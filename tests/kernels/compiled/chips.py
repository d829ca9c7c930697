"""Kernels compiled ahead of time to machine code for chips that are not there, and what can be read off it.

The wheels of triton carry every compiler and assembler that this takes.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

Kernel = Any  # JITFunction and CompiledKernel; triton is untyped


class Chip(NamedTuple):
    """A GPU: bytes of shared memory that one block may use, the regular expression of its tensor-core instruction."""

    name: str
    target: GPUTarget
    shared: int
    tensor_core: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", GPUTarget("cuda", 80, 32), 166912, r"\bHMMA\b"),
        Chip("sm_90", GPUTarget("cuda", 90, 32), 232448, r"\bHGMMA\b"),
        Chip("sm_100", GPUTarget("cuda", 100, 32), 232448, r"\bUTC\w*MMA\b"),
        Chip("sm_120", GPUTarget("cuda", 120, 32), 101376, r"\bHMMA\b"),
        Chip("gfx942", GPUTarget("hip", "gfx942", 64), 65536, r"\bv_mfma_"),
        Chip("gfx950", GPUTarget("hip", "gfx950", 64), 163840, r"\bv_mfma_"),
    )
}
TENSOR_MEMORY = 512  # columns of a Blackwell multiprocessor


class Report(NamedTuple):
    """What the machine code of one kernel needs and contains.

    Attributes:
        chip: its name.
        registers: per thread (VGPRs on AMD).
        spills: bytes of spill stores on NVIDIA, spilled registers on AMD.
        shared: bytes per block.
        tensor_memory: columns, Blackwell only.
        tensor_cores: number of tensor-core instructions.
        serialised: whether ptxas had to wait for each wgmma, which costs several times their duration.
        loads: global loads, those straight to shared memory too: bits moved by a thread at once → instructions.
        stores: global stores, likewise.
    """

    chip: str
    registers: int
    spills: int
    shared: int
    tensor_memory: int
    tensor_cores: int
    serialised: bool
    loads: Mapping[int, int]
    stores: Mapping[int, int]

    def faults(self, *, tensor_cores: bool = False, spills: int = 0) -> list[str]:
        """What makes the kernel slow or unable to run. Empty: nothing.

        Args:
            tensor_cores: whether it should use them.
            spills: how many are allowed.
        """
        shared = CHIPS[self.chip].shared
        found = {
            f"{self.spills} spills": self.spills > spills,
            f"{self.shared} bytes of shared memory of {shared}": self.shared > shared,
            f"{self.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}": self.tensor_memory > TENSOR_MEMORY,
            "no tensor-core instruction": tensor_cores and not self.tensor_cores,
            "serialised wgmma": self.serialised,
        }
        return [fault for fault, present in found.items() if present]


_REPORTS: dict[Any, Report] = {}


def compiled(
    kernel: Kernel,
    chip: Chip,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    aligned: bool = True,
    unaligned: Collection[str] = (),
    **options: Any,
) -> Report:
    """Compile a kernel for a chip, once per process.

    Args:
        kernel: a @triton.jit function.
        chip: one of CHIPS.
        signature: the types of the arguments that are passed: "*bf16", "i32", "i64", "fp32", "fp64", ...
        constants: the values of the rest: constexprs, pointers that are None, integers that are 1.
        aligned: whether integers are multiples of 16, as in a launch whose every size and stride is. Pointers are
            multiples of 16 bytes in any case, as those of torch's allocations are.
        unaligned: names of pointers and integers that are not, whatever `aligned` says.
        **options: num_warps, num_stages, ...
    """
    missing = set(kernel.arg_names) ^ (signature.keys() | constants.keys())
    if missing or signature.keys() & constants.keys() or not set(unaligned) <= set(kernel.arg_names):
        raise ValueError(f"{kernel.__name__}: signature and constants do not divide {kernel.arg_names}: {missing}")
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    key = (
        kernel,
        chip.name,
        repr([types, sorted(constants.items()), aligned, sorted(unaligned), sorted(options.items())]),
    )
    if key not in _REPORTS:
        attributes = _attributes(kernel, chip, types, aligned, unaligned)
        source = ASTSource(kernel, types, dict(constants), attributes)
        built = triton.compile(source, target=chip.target, options=options)
        _REPORTS[key] = _nvidia(built, chip) if chip.target.backend == "cuda" else _amd(built, chip)
    return _REPORTS[key]


def _attributes(
    kernel: Kernel, chip: Chip, types: Mapping[str, str], aligned: bool, unaligned: Collection[str]
) -> dict[tuple[int], list[list[Any]]]:
    """What the launcher would find out about the arguments, in triton's own letters.

    D: divisible by 16. S: a tensor below 2 GiB, for which AMD's back end uses buffer instructions.
    """
    backend = make_backend(chip.target)
    attributes = {}
    for position, parameter in enumerate(kernel.params):
        kind, letters = types[parameter.name], ""
        if kind.startswith("*"):
            letters = "DS" if chip.target.backend == "hip" else "D"
        elif kind in ("i32", "i64") and aligned and not parameter.do_not_specialize:
            letters = "D"
        if parameter.name in unaligned or parameter.do_not_specialize_on_alignment:
            letters = letters.replace("D", "")
        if letters:
            attributes[(position,)] = backend.parse_attr(letters)
    return attributes


def _nvidia(built: Kernel, chip: Chip) -> Report:
    log, code = _assembler_log(built, chip), built.asm["sass"]
    return Report(
        chip.name,
        registers=_number(r"Used (\d+) registers", log),
        spills=_number(r"(\d+) bytes spill stores", log),
        shared=built.metadata.shared,
        tensor_memory=built.metadata.tmem_size or 0,
        tensor_cores=len(re.findall(chip.tensor_core, code)),
        serialised="serialized" in log,
        loads=_widths(r"\bLDG(?:STS)?\.E([.\w]*)", code),
        stores=_widths(r"\bSTG\.E([.\w]*)", code),
    )


def _assembler_log(built: Kernel, chip: Chip) -> str:
    """ptxas again, since triton throws its log away; with the options that triton passed."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    options = [] if built.metadata.enable_fp_fusion else ["--fmad=false"]
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
        options.append("--regAllocOptLevel=2")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(built.asm["ptx"])
        architecture = f"--gpu-name={sm_arch_from_capability(chip.target.arch)}"
        command = [
            get_ptxas(chip.target.arch).path,
            "-v",
            *options,
            architecture,
            source,
            "-o",
            f"{folder}/kernel.cubin",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _amd(built: Kernel, chip: Chip) -> Report:
    code = built.asm["amdgcn"]
    return Report(
        chip.name,
        registers=_number(r"\.vgpr_count:\s*(\d+)", code),
        spills=_number(r"\.vgpr_spill_count:\s*(\d+)", code) + _number(r"\.sgpr_spill_count:\s*(\d+)", code),
        shared=built.metadata.shared,
        tensor_memory=0,
        tensor_cores=len(re.findall(chip.tensor_core, code)),
        serialised=False,
        loads=_widths(r"\b(?:global|buffer|flat)_load_(\w+)", code),
        stores=_widths(r"\b(?:global|buffer|flat)_store_(\w+)", code),
    )


# Endings of NVIDIA's instructions, then of AMD's.
_BITS = {"256": 256, "ENL2": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_BITS |= {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "ushort": 16, "sshort": 16, "short": 16, "ubyte": 8, "byte": 8}


def _widths(instruction: str, code: str) -> Counter[int]:
    """How many bits each memory instruction moves; one that names no width moves 32."""
    widths: Counter[int] = Counter()
    for ending in re.findall(instruction, code):
        words = re.split(r"[._]", ending)
        widths[next((_BITS[word] for word in words if word in _BITS), 32)] += 1
    return widths


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern!r} is not in the compiler's output")
    return int(match[1])

"""What a launch does to integers and memory, by Triton's first IR: which 32-bit integers could overflow, which tensors
are read and written.

Every argument and the grid of a recorded launch are known, so each integer of the kernel has a known range, but for
what it loads. A loaded integer is taken to be an index or a count: from -1 to the most elements along an axis of the
launch's tensors. A sum that a loop carries grows by as much in each step as in the first. A cast to 32 bits is the
kernel's own promise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Range = tuple[int, int]


class Overflow(NamedTuple):
    """An integer that can leave its 32 bits."""

    place: str  #: file and line
    operation: str
    range: Range


def _of_type(kind: str) -> Range | None:
    """What an integer type holds; None of what is no integer."""
    found = re.search(r"(?:^|x)i(\d+)", kind) if "ptr" not in kind else None
    if found is None:
        return (-(2**63), 2**63 - 1) if kind == "index" else None
    bits = int(found[1])
    return (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _corners(a: Range, b: Range, f: Callable[[int, int], int]) -> Range:
    made = [f(x, y) for x in a for y in b]
    return min(made), max(made)


def _quotient(a: Range, b: Range) -> Range:
    """Rounded towards zero, as IR divides."""
    by = max(1, b[0]), max(1, b[1])
    return _corners(a, by, lambda x, y: int(math.copysign(abs(x) // y, x)))


def _rest(a: Range, b: Range) -> Range:
    most = max(1, b[1]) - 1
    if a[0] >= 0 and a[1] < b[0]:
        return a
    return (0 if a[0] >= 0 else -most), min(most, max(a[1], 0))


_BINARY: dict[str, Callable[[Range, Range], Range]] = {
    "addi": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "subi": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "muli": lambda a, b: _corners(a, b, lambda x, y: x * y),
    "divsi": _quotient, "divui": _quotient, "remsi": _rest, "remui": _rest,
    "minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
}  # fmt: skip
_SAME = ("splat", "broadcast", "expand_dims", "reshape", "trans", "extsi", "extui", "index_cast", "convert_layout")


class _Block(NamedTuple):
    """An operation: its line, where it is from, and the operations of its regions."""

    line: str
    location: str
    regions: list[list[_Block]]


_LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")


def _parsed(lines: list[str]) -> list[_Block]:
    """The operations of a region, before the brace that closes it; ``lines`` is reversed, and used up."""
    found: list[_Block] = []
    while lines and not lines[-1].startswith("}"):
        text = lines.pop()
        line, location, regions = _LOCATION.sub("", text), (_LOCATION.findall(text) or [""])[-1], []
        more = line.endswith("{")
        while more:
            regions.append(_parsed(lines))
            closing = lines.pop()
            more = closing.startswith("} else")
            if closing.startswith("})"):  # what follows is the type of an operation whose region is in parentheses
                line += _LOCATION.sub("", closing)[2:]
        found.append(_Block(line, location, regions))
    return found


class _Kernel:
    """Ranges of a kernel's values."""

    def __init__(self, ir: str, grid: tuple[int, ...], arguments: dict[str, Any], loaded: int) -> None:
        self.grid = dict(zip("xyz", (*grid, 1, 1)[:3], strict=True))
        self.places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ir, re.MULTILINE))
        self.loaded, self.arguments = loaded, arguments
        self.values: dict[str, Range] = {}
        self.tensors: dict[str, set[str]] = {}  #: arguments that a pointer may point into
        self.compared: dict[str, tuple[str, str, str]] = {}
        self.at_least: set[tuple[str, str]] = set()  #: in the branch that runs, the first is not less than the second
        self.read: set[str] = set()
        self.written: set[str] = set()
        self.found: dict[Overflow, None] = {}
        self.listening = True
        lines = [line.strip() for line in ir.splitlines() if line.strip() and not line.startswith("#")]
        [module] = _parsed(lines[::-1])
        [function] = [block for block in module.regions[0] if "tt.func public" in block.line]
        for name in re.findall(r"(%\w+): i\d+", function.line):
            value = arguments[name[1:]]
            self.values[name] = (value, value)
        self.tensors = {f"%{name}": {name} for name in re.findall(r"%(\w+): !tt\.ptr", function.line)}
        self.run(function.regions[0])

    def place(self, text: str) -> str:
        """Where a location is in the source, in the innermost function."""
        for _ in range(20):
            if found := re.search(r'"([^"]*?)([^"/]+\.py)":(\d+)', text):
                return f"{found[2]}:{found[3]}"
            names = re.findall(r"#loc\d*", text)
            if not names:
                break
            text = self.places.get(names[0], "")
        return "?"

    def known(self, name: str) -> Range | None:
        return self.values.get(name)

    def put(self, name: str, kind: str, made: Range | None, block: _Block) -> None:
        """A result, within its type; noted if it is an int32 that is not."""
        limits = _of_type(kind)
        if limits is None:
            return
        made = made or limits
        if made[0] < limits[0] or made[1] > limits[1]:
            if self.listening and limits[1] == 2**31 - 1:
                self.found[Overflow(self.place(block.location), block.line, made)] = None
            made = limits
        self.values[name] = made

    def run(self, blocks: Iterable[_Block]) -> list[Range | None]:
        """What the region yields."""
        for block in blocks:
            if re.match(r"(scf\.yield|tt\.reduce\.return|tt\.scan\.return)", block.line):
                return [self.known(name) for name in re.findall(r"%[\w-]+(?:#\d+)?", block.line.split(" : ")[0])]
            self.step(block)
        return []

    def step(self, block: _Block) -> None:
        found = re.match(r'(?:(%[\w-]+)(?::(\d+))? = )?"?\w+\.(\w+)"?(.*)', block.line)
        if found is None:  # the label of a block
            return
        name, many, operation, rest = found.groups()
        if operation == "store":
            self.written |= self.tensors.get(re.search(r"%[\w-]+(?:#\d+)?", rest)[0], set())  # type: ignore[index]
        results = [f"{name}#{i}" for i in range(int(many))] if many else [name] if name else []
        if operation == "for":
            self.loop(block, rest, results)
        elif operation == "if":
            self.branch(block, rest, results)
        elif results and not many:
            names = re.findall(r"%[\w-]+(?:#\d+)?", rest)
            operands = [self.known(o) for o in names]
            if operation == "load":
                self.read |= self.tensors.get(names[0], set())
            elif "tt.ptr" in rest:
                self.tensors[name] = set().union(*(self.tensors.get(o, set()) for o in names))
            kind = re.split(r" (?:to|->) ", rest)[-1] if re.search(r" (?:to|->) ", rest) else rest.rsplit(" : ", 1)[-1]
            if operation == "load":
                kind = re.sub(r"!tt\.ptr<(\w+)>", r"\1", kind)
            if operation.startswith("cmp"):
                kind = "i1"
                self.compared[name] = rest.split(",")[0].strip(), *names[:2]
            made = self._made(operation, operands, rest, block)
            if operation == "subi" and made and tuple(names[:2]) in self.at_least:
                made = max(0, made[0]), made[1]
            self.put(name, kind.strip(), made, block)

    def _made(self, operation: str, operands: list[Range | None], rest: str, block: _Block) -> Range | None:
        given = [o for o in operands if o is not None]
        if operation == "constant":
            number = re.match(r" (?:dense<)?(-?\d+|true|false)>? :", rest)
            if number is None:
                return None
            value = {"true": 1, "false": 0}.get(number[1])
            return (int(number[1]),) * 2 if value is None else (value, value)
        if operation == "get_program_id":
            return 0, self.grid[rest.split()[0]] - 1
        if operation == "get_num_programs":
            return (self.grid[rest.split()[0]],) * 2
        if operation == "make_range":
            end, start = (int(re.search(rf"{word} = (-?\d+)", rest)[1]) for word in ("end", "start"))  # type: ignore[index]
            return start, end - 1
        if operation == "load":
            return -1, self.loaded
        if operation in ("reduce", "scan") and len(given) == 1:
            axis, shape = int(re.search(r"axis = (\d+)", rest)[1]), re.search(r"tensor<([\dx]+)x", rest)  # type: ignore[index]
            adds = any("arith.addi" in inner.line for inner in block.regions[0])
            count = int(shape[1].split("x")[axis]) if adds and shape else 1
            return given[0][0] * count, given[0][1] * count
        if operation == "select" and len(given) == 3:
            return min(given[1][0], given[2][0]), max(given[1][1], given[2][1])
        if operation == "trunci" and given:
            return max(given[0][0], -(2**31)), min(given[0][1], 2**31 - 1)
        if operation in _SAME and len(given) == 1:
            return given[0]
        if operation in _BINARY and len(given) == 2:
            return _BINARY[operation](*given)
        if operation == "andi" and len(given) == 2 and max(a[0] for a in given) >= 0:
            return 0, max(a[1] for a in given if a[0] >= 0)
        return None

    def branch(self, block: _Block, rest: str, results: list[str]) -> None:
        how, *pair = self.compared.get(rest.split()[0], ("", "", ""))
        order = {
            "slt": (pair[::-1], pair),
            "sle": (pair[::-1], pair),
            "sgt": (pair, pair[::-1]),
            "sge": (pair, pair[::-1]),
        }
        yields = []
        for region, known in zip(block.regions, order.get(how, ((), ())), strict=False):
            before, self.at_least = self.at_least, self.at_least | ({tuple(known)} if known else set())
            yields.append(self.run(region))
            self.at_least = before
        kinds = re.search(r"-> \((.*)\) \{", rest)
        for i, (result, kind) in enumerate(zip(results, kinds[1].split(", ") if kinds else (), strict=True)):
            known = [r for made in yields if (r := made[i]) is not None]
            union = (min(r[0] for r in known), max(r[1] for r in known)) if len(known) == len(yields) else None
            self.put(result, kind, union, block)

    def loop(self, block: _Block, rest: str, results: list[str]) -> None:
        variable, *bounds = re.search(r"(%[\w-]+) = (%\S+) to (%\S+) step (%\S+)", rest).groups()  # type: ignore[union-attr]
        first, end, step = (self.known(bound) or (0, 2**31 - 1) for bound in bounds)
        self.values[variable] = (first[0], max(first[0], end[1] - 1))
        trips = max(0, -(-(end[1] - first[0]) // max(1, step[0])))
        carried = re.findall(r"(%[\w-]+) = (%[\w-]+(?:#\d+)?)", re.search(r"iter_args\((.*?)\)|$", rest)[1] or "")  # type: ignore[index]
        starts = [self.known(initial) for _, initial in carried]
        for (argument, _), start in zip(carried, starts, strict=True):
            if start is not None:
                self.values[argument] = start
        listening, self.listening = self.listening, False
        once = self.run(block.regions[0])
        for (argument, _), start, after in zip(carried, starts, once, strict=True):
            if start is None or after is None:
                continue
            grown = min(0, after[0] - start[0]) * trips, max(0, after[1] - start[1]) * trips
            self.values[argument] = start[0] + grown[0], start[1] + grown[1]
        self.listening = listening
        last = self.run(block.regions[0])
        for result, after, start in zip(results, last, starts, strict=False):
            if after is not None and start is not None:
                self.values[result] = min(after[0], start[0]), max(after[1], start[1])


class Facts(NamedTuple):
    """Of a launch."""

    overflows: list[Overflow]
    read: set[str]  #: arguments
    written: set[str]


def facts(ir: str, grid: tuple[int, ...], arguments: dict[str, Any], loaded: int) -> Facts:
    """Of a kernel's IR with a launch's grid and arguments; ``loaded``: the largest integer that it loads."""
    made = _Kernel(ir, grid, arguments, loaded)
    return Facts(list(made.found), made.read, made.written)

# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Mutation testing of the model: cosmic-ray's operators change its modules in one place at a time. The tests must see
("kill") at least 85 % of these mutants, or this command fails. docs/mutants.md explains survivors.

    pip install -r requirements.txt cosmic-ray
    python tests/mutants.py --jobs 2                   # all mutants
    python tests/mutants.py --jobs 2 --sample 60       # a sample; the text of the modules decides which
    python tests/mutants.py --only "87 carry"          # those whose module, line, function and operator match
    python tests/mutants.py --modules decoding_phase15.py

One process imports torch and transformers, and each mutant gets a fork of it in a copy of the repository. There only
those tests run that run the mutated line; tests that have killed before run first. A mutant with which they take more
than twice as long is a timeout, which counts as killed.
"""

import argparse
import ast
import contextlib
import gc
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple


os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.plugins import get_operator


ROOT, THRESHOLD = Path(__file__).resolve().parents[1], 0.85
MODULES = ["modeling_phase15.py", "recursion_phase15.py", "batch_phase15.py", "generation_phase15.py"]
# One or two replacements for each operator. Replacements that always raise on tensors would flatter the score and are
# left out: bitwise operators instead of arithmetic, `is` instead of an order.
REPLACED = {
    "BinaryOperator": "Add_Sub Sub_Add Mul_Add Mul_Div Div_Mul FloorDiv_Mul FloorDiv_Mod Mod_FloorDiv Pow_Mul "
    "BitOr_BitAnd BitAnd_BitOr",
    "ComparisonOperator": "Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt "
    "GtE_Lt",
    "UnaryOperator": "Delete_Invert Delete_Not",
}
OPERATORS = [
    *("AddNot", "ExceptionReplacer", "NumberReplacer", "RemoveDecorator", "ZeroIterationForLoop"),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *(f"Replace{kind}_{change}" for kind, changes in REPLACED.items() for change in changes.split()),
]
TESTS = (
    "modeling",
    "recursion",
    "rows",
    "checks",
    "generation",
    "chunk_length",
    "configuration",
    "decoding",
    "models",
)
TESTS = [f"tests/test_{name}.py" for name in TESTS]
# Left out: tests that take long, and other kinds of bases.
SLOW = re.compile(
    "replayed|compile|one_graph|decoders_are_few|on_a_cpu|on_cuda_graphs|models_that|moved|buffers|streamer|rows_that_end|"
    "test_decoding.*eager-|far_past|memory_is_flat|autocast|mistral|qwen2"
)
FIRST = re.compile("prompt_equal_the_reference.both|gradients_equal.*llama-3|uncached.*39|llama-greedy|lengths3")


class Mutant(NamedTuple):
    module: str
    line: int
    function: str
    operator: str
    occurrence: int

    def __str__(self) -> str:
        return f"{self.module} {self.line} {self.function} {self.operator}"

    def source(self, tree) -> str:
        """The module with this one change. Changes the tree in place."""
        return MutationVisitor(self.occurrence, get_operator(f"core/{self.operator}")()).walk(tree).get_code()


def all_mutants(module: str, source: str, tree) -> list[Mutant]:
    """Leaves out type annotations, which have no effect, and negations that another operator makes as well."""
    parts = [getattr(node, name, None) for node in ast.walk(ast.parse(source)) for name in ("annotation", "returns")]
    spans = [((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)) for part in parts if part]
    mutants, nodes = [], list(ast_nodes(tree))
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        positions = ((start, node) for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, (start, node) in enumerate(positions):
            negated = node.children[2 if node.type == "test" else 1].type if name == "AddNot" else None
            if negated in ("comparison", "not_test", "namedexpr_test") or any(a <= start < b for a, b in spans):
                continue
            mutants.append(Mutant(module, start[0], ASTQuery(node).get_definition_name() or "", name, occurrence))
    return mutants


class Plugin:
    """
    Of pytest. Runs the tests to which `rank` gives a rank, sorted by it. With `modules` it notes which tests run each
    line of them, and how long each test takes.
    """

    def __init__(self, rank, modules: tuple[str, ...] = ()):
        self.rank, self.modules = rank, modules
        self.lines, self.seconds, self.killer = defaultdict(list), {}, None

    def pytest_collection_modifyitems(self, items):
        ranks = {item: self.rank(item.nodeid) for item in items if not SLOW.search(item.nodeid)}
        items[:] = sorted((item for item in ranks if ranks[item] is not None), key=ranks.get)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename.endswith(self.modules):
            lines = self.lines[f"{Path(frame.f_code.co_filename).name} {frame.f_lineno}"]
            if event == "line" and self.test not in lines[-1:]:
                lines.append(self.test)
            return self.trace

    def pytest_runtest_logstart(self, nodeid):
        self.test, self.since = nodeid, time.process_time()
        sys.settrace(self.trace if self.modules else None)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = time.process_time() - self.since
        self.killer = report.nodeid if report.failed else self.killer

    def found(self) -> dict:
        sys.settrace(None)
        files = {name: str(getattr(module, "__file__", None)) for name, module in list(sys.modules.items())}
        installed = [name for name, file in files.items() if "site-packages" in file and self.modules]
        return {"lines": self.lines, "seconds": self.seconds, "killer": self.killer, "installed": installed}


def start(folder: Path, changed, tests: list[str], plugin: Plugin, cpu_seconds: int = 3600) -> int:
    """Forks a process that writes `changed()`, a text for each module, runs the tests and exits with their status."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        for module, source in changed().items():
            (folder / module).write_text(source)
            for stale in folder.glob(f"__pycache__/{Path(module).stem}*"):  # of a mutant of the same age and size
                stale.unlink()
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        signal.alarm(20 * cpu_seconds)  # if it sleeps
        sys.dont_write_bytecode = False  # the tests are compiled once
        sys.pycache_prefix = None  # else compiled mutants would lie where the glob above does not see them
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        options = ["-xq", "-m", "not slow", "--assert=plain", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp"]
        status = pytest.main([*tests, *options], plugins=[plugin])
        (folder / "found").write_text(json.dumps(plugin.found()))
    finally:
        os._exit(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--sample", type=int, help="how many mutants; default: all")
    parser.add_argument("--only", default="", help="a regular expression of `module line function operator`")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="files to change")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or single tests")
    args = parser.parse_args()
    begin, sources = time.monotonic(), {module: (ROOT / module).read_text() for module in args.modules}
    trees = {module: get_ast(source) for module, source in sources.items()}
    mutants = [mutant for module in sources for mutant in all_mutants(module, sources[module], trees[module])]
    mutants = [mutant for mutant in mutants if re.search(args.only, str(mutant))]
    random.Random("".join(sources.values())).shuffle(mutants)
    mutants = mutants[: args.sample]
    running, outcomes, kills = {}, Counter(), Counter()

    with tempfile.TemporaryDirectory() as work:
        os.environ["HF_HOME"] = f"{work}/hf"
        folders = [Path(work, str(job)) for job in range(args.jobs)]
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "outputs"))
        for job, folder in enumerate(folders):  # each notes the lines that its share of the tests runs
            share = lambda test, job=job: 0 if zlib.crc32(test.encode()) % args.jobs == job else None  # noqa: E731
            start(folder, lambda: sources, args.tests, Plugin(share, tuple(sources)))
        statuses = [os.wait()[1] for _ in folders]
        if any(statuses):
            logs = "\n".join((folder / "log").read_text() for folder in folders)
            sys.exit(f"{logs}\nThe tests must pass on the unchanged modules.")
        lines, seconds, installed = defaultdict(list), {}, []
        for folder in folders:
            found = json.loads((folder / "found").read_text())
            seconds |= found["seconds"]
            installed += found["installed"]
            for line, tests in found["lines"].items():
                lines[line] += tests
        print(f"{len(mutants)} mutants, {len(seconds)} tests, {sum(seconds.values()):.0f} s of CPU time", flush=True)
        for name in installed:
            with contextlib.suppress(Exception):  # some only work as part of another
                importlib.import_module(name)
        gc.freeze()  # so that forks share what there is

        while True:
            while folders and mutants:
                mutant, folder = mutants.pop(), folders.pop()
                tests = lines.get(f"{mutant.module} {mutant.line}") or seconds  # all, if the line runs at import

                def rank(test, function=mutant.function, tests=frozenset(tests)):
                    order = -kills[function, test], -kills[test], not FIRST.search(test), seconds.get(test, 0)
                    return order if test in tests else None

                limit = 10 + int(2 * sum(seconds[test] for test in tests))
                mutate = lambda m=mutant: {**sources, m.module: m.source(trees[m.module])}  # noqa: E731
                pid = start(folder, mutate, args.tests, Plugin(rank), limit)
                running[pid] = mutant, folder
            if not running:
                break
            pid, status = os.wait()
            mutant, folder = running.pop(pid)
            folders.append(folder)
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1, 2, 4) and code >= 0:  # passed, failed, and two kinds of errors at import
                sys.exit(f"{mutant}: pytest ended with {code}\n" + (folder / "log").read_text())
            outcome = "timeout" if code < 0 else "killed" if code else "survived"
            outcomes[outcome] += 1
            if outcome == "killed":
                killer = json.loads((folder / "found").read_text())["killer"]
                kills.update([killer, (mutant.function, killer)])
            else:
                texts = sources[mutant.module], (folder / mutant.module).read_text()
                lines_of_both = zip(*map(str.splitlines, texts), strict=False)
                changed = next(after for before, after in lines_of_both if after != before).strip()
                print(f"{outcome}: {mutant}: {changed}", flush=True)

    total, took = outcomes.total(), time.monotonic() - begin
    score = 1 - outcomes["survived"] / total
    print(f"{dict(outcomes)}, {total} mutants in {took:.0f} s: {score:.1%} killed")
    sys.exit(0 if score >= THRESHOLD else f"Fewer than {THRESHOLD:.0%} of the mutants were killed.")


if __name__ == "__main__":
    main()

# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Mutation testing of the model: cosmic-ray's operators change the modules of phase15/model in one place at a time. The
tests must fail on ("kill") at least 85 % of these mutants, or this command fails. docs/mutants.md explains survivors.

    pip install -r requirements.txt cosmic-ray
    python tests/mutants.py --jobs 2                   # all mutants
    python tests/mutants.py --jobs 2 --sample 20       # a sample, drawn with the text of the modules as the seed
    python tests/mutants.py --only "87 carry"          # those whose module, line, function and operator match
    python tests/mutants.py --modules decoding_phase15.py      # other modules of phase15/model

One process imports torch and transformers. Each mutant gets a fork of this process in a copy of the repository, and
runs only the tests that cover the mutated line; tests that have killed before run first. A mutant with which they take
more than twice as long is a timeout, which counts as killed.
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


ROOT = Path(__file__).resolve().parents[1]
MODEL = Path("phase15", "model")
THRESHOLD = 0.85
MODULES = [f"{name}_phase15.py" for name in ("modeling", "recursion", "batch", "cache", "generation")]
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
# Left out: random examples, releases of transformers, and lanes, which have modules of their own.
OTHERS = {"test_properties.py", "test_compat.py", "test_continuous_batching.py"}
TESTS = sorted(file for file in ROOT.glob("tests/model/test_*.py") if file.name not in OTHERS)
TESTS = [str(file.relative_to(ROOT)) for file in [*TESTS, ROOT / "tests" / "test_loading.py"]]
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
    spans = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part:
                spans.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    mutants = []
    nodes = list(ast_nodes(tree))
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
    A pytest plugin. Runs the tests to which `rank` gives a rank, sorted by it. With `modules`, records which tests run
    each of their lines, and the CPU time of each test.
    """

    def __init__(self, rank, modules: tuple[str, ...] = ()):
        self.rank = rank
        self.modules = modules
        self.lines = defaultdict(list)
        self.seconds = {}
        self.killer = None

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
        self.test = nodeid
        self.since = time.process_time()
        sys.settrace(self.trace if self.modules else None)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = time.process_time() - self.since
        self.killer = report.nodeid if report.failed else self.killer

    def results(self) -> dict:
        sys.settrace(None)
        files = {name: str(getattr(module, "__file__", None)) for name, module in list(sys.modules.items())}
        installed = [name for name, file in files.items() if "site-packages" in file and self.modules]
        return {"lines": self.lines, "seconds": self.seconds, "killer": self.killer, "installed": installed}


def start(folder: Path, changed, tests: list[str], plugin: Plugin, cpu_seconds: int = 3600) -> int:
    """
    Forks a process that writes `changed()`, a text for each module, runs the tests and exits with their status.
    Returns the number of this process.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for module, source in changed().items():
            (folder / MODEL / module).write_text(source)
            # the bytecode of an earlier mutant of the same age and size would be taken for this one's
            for stale in (folder / MODEL).glob(f"__pycache__/{Path(module).stem}*"):
                stale.unlink()
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        signal.alarm(20 * cpu_seconds)  # ends a mutant that sleeps, too
        sys.dont_write_bytecode = False  # the tests are compiled once
        sys.pycache_prefix = None  # else compiled mutants would lie where the glob above does not see them
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        options = ["-xq", "-m", "not slow", "--assert=plain", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp"]
        status = pytest.main([*tests, *options], plugins=[plugin])
        (folder / "results").write_text(json.dumps(plugin.results()))
    finally:
        os._exit(status)


def run_unchanged(folders: list[Path], sources: dict[str, str], tests: list[str]) -> tuple[dict, dict]:
    """
    Runs the tests on the unchanged modules, a share of them in each folder.

    Returns:
        the tests that run each line (`module line`), and the CPU time of each test.
    """
    for job, folder in enumerate(folders):

        def share(test, job=job):
            return 0 if zlib.crc32(test.encode()) % len(folders) == job else None

        start(folder, lambda: sources, tests, Plugin(share, tuple(sources)))
    statuses = [os.wait()[1] for _ in folders]
    if any(statuses):
        logs = "\n".join((folder / "log").read_text() for folder in folders)
        sys.exit(f"{logs}\nThe tests must pass on the unchanged modules.")
    lines = defaultdict(list)
    seconds = {}
    for folder in folders:
        results = json.loads((folder / "results").read_text())
        seconds |= results["seconds"]
        for line, its_tests in results["lines"].items():
            lines[line] += its_tests
        # forks then need not import the packages that the tests need
        for name in results["installed"]:
            with contextlib.suppress(Exception):  # some work only as part of another
                importlib.import_module(name)
    return lines, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--sample", type=int, help="number of mutants; default: all")
    parser.add_argument("--only", default="", help="regular expression of `module line function operator`")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="files of phase15/model to change")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or single tests")
    args = parser.parse_args()
    begin = time.monotonic()
    sources = {module: (ROOT / MODEL / module).read_text() for module in args.modules}
    trees = {module: get_ast(source) for module, source in sources.items()}
    mutants = [mutant for module in sources for mutant in all_mutants(module, sources[module], trees[module])]
    mutants = [mutant for mutant in mutants if re.search(args.only, str(mutant))]
    random.Random("".join(sources.values())).shuffle(mutants)
    mutants = mutants[: args.sample]
    running = {}
    outcomes = Counter()
    kills = Counter()

    with tempfile.TemporaryDirectory() as work:
        os.environ["HF_HOME"] = f"{work}/hf"
        folders = [Path(work, str(job)) for job in range(args.jobs)]
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "outputs"))
        lines, seconds = run_unchanged(folders, sources, args.tests)
        cpu_seconds = sum(seconds.values())
        spent = time.monotonic() - begin
        print(f"{len(mutants)} mutants; {len(seconds)} tests of {cpu_seconds:.0f} s of CPU time, {spent:.0f} s in all")
        gc.freeze()  # so that forks share the memory of what is imported

        while True:
            while folders and mutants:
                mutant = mutants.pop()
                folder = folders.pop()
                tests = lines.get(f"{mutant.module} {mutant.line}") or seconds  # all, if the line runs at import

                def rank(test, function=mutant.function, tests=frozenset(tests)):
                    order = -kills[function, test], -kills[test], not FIRST.search(test), seconds.get(test, 0)
                    return order if test in tests else None

                def mutate(mutant=mutant):
                    return {**sources, mutant.module: mutant.source(trees[mutant.module])}

                limit = 10 + int(2 * sum(seconds[test] for test in tests))
                # only the files of these tests need to be collected
                files = sorted({test.partition("::")[0] for test in tests})
                pid = start(folder, mutate, files, Plugin(rank), limit)
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
                killer = json.loads((folder / "results").read_text())["killer"]
                kills.update([killer, (mutant.function, killer)])
            else:
                before = sources[mutant.module].splitlines()
                after = (folder / MODEL / mutant.module).read_text().splitlines()
                changed = next(new for old, new in zip(before, after, strict=False) if new != old).strip()
                print(f"{outcome}: {mutant}: {changed}", flush=True)

    total = outcomes.total()
    took = time.monotonic() - begin
    score = 1 - outcomes["survived"] / total
    print(f"{dict(outcomes)}, {total} mutants in {took:.0f} s: {score:.1%} killed")
    sys.exit(0 if score >= THRESHOLD else f"Fewer than {THRESHOLD:.0%} of the mutants were killed.")


if __name__ == "__main__":
    main()

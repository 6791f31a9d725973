"""Every benchmark runs at toy size and prints the fields that docs/benchmarks.md shows."""

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vit_interact as vi
from benchmarks import common, tracing
from benchmarks.fields import plain
from vit_interact.layout import TokenLayout
from vit_interact.models import cpu

ROOT = Path(__file__).parents[2]
SETTING = {"benchmark", "command", "date", "device", "processor", "cores", "load_before",
           "python", "versions", "rows"}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a benchmark's command line and returns its rows, after its table has been printed."""

    def call(name, *arguments):
        module = importlib.import_module(f"benchmarks.{name}")
        monkeypatch.setattr(sys, "argv", ["x", *arguments, "--json"])
        module.main()
        found = json.loads(capsys.readouterr().out)
        assert found["benchmark"] == name
        assert found.keys() >= SETTING and found["rows"]
        assert found["command"] == " ".join([f"python -m benchmarks.{name}", *arguments])
        assert len(common.text_table(found["rows"])) == len(found["rows"]) + 1
        return found["rows"]

    return call


@pytest.fixture
def shallow(monkeypatch):
    """Named models have two layers: what is tested is the benchmark."""
    monkeypatch.setattr(vi, "create_model", functools.partial(vi.create_model, depth=2))


def positive(rows, *columns):
    for column in columns:
        assert all(row[column] > 0 for row in rows if column in row), column
        assert any(column in row for row in rows), column


@pytest.mark.slow
def test_indicators(run, shallow):
    rows = run("indicators", "--models", "vit_ti16@32", "--batches", "1", "--repeats", "1",
               "--indicators", "attention,edge", "--no-peer",
               "--measure", "layers=(0,)")  # fmt: skip
    names = [row["what"] for row in rows]
    assert names == ["forward", "forward + backward", "attention", "edge"]
    positive(rows, "images_s", "ratio", "cpu_ratio", "temporary_mib", "memory_ratio")


@pytest.mark.slow
def test_indicators_are_those_of_pytorch(run, shallow):
    """The same weights on both sides give the same maps, and peaks are measured for both."""
    pytest.importorskip("transformers")
    rows = run("indicators", "--models", "vit_ti16@32", "--batches", "2", "--repeats", "1",
               "--memory")  # fmt: skip
    compared = [row for row in rows if "difference" in row]
    assert len(compared) == 8
    assert all(row["difference"] < 1e-4 for row in compared)
    positive(rows, "torch_images_s", "torch_ratio", "cpu_torch_ratio")
    assert all("peak_mib" in row or row["what"] == "forward, eager" for row in rows)


@pytest.mark.slow
def test_peer_runs_its_forward_pass_alone(run, shallow):
    pytest.importorskip("transformers")
    rows = run("indicators", "--models", "vit_ti16@32", "--batches", "2", "--repeats", "1",
               "--indicators", "attention", "--peer-forward")  # fmt: skip
    assert [row["what"] for row in rows] == ["forward", "attention", "forward, eager"]
    assert ["torch_images_s" in row for row in rows] == [True, False, True]
    assert rows[0]["difference"] < 1e-4


@pytest.mark.slow
def test_blocks(run, shallow):
    rows = run("blocks", "--models", "vit_ti16@32", "--blocks", "2,5", "--repeats", "1",
               "--indicators", "leave_one_out")  # fmt: skip
    names = [(row["what"], row["block"]) for row in rows]
    assert names[1:] == [("leave_one_out", 2), ("leave_one_out", 5)]
    assert [row["chosen"] for row in rows[1:]] == ["", "yes"]
    positive(rows, "s_image", "ratio", "cpu_ratio", "temporary_mib")


@pytest.mark.slow
def test_heads(run):
    rows = run("heads", "--sizes", "2x5x4,1x7x2", "--repeats", "1")
    assert [row["at_a_time"] for row in rows] == [2, 1]
    positive(rows, "forward", "cpu_forward", "leave_one_out", "edge", "cpu_gradient")


@pytest.mark.slow
def test_together(run, shallow):
    rows = run("together", "--sizes", "vit_ti16@32x4", "--together", "3,1", "--repeats", "1",
               "--indicators", "attention")  # fmt: skip
    assert [row["together"] for row in rows] == [4, 3, 1] * 2
    assert [row["ratio"] for row in rows[::3]] == [1, 1]
    positive(rows, "ms_image", "cpu_ratio", "temporary_mib")


@pytest.mark.slow
def test_tracing(run, shallow):
    rows = run("tracing", "--model", "vit_ti16", "--repeats", "1")
    assert [row["way"] for row in rows[:3]] == list(tracing.WAYS)
    positive(rows, "cpu_s", "ratio")


@pytest.mark.slow
def test_cpu(run, shallow):
    # Without LLVM's optimisations a convolution's derivative takes minutes an image at 224 pixels.
    rows = run("cpu", "--batch", "2", "--pixels", "16", "--repeats", "1")
    passes = [row for row in rows if "batch" in row]
    programs = 2 * 2 * 4 * cpu._known_here()
    assert len({row["what"] for row in passes}) == 7 + cpu._known_here()
    assert len(passes) == 21 + programs and len(rows) == len(passes) + 2 * 8
    positive(rows, "ms", "cpu_ms", "ratio", "cpu_ratio")


def test_ynnpack(run, shallow):
    rows = run("ynnpack", "--side", "4", "--maps", "2", "--pixels", "28", "--repeats", "1")
    assert len(rows) == 9
    positive(rows, "ms", "own_ms", "ratio", "cpu_ratio")
    positive(rows[-1:], "first_ms", "own_first_ms")


@pytest.mark.slow
def test_one_block(run, shallow):
    rows = run("one_block", "--pixels", "28", "--repeats", "1", "--later", "1")
    assert [row["way"] for row in rows] == 3 * ["layers one by one", "one block"]
    positive(rows, "trace_s", "compile_s", "read_s", "first_s", "s", "ratio", "kept_ratio")
    assert all(row["ratio"] == row["all_ratio"] == row["kept_ratio"] == 1 for row in rows[::2])


def test_fields(run):
    rows = run("fields", "--sides", "4,6", "--repeats", "1", "--maps", "2")
    assert [row["patches"] for row in rows] == [16, 36]
    positive(rows, "us_image", "numpy_us_image", "ratio", "temporary_mib")
    assert all(row["difference"] < 1e-4 for row in rows) and "growth" in rows[1]


def test_plain_fields_by_hand():
    """Two patches of a row of three, a quarter and three quarters, seen from the first."""
    layout = TokenLayout(1, 3)
    row = np.array([0.25, 0, 0.75])
    found = plain(np.tile(row, (1, 3, 1)), layout)
    assert found["tendency"][0, 0] == pytest.approx([0, 1.5])
    assert found["spread"][0, 0] == pytest.approx(np.sqrt(0.75 * 4))
    assert found["axes"][0, 0] == pytest.approx([np.sqrt(0.75), 0])


def test_windows(run):
    rows = run("windows", "--sides", "4,5", "--repeats", "1", "--maps", "1", "--sweep-up-to", "16")
    positive(rows, "us_image", "compile_s")
    assert rows[0]["equal_windows"] == 1 and "sweep_us_image" not in rows[1]


def test_windows_attention(run, tmp_path):
    from benchmarks.windows_attention import box_windows, laplace_windows

    layout = TokenLayout(4, 4)
    boxes = [laplace_windows(layout, 0.5), box_windows(layout, 0.25)]
    np.save(tmp_path / "mine.npy", np.stack(boxes))
    rows = run("windows_attention", "--windows", str(tmp_path / "mine.npy"), "--repeats", "1")
    assert [row["what"] for row in rows] == ["mine 0", "mine 1"]
    positive(rows, "area", "products", "dense_ms", "jax_ms", "windows_ms", "faster",
             "faster_than_jax", "cpu_faster", "dense_mib", "windows_mib")  # fmt: skip
    assert rows[1]["area"] == 0.25


@pytest.mark.slow
def test_gpu(run, shallow, monkeypatch):
    """On a CPU, where kernels are interpreted; its sizes are a GPU's."""
    from benchmarks import gpu

    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # as before, afterwards
    small = ("vit_ti16@32", 2, ("attention", "edge")), ("vit_ti16@32", 1, ("attention",))
    monkeypatch.setattr(gpu, "_MODELS", small)
    monkeypatch.setattr(gpu, "_TRAINED", ("vit_ti16",))
    monkeypatch.setattr(gpu, "TokenLayout", lambda rows, cols: TokenLayout(4, 4))
    # One image a device.
    rows = run("gpu", "--no-peer", "--repeats", "1", "--batch-size", "8")
    positive(rows, "ms", "images_s", "ratio", "mfu", "temporary_mib")
    names = [row["what"] for row in rows]
    for start, count in (("forward", 3), ("attention, XLA", 1), ("flash", 4), ("windows of", 4),
                         ("step", 4), ("indicator alongside", 1), ("data", 4)):  # fmt: skip
        assert sum(name.startswith(start) for name in names) == count, start


def test_bytes_of_a_program():
    """What kernels read and write, without a product's scratch space and what only names."""
    from benchmarks.gpu_program import kernels

    program = """HloModule some
%fused (p: f32[9]) -> f32[9] {
  ROOT %inner = f32[9]{0} add(%p, %p)
}

ENTRY %main (x: bf16[512,1024]) -> f32[512] {
  %x = bf16[512,1024]{1,0} parameter(0), metadata={op_name="x"}
  %seen = bf16[1024,512]{0,1} bitcast(%x)
  %cublas-lt.1 = (bf16[512,512]{1,0}, s8[33554432]{0}) custom-call(%x, %seen), target="q"
  %of.1 = bf16[512,512]{1,0} get-tuple-element(%cublas-lt.1), index=0
  ROOT %sum.1 = f32[512]{0:T(128)} fusion(%of.1), kind=kInput, calls=%fused
}"""
    found = {one.name: one.gib * 2**30 for one in kernels(program)}
    mib = 2**20
    assert found == {"cublas-lt.1": 2.5 * mib, "sum.1": mib / 2 + 2048}


@pytest.mark.slow
def test_gpu_program(run):
    """Without the embedding in one axis, each layer's tokens are transposed."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="XLA's compiler for GPUs")
    rows = run("gpu_program", "--model", "vit_ti16", "--batch-size", "8", "--depth", "1")
    positive(rows, "kernels", "gib", "others_gib")
    assert rows[0]["transposing_gib"] < 0.1 * rows[0]["others_gib"]


def test_statistics(run):
    rows = run("statistics", "--parts", "update", "--sides", "3,4", "--repeats", "1")
    positive(rows, "us_image", "numpy_us_image", "cpu_ratio")


@pytest.mark.slow
def test_high_resolution(run, shallow):
    options = ("--model", "vit_ti16", "--sizes", "32,48", "--indicators", "attention")
    rows = run("high_resolution", *options, "--compile-only")
    assert [row["patches"] for row in rows] == [4, 4, 9, 9]
    assert "s_image" not in rows[0]
    positive(rows, "temporary_mib", "output_mib", "memory_ratio")


def test_data_path(run):
    pytest.importorskip("grain")
    rows = run("data_path", "--limit", "8", "--batch", "4", "--size", "32", "--repeats", "1")
    names = [row["what"] for row in rows]
    assert {"stage: read", "bare Pillow loop", "ours, folder"} <= set(names)
    positive(rows, "images_s", "cpu_ms_image", "share", "cpu_share")


@pytest.mark.slow
def test_memory_and_training(run, shallow):
    rows = run("memory", "--model", "vit_ti16", "--depth", "2", "--only", "attention", "edge")
    positive(rows, "temporary_mib", "ratio")
    rows = run("training", "--size", "32", "--batch-size", "8", "--repeats", "1")
    positive(rows, "images_s", "s_step", "mfu", "ratio")


@pytest.mark.slow
def test_viewer(run):
    pytest.importorskip("playwright.sync_api")
    if shutil.which("chromium") is None:
        pytest.skip("there is no chromium here")
    rows = run("viewer", "--images", "1", "--indicators", "attention", "--repeats", "3")
    assert [(row["patches"], row["overlays"]) for row in rows] == [
        (256, "usual"), (256, "all"), (1369, "usual"), (1369, "all"),
    ]  # fmt: skip
    positive(rows, "script_ms", "task_ms", "file_mb", "first_view_s")


@pytest.mark.slow
def test_scaling():
    """In a process of its own, where the number of devices is still to be had."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--json", "--devices", "1,2",
               "--batch", "8"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {(row["strategy"], row["processes"]) for row in rows} >= {
        ("one device", 1), ("replicate", 1), ("fsdp", 2), ("tensor", 2),
    }  # fmt: skip
    assert all(row["difference"] < 1e-4 for row in rows)
    sent = {row["strategy"]: row["wire_mib"] for row in rows if row["processes"] == 1}
    assert sent["one device"] == 0 and min(sent[name] for name in ("replicate", "fsdp")) > 0


def test_volume_counts_collectives():
    """By hand: 1 KiB reduced over 4, 2 KiB gathered over 2, and a mesh as newer XLA writes it."""
    from benchmarks.scaling import volume

    text = """
      %a = f32[16,16]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
      %b = f32[512]{0} all-gather(%y), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}
      %c = (f32[4]{0}, bf16[8]{0}) all-reduce(%p, %q), replica_groups=mesh['a'=2,'b'=2] {'b'}
    """
    row = volume(text, 4)
    assert row["all-reduce_mib"] * 2**20 == 1024 + 16 + 16
    assert row["all-gather_mib"] * 2**20 == 2048
    assert row["wire_mib"] * 2**20 == 1024 * 1.5 + 2048 / 2 + 32 * 1


def test_volume_of_a_compiled_program():
    """A product whose contracted axis lies on two devices needs one sum of its result."""
    from benchmarks.scaling import volume

    mesh = jax.make_mesh(
        (2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((8, 64), "float32", sharding=place)
    step = jax.jit(lambda x: x @ x.T, out_shardings=whole)
    row = volume(step.lower(x).compile().as_text(), 2)
    assert row["all-reduce_mib"] * 2**20 == 8 * 8 * 4


def test_turns_leave_the_warm_up_out():
    calls = {"a": [], "b": []}
    times = common.take_turns({name: lambda n=n: n.append(1) for name, n in calls.items()}, 3)
    assert [len(n) for n in calls.values()] == [4, 4]
    assert len(times["a"].wall) == len(times["b"].cpu) == 3
    base = common.Times((1.0, 2.0, 4.0), (1.0, 1.0, 1.0))
    other = common.Times((2.0, 6.0, 4.0), (1.0, 1.0, 3.0))
    assert other.ratio(base) == 2.0 and other.cpu_ratio(base) == 1.0 and other.seconds == 4.0


def test_tables_are_made_from_files(tmp_path, monkeypatch):
    from tools import benchmark_tables

    monkeypatch.setattr(benchmark_tables, "RESULTS", tmp_path)
    report = common.Report("fields", {"maps": 2})
    report.setting["load_before"] = 7.5
    report.add(patches=16, us_image=12345.6, note=float("nan"))
    (tmp_path / "fields.json").write_text(json.dumps(report.to_dict()))
    page = "# x\n<!-- table fields -->\nold\n<!-- end -->\n<!-- table none -->\n<!-- end -->\nend\n"
    filled = benchmark_tables.fill(page)
    assert "| patches | us_image | note |" in filled and "| 16 | 12346 |  |" in filled
    assert "cores were shared" in filled and "old" not in filled and "Not run yet" in filled
    assert benchmark_tables.fill(filled) == filled


def test_targets_are_compared_with_what_was_found(tmp_path, monkeypatch):
    from tools import benchmark_tables

    monkeypatch.setattr(benchmark_tables, "RESULTS", tmp_path)
    report = common.Report("indicators", {})
    for batch, ratio in ((1, 1.104), (8, 1.12)):  # to two digits, the first is at most 1.10
        report.add(model="vit_s16", batch=batch, what="attention", ratio=ratio, cpu_ratio=1.0)
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "indicators_x.json").write_text(json.dumps(report.to_dict()))
    filled = benchmark_tables.fill("<!-- targets host -->\n<!-- end -->\n")
    assert "|  | ViT-S/16 | holds |" in filled and "ViT-S/16: 1 / 8." in filled
    assert "1.10 x forward | 1.10 (1.00) / 1.12 (1.00) | **no** in 1 of 2 |" in filled
    assert "| `edge` at most 3.3 x | – / – |  |" in filled
    assert benchmark_tables.fill(filled) == filled


@pytest.mark.slow
def test_analyze(run):
    rows = run("analyze", "--few", "1", "--many", "3", "--repeats", "1")
    assert [row["figures"] for row in rows] == ["none", "received_impact", "all"]
    positive(rows, "few_s", "cpu_image_s")
    assert rows[0]["cpu_image_s"] < rows[2]["cpu_image_s"]


@pytest.mark.slow
def test_start(run):
    rows = run("start", "--repeats", "1")
    assert [row["what"] for row in rows] == ["--help", "analyze, cold", "analyze, kept"]
    positive(rows, "first_s", "cpu_first_s", "all_s", "cpu_all_s")
    for row in rows[1:]:
        assert row["first_s"] < row["all_s"] and row["cpu_first_s"] < row["cpu_all_s"]
    assert rows[2]["cpu_all_s"] < rows[1]["cpu_all_s"]

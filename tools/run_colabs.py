"""Executes the notebooks of colabs/, and makes the outputs that are committed.

python tools/run_colabs.py                        # all of them, in place
python tools/run_colabs.py analyze verify         # these, in place
python tools/run_colabs.py --out /tmp/ran verify  # leaves colabs/ as it is

Each runs in an empty folder with the kernel of this Python. For each, the time, that of its slowest
cell and the size are printed; a failing cell, or a notebook of 400 kB or more, ends it with exit
status 1.
"""

import argparse
import base64
import datetime
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COLABS = Path(__file__).parents[1] / "colabs"
MOST_BYTES = 400_000
# A picture beyond this gets larger steps between the levels of a channel.
MOST_PICTURE = 100_000
# Of one cell: the whole notebook is meant to take less than three minutes on two idle cores.
TIMEOUT = 900
WIDGET = "application/vnd.jupyter.widget-view+json"


def notebooks(names: list[str]) -> list[Path]:
    """Files of the named notebooks; all of them without names.

    Raises:
      ValueError: for a name that is not there.
    """
    known = {path.stem: path for path in sorted(COLABS.glob("*.ipynb"))}
    for name in names:
        if name not in known:
            raise ValueError(f"{name}: no such notebook; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def execute(path: Path, folder: str) -> tuple[Any, list[float]]:
    """Runs a notebook from the first cell to the last.

    Args:
      path: the notebook.
      folder: that its kernel works in.

    Returns:
      The notebook with outputs, stripped of what no reader sees, and seconds of each code cell.

    Raises:
      CellExecutionError: when a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",  # that of this Python, whatever is registered
        resources={"metadata": {"path": folder}},
        extra_arguments=["--log-level=ERROR"],
        store_widget_state=False,
    )
    # A notebook may start in an interactive session that has chosen another backend.
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    client.execute(env=environment)
    seconds = [_seconds(cell) for cell in notebook.cells if cell.cell_type == "code"]
    return strip(notebook), seconds


def _seconds(cell: Any) -> float:
    timing = cell.metadata["execution"]
    begun, ended = (
        datetime.datetime.fromisoformat(timing[f"iopub.{name}"])
        for name in ("execute_input", "status.idle")
    )
    return (ended - begun).total_seconds()


def strip(notebook: Any) -> Any:
    """Leaves what a reader sees; changes and returns the notebook."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells[0].outputs = []  # what pip said
    for cell in notebook.cells:
        cell.metadata = {}
    for cell in cells:
        cell.outputs = [_stripped(output) for output in _joined(cell.outputs)]
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Text that came in pieces, by chance of timing, as one."""
    found: list[Any] = []
    for output in outputs:
        last = found[-1] if found else None
        same = last is not None and (last.output_type, output.output_type) == ("stream", "stream")
        if same and last.name == output.name:
            last.text += output.text
        else:
            found.append(output)
    return found


def _stripped(output: Any) -> Any:
    if "data" not in output:
        return output
    output.metadata = {}
    data = output.data
    # A widget is its page and its kernel; neither is in the file.
    if data.pop(WIDGET, None) is not None:
        data["text/plain"] = "(the interactive view: run the cell to see it)"
    if "image/png" in data:
        data["image/png"] = _coarse(data["image/png"])
        data["text/plain"] = "<Figure>"
    return output


def _coarse(encoded: str) -> str:
    """A PNG of fewer levels: photographs under heat compress badly, steps of 8 are hard to see."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    for step in (8, 16):
        levels = [min((level + step // 2) // step * step, 255) for level in range(256)]
        buffer = io.BytesIO()
        picture.point(levels * 3).save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= MOST_PICTURE:
            break
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> int:
    """Runs what is asked for; the number of notebooks that failed or are too large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="such as analyze; all if none is given")
    parser.add_argument("--out", type=Path, default=COLABS, help="folder to write to")
    arguments = parser.parse_args()
    try:
        chosen = notebooks(arguments.names)
    except ValueError as error:
        parser.error(str(error))
    import nbformat
    from nbclient.exceptions import CellExecutionError

    arguments.out.mkdir(parents=True, exist_ok=True)
    bad = 0
    for path in chosen:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                notebook, cells = execute(path, folder)
            except CellExecutionError as error:
                print(f"{path.name}  failed\n{error}", file=sys.stderr)
                bad += 1
                continue
        seconds = time.perf_counter() - start
        target = arguments.out / path.name
        unfinished = target.with_suffix(".unfinished")
        nbformat.write(notebook, unfinished)
        os.replace(unfinished, target)
        size = target.stat().st_size
        large = size >= MOST_BYTES
        bad += large
        told = f"  too large: expected less than {MOST_BYTES:,}" if large else ""
        slowest = f"code cell {cells.index(max(cells)) + 1} {max(cells):.0f} s"
        print(f"{path.name}  {seconds:.0f} s ({slowest})  {size:,} bytes{told}", flush=True)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
